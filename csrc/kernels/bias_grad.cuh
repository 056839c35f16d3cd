// The end of a backward call that wants the gradients of biases: sums over rows, in two stages.
//
// The first stage leaves rows of partial sums in the arithmetic dtype. Persistent kernels do it as
// they go, a row for each group of CTAs with batch rows of its own, and so add up gradients that
// nothing has rounded yet. The stepwise tier, whose launches share nothing but memory, reads what
// they have written: dgates and, of a GRU that resets after, candidate. The last stage adds the
// rows of partial sums up and rounds once.
//
// Both stages are one kernel. A CTA adds up 64 columns of a chunk of rows: each warp takes every
// eighth row and reads 32 neighbouring elements at a time, so that rows may begin anywhere, and the
// warps' sums meet in shared memory. Who adds what in which order depends on the sizes alone.
#pragma once

#include "device/numeric.h"

namespace rnnlm {

// `left` and `right` side by side are the matrix whose columns are added up.
template <class In, class Out>
struct ColumnSumsParams {
  const In* left;   // [rows, left_columns]
  const In* right;  // [rows, right_columns]; null where right_columns is 0
  int64_t left_columns, right_columns;
  int64_t rows;
  int64_t chunk;  // rows of a CTA
  Out* sums;      // [chunks, left_columns + right_columns]
};

struct ColumnSumsTraits {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kEach = 2;  // columns of a lane, 32 apart
  static constexpr int kColumns = 32 * kEach;
  static constexpr int kAhead = 4;  // rows of a warp that are on their way at the same time
  template <class A>
  static constexpr int kShared = kWarps * kColumns * int(sizeof(A));
};

// Grid: x over columns, y over chunks.
template <class Traits, class In, class Out>
__global__ void __launch_bounds__(Traits::kThreads)
    column_sums_kernel(ColumnSumsParams<In, Out> params) {
  using A = Arithmetic<In>;
  constexpr int kEach = Traits::kEach, kAhead = Traits::kAhead;
  A* parts = reinterpret_cast<A*>(ptx::dynamic_shared());  // [kWarps, kColumns]
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  const int64_t columns = params.left_columns + params.right_columns;
  const int64_t first_column = int64_t{blockIdx.x} * Traits::kColumns;
  const int64_t first_row = int64_t{blockIdx.y} * params.chunk;
  const int64_t left = params.rows - first_row;
  const int64_t end = first_row + (left < params.chunk ? left : params.chunk);

  const In* column[kEach];
  int64_t stride[kEach];
  A sum[kEach];
  RNNLM_UNROLL
  for (int e = 0; e < kEach; ++e) {
    // Lanes beyond the last column add it up as well, for nobody.
    const int64_t own = first_column + 32 * e + lane;
    const int64_t c = own < columns ? own : columns - 1;
    const bool is_right = c >= params.left_columns;
    column[e] = is_right ? params.right + (c - params.left_columns) : params.left + c;
    stride[e] = is_right ? params.right_columns : params.left_columns;
    sum[e] = 0;
  }
  int64_t row = first_row + warp;
  for (; row + (kAhead - 1) * Traits::kWarps < end; row += kAhead * Traits::kWarps) {
    In x[kAhead][kEach];
    RNNLM_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      RNNLM_UNROLL
      for (int e = 0; e < kEach; ++e) x[i][e] = column[e][(row + i * Traits::kWarps) * stride[e]];
    }
    RNNLM_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      RNNLM_UNROLL
      for (int e = 0; e < kEach; ++e) sum[e] += to_arithmetic(x[i][e]);
    }
  }
  for (; row < end; row += Traits::kWarps) {
    RNNLM_UNROLL
    for (int e = 0; e < kEach; ++e) sum[e] += to_arithmetic(column[e][row * stride[e]]);
  }
  RNNLM_UNROLL
  for (int e = 0; e < kEach; ++e) parts[warp * Traits::kColumns + 32 * e + lane] = sum[e];
  __syncthreads();
  if (t >= Traits::kColumns || first_column + t >= columns) return;
  A total = parts[t];
  for (int w = 1; w < Traits::kWarps; ++w) total += parts[w * Traits::kColumns + t];
  params.sums[int64_t{blockIdx.y} * columns + first_column + t] = from_arithmetic<Out>(total);
}

}  // namespace rnnlm
