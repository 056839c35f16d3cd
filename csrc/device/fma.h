// The recurrent product of float32 on one warp with plain fused multiply-adds, for layers whose
// weights stay where they are for a whole launch.
//
// A tensor core hands each operand to many lanes; a plain multiply-add needs both of its own in the
// lane's registers. Every weight lies in one lane, once, so the state has to come to the weights:
// by way of shared memory, where one 16-byte load serves all lanes that ask for the same vector. A
// lane that holds one weight row would do 4 multiply-adds with each vector, and wait for loads most
// of the time: an SM delivers a vector to a warp in 2 to 4 cycles, and does 4 warps' multiply-adds
// in one. So the lanes of a warp split k as well, into `kSplits` parts; each then holds
// kSplits times as many rows of its k, and does 8 to 16 multiply-adds a load. The parts read
// neighbouring vectors, which meet in no bank.
//
// The splits' sums are added up by shuffles, of which there are few: lanes that add up first share
// the batch rows ("columns") out among them, as long as there is more than one.
#pragma once

#include "device/product.h"

namespace rnnlm {

// For the kernels that hold weights, beside the products of device/product.h. kSteps: k of a
// fragment, one vector a lane and row of the state as there.
template <int kSteps>
struct HeldFma {
  using Element = float;
  using Accumulator = float;
  static constexpr int kStep = kSteps;
  static constexpr int kStateRows = 1;
  static RNNLM_DEVICE int k_of(int lane) { return lane_t(lane) * kVectorOf<float>; }
  static RNNLM_DEVICE int state_row(int lane, int) { return lane_g(lane); }
};
template <class Product>
constexpr bool kIsHeldFma = false;
template <int kSteps>
constexpr bool kIsHeldFma<HeldFma<kSteps>> = true;

// d += w h, four k.
RNNLM_DEVICE void multiply_add(float& d, const uint4& w, const uint4& h) {
  d = std::fma(ptx::float_from_bits(w.x), ptx::float_from_bits(h.x), d);
  d = std::fma(ptx::float_from_bits(w.y), ptx::float_from_bits(h.y), d);
  d = std::fma(ptx::float_from_bits(w.z), ptx::float_from_bits(h.z), d);
  d = std::fma(ptx::float_from_bits(w.w), ptx::float_from_bits(h.w), d);
}

// Adds up the sums of lanes that differ in the bits kMask, kMask / 2 .. kLast of their number: the
// splits. Of kColumns columns a lane is left with the first kColumns / splits of its `d`, which are
// those from `column` on; where there were fewer columns than splits, with one that other lanes
// have too, and `keeps` is true in one of them. `column` starts as 0, `keeps` as true. Whatever
// kColumns, each sum is made of the same additions.
template <int kColumns, int kMask, int kLast, int kMost, int kRows>
RNNLM_DEVICE void add_splits(float (&d)[kMost][kRows], int lane, int& column, bool& keeps) {
  if constexpr (kMask >= kLast) {
    const bool upper = (lane & kMask) != 0;
    constexpr int kLeft = kColumns > 1 ? kColumns / 2 : 1;
    RNNLM_UNROLL
    for (int c = 0; c < kLeft; ++c) {
      RNNLM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kColumns > 1) {
          const float kept = upper ? d[c + kLeft][r] : d[c][r];
          const float sent = upper ? d[c][r] : d[c + kLeft][r];
          d[c][r] = kept + ptx::shuffle_xor(sent, kMask);
        } else {
          d[c][r] += ptx::shuffle_xor(d[c][r], kMask);
        }
      }
    }
    if constexpr (kColumns > 1)
      column += upper ? kLeft : 0;
    else
      keeps = keeps && !upper;
    add_splits<kLeft, kMask / 2, kLast>(d, lane, column, keeps);
  }
}
// How many columns that leaves.
template <int kColumns, int kSplits>
constexpr int kColumnsOfASplit = kColumns > kSplits ? kColumns / kSplits : 1;

}  // namespace rnnlm
