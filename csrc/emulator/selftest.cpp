#include "emulator/selftest.h"

#include "device/philox.h"
#include "device/ptx.h"
#include "launch/launch.h"

namespace rnnlm::emulator {
namespace {

constexpr unsigned kCtas = 4;
constexpr unsigned kThreads = 128;

enum Variant : int {
  kCorrect,
  // Bugs.
  kNoBarrier,
  kWritesAbove,
  kWritesFarAbove,
  kWritesBelow,
  kNeverWritten,
  kRelaxedFlag,
  kNoFence,
  kLeavesEarly,
  kExpectsMore,
  kUnexamined,
  kLaneLeaves,
  kLanesDiverge,
  kTwoBarriers,
  kBarrierAndPoll,
  // Kinds of mma and convert.
  kBf16,
  kF16,
  kTf32,
  kFromF16,
};

// --- shared memory and barriers ------------------------------------------------------------------

// out[cta]: the sum of the CTA's kThreads floats of `in`, as a tree.
__global__ void __launch_bounds__(kThreads) block_sum(SelftestParams p) {
  float* sums = reinterpret_cast<float*>(ptx::dynamic_shared());
  const unsigned t = threadIdx.x;
  sums[t] = ptx::float_from_bits(p.in[blockIdx.x * kThreads + t]);
  if (p.variant == kWritesAbove && t == 77) sums[kThreads] = 1;
  if (p.variant == kWritesFarAbove && t == 77) sums[kThreads + 100] = 1;
  if (p.variant == kWritesBelow && t == 77) sums[-1] = 1;
  if (p.variant != kNoBarrier) __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) sums[t] += sums[t + half];
    __syncthreads();
  }
  if (t == 0) p.out[blockIdx.x] = ptx::float_bits(sums[0]);
}

// out[0]: what shared memory holds before anything is stored there. Waits for earlier launches.
__global__ void __launch_bounds__(kThreads) untouched(SelftestParams p) {
  ptx::wait_for_earlier_launches();
  if (threadIdx.x == 0) p.out[0] = *reinterpret_cast<const uint32_t*>(ptx::dynamic_shared());
}

// Warps that do not do the same.
__global__ void __launch_bounds__(kThreads) divergent(SelftestParams p) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t value = lane;
  if (p.variant == kLaneLeaves) {
    if (threadIdx.x == 37) return;
    value = ptx::shuffle(value, 0);
  }
  if (p.variant == kLanesDiverge) {
    if (lane < 16) {
      value = ptx::shuffle_xor(value, 1);
    } else {
      value = ptx::warp_any(value == 0);
    }
  }
  if (p.variant == kTwoBarriers) {
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (p.variant == kBarrierAndPoll) {
    if (warp == 0) {
      while (ptx::ld_relaxed(p.scratch) == 0) ptx::pause();
    }
    __syncthreads();
    if (warp == 1) ptx::st_relaxed(p.scratch, 1);
  }
  p.out[blockIdx.x * kThreads + threadIdx.x] = value;
}

// A quarter of the threads leaves, and the others still meet. out[thread]: 1 where it stayed.
__global__ void __launch_bounds__(kThreads) some_leave(SelftestParams p) {
  if (threadIdx.x / 32 == 2) return;
  __syncthreads();
  p.out[blockIdx.x * kThreads + threadIdx.x] = 1;
}

// --- warps ---------------------------------------------------------------------------------------

// in[lane]: a source lane. out[i * 32 + lane]: 0: the lane number at that lane, 1: the lane number
// + 0.5 at lane ^ n, 2 and 3: the low and high word of the double 1 / (lane + 1) at that lane,
// 4: whether any lane's source is n.
__global__ void __launch_bounds__(32) shuffles(SelftestParams p) {
  const int lane = static_cast<int>(threadIdx.x), source = static_cast<int>(p.in[lane]);
  p.out[lane] = ptx::shuffle(static_cast<uint32_t>(lane), source);
  const float half = ptx::shuffle_xor(static_cast<float>(lane) + 0.5f, p.n);
  p.out[32 + lane] = ptx::float_bits(half);
  ptx::double_bits(ptx::shuffle(1.0 / (lane + 1), source), p.out[64 + lane], p.out[96 + lane]);
  p.out[128 + lane] = ptx::warp_any(source == p.n);
  ptx::warp_sync();
}

// in: A [16, k], B [k, 8] and C [16, 8], an element a word. out: C + A B [16, 8].
__global__ void __launch_bounds__(32) mma(SelftestParams p) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const int depth = p.variant == kTf32 ? 8 : 16;
  const uint32_t* a_in = p.in;
  const uint32_t* b_in = a_in + 16 * depth;
  const uint32_t* c_in = b_in + depth * 8;
  float d[4];
  for (int i = 0; i < 4; ++i)
    d[i] = ptx::float_from_bits(c_in[(g + i / 2 * 8) * 8 + 2 * t + i % 2]);
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const uint32_t* row = a_in + (g + i % 2 * 8) * depth;
    const int k = depth == 8 ? t + i / 2 * 4 : 2 * t + i / 2 * 8;
    a[i] = depth == 8 ? row[k] : row[k] | row[k + 1] << 16;
  }
  for (int i = 0; i < 2; ++i) {
    const int k = depth == 8 ? t + i * 4 : 2 * t + i * 8;
    b[i] = depth == 8 ? b_in[k * 8 + g] : b_in[k * 8 + g] | b_in[(k + 1) * 8 + g] << 16;
  }
  if (p.variant == kBf16) ptx::mma_bf16(d, a, b);
  if (p.variant == kF16) ptx::mma_f16(d, a, b);
  if (p.variant == kTf32) ptx::mma_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = ptx::float_bits(d[i]);
}

// out[i]: in[i], a float (of from_f16: 16 bits), converted; n elements.
__global__ void __launch_bounds__(kThreads) convert(SelftestParams p) {
  for (int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x); i < p.n;
       i += static_cast<int>(gridDim.x * kThreads)) {
    const float x = ptx::float_from_bits(p.in[i]);
    if (p.variant == kBf16) p.out[i] = ptx::bf16_bits(x);
    if (p.variant == kF16) p.out[i] = ptx::f16_bits(x);
    if (p.variant == kTf32) p.out[i] = ptx::to_tf32(x);
    if (p.variant == kFromF16)
      p.out[i] = ptx::float_bits(ptx::f16_value(static_cast<uint16_t>(p.in[i])));
  }
}

// --- the grid ------------------------------------------------------------------------------------

// The payload is its own flag. n rounds; in round r CTA c publishes scratch[r, c] =
// (3 * sum of the round before + c + 1) | 1 << 31, and all CTAs wait for all. out[cta]: the last
// sum.
__global__ void __launch_bounds__(kThreads) payload_as_flag(SelftestParams p) {
  uint32_t* words = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  const unsigned t = threadIdx.x;
  uint32_t sum = 0;
  for (int round = 0; round < p.n; ++round) {
    uint32_t* row = p.scratch + static_cast<unsigned>(round) * gridDim.x;
    const bool silent = p.variant == kNeverWritten && round == 1 && blockIdx.x == 1;
    if (t == 0 && !silent) ptx::st_relaxed(row + blockIdx.x, (3 * sum + blockIdx.x + 1) | 1u << 31);
    if (t < gridDim.x) {
      while ((words[t] = ptx::ld_relaxed(row + t)) == 0) ptx::pause();
    }
    __syncthreads();
    sum = 0;
    for (unsigned c = 0; c < gridDim.x; ++c) sum += words[c];
    __syncthreads();
  }
  if (t == 0) p.out[blockIdx.x] = sum;
}

// A wait with an end: scratch[0] is stored by CTA 1 unless told otherwise. out[cta]: 1 when it saw
// the word, 2 when n milliseconds went by before.
__global__ void __launch_bounds__(32) timed_wait(SelftestParams p) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 1 && p.variant != kNeverWritten) ptx::st_relaxed(p.scratch, 1);
  const uint64_t limit = ptx::nanoseconds() + static_cast<uint64_t>(p.n) * 1000000;
  while (ptx::ld_relaxed(p.scratch) == 0) {
    if (ptx::nanoseconds() > limit) {
      p.out[blockIdx.x] = 2;
      return;
    }
    ptx::pause();
  }
  p.out[blockIdx.x] = 1;
}

// A flag says that a payload is there. n rounds; in round r CTA r % kCtas stores scratch[r, 0..] =
// r + 1 + thread and releases the flag scratch[n, r]; then all read the payload. out[r, cta]: the
// number of threads that read what was stored.
__global__ void __launch_bounds__(kThreads) flag_handover(SelftestParams p) {
  const unsigned t = threadIdx.x;
  for (int round = 0; round < p.n; ++round) {
    uint32_t* payload = p.scratch + static_cast<unsigned>(round) * kThreads;
    uint32_t* flag = p.scratch + static_cast<unsigned>(p.n) * kThreads + round;
    const uint32_t value = static_cast<uint32_t>(round) + 1 + t;
    if (blockIdx.x == static_cast<unsigned>(round) % kCtas) {
      ptx::st_weak(payload + t, value);
      if (p.variant != kNoBarrier) __syncthreads();
      if (t == 0 && p.variant != kRelaxedFlag) ptx::st_release(flag, 1);
      if (t == 0 && p.variant == kRelaxedFlag) ptx::st_relaxed(flag, 1);
    }
    if (t == 0) {
      while (ptx::ld_acquire(flag) == 0) ptx::pause();
    }
    __syncthreads();
    uint32_t* same = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
    same[t] = payload[t] == value;
    __syncthreads();
    if (t != 0) continue;
    uint32_t count = 0;
    for (unsigned i = 0; i < kThreads; ++i) count += same[i];
    p.out[static_cast<unsigned>(round) * kCtas + blockIdx.x] = count;
  }
}

// Barriers of the grid by counting: n rounds of: every CTA stores scratch[1 + r, cta] = r + cta,
// all wait for all. out[cta]: the sum of all words that it then read.
__global__ void __launch_bounds__(32) grid_barrier(SelftestParams p) {
  uint32_t sum = 0;
  for (uint32_t round = 0; round < static_cast<uint32_t>(p.n); ++round) {
    uint32_t* row = p.scratch + (1 + round) * gridDim.x;
    if (threadIdx.x == 7) ptx::st_weak(row + blockIdx.x, round + blockIdx.x);
    ptx::warp_sync();
    if (threadIdx.x == 0) {
      ptx::red_release_add(p.scratch, 1);
      while (ptx::ld_acquire(p.scratch) < (round + 1) * gridDim.x) ptx::pause();
    }
    ptx::warp_sync();
    for (unsigned c = 0; c < gridDim.x; ++c) sum += row[c];
  }
  if (threadIdx.x == 0) p.out[blockIdx.x] = sum;
}

// Stores to one address arrive in their order, and the storing CTA sees them before. CTA 0 counts
// scratch[0] up to n; out[1..3]: how often the other CTAs saw it go back; out[0]: how often a
// thread did not see its own stores or, after a barrier, its neighbour's.
__global__ void __launch_bounds__(64) order_of_stores(SelftestParams p) {
  const unsigned t = threadIdx.x;
  uint32_t wrong = 0;
  if (blockIdx.x != 0) {
    if (t != 0) return;
    for (uint32_t last = 0; last < static_cast<uint32_t>(p.n);) {
      const uint32_t now = ptx::ld_relaxed(p.scratch);
      wrong += now < last;
      last = now;
    }
    p.out[blockIdx.x] = wrong;
    return;
  }
  uint32_t* shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  uint32_t* mine = p.scratch + 1 + t;
  for (uint32_t i = 1; i <= static_cast<uint32_t>(p.n); ++i) {
    if (t == 0) ptx::st_relaxed(p.scratch, i);
    ptx::st_weak(mine, i);
    wrong += ptx::ld_relaxed(mine) != i;
    __syncthreads();
    wrong += ptx::ld_relaxed(p.scratch + 1 + (t + 1) % 64) != i;
    __syncthreads();
  }
  shared[t] = wrong;
  __syncthreads();
  if (t == 0) {
    for (unsigned i = 1; i < 64; ++i) wrong += shared[i];
    p.out[0] = wrong;
  }
}

// --- random numbers ------------------------------------------------------------------------------

// Thread i takes six words of `in`, a counter and a key, and leaves philox4x32 of them in four.
__global__ void __launch_bounds__(kThreads) philox(SelftestParams p) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= p.n) return;
  const uint32_t* in = p.in + 6 * i;
  const PhiloxWords words = philox4x32({{in[0], in[1], in[2], in[3]}}, in[4], in[5]);
  for (int w = 0; w < 4; ++w) p.out[4 * i + w] = words.word[w];
}

// Thread i draws block i of the seed in[0..1] and the stream in[2..3] (low words first) and leaves,
// for each of its four words, the word, the bits of its uniform number and whether that is kept
// where what is dropped has the probability in[4] (a float's bits).
__global__ void __launch_bounds__(kThreads) random_draws(SelftestParams p) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  const auto wide = [&](int at) { return uint64_t{p.in[at + 1]} << 32 | p.in[at]; };
  const PhiloxWords words = random_words(wide(0), wide(2), i);
  for (unsigned w = 0; w < 4; ++w) {
    uint32_t* out = p.out + 3 * (4 * i + w);
    out[0] = words.word[w];
    out[1] = ptx::float_bits(uniform(words.word[w]));
    out[2] = is_kept(words.word[w], ptx::float_from_bits(p.in[4]));
  }
}

// --- clusters ------------------------------------------------------------------------------------

// All CTAs of a cluster hand each other four words a round. Shared memory: two mbarriers, then
// [round % 2][rank] of 16 bytes. Round r sends x, x + 1, x + 2, x + 3 with x = rank + the sum of
// all words of the round before. out[cta]: the last sum.
//
// Two buffers are enough: who has received round r + 1 from a CTA knows that it has read round r.
__global__ void __launch_bounds__(64) cluster_gather(SelftestParams p) {
  constexpr uint32_t kSize = 4;
  unsigned char* shared = ptx::dynamic_shared();
  const uint32_t t = threadIdx.x, rank = ptx::cluster_rank();
  if (t == 0) {
    for (uint32_t i = 0; i < 2; ++i) ptx::mbarrier_init(ptx::shared_address(shared + 8 * i), 1);
    if (p.variant != kNoFence) ptx::mbarrier_init_fence();
  }
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  uint32_t sum = 0;
  for (uint32_t round = 0; round < static_cast<uint32_t>(p.n); ++round) {
    const uint32_t buffer = round % 2, parity = round / 2 % 2;
    const uint32_t mbarrier = ptx::shared_address(shared + 8 * buffer);
    const unsigned char* place = shared + 16 + 16 * (buffer * kSize + rank);
    if (t == 0) {
      ptx::mbarrier_arrive_expect_tx(mbarrier, 16 * (kSize + (p.variant == kExpectsMore)));
    }
    if (t < kSize) {
      const uint32_t x = rank + sum;
      ptx::st_async_v4(ptx::cluster_address(ptx::shared_address(place), t),
                       make_uint4(x, x + 1, x + 2, x + 3), ptx::cluster_address(mbarrier, t));
    }
    if (p.variant == kLeavesEarly && round + 1 == static_cast<uint32_t>(p.n)) return;
    while (!ptx::mbarrier_try_wait(mbarrier, parity)) ptx::pause();
    const uint32_t* words = reinterpret_cast<const uint32_t*>(shared + 16 + 16 * buffer * kSize);
    sum = 0;
    for (uint32_t i = 0; i < 4 * kSize; ++i) sum += words[i];
    if (p.variant != kNoBarrier) __syncthreads();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (t == 0) p.out[blockIdx.x] = sum;
}

// Pairs of CTAs share what they read: in round r each CTA publishes 16 words r + 1 in scratch[r,
// cta] and copies them, whether they are there or not, into both; words that are not are polled.
// Shared memory: mbarriers for what arrives and for what may be overwritten, then [rank] of 64
// bytes. out[cta]: the sum of all words.
__global__ void __launch_bounds__(32) multicast(SelftestParams p) {
  constexpr uint32_t kWords = 16;
  unsigned char* shared = ptx::dynamic_shared();
  uint32_t* words = reinterpret_cast<uint32_t*>(shared + 16);
  const uint32_t t = threadIdx.x, rank = ptx::cluster_rank();
  const uint32_t full = ptx::shared_address(shared), free = ptx::shared_address(shared + 8);
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(free, 1);
    ptx::mbarrier_init_fence();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  uint32_t sum = 0;
  for (uint32_t round = 0; round < static_cast<uint32_t>(p.n); ++round) {
    const uint32_t parity = round % 2;
    uint32_t* published = p.scratch + (round * gridDim.x + blockIdx.x - rank) * kWords;
    if (t < kWords) ptx::st_relaxed(published + rank * kWords + t, round + 1);
    if (t == 0) {
      while (p.variant != kNoBarrier && !ptx::mbarrier_try_wait(free, parity ^ 1)) ptx::pause();
      ptx::mbarrier_arrive_expect_tx(full, 8 * kWords);
      ptx::copy_multicast(ptx::shared_address(words + rank * kWords), published + rank * kWords,
                          4 * kWords, full, 0b11);
    }
    if (p.variant == kLeavesEarly && round + 1 == static_cast<uint32_t>(p.n)) return;
    while (!ptx::mbarrier_try_wait(full, parity)) ptx::pause();
    uint32_t word = words[t];
    while (p.variant != kUnexamined && word == 0) word = ptx::ld_relaxed(published + t);
    sum += word;
    ptx::warp_sync();
    if (t == 0) ptx::mbarrier_arrive_cluster(ptx::cluster_address(free, rank ^ 1));
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int i = 1; i < 32; i *= 2) sum += ptx::shuffle_xor(sum, i);
  if (t == 0) p.out[blockIdx.x] = sum;
}

// --- the table -----------------------------------------------------------------------------------

struct Selftest {
  const char* name;
  void (*kernel)(SelftestParams);
  Variant variant;
  unsigned ctas, threads;
  std::size_t shared;
  unsigned cluster = 1;
  bool cooperative = false;
};

constexpr Selftest kSelftests[] = {
    {"block_sum", block_sum, kCorrect, kCtas, kThreads, 4 * kThreads},
    {"block_sum without a barrier", block_sum, kNoBarrier, kCtas, kThreads, 4 * kThreads},
    {"block_sum writes above", block_sum, kWritesAbove, kCtas, kThreads, 4 * kThreads},
    {"block_sum writes far above", block_sum, kWritesFarAbove, kCtas, kThreads, 4 * kThreads},
    {"block_sum writes below", block_sum, kWritesBelow, kCtas, kThreads, 4 * kThreads},
    {"untouched", untouched, kCorrect, 1, kThreads, 64},
    {"much shared memory", untouched, kCorrect, 1, kThreads, 200 * 1024},
    {"a lane leaves", divergent, kLaneLeaves, 1, kThreads, 0},
    {"lanes diverge", divergent, kLanesDiverge, 1, kThreads, 0},
    {"two barriers", divergent, kTwoBarriers, 1, kThreads, 0},
    {"barrier and poll", divergent, kBarrierAndPoll, 1, kThreads, 0},
    {"some leave", some_leave, kCorrect, 1, kThreads, 0},
    {"shuffles", shuffles, kCorrect, 1, 32, 0},
    {"mma_bf16", mma, kBf16, 1, 32, 0},
    {"mma_f16", mma, kF16, 1, 32, 0},
    {"mma_tf32", mma, kTf32, 1, 32, 0},
    {"to_bf16", convert, kBf16, 64, kThreads, 0},
    {"to_f16", convert, kF16, 64, kThreads, 0},
    {"to_tf32", convert, kTf32, 64, kThreads, 0},
    {"from_f16", convert, kFromF16, 64, kThreads, 0},
    {"philox", philox, kCorrect, 1, kThreads, 0},
    {"random_draws", random_draws, kCorrect, kCtas, kThreads, 0},
    {"payload_as_flag", payload_as_flag, kCorrect, kCtas, kThreads, 64, 1, true},
    {"payload_as_flag never written", payload_as_flag, kNeverWritten, kCtas, kThreads, 64, 1, true},
    {"timed_wait", timed_wait, kCorrect, kCtas, 32, 0},
    {"timed_wait never written", timed_wait, kNeverWritten, kCtas, 32, 0},
    {"flag_handover", flag_handover, kCorrect, kCtas, kThreads, 4 * kThreads, 1, true},
    {"flag_handover with a relaxed flag", flag_handover, kRelaxedFlag, kCtas, kThreads,
     4 * kThreads, 1, true},
    {"flag_handover without a barrier", flag_handover, kNoBarrier, kCtas, kThreads, 4 * kThreads, 1,
     true},
    {"grid_barrier", grid_barrier, kCorrect, kCtas, 32, 0, 1, true},
    {"grid_barrier not cooperative", grid_barrier, kCorrect, kCtas, 32, 0},
    {"order_of_stores", order_of_stores, kCorrect, kCtas, 64, 256, 1, true},
    {"cluster_gather", cluster_gather, kCorrect, 8, 64, 160, 4},
    {"cluster_gather without a barrier", cluster_gather, kNoBarrier, 8, 64, 160, 4},
    {"cluster_gather without a fence", cluster_gather, kNoFence, 8, 64, 160, 4},
    {"cluster_gather leaves early", cluster_gather, kLeavesEarly, 8, 64, 160, 4},
    {"cluster_gather expects more", cluster_gather, kExpectsMore, 8, 64, 160, 4},
    {"multicast", multicast, kCorrect, 4, 32, 144, 2},
    {"multicast without asking", multicast, kNoBarrier, 4, 32, 144, 2},
    {"multicast unexamined", multicast, kUnexamined, 4, 32, 144, 2},
    {"multicast leaves early", multicast, kLeavesEarly, 4, 32, 144, 2},
};

}  // namespace

std::vector<std::string> selftest_names() {
  std::vector<std::string> names;
  for (const Selftest& test : kSelftests) names.emplace_back(test.name);
  return names;
}

Status launch_selftest(const std::string& name, const SelftestParams& params) {
  for (const Selftest& test : kSelftests) {
    if (name != test.name) continue;
    LaunchShape shape;
    shape.grid_x = test.ctas;
    shape.threads = test.threads;
    shape.shared = test.shared;
    shape.cluster = test.cluster;
    shape.cooperative = test.cooperative;
    SelftestParams given = params;
    given.variant = test.variant;
    return launch(("launching " + name).c_str(), test.kernel, shape, 0, given);
  }
  return Status::invalid_argument("there is no selftest \"" + name + "\"");
}

}  // namespace rnnlm::emulator
