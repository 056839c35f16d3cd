// The CPU kernels of one instruction set, and the choice among those that were built.
#pragma once

#include "core/params.h"

namespace rnnlm::cpu {

// What a kernel did: nothing went wrong, or memory for its workspace could not be had.
enum class Result : int { ok = 0, out_of_memory = 1 };

// A recurrence takes one problem, or two that need not wait for each other (the directions of a
// layer), or the layers of a stack, each of which but the first `follows`; all of one dtype.
// Several run at the same time where a part of the threads will do for each.
template <class Params>
using Recurrence = Result (*)(const Params* problems, int count);

struct Kernels {
  const char* isa;
  Recurrence<LstmForward> lstm_forward;
  Recurrence<LstmBackward> lstm_backward;
  Recurrence<GruForward> gru_forward;
  Recurrence<GruBackward> gru_backward;
  Result (*cross_entropy)(const CrossEntropy&);
  // y = f(x) for n floats (f64: doubles), so that tests reach the vector math: 0 exp, 1 sigmoid,
  // 2 tanh.
  void (*elementwise)(int function, DType dtype, int64_t n, const void* x, void* y);
};

namespace generic {
Kernels kernels();
Result cross_entropy(const CrossEntropy&);
}  // namespace generic
namespace avx2 {
Kernels kernels();
Result cross_entropy(const CrossEntropy&);
}  // namespace avx2
namespace avx512 {
Kernels kernels();
Result cross_entropy(const CrossEntropy&);
}  // namespace avx512

// bfloat16 recurrence only; the rest is AVX-512's.
namespace avx512bf16 {
Kernels kernels();
}
namespace amx {
Kernels kernels();
}

// The best instruction set that was built and that this CPU has, or the one that the environment
// variable RNNLM_CPU_ISA names. Chosen at the first call. `error` is null, or says that
// RNNLM_CPU_ISA asks for something that is not there.
struct Choice {
  Kernels kernels;
  const char* error;
};
const Choice& choose();

}  // namespace rnnlm::cpu
