// The end of every persistent call: if its launch gave up waiting, no output of it may look like a
// result.
//
// One small launch behind the persistent one, on the same stream. Every CTA reads the abort word;
// nearly always it is 0 and that is all. Otherwise the CTAs fill all outputs with 0xFF, a NaN of
// every dtype, and one thread leaves word for the host (launch/guard.h).
#pragma once

#include "device/exchange.h"

namespace rnnlm {

struct FinishParams {
  static constexpr int kMaxOutputs = 5;
  struct Output {
    uint16_t* p;  // tensors of at least 16-bit elements; null: not there
    int64_t count;
  };
  const uint32_t* abort_word;
  uint32_t* failure;      // in host memory
  uint32_t failure_tier;  // failure_word(tier, 0)
  Output outputs[kMaxOutputs];
};

struct FinishTraits {
  static constexpr int kThreads = 128;
  static constexpr int kCtas = 8;  // few: what counts is how little the ordinary case costs
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) finish_kernel(FinishParams params) {
  const uint32_t reason = ptx::ld_relaxed(params.abort_word);
  if (reason == kRunning) return;
  const int64_t first = int64_t{blockIdx.x} * Traits::kThreads + threadIdx.x;
  // Unrolled, for an array of parameters that is indexed becomes local memory on some GPUs.
  RNNLM_UNROLL
  for (int k = 0; k < FinishParams::kMaxOutputs; ++k) {
    const FinishParams::Output output = params.outputs[k];
    for (int64_t i = first; i < output.count; i += int64_t{Traits::kCtas} * Traits::kThreads)
      output.p[i] = 0xFFFF;
  }
  if (first == 0) *params.failure = params.failure_tier | reason;
}

}  // namespace rnnlm
