// A layer's forward recurrence in one launch that uses all SMs: the grid tier.
//
// Who owns what. The grid is [ctas, groups]. CTA x holds the weights of hidden units 16x .. 16x +
// 15 for the whole launch in registers, as what the lane multiplies: fragments of tensor cores, or
// of plain multiply-adds where float32 must not be rounded (of the widest layers partly in shared
// memory). Group y runs batch rows y * group_rows .. and never waits for another group. In a
// CTA the eight warps split k: of every step each warp gathers its eighth of h and multiplies it by
// its eighth of the weights, for all the CTA's gates.
//
// A step, for 8 or 16 rows ("a pass"; a group of more rows takes several, one after the other, and
// the words of one pass travel while the next is computed):
//   gather   each warp polls the words of its k in the previous step's `output` (device/exchange.h)
//            with 16-byte loads that land in the registers that the tensor cores read. With plain
//            multiply-adds they go on into a window of shared memory of the warp, as every lane
//            needs what the others have (device/fma.h). CTAs may also gather in pairs, through
//            shared memory (kernels/grid_gather.cuh);
//   multiply and leave partial sums in shared memory, one of two buffers. Plain multiply-adds take
//            four rows together, as the weights in shared memory are read once for all of them,
//            then two, then one, and none that no row of the step needs;
//   barrier  the only __syncthreads of an exchange;
//   finish   warp w takes rows w, w + 8 of the pass. Lane 4j + q has gate q of units 2j and 2j + 1:
//            it adds up the eight partial sums, the input gates, the bias; device/cell.h does the
//            rest. h is published first: a 32-bit word for a pair of units. What only later
//            launches read (cells, saved gates, h_n, c_n) is stored after that.
// c, and the float32 h of a GRU, never leave shared memory.
//
// A GRU that resets before the product has two exchanges: h for the gates r and z, then r * h,
// through a buffer of its own, for the candidate.
//
// Buffers are safe with one barrier an exchange: a warp that stores partial sums of the exchange
// after the next into the same buffer has passed the next one's barrier, so every warp has finished
// this one. The flag by which a warp that waited too long tells the others lies in the same scheme:
// all leave together after the barrier, so none publishes what was computed from nothing.
#pragma once

#include "device/cell.h"
#include "device/exchange.h"
#include "device/fma.h"
#include "device/product.h"
#include "device/sequence.h"
#include "kernels/grid_gather.cuh"

namespace rnnlm {

template <class T>
struct GridForwardParams {
  DeviceSequence seq;
  int hidden;            // a multiple of 8
  int group_rows;        // rows of a group
  const T* gates_x;      // [N, G*H], as all of them aligned to 16 bytes
  const T* w_hh;         // [G*H, H]
  const T* b_hh;         // [G*H] or null
  const T* h0;           // [B, H]
  const T* c0;           // [B, H], LSTM
  T* output;             // [N, H], filled with kNotYetByte
  T* reset_h;            // [N, H], filled with kNotYetByte: r * h of a GRU that resets before
  T* h_n;                // [B, H]
  T* c_n;                // [B, H], LSTM
  Arithmetic<T>* cells;  // [N, H] or null, LSTM
  T* saved;              // [N, saved gates * H] or null
  uint32_t* abort_word;
  WaitLimit wait_limit;
};

// --- what the cells differ in --------------------------------------------------------------------

// The reset-before GRU, whose two exchanges are written out below. Lanes: r, z, n, none.
template <class T>
struct GruBeforeCell {
  static constexpr int kXGates = 3;
  static constexpr int kSavedGates = 3;
};

// An exchange and the product that follows it. kRows weight rows of each unit take part: gate
// row_gate(r) of the weights. Lane q of a unit sums product_row(q) and adds gate x_gate(q) of
// gates_x (-1: none).
template <class Cell, int kIndex>
struct GridExchange {
  static_assert(kIndex == 0);
  static constexpr int kRows = Cell::kRows;
  static RNNLM_DEVICE int row_gate(int r) { return r; }
  static RNNLM_DEVICE int product_row(int q) { return Cell::product_row(q); }
  static RNNLM_DEVICE int x_gate(int q) { return Cell::x_gate(q); }
};
template <class T>
struct GridExchange<GruBeforeCell<T>, 0> {
  static constexpr int kRows = 2;
  static RNNLM_DEVICE int row_gate(int r) { return r; }
  static RNNLM_DEVICE int product_row(int q) { return q < 2 ? q : -1; }
  static RNNLM_DEVICE int x_gate(int q) { return q < 2 ? q : -1; }
};
template <class T>
struct GridExchange<GruBeforeCell<T>, 1> {
  static constexpr int kRows = 1;
  static RNNLM_DEVICE int row_gate(int) { return 2; }
  static RNNLM_DEVICE int product_row(int q) { return q == 2 ? 0 : -1; }
  static RNNLM_DEVICE int x_gate(int q) { return q == 2 ? 2 : -1; }
};

// Product: TensorCore16, HeldTf32 or HeldFma. kFragments: of each weight row, in each warp.
// kTiles: tiles of 8 batch rows in a pass. Gather: PolledGather or PairedGather.
template <class Product_, template <class> class Cell_, int kFragments_, int kTiles_,
          class Gather_ = PolledGather>
struct GridForwardConfig {
  using Gather = Gather_;
  using Product = Product_;
  using T = typename Product::Element;
  using A = typename Product::Accumulator;
  using Cell = Cell_<T>;
  static constexpr int kFragments = kFragments_;
  static constexpr int kTiles = kTiles_;

  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kUnits = 16;
  static constexpr int kPassRows = kTiles * kTileColumns;

  static constexpr bool kIsFma = kIsHeldFma<Product>;
  static constexpr bool kIsPaired = Gather::kIsPaired;
  static constexpr bool kIsTf32 = std::is_same_v<Product, HeldTf32>;
  static constexpr bool kIsLstm = std::is_same_v<Cell, LstmCell<T>>;
  static constexpr int kExchanges = std::is_same_v<Cell, GruBeforeCell<T>> ? 2 : 1;
  template <int kIndex>
  using Exchange = GridExchange<Cell, kIndex>;
  static constexpr int kMostRows = Exchange<0>::kRows;
  static constexpr int kAllRows = kExchanges == 2 ? 3 : kMostRows;

  // Of a weight row a thread has two vectors a fragment. In registers are as many as it has room
  // for (one of kAllRows rows takes 4 each) beside the state that it multiplies them by and what
  // waits for the next step, of which float32 takes twice as much. Those of the widest layers that
  // find none wait in shared memory. Multiply-adds get by with less beside them, as they read the
  // state out of shared memory.
  static constexpr int kVectors = 2 * kFragments;
  static constexpr int kRoom =
      kIsFma ? (kIsLstm ? (kFragments == 8 ? 10 : 11) : 12)
             : (kIsLstm ? (kFragments == 8 ? 10 : 12) : 14) - (kIsTf32 ? 2 : 0);
  static constexpr int kHeld = kVectors < kRoom ? kVectors : kRoom;
  static constexpr int kInShared = kVectors - kHeld;
  // Whether a lane's biases stay in registers, or are loaded (from L1) in front of every barrier.
  static constexpr bool kHoldsBias = !(kIsFma && kIsLstm && kFragments == 8);
  // Whether a pass may load h for the next one while it finishes: where registers are left.
  static constexpr bool kLooksAhead = !kIsPaired && kAllRows * kHeld * 4 + 4 * kFragments <= 144;

  // Plain multiply-adds: columns of a tile that are multiplied together, and the window of shared
  // memory through which a warp's lanes hand each other its k of 8 columns. Two neighbouring
  // columns are stored side by side, in different banks: of the odd ones the fragments are in pairs
  // swapped.
  static constexpr int kTogether = 4;
  static constexpr int kWindowPitch = 4 * kFragments;  // vectors
  static RNNLM_DEVICE int place_in_window(int column, int f) {
    return column * kWindowPitch + 4 * (kFragments % 2 == 0 ? f ^ (column & 1) : f);
  }
  static constexpr int kWindowBytes =
      kIsFma ? kWarps * kTileColumns * kWindowPitch * int(sizeof(uint4)) : 0;

  // Shared memory: weights, windows, what the gather needs, two buffers of partial sums, c or h of
  // the group's rows, z of a reset-before GRU's, flags.
  template <int kIndex>
  using Sums = PartialSums<A, Exchange<kIndex>::kRows * kTileRows, kPassRows, kWarps>;
  static constexpr int kWeightBytes = kInShared * kAllRows * kThreads * int(sizeof(uint4));
  static constexpr int kGatherOffset = kWeightBytes + kWindowBytes;
  static constexpr int kGatherBytes = Gather::shared_bytes(kFragments, kPassRows);
  static constexpr int kSumsBytes = Sums<0>::kBytes;
  static constexpr int kFlagBytes = 16;
  static constexpr int kRowState = kExchanges * kUnits;  // numbers of a batch row
  static constexpr int kFixedBytes =
      kWeightBytes + kWindowBytes + kGatherBytes + 2 * kSumsBytes + kFlagBytes;
  static constexpr int kLeastSharedBytes = kFixedBytes + kPassRows * kRowState * int(sizeof(A));
  static constexpr int64_t shared_bytes(int64_t group_rows) {
    const int64_t rows = (group_rows + kPassRows - 1) / kPassRows * kPassRows;
    return kFixedBytes + rows * kRowState * int64_t{sizeof(A)};
  }
};

// Units of a CTA in the order of the product's rows: lane 4j + q's units 2j and 2j + 1 lie 8 apart,
// so that 32 lanes sum up neighbouring rows.
RNNLM_DEVICE int grid_unit_of_slot(int slot) {
  return 2 * (slot % 8) + slot / 8;
}

// --- weights -------------------------------------------------------------------------------------

template <class Config, int kIndex>
struct GridWeights {
  using T = typename Config::T;
  using Product = typename Config::Product;
  using Exchange = typename Config::template Exchange<kIndex>;
  static constexpr int kRows = Exchange::kRows;  // times 16 units: as many tiles
  // One tile alone would be a chain of dependent MMAs: two sums instead.
  static constexpr int kChains = kRows == 1 ? 2 : 1;
  using Sums = float[kRows * kChains][4];

  // Of a fragment a thread holds two vectors of each of kRows rows. On tensor cores these are the
  // lane's share of a tile of 16 rows of the product, halves 8 rows apart. With plain multiply-adds
  // they are of one unit and two vectors of k, the lanes splitting k in two; of one or two rows a
  // unit, of two units and one vector, the lanes splitting k in four (device/fma.h).
  static constexpr int kSplits = kRows > 2 ? 2 : 4;
  static constexpr int kLaneRows = kRows * kSplits / 2;  // weight rows of which a lane has sums

  uint4 held[kRows][Config::kHeld];
  uint4* shared;  // [kInShared][kRows][kThreads], from this thread's on
  static constexpr int kSharedVectors = Config::kInShared * kRows * Config::kThreads;

  // The warp has k from fragment `begin` on, `count` fragments.
  RNNLM_DEVICE void load(const GridForwardParams<T>& p, uint4* in_shared, int begin, int count) {
    shared = in_shared + threadIdx.x;
    // First those that do not stay in registers.
    for (int v = Config::kHeld; v < Config::kVectors; ++v) {
      for (int tile = 0; tile < kRows; ++tile)
        shared[at(v, tile)] = load_one(p, row(p, tile, v % 2), begin, v, count);
    }
    RNNLM_UNROLL
    for (int tile = 0; tile < kRows; ++tile) {
      RNNLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const T* weights = row(p, tile, half);
        RNNLM_UNROLL
        for (int v = half; v < Config::kHeld; v += 2)
          held[tile][v] = load_one(p, weights, begin, v, count);
      }
    }
  }

  // sums += weights of fragment f times h.
  RNNLM_DEVICE void multiply(int f, const uint4 (&h)[1], Sums& sums) const {
    RNNLM_UNROLL
    for (int tile = 0; tile < kRows; ++tile) {
      float (&d)[4] = sums[tile * kChains + f % kChains];
      Product::multiply(d, weights(2 * f, tile), weights(2 * f + 1, tile), h);
    }
  }

  // Plain multiply-adds. First of a lane's vectors in the window; the first row of the product of
  // which it has sums, `half` of them.
  static RNNLM_DEVICE int first_vector(int lane) { return lane / (32 / kSplits) * (4 / kSplits); }
  static RNNLM_DEVICE int first_row(int lane, int half) {
    return (lane % (32 / kSplits) + (kSplits == 4 ? 8 * half : 0)) * kRows;
  }
  // sums += weights times columns of the window, from an even one on: where its first vector lies.
  template <int kColumns>
  RNNLM_DEVICE void multiply(const uint4* window, int fragments,
                             float (&sums)[kColumns][kLaneRows]) const {
    RNNLM_UNROLL
    for (int f = 0; f < Config::kFragments; ++f) {
      if (f > 0 && f >= fragments) break;
      RNNLM_UNROLL
      for (int vector = 0; vector < 4 / kSplits; ++vector) {
        uint4 h[kColumns];
        RNNLM_UNROLL
        for (int c = 0; c < kColumns; ++c) h[c] = window[Config::place_in_window(c, f) + vector];
        RNNLM_UNROLL
        for (int r = 0; r < kLaneRows; ++r) {
          const int tile = r % kRows, half = kSplits == 4 ? r / kRows : vector;
          const uint4 w = weights(2 * f + half, tile);
          RNNLM_UNROLL
          for (int c = 0; c < kColumns; ++c) multiply_add(sums[c][r], w, h[c]);
        }
      }
    }
  }

 private:
  // This lane's row of W_hh in half a tile, or null.
  static RNNLM_DEVICE const T* row(const GridForwardParams<T>& p, int tile, int half) {
    const int lane = threadIdx.x % 32;
    const int row =
        Config::kIsFma ? first_row(lane, half) + tile : tile * kTileRows + half * 8 + lane_g(lane);
    const int unit = blockIdx.x * Config::kUnits + grid_unit_of_slot(row / kRows);
    const int64_t gate = Exchange::row_gate(row % kRows);
    return unit < p.hidden ? p.w_hh + (gate * p.hidden + unit) * p.hidden : nullptr;
  }
  // Vector v of a row: half v % 2 of fragment v / 2.
  static RNNLM_DEVICE uint4 load_one(const GridForwardParams<T>& p, const T* row, int begin, int v,
                                     int count) {
    const int lane = threadIdx.x % 32, f = v / 2;
    const int in_window = first_vector(lane) + (kSplits == 2 ? v % 2 : 0);
    const int k = (begin + f) * Product::kStep +
                  (Config::kIsFma ? in_window * kVectorOf<T> : Product::k_of(lane));
    const uint4 weights =
        f < count ? load_vector</*kAligned=*/true>(row, k, p.hidden) : zero_vector();
    if constexpr (Config::kIsTf32) return Product::round_weights(weights);
    return weights;
  }
  RNNLM_DEVICE uint4 weights(int v, int tile) const {
    return v < Config::kHeld ? held[tile][v] : shared[at(v, tile)];
  }
  static RNNLM_DEVICE int at(int v, int tile) {
    return ((v - Config::kHeld) * kRows + tile) * Config::kThreads;
  }
};

// --- two neighbouring units ----------------------------------------------------------------------

template <class T>
using PairBits = std::conditional_t<kIs16Bit<T>, uint32_t, uint2>;

template <class T>
RNNLM_DEVICE PairBits<T> load_pair(const T* p) {
  return *reinterpret_cast<const PairBits<T>*>(p);
}
template <class T>
RNNLM_DEVICE void unpack_pair(PairBits<T> bits, float (&a)[2]) {
  if constexpr (kIs16Bit<T>) {
    a[0] = to_arithmetic(T{static_cast<uint16_t>(bits)});
    a[1] = to_arithmetic(T{static_cast<uint16_t>(bits >> 16)});
  } else {
    a[0] = ptx::float_from_bits(bits.x);
    a[1] = ptx::float_from_bits(bits.y);
  }
}
template <class T>
RNNLM_DEVICE void store_pair(T* p, const float (&a)[2]) {
  if constexpr (kIs16Bit<T>) {
    *reinterpret_cast<uint32_t*>(p) =
        from_arithmetic<T>(a[0]).bits | static_cast<uint32_t>(from_arithmetic<T>(a[1]).bits) << 16;
  } else {
    *reinterpret_cast<uint2*>(p) = uint2{ptx::float_bits(a[0]), ptx::float_bits(a[1])};
  }
}
// As the words that other CTAs poll.
template <class T>
RNNLM_DEVICE void publish_pair(T* p, const float (&a)[2]) {
  uint32_t* words = reinterpret_cast<uint32_t*>(p);
  if constexpr (kIs16Bit<T>) {
    ptx::st_relaxed(words, publishable(from_arithmetic<T>(a[0]), from_arithmetic<T>(a[1])));
  } else {
    ptx::st_relaxed(words, publishable(a[0]));
    ptx::st_relaxed(words + 1, publishable(a[1]));
  }
}

// --- steps ---------------------------------------------------------------------------------------

// Walks over the steps and knows the rows of this one and both neighbours. For packed rows it reads
// one offset a step, asked for a step ahead.
class GridSteps {
 public:
  RNNLM_DEVICE explicit GridSteps(const DeviceSequence& seq) : seq_(seq) {
    rows = seq.rows(seq.step(0));
    next_rows = seq.steps > 1 ? seq.rows(seq.step(1)) : 0;
    first = seq.row(seq.step(0), 0);
  }

  int previous_rows = 0, rows, next_rows;  // of the step, and those done before and after it
  int64_t first;                           // row of the step's b = 0

  RNNLM_DEVICE bool done() const { return i_ == seq_.steps; }
  RNNLM_DEVICE int64_t previous_first() const {
    return seq_.reverse ? first + rows : first - previous_rows;
  }
  RNNLM_DEVICE int64_t next_first() const {
    return seq_.reverse ? first - next_rows : first + rows;
  }
  // Asks for what advance() needs.
  RNNLM_DEVICE void look_ahead() {
    if (seq_.offsets != nullptr && i_ + 2 < seq_.steps)
      bound_ = seq_.offsets[seq_.reverse ? seq_.steps - 3 - i_ : i_ + 3];
  }
  RNNLM_DEVICE void advance() {
    first = next_first();
    previous_rows = rows;
    rows = next_rows;
    ++i_;
    if (i_ + 1 >= seq_.steps)
      next_rows = 0;
    else if (seq_.offsets != nullptr)
      next_rows = static_cast<int>(seq_.reverse ? first - bound_ : bound_ - (first + rows));
  }

 private:
  const DeviceSequence& seq_;
  int i_ = 0;
  int64_t bound_ = 0;  // of the step after the next: its end, its start in reverse
};

// --- the kernel ----------------------------------------------------------------------------------

template <class Config>
class GridForward {
  using T = typename Config::T;
  using A = typename Config::A;
  using Product = typename Config::Product;
  using Cell = typename Config::Cell;
  using Math = ScalarMath<A>;
  static constexpr int kTiles = Config::kTiles;
  static constexpr int kFragments = Config::kFragments;
  static_assert(Product::kStateRows == 1, "a lane polls one row");

  using Pair = std::conditional_t<Config::kIsPaired, GridPair<Config>, NoGridPair>;

  // What a lane loads of h: vectors 64 bytes apart of one row.
  struct Source {
    const uint4* vectors;
    int count;  // 0: the row does not take part
    bool polled;
    uint4* copied;  // where a pair's copy of the vectors lies in shared memory; 0 beyond the row
  };
  // A pass of a step: rows from b on.
  struct Place {
    int b;
    int rows;       // of the step
    int64_t first;  // row of the step's b = 0
  };

 public:
  RNNLM_DEVICE explicit GridForward(const GridForwardParams<T>& params)
      : p_(params),
        thread_(ptx::computed(threadIdx.x)),
        steps_(params.seq),
        group_begin_(blockIdx.y * params.group_rows),
        group_end_(smaller(params.seq.batch, group_begin_ + params.group_rows)) {
    unsigned char* shared = ptx::dynamic_shared();
    uint4* weights = reinterpret_cast<uint4*>(shared);
    shared += Config::kWeightBytes;
    window_ = reinterpret_cast<uint4*>(shared + warp() * (Config::kWindowBytes / Config::kWarps));
    shared += Config::kWindowBytes + Config::kGatherBytes;
    sums_ = reinterpret_cast<A*>(shared);
    flags_ = reinterpret_cast<uint32_t*>(shared + 2 * Config::kSumsBytes);
    state_ = reinterpret_cast<A*>(flags_ + Config::kFlagBytes / 4);

    // Warps share the fragments evenly; with fewer than kFragments each the rest stays unused.
    const int fragments = (p_.hidden + Product::kStep - 1) / Product::kStep;
    fragments_ = (fragments + Config::kWarps - 1) / Config::kWarps;
    const int k = warp() * fragments_ * Product::kStep + Product::k_of(lane());
    lane_fragments_ =
        larger(0, smaller(fragments_, (p_.hidden - k + Product::kStep - 1) / Product::kStep));

    weights_.load(p_, weights, warp() * fragments_, fragments_);
    if constexpr (Config::kExchanges == 2) {
      weights += GridWeights<Config, 0>::kSharedVectors;
      candidate_weights_.load(p_, weights, warp() * fragments_, fragments_);
    }

    if constexpr (Config::kHoldsBias) bias_ = load_bias();

    const T* initial = Config::kIsLstm ? p_.c0 : p_.h0;
    for (int i = threadIdx.x; i < padded_rows() * Config::kUnits; i += Config::kThreads) {
      const int row = i / Config::kUnits, u = i % Config::kUnits;
      const int b = group_begin_ + row, unit = blockIdx.x * Config::kUnits + u;
      state_[row * Config::kRowState + u] =
          b < group_end_ && unit < p_.hidden ? to_arithmetic(initial[int64_t{b} * p_.hidden + unit])
                                             : A(0);
    }
    if (threadIdx.x < 4) flags_[threadIdx.x] = 0;
    __syncthreads();
    if constexpr (Config::kIsPaired) pair_.begin();
  }

  RNNLM_DEVICE void run() {
    run_steps();
    if constexpr (Config::kIsPaired) pair_.end();
  }

 private:
  RNNLM_DEVICE void run_steps() {
    // In reverse, rows of packed sequences start late; forward they end early.
    while (!steps_.done() && steps_.rows <= group_begin_) {
      steps_.look_ahead();
      steps_.advance();
    }
    load_x<0>({group_begin_, steps_.rows, steps_.first});
    for (; !steps_.done() && steps_.rows > group_begin_; steps_.advance()) {
      passes_ = (smaller(steps_.rows, group_end_) - group_begin_ + Config::kPassRows - 1) /
                Config::kPassRows;
      for (int pass = 0; pass < passes_; ++pass)
        if (!exchange<0>(weights_, pass)) return;
      if constexpr (Config::kExchanges == 2) {
        for (int pass = 0; pass < passes_; ++pass)
          if (!exchange<1>(candidate_weights_, pass)) return;
      }
    }
  }

  RNNLM_DEVICE int warp() const { return thread_ / 32; }
  RNNLM_DEVICE int lane() const { return thread_ % 32; }
  RNNLM_DEVICE int q() const { return thread_ % 4; }
  // First unit of this lane's pair.
  RNNLM_DEVICE int unit() const { return blockIdx.x * Config::kUnits + lane() / 4 * 2; }
  // No bias for lanes without a product.
  RNNLM_DEVICE PairBits<T> load_bias() const {
    const int gate = bias_gate(q());
    if (p_.b_hh == nullptr || gate < 0 || unit() >= p_.hidden) return {};
    return load_pair(p_.b_hh + int64_t{gate} * p_.hidden + unit());
  }
  static RNNLM_DEVICE int bias_gate(int q) {
    if constexpr (Config::kExchanges == 2) return q < 3 ? q : -1;
    return Config::template Exchange<0>::product_row(q);
  }
  RNNLM_DEVICE int padded_rows() const {
    return (p_.group_rows + Config::kPassRows - 1) / Config::kPassRows * Config::kPassRows;
  }
  RNNLM_DEVICE Place place(int pass) const {
    return {group_begin_ + pass * Config::kPassRows, steps_.rows, steps_.first};
  }
  RNNLM_DEVICE bool takes_part(int b, int rows) const { return b < smaller(rows, group_end_); }

  // --- gather

  // h of row b before a step of `rows` rows, whose previous step had `previous_rows` from row
  // `previous_first` on: of the initial state where this is the row's first step.
  RNNLM_DEVICE GridRow<T> state_before(int b, int rows, int previous_rows,
                                       int64_t previous_first) const {
    const bool starts = b >= previous_rows;
    const T* row =
        starts ? p_.h0 + int64_t{b} * p_.hidden : p_.output + (previous_first + b) * p_.hidden;
    return {row, takes_part(b, rows), !starts};
  }
  // What is gathered for row `i` of a pass ...
  template <int kIndex>
  RNNLM_DEVICE GridRow<T> gathered(int pass, int i) const {
    const int b = group_begin_ + pass * Config::kPassRows + i;
    if constexpr (kIndex == 1) {
      return {p_.reset_h + (steps_.first + b) * p_.hidden, takes_part(b, steps_.rows), true};
    } else {
      return state_before(b, steps_.rows, steps_.previous_rows, steps_.previous_first());
    }
  }
  // ... and of what follows it.
  template <int kIndex>
  RNNLM_DEVICE GridRow<T> gathered_after(int pass, int i) const {
    if (pass + 1 < passes_) return gathered<kIndex>(pass + 1, i);
    if constexpr (kIndex + 1 < Config::kExchanges) return gathered<kIndex + 1>(0, i);
    return state_before(group_begin_ + i, steps_.next_rows, steps_.rows, steps_.first);
  }

  // `i`: the row's place in its pass.
  RNNLM_DEVICE Source source(const GridRow<T>& row, int i) const {
    const int k = warp() * fragments_ * Product::kStep + Product::k_of(lane());
    uint4* copied = nullptr;
    if constexpr (Config::kIsPaired) copied = pair_.copied(buffer_, i, k);
    return {reinterpret_cast<const uint4*>(row.values + k), row.takes_part ? lane_fragments_ : 0,
            row.polled && (!Config::kIsPaired || row.takes_part), copied};
  }
  RNNLM_DEVICE int row_of_tile(int tile) const {
    return tile * kTileColumns + Product::state_row(lane(), 0);
  }

  static RNNLM_DEVICE uint4 load_h(const Source& s, int f) {
    return f < s.count ? ptx::ld_relaxed_v4(s.vectors + 4 * f) : zero_vector();
  }
  // Until all of h_ has arrived. False: gave up.
  RNNLM_DEVICE bool await(const Source& s) {
    Wait wait(p_.abort_word, p_.wait_limit);
    while (true) {
      bool missing = false;
      RNNLM_UNROLL
      for (int f = 0; f < kFragments; ++f) missing |= !complete(h_[f][0]);
      if (!ptx::warp_any(missing && s.polled)) return true;
      if (ptx::warp_any(!wait.again())) return false;
      RNNLM_UNROLL
      for (int f = 0; f < kFragments; ++f)
        if (s.polled && !complete(h_[f][0])) h_[f][0] = ptx::ld_relaxed_v4(s.vectors + 4 * f);
    }
  }

  // --- multiply

  template <class Sums>
  RNNLM_DEVICE int place_of_store() const {
    if constexpr (Config::kIsFma)
      return warp() * Sums::place_of_sum(0, Config::kPassRows);
    else
      return Sums::place_of_store(warp(), lane());
  }
  // On tensor cores. The registers of h are free as soon as they have been multiplied: for the next
  // tile or pass.
  template <class Weights, class Sums>
  RNNLM_DEVICE void multiply_tile(const Weights& weights, const Sums& own, int tile,
                                  const Source& next, bool loads_next) {
    typename Weights::Sums d;
    set_zero(d);
    RNNLM_UNROLL
    for (int f = 0; f < kFragments; ++f) {
      if (f == 0 || f < fragments_) weights.multiply(f, h_[f], d);
      if (loads_next) h_[f][0] = load_h(next, f);
    }
    store_sums<Weights>(own, tile, d);
  }
  // The same of a pair's copy, which is multiplied as it is and then, if words turn out to have
  // been missing, once more with these. False: gave up.
  template <class Weights, class Sums>
  RNNLM_DEVICE bool multiply_copied(const Weights& weights, const Sums& own, int tile,
                                    const Source& s, bool gave_up) {
    typename Weights::Sums d;
    while (true) {
      set_zero(d);
      bool missing = false;
      RNNLM_UNROLL
      for (int f = 0; f < kFragments; ++f) {
        if (f > 0 && f >= fragments_) break;
        const uint4 h[1] = {s.copied[4 * f]};
        missing |= !complete(h[0]);
        weights.multiply(f, h, d);
      }
      if (gave_up || !ptx::warp_any(missing && s.polled)) break;
      gave_up = !complete_copy(s);
    }
    store_sums<Weights>(own, tile, d);
    return !gave_up;
  }
  // Polls what is missing of a lane's vectors where it was published.
  RNNLM_DEVICE bool complete_copy(const Source& s) const {
    Wait wait(p_.abort_word, p_.wait_limit);
    bool going_on = true;
    RNNLM_NO_UNROLL
    for (int f = 0; f < fragments_ && going_on; ++f) {
      uint4 h = s.copied[4 * f];
      while (going_on && ptx::warp_any(s.polled && !complete(h))) {
        going_on = !ptx::warp_any(!wait.again());
        if (s.polled && !complete(h)) h = ptx::ld_relaxed_v4(s.vectors + 4 * f);
      }
      s.copied[4 * f] = h;
    }
    ptx::fence_async_overwriting();
    return going_on;
  }
  template <class Sums>
  static RNNLM_DEVICE void set_zero(Sums& d) {
    RNNLM_UNROLL
    for (auto& tile_sums : d) {
      RNNLM_UNROLL
      for (A& sum : tile_sums) sum = 0;
    }
  }
  template <class Weights, class Sums>
  static RNNLM_DEVICE void store_sums(const Sums& own, int tile, typename Weights::Sums& d) {
    RNNLM_UNROLL
    for (int m = 0; m < Weights::kRows; ++m) {
      if constexpr (Weights::kChains == 2) {
        RNNLM_UNROLL
        for (int j = 0; j < 4; ++j) d[2 * m][j] += d[2 * m + 1][j];
      }
      own.store(0, 0, m, tile, d[m * Weights::kChains]);
    }
  }
  // Plain multiply-adds: what the lanes have gathered, for all of them to read ...
  RNNLM_DEVICE void share_h() const {
    ptx::warp_sync();  // all have read what lay there
    RNNLM_UNROLL
    for (int f = 0; f < kFragments; ++f)
      window_[Config::place_in_window(lane_g(lane()), f) + lane_t(lane())] = h_[f][0];
    ptx::warp_sync();
  }
  // ... and the product, for the columns that take part: the sums of others nobody uses.
  template <class Weights, class Sums>
  RNNLM_DEVICE void multiply_tile(const Weights& weights, const Sums& own, int tile,
                                  int columns) const {
    columns = smaller(columns, kTileColumns);
    int c = 0;
    RNNLM_NO_UNROLL
    for (; c + Config::kTogether <= columns; c += Config::kTogether)
      multiply_columns<Config::kTogether>(weights, own, tile, c);
    if (c + 2 <= columns) {
      multiply_columns<2>(weights, own, tile, c);
      c += 2;
    }
    if (c < columns) multiply_columns<1>(weights, own, tile, c);
  }
  template <int kColumns, class Weights, class Sums>
  RNNLM_DEVICE void multiply_columns(const Weights& weights, const Sums& own, int tile,
                                     int first) const {
    constexpr int kSplits = Weights::kSplits, kRows = Weights::kRows;
    constexpr int kHalves = Weights::kLaneRows / kRows;
    constexpr int kLeft = kColumnsOfASplit<kColumns, kSplits>;
    float d[kColumns][Weights::kLaneRows] = {};
    weights.template multiply<kColumns>(
        window_ + first * Config::kWindowPitch + Weights::first_vector(lane()), fragments_, d);
    int column = tile * kTileColumns + first;
    bool keeps = true;
    add_splits<kColumns, 16, 32 / kSplits>(d, lane(), column, keeps);
    if (!keeps) return;
    RNNLM_UNROLL
    for (int c = 0; c < kLeft; ++c) {
      RNNLM_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        A* to = own.sums + Sums::place_of_sum(Weights::first_row(lane(), half), column + c);
        if constexpr (kRows == 4) {
          *reinterpret_cast<uint4*>(to) = uint4{ptx::float_bits(d[c][0]), ptx::float_bits(d[c][1]),
                                                ptx::float_bits(d[c][2]), ptx::float_bits(d[c][3])};
        } else {
          RNNLM_UNROLL
          for (int r = 0; r < kRows; ++r) to[r] = d[c][half * kRows + r];
        }
      }
    }
  }

  // --- one exchange of one pass; false: the launch is over

  template <int kIndex, class Weights>
  RNNLM_DEVICE bool exchange(const Weights& weights, int pass) {
    using Sums = typename Config::template Sums<kIndex>;
    A* const buffer = sums_ + buffer_ * (Config::kSumsBytes / sizeof(A));
    const bool ahead = Config::kLooksAhead && passes_ > 1;
    if constexpr (Config::kIsPaired)
      pair_.fetch(p_, buffer_, gathered<kIndex>(pass, pair_.fetched_row()), over_);
    Source now = source(gathered<kIndex>(pass, row_of_tile(0)), row_of_tile(0));
    if (!Config::kIsPaired && !loaded_) {
      RNNLM_UNROLL
      for (int f = 0; f < kFragments; ++f) h_[f][0] = load_h(now, f);
    }
    // For the next pass, while this one waits.
    const PairOfX x = x_;
    load_x_after<kIndex>(pass);
    steps_.look_ahead();
    bool gave_up = false;
    if constexpr (Config::kIsPaired) {
      const int rows = smaller(smaller(steps_.rows, group_end_) - place(pass).b, Config::kPassRows);
      const bool lost = !pair_.await(p_, buffer_, rows, passes_ > 1,
                                     gathered_after<kIndex>(pass, pair_.fetched_row()), over_);
      if (lost && lane() == 0) flags_[2 + buffer_] = 1;
      gave_up = over_ || lost;
    }

    // Where this lane stores, worked out before the wait.
    const Sums own{buffer + ptx::computed(place_of_store<Sums>())};
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const int i = row_of_tile(tile + 1);
      const Source next = tile + 1 < kTiles ? source(gathered<kIndex>(pass, i), i)
                          : ahead ? source(gathered_after<kIndex>(pass, row_of_tile(0)), 0)
                                  : Source{nullptr, 0, false, nullptr};
      const bool loads_next = tile + 1 < kTiles || ahead;
      if constexpr (Config::kIsPaired) {
        gave_up = !multiply_copied(weights, own, tile, now, gave_up);
        now = next;
        continue;
      }
      gave_up = gave_up || !await(now);
      if constexpr (Config::kIsFma) {
        share_h();
        if (loads_next) {
          RNNLM_UNROLL
          for (int f = 0; f < kFragments; ++f) h_[f][0] = load_h(next, f);
        }
        multiply_tile(weights, own, tile,
                      smaller(steps_.rows, group_end_) - place(pass).b - tile * kTileColumns);
      } else {
        multiply_tile(weights, own, tile, next, loads_next);
      }
      now = next;
    }
    loaded_ = ahead;
    if (gave_up && lane() == 0) flags_[buffer_] = 1;
    const bool going_on = finish<kIndex>(buffer, x, place(pass));
    if constexpr (Config::kIsPaired) {
      pair_.release(buffer_);
      over_ = !going_on;
      const bool alone = over_ && flags_[2 + buffer_] != 0;
      buffer_ ^= 1;
      return !alone;
    }
    buffer_ ^= 1;
    return going_on;
  }

  // --- finish

  // Gates of the input that this lane adds, of each tile's row.
  struct PairOfX {
    PairBits<T> tile[kTiles];
  };

  template <int kIndex>
  RNNLM_DEVICE void load_x(const Place& at) {
    const int gate = Config::template Exchange<kIndex>::x_gate(q());
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const int b = at.b + tile * kTileColumns + warp();
      x_.tile[tile] = {};
      if (gate >= 0 && unit() < p_.hidden && takes_part(b, at.rows)) {
        x_.tile[tile] =
            load_pair(p_.gates_x + ((at.first + b) * Cell::kXGates + gate) * p_.hidden + unit());
      }
    }
  }
  template <int kIndex>
  RNNLM_DEVICE void load_x_after(int pass) {
    if (pass + 1 < passes_)
      load_x<kIndex>(place(pass + 1));
    else if (kIndex + 1 < Config::kExchanges)
      load_x<Config::kExchanges - 1>(place(0));
    else
      load_x<0>({group_begin_, steps_.next_rows, steps_.next_first()});
  }

  // This lane's pair of units of a tile's row.
  struct Row {
    bool exists;  // the units too
    int b;
    int64_t index;  // of the row in per-step tensors
    A* state;       // c or h; of a reset-before GRU z lies behind it
    T* message;     // where the pair is published
  };
  template <int kIndex>
  RNNLM_DEVICE Row row_of(const Place& at, int tile) const {
    const int b = at.b + tile * kTileColumns + warp();
    T* tensor = kIndex + 1 < Config::kExchanges ? p_.reset_h : p_.output;
    return {takes_part(b, at.rows) && unit() < p_.hidden, b, at.first + b,
            state_ + (b - group_begin_) * Config::kRowState + lane() / 4 * 2,
            ptx::computed(tensor + (at.first + b) * p_.hidden + unit())};
  }

  // What does not depend on the sums is done in front of the barrier.
  template <int kIndex>
  RNNLM_DEVICE bool finish(A* buffer, const PairOfX& x, const Place& at) {
    using Exchange = typename Config::template Exchange<kIndex>;
    using Sums = typename Config::template Sums<kIndex>;
    Row rows[kTiles];
    A a[kTiles][2], bias[2];
    unpack_pair<T>(Config::kHoldsBias ? bias_ : load_bias(), bias);
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      rows[tile] = row_of<kIndex>(at, tile);
      unpack_pair<T>(x.tile[tile], a[tile]);
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) a[tile][e] += bias[e];
    }
    const bool multiplied = Exchange::product_row(q()) >= 0;
    const int first = lane() / 4 * Exchange::kRows + larger(Exchange::product_row(q()), 0);
    const Sums own{buffer + ptx::computed(Sums::place_of_sum(first, warp()))};
    __syncthreads();
    const bool over = flags_[buffer_] != 0;
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) {
        const A sum = own.sum(e * 8 * Exchange::kRows, tile * kTileColumns);
        if (multiplied) a[tile][e] += sum;
      }
    }
    if constexpr (Config::kExchanges == 1)
      return finish_step(rows, a, over);
    else if constexpr (kIndex == 0)
      return finish_gates(rows, a, over);
    else
      return finish_candidate(rows, a, over);
  }

  RNNLM_DEVICE void publish(int q_of_sender, const Row (&rows)[kTiles], const A (&h)[kTiles][2]) {
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile)
      if (q() == q_of_sender && rows[tile].exists) publish_pair(rows[tile].message, h[tile]);
  }
  RNNLM_DEVICE void store_saved(const Row& row, int gate, const A (&a)[2], const A (&y)[2]) const {
    if (p_.saved != nullptr && gate >= 0 && row.exists) {
      store_pair(p_.saved + (row.index * Cell::kSavedGates + gate) * p_.hidden + unit(),
                 kIs16Bit<T> ? a : y);
    }
  }

  // LSTM, and GRU that resets after.
  RNNLM_DEVICE bool finish_step(const Row (&rows)[kTiles], const A (&a)[kTiles][2], bool over) {
    A h[kTiles][2], state[kTiles][2], kept[kTiles][2];
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) {
        state[tile][e] = rows[tile].state[e];
        h[tile][e] = Cell::forward(lane(), a[tile][e], state[tile][e], kept[tile][e]);
      }
    }
    if (over) return false;
    publish(0, rows, h);
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const Row& row = rows[tile];
      store_saved(row, Cell::saved_gate(q()), kept[tile], kept[tile]);
      if (!row.exists) continue;  // in reverse, not yet: its state is still the initial one
      if (q() == 0) {
        row.state[0] = state[tile][0];
        row.state[1] = state[tile][1];
      }
      const bool ends = row.b >= steps_.next_rows;
      if constexpr (Config::kIsLstm) {
        if (p_.cells != nullptr && q() == 1)
          store_pair(p_.cells + row.index * p_.hidden + unit(), state[tile]);
        if (ends && q() == 2) store_pair(p_.c_n + int64_t{row.b} * p_.hidden + unit(), state[tile]);
      }
      if (ends && q() == 3) store_pair(p_.h_n + int64_t{row.b} * p_.hidden + unit(), h[tile]);
    }
    return true;
  }

  // GRU that resets before, its gates: lane 0 has r and publishes r * h, lane 1 keeps z.
  RNNLM_DEVICE bool finish_gates(const Row (&rows)[kTiles], const A (&a)[kTiles][2], bool over) {
    A y[kTiles][2], u[kTiles][2];
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) {
        y[tile][e] = Math::sigmoid(a[tile][e]);
        u[tile][e] = y[tile][e] * rows[tile].state[e];
      }
    }
    if (over) return false;
    publish(0, rows, u);
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const Row& row = rows[tile];
      if (q() == 1 && row.exists) {
        row.state[Config::kUnits] = y[tile][0];
        row.state[Config::kUnits + 1] = y[tile][1];
      }
      store_saved(row, q() < 2 ? q() : -1, a[tile], y[tile]);
    }
    return true;
  }
  // Its candidate n and the new h: lane 2.
  RNNLM_DEVICE bool finish_candidate(const Row (&rows)[kTiles], const A (&a)[kTiles][2],
                                     bool over) {
    A h[kTiles][2], n[kTiles][2];
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) {
        const A* state = rows[tile].state + e;
        n[tile][e] = Math::tanh(a[tile][e]);
        h[tile][e] = gru_update<Math>(state[Config::kUnits], n[tile][e], state[0]);
      }
    }
    if (over) return false;
    publish(2, rows, h);
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const Row& row = rows[tile];
      if (q() != 2 || !row.exists) continue;
      row.state[0] = h[tile][0];
      row.state[1] = h[tile][1];
      store_saved(row, 2, a[tile], n[tile]);
      if (row.b >= steps_.next_rows)
        store_pair(p_.h_n + int64_t{row.b} * p_.hidden + unit(), h[tile]);
    }
    return true;
  }

  const GridForwardParams<T>& p_;
  unsigned thread_;
  GridSteps steps_;
  int group_begin_, group_end_;
  int passes_ = 0;
  int fragments_, lane_fragments_;  // of the warp, and those that this lane has k of
  GridWeights<Config, 0> weights_;
  GridWeights<Config, Config::kExchanges - 1> candidate_weights_;
  uint4 h_[kFragments][1];
  bool loaded_ = false;  // h_ is of the pass to come
  PairOfX x_;            // of the pass to come
  PairBits<T> bias_;
  uint4* window_;  // of the warp: [8 columns][kWindowPitch]
  A* sums_;
  uint32_t* flags_;
  A* state_;
  int buffer_ = 0;
  Pair pair_;
  bool over_ = false;  // of a pair: given up, and only there for the partner
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    grid_forward_kernel(GridForwardParams<typename Config::T> params) {
  if constexpr (Config::kLeastSharedBytes <= ptx::kMostSharedBytes &&
                (!Config::kIsPaired || ptx::kHasMulticast))
    GridForward<Config>(params).run();
}

}  // namespace rnnlm
