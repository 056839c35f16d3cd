// Launcher of csrc/kernels/probe.cuh. Free of CUDA headers, so that a plain C++ compiler can
// include it.
#pragma once

#include <cstdint>

#include "core/status.h"

namespace rnnlm {

struct ProbeParams {
  const float* x_ptr;  // [n], on `device`
  float* y_ptr;        // [n], on `device`; read and written
  std::int64_t n;      // 0 is allowed and launches nothing
  float a;
  int device;
  std::uintptr_t stream;  // cudaStream_t; 0 is the default stream
};

// Enqueues y = a*x + y on the stream and returns without waiting for it.
Status launch_probe(const ProbeParams& params);

}  // namespace rnnlm
