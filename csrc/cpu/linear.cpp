// Products outside the recurrence: the logits of a head, and the gradients of a layer's weights,
// biases and input from those of its gates, which backward left behind. Compiled once per
// instruction set (RNNLM_ISA names it).
//
// How gradients are computed. That of a weight is the outer product of two tensors of N rows:
// gates' gradients on the left, what the weight was multiplied with on the right (x, the h before
// each step). N is cut into chunks. Of each, the team packs the right sides into panels, in the
// order in which the products of product.h read weights; then the threads take groups of columns of
// the left sides, transpose them, and multiply those rows by the panels: the group stays in the
// cache, and so does a panel while a group is multiplied with it. On the way the columns' sums, the
// gradients of the biases, cost an addition. A group is whole rows of the results, and the chunks
// are added up in order: results are the same bits for any number of threads.
//
// The gradient of x is a product with the columns of W_ih like those of the recurrence. It comes
// before the groups of the first chunk, so that who is done with it earlier takes more of those.

#include "weights.h"

namespace rnnlm::cpu::RNNLM_ISA {
namespace {

// Rows of all steps that are handled together, at most. More of them read and write the results
// less often; with fewer the panels stay nearer.
constexpr int64_t kChunkRows = 1024;
// In chunks of nearly equal size, and of whole tiles.
int64_t rows_of_chunks(int64_t rows) {
  const int64_t chunks = max64(1, ceil_div(rows, kChunkRows));
  return min64(rows, ceil_div(ceil_div(rows, chunks), kTileDepth) * kTileDepth);
}
// Rows from which on threads share them in the product with W_ih, rather than columns.
constexpr int64_t kManyRows = 512;
// Rows of the gates' gradients that the product with W_ih takes at once.
constexpr int64_t kInputGradRows = 2 * kRowsAtOnce;

// Chains of a gradient of x whose weights and gates' gradients are at hand while its columns are
// computed, where a thread computes only some.
constexpr int64_t kPieceChains = 3;

template <class S>
class LinearTask {
  using T = Arithmetic<S>;
  using X = Operand<S>;

 public:
  Steps steps;

  LinearTask(const Linear& p, Arena& arena)
      : steps({1, p.rows, nullptr, false}, arena),
        p_(p),
        ld_(operand_ld<S>(p.input)),
        w_(plain_rows<S>(p.w, p.units, p.input, split().unit_groups)) {
    w_.reserve(arena, packing(w_, steps.sequence()), p.threads);
    if (converts()) x_ = arena.take<X>(p.rows * ld_);
  }

  // Each thread takes some outputs after others, for all rows: it packs their weights where it uses
  // them.
  Split split() const {
    const int64_t work = p_.rows * p_.units * p_.input;
    Split split;
    split.unit_groups = int(max64(1, min64(p_.threads, work / kThreadWork)));
    split.demand = {split.threads(), 1, work};
    return split;
  }

  void run(const Place& place) {
    if (converts()) {
      copy_operand<S>(p_.x, p_.input, place.everything(p_.rows), x_, ld_);
      place.meet_all();
    }
    const int64_t blocks = w_.blocks();
    for (Range b = place.take(blocks, 1); b.begin < b.end; b = place.take(blocks, 1))
      for_each_output(w_, place.only(b.begin, blocks), {0, p_.rows}, false,
                      converts() ? x_ : static_cast<const X*>(p_.x), converts() ? ld_ : p_.input,
                      [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                        store(static_cast<S*>(p_.out) + row * p_.units + unit, load(sums), lanes);
                      });
  }

 private:
  bool converts() const { return !is_operand<S>(p_.input); }

  Linear p_;
  int64_t ld_;
  Weights<S> w_;
  X* x_ = nullptr;
};

template <class S>
class LayerGradientsTask {
  using T = Arithmetic<S>;
  using X = Operand<S>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

  // A tensor [N, units] on the right of outer products, of which a chunk is packed. The weights of
  // its "matrix" are the chunk's rows.
  struct Right : Matrix<S> {
    bool previous = false;  // row n is h before what row n of the others belongs to
    X* panels = nullptr;
  };
  // Of a weight's gradient [*, units of right], the rows that belong to a left side.
  struct Outer {
    const Right* right;
    S* out;
    T* total;  // where the chunks are added up: `out` itself, where it has the arithmetic dtype
  };
  // Some columns of a tensor [N, ld], what they are multiplied with, and where their sums go.
  struct Left {
    const S* a = nullptr;
    int64_t ld = 0, units = 0;
    Outer outers[2];
    int count = 0;
    S* sums[2] = {};
    T* sum = nullptr;  // [units, rounded up], or null: not wanted
  };

 public:
  Steps steps;

  LayerGradientsTask(const LayerGradients& p, Arena& arena)
      : steps(p.seq, arena),
        p_(p),
        scale_(Vec<T>{} + T(p.scale)),
        rows_(p.rows),
        chunk_rows_(rows_of_chunks(p.rows)),
        left_ld_(operand_ld<S>(chunk_rows_)),
        converts_(!is_operand<S>(p.gates * p.hidden)),
        gates_ld_(converts_ ? operand_ld<S>(p.gates * p.hidden) : p.gates * p.hidden),
        w_ih_(columns<S>(p.w_ih, p.input, p.gates * p.hidden, 1)) {
    const int64_t H = p.hidden, R = p.proj ? p.proj : H, threads = p.threads;
    if (p.dx) {
      if (!shares_rows()) {
        w_ih_.parts = split().unit_groups;
        if (rows_ > 1) {
          panels_ = arena.take<X>(threads * kPieceChains * kChain<S> * kMaxVectors * L);
          sums_ = arena.take<T>(w_ih_.blocks() * rows_ * kMaxVectors * L);
        }
      }
      w_ih_.reserve(arena, shares_rows() && rows_ > 1 ? Packing::ahead : Packing::none, p.threads);
      const int64_t copied = shares_rows() ? threads * kInputGradRows : rows_;
      if (converts_) dgates_ = arena.take<X>(copied * gates_ld_);
    }
    set_right(x_, p.x, p.input, p.dw_ih, arena);
    set_right(h_, p.output, R, p.dw_hh, arena);
    h_.previous = true;
    set_right(other_, p.proj ? p.unprojected : p.candidate, H,
              p.proj ? p.dw_hr : (p.reset_before ? p.dw_hh : nullptr), arena);
    if (p.dw_hh) previous_ = arena.take<const S*>(threads * chunk_rows_);
    transposed_ = arena.take<X>(threads * kRowsAtOnce * left_ld_);

    // A GRU's candidate differs from its other gates in what W_hh has to do with it.
    const int64_t alike = (p.gates == 3 ? 2 : p.gates) * H;
    Left& left = add_left(p.dgates, p.gates * H, alike, arena, p.db_ih, p.db_hh);
    add_outer(left, x_, p.dw_ih, arena);
    add_outer(left, h_, p.dw_hh, arena);
    if (p.gates == 3) {
      S* db_hn = at(p.db_hh, alike);
      Left& n = add_left(at(p.dgates, alike), p.gates * H, H, arena, at(p.db_ih, alike),
                         p.reset_before ? db_hn : nullptr);
      add_outer(n, x_, at(p.dw_ih, alike * p.input), arena);
      if (p.reset_before) {
        add_outer(n, other_, at(p.dw_hh, alike * H), arena);
      } else {
        Left& hn = add_left(p.candidate, H, H, arena, db_hn, nullptr);
        add_outer(hn, h_, at(p.dw_hh, alike * H), arena);
      }
    }
    if (p.proj) add_outer(add_left(p.dproj, R, R, arena, nullptr, nullptr), other_, p.dw_hr, arena);
  }

  Split split() const {
    const int64_t weights = p_.gates * p_.hidden * (2 * p_.input + p_.hidden);
    Split split;
    split.unit_groups = int(max64(1, min64(p_.threads, rows_ * weights / kThreadWork)));
    split.demand = {split.threads(), 1, rows_ * weights};
    return split;
  }

  void run(const Place& place) {
    if (p_.dx) prepare_input_gradient(place);
    int64_t handed_out = 0;
    for (int64_t begin = 0; begin < rows_; begin += chunk_rows_) {
      const Range chunk = {begin, min64(rows_, begin + chunk_rows_)};
      for (Right* right : {&x_, &h_, &other_}) pack(*right, place, chunk);
      place.meet_all();
      if (p_.dx && begin == 0) input_gradient(place);
      for (int i = 0; i < lefts_; ++i) multiply(left_[i], place, chunk, handed_out);
      if (chunk.end < rows_) place.meet_all();  // the next one's panels go where these are
    }
  }

 private:
  template <class P>
  static auto at(P* tensor, int64_t offset) {
    using Number = std::conditional_t<std::is_const<P>::value, const S, S>;
    return tensor ? static_cast<Number*>(tensor) + offset : nullptr;
  }

  // A right side that `wanted` needs.
  void set_right(Right& right, const void* rows, int64_t units, const void* wanted, Arena& arena) {
    if (!wanted) return;
    right.w = static_cast<const S*>(rows);
    right.ld = right.units = units;
    right.depth = chunk_rows_;
    right.columns = true;
    right.vectors = kMaxVectors;
    right.panels = arena.take<X>(right.panels_size());
  }
  Left& add_left(const void* a, int64_t ld, int64_t units, Arena& arena, void* sums, void* more) {
    Left& left = left_[lefts_++];
    left.a = static_cast<const S*>(a);
    left.ld = ld;
    left.units = units;
    left.sums[0] = static_cast<S*>(sums);
    left.sums[1] = static_cast<S*>(more);
    if (sums || more) left.sum = arena.take<T>(ceil_div(units, L) * L);
    return left;
  }
  void add_outer(Left& left, const Right& right, void* out, Arena& arena) {
    if (!out) return;
    Outer& outer = left.outers[left.count++];
    outer = {&right, static_cast<S*>(out), nullptr};
    if constexpr (std::is_same<S, T>::value)
      outer.total = outer.out;
    else if (rows_ > chunk_rows_)
      outer.total = arena.take<T>(left.units * right.units);
  }

  // dx = dgates W_ih. Many rows are shared among the threads, which then need all of the packed
  // weights; of few each thread has some columns, and packs their weights where it uses them.
  bool shares_rows() const { return w_ih_.blocks() < 2 * p_.threads || rows_ > kManyRows; }
  // What all threads read: they meet before they go on to the gradient itself.
  void prepare_input_gradient(const Place& place) {
    if (shares_rows())
      w_ih_.pack(rows_of(place));
    else if (converts_)
      copy_operand<S>(p_.dgates, p_.gates * p_.hidden, place.everything(rows_), dgates_, gates_ld_);
  }
  // The place of a thread that has all columns.
  static Place rows_of(Place place) {
    std::swap(place.split.row_groups, place.split.unit_groups);
    place.unit_group = 0;
    return place;
  }
  void input_gradient(const Place& team) {
    const int64_t width = p_.gates * p_.hidden;
    const S* dgates = static_cast<const S*>(p_.dgates);
    if (!shares_rows()) {
      const X* rows = converts_ ? dgates_ : reinterpret_cast<const X*>(dgates);
      if (panels_)
        multiply_in_pieces(team, rows);
      else
        multiply_by_w_ih(team, rows, {0, rows_});
      return;
    }
    const Place place = rows_of(team);
    const Range mine = place.everything(rows_);
    X* copy = dgates_ + place.thread * kInputGradRows * gates_ld_;
    for (int64_t row = mine.begin; row < mine.end; row += kInputGradRows) {
      const Range rows = {row, min64(row + kInputGradRows, mine.end)};
      const S* some = dgates + row * width;
      if (converts_) copy_operand<S>(some, width, {0, rows.end - row}, copy, gates_ld_);
      multiply_by_w_ih(place, converts_ ? copy : reinterpret_cast<const X*>(some), rows);
    }
  }
  // `dgates`: of the first of these rows.
  void multiply_by_w_ih(const Place& place, const X* dgates, Range rows) {
    S* dx = static_cast<S*>(p_.dx) + rows.begin * p_.input;
    for_each_output(w_ih_, place, {0, rows.end - rows.begin}, false, dgates, gates_ld_,
                    [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                      store_flushing(dx + row * p_.input + unit, load(sums) * scale_, lanes);
                    });
  }

  // All rows by this thread's columns, some terms of all sums after others.
  void multiply_in_pieces(const Place& place, const X* dgates) {
    alignas(64) T acc[kRowsAtOnce * kMaxVectors * L];
    X* panel = panels_ + place.thread * kPieceChains * kChain<S> * kMaxVectors * L;
    const Range blocks = place.blocks(w_ih_.blocks());
    const int64_t depth = w_ih_.depth, at_once = rows_at_once<S>(rows_);
    const int64_t length = kPieceChains * w_ih_.chain_terms();
    S* dx = static_cast<S*>(p_.dx);
    for (int64_t k = 0; k < depth; k += length) {
      Matrix<S> piece = w_ih_;
      piece.w += k * piece.ld;
      piece.depth = min64(length, depth - k);
      piece.terms = depth;
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int vectors = piece.vectors_of(b);
        const int64_t step = vectors * L, unit = piece.unit(b, 0);
        T* sums = sums_ + b * rows_ * kMaxVectors * L;
        // What is packed next: the next columns, or the first ones' next terms.
        const int64_t ahead =
            b + 1 < blocks.end ? step : length * piece.ld + piece.unit(blocks.begin, 0) - unit;
        piece.pack(b, panel, ahead);
        for (int64_t row = 0; row < rows_; row += at_once) {
          const int count = int(min64(at_once, rows_ - row));
          const Start<T> start = {k ? sums + row * step : nullptr, step};
          piece.multiply(*place.tiles, b, panel, panel, count, dgates + row * gates_ld_ + k,
                         gates_ld_, start, acc);
          const T* sum = acc;
          for (int i = 0; i < count; ++i)
            for (int v = 0; v < vectors; ++v, sum += L)
              if (k + length < depth)
                store(sums + (row + i) * step + v * L, load(sum));
              else
                store_flushing(dx + (row + i) * p_.input + unit + v * L, load(sum) * scale_,
                               min64(L, p_.input - unit - v * L));
        }
      }
    }
  }

  // This thread's share of the panels of a chunk.
  void pack(Right& right, const Place& place, Range chunk) {
    if (!right.panels) return;
    Matrix<S> m = right;
    m.depth = chunk.end - chunk.begin;
    const Range blocks = place.blocks(m.blocks());
    if (blocks.begin == blocks.end) return;
    if (right.previous) {
      const S** rows = previous_ + place.thread * chunk_rows_;
      find_previous(chunk, rows);
      m.scattered = rows;
    } else {
      m.w += chunk.begin * m.ld;
    }
    for (int64_t b = blocks.begin; b < blocks.end; ++b)
      m.pack(b, right.panels + b * right.panel_size());
  }

  // Where h before each row of a chunk is.
  void find_previous(Range chunk, const S** rows) const {
    const int64_t R = h_.units;
    int64_t t = 0;
    if (p_.seq.batch_sizes)
      while (steps.start(t) + steps.rows(t) <= chunk.begin) ++t;
    else
      t = chunk.begin / p_.seq.batch;
    for (int64_t n = chunk.begin; n < chunk.end; ++t) {
      const int64_t end = min64(chunk.end, steps.start(t) + steps.rows(t));
      for (; n < end; ++n) {
        const int64_t row = n - steps.start(t), before = steps.previous(t, row);
        *rows++ = before < 0 ? static_cast<const S*>(p_.h0) + row * R
                             : static_cast<const S*>(p_.output) + before * R;
      }
    }
  }

  // The part of a chunk in the rows of the gradients that this thread takes. `handed_out`: of the
  // chunks and left sides before.
  void multiply(const Left& left, const Place& place, Range chunk, int64_t& handed_out) {
    if (!left.count && !left.sum) return;
    const int64_t first = handed_out;
    handed_out += ceil_div(left.units, L) * L;
    X* transposed = transposed_ + place.thread * kRowsAtOnce * left_ld_;
    for (;;) {
      const Range taken = place.take(handed_out, kRowsAtOnce, L);
      if (taken.begin == taken.end) return;
      const int64_t unit = taken.begin - first;
      const int64_t count = min64(taken.end - taken.begin, left.units - unit);
      transpose_columns(left, chunk, unit, count, transposed);
      for (int i = 0; i < left.count; ++i)
        multiply(left.outers[i], place, chunk, unit, int(count), transposed);
    }
  }

  // Columns unit .. unit + count of a chunk become rows; adds them up, if that is wanted.
  void transpose_columns(const Left& left, Range chunk, int64_t unit, int64_t count, X* out) {
    constexpr int64_t kStep = kPairs<S> ? kTileDepth : L;  // rows that fill a vector
    const int64_t depth = chunk.end - chunk.begin;
    for (int64_t u = 0; u < count; u += L, out += L * left_ld_) {
      const int64_t lanes = min64(L, count - u);
      const S* a = left.a + chunk.begin * left.ld + unit + u;
      V total = {};
      for (int64_t k = 0; k < depth; k += kStep) {
        V tile[L];
        const V sum = load_columns(a + k * left.ld, left.ld, min64(kStep, depth - k), lanes, tile);
        total = total + sum;
        transpose<T>(tile);
        for (int64_t l = 0; l < lanes; ++l)
          memcpy(out + l * left_ld_ + k, &tile[l], sizeof tile[l]);
      }
      if (!left.sum) continue;
      T* sum = left.sum + unit + u;
      if (chunk.begin) total = total + load(sum);
      store(sum, total);
      if (chunk.end == rows_)
        for (S* sums : left.sums)
          if (sums) store(sums + unit + u, total * scale_, lanes);
    }
  }

  // L columns of some rows as a tile to be transposed (two rows in a vector, where products want
  // pairs), and their sums.
  static V load_columns(const S* a, int64_t ld, int64_t rows, int64_t lanes, V (&tile)[L]) {
    V sums[2] = {};
#if defined(__AVX512BF16__)
    if constexpr (kPairs<S>)
      for (int64_t j = 0; j < L; ++j) {
        const S* row = a + 2 * j * ld;
        Word pairs = {};
        if (2 * j < rows) pairs = load_rows(row, 2 * j + 1 < rows ? row + ld : nullptr, lanes);
        tile[j] = (V)pairs;
        sums[0] = sums[0] + (V)(pairs << 16);
        sums[1] = sums[1] + (V)(pairs & 0xffff0000u);
      }
#endif
    if constexpr (!kPairs<S>) {
      for (int64_t j = 0; j < L; ++j) {
        tile[j] = j < rows ? load(a + j * ld, lanes) : V{};
        sums[j & 1] = sums[j & 1] + tile[j];
      }
    }
    return sums[0] + sums[1];
  }

  void multiply(const Outer& outer, const Place& place, Range chunk, int64_t unit, int count,
                const X* transposed) {
    alignas(64) T acc[kRowsAtOnce * kMaxVectors * L];
    Matrix<S> m = *outer.right;
    m.depth = chunk.end - chunk.begin;
    const int64_t width = m.units, blocks = m.blocks();
    const bool first = chunk.begin == 0, last = chunk.end == rows_;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t column = m.unit(b, 0);
      T* total = outer.total ? outer.total + unit * width + column : nullptr;
      S* out = outer.out + unit * width + column;
      Destination destination = {reinterpret_cast<const char*>(out), width * int64_t(sizeof(S))};
      if (!last) destination = {reinterpret_cast<const char*>(total), width * int64_t(sizeof(T))};
      const X* panel = outer.right->panels + b * outer.right->panel_size();
      const X* next = b + 1 < blocks ? panel + outer.right->panel_size() : outer.right->panels;
      m.multiply(*place.tiles, b, panel, next, count, transposed, left_ld_, {}, acc, destination);
      const T* sums = acc;
      const int vectors = m.vectors_of(b);
      for (int64_t i = 0; i < count; ++i)
        for (int v = 0; v < vectors; ++v, sums += L) {
          const int64_t lanes = min64(L, width - column - v * L), offset = i * width + v * L;
          V sum = load(sums) * scale_;
          if (!first)
            sum = sum + load(total + offset, lanes);
          else if (p_.accumulates)
            sum = sum + load(out + offset, lanes);
          if (last)
            store_flushing(out + offset, sum, lanes);
          else
            store(total + offset, sum, lanes);
        }
    }
  }

  LayerGradients p_;
  V scale_;
  int64_t rows_, chunk_rows_;
  int64_t left_ld_;   // of transposed_
  bool converts_;     // a product cannot read dgates itself
  int64_t gates_ld_;  // of what it reads
  Weights<S> w_ih_;
  X* panels_ = nullptr;  // [threads][terms of a piece][vectors][L]
  T* sums_ = nullptr;    // [blocks][rows][vectors][L]
  X* dgates_ = nullptr;  // [threads][kInputGradRows][gates_ld_], where products cannot read dgates
  Right x_, h_, other_;  // other_: h before a projection, or a GRU's r * h
  Left left_[3];
  int lefts_ = 0;
  const S** previous_ = nullptr;  // [threads][chunk_rows_]
  X* transposed_;                 // [threads][kRowsAtOnce][left_ld_]
};

}  // namespace

#if defined(__AVX512BF16__)
Result linear(const Linear* problems, int count) {
  return dispatch<LinearTask>(problems, count, avx512::kernels().linear);
}
Result layer_gradients(const LayerGradients* problems, int count) {
  return dispatch<LayerGradientsTask>(problems, count, avx512::kernels().layer_gradients);
}
#else
Result linear(const Linear* problems, int count) {
  return dispatch<LinearTask>(problems, count);
}
Result layer_gradients(const LayerGradients* problems, int count) {
  return dispatch<LayerGradientsTask>(problems, count);
}
#endif

}  // namespace rnnlm::cpu::RNNLM_ISA
