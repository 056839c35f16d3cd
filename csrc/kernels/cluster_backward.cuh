// A layer's backward recurrence in one launch, every 8 batch rows on their own: on one CTA (block
// tier) or on the CTAs of a cluster (cluster tier). The counterpart of cluster_forward.cuh.
//
// Who owns what. The CTAs of a cluster share the hidden units evenly. A CTA has the rows of W_hh
// that belong to its units' gates, transposed, as tensor-core fragments: it multiplies the
// gradients of its own gates by them and gets its part of dh of ALL units. So gradients of gates
// never leave a CTA; in a cluster each CTA then sends the others its part of their dh (float32;
// half the bytes that the 16-bit gradients of all gates would be), and who owns a unit adds up the
// parts in the order of the CTAs: the same bits every time. The warps of a CTA share the product's
// outputs, each over all of its k. Where a value comes out of the product, or is received, lies
// with the lane that computes the gates: a lane has "pairs", two neighbouring units of one batch
// row; two such pairs in the block tier, one in the cluster tier. dc, and what of dh does not pass
// through the product (the path through z of a GRU), stay in its registers.
//
// float32 is the same: in TF32 with operands rounded when they are stored; exactly, where that must
// not be, with weights whole in a warp's lanes and sums by way of shared memory (cluster_fma.cuh).
//
// Computed step after step, from the last one of the forward pass to its first:
//   gradients  from dh and dc to the gradients of the lane's gates, into one of two buffers in
//              shared memory;
//   barrier    of the CTA;
//   multiply   every warp reads all gradients of the CTA;
//   exchange   in a cluster: 16-byte st.async of accumulators, as they are, into the owner's slots;
//   look ahead in the shadow of other warps' products (and of the exchange): storing the gradients
//              (in the block tier always before the product), and what the next step's gradients
//              are as functions of dh and dc (all of its special functions), from what was loaded a
//              step ago; loading for the one behind.
// A GRU that resets before the product has a product with W_hn first, then one with the rest.
//
// Rows. A row's gradient starts (grad_h_n, grad_c_n) at the step that was its last, and when the
// step computed now no longer holds it, what the product gave is its dh0. Behind the last step
// comes one more product for dh0, unless nobody wants it.
//
// Gradients of biases are sums over rows and steps. Where they are wanted, a thread that has stored
// a step's gradients adds them, as they were before they were rounded, to float32 sums of its own:
// in registers, or where these are short in words of shared memory that nobody else touches. Behind
// the last step the lanes that share a unit add theirs up, always in the same order, and store the
// cluster's row of bias_partials. Who launches the kernel adds up these rows.
//
// Why two buffers are enough. Gradients of step s + 2 are written by a warp that has passed the
// barrier of s + 1, before which all warps have multiplied those of s. Exchange n + 1 is sent
// behind a barrier of the CTA, before which all of its warps have read exchange n: what
// ClusterSignal asks.
//
// What a step costs (derived, not measured: 1.85 GHz; an SM's peak rates; LSTM), for 128 units in
// one CTA and for 64 of 256 in each of four:
//   issuing instructions       0.65 us    0.45 us    (about 600 or 420 a warp, two a scheduler)
//   special functions          0.35       0.17       (ten a unit and row)
//   gradients from shared      0.28       0.14       (each of eight warps reads all of the CTA's)
//   tensor cores               0.21       0.21       (128 KB of weights)
//   barrier and exchange       0.02       0.22
// The first and second largest are kept out of each other's way by letting half of the warps look
// ahead before they multiply and the other half after.
#pragma once

#include "device/gates.h"
#include "kernels/cluster_fma.cuh"
#include "kernels/cluster_state.cuh"

namespace rnnlm {

template <class T>
struct ClusterBackwardParams {
  DeviceSequence seq;
  int hidden;               // a multiple of 8
  const T* grad_output;     // [N, H] or null, as the next three
  const T* grad_h_n;        // [B, H]
  const T* grad_c_n;        // [B, H], LSTM
  const float* grad_cells;  // [N, H], LSTM
  const T* w_hh;            // [G*H, H]
  const T* initial;         // [B, H]: c0 of an LSTM, h0 of a GRU
  const float* cells;       // [N, H], LSTM
  const T* output;          // [N, H], GRU
  const T* saved;           // [N, saved gates * H]
  T* dgates;                // [N, G*H]
  T* candidate;             // [N, H], GRU
  T* dh0;                   // [B, H] or null: not wanted
  T* dc0;                   // [B, H], LSTM: null like dh0
  float* bias_partials;     // [clusters, biases * H] or null: not wanted
  uint32_t* abort_word;
  WaitLimit wait_limit;
};

// --- one unit of one row on one thread -----------------------------------------------------------
//
// prepare() does all that needs neither dh nor dc: gradients are linear in these. `kept` is what
// was saved: pre-activations in 16 bits, activated gates in float32. `before` is c (GRU: h) of the
// step before, `now` an LSTM's c of the step. kStored gradients go to global memory, of which the
// first kBiases are those of biases. published(gate): which of them the product of that gate's
// weights is taken with. `carry` is the part of the dh to come that is not in the product (0:
// LSTM).

template <class T>
struct LstmGradient {
  using Math = GateMath<T>;
  static constexpr int kGates = 4, kSaved = 4, kStored = 4, kBiases = 4;
  static constexpr bool kHasCells = true, kResetsBefore = false;
  using Slopes = LstmSlopes<float>;
  static RNNLM_DEVICE int published(int gate) { return gate; }
  static RNNLM_DEVICE Slopes prepare(const float (&kept)[4], float before, float now) {
    const LstmGates<float> gates{kept[0], kept[1], kept[2], kept[3]};
    if constexpr (kIs16Bit<T>) return lstm_slopes<Math>(lstm_activate<Math>(gates), before, now);
    return lstm_slopes<Math>(gates, before, now);
  }
  static RNNLM_DEVICE void gradients(const Slopes& s, float dh, float&, float& dc, float (&d)[4]) {
    const float d_c = Math::fma(dh, s.h, dc);
    d[0] = d_c * s.i;
    d[1] = d_c * s.f;
    d[2] = d_c * s.g;
    d[3] = dh * s.o;
    dc = d_c * s.c;
  }
};

// A GRU's gates as they were saved.
template <class T>
RNNLM_DEVICE GruGates<float> activated(const GruGates<float>& kept) {
  using Math = GateMath<T>;
  if constexpr (!kIs16Bit<T>) return kept;
  return {Math::sigmoid(kept.r), Math::sigmoid(kept.z), Math::tanh(kept.n)};
}

template <class T>
struct GruAfterGradient {
  using Math = GateMath<T>;
  static constexpr int kGates = 3, kSaved = 4;
  static constexpr int kStored = 4, kBiases = 4;  // r, z, n; of W_hn h + b_hn
  static constexpr bool kHasCells = false, kResetsBefore = false;
  struct Slopes {
    GruUpdateGrad<float> update;
    GruAfterGrad<float> reset;
  };
  static RNNLM_DEVICE int published(int gate) { return gate < 2 ? gate : 3; }
  static RNNLM_DEVICE Slopes prepare(const float (&kept)[4], float before, float) {
    const GruGates<float> y = activated<T>({kept[0], kept[1], kept[2]});
    return {gru_update_backward<Math>(y.z, y.n, before, 1.0f),
            gru_reset_after_backward<Math>(y.r, kept[3], 1.0f)};
  }
  static RNNLM_DEVICE void gradients(const Slopes& s, float dh, float& carry, float&,
                                     float (&d)[4]) {
    d[1] = dh * s.update.a_z;
    d[2] = dh * s.update.a_n;
    d[0] = d[2] * s.reset.a_r;
    d[3] = d[2] * s.reset.d_hn;
    carry = dh * s.update.h_direct;
  }
};

template <class T>
struct GruBeforeGradient {
  using Math = GateMath<T>;
  static constexpr int kGates = 3, kSaved = 3;
  static constexpr int kStored = 4, kBiases = 3;  // r, z, n; r * h, no gradient
  static constexpr bool kHasCells = false, kResetsBefore = true;
  struct Slopes {
    GruUpdateGrad<float> update;
    GruBeforeGrad<float> reset;
    float reset_h;
  };
  static RNNLM_DEVICE int published(int gate) { return gate; }
  static RNNLM_DEVICE Slopes prepare(const float (&kept)[3], float before, float) {
    const GruGates<float> y = activated<T>({kept[0], kept[1], kept[2]});
    return {gru_update_backward<Math>(y.z, y.n, before, 1.0f),
            gru_reset_before_backward<Math>(y.r, before, 1.0f), y.r * before};
  }
  static RNNLM_DEVICE void gradients(const Slopes& s, float dh, float& carry, float&,
                                     float (&d)[4]) {
    d[0] = 0.0f;
    d[1] = dh * s.update.a_z;
    d[2] = dh * s.update.a_n;
    d[3] = s.reset_h;
    carry = dh * s.update.h_direct;
  }
  // With the gradient of r * h, from the product with W_hn. Returns that of r's pre-activation.
  static RNNLM_DEVICE float reset_gradient(const Slopes& s, float d_rh, float& carry) {
    carry = Math::fma(d_rh, s.reset.h_direct, carry);
    return d_rh * s.reset.a_r;
  }
};

// --- configuration -------------------------------------------------------------------------------

// kDepth: hidden units that the kernel has room for, a multiple of 64; beyond `hidden` they are 0.
template <class Product_, template <class> class Unit_, int kDepth_, int kCtas_>
struct ClusterBackwardConfig {
  using Product = Product_;
  using T = typename Product::Element;
  using Unit = Unit_<T>;
  static constexpr bool kTensorCores = !std::is_same_v<Product, ClusterFma>;
  static constexpr int kDepth = kDepth_;
  static constexpr int kCtas = kCtas_;
  static constexpr int kUnits = kDepth / kCtas;  // of a CTA
  static constexpr int kWarps = kUnits / (kCtas == 1 ? 16 : 8);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPairs = kCtas == 1 ? 2 : 1;
  static constexpr int kProducts = Unit::kResetsBefore ? 2 : 1;

  // Tiles of 16 units of the product's output, in the order of the units; row g is the tile's unit
  // 2g, row g + 8 unit 2g + 1. A warp's tiles all belong to one CTA.
  static constexpr int kTiles = kDepth / 16 / kWarps;
  static constexpr int kOwnTiles = kUnits / 16;
  static_assert(kCtas == 1 ? kTiles == 1 : kOwnTiles % kTiles == 0 || kTiles % kOwnTiles == 0);

  // k: the gates one after the other, of each the CTA's units; 64 bytes a fragment, of which a tile
  // takes 8 registers. A thread has room for 160 registers of weights beside the rest, of float32
  // for 128 (two pairs: 96). Where it has more, most wait in shared memory, and to load them in
  // time takes registers too.
  static constexpr int kFragmentsOfGate = kUnits / kFragmentDepth<T>;
  static constexpr int kFragments = Unit::kGates * kFragmentsOfGate;
  static constexpr int kRoom = kIs16Bit<T> ? 160 : kCtas == 1 ? 96 : 128;
  static constexpr int kHeld = kFragments * kTiles * 8 <= kRoom ? kFragments : 96 / (kTiles * 8);
  static constexpr int kInShared = kFragments - kHeld;

  // With plain multiply-adds: a lane has 4 units of each tile, an eighth of their k, in vectors of
  // 4. Where registers do not hold them all, loading the others in time takes some too; of the
  // widest LSTM as many are held as make the others fit shared memory. At most two tiles are
  // computed at a time.
  static constexpr int kVectors = 4 * kTiles * Unit::kGates * kUnits / 32;
  using Rows = FmaRows<4 * kTiles, Unit::kGates * kUnits,
                       kVectors <= 32   ? kVectors
                       : kVectors <= 48 ? 16
                       : kVectors <= 96 ? 24
                                        : 37,
                       kThreads>;
  static constexpr int kTilesOfPass = kTiles < 2 || kVectors > 96 ? 1 : 2;

  // Sums of biases' gradients are in shared memory where registers are short: where a lane has two
  // pairs, and where plain multiply-adds keep weights there too, unless these leave no room.
  static constexpr bool kBiasesInShared =
      kCtas == 1 || (!kTensorCores && kVectors > 32 && kVectors <= 96);

  // Shared memory: two slots of gradients, weights, sums of plain multiply-adds, two slots of
  // partial sums (float32 accumulators of a warp, from each CTA for each tile), the cluster's
  // mbarriers, sums of biases (of two units for each of a thread's).
  static constexpr int kSlotBytes = kFragments * kFragmentBytes;
  static constexpr int kWeightBytes =
      kTensorCores ? kInShared * kTiles * 2 * kThreads * 16 : Rows::kWeightBytes;
  static constexpr int kRowSumsBytes = kTensorCores ? 0 : Rows::kSumsBytes;
  static constexpr int kTileBytes = 32 * 16;
  static constexpr int kSumsBytes = kCtas > 1 ? kCtas * kOwnTiles * kTileBytes : 0;
  static constexpr int kBiasBytes = kBiasesInShared ? Unit::kBiases * 8 * kThreads : 0;
  static constexpr int kSharedBytes = 2 * kSlotBytes + kWeightBytes + kRowSumsBytes +
                                      2 * kSumsBytes +
                                      (kCtas > 1 ? ClusterSignal<kCtas>::kBytes : 0) + kBiasBytes;
};

// --- the product ---------------------------------------------------------------------------------
//
// Weights of a warp's tiles, and what they are multiplied by. load() gets the first unit of the
// CTA. multiply<kFirst, kCount>() multiplies the weights of gates kFirst .. kFirst + kCount - 1 by
// their gradients in a slot, of which the step holds the first `rows` batch rows; of others the
// results are anything. take(tile, d) gets the sums of a tile as a tensor core leaves them: units
// 2g and 2g + 1 of columns 2t and 2t + 1.

template <class Config>
class BackwardTiles {
  using T = typename Config::T;
  using Product = typename Config::Product;
  static constexpr int kTiles = Config::kTiles;

 public:
  RNNLM_DEVICE BackwardTiles(unsigned char* weights, unsigned char*)
      : weights_(reinterpret_cast<uint4*>(weights) + threadIdx.x),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32) {}

  RNNLM_DEVICE void load(const T* w_hh, int hidden, int first_unit) {
    // What goes to shared memory first, while registers are free.
    RNNLM_NO_UNROLL
    for (int f = Config::kHeld; f < Config::kFragments; ++f) {
      RNNLM_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        load_fragments(w_hh, hidden, first_unit, tile, f, weights_[in_shared(tile, f, 0)],
                       weights_[in_shared(tile, f, 1)]);
      }
    }
    RNNLM_UNROLL
    for (int f = 0; f < Config::kHeld; ++f) {
      RNNLM_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        load_fragments(w_hh, hidden, first_unit, tile, f, held_[tile][f][0], held_[tile][f][1]);
      }
    }
  }

  template <int kFirst, int kCount, class Take>
  RNNLM_DEVICE void multiply(const unsigned char* slot, int, const Take& take) const {
    constexpr int kFrom = kFirst * Config::kFragmentsOfGate;
    constexpr int kLength = kCount * Config::kFragmentsOfGate;
    // MMAs on one accumulator wait for each other: with few tiles, several sums each.
    constexpr int kWanted = kTiles == 1 ? 3 : kTiles == 2 ? 2 : 1;
    constexpr int kChains = kWanted < kLength ? kWanted : kLength;
    float sums[kChains][kTiles][4];
    RNNLM_UNROLL
    for (int chain = 0; chain < kChains; ++chain) {
      RNNLM_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        RNNLM_UNROLL
        for (int i = 0; i < 4; ++i) sums[chain][tile][i] = 0.0f;
      }
    }
    const unsigned char* gradients = slot + state_vector(lane_g(lane_), lane_t(lane_));
    RNNLM_UNROLL
    for (int i = 0; i < kLength; ++i) {
      const int f = kFrom + i;
      const uint4 d[1] = {*reinterpret_cast<const uint4*>(gradients + f * kFragmentBytes)};
      RNNLM_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        if (f < Config::kHeld)
          Product::multiply(sums[i % kChains][tile], held_[tile][f][0], held_[tile][f][1], d);
        else
          Product::multiply(sums[i % kChains][tile], weights_[in_shared(tile, f, 0)],
                            weights_[in_shared(tile, f, 1)], d);
      }
    }
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      RNNLM_UNROLL
      for (int i = 0; i < 4; ++i) {
        RNNLM_UNROLL
        for (int chain = 1; chain < kChains; ++chain) sums[0][tile][i] += sums[chain][tile][i];
      }
      take(tile, sums[0][tile]);
    }
  }

 private:
  // Rows g and g + 8 of a tile of W_hh^T, the lane's k of fragment f: neighbouring columns of rows
  // of W_hh.
  RNNLM_DEVICE void load_fragments(const T* w_hh, int hidden, int first_unit, int tile, int f,
                                   uint4& even, uint4& odd) const {
    const int output = (warp_ * kTiles + tile) * 16 + 2 * lane_g(lane_);
    const int k = f % Config::kFragmentsOfGate * Product::kStep + Product::k_of(lane_);
    const int unit = first_unit + k;
    const T* column =
        w_hh + (int64_t{f / Config::kFragmentsOfGate} * hidden + unit) * hidden + output;
    const bool exists = output < hidden && unit < hidden;
    uint32_t evens[4], odds[4];
    RNNLM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kIs16Bit<T>) {
        const uint32_t first = exists ? load_word(column + int64_t{2 * i} * hidden) : 0;
        const uint32_t second = exists ? load_word(column + int64_t{2 * i + 1} * hidden) : 0;
        evens[i] = (first & 0xFFFFu) | second << 16;
        odds[i] = first >> 16 | (second & 0xFFFF0000u);
      } else {
        const float2 both = exists ? load_word(column + int64_t{i} * hidden) : float2{0.0f, 0.0f};
        evens[i] = ptx::float_bits(both.x);
        odds[i] = ptx::float_bits(both.y);
      }
    }
    even = as_operand<Product>(uint4{evens[0], evens[1], evens[2], evens[3]});
    odd = as_operand<Product>(uint4{odds[0], odds[1], odds[2], odds[3]});
  }
  static RNNLM_DEVICE int in_shared(int tile, int f, int half) {
    return (((f - Config::kHeld) * kTiles + tile) * 2 + half) * Config::kThreads;
  }

  uint4* weights_;  // [kInShared][kTiles][2][kThreads], from this thread's on
  int lane_, warp_;
  uint4 held_[kTiles][Config::kHeld][2];
};

// With plain multiply-adds: a group of lanes has 4 units of each tile, row 4 * tile + i of unit i.
template <class Config>
class BackwardRows {
  using T = typename Config::T;
  using Rows = typename Config::Rows;
  static constexpr int kTiles = Config::kTiles;

 public:
  RNNLM_DEVICE BackwardRows(unsigned char* weights, unsigned char* sums)
      : rows_(weights, sums), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {}

  RNNLM_DEVICE void load(const T* w_hh, int hidden, int first_unit) {
    rows_.template load<4>([&](int value, int k, uint4(&w)[4]) {
      const int output = (warp_ * kTiles + value / 4) * 16 + 4 * Rows::group_of(lane_);
      const int unit = first_unit + k % Config::kUnits;
      const T* from = w_hh + (int64_t{k / Config::kUnits} * hidden + unit) * hidden + output;
      const bool exists = output < hidden && unit < hidden;
      uint4 of_k[4];  // of 4 units each
      RNNLM_UNROLL
      for (int i = 0; i < 4; ++i) {
        of_k[i] =
            exists ? *reinterpret_cast<const uint4*>(from + int64_t{i} * hidden) : zero_vector();
      }
      w[0] = uint4{of_k[0].x, of_k[1].x, of_k[2].x, of_k[3].x};
      w[1] = uint4{of_k[0].y, of_k[1].y, of_k[2].y, of_k[3].y};
      w[2] = uint4{of_k[0].z, of_k[1].z, of_k[2].z, of_k[3].z};
      w[3] = uint4{of_k[0].w, of_k[1].w, of_k[2].w, of_k[3].w};
    });
  }

  template <int kFirst, int kCount, class Take>
  RNNLM_DEVICE void multiply(const unsigned char* slot, int rows, const Take& take) const {
    multiply_tiles<0, kFirst, kCount>(slot, rows, take);
  }

 private:
  // From tile kTile on.
  template <int kTile, int kFirst, int kCount, class Take>
  RNNLM_DEVICE void multiply_tiles(const unsigned char* slot, int rows, const Take& take) const {
    if constexpr (kTile < kTiles) {
      constexpr int kVectorsOfGate = Config::kUnits / 32, kValues = 4 * Config::kTilesOfPass;
      rows_.template multiply<4 * kTile, kValues, kFirst * kVectorsOfGate, kCount * kVectorsOfGate>(
          slot, rows);
      RNNLM_UNROLL
      for (int tile = 0; tile < Config::kTilesOfPass; ++tile) {
        float d[4];
        RNNLM_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int value = 4 * tile + 2 * (lane_g(lane_) & 1) + i / 2;
          d[i] = rows_.template sum<kValues>(lane_g(lane_) / 2, value, 2 * lane_t(lane_) + i % 2);
        }
        take(kTile + tile, d);
      }
      multiply_tiles<kTile + Config::kTilesOfPass, kFirst, kCount>(slot, rows, take);
    }
  }

  Rows rows_;
  int lane_, warp_;
};

// --- gradients of biases -------------------------------------------------------------------------

// A thread's sums for its two units of kCount gates, in registers or in shared memory.
template <int kCount, bool kShared, int kThreads>
class BiasSums {
 public:
  RNNLM_DEVICE explicit BiasSums(unsigned char* shared)
      : words_(reinterpret_cast<float*>(shared) + 2 * threadIdx.x) {
    RNNLM_UNROLL
    for (int i = 0; i < kCount; ++i) store(i, {0.0f, 0.0f});
  }
  RNNLM_DEVICE void load(int i, float (&sums)[2]) const {
    if constexpr (kShared) {
      load_floats(words_ + 2 * kThreads * i, sums);
    } else {
      sums[0] = held_[i][0];
      sums[1] = held_[i][1];
    }
  }
  RNNLM_DEVICE void store(int i, const float (&sums)[2]) {
    if constexpr (kShared) {
      store_floats(words_ + 2 * kThreads * i, sums);
    } else {
      held_[i][0] = sums[0];
      held_[i][1] = sums[1];
    }
  }

 private:
  float* words_;  // [kCount][kThreads][2], from this thread's on
  float held_[kShared ? 1 : kCount][2];
};

// --- the kernel ----------------------------------------------------------------------------------

template <class Config>
class ClusterBackward {
  using T = typename Config::T;
  using Unit = typename Config::Unit;
  using Product = typename Config::Product;
  using Weights =
      std::conditional_t<Config::kTensorCores, BackwardTiles<Config>, BackwardRows<Config>>;
  using Slopes = typename Unit::Slopes;
  static constexpr int kCtas = Config::kCtas;
  static constexpr int kPairs = Config::kPairs;
  static constexpr int kTiles = Config::kTiles;

 public:
  RNNLM_DEVICE explicit ClusterBackward(const ClusterBackwardParams<T>& params)
      : p_(params),
        slots_(ptx::dynamic_shared()),
        weights_(slots_ + 2 * Config::kSlotBytes,
                 slots_ + 2 * Config::kSlotBytes + Config::kWeightBytes),
        sums_(slots_ + 2 * Config::kSlotBytes + Config::kWeightBytes + Config::kRowSumsBytes),
        signal_(sums_ + 2 * Config::kSumsBytes, Config::kSumsBytes, params.abort_word,
                params.wait_limit),
        biases_(slots_ + Config::kSharedBytes - Config::kBiasBytes),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        rank_(kCtas > 1 ? rank_in_cluster() : 0),
        row_(static_cast<int>(blockIdx.x) / kCtas * kClusterRows),
        steps_(steps_with_row(params.seq, row_)) {}

  RNNLM_DEVICE void run() {
    weights_.load(p_.w_hh, p_.hidden, rank_ * Config::kUnits);
    start_gradients();
    if constexpr (kCtas > 1) {
      signal_.begin();
      prepare_to_send();
    }

    // Rows of the steps in flight, in the order of computation: `earlier` is meant in the
    // recurrence.
    int later = 0, now = rows_of(0), earlier = rows_of(1), next = rows_of(2),
        last_seen = rows_of(3);
    aim();
    load(0, later, now, earlier);
    move_loads(now, earlier, next);
    prepare();
    load(1, now, earlier, next);
    move_loads(earlier, next, last_seen);
    // A warp that has given up waiting only meets the others of its CTA, which may not know yet.
    bool over = false;
    for (int s = 0; s < steps_; ++s) {
      const bool last = s + 1 == steps_;
      const int n = s * Config::kProducts;
      const int rows = now - row_ < kClusterRows ? now - row_ : kClusterRows;
      if (!over) {
        RNNLM_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) gradients(pair, s, later, now);
        RNNLM_UNROLL
        for (int gate = Unit::kResetsBefore ? 1 : 0; gate < Unit::kGates; ++gate)
          publish(s, now, gate);
        over = kCtas > 1 && signal_.gave_up();
      }
      __syncthreads();

      if constexpr (Unit::kResetsBefore) {
        if (!over) {
          multiply<2, 1>(s, n, rows, [] {});
          RNNLM_UNROLL
          for (int pair = 0; pair < kPairs; ++pair) reset_gradients(pair);
          publish(s, now, 0);
        }
        __syncthreads();
      }

      if (last && p_.dh0 == nullptr) {
        finish_step(now);
        break;
      }
      if (over) continue;
      // Of two pairs the gradients would take too many registers through the product.
      if (kPairs > 1) finish_step(now);
      const auto look_ahead = [&] {
        if (kPairs == 1) finish_step(now);
        move_stores(now, earlier);
        prepare();
        load(s + 2, earlier, next, last_seen);
        later = now;
        now = earlier;
        earlier = next;
        next = last_seen;
        last_seen = rows_of(s + 4);
      };
      if (looks_ahead_first()) look_ahead();
      multiply<0, Unit::kResetsBefore ? 2 : Unit::kGates>(s, n + Config::kProducts - 1, rows, [&] {
        if (!looks_ahead_first()) look_ahead();
      });
      move_loads(earlier, next, last_seen);
    }
    if (p_.dh0 != nullptr) {
      RNNLM_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) store_initial(pair, later);
    }
    if (p_.bias_partials != nullptr) store_biases();
    if constexpr (kCtas > 1) signal_.end();
  }

 private:
  // Of the s-th step in the order of computation.
  RNNLM_DEVICE int rows_of(int s) const { return rows_of_step(p_.seq, steps_, steps_ - 1 - s); }
  RNNLM_DEVICE int64_t first_of(int s) const {
    return first_row_of_step(p_.seq, steps_, steps_ - 1 - s);
  }

  // The first unit of this lane's pairs, in the layer and in the CTA. In a cluster, warps w and
  // w + kOwnTiles share a tile: the even columns and the odd ones.
  RNNLM_DEVICE int unit() const { return rank_ * Config::kUnits + local_unit(); }
  RNNLM_DEVICE int local_unit() const { return own_tile() * 16 + 2 * lane_g(lane_); }
  RNNLM_DEVICE int own_tile() const { return warp_ % Config::kOwnTiles; }
  RNNLM_DEVICE int column(int pair) const {
    return 2 * lane_t(lane_) + (kCtas == 1 ? pair : warp_ / Config::kOwnTiles);
  }
  RNNLM_DEVICE int batch_row(int pair) const { return row_ + column(pair); }
  RNNLM_DEVICE bool holds(int pair, int rows) const {
    return batch_row(pair) < rows && unit() < p_.hidden;
  }
  // Where this lane's first pair lies in a tensor [rows, width * H], seen from row `first`, and how
  // far from there part `part` of a pair is.
  template <class U>
  RNNLM_DEVICE U* place(U* tensor, int64_t first, int width) const {
    return advance(tensor, (first + row_ + column(0)) * (int64_t{width} * p_.hidden) + unit());
  }
  RNNLM_DEVICE int offset(int pair, int width, int part) const {
    return (pair * width + part) * p_.hidden;
  }

  // --- before the first step

  RNNLM_DEVICE void start_gradients() {
    RNNLM_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      Word<T> dc = {};
      if (Unit::kHasCells && p_.grad_c_n != nullptr && holds(pair, p_.seq.batch))
        dc = load_word(place(p_.grad_c_n, 0, 1) + offset(pair, 1, 0));
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) {
        dc_[pair][e] = value_of<T>(dc, e);
        product_[pair][e] = carry_[pair][e] = before_[pair][e] = 0.0f;
      }
    }
  }

  // --- ahead of a step

  // Where the next accesses to global memory go: the gradients of a step, what is saved of one, and
  // the state before that. These pointers move from step to step: that takes an instruction each,
  // and working out addresses anew would take most of all instructions.
  RNNLM_DEVICE void aim() {
    const int64_t first = first_of(0);
    dgates_to_ = place(p_.dgates, first, Unit::kGates);
    saved_from_ = place(p_.saved, first, Unit::kSaved);
    grad_output_from_ = place(p_.grad_output, first, 1);
    const int64_t before = steps_ > 1 ? first_of(1) : 0;
    if (Unit::kHasCells) {
      cells_from_ = place(p_.cells, before, 1);
    } else {
      candidate_to_ = place(p_.candidate, first, 1);
      output_from_ = place(p_.output, before, 1);
    }
  }
  RNNLM_DEVICE int64_t distance(int rows, int rows_of_next) const {
    return int64_t{rows_to_next(!p_.seq.reverse, rows, rows_of_next)} * p_.hidden;
  }
  RNNLM_DEVICE void move_stores(int rows, int rows_of_next) {
    const int64_t by = distance(rows, rows_of_next);
    dgates_to_ = advance(dgates_to_, by * Unit::kGates);
    if (!Unit::kHasCells) candidate_to_ = advance(candidate_to_, by);
  }
  // From a step with `rows` rows to the one with `rows_of_next`, behind which `rows_of_last` come.
  RNNLM_DEVICE void move_loads(int rows, int rows_of_next, int rows_of_last) {
    const int64_t by = distance(rows, rows_of_next);
    saved_from_ = advance(saved_from_, by * Unit::kSaved);
    grad_output_from_ = advance(grad_output_from_, by);
    const int64_t by_before = distance(rows_of_next, rows_of_last);
    if (Unit::kHasCells)
      cells_from_ = advance(cells_from_, by_before);
    else
      output_from_ = advance(output_from_, by_before);
  }

  // Asks for all of step s, which has `now` rows. `later` and `earlier` are those of its
  // neighbours.
  RNNLM_DEVICE void load(int s, int later, int now, int earlier) {
    RNNLM_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const bool held = holds(pair, now), goes_on = batch_row(pair) < later;
      const bool starts = batch_row(pair) >= earlier;
      RNNLM_UNROLL
      for (int i = 0; i < Unit::kSaved; ++i) {
        saved_[pair][i] = held ? load_word(saved_from_ + offset(pair, Unit::kSaved, i)) : Word<T>{};
      }
      grad_output_[pair] = held && p_.grad_output != nullptr
                               ? load_word(grad_output_from_ + offset(pair, 1, 0))
                               : Word<T>{};
      if constexpr (Unit::kHasCells) {
        // c of this step is what the later one had as c before it, if it held the row.
        RNNLM_UNROLL
        for (int e = 0; e < 2; ++e) now_[pair][e] = before_[pair][e];
        if (held && !goes_on)
          load_floats(place(p_.cells, first_of(s), 1) + offset(pair, 1, 0), now_[pair]);
        if (held && !starts) load_floats(cells_from_ + offset(pair, 1, 0), before_[pair]);
        if (held && starts) {
          const Word<T> c0 = load_word(place(p_.initial, 0, 1) + offset(pair, 1, 0));
          RNNLM_UNROLL
          for (int e = 0; e < 2; ++e) before_[pair][e] = value_of<T>(c0, e);
        }
      } else {
        const T* from = starts ? place(p_.initial, 0, 1) : output_from_;
        before_word_[pair] = held ? load_word(from + offset(pair, 1, 0)) : Word<T>{};
      }
    }
  }

  RNNLM_DEVICE void prepare() {
    RNNLM_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) prepare(pair);
  }
  RNNLM_DEVICE void prepare(int pair) {
    RNNLM_UNROLL
    for (int e = 0; e < 2; ++e) {
      float kept[Unit::kSaved];
      RNNLM_UNROLL
      for (int i = 0; i < Unit::kSaved; ++i) kept[i] = value_of<T>(saved_[pair][i], e);
      if constexpr (Unit::kHasCells)
        slopes_[pair][e] = Unit::prepare(kept, before_[pair][e], now_[pair][e]);
      else
        slopes_[pair][e] = Unit::prepare(kept, value_of<T>(before_word_[pair], e), 0.0f);
    }
    outer_[pair] = grad_output_[pair];
  }

  // The two warps of an SM's partition take turns: one prepares while the other multiplies.
  RNNLM_DEVICE bool looks_ahead_first() const { return Config::kWarps > 4 && warp_ >= 4; }

  // --- a step

  RNNLM_DEVICE void gradients(int pair, int s, int later, int now) {
    const bool held = holds(pair, now);
    if (p_.dh0 != nullptr && !held) store_initial(pair, later);
    const bool goes_on = batch_row(pair) < later;
    Word<T> last = {};
    if (held && !goes_on && p_.grad_h_n != nullptr)
      last = load_word(place(p_.grad_h_n, 0, 1) + offset(pair, 1, 0));
    RNNLM_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float inner = goes_on ? carry_[pair][e] + product_[pair][e] : value_of<T>(last, e);
      const float dh = inner + value_of<T>(outer_[pair], e);
      float dc = dc_[pair][e];
      if (Unit::kHasCells && p_.grad_cells != nullptr && held)
        dc += place(p_.grad_cells, first_of(s), 1)[offset(pair, 1, 0) + e];
      Unit::gradients(slopes_[pair][e], dh, carry_[pair][e], dc, d_[pair][e]);
      // A row that has not begun waits with what it starts from.
      dc_[pair][e] = blend(held ? ~0u : 0, dc, dc_[pair][e]);
    }
  }
  RNNLM_DEVICE void reset_gradients(int pair) {
    if constexpr (Unit::kResetsBefore) {
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) {
        d_[pair][e][0] = Unit::reset_gradient(slopes_[pair][e], product_[pair][e], carry_[pair][e]);
      }
    }
  }
  RNNLM_DEVICE Word<T> word(int pair, int i) const {
    return word_of<T>(d_[pair][0][i], d_[pair][1][i]);
  }
  RNNLM_DEVICE void publish(int s, int now, int gate) {
    RNNLM_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const int k = gate * Config::kUnits + local_unit();
      const uint32_t mask = holds(pair, now) ? ~0u : 0;
      *reinterpret_cast<Word<T>*>(slots_ + (s & 1) * Config::kSlotBytes +
                                  state_word<T>(k, column(pair))) =
          as_operand<Product>(blend(mask, word(pair, Unit::published(gate)), Word<T>{}));
    }
  }

  // product_ = weights of gates kFirst .. kFirst + kCount - 1 times the gradients of step s, which
  // has `rows` of the cluster's rows, summed over the cluster in exchange n. under_way() runs once
  // the warp's part is done.
  template <int kFirst, int kCount, class UnderWay>
  RNNLM_DEVICE void multiply(int s, int n, int rows, const UnderWay& under_way) {
    const unsigned char* slot = slots_ + (s & 1) * Config::kSlotBytes;
    if constexpr (kCtas == 1) {
      weights_.template multiply<kFirst, kCount>(slot, rows, [&](int, const float (&d)[4]) {
        RNNLM_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
          RNNLM_UNROLL
          for (int e = 0; e < 2; ++e) product_[pair][e] = d[2 * e + pair];
        }
      });
      under_way();
    } else {
      weights_.template multiply<kFirst, kCount>(
          slot, rows, [&](int tile, const float (&d)[4]) { send_sums(n, tile, d); });
      under_way();
      signal_.wait(n);
      receive_sums(n);
    }
  }

  // What is done with the gradients besides multiplying them.
  RNNLM_DEVICE void finish_step(int rows) {
    store_results(rows);
    if (p_.bias_partials != nullptr) add_biases(rows);
  }

  // --- exchange
  //
  // Slot n % 2: [source CTA][own tile][lane] 16 bytes, {units 2g, 2g + 1 of column 2t, then of
  // column 2t + 1}.

  RNNLM_DEVICE void prepare_to_send() {
    RNNLM_UNROLL
    for (int i = 0; i < kOwners; ++i) {
      const int tile = warp_ * kTiles + i * Config::kOwnTiles, owner = tile / Config::kOwnTiles;
      const int place = rank_ * Config::kOwnTiles + tile % Config::kOwnTiles;
      destination_[i] = address_in_cluster(sums_ + place * Config::kTileBytes + lane_ * 16, owner);
      counter_[i] = signal_.counter(0, static_cast<uint32_t>(owner));
    }
  }
  // CTAs whose tiles a warp has.
  static constexpr int kOwners = kTiles > Config::kOwnTiles ? kTiles / Config::kOwnTiles : 1;

  RNNLM_DEVICE void send_sums(int n, int tile, const float (&d)[4]) const {
    const uint4 v = {ptx::float_bits(d[0]), ptx::float_bits(d[2]), ptx::float_bits(d[1]),
                     ptx::float_bits(d[3])};
    const int owner = tile / Config::kOwnTiles, place = tile % Config::kOwnTiles;
    send_to_cta(destination_[owner] + static_cast<uint32_t>((n & 1) * Config::kSumsBytes +
                                                            place * Config::kTileBytes),
                v, counter_[owner] + 8u * (static_cast<uint32_t>(n) & 1u));
  }
  RNNLM_DEVICE void receive_sums(int n) {
    const unsigned char* from = sums_ + (n & 1) * Config::kSumsBytes +
                                own_tile() * Config::kTileBytes + lane_ * 16 +
                                warp_ / Config::kOwnTiles * 8;
    float part[kCtas][2];
    RNNLM_UNROLL
    for (int cta = 0; cta < kCtas; ++cta) {
      load_floats(
          reinterpret_cast<const float*>(from + cta * Config::kOwnTiles * Config::kTileBytes),
          part[cta]);
    }
    RNNLM_UNROLL
    for (int e = 0; e < 2; ++e) {
      product_[0][e] = part[0][e];
      RNNLM_UNROLL
      for (int cta = 1; cta < kCtas; ++cta) product_[0][e] += part[cta][e];
    }
  }

  // --- gradients of biases

  // Adds those of a step that holds `rows` rows.
  RNNLM_DEVICE void add_biases(int rows) {
    RNNLM_UNROLL
    for (int i = 0; i < Unit::kBiases; ++i) {
      float sums[2];
      biases_.load(i, sums);
      RNNLM_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        if (!holds(pair, rows)) continue;
        RNNLM_UNROLL
        for (int e = 0; e < 2; ++e) sums[e] += d_[pair][e][i];
      }
      biases_.store(i, sums);
    }
  }

  // Adds up the lanes that share two units: a quad of a warp and, in a cluster, one of another that
  // hands its sums over in the slot of the step before the last, where nobody reads any more.
  RNNLM_DEVICE void store_biases() {
    float sums[Unit::kBiases][2];
    RNNLM_UNROLL
    for (int i = 0; i < Unit::kBiases; ++i) {
      biases_.load(i, sums[i]);
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) {
        sums[i][e] += ptx::shuffle_xor(sums[i][e], 1);
        sums[i][e] += ptx::shuffle_xor(sums[i][e], 2);
      }
    }
    bool stores = lane_t(lane_) == 0 && unit() < p_.hidden;
    if constexpr (kCtas > 1) {
      static_assert(Unit::kBiases * Config::kUnits * int(sizeof(float)) <= Config::kSlotBytes);
      float* others = reinterpret_cast<float*>(slots_ + (steps_ & 1) * Config::kSlotBytes);
      const bool hands_over = warp_ >= Config::kOwnTiles;
      if (stores && hands_over) {
        RNNLM_UNROLL
        for (int i = 0; i < Unit::kBiases; ++i)
          store_floats(others + i * Config::kUnits + local_unit(), sums[i]);
      }
      __syncthreads();
      stores = stores && !hands_over;
      if (stores) {
        RNNLM_UNROLL
        for (int i = 0; i < Unit::kBiases; ++i) {
          float other[2];
          load_floats(others + i * Config::kUnits + local_unit(), other);
          RNNLM_UNROLL
          for (int e = 0; e < 2; ++e) sums[i][e] += other[e];
        }
      }
    }
    if (!stores) return;
    const int64_t cluster = row_ / kClusterRows;
    float* to = p_.bias_partials + cluster * (Unit::kBiases * p_.hidden) + unit();
    RNNLM_UNROLL
    for (int i = 0; i < Unit::kBiases; ++i) store_floats(to + i * p_.hidden, sums[i]);
  }

  // --- global memory

  RNNLM_DEVICE void store_results(int rows) const {
    RNNLM_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      if (!holds(pair, rows)) continue;
      RNNLM_UNROLL
      for (int gate = 0; gate < Unit::kGates; ++gate)
        store_word(dgates_to_ + offset(pair, Unit::kGates, gate), word(pair, gate));
      if constexpr (!Unit::kHasCells) store_word(candidate_to_ + offset(pair, 1, 0), word(pair, 3));
    }
  }
  // For a row of the step computed last, which held `rows`.
  RNNLM_DEVICE void store_initial(int pair, int rows) const {
    if (!holds(pair, rows)) return;
    store_word(
        place(p_.dh0, 0, 1) + offset(pair, 1, 0),
        word_of<T>(carry_[pair][0] + product_[pair][0], carry_[pair][1] + product_[pair][1]));
    if constexpr (Unit::kHasCells)
      store_word(place(p_.dc0, 0, 1) + offset(pair, 1, 0), word_of<T>(dc_[pair][0], dc_[pair][1]));
  }

  const ClusterBackwardParams<T>& p_;
  unsigned char* slots_;
  Weights weights_;
  unsigned char* sums_;  // that came from the cluster
  ClusterSignal<kCtas> signal_;
  BiasSums<Unit::kBiases, Config::kBiasesInShared, Config::kThreads> biases_;
  int lane_, warp_, rank_;
  int row_;    // the cluster's first batch row
  int steps_;  // that hold rows of it
  // Of the step to come: as loaded, and prepared. before_ and now_: c of an LSTM.
  Word<T> saved_[kPairs][Unit::kSaved], grad_output_[kPairs], before_word_[kPairs];
  float before_[kPairs][2], now_[kPairs][2];
  Slopes slopes_[kPairs][2];
  Word<T> outer_[kPairs];  // grad_output
  // Of this step: dh's parts, dc, and the gradients.
  float product_[kPairs][2], carry_[kPairs][2], dc_[kPairs][2];
  float d_[kPairs][2][Unit::kStored];  // of rows that the step does not hold, anything
  T *dgates_to_, *candidate_to_;
  const T *saved_from_, *grad_output_from_, *output_from_;
  const float* cells_from_;
  uint32_t destination_[kOwners], counter_[kOwners];
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    cluster_backward_kernel(ClusterBackwardParams<typename Config::T> params) {
  if constexpr (Config::kCtas == 1 || kHasClusters) ClusterBackward<Config>(params).run();
}

}  // namespace rnnlm
