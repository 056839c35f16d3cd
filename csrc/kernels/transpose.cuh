// Weights and states laid out as the products of the stepwise tier read them: rows of k that are
// filled up with zeros to whole vectors. Launched once or twice a call, before the first step.
//
// pad_kernel copies rows, one thread an element of the result. transpose_kernel makes rows of
// columns: a CTA takes a tile of 32 x 32 through shared memory, so that both reads and writes run
// along memory; its 256 threads are 32 columns of 8 rows.
#pragma once

#include "device/numeric.h"

namespace rnnlm {

template <class T>
struct LayoutParams {
  const T* in;  // [rows, columns]
  T* out;       // [rows, stride] padded, [columns, stride] transposed
  int64_t rows, columns;
  int64_t stride;
};

struct LayoutTraits {
  static constexpr int kThreads = 256;
  static constexpr int kTile = 32;
  static constexpr int kTileStride = kTile + 1;  // no two elements of a column in one bank
  static constexpr int kTileRows = kThreads / kTile;
  template <class T>
  static constexpr int kShared = kTile * kTileStride * int(sizeof(T));
};

template <class Traits, class T>
__global__ void __launch_bounds__(Traits::kThreads) pad_kernel(LayoutParams<T> p) {
  const int64_t i = int64_t{blockIdx.x} * Traits::kThreads + threadIdx.x;
  if (i >= p.rows * p.stride) return;
  const int64_t row = i / p.stride, column = i % p.stride;
  p.out[i] = column < p.columns ? p.in[row * p.columns + column] : T{};
}

// Grid: x over rows of the input (up to stride), y over its columns.
template <class Traits, class T>
__global__ void __launch_bounds__(Traits::kThreads) transpose_kernel(LayoutParams<T> p) {
  T* tile = reinterpret_cast<T*>(ptx::dynamic_shared());
  const int x = static_cast<int>(threadIdx.x) % Traits::kTile;
  const int y = static_cast<int>(threadIdx.x) / Traits::kTile;
  const int64_t first_row = int64_t{blockIdx.x} * Traits::kTile;
  const int64_t first_column = int64_t{blockIdx.y} * Traits::kTile;
  for (int i = y; i < Traits::kTile; i += Traits::kTileRows) {
    const int64_t row = first_row + i, column = first_column + x;
    const bool inside = row < p.rows && column < p.columns;
    tile[i * Traits::kTileStride + x] = inside ? p.in[row * p.columns + column] : T{};
  }
  __syncthreads();
  for (int i = y; i < Traits::kTile; i += Traits::kTileRows) {
    const int64_t row = first_row + x, column = first_column + i;
    if (row < p.stride && column < p.columns)
      p.out[column * p.stride + row] = tile[x * Traits::kTileStride + i];
  }
}

}  // namespace rnnlm
