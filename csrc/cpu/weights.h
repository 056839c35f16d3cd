// Weight matrices with the workspace of their packed form, walks over their outputs, and the rows
// that they are multiplied with.
#pragma once

#include "team.h"

namespace rnnlm::cpu::RNNLM_ISA {

// Packing reads and writes every weight once; that pays from a few products on. Of a single step
// each block is packed right before it is used: its panel is read back from the cache.
enum class Packing { none, at_use, ahead };
template <class S>
Packing packing(const Matrix<S>& m, const Sequence& seq) {
#if defined(__AMX_BF16__)
  constexpr bool tiles = kPairs<S>;
#else
  constexpr bool tiles = false;
#endif
  bool pays;
  if (m.columns) {
    // Copied as they are, and read along the rows of w otherwise, once for every row of a.
    pays = seq.steps * seq.batch > 1;
  } else if (tiles) {
    pays = seq.steps == 1 ? seq.batch > 4 : seq.steps * ceil_div(seq.batch, 4) > 8;
  } else {
    // Dot products read the rows of w as they are and are as fast, but for the lanes of each, which
    // are added up in the end: for so many rows that is what packing costs.
    constexpr int64_t part = kPairs<S> || kVectorRegisters < 32 ? 8 : 5;
    pays = seq.steps * seq.batch > max64(8, m.depth / part);
  }
  return !pays ? Packing::none : seq.steps == 1 ? Packing::at_use : Packing::ahead;
}

// A weight matrix together with the workspace of its packed form.
template <class S>
struct Weights : Matrix<S> {
  using T = Arithmetic<S>;
  using X = Operand<S>;
  Packing packed = Packing::none;
  X* panels = nullptr;  // one for every block, or, where packed at use, for every thread
  T* bias_space = nullptr;
  const S *raw_bias = nullptr, *second_bias = nullptr;
  int second_vectors = 0;

  // Sums start from `bias`, and those of the first `vectors_of_second` gates also from `second`.
  void reserve(Arena& arena, Packing how, int threads, const void* bias = nullptr,
               const void* second = nullptr, int vectors_of_second = kMaxVectors) {
    packed = how;
    raw_bias = static_cast<const S*>(bias);
    second_bias = static_cast<const S*>(second);
    second_vectors = vectors_of_second;
    if (how != Packing::none)
      panels =
          arena.take<X>((how == Packing::ahead ? this->blocks() : threads) * this->panel_size());
    if (bias || second) this->bias = bias_space = arena.take<T>(this->bias_size());
  }
  // Blocks that this thread uses when units are split, an equal share when rows are.
  void pack(const Place& place) {
    const Range blocks = place.split.row_groups == 1 ? place.blocks(this->blocks())
                                                     : place.everything(this->blocks());
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      if (packed == Packing::ahead) Matrix<S>::pack(b, panels + b * this->panel_size());
      if (bias_space)
        this->pack_bias(b, raw_bias, second_bias, second_vectors,
                        bias_space + b * this->vectors * kLanes<T>);
    }
  }
  // Where this thread finds a block packed. `now`: it has to be, if it is not ahead.
  const X* panel(const Place& place, int64_t block, bool now = false) const {
    if (packed != Packing::at_use) return panels ? panels + block * this->panel_size() : nullptr;
    X* own = panels + place.thread * this->panel_size();
    if (now) Matrix<S>::pack(block, own);
    return own;
  }
};

// Rows whose sums are computed before they are looked at: of nearly the same number of tiles each.
template <class S>
int64_t rows_at_once(int64_t rows) {
  if (!kPairs<S> || rows <= kRowsAtOnce) return kRowsAtOnce;
  return ceil_div(ceil_div(rows, ceil_div(rows, kRowsAtOnce)), 16) * 16;
}

// Computes M's outputs for a range of rows, block of units by block, some rows at once: f(block,
// first row, rows, acc, start), acc [rows][NV][kLanes], start = start_of(block, first row, rows)
// what the sums start from. Every other step goes through the blocks backwards: where the weights
// do not fit the cache, the step then begins with those that the last one left there.
template <class S, class StartOf, class F>
RNNLM_INLINE void for_each_piece(const Weights<S>& m, const Place& place, Range rows,
                                 bool backwards, const Operand<S>* a, int64_t lda, StartOf start_of,
                                 F f) {
  using T = Arithmetic<S>;
  alignas(64) T acc[kRowsAtOnce * kMaxVectors * kLanes<T>];
  const Range blocks = place.blocks(m.blocks());
  const int64_t at_once = rows_at_once<S>(rows.end - rows.begin);
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const int64_t block = backwards ? blocks.begin + blocks.end - 1 - b : b;
    const int64_t next = b + 1 == blocks.end ? block : backwards ? block - 1 : block + 1;
    for (int64_t row = rows.begin; row < rows.end; row += at_once) {
      const int count = int(min64(at_once, rows.end - row));
      const Start<T> start = start_of(block, row, count);
      const Operand<S>* panel = m.panel(place, block, row == rows.begin);
      m.multiply(*place.tiles, block, panel, m.panel(place, next), count, a + row * lda, lda, start,
                 acc);
      f(block, row, count, acc, start);
    }
  }
}

// Where vectors are gates of the same units: f(row, unit, lanes, sums of the gates, what they
// started from), where sums may be written. `then` is called in the same way once f has seen all
// rows of the piece: a chain of operations longer than the CPU looks ahead is best cut in two.
template <class S, class StartOf, class F, class Then>
RNNLM_INLINE void for_each_gates(const Weights<S>& m, const Place& place, Range rows,
                                 bool backwards, const Operand<S>* a, int64_t lda, StartOf start_of,
                                 F f, Then then) {
  using T = Arithmetic<S>;
  for_each_piece(m, place, rows, backwards, a, lda, start_of,
                 [&](int64_t block, int64_t row, int count, T* acc, Start<T> start) {
                   const int64_t unit = m.unit(block, 0), lanes = m.lanes(block, 0);
                   const int64_t step = m.vectors * kLanes<T>;
                   for (int i = 0; i < count; ++i)
                     f(row + i, unit, lanes, acc + i * step, start.rows_from(i).data);
                   for (int i = 0; i < count; ++i) then(row + i, unit, lanes, acc + i * step);
                 });
}
template <class S, class StartOf, class F>
RNNLM_INLINE void for_each_gates(const Weights<S>& m, const Place& place, Range rows,
                                 bool backwards, const Operand<S>* a, int64_t lda, StartOf start_of,
                                 F f) {
  for_each_gates(m, place, rows, backwards, a, lda, start_of, f,
                 [](int64_t, int64_t, int64_t, const Arithmetic<S>*) {});
}

// Where the vectors of a block are neighbours: f(row, unit, lanes, sums) for each.
template <class S, class StartOf, class F>
RNNLM_INLINE void for_each_output(const Weights<S>& m, const Place& place, Range rows,
                                  bool backwards, const Operand<S>* a, int64_t lda,
                                  StartOf start_of, F f) {
  using T = Arithmetic<S>;
  for_each_piece(m, place, rows, backwards, a, lda, start_of,
                 [&](int64_t block, int64_t row, int count, const T* acc, Start<T>) {
                   const int64_t first = m.unit(block, 0);
                   const int vectors = m.vectors_of(block);
                   for (int i = 0; i < count; ++i)
                     for (int v = 0; v < vectors; ++v, acc += kLanes<T>) {
                       const int64_t unit = first + v * kLanes<T>;
                       f(row + i, unit, min64(kLanes<T>, m.units - unit), acc);
                     }
                 });
}
template <class S, class F>
RNNLM_INLINE void for_each_output(const Weights<S>& m, const Place& place, Range rows,
                                  bool backwards, const Operand<S>* a, int64_t lda, F f) {
  for_each_output(
      m, place, rows, backwards, a, lda,
      [&](int64_t block, int64_t, int) { return m.start(block); }, f);
}

// The same walk over units and rows without a product: f(row, unit, lanes).
template <class S, class F>
RNNLM_INLINE void for_each_unit(const Weights<S>& m, const Place& place, Range rows, F f) {
  const Range blocks = place.blocks(m.blocks());
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t first = m.unit(block, 0);
    const int vectors = m.gates ? 1 : m.vectors_of(block);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int v = 0; v < vectors; ++v) {
        const int64_t unit = first + v * kLanes<Arithmetic<S>>;
        f(row, unit, min64(kLanes<Arithmetic<S>>, m.units - unit));
      }
  }
}

template <class S>
Weights<S> gate_rows(const void* w, int64_t hidden, int64_t depth, int gates) {
  Weights<S> m;
  m.w = static_cast<const S*>(w);
  m.ld = m.depth = depth;
  m.gates = true;
  m.vectors = gates;
  m.units = hidden;
  return m;
}
// `parts`: how many threads share the units.
template <class S>
Weights<S> plain_rows(const void* w, int64_t units, int64_t depth, int64_t parts) {
  Weights<S> m;
  m.parts = parts;
  m.w = static_cast<const S*>(w);
  m.ld = m.depth = depth;
  m.vectors = kMaxVectors;
  m.units = units;
  return m;
}
// out[u] = sum_k a[k] w[k][u], w [depth, units]
template <class S>
Weights<S> columns(const void* w, int64_t units, int64_t depth, int64_t parts) {
  Weights<S> m;
  m.parts = parts;
  m.w = static_cast<const S*>(w);
  m.ld = m.units = units;
  m.depth = depth;
  m.columns = true;
  m.vectors = kMaxVectors;
  return m;
}

// Copies rows of a [B, width] tensor into a workspace of row stride `ld`, or zeros without tensor.
template <class S>
void copy_rows(const void* tensor, int64_t width, Range rows, Arithmetic<S>* out, int64_t ld) {
  constexpr int L = kLanes<Arithmetic<S>>;
  const S* in = static_cast<const S*>(tensor);
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for (int64_t u = 0; u < width; u += L)
      store(out + row * ld + u, in ? load(in + row * width + u, width - u) : Vec<Arithmetic<S>>{});
}

// The rows of a product's operand, of the same values. Room that they do not fill is zero in pairs,
// where products read it.
template <class S>
void clear_operand(Range rows, Operand<S>* out, int64_t ld) {
  if (kPairs<S>)
    memset(static_cast<void*>(out + rows.begin * ld), 0,
           size_t((rows.end - rows.begin) * ld) * sizeof(*out));
}
template <class S>
void copy_operand(const void* tensor, int64_t width, Range rows, Operand<S>* out, int64_t ld) {
  if constexpr (kPairs<S>) {
    clear_operand<S>(rows, out, ld);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      memcpy(out + row * ld, static_cast<const S*>(tensor) + row * width,
             size_t(width) * sizeof(S));
  } else {
    copy_rows<S>(tensor, width, rows, out, ld);
  }
}

}  // namespace rnnlm::cpu::RNNLM_ISA
