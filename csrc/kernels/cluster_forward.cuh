// A layer's forward recurrence in one launch, every 8 batch rows on their own: on one CTA (block
// tier, small layers, any architecture), or on the CTAs of a cluster (cluster tier, sm_90 and
// newer).
//
// Who owns what. The CTAs of a cluster share the hidden units evenly, the warps of a CTA its units:
// 16 units a warp in the block tier, 8 in the cluster tier. A warp holds all weights of its units'
// gates for the whole launch, as tensor-core fragments in registers (of the largest layers partly
// in shared memory), over all of k: no sums of several warps, hence no second barrier. Weight rows
// are ordered so that the gates of a unit meet in one lane: a tile's rows g and g + 8 are gates 0
// and 1, or 2 and 3, of the same unit. In the end a lane has "pairs": two neighbouring units of one
// batch row, two such pairs (16 units a warp) or one (8 units, after an exchange of columns with
// the lane next to it). It keeps c (GRU: h) of its pairs in registers and computes the gates alone.
//
// float32 has 8 units a warp in either tier: its gates, as they come in and as they are saved, take
// two registers a pair. Where its products may be rounded to TF32 they are tiles as of 16 bits, of
// operands rounded when they are stored. Where they must not, a warp's weights lie whole with its
// lanes, and the sums reach the lane of the pair by way of shared memory: cluster_fma.cuh.
//
// A step:
//   multiply   every warp reads h of all units from shared memory;
//   finish     gates, c and h of the lane's pairs;
//   hand over  block: h to the other of two buffers in shared memory, then the only barrier of the
//              step; cluster: 16-byte st.async of h into all CTAs, no barrier at all;
//   in between, in the shadow of the product (block) or of the exchange (cluster): storing what the
//              step before has left for global memory, loading gates_x of the next one.
// A GRU that resets before the product hands over r * h as well: two products and exchanges a step.
//
// Why two buffers are enough. Block: a warp that writes h of step t + 1 has passed the barrier
// behind step t, so all warps have read step t - 1. Cluster: exchange n + 2 goes where n was; see
// ClusterSignal. A warp sends its part of n + 1 after its product has used all of n, and who has
// received n + 1 has parts of all warps of all CTAs.
//
// What a step costs (derived, not measured: 1.85 GHz; an SM's peak rates; LSTM), for 128 units in
// one CTA and for 64 of 256 in each of four:
//   issuing instructions       0.38 us    0.33 us    (360 or 310 a warp, two warps a scheduler)
//   special functions          0.35       0.17       (ten a unit and row)
//   tensor cores               0.21       0.21       (128 KB of weights)
//   h from shared memory       0.07       0.14       (each of eight warps reads all of it)
//   barrier or exchange        0.02       0.20
// These overlap in part. So it is instructions that count, not weights: what is stored and loaded
// in a step goes through pointers that are moved, not computed (move_stores(), move_loads()), and
// gates are computed without a branch around them (blend()). 16 rows a cluster would double all of
// it but the last line. Of exact float32 it is the multiply-adds that count: 0.14 us a row for 64
// of 128 units, 0.28 us for 64 of 256.
#pragma once

#include "device/gates.h"
#include "kernels/cluster_fma.cuh"
#include "kernels/cluster_state.cuh"

namespace rnnlm {

template <class T>
struct ClusterForwardParams {
  DeviceSequence seq;
  int hidden;        // a multiple of 8
  const T* gates_x;  // [N, G*H]
  const T* w_hh;     // [G*H, H], aligned to 16 bytes
  const T* b_hh;     // [G*H] or null
  const T* h0;       // [B, H]
  const T* c0;       // [B, H], LSTM
  T* output;         // [N, H]
  T* h_n;            // [B, H]
  T* c_n;            // [B, H], LSTM
  float* cells;      // [N, H] or null, LSTM
  T* saved;          // [N, saved gates * H] or null
  uint32_t* abort_word;
  WaitLimit wait_limit;
};

// --- one unit of one row on one thread -----------------------------------------------------------
//
// `product` is W_hh h + b_hh of the unit's gates, `x` its gates_x; `state` is c of an LSTM, h of a
// GRU. `kept` is what is saved: pre-activations in 16 bits, activated gates in float32. forward()
// returns h.

template <class T>
struct LstmUnit {
  using Math = GateMath<T>;
  static constexpr int kGates = 4, kSaved = 4;
  static constexpr bool kHasCells = true, kResetsBefore = false;
  static RNNLM_DEVICE float forward(const float (&product)[4], const float (&x)[4], float& state,
                                    float (&kept)[4]) {
    RNNLM_UNROLL
    for (int gate = 0; gate < 4; ++gate) kept[gate] = product[gate] + x[gate];
    const LstmGates<float> y = lstm_activate<Math>({kept[0], kept[1], kept[2], kept[3]});
    if constexpr (!kIs16Bit<T>) {
      kept[0] = y.i;
      kept[1] = y.f;
      kept[2] = y.g;
      kept[3] = y.o;
    }
    return lstm_forward<Math>(y, state);
  }
};

template <class T>
struct GruAfterUnit {
  using Math = GateMath<T>;
  static constexpr int kGates = 3, kSaved = 4;  // r, z, n, W_hn h + b_hn
  static constexpr bool kHasCells = false, kResetsBefore = false;
  static RNNLM_DEVICE float forward(const float (&product)[3], const float (&x)[3], float& state,
                                    float (&kept)[4]) {
    const float a_r = product[0] + x[0], a_z = product[1] + x[1];
    const float r = Math::sigmoid(a_r), z = Math::sigmoid(a_z);
    const float a_n = Math::fma(r, product[2], x[2]), n = Math::tanh(a_n);
    kept[0] = kIs16Bit<T> ? a_r : r;
    kept[1] = kIs16Bit<T> ? a_z : z;
    kept[2] = kIs16Bit<T> ? a_n : n;
    kept[3] = product[2];
    state = gru_update<Math>(z, n, state);
    return state;
  }
};

template <class T>
struct GruBeforeUnit {
  using Math = GateMath<T>;
  static constexpr int kGates = 3, kSaved = 3;
  static constexpr bool kHasCells = false, kResetsBefore = true;
  // Returns r * h, what the candidate's product is taken with.
  static RNNLM_DEVICE float reset(const float (&product)[3], const float (&x)[3], float state,
                                  float (&kept)[3]) {
    const float a_r = product[0] + x[0], r = Math::sigmoid(a_r);
    kept[0] = kIs16Bit<T> ? a_r : r;
    kept[1] = product[1] + x[1];
    return r * state;
  }
  static RNNLM_DEVICE float forward(const float (&product)[3], const float (&x)[3], float& state,
                                    float (&kept)[3]) {
    const float z = Math::sigmoid(kept[1]);
    const float a_n = product[2] + x[2], n = Math::tanh(a_n);
    if (!kIs16Bit<T>) kept[1] = z;
    kept[2] = kIs16Bit<T> ? a_n : n;
    state = gru_update<Math>(z, n, state);
    return state;
  }
};

// --- configuration -------------------------------------------------------------------------------

// kDepth: hidden units that the kernel has room for, a multiple of 64; beyond `hidden` they are 0.
template <class Product_, template <class> class Unit_, int kDepth_, int kCtas_>
struct ClusterForwardConfig {
  using Product = Product_;
  using T = typename Product::Element;
  using Unit = Unit_<T>;
  static constexpr bool kTensorCores = !std::is_same_v<Product, ClusterFma>;
  static constexpr int kDepth = kDepth_;
  static constexpr int kCtas = kCtas_;
  static constexpr int kUnits = kDepth / kCtas;  // of a CTA
  // Float32 has no registers for the gates of two pairs.
  static constexpr int kUnitsOfWarp = kCtas == 1 && kIs16Bit<T> ? 16 : 8;
  static constexpr int kWarps = kUnits / kUnitsOfWarp;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPairs = kUnitsOfWarp / 8;
  static constexpr int kProducts = Unit::kResetsBefore ? 2 : 1;

  // Tiles of 16 weight rows: 8 units' gates 0 and 1, and their gates 2 and 3 (a GRU's fourth is
  // zeros). With 16 units: those tiles of the even units, then of the odd ones; a GRU's third gate
  // of both is one tile.
  static constexpr int kTiles = kUnitsOfWarp == 8 ? 2 : Unit::kGates;
  static constexpr int kLastTile = kTiles - 1;  // of a reset-before GRU: the candidate
  static RNNLM_DEVICE int gate_of(int tile, int half) {
    if (kUnitsOfWarp == 8) return 2 * tile + half;
    if (Unit::kGates == 4) return 2 * (tile % 2) + half;
    return tile == 2 ? 2 : half;
  }
  static RNNLM_DEVICE int unit_of(int tile, int half, int g) {
    if (kUnitsOfWarp == 8) return g;
    if (Unit::kGates == 4) return 2 * g + tile / 2;
    return 2 * g + (tile == 2 ? half : tile);
  }
  // Where a lane finds the gate of its unit 2g + e (16 units) or g (8 units), column 2t + p.
  static RNNLM_DEVICE int tile_of(int gate, int e) {
    if (kUnitsOfWarp == 8) return gate / 2;
    if (Unit::kGates == 4) return 2 * e + gate / 2;
    return gate == 2 ? 2 : e;
  }
  static RNNLM_DEVICE int half_of(int gate, int e) {
    if (kUnitsOfWarp == 16 && Unit::kGates == 3 && gate == 2) return e;
    return gate % 2;
  }

  // Fragments of 64 bytes of k, of which a tile takes 8 registers each. A thread has room for 192
  // registers of weights beside the rest, of float32 for 128. Where it has more, most wait in
  // shared memory, and to load them in time takes registers too.
  static constexpr int kFragments = kDepth / kFragmentDepth<T>;
  static constexpr int kRoom = kIs16Bit<T> ? 192 : 128, kRoomOfMany = kIs16Bit<T> ? 112 : 96;
  static constexpr int kHeld =
      kFragments * kTiles * 8 <= kRoom ? kFragments : kRoomOfMany / (kTiles * 8);
  static constexpr int kInShared = kFragments - kHeld;

  // With plain multiply-adds: a lane has 2 units' rows, an eighth of their k, in vectors of 4.
  // Where registers do not hold them all, loading the others in time takes some too; of the widest
  // LSTM as many are held as make the others fit shared memory.
  static constexpr int kVectors = 2 * Unit::kGates * kDepth / 32;
  using Rows = FmaRows<2 * Unit::kGates, kDepth,
                       kVectors <= 32   ? kVectors
                       : kVectors <= 96 ? 24
                                        : 33,
                       kThreads>;

  // Shared memory: two slots of h (or h and r * h), weights, sums of plain multiply-adds and biases
  // to add to them (8 for 8 threads), the cluster's mbarriers.
  static constexpr int kSlotBytes = kFragments * kFragmentBytes;
  static constexpr int kWeightBytes =
      kTensorCores ? kInShared * kTiles * 2 * kThreads * 16 : Rows::kWeightBytes;
  static constexpr int kSumsBytes = kTensorCores ? 0 : Rows::kSumsBytes + 4 * kThreads;
  static constexpr int kSharedBytes =
      2 * kSlotBytes + kWeightBytes + kSumsBytes + (kCtas > 1 ? ClusterSignal<kCtas>::kBytes : 0);
};

// --- the product ---------------------------------------------------------------------------------
//
// Weights of a warp's units, and what they are multiplied by. load() gets the first unit of the
// warp. multiply<kFirst, kCount>() computes gates kFirst .. kFirst + kCount - 1 of the lane's pairs
// from a slot of which the step holds the first `rows` batch rows; of others the results are
// anything. After fragment f has been multiplied (or before all of them), shadow(f) may do other
// things.

// On tensor cores: the gates of a unit meet in one lane's accumulators.
template <class Config>
class ForwardTiles {
  using T = typename Config::T;
  using Unit = typename Config::Unit;
  using Product = typename Config::Product;
  static constexpr int kGates = Unit::kGates;

 public:
  RNNLM_DEVICE ForwardTiles(unsigned char* weights, unsigned char*)
      : weights_(reinterpret_cast<uint4*>(weights) + threadIdx.x), lane_(threadIdx.x % 32) {}

  RNNLM_DEVICE void load(const ClusterForwardParams<T>& p, int first_unit) {
    // What goes to shared memory first, a fragment at a time, while registers are free.
    RNNLM_NO_UNROLL
    for (int f = Config::kHeld; f < Config::kFragments; ++f) {
      RNNLM_UNROLL
      for (int tile = 0; tile < Config::kTiles; ++tile) {
        RNNLM_UNROLL
        for (int half = 0; half < 2; ++half) {
          weights_[in_shared(tile, f, half)] =
              load_fragment(p, weight_row(p, first_unit, tile, half), f);
        }
      }
    }
    RNNLM_UNROLL
    for (int tile = 0; tile < Config::kTiles; ++tile) {
      RNNLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t row = weight_row(p, first_unit, tile, half);
        bias_[tile][half] = row < 0 ? 0.0f : load_or_zero(p.b_hh, row);
        RNNLM_UNROLL
        for (int f = 0; f < Config::kHeld; ++f) held_[tile][f][half] = load_fragment(p, row, f);
      }
    }
  }

  template <int kFirst, int kCount, class Shadow>
  RNNLM_DEVICE void multiply(const unsigned char* slot, int,
                             float (&product)[Config::kPairs][2][kGates],
                             const Shadow& shadow) const {
    // A GRU that resets before the product: all tiles but the last, or the last.
    constexpr int kFrom = kFirst == 0 ? 0 : Config::kLastTile;
    constexpr int kTiles = (kFirst + kCount == kGates ? Config::kTiles : Config::kLastTile) - kFrom;
    // MMAs on one accumulator wait for each other: with few tiles, several sums each.
    constexpr int kWanted = kTiles >= 3 ? 1 : kTiles == 2 ? 2 : 4;
    constexpr int kChains = kWanted < Config::kFragments ? kWanted : Config::kFragments;
    float sums[kChains][kTiles][4];
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      RNNLM_UNROLL
      for (int i = 0; i < 4; ++i) {
        sums[0][tile][i] = bias_[kFrom + tile][i / 2];
        RNNLM_UNROLL
        for (int chain = 1; chain < kChains; ++chain) sums[chain][tile][i] = 0.0f;
      }
    }
    const unsigned char* state = slot + state_vector(lane_g(lane_), lane_t(lane_));
    RNNLM_UNROLL
    for (int f = 0; f < Config::kFragments; ++f) {
      const uint4 h[1] = {*reinterpret_cast<const uint4*>(state + f * kFragmentBytes)};
      RNNLM_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        float (&d)[4] = sums[f % kChains][tile];
        if (f < Config::kHeld)
          Product::multiply(d, held_[kFrom + tile][f][0], held_[kFrom + tile][f][1], h);
        else
          Product::multiply(d, weights_[in_shared(kFrom + tile, f, 0)],
                            weights_[in_shared(kFrom + tile, f, 1)], h);
      }
      shadow(f);
    }
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      RNNLM_UNROLL
      for (int i = 0; i < 4; ++i) {
        RNNLM_UNROLL
        for (int chain = 1; chain < kChains; ++chain) sums[0][tile][i] += sums[chain][tile][i];
      }
    }
    RNNLM_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      const int tile = Config::tile_of(gate, 0);
      if (tile < kFrom || tile >= kFrom + kTiles) continue;
      if constexpr (Config::kUnitsOfWarp == 16) {
        RNNLM_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float (&d)[4] = sums[0][Config::tile_of(gate, e) - kFrom];
          RNNLM_UNROLL
          for (int pair = 0; pair < 2; ++pair)
            product[pair][e][gate] = d[2 * Config::half_of(gate, e) + pair];
        }
      } else {
        // The lane has two columns of unit g. It gives one away to the lane of the unit beside it
        // and gets that one's value of the column it keeps.
        const float (&d)[4] = sums[0][tile - kFrom];
        const float first = d[2 * Config::half_of(gate, 0)],
                    second = d[2 * Config::half_of(gate, 0) + 1];
        const bool odd = lane_g(lane_) & 1;
        const float kept = odd ? second : first;
        const float got = ptx::shuffle_xor(odd ? first : second, 4);
        product[0][0][gate] = odd ? got : kept;
        product[0][1][gate] = odd ? kept : got;
      }
    }
  }

 private:
  // The row of W_hh of which this lane has fragments, -1 if there is none.
  RNNLM_DEVICE int64_t weight_row(const ClusterForwardParams<T>& p, int first_unit, int tile,
                                  int half) const {
    const int gate = Config::gate_of(tile, half);
    const int unit = first_unit + Config::unit_of(tile, half, lane_g(lane_));
    return gate < kGates && unit < p.hidden ? int64_t{gate} * p.hidden + unit : -1;
  }
  RNNLM_DEVICE uint4 load_fragment(const ClusterForwardParams<T>& p, int64_t row, int f) const {
    return as_operand<Product>(
        load_vector</*kAligned=*/true>(row < 0 ? nullptr : p.w_hh + row * p.hidden,
                                       f * Product::kStep + Product::k_of(lane_), p.hidden));
  }
  static RNNLM_DEVICE int in_shared(int tile, int f, int half) {
    return (((f - Config::kHeld) * Config::kTiles + tile) * 2 + half) * Config::kThreads;
  }

  uint4* weights_;  // [kInShared][kTiles][2][kThreads], from this thread's on
  int lane_;
  uint4 held_[Config::kTiles][Config::kHeld][2];
  float bias_[Config::kTiles][2];
};

// With plain multiply-adds: a group of lanes has a pair of units, row 2 * gate + e of unit e.
template <class Config>
class ForwardRows {
  using T = typename Config::T;
  using Rows = typename Config::Rows;
  static constexpr int kGates = Config::Unit::kGates;

 public:
  RNNLM_DEVICE ForwardRows(unsigned char* weights, unsigned char* sums)
      : rows_(weights, sums),
        lane_(threadIdx.x % 32),
        bias_(reinterpret_cast<float*>(sums + Rows::kSumsBytes) + threadIdx.x / 8 * 8) {}

  RNNLM_DEVICE void load(const ClusterForwardParams<T>& p, int first_unit) {
    const int unit = first_unit + 2 * Rows::group_of(lane_);
    rows_.template load<2>([&](int value, int k, uint4(&w)[2]) {
      const int64_t row = int64_t{value / 2} * p.hidden + unit;
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) {
        w[e] = load_vector</*kAligned=*/true>(
            unit < p.hidden ? p.w_hh + (row + e) * p.hidden : nullptr, k, p.hidden);
      }
    });
    const int value = lane_ % 8;  // a lane of the group brings one of its biases
    if (value < 2 * kGates) {
      const int64_t row = int64_t{value / 2} * p.hidden + unit + value % 2;
      bias_[value] = unit < p.hidden ? load_or_zero(p.b_hh, row) : 0.0f;
    }
  }

  template <int kFirst, int kCount, class Shadow>
  RNNLM_DEVICE void multiply(const unsigned char* slot, int rows, float (&product)[1][2][kGates],
                             const Shadow& shadow) const {
    RNNLM_UNROLL
    for (int f = 0; f < Config::kFragments; ++f) shadow(f);
    rows_.template multiply<2 * kFirst, 2 * kCount, 0, Rows::kVectors>(slot, rows);
    const int row = 2 * lane_t(lane_) + (lane_g(lane_) & 1);
    RNNLM_UNROLL
    for (int gate = 0; gate < kCount; ++gate) {
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) {
        product[0][e][kFirst + gate] =
            bias_[2 * (kFirst + gate) + e] +
            rows_.template sum<2 * kCount>(Rows::group_of(lane_), 2 * gate + e, row);
      }
    }
  }

 private:
  Rows rows_;
  int lane_;
  float* bias_;  // of this lane's group, in shared memory
};

// --- the kernel ----------------------------------------------------------------------------------

template <class Config>
class ClusterForward {
  using T = typename Config::T;
  using Unit = typename Config::Unit;
  using Product = typename Config::Product;
  using Weights =
      std::conditional_t<Config::kTensorCores, ForwardTiles<Config>, ForwardRows<Config>>;
  static constexpr int kCtas = Config::kCtas;
  static constexpr int kPairs = Config::kPairs;
  static constexpr int kGates = Unit::kGates;

 public:
  RNNLM_DEVICE explicit ClusterForward(const ClusterForwardParams<T>& params)
      : p_(params),
        slots_(ptx::dynamic_shared()),
        weights_(slots_ + 2 * Config::kSlotBytes,
                 slots_ + 2 * Config::kSlotBytes + Config::kWeightBytes),
        signal_(slots_ + 2 * Config::kSlotBytes + Config::kWeightBytes + Config::kSumsBytes,
                Config::kSlotBytes, params.abort_word, params.wait_limit),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        rank_(kCtas > 1 ? rank_in_cluster() : 0),
        row_(static_cast<int>(blockIdx.x) / kCtas * kClusterRows),
        steps_(steps_with_row(params.seq, row_)) {}

  RNNLM_DEVICE void run() {
    weights_.load(p_, rank_ * Config::kUnits + warp_ * Config::kUnitsOfWarp);
    load_state();
    if constexpr (kCtas > 1) {
      signal_.begin();
      prepare_to_send();
    }
    hand_over(0, h_);

    // Rows of the steps in flight.
    int done = 0, now = rows_of_step(p_.seq, steps_, 0), next = rows_of_step(p_.seq, steps_, 1),
        after = 0;
    aim();
    load_x(now);
    move_loads(now, next);
    for (int i = 0; i < steps_; ++i) {
      const int n = i * Config::kProducts;
      const auto look_ahead = [&] {
        RNNLM_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
          RNNLM_UNROLL
          for (int gate = 0; gate < kGates; ++gate) x_[pair][gate] = next_x_[pair][gate];
        }
        load_x(next);
        after = rows_of_step(p_.seq, steps_, i + 2);
        move_loads(next, after);
      };
      if constexpr (kCtas > 1) {
        look_ahead();
        if (signal_.gave_up()) break;
        signal_.wait(n);
      }
      // In pieces, so that the tensor cores never wait for long.
      const auto shadow = [&](int fragment) {
        if (kCtas > 1) return;
        if (fragment == 0) store_results(0, done);
        if (fragment == 1) {
          if constexpr (kPairs > 1) store_results(1, done);
          if (i > 0) move_stores(done, now);
        }
        if (fragment == (Config::kFragments > 2 ? 2 : 1)) look_ahead();
      };

      const int rows = now - row_ < kClusterRows ? now - row_ : kClusterRows;
      float product[kPairs][2][kGates];
      if constexpr (!Unit::kResetsBefore) {
        weights_.template multiply<0, kGates>(slot_of(n), rows, product, shadow);
      } else {
        weights_.template multiply<0, kGates - 1>(slot_of(n), rows, product, shadow);
        Word<T> reset_h[kPairs];
        RNNLM_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) reset_h[pair] = reset(pair, product[pair]);
        hand_over(n + 1, reset_h);
        if constexpr (kCtas > 1) signal_.wait(n + 1);
        weights_.template multiply<kGates - 1, 1>(slot_of(n + 1), rows, product, [](int) {});
      }
      RNNLM_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) finish(pair, product[pair], now);
      // Nobody waits for the last one.
      if (i + 1 < steps_) hand_over(n + Config::kProducts, h_);
      if constexpr (kCtas > 1) {
        store_results(0, now);
        move_stores(now, next);
      }
      done = now;
      now = next;
      next = after;
    }
    if constexpr (kCtas == 1) {
      RNNLM_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) store_results(pair, done);
    }
    store_state();
    if constexpr (kCtas > 1) signal_.end();
  }

 private:
  // The first unit of this lane's pairs, in the layer and in the CTA.
  RNNLM_DEVICE int unit() const { return rank_ * Config::kUnits + local_unit(); }
  RNNLM_DEVICE int local_unit() const {
    const int g = lane_g(lane_);
    return warp_ * Config::kUnitsOfWarp + (Config::kUnitsOfWarp == 16 ? 2 * g : g & ~1);
  }
  RNNLM_DEVICE int column(int pair) const {
    return 2 * lane_t(lane_) + (Config::kUnitsOfWarp == 16 ? pair : lane_g(lane_) & 1);
  }
  RNNLM_DEVICE bool holds(int pair, int rows) const {
    return row_ + column(pair) < rows && unit() < p_.hidden;
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

  RNNLM_DEVICE void load_state() {
    RNNLM_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      h_[pair] = {};
      Word<T> state = {};
      if (holds(pair, p_.seq.batch)) {
        h_[pair] = load_word(place(p_.h0, 0, 1) + offset(pair, 1, 0));
        state = h_[pair];
        if (Unit::kHasCells) state = load_word(place(p_.c0, 0, 1) + offset(pair, 1, 0));
      }
      RNNLM_UNROLL
      for (int e = 0; e < 2; ++e) state_[pair][e] = value_of<T>(state, e);
    }
  }

  // --- a step

  // Where the next accesses to global memory go. These pointers move from step to step: that takes
  // an instruction each, and working out addresses anew would take most of all instructions.
  RNNLM_DEVICE void aim() {
    const int64_t first = first_row_of_step(p_.seq, steps_, 0);
    x_from_ = place(p_.gates_x, first, kGates);
    output_to_ = place(p_.output, first, 1);
    saved_to_ = place(p_.saved, first, Unit::kSaved);
    if (Unit::kHasCells) cells_to_ = place(p_.cells, first, 1);
  }
  RNNLM_DEVICE void move_loads(int rows, int rows_of_next) {
    const int64_t by = int64_t{rows_to_next(p_.seq.reverse, rows, rows_of_next)} * p_.hidden;
    x_from_ = advance(x_from_, by * kGates);
  }
  RNNLM_DEVICE void move_stores(int rows, int rows_of_next) {
    const int64_t by = int64_t{rows_to_next(p_.seq.reverse, rows, rows_of_next)} * p_.hidden;
    output_to_ = advance(output_to_, by);
    saved_to_ = advance(saved_to_, by * Unit::kSaved);
    if (Unit::kHasCells) cells_to_ = advance(cells_to_, by);
  }

  RNNLM_DEVICE void load_x(int rows) {
    RNNLM_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const bool held = holds(pair, rows);
      RNNLM_UNROLL
      for (int gate = 0; gate < kGates; ++gate)
        next_x_[pair][gate] = held ? load_word(x_from_ + offset(pair, kGates, gate)) : Word<T>{};
    }
  }

  RNNLM_DEVICE const unsigned char* slot_of(int n) const {
    return slots_ + (n & 1) * Config::kSlotBytes;
  }

  // r * h of a reset-before GRU, as a word.
  RNNLM_DEVICE Word<T> reset(int pair, const float (&product)[2][kGates]) {
    float u[2];
    RNNLM_UNROLL
    for (int e = 0; e < 2; ++e) {
      float x[kGates];
      RNNLM_UNROLL
      for (int gate = 0; gate < kGates; ++gate) x[gate] = value_of<T>(x_[pair][gate], e);
      u[e] = Unit::reset(product[e], x, state_[pair][e], kept_[pair][e]);
    }
    return unit() < p_.hidden ? word_of<T>(u[0], u[1]) : Word<T>{};
  }

  RNNLM_DEVICE void finish(int pair, const float (&product)[2][kGates], int rows) {
    float h[2], state[2];
    RNNLM_UNROLL
    for (int e = 0; e < 2; ++e) {
      float x[kGates];
      RNNLM_UNROLL
      for (int gate = 0; gate < kGates; ++gate) x[gate] = value_of<T>(x_[pair][gate], e);
      state[e] = state_[pair][e];
      h[e] = Unit::forward(product[e], x, state[e], kept_[pair][e]);
    }
    // A row that the step does not hold keeps what it has, and units that do not exist keep 0.
    const uint32_t held = holds(pair, rows) ? ~0u : 0;
    h_[pair] = blend(held, word_of<T>(h[0], h[1]), h_[pair]);
    RNNLM_UNROLL
    for (int e = 0; e < 2; ++e) state_[pair][e] = blend(held, state[e], state_[pair][e]);
  }

  // --- handing over

  // Some lanes hold the words of one 16-byte vector, of 8 units (of float32: 4) of a column. Each
  // of them sends the whole vector, to its share of the CTAs.
  static constexpr int kSharers = kVectorOf<T> / 2;
  static constexpr int kReceivers = (kCtas + kSharers - 1) / kSharers;  // of a lane
  // Where they are takes two registers each, or as many instructions a step.
  static constexpr bool kKeepsAddresses = kReceivers <= 4;
  RNNLM_DEVICE int receiver(int i) const { return lane_g(lane_) / 2 % kSharers + kSharers * i; }

  RNNLM_DEVICE void prepare_to_send() {
    constexpr int kDepth = kFragmentDepth<T>;
    const int vector = local_unit() % kDepth / kVectorOf<T>;
    place_ = unit() / kDepth * kFragmentBytes + state_vector(column(0), vector);
    if constexpr (kKeepsAddresses) {
      RNNLM_UNROLL
      for (int i = 0; i < kReceivers; ++i) {
        if (receiver(i) < kCtas) aim_at(i, destination_[i], counter_[i]);
      }
    }
  }
  RNNLM_DEVICE void aim_at(int i, uint32_t& destination, uint32_t& counter) const {
    destination = address_in_cluster(slots_ + place_, receiver(i));
    counter = signal_.counter(0, static_cast<uint32_t>(receiver(i)));
  }

  // The lane's words of h (or r * h) for exchange n, into slot n % 2.
  RNNLM_DEVICE void hand_over(int n, const Word<T> (&words)[kPairs]) {
    const int slot = (n & 1) * Config::kSlotBytes;
    if constexpr (kCtas == 1) {
      RNNLM_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        *reinterpret_cast<Word<T>*>(slots_ + slot + state_word<T>(local_unit(), column(pair))) =
            as_operand<Product>(words[pair]);
      }
      __syncthreads();
    } else {
      const uint4 v = whole_vector(as_operand<Product>(words[0]));
      RNNLM_UNROLL
      for (int i = 0; i < kReceivers; ++i) {
        if (receiver(i) >= kCtas) continue;
        uint32_t destination, counter;
        if constexpr (kKeepsAddresses) {
          destination = destination_[i];
          counter = counter_[i];
        } else {
          aim_at(i, destination, counter);
        }
        send_to_cta(destination + slot, v, counter + 8u * (static_cast<uint32_t>(n) & 1u));
      }
    }
  }
  // From the lanes that share a vector.
  RNNLM_DEVICE uint4 whole_vector(const Word<T>& word) const {
    const bool second = lane_g(lane_) & 2;
    if constexpr (kIs16Bit<T>) {
      const bool upper = lane_g(lane_) & 4;
      const uint32_t neighbour = ptx::shuffle_xor(word, 8);
      const uint32_t low = second ? neighbour : word, high = second ? word : neighbour;
      const uint32_t other_low = ptx::shuffle_xor(low, 16), other_high = ptx::shuffle_xor(high, 16);
      return upper ? uint4{other_low, other_high, low, high}
                   : uint4{low, high, other_low, other_high};
    } else {
      const uint32_t x = ptx::float_bits(word.x), y = ptx::float_bits(word.y);
      const uint32_t other_x = ptx::shuffle_xor(x, 8), other_y = ptx::shuffle_xor(y, 8);
      return second ? uint4{other_x, other_y, x, y} : uint4{x, y, other_x, other_y};
    }
  }

  // --- global memory

  RNNLM_DEVICE void store_results(int pair, int rows) const {
    if (!holds(pair, rows)) return;
    store_word(output_to_ + offset(pair, 1, 0), h_[pair]);
    if (p_.saved != nullptr) {
      RNNLM_UNROLL
      for (int i = 0; i < Unit::kSaved; ++i) {
        store_word(saved_to_ + offset(pair, Unit::kSaved, i),
                   word_of<T>(kept_[pair][0][i], kept_[pair][1][i]));
      }
    }
    if constexpr (Unit::kHasCells) {
      if (p_.cells != nullptr) store_floats(cells_to_ + offset(pair, 1, 0), state_[pair]);
    }
  }

  RNNLM_DEVICE void store_state() const {
    RNNLM_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      if (!holds(pair, p_.seq.batch)) continue;
      store_word(place(p_.h_n, 0, 1) + offset(pair, 1, 0), h_[pair]);
      if constexpr (Unit::kHasCells) {
        store_word(place(p_.c_n, 0, 1) + offset(pair, 1, 0),
                   word_of<T>(state_[pair][0], state_[pair][1]));
      }
    }
  }

  const ClusterForwardParams<T>& p_;
  unsigned char* slots_;
  Weights weights_;
  ClusterSignal<kCtas> signal_;
  int lane_, warp_, rank_;
  int row_;                                             // the cluster's first batch row
  int steps_;                                           // that hold rows of it
  Word<T> x_[kPairs][kGates], next_x_[kPairs][kGates];  // gates_x of this step and the next
  Word<T> h_[kPairs];
  float state_[kPairs][2];
  float kept_[kPairs][2][Unit::kSaved];
  const T* x_from_;
  T *output_to_, *saved_to_;
  float* cells_to_;
  int place_;  // of the lane's vector in a slot
  uint32_t destination_[kReceivers], counter_[kReceivers];
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    cluster_forward_kernel(ClusterForwardParams<typename Config::T> params) {
  if constexpr (Config::kCtas == 1 || kHasClusters) ClusterForward<Config>(params).run();
}

}  // namespace rnnlm
