// The recurrent product of the block and cluster tiers in exact float32: weight rows on one warp,
// by plain fused multiply-adds.
//
// Who owns what. A warp has 4 * kValues weight rows for the whole launch. Its lanes form 4 groups
// of 8, lane = 8 * group + slice: a group has kValues of the rows, each of its lanes an eighth of
// their k. So every weight lies in one lane, in registers as far as these go and in shared memory
// beyond. Vectors of 4 k are dealt out in turn: the 8 lanes of a group load 128 bytes of a batch
// row side by side, all groups the same, and each vector serves 4 * kValues multiply-adds.
//
// Batch rows are computed up to 4 at a time (of the widest LSTM 2), for which a weight is loaded
// from shared memory once. Of the 8 rows of a cluster only those that the step holds are computed:
// the loops are the same for all lanes of the warp. The sums of a batch row are the same bits
// whatever rows it shares a pass with.
//
// The 8 slices of a sum are added up by exchanges between lanes in which each lane gives half of
// its sums away, so that each ends up with its own one. These the warp leaves in shared memory,
// [batch row][group][8], for whoever computes the gates from them. The vectors of a row change
// places (by an exclusive or with its number): neither the stores of a row nor the loads of 8 lanes
// that differ in the row meet in a bank.
#pragma once

#include "kernels/cluster_state.cuh"

namespace rnnlm {

// This product, where StoredTf32 or TensorCore16 might stand.
struct ClusterFma {
  using Element = float;
};

// kDepth: k of a row. kHeld: of a lane's vectors, how many it has in registers, 4 each.
template <int kValues, int kDepth, int kHeld, int kThreads>
class FmaRows {
 public:
  static constexpr int kSlices = 8;
  static constexpr int kVectors = kDepth / (4 * kSlices);  // of 4 k, of each row in a lane
  static_assert(kHeld <= kVectors * kValues);
  // Batch rows at a time; the widest LSTM has registers for the sums of 2.
  static constexpr int kMostRows = kVectors * kValues > 96 ? 2 : 4;
  // Of the first vectors some or all are in registers. The loop over the others is not unrolled, or
  // the compiler would ask for more of them at once than it has registers for.
  static constexpr int kInRegisters = (kHeld + kValues - 1) / kValues;
  static constexpr bool kRolls = kHeld < kVectors * kValues;
  static constexpr int kWeightBytes = (kVectors * kValues - kHeld) * kThreads * 16;
  static constexpr int kSumsBytes = kThreads / 32 * kClusterRows * 32 * int(sizeof(float));
  static_assert(kVectors * 4 * kSlices == kDepth);

  // Shared memory of the CTA: kWeightBytes for weights, kSumsBytes for sums.
  RNNLM_DEVICE FmaRows(unsigned char* weights, unsigned char* sums)
      : weights_(reinterpret_cast<uint4*>(weights) + threadIdx.x),
        sums_(reinterpret_cast<float*>(sums) + threadIdx.x / 32 * (kClusterRows * 32)),
        lane_(threadIdx.x % 32) {}

  static RNNLM_DEVICE int group_of(int lane) { return lane / kSlices; }

  // fetch(value, k, w) sets w to the k .. k + 3 of rows value .. value + kTogether - 1 of this
  // lane's group.
  template <int kTogether, class Fetch>
  RNNLM_DEVICE void load(const Fetch& fetch) {
    // What goes to shared memory first, while registers are free.
    RNNLM_NO_UNROLL
    for (int vector = kHeld / kValues; vector < kVectors; ++vector) {
      RNNLM_UNROLL
      for (int value = 0; value < kValues; value += kTogether) {
        uint4 w[kTogether];
        fetch(value, k_of(vector), w);
        RNNLM_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int n = vector * kValues + value + i;
          if (n >= kHeld) weights_[(n - kHeld) * kThreads] = w[i];
        }
      }
    }
    RNNLM_UNROLL
    for (int vector = 0; vector * kValues < kHeld; ++vector) {
      RNNLM_UNROLL
      for (int value = 0; value < kValues; value += kTogether) {
        uint4 w[kTogether];
        fetch(value, k_of(vector), w);
        RNNLM_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int n = vector * kValues + value + i;
          if (n < kHeld) held_[n] = w[i];
        }
      }
    }
  }

  // Values kFirst .. kFirst + kCount - 1 times the first `rows` batch rows of a slot, over kLength
  // of a lane's vectors from kFrom on. sum() finds the results until the next call.
  template <int kFirst, int kCount, int kFrom, int kLength>
  RNNLM_DEVICE void multiply(const unsigned char* slot, int rows) const {
    ptx::warp_sync();  // all lanes have read the sums of the call before
    int row = 0;
    RNNLM_NO_UNROLL
    for (; row + kMostRows <= rows; row += kMostRows)
      multiply_rows<kMostRows, kFirst, kCount, kFrom, kLength>(slot, row);
    if (kMostRows > 2 && (rows & 2)) {
      multiply_rows<2, kFirst, kCount, kFrom, kLength>(slot, row);
      row += 2;
    }
    if (rows & 1) multiply_rows<1, kFirst, kCount, kFrom, kLength>(slot, row);
    ptx::warp_sync();
  }

  // Of the multiply() of kCount values: value `value` of these, of `group` and batch row `row`.
  template <int kCount>
  RNNLM_DEVICE float sum(int group, int value, int row) const {
    return sums_[32 * row + ((kSlices * group + place_of(value, kCount, kSlices / 2)) ^ (4 * row))];
  }

 private:
  RNNLM_DEVICE int k_of(int vector) const { return 4 * (kSlices * vector + lane_ % kSlices); }

  template <int kRows, int kFirst, int kCount, int kFrom, int kLength>
  RNNLM_DEVICE void multiply_rows(const unsigned char* slot, int row) const {
    const unsigned char* state[kRows];
    RNNLM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int slice = lane_ % kSlices;
      state[r] = slot + slice / 4 * kFragmentBytes + state_vector(row + r, slice % 4);
    }
    float sums[kRows][kCount];
    RNNLM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      RNNLM_UNROLL
      for (int i = 0; i < kCount; ++i) sums[r][i] = 0.0f;
    }
    constexpr int kTo = kFrom + kLength;
    constexpr int kInPart =
        kRolls && kTo > kInRegisters ? (kFrom > kInRegisters ? kFrom : kInRegisters) : kTo;
    RNNLM_UNROLL
    for (int vector = kFrom; vector < kInPart; ++vector)
      multiply_vector<kRows, kFirst, kCount, /*kAllShared=*/false>(state, vector, sums);
    RNNLM_NO_UNROLL
    for (int vector = kInPart; vector < kTo; ++vector)
      multiply_vector<kRows, kFirst, kCount, /*kAllShared=*/true>(state, vector, sums);
    RNNLM_UNROLL
    for (int r = 0; r < kRows; ++r)
      sums_[32 * (row + r) + (lane_ ^ (4 * (row + r)))] = add_slices<kCount, kSlices / 2>(sums[r]);
  }

  template <int kRows, int kFirst, int kCount, bool kAllShared>
  RNNLM_DEVICE void multiply_vector(const unsigned char* const (&state)[kRows], int vector,
                                    float (&sums)[kRows][kCount]) const {
    float h[kRows][4];
    RNNLM_UNROLL
    for (int r = 0; r < kRows; ++r)
      unpack(*reinterpret_cast<const uint4*>(state[r] + 2 * vector * kFragmentBytes), h[r]);
    RNNLM_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int n = vector * kValues + kFirst + i;
      float w[4];
      if (!kAllShared && n < kHeld)
        unpack(held_[n], w);
      else
        unpack(weights_[(n - kHeld) * kThreads], w);
      RNNLM_UNROLL
      for (int k = 0; k < 4; ++k) {
        RNNLM_UNROLL
        for (int r = 0; r < kRows; ++r) sums[r][i] = std::fma(w[k], h[r][k], sums[r][i]);
      }
    }
  }

  // Adds up kCount values of the 2 * kMask lanes that differ in the bits below. Each of them
  // returns the value whose place_of() these bits are.
  template <int kCount, int kMask>
  RNNLM_DEVICE float add_slices(const float (&values)[kCount]) const {
    if constexpr (kMask == 0) {
      return values[0];
    } else {
      constexpr int kHalf = (kCount + 1) / 2;
      const bool upper = lane_ & kMask;
      float kept[kHalf];
      RNNLM_UNROLL
      for (int i = 0; i < kHalf; ++i) {
        if constexpr (kCount == 1) {
          kept[i] = values[i] + ptx::shuffle_xor(values[i], kMask);
        } else {
          const float low = values[i],
                      high = kHalf + i < kCount ? values[kHalf + i % (kCount / 2)] : 0.0f;
          kept[i] = (upper ? high : low) + ptx::shuffle_xor(upper ? low : high, kMask);
        }
      }
      return add_slices<kHalf, kMask / 2>(kept);
    }
  }
  static RNNLM_DEVICE constexpr int place_of(int value, int count, int mask) {
    int place = 0;
    for (; mask > 0; mask /= 2) {
      const int half = (count + 1) / 2;
      if (count > 1 && value >= half) {
        place += mask;
        value -= half;
      }
      count = half;
    }
    return place;
  }

  static RNNLM_DEVICE void unpack(const uint4& bits, float (&v)[4]) {
    v[0] = ptx::float_from_bits(bits.x);
    v[1] = ptx::float_from_bits(bits.y);
    v[2] = ptx::float_from_bits(bits.z);
    v[3] = ptx::float_from_bits(bits.w);
  }

  uint4* weights_;  // [kVectors * kValues - kHeld][kThreads], from this thread's on
  float* sums_;     // of this warp
  int lane_;
  uint4 held_[kHeld];  // of all rows the first vector, then the second
};

}  // namespace rnnlm
