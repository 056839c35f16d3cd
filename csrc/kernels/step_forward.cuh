// The pointwise parts of a forward step, as `Step`s of step_product.cuh.
//
// Pointers to per-step tensors are to the step's first row. What one step hands to the next, all in
// the workspace: `h` [B, stride], rounded to T, which the next product reads (two of them in turn:
// a step reads all of one while it writes the other), and the element's own state in the
// arithmetic dtype, c of LSTM or h of GRU, updated in place. Rows from `ending` on end with this
// step; rows from product.carried on begin with it, with the initial state.
#pragma once

#include "device/cell.h"
#include "kernels/step_product.cuh"

namespace rnnlm {

// Where h goes: to the next product, to `output` and, at a row's end, to `h_n`.
template <class T>
struct StepOutput {
  T* h;
  int64_t h_stride;
  T* output;  // [rows, width], or null: h is not yet the output (projection)
  T* h_n;     // [B, width]
  int ending;

  RNNLM_DEVICE void store(int width, const StepPlace& place, Arithmetic<T> value) const {
    const T rounded = from_arithmetic<T>(value);
    h[place.row * h_stride + place.unit] = rounded;
    if (output == nullptr) return;
    const int64_t at = place.row * width + place.unit;
    output[at] = rounded;
    if (place.row >= ending) h_n[at] = rounded;
  }
};

// All gates of LSTM, or of GRU with the reset after the product. Four lanes a unit (device/cell.h).
template <class T_, class Cell>
struct CellStep {
  using T = T_;
  using A = Arithmetic<T>;
  static constexpr int kRows = Cell::kRows;
  static constexpr int kLanes = 4;
  static RNNLM_DEVICE int product_row(int q) { return Cell::product_row(q); }

  struct Params {
    StepProduct<T> product;
    int rows;
    StepOutput<T> out;
    const T* gates_x;  // [rows, gates * H]
    const T* b_hh;     // [gates * H] or null
    const T* initial;  // [B, H]: c0 or h0
    A* state;          // [B, H]: c or h
    T* c_n;            // [B, H]; null for GRU
    A* cells;          // [rows, H] or null
    T* saved;          // [rows, Cell::kSavedGates * H] or null
  };
  struct UnitInputs {
    T bias;
  };
  struct Inputs {
    T x;
    StateInput<T> state;
  };

  static RNNLM_DEVICE UnitInputs load_unit(const Params& p, int q, int unit) {
    const int row = Cell::product_row(q);
    return {row < 0 ? T{} : element_or_zero(p.b_hh, int64_t{row} * p.product.units + unit)};
  }
  static RNNLM_DEVICE Inputs load(const Params& p, const StepPlace& place) {
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    const int x_gate = Cell::x_gate(place.q);
    Inputs in{};
    if (x_gate >= 0) in.x = p.gates_x[(place.row * Cell::kXGates + x_gate) * hidden + place.unit];
    in.state = StateInput<T>::of(place.row < p.product.carried, p.state, p.initial, at);
    return in;
  }

  static RNNLM_DEVICE void finish(const Params& p, const StepPlace& place, bool valid,
                                  const UnitInputs& of_unit, const Inputs& in, A sum) {
    A state = in.state.value(place.row < p.product.carried), kept;
    const A a = sum + (to_arithmetic(in.x) + to_arithmetic(of_unit.bias));
    const A h = Cell::forward(place.lane, a, state, kept);
    if (!valid) return;
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    if (p.saved != nullptr) {
      const int64_t gate = Cell::saved_gate(place.q);
      p.saved[(place.row * Cell::kSavedGates + gate) * hidden + place.unit] =
          from_arithmetic<T>(kept);
    }
    if (place.q == 0) {
      p.out.store(p.product.units, place, h);
    } else if (place.q == 1) {
      p.state[at] = state;
      if (p.cells != nullptr) p.cells[at] = state;
      if (p.c_n != nullptr && place.row >= p.out.ending) p.c_n[at] = from_arithmetic<T>(state);
    }
  }
};

// LSTM's projection of h: the second launch of a step that has one.
template <class T_>
struct ProjectStep {
  using T = T_;
  using A = Arithmetic<T>;
  static constexpr int kRows = 1;
  static constexpr int kLanes = 1;
  static RNNLM_DEVICE int product_row(int) { return 0; }

  struct Params {
    StepProduct<T> product;
    int rows;
    StepOutput<T> out;
  };
  struct UnitInputs {};
  struct Inputs {};

  static RNNLM_DEVICE UnitInputs load_unit(const Params&, int, int) { return {}; }
  static RNNLM_DEVICE Inputs load(const Params&, const StepPlace&) { return {}; }
  static RNNLM_DEVICE void finish(const Params& p, const StepPlace& place, bool valid,
                                  const UnitInputs&, const Inputs&, A sum) {
    if (valid) p.out.store(p.product.units, place, sum);
  }
};

// GRU with the reset before the product, first launch: r and z, one lane each.
template <class T_>
struct ResetStep {
  using T = T_;
  using A = Arithmetic<T>;
  static constexpr int kRows = 2;
  static constexpr int kLanes = 2;
  static RNNLM_DEVICE int product_row(int q) { return q; }

  struct Params {
    StepProduct<T> product;
    int rows;
    const T* gates_x;  // [rows, 3H]
    const T* b_hh;     // [3H] or null
    const T* initial;  // [B, H]: h0
    const A* state;    // [B, H]: h
    T* reset_h;        // [B, product.length]: r * h, what the second launch multiplies
    A* z;              // [B, H]
    T* saved;          // [rows, 3H] or null
  };
  struct UnitInputs {
    T bias;
  };
  struct Inputs {
    T x;
    StateInput<T> state;
  };

  static RNNLM_DEVICE UnitInputs load_unit(const Params& p, int q, int unit) {
    return {element_or_zero(p.b_hh, int64_t{q} * p.product.units + unit)};
  }
  static RNNLM_DEVICE Inputs load(const Params& p, const StepPlace& place) {
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    return {p.gates_x[(place.row * 3 + place.q) * hidden + place.unit],
            StateInput<T>::of(place.row < p.product.carried, p.state, p.initial, at)};
  }

  static RNNLM_DEVICE void finish(const Params& p, const StepPlace& place, bool valid,
                                  const UnitInputs& of_unit, const Inputs& in, A sum) {
    if (!valid) return;
    const int64_t hidden = p.product.units;
    const A a = sum + (to_arithmetic(in.x) + to_arithmetic(of_unit.bias));
    const A y = ScalarMath<A>::sigmoid(a);
    if (p.saved != nullptr)
      p.saved[(place.row * 3 + place.q) * hidden + place.unit] =
          from_arithmetic<T>(kIs16Bit<T> ? a : y);
    if (place.q == 0) {
      const A h = in.state.value(place.row < p.product.carried);
      p.reset_h[place.row * p.product.length + place.unit] = from_arithmetic<T>(y * h);
    } else {
      p.z[place.row * hidden + place.unit] = y;
    }
  }
};

// Its second launch: the candidate n, from W_hn (r * h), and h.
template <class T_>
struct CandidateStep {
  using T = T_;
  using A = Arithmetic<T>;
  using Math = ScalarMath<A>;
  static constexpr int kRows = 1;
  static constexpr int kLanes = 1;
  static RNNLM_DEVICE int product_row(int) { return 0; }

  struct Params {
    StepProduct<T> product;
    int rows;
    int carried;  // as in the first launch
    StepOutput<T> out;
    const T* gates_x;  // [rows, 3H]
    const T* b_hh;     // [3H] or null
    const T* initial;  // [B, H]: h0
    A* state;          // [B, H]: h
    const A* z;        // [B, H]
    T* saved;          // [rows, 3H] or null
  };
  struct UnitInputs {
    T bias;
  };
  struct Inputs {
    T x;
    StateInput<T> state;
    A z;
  };

  static RNNLM_DEVICE UnitInputs load_unit(const Params& p, int, int unit) {
    return {element_or_zero(p.b_hh, int64_t{2} * p.product.units + unit)};
  }
  static RNNLM_DEVICE Inputs load(const Params& p, const StepPlace& place) {
    const int64_t hidden = p.product.units, at = place.row * hidden + place.unit;
    return {p.gates_x[(place.row * 3 + 2) * hidden + place.unit],
            StateInput<T>::of(place.row < p.carried, p.state, p.initial, at), p.z[at]};
  }

  static RNNLM_DEVICE void finish(const Params& p, const StepPlace& place, bool valid,
                                  const UnitInputs& of_unit, const Inputs& in, A sum) {
    if (!valid) return;
    const int64_t hidden = p.product.units;
    const A a = sum + (to_arithmetic(in.x) + to_arithmetic(of_unit.bias));
    const A n = Math::tanh(a);
    const A h = gru_update<Math>(in.z, n, in.state.value(place.row < p.carried));
    if (p.saved != nullptr)
      p.saved[(place.row * 3 + 2) * hidden + place.unit] = from_arithmetic<T>(kIs16Bit<T> ? a : n);
    p.state[place.row * hidden + place.unit] = h;
    p.out.store(p.product.units, place, h);
  }
};

}  // namespace rnnlm
