// The product of a layer: out[m][u] = start[m][u] + sum_k a[m][k] * M(u, k), in float32 (float64
// for float64), where M is a weight matrix read by rows or by columns.
//
// Outputs are computed in blocks of NV vectors of kLanes units. A packed block ("panel") holds its
// weights as [K][NV][kLanes], the order in which the inner loop reads them, so that a step streams
// through memory. Every output is the same chains of fma over k in increasing order: its bits
// depend neither on how many rows are computed together nor on which thread does it.
//
// bfloat16 on CPUs that multiply it (kPairs): a is bfloat16 too, and both it and a panel hold the
// numbers of k and k + 1 side by side, as the instructions want them; panels are tiles of 32 k,
// [K/32][NV][16][kLanes][2]. Products and sums are float32. Rows of a have room for a multiple of
// 32 numbers, zeros beyond K.
#pragma once

#include <type_traits>

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

#if defined(__AVX512BF16__)
template <class S>
constexpr bool kPairs = std::is_same<S, bf16>::value;
#else
template <class S>
constexpr bool kPairs = false;
#endif

// What the rows of a are stored in.
template <class S>
using Operand = std::conditional_t<kPairs<S>, S, Arithmetic<S>>;

// k that one tile instruction consumes, and the multiple of which rows and panels have room for.
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileSize = kTileDepth * 16;  // numbers of one tile of weights: 16 units

// Distance of two rows of a with room for `depth` numbers.
template <class S>
int64_t operand_ld(int64_t depth) {
  const int64_t unit = kPairs<S> ? kTileDepth : kLanes<Arithmetic<S>>;
  return ceil_div(depth, unit) * unit;
}

// Whether a product can read the rows of a [.., depth] tensor as they are.
template <class S>
bool is_operand(int64_t depth) {
  return sizeof(S) == sizeof(Operand<S>) && (!kPairs<S> || operand_ld<S>(depth) == depth);
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// Rows whose accumulators fit the registers, next to NV weights and one broadcast value. Where two
// rows of four vectors is all, six of two are better: a load less for every four multiply-adds.
constexpr int max_rows(int nv) {
  const int rows = (kVectorRegisters - nv - 1) / nv;
  if (nv == 4 && rows < 4) return max_rows(2);
  return rows > 8 ? 8 : rows;
}
constexpr int vectors_at_once(int nv, int rows) {
  return (rows + 1) * nv < kVectorRegisters ? nv : 2;
}
constexpr int kMaxVectors = 4;
constexpr int kRowsAtOnce = 48;  // whose sums, inputs and piece of the panel fit the L1 cache

// Weights of so many bytes are not in the caches any more when they are read again.
constexpr int64_t kFarBytes = int64_t(6) << 20;

// Terms in one chain, at most; of pairs two are one addition. A float32 sum of a thousand in a
// single chain loses three times the bits that a blocked one does; and this much of a panel stays
// near for all rows.
template <class S>
constexpr int64_t kChain = kPairs<S> ? 384 : 256;
// A sum is cut into chains of nearly the same length: a short one costs as much around it as a long
// one. Chains of pairs are whole tiles.
template <class S>
int64_t chain_length(int64_t terms) {
  const int64_t unit = kPairs<S> ? kTileDepth : 4;
  const int64_t chains = max64(1, ceil_div(terms, kChain<S>));
  return max64(unit, ceil_div(ceil_div(terms, chains), unit) * unit);
}

// What the sums of some rows of one block start from: data[row * step][NV][kLanes], with step 0 the
// same for every row, or null for zero. Not where the sums go: tiles compute some rows twice.
template <class T>
struct Start {
  const T* data = nullptr;
  int64_t step = 0;  // numbers between two rows

  Start rows_from(int64_t row) const { return {data ? data + row * step : nullptr, step}; }
};

// Where the sums of some rows will be added or written by the caller: rows of as many bytes as the
// panel's vectors have, `step` bytes apart, or null. Asked for while those of the row are computed.
struct Destination {
  const char* data = nullptr;
  int64_t step = 0;

  template <int NV>
  RNNLM_INLINE void prefetch_rows(int begin, int end) const {
    if (!data) return;
    for (int row = begin; row < end; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) __builtin_prefetch(data + row * step + v * kVectorBytes, 1);
  }
};

// acc[MR][V of NV][kLanes] = start + the part of the sums over k < K. Of the weights that come
// after these it asks for one vector a k, at `ahead`: where they come from beyond the L2 cache,
// several rows would wait longer for them than they are multiplied. (One or two rows wait anyway.)
template <class T, int NV, int MR, int V = NV>
void chain(const T* a, int64_t lda, int64_t K, const T* panel, const T* ahead, Start<T> start,
           T* acc) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[MR][V] = {};
  for (int64_t k = 0; k < K; ++k, panel += NV * L, ahead += L) {
    if constexpr (MR > 2 && kVectorBytes > 16) __builtin_prefetch(ahead, 0, 1);
    Vec<T> w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = load(panel + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> x = splat(a[m * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] = fma(x, w[v], sum[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (start.data) sum[m][v] = load(start.data + m * start.step + v * L) + sum[m][v];
      store(acc + (m * NV + v) * L, sum[m][v]);
    }
}

template <class T, int NV, int MR = 1>
RNNLM_INLINE void chain_rows(int rows, const T* a, int64_t lda, int64_t K, const T* panel,
                             const T* ahead, Start<T> start, T* acc) {
  if constexpr (MR <= max_rows(NV)) {
    if (rows == MR) {
      constexpr int V = vectors_at_once(NV, MR);
      for (int v = 0; v < NV * kLanes<T>; v += V * kLanes<T>)
        chain<T, NV, MR, V>(a, lda, K, panel + v, ahead + v,
                            {start.data ? start.data + v : nullptr, start.step}, acc + v);
      return;
    }
    chain_rows<T, NV, MR + 1>(rows, a, lda, K, panel, ahead, start, acc);
  }
}

// Sums of `rows` rows of a with one panel, in chains of `length`. `next` is the panel that will be
// wanted after it.
template <class T, int NV>
void product(int rows, const T* a, int64_t lda, int64_t K, const T* panel, const T* next,
             Start<T> start, T* acc, Destination destination, int64_t length) {
  constexpr int L = kLanes<T>;
  const int groups = int(ceil_div(rows, max_rows(NV)));  // of nearly equal size
  for (int64_t k = 0; k == 0 || k < K; k += length) {
    const T* ahead = k + length < K ? panel + (k + length) * NV * L : next;
    for (int g = 0; g < groups; ++g) {
      const int begin = rows * g / groups, end = rows * (g + 1) / groups;
      T* out = acc + begin * NV * L;
      if (!k) destination.prefetch_rows<NV>(begin, end);
      const Start<T> from = k ? Start<T>{out, NV * L} : start.rows_from(begin);
      chain_rows<T, NV>(end - begin, a + begin * lda + k, lda, min64(length, K - k),
                        panel + k * NV * L, ahead + g * length * L, from, out);
    }
  }
}

#if defined(__AVX512BF16__)
// --- bfloat16 in pairs ---------------------------------------------------------------------------

RNNLM_INLINE Vec<float> dot_pairs(Vec<float> sum, Word a, Word b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
RNNLM_INLINE Word load_pairs(const bf16* p) {
  Word v;
  memcpy(&v, p, sizeof v);
  return v;
}
RNNLM_INLINE Word load_pairs(const bf16* p, int64_t n) {
  return (Word)_mm512_maskz_loadu_epi16(n >= kTileDepth ? ~0u : (1u << n) - 1, p);
}
// The numbers of two rows in turn. Without a second one zeros stand in for it.
RNNLM_INLINE Word load_rows(const bf16* a, const bf16* b, int64_t n) {
  const auto numbers = [n](const bf16* p) {
    const uint16_t lanes = n >= 16 ? 0xffff : first_lanes(n);
    return (Word)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(lanes, p));
  };
  return b ? numbers(a) | numbers(b) << 16 : numbers(a);
}
RNNLM_INLINE Word splat_pair(const bf16* p) {
  uint32_t pair;
  memcpy(&pair, p, sizeof pair);
  return Word{} + pair;
}

// `chain` for pairs.
template <int NV, int MR>
void pair_chain(const bf16* a, int64_t lda, int64_t K, const bf16* panel, const bf16* ahead,
                Start<float> start, float* acc) {
  constexpr int L = kLanes<float>;
  Vec<float> sum[MR][NV] = {};
  for (int64_t k = 0; k < K; k += 2, ahead += 2 * L) {
    if constexpr (MR > 2) __builtin_prefetch(ahead, 0, 1);
    const bf16* tile = panel + k / kTileDepth * NV * kTileSize + k % kTileDepth * L;
    Word w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = load_pairs(tile + v * kTileSize);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Word x = splat_pair(a + m * lda + k);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] = dot_pairs(sum[m][v], x, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      if (start.data) sum[m][v] = load(start.data + m * start.step + v * L) + sum[m][v];
      store(acc + (m * NV + v) * L, sum[m][v]);
    }
}

template <int NV, int MR = 1>
RNNLM_INLINE void pair_chain_rows(int rows, const bf16* a, int64_t lda, int64_t K,
                                  const bf16* panel, const bf16* ahead, Start<float> start,
                                  float* acc) {
  if constexpr (MR <= max_rows(NV)) {
    if (rows == MR) return pair_chain<NV, MR>(a, lda, K, panel, ahead, start, acc);
    pair_chain_rows<NV, MR + 1>(rows, a, lda, K, panel, ahead, start, acc);
  }
}

// `product` for pairs.
template <int NV>
void pair_product(int rows, const bf16* a, int64_t lda, int64_t K, const bf16* panel,
                  const bf16* next, Start<float> start, float* acc, Destination destination,
                  int64_t length) {
  constexpr int L = kLanes<float>;
  const int groups = int(ceil_div(rows, max_rows(NV)));
  for (int64_t k = 0; k == 0 || k < K; k += length) {
    const bf16* ahead = k + length < K ? panel + (k + length) * NV * L : next;
    for (int g = 0; g < groups; ++g) {
      const int begin = rows * g / groups, end = rows * (g + 1) / groups;
      float* out = acc + begin * NV * L;
      if (!k) destination.prefetch_rows<NV>(begin, end);
      const Start<float> from = k ? Start<float>{out, NV * L} : start.rows_from(begin);
      pair_chain_rows<NV>(end - begin, a + begin * lda + k, lda, min64(length, K - k),
                          panel + k * NV * L, ahead + g * length * L, from, out);
    }
  }
}
#endif

// --- tiles ---------------------------------------------------------------------------------------
// AMX multiplies 16 rows of a by 16 units over 32 k in one instruction. Tiles 0-3 hold sums, 4 and
// 5 rows of a, 6 and 7 weights. How many rows the first six have is a setting of the thread; groups
// of rows are of one size, the last one overlapping its neighbour (and computing the same bits
// again) where the number of rows is no multiple of it.

#if defined(__AMX_BF16__)
// A thread's tiles. Given back at the end: the kernel saves them at every switch of threads.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (rows_) _tile_release();
  }
  void set_rows(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.rows[tile] = uint8_t(tile < 6 ? rows : 16);
    // GCC believes that the instruction reads 8 of the 64 bytes, and drops stores to the others.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }

 private:
  int rows_ = 0;
};

// The tile instructions are opaque to the compiler, which must neither delay stores that they read
// nor use what it knew of the memory that they write.
RNNLM_INLINE void tiles_touch_memory() {
  __asm__ volatile("" ::: "memory");
}

// Sums of one group of rows with V vectors of a panel. Steps in bytes, that of w in numbers.
template <int V>
void tile_product(const bf16* a, int64_t a_step, int64_t K, const bf16* w, int64_t w_step,
                  Start<float> start, float* acc, int64_t acc_step) {
  constexpr int L = kLanes<float>;
  if (const float* from = start.data) {
    const int64_t step = start.step * int64_t(sizeof(float));
    _tile_loadd(0, from, step);
    if constexpr (V > 1) _tile_loadd(1, from + L, step);
    if constexpr (V > 2) _tile_loadd(2, from + 2 * L, step);
    if constexpr (V > 3) _tile_loadd(3, from + 3 * L, step);
  } else {
    _tile_zero(0);
    if constexpr (V > 1) _tile_zero(1);
    if constexpr (V > 2) _tile_zero(2);
    if constexpr (V > 3) _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += kTileDepth) {
    _tile_loadd(4, a + k, a_step);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V > 1) {
      _tile_loadd(7, w + kTileSize, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (V > 2) {
      _tile_loadd(6, w + 2 * kTileSize, 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (V > 3) {
      _tile_loadd(7, w + 3 * kTileSize, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
    w += w_step;
  }
  _tile_stored(0, acc, acc_step);
  if constexpr (V > 1) _tile_stored(1, acc + L, acc_step);
  if constexpr (V > 2) _tile_stored(2, acc + 2 * L, acc_step);
  if constexpr (V > 3) _tile_stored(3, acc + 3 * L, acc_step);
}

// The same for two groups of rows and one or two vectors: each weight that comes from the L2 cache
// is used twice.
template <int V>
void tile_product_2(const bf16* a, const bf16* a2, int64_t a_step, int64_t K, const bf16* w,
                    int64_t w_step, Start<float> start, Start<float> start2, float* acc,
                    float* acc2, int64_t acc_step) {
  constexpr int L = kLanes<float>;
  if (start.data) {
    const int64_t step = start.step * int64_t(sizeof(float));
    _tile_loadd(0, start.data, step);
    _tile_loadd(1, start2.data, step);
    if constexpr (V > 1) _tile_loadd(2, start.data + L, step);
    if constexpr (V > 1) _tile_loadd(3, start2.data + L, step);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (V > 1) _tile_zero(2);
    if constexpr (V > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += kTileDepth) {
    _tile_loadd(6, w, 64);
    _tile_loadd(4, a + k, a_step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a2 + k, a_step);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (V > 1) {
      _tile_loadd(7, w + kTileSize, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    w += w_step;
  }
  _tile_stored(0, acc, acc_step);
  _tile_stored(1, acc2, acc_step);
  if constexpr (V > 1) _tile_stored(2, acc + L, acc_step);
  if constexpr (V > 1) _tile_stored(3, acc2 + L, acc_step);
}

template <int NV>
void tiled_product(Tiles& tiles, int rows, const bf16* a, int64_t lda, int64_t K, const bf16* panel,
                   Start<float> start, float* acc) {
  constexpr int L = kLanes<float>;
  constexpr int64_t w_step = NV * kTileSize;
  constexpr int64_t acc_step = NV * L * int64_t(sizeof(float));
  const int64_t a_step = lda * int64_t(sizeof(bf16));
  const int groups = int(ceil_div(rows, 16)), size = int(ceil_div(rows, groups));
  tiles.set_rows(size);
  tiles_touch_memory();
  const auto first = [&](int g) { return min64(g * size, rows - size); };
  const auto vectors_from = [](Start<float> s, int v) {
    return Start<float>{s.data ? s.data + v * L : nullptr, s.step};
  };
  int g = 0;
  for (; g + 1 < groups; g += 2) {
    const bf16 *x = a + first(g) * lda, *x2 = a + first(g + 1) * lda;
    float *out = acc + first(g) * NV * L, *out2 = acc + first(g + 1) * NV * L;
    const Start<float> from = start.rows_from(first(g)), from2 = start.rows_from(first(g + 1));
    tile_product_2<(NV > 1 ? 2 : 1)>(x, x2, a_step, K, panel, w_step, from, from2, out, out2,
                                     acc_step);
    if constexpr (NV > 2)
      tile_product_2<NV - 2>(x, x2, a_step, K, panel + 2 * kTileSize, w_step, vectors_from(from, 2),
                             vectors_from(from2, 2), out + 2 * L, out2 + 2 * L, acc_step);
  }
  if (g < groups)
    tile_product<NV>(a + first(g) * lda, a_step, K, panel, w_step, start.rows_from(first(g)),
                     acc + first(g) * NV * L, acc_step);
  tiles_touch_memory();
}
#else
struct Tiles {};
#endif

// A matrix and how its outputs are cut into blocks. Vector v of block b holds the outputs of units
// unit(b, v) .. unit(b, v) + lanes(b, v); with gates, NV = G and vector v belongs to gate v of the
// same units; otherwise the vectors of a block are neighbours, and some blocks have one less.
template <class S>
struct Matrix {
  using T = Arithmetic<S>;
  using X = Operand<S>;
  static constexpr int L = kLanes<T>;

  const S* w = nullptr;
  int64_t ld = 0;                       // distance of two rows of w
  const S* const* scattered = nullptr;  // where its rows are, if not there; only with `columns`
  bool columns = false;                 // M(u, k) = w[k][u], else w[u][k]
  bool gates = false;                   // vectors of a block are gates
  int vectors = 1;                      // NV, at most
  int64_t units = 0;                    // outputs (of one gate)
  int64_t depth = 0;                    // K
  int64_t terms = 0;                    // of whole sums, where this is a part of one, or 0
  int64_t parts = 1;                    // that the blocks are to be divided into; not with gates
  const T* bias = nullptr;              // packed [blocks][NV][L] or null

  const S* row(int64_t k) const { return scattered ? scattered[k] : w + k * ld; }
  int64_t blocks() const {
    if (gates) return ceil_div(units, L);
    const int64_t most = ceil_div(units, L), least = ceil_div(most, vectors);
    return min64(ceil_div(least, parts) * parts, most);
  }
  // Without gates: vectors before a block. All blocks have nearly the same number.
  int64_t first_vector(int64_t block) const { return ceil_div(units, L) * block / blocks(); }
  int64_t unit(int64_t block, int v) const { return L * (gates ? block : first_vector(block) + v); }
  int64_t lanes(int64_t block, int v) const { return min64(L, units - unit(block, v)); }
  int vectors_of(int64_t block) const {
    return gates ? vectors : int(first_vector(block + 1) - first_vector(block));
  }
  // Row (or column) of w that holds the weights of the first lane.
  int64_t line(int64_t block, int v) const {
    return gates ? v * units + block * L : unit(block, v);
  }
  int64_t chain_terms() const { return chain_length<S>(terms ? terms : depth); }
  int64_t packed_depth() const { return kPairs<S> ? operand_ld<S>(depth) : depth; }
  int64_t panel_size() const { return packed_depth() * vectors * L; }
  int64_t panels_size() const { return blocks() * panel_size(); }
  bool is_far() const {
    return units * (gates ? vectors : 1) * depth * int64_t(sizeof(S)) >= kFarBytes;
  }
  int64_t bias_size() const { return blocks() * vectors * L; }

  // With `columns` it asks for numbers that are to be packed next, so far behind in w: they are
  // pieces of many rows, too short for the CPU to look ahead.
  void pack(int64_t block, X* panel) const { pack(block, panel, vectors * L); }
  void pack(int64_t block, X* panel, int64_t ahead) const {
    if constexpr (kPairs<S>)
      return pack_pairs(block, panel, ahead);
    else
      return pack_numbers(block, panel, ahead);
  }

  void pack_numbers(int64_t block, T* panel, int64_t ahead) const {
    if (columns) {
      const int last = vectors_of(block) - 1;
      const int64_t first = line(block, 0), lanes_of_last = lanes(block, last);
      for (int64_t k = 0; k < depth; ++k) {
        const S* from = row(k) + first;
        for (int v = 0; v < last; ++v, from += L, panel += L) {
          __builtin_prefetch(from + ahead, 0, 2);
          store(panel, load(from));
        }
        __builtin_prefetch(from + ahead, 0, 2);
        store(panel, load(from, lanes_of_last));
        panel += L;
      }
      return;
    }
    for (int v = 0; v < vectors_of(block); ++v) {
      const int64_t n = lanes(block, v), first = line(block, v);
      T* out = panel + v * L;
      const int64_t step = vectors_of(block) * L;
      for (int64_t k0 = 0; k0 < depth; k0 += L) {
        const int64_t kn = min64(L, depth - k0);
        const S* from = w + first * ld + k0;
        Vec<T> tile[L];
        if (n == L && kn == L)
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) tile[l] = load(from + l * ld);
        else
          for (int l = 0; l < L; ++l) tile[l] = l < n ? load(from + l * ld, kn) : Vec<T>{};
        transpose<T>(tile);
        T* to = out + k0 * step;
        if (kn == L)
#pragma GCC unroll 16
          for (int k = 0; k < L; ++k) store(to + k * step, tile[k]);
        else
          for (int k = 0; k < kn; ++k) store(to + k * step, tile[k]);
      }
    }
  }

  void pack_pairs(int64_t block, S* panel, int64_t ahead) const {
    for (int64_t k0 = 0; k0 < packed_depth(); k0 += kTileDepth) {
      const int64_t kn = min64(kTileDepth, depth - k0);
      for (int v = 0; v < vectors_of(block); ++v, panel += kTileSize) {
        const int64_t n = lanes(block, v), first = line(block, v);
        if (columns) {
          for (int64_t k = 0; k < kTileDepth; k += 2) {
            Word pairs = {};
            if (k < kn) {
              const S* one = row(k0 + k) + first;
              const S* two = k + 1 < kn ? row(k0 + k + 1) + first : nullptr;
              __builtin_prefetch(one + ahead, 0, 2);
              if (two) __builtin_prefetch(two + ahead, 0, 2);
              pairs = load_rows(one, two, n);
            }
            memcpy(panel + k * L, &pairs, sizeof pairs);
          }
        } else {
          // Pairs of bfloat16 move as words.
          const S* from = w + first * ld + k0;
          Vec<float> rows[L];
          if (n == L && kn == kTileDepth)
#pragma GCC unroll 16
            for (int l = 0; l < L; ++l) rows[l] = (Vec<float>)load_pairs(from + l * ld);
          else
            for (int l = 0; l < L; ++l)
              rows[l] = l < n ? (Vec<float>)load_pairs(from + l * ld, kn) : Vec<float>{};
          transpose<float>(rows);
          for (int64_t k = 0; k < L; ++k) memcpy(panel + k * 2 * L, &rows[k], sizeof rows[k]);
        }
      }
    }
  }

  // The sums of two biases, either of which may be null; the second only of the first so many
  // vectors.
  void pack_bias(int64_t block, const S* one, const S* two, int vectors_of_two, T* packed) const {
    for (int v = 0; v < vectors_of(block); ++v) {
      const int64_t first = line(block, v), n = lanes(block, v);
      Vec<T> sum = one ? load(one + first, n) : Vec<T>{};
      if (two && v < vectors_of_two) sum = sum + load(two + first, n);
      store(packed + v * L, sum);
    }
  }

  // What all rows of a block start from without anything else.
  Start<T> start(int64_t block) const { return {bias ? bias + block * vectors * L : nullptr, 0}; }

  // acc [rows][vectors_of(block)][L] for up to kRowsAtOnce rows of a. `panel`: the packed block, or
  // null: w is read as it is. `next`: the panel that will be wanted after it.
  void multiply(Tiles& tiles, int64_t block, const X* panel, const X* next, int rows, const X* a,
                int64_t lda, Start<T> start, T* acc, Destination destination = {}) const {
    if (!panel) return multiply_unpacked(block, rows, a, lda, start, acc);
    switch (vectors_of(block)) {
      case 1:
        return multiply_packed<1>(tiles, panel, next, rows, a, lda, start, acc, destination);
      case 2:
        return multiply_packed<2>(tiles, panel, next, rows, a, lda, start, acc, destination);
      case 3:
        return multiply_packed<3>(tiles, panel, next, rows, a, lda, start, acc, destination);
      default:
        return multiply_packed<4>(tiles, panel, next, rows, a, lda, start, acc, destination);
    }
  }

  template <int NV>
  void multiply_packed([[maybe_unused]] Tiles& tiles, const X* panel,
                       [[maybe_unused]] const X* next, int rows, const X* a, int64_t lda,
                       Start<T> start, T* acc, [[maybe_unused]] Destination destination) const {
#if defined(__AMX_BF16__)
    if constexpr (kPairs<S>)
      return tiled_product<NV>(tiles, rows, a, lda, packed_depth(), panel, start, acc);
#elif defined(__AVX512BF16__)
    if constexpr (kPairs<S>)  // not the zeros up to a whole tile
      return pair_product<NV>(rows, a, lda, ceil_div(depth, 2) * 2, panel, next, start, acc,
                              destination, chain_terms());
#endif
    if constexpr (!kPairs<S>)
      product<T, NV>(rows, a, lda, depth, panel, next, start, acc, destination, chain_terms());
  }

  // For so few rows in all that packing would cost more than it saves.
  void multiply_unpacked(int64_t block, int rows, const X* a, int64_t lda, Start<T> start,
                         T* acc) const {
    const int count = vectors_of(block);
    for (int m = 0; m < rows; ++m) {
      const T* from = start.rows_from(m).data;
      T* out = acc + m * count * L;
      for (int v = 0; v < count; ++v) store(out + v * L, from ? load(from + v * L) : Vec<T>{});
      if (columns) add_columns(block, a + m * lda, out);
    }
    if (columns) return;
    const int groups = int(ceil_div(rows, kDotRows));
    for (int v = 0; v < count; ++v) {
      const int64_t n = lanes(block, v), at_once = groups > 1 ? kDots : n;
      for (int64_t l = 0; l < n; l += at_once)
        for (int g = 0; g < groups; ++g) {
          const int begin = rows * g / groups, end = rows * (g + 1) / groups;
          const X* x = a + begin * lda;
          const S* from = w + (line(block, v) + l) * ld;
          T* out = acc + (begin * count + v) * L + l;
          if (g == 0 && is_far())
            dot_rows<true>(end, x, lda, from, min64(at_once, n - l), out, count * L);
          else
            dot_rows<false>(end - begin, x, lda, from, min64(at_once, n - l), out, count * L);
        }
    }
  }

  // One vector's width of factors, of the first n numbers.
#if defined(__AVX512BF16__)
  using Factors = std::conditional_t<kPairs<S>, Word, Vec<T>>;
#else
  using Factors = Vec<T>;
#endif
  static constexpr int64_t kDotStep = kPairs<S> ? kTileDepth : L;
  template <class P>
  static RNNLM_INLINE Factors factors(const P* p) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs<S>) return load_pairs(p);
#endif
    if constexpr (!kPairs<S>) return load(p);
  }
  template <class P>
  static RNNLM_INLINE Factors factors(const P* p, int64_t n) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs<S>) return load_pairs(p, n);
#endif
    if constexpr (!kPairs<S>) return load(p, n);
  }
  static RNNLM_INLINE Vec<T> multiply_add(Factors x, Factors w, Vec<T> sum) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs<S>) return dot_pairs(sum, x, w);
#endif
    if constexpr (!kPairs<S>) return fma(x, w, sum);
  }

  // Dot products of MR rows of a with up to four rows of w, added to out[row][row of w]. `far`:
  // asks for the four rows behind them, which lie on other pages, where the CPU does not look
  // ahead.
  static constexpr int kDots = 4;
  static constexpr int kDotRows = (kVectorRegisters - kDots - 1) / kDots;
  template <bool far, int MR>
  RNNLM_INLINE void dots(const X* x, int64_t ldx, const S* from, int64_t n, T* out,
                         int64_t out_step) const {
    const int64_t whole = depth / kDotStep * kDotStep;
    const S* row[kDots];
#pragma GCC unroll 4
    for (int j = 0; j < kDots; ++j) row[j] = from + min64(j, n - 1) * ld;
    Vec<T> sums[MR][kDots] = {};
    for (int64_t k = 0; k < whole; k += kDotStep) {
      Factors y[kDots];
#pragma GCC unroll 4
      for (int j = 0; j < kDots; ++j) {
        if constexpr (far) __builtin_prefetch(row[j] + kDots * ld + k, 0, 2);
        y[j] = factors(row[j] + k);
      }
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Factors xm = factors(x + m * ldx + k);
#pragma GCC unroll 4
        for (int j = 0; j < kDots; ++j) sums[m][j] = multiply_add(xm, y[j], sums[m][j]);
      }
    }
    if (const int64_t rest = depth - whole)
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < kDots; ++j)
          sums[m][j] = multiply_add(factors(x + m * ldx + whole, rest),
                                    factors(row[j] + whole, rest), sums[m][j]);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m, out += out_step)
      if (n == kDots)
        add_sums<T>(sums[m], out);
      else
#pragma GCC unroll 4
        for (int j = 0; j < kDots; ++j)
          if (j < n) out[j] += sum<T>(sums[m][j]);
  }
  // The same for `count` rows of w. Between two times four the CPU must not lose sight of memory:
  // little happens there.
  template <bool far, int MR>
  void all_dots(const X* x, int64_t ldx, const S* from, int64_t count, T* out,
                int64_t out_step) const {
    int64_t j = 0;
    for (; j + kDots <= count; j += kDots)
      dots<far, MR>(x, ldx, from + j * ld, kDots, out + j, out_step);
    if (j < count) dots<far, MR>(x, ldx, from + j * ld, count - j, out + j, out_step);
  }
  template <bool far, int MR = 1>
  void dot_rows(int rows, const X* x, int64_t ldx, const S* from, int64_t count, T* out,
                int64_t out_step) const {
    if (rows == MR) return all_dots<far, MR>(x, ldx, from, count, out, out_step);
    if constexpr (MR < kDotRows) dot_rows<far, MR + 1>(rows, x, ldx, from, count, out, out_step);
  }

  // Multiples of the rows of w, in the order of `chain`.
  void add_columns(int64_t block, const X* x, T* out) const {
    const int count = vectors_of(block);
    const int64_t length = chain_length<T>(depth);  // not of pairs: one addition a term
    for (int64_t k0 = 0; k0 < depth; k0 += length) {
      Vec<T> sums[kMaxVectors] = {};
      for (int64_t k = k0; k < min64(k0 + length, depth); ++k) {
        const Vec<T> xk = splat(to_arithmetic(x[k]));
        const S* row = w + k * ld + line(block, 0);
        for (int v = 0; v < count; ++v)
          sums[v] = fma(xk, load(row + v * L, lanes(block, v)), sums[v]);
      }
      for (int v = 0; v < count; ++v) store(out + v * L, load(out + v * L) + sums[v]);
    }
  }
};

}  // namespace rnnlm::cpu::RNNLM_ISA
