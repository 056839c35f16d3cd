// Storage types, the arithmetic on them, and the two functions of the gates, on one number at a
// time: what a GPU thread computes with. (The CPU kernels have the same for vectors: cpu/vec.h.)
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "device/ptx.h"

namespace rnnlm {

// 16-bit tensors hold these; arithmetic on them is done in float.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class T>
constexpr bool kIs16Bit = sizeof(T) == 2;

// float for 16-bit types and float, double for double.
template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

RNNLM_DEVICE float to_arithmetic(Bf16 x) {
  return ptx::float_from_bits(static_cast<uint32_t>(x.bits) << 16);
}
RNNLM_DEVICE float to_arithmetic(F16 x) {
  return ptx::f16_value(x.bits);
}
RNNLM_DEVICE float to_arithmetic(float x) {
  return x;
}
RNNLM_DEVICE double to_arithmetic(double x) {
  return x;
}

template <class T>
RNNLM_DEVICE T from_arithmetic(Arithmetic<T> x) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return Bf16{ptx::bf16_bits(x)};
  } else if constexpr (std::is_same_v<T, F16>) {
    return F16{ptx::f16_bits(x)};
  } else {
    return x;
  }
}

// Two values of a 16-bit T in a word, the first in the low half.
template <class T>
RNNLM_DEVICE uint32_t pair_bits(float first, float second) {
  static_assert(kIs16Bit<T>);
  if constexpr (std::is_same_v<T, Bf16>) return ptx::bf16_pair_bits(first, second);
  return ptx::f16_pair_bits(first, second);
}

// p[i], or 0 where there is no tensor: absent biases and gradients.
template <class T>
RNNLM_DEVICE Arithmetic<T> load_or_zero(const T* p, int64_t i) {
  return p == nullptr ? Arithmetic<T>(0) : to_arithmetic(p[i]);
}

// The `Math` policy of device/gates.h for one number.
//
// float: sigmoid from the hardware's exp2 and reciprocal, tanh from the library. NaN stays NaN, and
// both saturate without overflow.
template <class A>
struct ScalarMath {
  using V = A;
  static RNNLM_DEVICE A fma(A a, A b, A c) { return std::fma(a, b, c); }
  static RNNLM_DEVICE A sigmoid(A x) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<A, float>) return __fdividef(1.0f, 1.0f + __expf(-x));
#endif
    return A(1) / (A(1) + std::exp(-x));
  }
  static RNNLM_DEVICE A tanh(A x) { return std::tanh(x); }

  // tanh(x) or sigmoid(x), where lanes of a warp differ in which: on a GPU both run at once, the
  // same exponential and reciprocal serving for either, instead of one after the other. Near 0,
  // where 1 - 2 / (1 + exp(2x)) cancels, tanh is a polynomial with an error of 1.3 ulp.
  static RNNLM_DEVICE A tanh_or_sigmoid(bool is_tanh, A x) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<A, float>) {
      const float s = __fdividef(1.0f, 1.0f + __expf(is_tanh ? 2.0f * fabsf(x) : -x));
      const float u = x * x;
      const float p = std::fma(std::fma(std::fma(0.016437583f, u, -0.052671812f), u, 0.13320725f),
                               u, -0.33332947f);
      const float far = copysignf(1.0f - 2.0f * s, x), near = std::fma(p * u, x, x);
      const float t = fabsf(x) >= 0.55f ? far : near;
      return is_tanh ? t : s;
    }
#endif
    return is_tanh ? tanh(x) : sigmoid(x);
  }
};

// The `Math` policy for results that are stored in 16 bits: sigmoid and tanh from one exp2 and one
// reciprocal, a third of the instructions of the above. Both are exact to 2e-7 of their range; tanh
// near 0 is no better than that. NaN stays NaN, and both saturate.
struct Math16 : ScalarMath<float> {
  static RNNLM_DEVICE float sigmoid(float x) {
    return ptx::reciprocal_approx(1.0f + ptx::exp2_approx(-kLog2E * x));
  }
  static RNNLM_DEVICE float tanh(float x) {
    return fma(-2.0f, ptx::reciprocal_approx(1.0f + ptx::exp2_approx(2.0f * kLog2E * x)), 1.0f);
  }

 private:
  static constexpr float kLog2E = 1.4426950408889634f;
};

}  // namespace rnnlm
