// The recurrent product: out[m][u] = init[u] + sum_k a[m][k] * M(u, k), in float32 (float64 for
// float64), where M is a weight matrix read by rows or by columns.
//
// Outputs are computed in blocks of NV vectors of kLanes units. A packed block ("panel") holds its
// weights as [K][NV][kLanes], the order in which the inner loop reads them, so that a step streams
// through memory. Every output is the same chains of fma over k in increasing order: its bits
// depend neither on how many rows are computed together nor on which thread does it.
#pragma once

#include "vec.h"

namespace rnnlm::cpu::RNNLM_ISA {

RNNLM_INLINE int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
RNNLM_INLINE int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}
RNNLM_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// Rows whose accumulators fit the registers, next to NV weights and one broadcast value.
constexpr int max_rows(int nv) {
  const int rows = (kVectorRegisters - nv - 1) / nv;
  return rows > 8 ? 8 : rows;
}
constexpr int kMaxVectors = 4;
constexpr int kRowsAtOnce = 48;  // whose sums, inputs and piece of the panel fit the L1 cache

// Multiply-adds in one chain. A float32 sum of a thousand terms in a single chain loses three times
// the bits that a blocked one does; and this much of a panel stays in the L1 cache for all rows.
constexpr int64_t kChain = 128;

// acc[MR][NV][kLanes] (+)= the part of the sums over k < K. `base` is what to add it to: acc
// itself, [NV][kLanes] for every row (`base_step` 0), or null for zero.
template <class T, int NV, int MR>
void chain(const T* a, int64_t lda, int64_t K, const T* panel, const T* base, int64_t base_step,
           T* acc) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[MR][NV] = {};
  for (int64_t k = 0; k < K; ++k, panel += NV * L) {
    Vec<T> w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = load(panel + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> x = splat(a[m * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] = fma(x, w[v], sum[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      if (base) sum[m][v] = load(base + m * base_step + v * L) + sum[m][v];
      store(acc + (m * NV + v) * L, sum[m][v]);
    }
}

template <class T, int NV, int MR = 1>
RNNLM_INLINE void chain_rows(int rows, const T* a, int64_t lda, int64_t K, const T* panel,
                             const T* base, int64_t base_step, T* acc) {
  if constexpr (MR <= max_rows(NV)) {
    if (rows == MR) return chain<T, NV, MR>(a, lda, K, panel, base, base_step, acc);
    chain_rows<T, NV, MR + 1>(rows, a, lda, K, panel, base, base_step, acc);
  }
}

// Sums of `rows` rows of a with one panel.
template <class T, int NV>
void product(int rows, const T* a, int64_t lda, int64_t K, const T* panel, const T* init, T* acc) {
  constexpr int L = kLanes<T>;
  const int groups = int(ceil_div(rows, max_rows(NV)));  // of nearly equal size
  for (int64_t k = 0; k < K; k += kChain) {
    for (int g = 0; g < groups; ++g) {
      const int begin = rows * g / groups, end = rows * (g + 1) / groups;
      T* out = acc + begin * NV * L;
      chain_rows<T, NV>(end - begin, a + begin * lda + k, lda, min64(kChain, K - k),
                        panel + k * NV * L, k ? out : init, k ? NV * L : 0, out);
    }
  }
}

// A matrix and how its outputs are cut into blocks. Vector v of block b holds the outputs of units
// unit(b, v) .. unit(b, v) + lanes(b, v); with gates, NV = G and vector v belongs to gate v of the
// same units; otherwise the vectors of a block are neighbours.
template <class S>
struct Matrix {
  using T = Arithmetic<S>;
  static constexpr int L = kLanes<T>;

  const S* w = nullptr;
  int64_t ld = 0;             // distance of two rows of w
  bool columns = false;       // M(u, k) = w[k][u], else w[u][k]
  bool gates = false;         // vectors of a block are gates
  int vectors = 1;            // NV
  int64_t units = 0;          // outputs (of one gate)
  int64_t depth = 0;          // K
  const T* bias = nullptr;    // packed [blocks][NV][L] or null
  const T* panels = nullptr;  // packed [blocks][K][NV][L], or null: read w as it is

  int64_t block_units() const { return gates ? L : L * vectors; }
  int64_t blocks() const { return ceil_div(units, block_units()); }
  int64_t unit(int64_t block, int v) const { return block * block_units() + (gates ? 0 : v * L); }
  int64_t lanes(int64_t block, int v) const { return max64(0, min64(L, units - unit(block, v))); }
  // Row (or column) of w that holds the weights of the first lane.
  int64_t line(int64_t block, int v) const {
    return gates ? v * units + block * L : unit(block, v);
  }
  int64_t panel_size() const { return depth * vectors * L; }
  int64_t panels_size() const { return blocks() * panel_size(); }
  int64_t bias_size() const { return blocks() * vectors * L; }

  void pack(int64_t block, T* panel) const {
    for (int v = 0; v < vectors; ++v) {
      const int64_t n = lanes(block, v), first = line(block, v);
      T* out = panel + v * L;
      const int64_t step = vectors * L;
      if (columns) {
        for (int64_t k = 0; k < depth; ++k) store(out + k * step, load(w + k * ld + first, n));
        continue;
      }
      // Sixteen rows advance together: reads are sequential, writes are whole vectors.
      for (int64_t k0 = 0; k0 < depth; k0 += L) {
        const int64_t kn = min64(L, depth - k0);
        T tile[L][L] = {};
        for (int64_t l = 0; l < n; ++l) store(tile[l], load(w + (first + l) * ld + k0, kn));
        for (int64_t k = 0; k < kn; ++k)
          for (int64_t l = 0; l < L; ++l) out[(k0 + k) * step + l] = tile[l][k];
      }
    }
  }

  void pack_bias(int64_t block, const S* b, T* packed) const {
    for (int v = 0; v < vectors; ++v)
      store(packed + v * L, load(b + line(block, v), lanes(block, v)));
  }

  // acc [rows][NV][L] for up to kRowsAtOnce rows of a.
  void multiply(int64_t block, int rows, const T* a, int64_t lda, T* acc) const {
    const T* init = bias ? bias + block * vectors * L : nullptr;
    if (!panels) return multiply_unpacked(block, rows, a, lda, init, acc);
    const T* panel = panels + block * panel_size();
    switch (vectors) {
      case 2:
        return product<T, 2>(rows, a, lda, depth, panel, init, acc);
      case 3:
        return product<T, 3>(rows, a, lda, depth, panel, init, acc);
      default:
        return product<T, 4>(rows, a, lda, depth, panel, init, acc);
    }
  }

  // For so few rows in all that packing would cost more than it saves.
  void multiply_unpacked(int64_t block, int rows, const T* a, int64_t lda, const T* init,
                         T* acc) const {
    for (int m = 0; m < rows; ++m) {
      for (int v = 0; v < vectors; ++v) {
        T* out = acc + (m * vectors + v) * L;
        store(out, init ? load(init + v * L) : Vec<T>{});
      }
      if (columns)
        add_columns(block, a + m * lda, acc + m * vectors * L);
      else
        for (int v = 0; v < vectors; ++v)
          add_dots(block, v, a + m * lda, acc + (m * vectors + v) * L);
    }
  }

  // Dot products along the rows of w, four at a time.
  void add_dots(int64_t block, int v, const T* x, T* out) const {
    const int64_t whole = depth / L * L, n = lanes(block, v);
    const S* first = w + line(block, v) * ld;
    for (int64_t l = 0; l < n; l += 4) {
      Vec<T> dot[4] = {};
      const S* row[4];
      for (int j = 0; j < 4; ++j) row[j] = first + min64(l + j, n - 1) * ld;
      for (int64_t k = 0; k < whole; k += L) {
        const Vec<T> xk = load(x + k);
        for (int j = 0; j < 4; ++j) dot[j] = fma(xk, load(row[j] + k), dot[j]);
      }
      if (whole < depth) {
        const Vec<T> xk = load(x + whole, depth - whole);
        for (int j = 0; j < 4; ++j) dot[j] = fma(xk, load(row[j] + whole, depth - whole), dot[j]);
      }
      for (int j = 0; j < 4 && l + j < n; ++j) out[l + j] += sum<T>(dot[j]);
    }
  }

  // Multiples of the rows of w, in the order of `chain`.
  void add_columns(int64_t block, const T* x, T* out) const {
    for (int64_t k0 = 0; k0 < depth; k0 += kChain) {
      Vec<T> sums[kMaxVectors] = {};
      for (int64_t k = k0; k < min64(k0 + kChain, depth); ++k) {
        const Vec<T> xk = splat(x[k]);
        const S* row = w + k * ld + line(block, 0);
        for (int v = 0; v < vectors; ++v)
          sums[v] = fma(xk, load(row + v * L, lanes(block, v)), sums[v]);
      }
      for (int v = 0; v < vectors; ++v) store(out + v * L, load(out + v * L) + sums[v]);
    }
  }
};

}  // namespace rnnlm::cpu::RNNLM_ISA
