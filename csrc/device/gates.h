// The gate math of every cell, forward and backward: written here once, used by the CPU kernels,
// the CUDA kernels and the emulator.
//
// `Math` says what a value is (`Math::V`: one float on a GPU, a vector of units on a CPU) and how
// to do `fma(a, b, c)`, `sigmoid(x)` and `tanh(x)` on it. Everything else is + - *. Equations:
// docs/equations.md. Names: a_* is a pre-activation, d_x is dLoss/dx.
#pragma once

#if defined(__CUDACC__)
#define RNNLM_HD __host__ __device__ __forceinline__
#else
#define RNNLM_HD inline __attribute__((always_inline))
#endif

namespace rnnlm {

// --- LSTM: c' = f c + i g, h = o tanh(c') --------------------------------------------------------

template <class V>
struct LstmGates {
  V i, f, g, o;
};

template <class Math, class V = typename Math::V>
RNNLM_HD LstmGates<V> lstm_activate(const LstmGates<V>& a) {
  return {Math::sigmoid(a.i), Math::sigmoid(a.f), Math::tanh(a.g), Math::sigmoid(a.o)};
}

// The new c from the activated gates, and h from that and the output gate.
template <class Math, class V = typename Math::V>
RNNLM_HD V lstm_cell(const LstmGates<V>& y, V c) {
  return Math::fma(y.f, c, y.i * y.g);
}
template <class Math, class V = typename Math::V>
RNNLM_HD V lstm_hidden(V o, V c) {
  return o * Math::tanh(c);
}

// Both: returns h and updates c.
template <class Math, class V = typename Math::V>
RNNLM_HD V lstm_forward(const LstmGates<V>& y, V& c) {
  c = lstm_cell<Math>(y, c);
  return lstm_hidden<Math>(y.o, c);
}

// From dh and the dc that came from the next step (`dc`, updated to the one for the previous step)
// to the gradients of the pre-activations.
template <class Math, class V = typename Math::V>
RNNLM_HD LstmGates<V> lstm_backward(const LstmGates<V>& y, V c_prev, V c, V dh, V& dc) {
  const V one = V{} + 1;
  const V tc = Math::tanh(c);
  const V d_c = Math::fma(dh * y.o, one - tc * tc, dc);
  dc = d_c * y.f;
  return {d_c * y.g * y.i * (one - y.i), d_c * c_prev * y.f * (one - y.f),
          d_c * y.i * (one - y.g * y.g), dh * tc * y.o * (one - y.o)};
}

// The same while dh and dc are not known yet: lstm_backward is linear in them. With
// d_c = dh * h + dc the gradients of the pre-activations are d_c * i, d_c * f, d_c * g and dh * o,
// and d_c * c is the dc for the previous step.
template <class V>
struct LstmSlopes {
  V h, i, f, g, o, c;
};

template <class Math, class V = typename Math::V>
RNNLM_HD LstmSlopes<V> lstm_slopes(const LstmGates<V>& y, V c_prev, V c) {
  const V one = V{} + 1;
  const V tc = Math::tanh(c);
  return {y.o * (one - tc * tc),   y.g * y.i * (one - y.i), c_prev * y.f * (one - y.f),
          y.i * (one - y.g * y.g), tc * y.o * (one - y.o),  y.f};
}

// --- GRU: h' = (1 - z) n + z h -------------------------------------------------------------------

template <class V>
struct GruGates {
  V r, z, n;
};

template <class Math, class V = typename Math::V>
RNNLM_HD V gru_update(V z, V n, V h) {
  const V one = V{} + 1;
  return Math::fma(z, h, (one - z) * n);
}

// Gradients of z's and n's pre-activations, and dh/dh_prev along the direct path (z).
template <class V>
struct GruUpdateGrad {
  V a_z, a_n, h_direct;
};

template <class Math, class V = typename Math::V>
RNNLM_HD GruUpdateGrad<V> gru_update_backward(V z, V n, V h_prev, V dh) {
  const V one = V{} + 1;
  return {dh * (h_prev - n) * z * (one - z), dh * (one - z) * (one - n * n), dh * z};
}

// reset after: n = tanh(x_n + r * hn) with hn = W_hn h + b_hn.
// `d_hn` is the gradient of hn, what the recurrent product of n's rows is taken with.
template <class V>
struct GruAfterGrad {
  V a_r, d_hn;
};

template <class Math, class V = typename Math::V>
RNNLM_HD GruAfterGrad<V> gru_reset_after_backward(V r, V hn, V d_a_n) {
  const V one = V{} + 1;
  return {d_a_n * hn * r * (one - r), d_a_n * r};
}

// reset before: n = tanh(x_n + W_hn (r * h) + b_hn). `d_rh` is the gradient of r * h.
template <class V>
struct GruBeforeGrad {
  V a_r, h_direct;
};

template <class Math, class V = typename Math::V>
RNNLM_HD GruBeforeGrad<V> gru_reset_before_backward(V r, V h_prev, V d_rh) {
  const V one = V{} + 1;
  return {d_rh * h_prev * r * (one - r), d_rh * r};
}

}  // namespace rnnlm
