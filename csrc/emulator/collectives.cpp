// What threads of a CTA or a warp do together: each leaves what it brings and is woken when the
// last has come. See machine.cpp.
#include <array>
#include <cstring>
#include <utility>

#include "emulator/state.h"

namespace rnnlm::emulator {

void complete_barrier(Cta& cta) {
  cta.at_barrier = 0;
  ++cta.epoch;
  for (unsigned w = 0; w < warps_per_cta(); ++w)
    wake(cta.warps[w], std::exchange(cta.warps[w].at_barrier, 0));
}

namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

void barrier(Where where) {
  Fiber& f = self();
  Cta& cta = *f.cta;
  check_fences(cta, /*all=*/false);
  check_fences(cta, /*all=*/true);
  if (!machine.error.empty()) leave();
  if (cta.at_barrier == 0) {
    cta.barrier = where;
    cta.barrier_thread = f.thread.x;
  } else if (cta.barrier.line != where.line || std::strcmp(cta.barrier.file, where.file) != 0) {
    fail("is at the __syncthreads of " + place(where) + " while thread " +
         std::to_string(cta.barrier_thread) + " waits at that of " + place(cta.barrier));
  }
  ++cta.at_barrier;
  f.warp->at_barrier |= f.lane_bit;
  f.waits = Waits::kBarrier;
  f.where = where;
  if (cta.at_barrier < cta.alive) {
    block();
  } else {
    complete_barrier(cta);
    leave();
  }
  f.waits = Waits::kNothing;
}

// Element `half` of an operand's word, as a float of the same value.
float operand(Collective kind, uint32_t word, int half) {
  if (kind == Collective::kMmaTf32) return ptx::float_from_bits(word & 0xFFFFE000u);
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * half);
  if (kind == Collective::kMmaF16) return ptx::f16_value(bits);
  return ptx::float_from_bits(static_cast<uint32_t>(bits) << 16);
}

// The layout of the fragments is that of the PTX manual; see device/ptx.h.
void multiply(Collective kind, const std::array<LaneData*, 32>& lanes) {
  const int per_word = kind == Collective::kMmaTf32 ? 1 : 2, depth = 8 * per_word;
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const LaneData& data = *lanes[static_cast<std::size_t>(lane)];
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < per_word; ++half) {
      for (int i = 0; i < 4; ++i)
        a[g + 8 * (i % 2)][(t + 4 * (i / 2)) * per_word + half] = operand(kind, data.a[i], half);
      for (int i = 0; i < 2; ++i)
        b[(t + 4 * i) * per_word + half][g] = operand(kind, data.b[i], half);
    }
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = data.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      lanes[static_cast<std::size_t>(lane)]->d[i] =
          d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
  }
}

void complete_collective(Warp& warp) {
  std::array<uint64_t, 32> values;
  uint64_t any = 0;
  for (std::size_t i = 0; i < 32; ++i) any |= values[i] = warp.data[i]->value;
  for (std::size_t i = 0; i < 32; ++i) {
    LaneData& data = *warp.data[i];
    const std::size_t selector = static_cast<unsigned>(data.selector);
    if (warp.kind == Collective::kAny) data.value = any;
    if (warp.kind == Collective::kShuffle) data.value = values[selector % 32];
    if (warp.kind == Collective::kShuffleXor) data.value = values[(i ^ selector) % 32];
  }
  if (warp.kind == Collective::kSync) ++warp.epoch;
  if (warp.kind < Collective::kMmaBf16) return;
  multiply(warp.kind, warp.data);
  something_happened();  // nobody multiplies while he polls
}

void collective(Collective kind, LaneData& data, Where where) {
  Fiber& f = self();
  Warp& warp = *f.warp;
  const auto here = [&] {
    return std::string("takes part in ") + name_of(kind) + " at " + place(where);
  };
  if (warp.exited != 0) {
    fail(here() + ", but lane " + std::to_string(__builtin_ctz(warp.exited)) +
         " of its warp has ended");
  }
  if (warp.arrived != 0 && warp.kind != kind) {
    const Fiber& other = warp.lanes[__builtin_ctz(warp.arrived)];
    fail(here() + " while thread " + std::to_string(other.thread.x) + " of its warp waits in " +
         name_of(warp.kind) + " at " + place(other.where));
  }
  warp.kind = kind;
  warp.arrived |= f.lane_bit;
  warp.data[f.thread.x % 32] = &data;
  f.waits = Waits::kCollective;
  f.where = where;
  if (warp.arrived != kAllLanes) {
    block();
  } else {
    complete_collective(warp);
    warp.arrived = 0;
    wake(warp, kAllLanes);
  }
  f.waits = Waits::kNothing;
}

void mma(Collective kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         Where where) {
  LaneData data{0, 0, d, a, b};
  collective(kind, data, where);
}

}  // namespace
}  // namespace rnnlm::emulator

void __syncthreads(rnnlm::emulator::Where where) {
  rnnlm::emulator::barrier(where);
}

namespace rnnlm::ptx {

using emulator::Collective;
using emulator::LaneData;

void warp_sync(Where where) {
  LaneData data;
  emulator::collective(Collective::kSync, data, where);
}
bool warp_any(bool predicate, Where where) {
  LaneData data{predicate};
  emulator::collective(Collective::kAny, data, where);
  return data.value != 0;
}
uint64_t shuffle_bits(uint64_t bits, int selector, bool is_xor, Where where) {
  LaneData data{bits, selector};
  emulator::collective(is_xor ? Collective::kShuffleXor : Collective::kShuffle, data, where);
  return data.value;
}
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  emulator::mma(Collective::kMmaBf16, d, a, b, where);
}
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  emulator::mma(Collective::kMmaF16, d, a, b, where);
}
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  emulator::mma(Collective::kMmaTf32, d, a, b, where);
}

}  // namespace rnnlm::ptx
