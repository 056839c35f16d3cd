// device/ptx.h on a CPU: the same names with the same meaning. The extra argument `where` is the
// caller's place in the source, for reports. machine.cpp tells how the emulated device works.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator/device.h"

namespace rnnlm::ptx {

using emulator::Where;

// --- threads -------------------------------------------------------------------------------------

constexpr int kMostSharedBytes = 227 * 1024;
constexpr bool kHasMulticast = true;
inline unsigned char* dynamic_shared() {
  return emulator::current->shared;
}
void warp_sync(Where where = Where::here());
bool warp_any(bool predicate, Where where = Where::here());

// The bits of the value of the lane `selector`, or of the own lane number xor `selector`.
uint64_t shuffle_bits(uint64_t bits, int selector, bool is_xor, Where where);

template <class V>
V shuffle_as(V value, int selector, bool is_xor, Where where) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = shuffle_bits(bits, selector, is_xor, where);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}
template <class V>
V shuffle(V value, int lane, Where where = Where::here()) {
  return shuffle_as(value, lane, false, where);
}
template <class V>
V shuffle_xor(V value, int mask, Where where = Where::here()) {
  return shuffle_as(value, mask, true, where);
}

template <class V>
V computed(V value) {
  return value;
}

// --- global memory -------------------------------------------------------------------------------

uint32_t ld_relaxed(const uint32_t* p, Where where = Where::here());
uint4 ld_relaxed_v4(const uint4* p, Where where = Where::here());
uint32_t ld_acquire(const uint32_t* p, Where where = Where::here());
void st_relaxed(uint32_t* p, uint32_t v);
void st_relaxed_v4(uint4* p, uint4 v);
void st_release(uint32_t* p, uint32_t v);
void red_release_add(uint32_t* p, uint32_t v);
void st_weak(uint32_t* p, uint32_t v);
inline void prefetch_l2(const void*) {}
void pause(Where where = Where::here());
uint64_t nanoseconds();

// --- clusters ------------------------------------------------------------------------------------

uint32_t cluster_rank();
uint32_t shared_address(const void* p);
uint32_t cluster_address(uint32_t address, uint32_t rank);
void st_async_v4(uint32_t cluster_address, uint4 v, uint32_t cluster_mbarrier);
void mbarrier_init(uint32_t address, uint32_t arrivals);
void mbarrier_init_fence();
void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes);
bool mbarrier_try_wait(uint32_t address, uint32_t parity, Where where = Where::here());
void mbarrier_arrive_cluster(uint32_t cluster_mbarrier);
void copy_multicast(uint32_t address, const void* from, uint32_t bytes, uint32_t mbarrier,
                    uint16_t ctas);
inline void fence_async_copies() {}
inline void fence_async_overwriting() {}
void cluster_arrive();
void cluster_arrive_relaxed();
void cluster_wait(Where where = Where::here());

// --- programmatic dependent launch ---------------------------------------------------------------

void wait_for_earlier_launches();
inline void let_next_launch_start() {}

// --- tensor cores --------------------------------------------------------------------------------

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              Where where = Where::here());
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
             Where where = Where::here());
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              Where where = Where::here());

// --- numbers -------------------------------------------------------------------------------------

inline float exp2_approx(float x) {
  return std::exp2(x);
}
inline float reciprocal_approx(float x) {
  return 1.0f / x;
}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline double double_from_bits(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline void double_bits(double x, uint32_t& low, uint32_t& high) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  low = static_cast<uint32_t>(bits);
  high = static_cast<uint32_t>(bits >> 32);
}

// The conversions give the NaN that the hardware gives, whatever the payload was.
inline bool is_nan_bits(uint32_t bits) {
  return (bits & 0x7FFFFFFFu) > 0x7F800000u;
}
inline uint16_t bf16_bits(float x) {
  const uint32_t bits = float_bits(x);
  if (is_nan_bits(bits)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t f16_bits(float x) {
  const uint32_t bits = float_bits(x);
  if (is_nan_bits(bits)) return 0x7FFF;
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  // 65520 and above, half a step beyond the largest finite number, is infinity.
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {
    // Below 2^-14: a multiple of 2^-24. Adding 0.5, whose last bit is worth that, rounds to it.
    const uint32_t steps = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
    return static_cast<uint16_t>(sign | steps);
  }
  const uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0xFFFu + (rebiased >> 13 & 1u)) >> 13);
}
inline uint32_t bf16_pair_bits(float low, float high) {
  return bf16_bits(low) | static_cast<uint32_t>(bf16_bits(high)) << 16;
}
inline uint32_t f16_pair_bits(float low, float high) {
  return f16_bits(low) | static_cast<uint32_t>(f16_bits(high)) << 16;
}
inline float f16_value(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
  if (magnitude > 0x7C00u) return float_from_bits(0x7FFFFFFFu);
  if (magnitude == 0x7C00u) return float_from_bits(sign | 0x7F800000u);
  if (magnitude < 0x0400u) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return float_from_bits(sign | float_bits(value));
  }
  return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  if (is_nan_bits(bits)) return 0x7FFFFFFFu;
  return (bits + 0x1000u) & 0xFFFFE000u;
}

}  // namespace rnnlm::ptx
