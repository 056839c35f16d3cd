// y = a*x + y: the smallest kernel that shows that the whole path works, from Python through a
// pointer and a stream to the device and back. Only tests launch it.
//
// Who owns what: thread i of the grid owns elements i, i + gridDim*blockDim, ... and nothing is
// exchanged. Reads x and y once, writes y once.
#pragma once

#include <cstdint>

#include "device/platform.h"

namespace rnnlm {

struct ProbeTraits {
  static constexpr int kThreads = 256;  // enough warps to hide a load, on every architecture
  static constexpr int kMaxBlocks =
      1024;  // beyond a few waves of any device a longer loop is as good
};

struct ProbeArguments {
  const float* x_ptr;  // [n]
  float* y_ptr;        // [n]
  std::int64_t n;
  float a;
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) probe_kernel(ProbeArguments p) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * Traits::kThreads;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
  for (; i < p.n; i += stride) p.y_ptr[i] = p.a * p.x_ptr[i] + p.y_ptr[i];
}

}  // namespace rnnlm
