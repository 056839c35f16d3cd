// How the grid tier multiplies: what decides which of its kernels runs and what that needs.
#pragma once

#include "core/params.h"

namespace rnnlm {

enum class GridArithmetic {
  tensor16,  // bfloat16 and float16 on tensor cores
  tf32,      // float32 rounded to TF32 on tensor cores
  fma,       // float32 as it is, with plain fused multiply-adds
};

// Of a dtype that the tier takes: not of float64.
constexpr GridArithmetic grid_arithmetic(DType dtype, bool allow_tf32) {
  if (dtype != DType::f32) return GridArithmetic::tensor16;
  return allow_tf32 ? GridArithmetic::tf32 : GridArithmetic::fma;
}

}  // namespace rnnlm
