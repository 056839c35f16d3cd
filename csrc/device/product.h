// The recurrent product on one warp: weight rows times state rows, both with their long side (k)
// contiguous in memory, in the layout of tensor-core accumulators whatever the arithmetic.
//
// A "fragment" is one 16-byte vector per lane and row. Tensor cores would have a lane hold
// scattered pairs of k; since a sum over k may run in any order, the k of a fragment are permuted
// instead so that what a lane needs lies side by side in memory: one load feeds two MMA
// instructions, from global memory straight into the registers that the MMA reads. The same
// permutation is applied to weights and state, by loading both through the same functions.
//
// Lane = 4 * g + t. Of an m16 x n8 tile a lane holds d[0..1] = rows (g; columns 2t, 2t + 1) and
// d[2..3] = row g + 8. "Rows" are weight rows (gates of units), "columns" are batch rows.
#pragma once

#include "device/numeric.h"

namespace rnnlm {

constexpr int kTileRows = 16;    // weight rows of a tile
constexpr int kTileColumns = 8;  // batch rows of a tile

RNNLM_DEVICE int lane_g(int lane) {
  return lane >> 2;
}
RNNLM_DEVICE int lane_t(int lane) {
  return lane & 3;
}

// 16-byte vector of T.
template <class T>
constexpr int kVectorOf = 16 / int(sizeof(T));

// --- arithmetic of a product ---------------------------------------------------------------------
//
// Element: the type in memory. Accumulator: of the sums. kStep: k consumed by one fragment of the
// warp. kStateRows: batch rows of which a lane loads a vector. multiply(): d += fragment product.

// bf16 and f16 on tensor cores (m16n8k16), float32 sums.
template <class T>
struct TensorCore16 {
  using Element = T;
  using Accumulator = float;
  static constexpr int kStep = 32;
  static constexpr int kStateRows = 1;
  static RNNLM_DEVICE int k_of(int lane) { return lane_t(lane) * kVectorOf<T>; }
  static RNNLM_DEVICE int state_row(int lane, int) { return lane_g(lane); }
  static RNNLM_DEVICE void multiply(float (&d)[4], const uint4& w, const uint4& w8,
                                    const uint4 (&h)[1]) {
    const uint32_t a0[4] = {w.x, w8.x, w.y, w8.y}, b0[2] = {h[0].x, h[0].y};
    const uint32_t a1[4] = {w.z, w8.z, w.w, w8.w}, b1[2] = {h[0].z, h[0].w};
    if constexpr (std::is_same_v<T, Bf16>) {
      ptx::mma_bf16(d, a0, b0);
      ptx::mma_bf16(d, a1, b1);
    } else {
      ptx::mma_f16(d, a0, b0);
      ptx::mma_f16(d, a1, b1);
    }
  }
};

// float32 rounded to tf32 on tensor cores (m16n8k8): what torch does where it may use TF32.
struct TensorCoreTf32 {
  using Element = float;
  using Accumulator = float;
  static constexpr int kStep = 16;
  static constexpr int kStateRows = 1;
  static RNNLM_DEVICE int k_of(int lane) { return lane_t(lane) * kVectorOf<float>; }
  static RNNLM_DEVICE int state_row(int lane, int) { return lane_g(lane); }
  static RNNLM_DEVICE uint32_t round(uint32_t bits) {
    return ptx::to_tf32(ptx::float_from_bits(bits));
  }
  static RNNLM_DEVICE void multiply(float (&d)[4], const uint4& w, const uint4& w8,
                                    const uint4 (&h)[1]) {
    const uint32_t a0[4] = {round(w.x), round(w8.x), round(w.y), round(w8.y)};
    const uint32_t a1[4] = {round(w.z), round(w8.z), round(w.w), round(w8.w)};
    const uint32_t b0[2] = {round(h[0].x), round(h[0].y)};
    const uint32_t b1[2] = {round(h[0].z), round(h[0].w)};
    ptx::mma_tf32(d, a0, b0);
    ptx::mma_tf32(d, a1, b1);
  }
};

// The same for kernels that hold their weights: those are rounded once, when they are loaded.
struct HeldTf32 : TensorCoreTf32 {
  static RNNLM_DEVICE uint4 round_weights(const uint4& w) {
    return {round(w.x), round(w.y), round(w.z), round(w.w)};
  }
  static RNNLM_DEVICE void multiply(float (&d)[4], const uint4& w, const uint4& w8,
                                    const uint4 (&h)[1]) {
    const uint32_t a0[4] = {w.x, w8.x, w.y, w8.y}, b0[2] = {round(h[0].x), round(h[0].y)};
    const uint32_t a1[4] = {w.z, w8.z, w.w, w8.w}, b1[2] = {round(h[0].z), round(h[0].w)};
    ptx::mma_tf32(d, a0, b0);
    ptx::mma_tf32(d, a1, b1);
  }
};

// float32 as the sum of two tf32 each: three products on tensor cores, nearly float32's accuracy.
struct TensorCore3xTf32 {
  using Element = float;
  using Accumulator = float;
  static constexpr int kStep = 16;
  static constexpr int kStateRows = 1;
  static RNNLM_DEVICE int k_of(int lane) { return lane_t(lane) * kVectorOf<float>; }
  static RNNLM_DEVICE int state_row(int lane, int) { return lane_g(lane); }
  static RNNLM_DEVICE void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    const float x = ptx::float_from_bits(bits);
    high = ptx::to_tf32(x);
    low = ptx::to_tf32(x - ptx::float_from_bits(high));
    // Of an infinity the difference is NaN, and NaN is what it would make of the product.
    if ((bits & 0x7F800000u) == 0x7F800000u) low = 0;
  }
  static RNNLM_DEVICE void multiply_8(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    RNNLM_UNROLL
    for (int i = 0; i < 4; ++i) split(a[i], a_high[i], a_low[i]);
    RNNLM_UNROLL
    for (int i = 0; i < 2; ++i) split(b[i], b_high[i], b_low[i]);
    ptx::mma_tf32(d, a_low, b_high);
    ptx::mma_tf32(d, a_high, b_low);
    ptx::mma_tf32(d, a_high, b_high);
  }
  static RNNLM_DEVICE void multiply(float (&d)[4], const uint4& w, const uint4& w8,
                                    const uint4 (&h)[1]) {
    const uint32_t a0[4] = {w.x, w8.x, w.y, w8.y}, b0[2] = {h[0].x, h[0].y};
    const uint32_t a1[4] = {w.z, w8.z, w.w, w8.w}, b1[2] = {h[0].z, h[0].w};
    multiply_8(d, a0, b0);
    multiply_8(d, a1, b1);
  }
};

// float and double with plain fused multiply-adds: every lane sums all k of its own four outputs.
template <class T>
struct PlainFma {
  using Element = T;
  using Accumulator = T;
  static constexpr int kStep = kVectorOf<T>;
  static constexpr int kStateRows = 2;
  static RNNLM_DEVICE int k_of(int) { return 0; }
  static RNNLM_DEVICE int state_row(int lane, int i) { return 2 * lane_t(lane) + i; }
  static RNNLM_DEVICE void multiply(T (&d)[4], const uint4& w, const uint4& w8,
                                    const uint4 (&h)[2]) {
    const Vector rows[2] = {unpack(w), unpack(w8)}, columns[2] = {unpack(h[0]), unpack(h[1])};
    RNNLM_UNROLL
    for (int k = 0; k < kStep; ++k) {
      RNNLM_UNROLL
      for (int i = 0; i < 4; ++i)
        d[i] = std::fma(rows[i >> 1].value[k], columns[i & 1].value[k], d[i]);
    }
  }

 private:
  struct Vector {
    T value[kStep];
  };
  static RNNLM_DEVICE Vector unpack(const uint4& bits) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    Vector v;
    if constexpr (sizeof(T) == 4) {
      RNNLM_UNROLL
      for (int k = 0; k < kStep; ++k) v.value[k] = ptx::float_from_bits(words[k]);
    } else {
      RNNLM_UNROLL
      for (int k = 0; k < kStep; ++k)
        v.value[k] = ptx::double_from_bits(words[2 * k], words[2 * k + 1]);
    }
    return v;
  }
};

// --- fragments from memory -----------------------------------------------------------------------

RNNLM_DEVICE uint4 zero_vector() {
  return uint4{0, 0, 0, 0};
}

// Elements k .. k + kVectorOf<T> - 1 of a row of `length` elements; 0 beyond its end, and all 0 for
// a null row. kAligned: rows start on 16 bytes and their length is a multiple of the vector.
template <bool kAligned, class T>
RNNLM_DEVICE uint4 load_vector(const T* row, int k, int length) {
  if (row == nullptr || k >= length) return zero_vector();
  if constexpr (kAligned) return *reinterpret_cast<const uint4*>(row + k);
  uint32_t words[4] = {0, 0, 0, 0};
  RNNLM_UNROLL
  for (int i = 0; i < kVectorOf<T>; ++i) {
    if (k + i >= length) break;
    if constexpr (sizeof(T) == 2) {
      words[i / 2] |= static_cast<uint32_t>(row[k + i].bits) << (16 * (i % 2));
    } else if constexpr (sizeof(T) == 4) {
      words[i] = ptx::float_bits(row[k + i]);
    } else {
      ptx::double_bits(row[k + i], words[2 * i], words[2 * i + 1]);
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// --- sums of several warps -----------------------------------------------------------------------

// Warps that split k leave their partial sums in shared memory, and whoever needs an output adds
// them up in the order of the warps: the same bits every time.
//
// [warp][column][row], columns `kStride` apart: neither the accumulators' stores nor loads of 32
// consecutive rows meet twice in a bank.
template <class A, int kRows, int kColumns, int kWarps>
struct PartialSums {
  static_assert(kRows % kTileRows == 0 && kColumns % kTileColumns == 0);
  static constexpr int kStride = kRows + 4;
  static constexpr int kBytes = kWarps * kColumns * kStride * int(sizeof(A));

  A* sums;  // in shared memory

  // Where a lane's stores begin, and where the sums of a row and column do. Both add up: who works
  // them out ahead of time goes on with PartialSums{sums + place} and small constants.
  static RNNLM_DEVICE int place_of_store(int warp, int lane) {
    return (warp * kColumns + 2 * lane_t(lane)) * kStride + lane_g(lane);
  }
  static RNNLM_DEVICE int place_of_sum(int row, int column) { return column * kStride + row; }

  RNNLM_DEVICE void store(int warp, int lane, int tile_row, int tile_column,
                          const A (&d)[4]) const {
    A* p = sums + place_of_store(warp, lane) + tile_column * kTileColumns * kStride +
           tile_row * kTileRows;
    p[0] = d[0];
    p[kStride] = d[1];
    p[8] = d[2];
    p[kStride + 8] = d[3];
  }
  RNNLM_DEVICE A sum(int row, int column) const {
    const A* p = sums + place_of_sum(row, column);
    A total = p[0];
    RNNLM_UNROLL
    for (int warp = 1; warp < kWarps; ++warp) total += p[warp * kColumns * kStride];
    return total;
  }
};

}  // namespace rnnlm
