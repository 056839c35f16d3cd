// One step of one unit of one batch row, forward, done by the lanes of a warp that hold the unit's
// pre-activations; and the gates as backward finds them. The mathematics is in gates.h; here is who
// holds what, so that every kernel that computes a step does it the same way.
//
// Saved for backward: 16-bit tensors hold pre-activations (a sigmoid near 1 has no bits left in
// them), float and double the activated gates.
#pragma once

#include "device/gates.h"
#include "device/numeric.h"

namespace rnnlm {

// Four lanes a unit (lane % 4 = q), in the order of the gates of the weights. `kRows` weight rows a
// unit take part in the recurrent product; lane q reads row product_row(q) of the unit's sums and
// bias, gate x_gate(q) of gates_x, and stores gate saved_gate(q) of `saved` (-1: none).
template <class T>
struct LstmCell {
  using A = Arithmetic<T>;
  using Math = ScalarMath<A>;
  static constexpr int kRows = 4;
  static constexpr int kSavedGates = 4;
  static constexpr int kXGates = 4;
  static RNNLM_DEVICE int product_row(int q) { return q; }
  static RNNLM_DEVICE int x_gate(int q) { return q; }
  static RNNLM_DEVICE int saved_gate(int q) { return q; }

  // a: this lane's pre-activation. c: the cell state, the same in all four lanes, updated.
  // kept: what this lane saves. Returns h. All 32 lanes of the warp take part.
  static RNNLM_DEVICE A forward(int lane, A a, A& c, A& kept) {
    const int q = lane & 3, first = lane & ~3;
    const A y = Math::tanh_or_sigmoid(q == 2, a);
    kept = kIs16Bit<T> ? a : y;
    const LstmGates<A> gates{ptx::shuffle(y, first), ptx::shuffle(y, first + 1),
                             ptx::shuffle(y, first + 2), ptx::shuffle(y, first + 3)};
    return lstm_forward<Math>(gates, c);
  }
};

// Reset after. Lanes: r, z, the recurrent part of n (W_hn h + b_hn), the input part of n.
template <class T>
struct GruAfterCell {
  using A = Arithmetic<T>;
  using Math = ScalarMath<A>;
  static constexpr int kRows = 3;
  static constexpr int kSavedGates = 4;  // r, z, n, W_hn h + b_hn
  static constexpr int kXGates = 3;
  static RNNLM_DEVICE int product_row(int q) { return q < 3 ? q : -1; }
  static RNNLM_DEVICE int x_gate(int q) { return q < 2 ? q : q == 3 ? 2 : -1; }
  static RNNLM_DEVICE int saved_gate(int q) { return q < 2 ? q : 5 - q; }

  // As LstmCell::forward, with h in the place of c.
  static RNNLM_DEVICE A forward(int lane, A a, A& h, A& kept) {
    const int q = lane & 3, first = lane & ~3;
    const A y = Math::sigmoid(a);  // of use in the lanes of r and z
    const A r = ptx::shuffle(y, first), z = ptx::shuffle(y, first + 1);
    const A hn = ptx::shuffle(a, first + 2), xn = ptx::shuffle(a, first + 3);
    const A a_n = Math::fma(r, hn, xn);
    const A n = Math::tanh(a_n);
    h = gru_update<Math>(z, n, h);
    kept = q < 2 ? (kIs16Bit<T> ? a : y) : q == 2 ? a : (kIs16Bit<T> ? a_n : n);
    return h;
  }
};

// --- what backward starts from -------------------------------------------------------------------

// Gates of a unit from its row of `saved`, activated. A row is [gate][hidden].
template <class T, class A = Arithmetic<T>>
RNNLM_DEVICE LstmGates<A> saved_lstm_gates(const T* row, int64_t hidden, int64_t unit) {
  const LstmGates<A> a{to_arithmetic(row[unit]), to_arithmetic(row[hidden + unit]),
                       to_arithmetic(row[2 * hidden + unit]),
                       to_arithmetic(row[3 * hidden + unit])};
  if constexpr (kIs16Bit<T>) return lstm_activate<ScalarMath<A>>(a);
  return a;
}

template <class T, class A = Arithmetic<T>>
RNNLM_DEVICE GruGates<A> saved_gru_gates(const T* row, int64_t hidden, int64_t unit) {
  using Math = ScalarMath<A>;
  const GruGates<A> a{to_arithmetic(row[unit]), to_arithmetic(row[hidden + unit]),
                      to_arithmetic(row[2 * hidden + unit])};
  if constexpr (kIs16Bit<T>) return {Math::sigmoid(a.r), Math::sigmoid(a.z), Math::tanh(a.n)};
  return a;
}

}  // namespace rnnlm
