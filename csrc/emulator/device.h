// The part of CUDA's language that kernels use, for a C++ compiler. device/platform.h includes it
// where nvcc does not compile.
//
// Words that a kernel stores with st_relaxed or st_weak are seen late by plain loads, even by those
// of the thread that stored: such words are to be loaded with ld_relaxed or ld_acquire.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::rnnlm::emulator::current->thread)
#define blockIdx (::rnnlm::emulator::current->block)
#define blockDim (::rnnlm::emulator::block_dim)
#define gridDim (::rnnlm::emulator::grid_dim)

#if !defined(__VECTOR_TYPES_H__)  // CUDA's own
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
#endif

namespace rnnlm::emulator {

struct Index3 {
  unsigned x, y, z;
};

// What the thread that runs sees of itself.
struct ThreadView {
  Index3 thread, block;
  unsigned char* shared;  // dynamic shared memory of the CTA
};
extern ThreadView* current;
extern Index3 block_dim, grid_dim;

// Where in a kernel something was called, for reports. As a default argument it is the caller.
struct Where {
  const char* file = "";
  int line = 0;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

}  // namespace rnnlm::emulator

void __syncthreads(rnnlm::emulator::Where where = rnnlm::emulator::Where::here());
