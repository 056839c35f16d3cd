// The CPU kernels of one instruction set, and the choice among those that were built.
#pragma once

#include "core/params.h"

namespace rnnlm::cpu {

// What a kernel did: nothing went wrong, or memory for its workspace could not be had.
enum class Result : int { ok = 0, out_of_memory = 1 };

// A layer's kernel takes one problem, or two that need not wait for each other (its directions), or
// the layers of a stack, each of which but the first `follows`; all of one dtype. Several run at
// the same time where a part of the threads will do for each.
template <class Params>
using LayerKernel = Result (*)(const Params* problems, int count);

struct Kernels {
  const char* isa;
  LayerKernel<LstmForward> lstm_forward;
  LayerKernel<LstmBackward> lstm_backward;
  LayerKernel<GruForward> gru_forward;
  LayerKernel<GruBackward> gru_backward;
  LayerKernel<Linear> linear;
  LayerKernel<LayerGradients> layer_gradients;
  Result (*cross_entropy)(const CrossEntropy&);
  Result (*dropout)(const Dropout&);
  // y = f(x) for n floats (f64: doubles), so that tests reach the vector math: 0 exp, 1 sigmoid,
  // 2 tanh.
  void (*elementwise)(int function, DType dtype, int64_t n, const void* x, void* y);
};

namespace generic {
Kernels kernels();
Result linear(const Linear*, int);
Result layer_gradients(const LayerGradients*, int);
Result cross_entropy(const CrossEntropy&);
Result dropout(const Dropout&);
}  // namespace generic
namespace avx2 {
Kernels kernels();
Result linear(const Linear*, int);
Result layer_gradients(const LayerGradients*, int);
Result cross_entropy(const CrossEntropy&);
Result dropout(const Dropout&);
}  // namespace avx2
namespace avx512 {
Kernels kernels();
Result linear(const Linear*, int);
Result layer_gradients(const LayerGradients*, int);
Result cross_entropy(const CrossEntropy&);
Result dropout(const Dropout&);
}  // namespace avx512

// bfloat16 layers only; the rest is AVX-512's.
namespace avx512bf16 {
Kernels kernels();
Result linear(const Linear*, int);
Result layer_gradients(const LayerGradients*, int);
}  // namespace avx512bf16
namespace amx {
Kernels kernels();
Result linear(const Linear*, int);
Result layer_gradients(const LayerGradients*, int);
}  // namespace amx

// The best instruction set that was built and that this CPU has, or the one that the environment
// variable RNNLM_CPU_ISA names. Chosen at the first call. `error` is null, or says that
// RNNLM_CPU_ISA asks for something that is not there.
struct Choice {
  Kernels kernels;
  const char* error;
  // Whether linear and layer_gradients are faster than the GEMMs of torch's libraries: measured on
  // AMD's CPUs (docs/performance-log.md), not yet on others.
  bool products_pay;
};
const Choice& choose();

}  // namespace rnnlm::cpu
