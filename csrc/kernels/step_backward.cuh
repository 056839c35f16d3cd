// The pointwise parts of a backward step, as `Step`s of step_product.cuh.
//
// A launch multiplies the gradients that the step before it in the loop (after it in time) has
// left, and has dh of this step. It covers the rows of both steps, which differ where rows have
// different lengths:
//   rows below `now` are in this step. Those below product.rows were in the step before as well:
//       the product is their dh. The others end with this step: grad_h_n is;
//   rows from `now` on began with the step before, and what arrives is the gradient of h0 and c0.
// One more launch than there are steps, with now = 0, therefore finishes all rows, if somebody asks
// for those gradients.
//
// Pointers to per-step tensors are to the step's first row. Between steps, in the workspace:
// `next` [B, stride], what the next product multiplies, rounded to T (two of them in turn: a step
// reads all of one while it writes the other); and per element, updated in place, dc of LSTM, or
// the part of GRU's dh that does not pass through the product.
#pragma once

#include "device/cell.h"
#include "kernels/step_product.cuh"

namespace rnnlm {

// What all first launches of a step know of dh.
template <class T>
struct StepGradient {
  int now;
  const T* grad_h_n;     // [B, width] or null
  const T* grad_output;  // [now, width] or null
  T* dh0;                // [B, width] or null
};

// LSTM. Without a projection one launch a step; with one the second, whose product has the rows of
// this step only and no gradients of h to add.
template <class T_>
struct LstmBackwardStep {
  using T = T_;
  using A = Arithmetic<T>;
  static constexpr int kRows = 1;
  static constexpr int kLanes = 1;
  static RNNLM_DEVICE int product_row(int) { return 0; }

  struct Params {
    StepProduct<T> product;
    int rows;
    StepGradient<T> dh;
    int carried;            // rows that have a step in front of this one
    int continued;          // rows that were in the step before in the loop: their dc is in `dc`
    const T* grad_c_n;      // [B, H] or null
    const A* grad_cells;    // [now, H] or null
    const A* cells;         // [now, H]
    const A* cells_before;  // [carried, H]
    const T* c0;            // [B, H]
    const T* saved;         // [now, 4H]
    T* dgates;              // [now, 4H]
    T* next;                // [B, next_stride]: dgates again
    int64_t next_stride;
    A* dc;           // [B, H]
    T* dc0;          // [B, H] or null
    T* unprojected;  // [now, H]; null without projection
  };
  struct UnitInputs {};
  struct Inputs {
    T saved[4], grad_h_n, grad_output;
    StateInput<T> c_before, dc;
    A c, grad_cells;
  };

  static RNNLM_DEVICE UnitInputs load_unit(const Params&, int, int) { return {}; }
  static RNNLM_DEVICE Inputs load(const Params& p, const StepPlace& place) {
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    Inputs in{};
    in.dc = StateInput<T>::of(place.row < p.continued, p.dc, p.grad_c_n, at);
    if (place.row >= p.product.rows) in.grad_h_n = element_or_zero(p.dh.grad_h_n, at);
    if (place.row >= p.dh.now) return in;
    in.grad_output = element_or_zero(p.dh.grad_output, at);
    RNNLM_UNROLL
    for (int g = 0; g < 4; ++g) in.saved[g] = p.saved[(place.row * 4 + g) * hidden + place.unit];
    in.c = p.cells[at];
    in.c_before = StateInput<T>::of(place.row < p.carried, p.cells_before, p.c0, at);
    if (p.grad_cells != nullptr) in.grad_cells = p.grad_cells[at];
    return in;
  }

  static RNNLM_DEVICE void finish(const Params& p, const StepPlace& place, bool valid,
                                  const UnitInputs&, const Inputs& in, A sum) {
    if (!valid) return;
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    A dh = sum + to_arithmetic(in.grad_h_n), dc = in.dc.value(place.row < p.continued);
    if (place.row >= p.dh.now) {
      if (p.dh.dh0 != nullptr) p.dh.dh0[at] = from_arithmetic<T>(dh);
      if (p.dc0 != nullptr) p.dc0[at] = from_arithmetic<T>(dc);
      return;
    }
    dh += to_arithmetic(in.grad_output);
    dc += in.grad_cells;
    using Math = ScalarMath<A>;
    const LstmGates<A> y = saved_lstm_gates(in.saved, 1, 0);
    const LstmGates<A> d =
        lstm_backward<Math>(y, in.c_before.value(place.row < p.carried), in.c, dh, dc);
    p.dc[at] = dc;
    if (p.unprojected != nullptr) p.unprojected[at] = from_arithmetic<T>(y.o * Math::tanh(in.c));
    const A gates[4] = {d.i, d.f, d.g, d.o};
    RNNLM_UNROLL
    for (int g = 0; g < 4; ++g) {
      const T rounded = from_arithmetic<T>(gates[g]);
      p.dgates[(place.row * 4 + g) * hidden + place.unit] = rounded;
      p.next[place.row * p.next_stride + g * hidden + place.unit] = rounded;
    }
  }
};

// LSTM with a projection, first launch: the gradient of the projected h.
template <class T_>
struct ProjectBackwardStep {
  using T = T_;
  using A = Arithmetic<T>;
  static constexpr int kRows = 1;
  static constexpr int kLanes = 1;
  static RNNLM_DEVICE int product_row(int) { return 0; }

  struct Params {
    StepProduct<T> product;
    int rows;
    StepGradient<T> dh;
    T* dproj;  // [now, R]
    T* next;   // [B, next_stride]: dproj again, for the second launch
    int64_t next_stride;
  };
  struct UnitInputs {};
  struct Inputs {
    T grad_h_n, grad_output;
  };

  static RNNLM_DEVICE UnitInputs load_unit(const Params&, int, int) { return {}; }
  static RNNLM_DEVICE Inputs load(const Params& p, const StepPlace& place) {
    const int64_t at = place.row * p.product.units + place.unit;
    Inputs in{};
    if (place.row >= p.product.rows) in.grad_h_n = element_or_zero(p.dh.grad_h_n, at);
    if (place.row < p.dh.now) in.grad_output = element_or_zero(p.dh.grad_output, at);
    return in;
  }

  static RNNLM_DEVICE void finish(const Params& p, const StepPlace& place, bool valid,
                                  const UnitInputs&, const Inputs& in, A sum) {
    if (!valid) return;
    const int64_t at = place.row * p.product.units + place.unit;
    const A dh = sum + to_arithmetic(in.grad_h_n);
    if (place.row >= p.dh.now) {
      if (p.dh.dh0 != nullptr) p.dh.dh0[at] = from_arithmetic<T>(dh);
      return;
    }
    const T rounded = from_arithmetic<T>(dh + to_arithmetic(in.grad_output));
    p.dproj[at] = rounded;
    p.next[place.row * p.next_stride + place.unit] = rounded;
  }
};

// GRU. Reset after the product: the only launch of a step. Before it: the first, which has da_z and
// da_n; the rest takes another product.
template <class T_, bool kResetBefore>
struct GruBackwardStep {
  using T = T_;
  using A = Arithmetic<T>;
  static constexpr int kRows = 1;
  static constexpr int kLanes = 1;
  static constexpr int kSavedGates = kResetBefore ? 3 : 4;
  static RNNLM_DEVICE int product_row(int) { return 0; }

  struct Params {
    StepProduct<T> product;
    int rows;
    StepGradient<T> dh;
    int carried;             // rows that have a step in front of this one
    const T* output_before;  // [carried, H]
    const T* h0;             // [B, H]
    const T* saved;          // [now, kSavedGates * H]
    T* dgates;               // [now, 3H]
    T* candidate;            // [now, H]: gradient of W_hn h + b_hn (reset after)
    T* next;                 // [B, next_stride]: gradients of r, z and, reset after, W_hn h + b_hn
    int64_t next_stride;
    T* next_n;  // [B, next_n_stride]: da_n, for the second launch (reset before)
    int64_t next_n_stride;
    A* direct;  // [B, H]: the part of dh that does not pass through the product
  };
  struct UnitInputs {};
  struct Inputs {
    T saved[kSavedGates], h, grad_output;
    StateInput<T> arriving;  // directly, or grad_h_n
  };

  static RNNLM_DEVICE UnitInputs load_unit(const Params&, int, int) { return {}; }
  static RNNLM_DEVICE Inputs load(const Params& p, const StepPlace& place) {
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    Inputs in{};
    in.arriving = StateInput<T>::of(place.row < p.product.rows, p.direct, p.dh.grad_h_n, at);
    if (place.row >= p.dh.now) return in;
    in.grad_output = element_or_zero(p.dh.grad_output, at);
    RNNLM_UNROLL
    for (int g = 0; g < kSavedGates; ++g)
      in.saved[g] = p.saved[(place.row * kSavedGates + g) * hidden + place.unit];
    in.h = place.row < p.carried ? p.output_before[at] : p.h0[at];
    return in;
  }

  static RNNLM_DEVICE void finish(const Params& p, const StepPlace& place, bool valid,
                                  const UnitInputs&, const Inputs& in, A sum) {
    if (!valid) return;
    using Math = ScalarMath<A>;
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    A dh = sum + in.arriving.value(place.row < p.product.rows);
    if (place.row >= p.dh.now) {
      if (p.dh.dh0 != nullptr) p.dh.dh0[at] = from_arithmetic<T>(dh);
      return;
    }
    dh += to_arithmetic(in.grad_output);
    const GruGates<A> y = saved_gru_gates(in.saved, 1, 0);
    const GruUpdateGrad<A> d = gru_update_backward<Math>(y.z, y.n, to_arithmetic(in.h), dh);
    T* dgates = p.dgates + place.row * 3 * hidden + place.unit;
    T* next = p.next + place.row * p.next_stride + place.unit;
    p.direct[at] = d.h_direct;
    dgates[hidden] = next[hidden] = from_arithmetic<T>(d.a_z);
    dgates[2 * hidden] = from_arithmetic<T>(d.a_n);
    if constexpr (kResetBefore) {
      p.next_n[place.row * p.next_n_stride + place.unit] = from_arithmetic<T>(d.a_n);
    } else {
      const GruAfterGrad<A> r =
          gru_reset_after_backward<Math>(y.r, to_arithmetic(in.saved[3]), d.a_n);
      dgates[0] = next[0] = from_arithmetic<T>(r.a_r);
      p.candidate[at] = next[2 * hidden] = from_arithmetic<T>(r.d_hn);
    }
  }
};

// GRU with the reset before the product, second launch: the product is the gradient of r * h.
template <class T_>
struct ResetBackwardStep {
  using T = T_;
  using A = Arithmetic<T>;
  static constexpr int kRows = 1;
  static constexpr int kLanes = 1;
  static RNNLM_DEVICE int product_row(int) { return 0; }

  struct Params {
    StepProduct<T> product;
    int rows;
    int carried;             // rows that have a step in front of this one
    const T* output_before;  // [carried, H]
    const T* h0;             // [B, H]
    const T* saved;          // [rows, 3H]
    T* dgates;               // [rows, 3H]
    T* candidate;            // [rows, H]: r * h
    T* next;                 // [B, next_stride]
    int64_t next_stride;
    A* direct;  // [B, H]
  };
  struct UnitInputs {};
  struct Inputs {
    T r, h;
    A direct;
  };

  static RNNLM_DEVICE UnitInputs load_unit(const Params&, int, int) { return {}; }
  static RNNLM_DEVICE Inputs load(const Params& p, const StepPlace& place) {
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    return {p.saved[place.row * 3 * hidden + place.unit],
            place.row < p.carried ? p.output_before[at] : p.h0[at], p.direct[at]};
  }

  static RNNLM_DEVICE void finish(const Params& p, const StepPlace& place, bool valid,
                                  const UnitInputs&, const Inputs& in, A sum) {
    if (!valid) return;
    using Math = ScalarMath<A>;
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    const A saved = to_arithmetic(in.r), h = to_arithmetic(in.h);
    const A r = kIs16Bit<T> ? Math::sigmoid(saved) : saved;
    const GruBeforeGrad<A> d = gru_reset_before_backward<Math>(r, h, sum);
    const T rounded = from_arithmetic<T>(d.a_r);
    p.direct[at] = in.direct + d.h_direct;
    p.dgates[place.row * 3 * hidden + place.unit] = rounded;
    p.next[place.row * p.next_stride + place.unit] = rounded;
    p.candidate[at] = from_arithmetic<T>(r * h);
  }
};

}  // namespace rnnlm
