// One launch of the stepwise tier: a product of one time step and, on its sums, the pointwise part
// of that step (a `Step` of step_forward.cuh or step_backward.cuh).
//
// Who owns what: a CTA owns `kUnits` output units of `kColumns` batch rows and nobody else touches
// them, so whatever a step keeps per unit and row is updated in place. Its 8 warps divide the work
// into `kGroups` groups of columns times `kSplits` parts of k. A warp streams weights and state
// from L2 through registers into its sums, some fragments ahead; the parts are added up in shared
// memory after the one __syncthreads, and every thread then finishes a few pairs of unit and row.
//
// What it costs: every CTA reads kRows * kUnits rows of weights and kColumns rows of state, so the
// weights come out of L2 once for every kColumns batch rows. A step is a launch: launches overlap
// where the device has programmatic dependent launch. The weights are on their way to the
// registers before the step waits for the one in front of it.
#pragma once

#include "device/product.h"

namespace rnnlm {

// --- what a step multiplies ----------------------------------------------------------------------

// out[row][unit][r] = sum over k of weights[r * units + unit][k] * state[row][k]. Rows of both are
// `length` long, whole vectors of 16 bytes on 16-byte boundaries; zeros fill them up.
template <class T>
struct StepProduct {
  const T* weights;
  const T* state;    // batch rows below `carried`
  const T* initial;  // those from there on
  int units;
  int length;
  int carried;
  int rows;  // batch rows that have a product
};

// --- arithmetic ----------------------------------------------------------------------------------

// float32 with plain fused multiply-adds, for weights that are used once: the four lanes of a quad
// split k, so that every load of the warp brings 64 bytes of eight rows, and add up at the end.
// (PlainFma has all lanes of a quad read the same weights: right for weights kept in registers, but
// here the L1 cache would be the limit.)
struct StreamedFma {
  using Element = float;
  using Accumulator = float;
  static constexpr int kStep = 4 * kVectorOf<float>;
  static constexpr int kStateRows = kTileColumns;
  static RNNLM_DEVICE int k_of(int lane) { return lane_t(lane) * kVectorOf<float>; }
  static RNNLM_DEVICE int state_row(int, int i) { return i; }
};

// The sums of a lane for one tile, and what becomes of them: d as in device/product.h.
template <class Policy>
class TileSums {
  using A = typename Policy::Accumulator;

 public:
  RNNLM_DEVICE void add(const uint4& w, const uint4& w8, const uint4 (&h)[Policy::kStateRows]) {
    Policy::multiply(d_, w, w8, h);
  }
  RNNLM_DEVICE void total(int, A (&d)[4]) const {
    RNNLM_UNROLL
    for (int i = 0; i < 4; ++i) d[i] = d_[i];
  }

 private:
  A d_[4] = {};
};

template <>
class TileSums<StreamedFma> {
 public:
  RNNLM_DEVICE void add(const uint4& w, const uint4& w8, const uint4 (&h)[kTileColumns]) {
    const uint4 rows[2] = {w, w8};
    RNNLM_UNROLL
    for (int r = 0; r < 2; ++r) {
      RNNLM_UNROLL
      for (int c = 0; c < kTileColumns; ++c) {
        add_word(r, c, rows[r].x, h[c].x);
        add_word(r, c, rows[r].y, h[c].y);
        add_word(r, c, rows[r].z, h[c].z);
        add_word(r, c, rows[r].w, h[c].w);
      }
    }
  }
  // Lane t of a quad ends with columns 2t and 2t + 1: it hands over half of what it holds, first to
  // the lane two away, then to the lane beside it.
  RNNLM_DEVICE void total(int lane, float (&d)[4]) const {
    const bool upper = (lane & 2) != 0, odd = (lane & 1) != 0;
    RNNLM_UNROLL
    for (int r = 0; r < 2; ++r) {
      float half[4];
      RNNLM_UNROLL
      for (int c = 0; c < 4; ++c) {
        const float own = upper ? d_[r][4 + c] : d_[r][c], other = upper ? d_[r][c] : d_[r][4 + c];
        half[c] = own + ptx::shuffle_xor(other, 2);
      }
      RNNLM_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float own = odd ? half[2 + c] : half[c], other = odd ? half[c] : half[2 + c];
        d[2 * r + c] = own + ptx::shuffle_xor(other, 1);
      }
    }
  }

 private:
  RNNLM_DEVICE void add_word(int r, int c, uint32_t w, uint32_t h) {
    d_[r][c] = std::fma(ptx::float_from_bits(w), ptx::float_from_bits(h), d_[r][c]);
  }

  float d_[2][kTileColumns] = {};
};

// --- the work of a CTA ---------------------------------------------------------------------------

// How a CTA's outputs are laid out over its warps; launch/stepwise_launcher.h has the ones in use.
template <int kUnits_, int kGroups_, int kWarpTiles_>
struct StepTile {
  static constexpr int kWarps = 8;  // enough loads in flight to hide L2, two CTAs to an SM
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kUnits = kUnits_;
  static constexpr int kGroups = kGroups_;          // of columns
  static constexpr int kSplits = kWarps / kGroups;  // of k
  static constexpr int kWarpTiles = kWarpTiles_;    // tiles of 8 columns that a warp computes
  static constexpr int kColumns = kGroups * kWarpTiles * kTileColumns;
};

template <class Policy_, class Tile, class Step>
struct StepConfig : Tile {
  using Policy = Policy_;
  using T = typename Policy::Element;
  using A = typename Policy::Accumulator;
  static_assert(Tile::kUnits * Step::kRows % kTileRows == 0);
  static constexpr int kRowTiles = Tile::kUnits * Step::kRows / kTileRows;
  // Fragments that a warp has under way: enough vectors to hide L2, few enough to find registers.
  static constexpr int kVectors = 2 * kRowTiles + Tile::kWarpTiles * Policy::kStateRows;
  static constexpr int kDepth = kVectors <= 3 ? 4 : kVectors <= 5 ? 3 : 2;
  using Sums = PartialSums<A, Tile::kUnits * Step::kRows, Tile::kColumns, Tile::kSplits>;
  // Pairs of unit and row that one group of Step::kLanes lanes finishes, all of the same unit.
  static constexpr int kPairsAtOnce = Tile::kThreads / Step::kLanes;
  static_assert(kPairsAtOnce % Tile::kUnits == 0);
  static constexpr int kRowsAtOnce = kPairsAtOnce / Tile::kUnits;
  static constexpr int kPairs = (Tile::kColumns + kRowsAtOnce - 1) / kRowsAtOnce;
  // Two where the registers suffice, so that the next launch can begin beside this one.
  static constexpr int kCtasPerSm = kIs16Bit<T> && kVectors <= 5 ? 2 : 1;
};

// A warp's part of the product. Rows and columns beyond the end read the last one: nobody asks for
// their sums.
template <class Config, class Step>
class WarpProduct {
  using Policy = typename Config::Policy;
  using T = typename Config::T;
  using A = typename Config::A;
  static constexpr int kRowTiles = Config::kRowTiles;
  static constexpr int kColumnTiles = Config::kWarpTiles;
  static constexpr int kDepth = Config::kDepth;

 public:
  RNNLM_DEVICE WarpProduct(const StepProduct<T>& p, int first_unit, int first_row, int warp,
                           int lane)
      : lane_(lane), split_(warp % Config::kSplits), group_(warp / Config::kSplits) {
    const int fragments = (p.length + Policy::kStep - 1) / Policy::kStep;
    next_ = fragments * split_ / Config::kSplits;
    end_ = fragments * (split_ + 1) / Config::kSplits;
    const int k = next_ * Policy::kStep + Policy::k_of(lane);
    whole_ = p.length / Policy::kStep < end_ ? p.length / Policy::kStep : end_;
    inside_ = p.length / Policy::kStep * Policy::kStep + Policy::k_of(lane) < p.length;
    RNNLM_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int m = kTileRows / 2 * i + lane_g(lane);  // units side by side, each with its rows
      int unit = first_unit + m / Step::kRows;
      if (unit >= p.units) unit = p.units - 1;
      const int64_t row = m % Step::kRows * int64_t{p.units} + unit;
      weights_[i] = p.weights + row * p.length + k;
    }
    RNNLM_UNROLL
    for (int i = 0; i < kColumnTiles; ++i) {
      RNNLM_UNROLL
      for (int j = 0; j < Policy::kStateRows; ++j) {
        const int column = (group_ * kColumnTiles + i) * kTileColumns + Policy::state_row(lane, j);
        const int row = column < p.rows - first_row ? first_row + column : p.rows - 1;
        state_[i][j] = (row < p.carried ? p.state : p.initial) + int64_t{row} * p.length + k;
      }
    }
  }

  // Sends for the first fragments: of the weights, which no launch of the loop changes, ...
  RNNLM_DEVICE void begin_weights() {
    RNNLM_UNROLL
    for (int i = 0; i < kDepth - 1; ++i) load_weights(fragments_[i], i);
  }
  // ... and of the state, which the launch before has written.
  RNNLM_DEVICE void begin_state() {
    RNNLM_UNROLL
    for (int i = 0; i < kDepth - 1; ++i) load_state(fragments_[i], i);
  }

  RNNLM_DEVICE void multiply() {
    while (next_ < end_) {
      RNNLM_UNROLL
      for (int s = 0; s < kDepth; ++s) {
        Fragment& ahead = fragments_[(s + kDepth - 1) % kDepth];
        load_weights(ahead, s + kDepth - 1);
        load_state(ahead, s + kDepth - 1);
        RNNLM_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
          RNNLM_UNROLL
          for (int j = 0; j < kColumnTiles; ++j)
            sums_[i][j].add(fragments_[s].weights[2 * i], fragments_[s].weights[2 * i + 1],
                            fragments_[s].state[j]);
        }
      }
      next_ += kDepth;
      RNNLM_UNROLL
      for (const T*& row : weights_) row += kDepth * Policy::kStep;
      RNNLM_UNROLL
      for (auto& rows : state_) {
        RNNLM_UNROLL
        for (const T*& row : rows) row += kDepth * Policy::kStep;
      }
    }
  }

  RNNLM_DEVICE void store(const typename Config::Sums& sums) const {
    RNNLM_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      RNNLM_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) {
        A d[4];
        sums_[i][j].total(lane_, d);
        sums.store(split_, lane_, i, group_ * kColumnTiles + j, d);
      }
    }
  }

 private:
  struct Fragment {
    uint4 weights[2 * kRowTiles];
    uint4 state[kColumnTiles][Policy::kStateRows];
  };

  // The fragment that is `ahead` of the next. Zeros beyond the end of the rows, and beyond this
  // warp's part: the last round of multiply() may have too many.
  RNNLM_DEVICE void load_weights(Fragment& fragment, int ahead) const {
    const bool inside = is_inside(ahead);
    RNNLM_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i)
      fragment.weights[i] = load(weights_[i] + ahead * Policy::kStep, inside);
  }
  RNNLM_DEVICE void load_state(Fragment& fragment, int ahead) const {
    const bool inside = is_inside(ahead);
    RNNLM_UNROLL
    for (int i = 0; i < kColumnTiles; ++i) {
      RNNLM_UNROLL
      for (int j = 0; j < Policy::kStateRows; ++j)
        fragment.state[i][j] = load(state_[i][j] + ahead * Policy::kStep, inside);
    }
  }
  RNNLM_DEVICE bool is_inside(int ahead) const {
    const int fragment = next_ + ahead;
    return fragment < whole_ || (fragment < end_ && inside_);
  }
  static RNNLM_DEVICE uint4 load(const T* p, bool inside) {
    return inside ? *reinterpret_cast<const uint4*>(p) : zero_vector();
  }

  int lane_, split_, group_;
  int next_, end_, whole_;  // fragments; whole_: the first that is cut off by the end of the rows
  bool inside_;             // whether that one has anything for this lane
  const T* weights_[2 * kRowTiles];  // this lane's place in the next fragment of its rows
  const T* state_[kColumnTiles][Policy::kStateRows];
  Fragment fragments_[kDepth];
  TileSums<Policy> sums_[kRowTiles][kColumnTiles];
};

// Which unit and batch row a thread finishes, and which of the unit's Step::kLanes lanes it is.
struct StepPlace {
  int lane;  // of the warp
  int q;
  int unit;
  int64_t row;
};

// p[i] as it is in memory, or 0 where there is no tensor.
template <class T>
RNNLM_DEVICE T element_or_zero(const T* p, int64_t i) {
  return p == nullptr ? T{} : p[i];
}

// A value that some rows have from the workspace and others from a tensor, before it is converted:
// loading must not wait.
template <class T>
class StateInput {
  using A = Arithmetic<T>;

 public:
  RNNLM_DEVICE static StateInput of(bool kept, const A* workspace, const T* tensor, int64_t i) {
    StateInput in{};
    if (kept)
      in.bits_ = workspace[i];
    else if constexpr (kIs16Bit<T>)
      in.bits_ = ptx::float_from_bits(element_or_zero(tensor, i).bits);
    else
      in.bits_ = element_or_zero(tensor, i);
    return in;
  }
  RNNLM_DEVICE A value(bool kept) const {
    if constexpr (kIs16Bit<T>) {
      if (!kept) return to_arithmetic(T{static_cast<uint16_t>(ptx::float_bits(bits_))});
    }
    return bits_;
  }

 private:
  A bits_;
};

// A Step has
//   kRows         weight rows of a unit
//   kLanes        lanes that finish a unit of a row together; product_row(q): whose sum lane q gets
//                 (-1: of none)
//   Params        with `product` and `rows`, the batch rows to finish; those from product.rows on
//                 get the sum 0
//   UnitInputs, Inputs   what a lane needs beside the sum: the same for all rows, and of one row.
//                 load_unit() and load() send for them without computing on them, so that they are
//                 under way while the product runs. Not called where there is no such unit or row
//   finish()      stores the results. Called by whole warps, for shuffles; `valid` says whether
//                 there is such a unit and row.
template <class Config, class Step>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    step_kernel(typename Step::Params p) {
  using A = typename Config::A;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int first_row = static_cast<int>(blockIdx.x) * Config::kColumns;
  const int first_unit = static_cast<int>(blockIdx.y) * Config::kUnits;
  const typename Config::Sums sums{reinterpret_cast<A*>(ptx::dynamic_shared())};
  const bool multiplies = first_row < p.product.rows;
  WarpProduct<Config, Step> product(p.product, first_unit, first_row, thread / 32, lane);

  if (multiplies) product.begin_weights();
  ptx::wait_for_earlier_launches();
  // Only now: whoever starts after us may take for granted that all launches before us have ended,
  // which is what makes weights prepared by this call safe to load before the wait.
  ptx::let_next_launch_start();
  if (multiplies) product.begin_state();

  const int q = thread % Step::kLanes, pair = thread / Step::kLanes;
  const int unit_in_tile = pair % Config::kUnits, row_in_tile = pair / Config::kUnits;
  const int unit = first_unit + unit_in_tile;
  const auto column_of = [&](int i) { return row_in_tile + i * Config::kRowsAtOnce; };
  const auto place_of = [&](int i) {
    return StepPlace{lane, q, unit, int64_t{first_row} + column_of(i)};
  };
  const auto is_valid = [&](int i) {
    return column_of(i) < Config::kColumns && int64_t{first_row} + column_of(i) < p.rows &&
           unit < p.product.units;
  };
  typename Step::UnitInputs unit_inputs{};
  if (unit < p.product.units) unit_inputs = Step::load_unit(p, q, unit);
  typename Step::Inputs inputs[Config::kPairs] = {};
  RNNLM_UNROLL
  for (int i = 0; i < Config::kPairs; ++i)
    if (is_valid(i)) inputs[i] = Step::load(p, place_of(i));

  if (multiplies) {
    product.multiply();
    product.store(sums);
  }
  __syncthreads();

  const int product_row = Step::product_row(q);
  RNNLM_UNROLL
  for (int i = 0; i < Config::kPairs; ++i) {
    const StepPlace place = place_of(i);
    A sum = 0;
    if (is_valid(i) && product_row >= 0 && place.row < p.product.rows)
      sum = sums.sum(unit_in_tile * Step::kRows + product_row, column_of(i));
    Step::finish(p, place, is_valid(i), unit_inputs, inputs[i], sum);
  }
}

}  // namespace rnnlm
