// The input part of the gates, from which the product with h starts.
//
// Forward makes the projection x W_ih^T + b itself, and never stores it whole. A thread computes
// what it will itself read: of few rows a step, for some steps ahead, so that W_ih is read once for
// all of them; of many, together with each piece of the product with h. Or the caller has projected
// the input and gives the result (gates_x): then it is read row by row.
#pragma once

#include "weights.h"

namespace rnnlm::cpu::RNNLM_ISA {

// Rows that are worth reading W_ih for.
template <class S>
constexpr int64_t kInputRows = kPairs<S> ? 128 : 64;

// The iterations of forward whose input a thread handles together, and their rows of x.
template <class S>
struct Chunk {
  static constexpr int64_t kMaxSteps = 64;
  int64_t begin = 0, end = 0;         // iterations
  bool ahead = false;                 // their input part is computed before the first of them
  int64_t rows = 0;                   // of this thread, in all of them
  int64_t first_row[kMaxSteps] = {};  // where those of an iteration begin
  const Operand<S>* x = nullptr;      // [rows]
  int64_t ld = 0;                     // distance of two rows of x

  int64_t row_of(int64_t iteration) const { return first_row[iteration - begin]; }
};

// x, cut into chunks.
template <class S>
class Input {
  using X = Operand<S>;

 public:
  Input(const Projection& p, const void* gates_x, const Steps& steps, Split split, Arena& arena)
      : x_(static_cast<const S*>(p.x)),
        width_(p.input),
        ld_(operand_ld<S>(p.input)),
        given_(gates_x != nullptr),
        converts_(!is_operand<S>(p.input)) {
    if (given_ || (!converts_ && split.row_groups == 1)) return;
    // Where units are split, too, a smaller team than planned splits only those.
    // Two more: fewer threads may have groups that are larger by the rounding of their equal share.
    const int parts = split.unit_groups == 1 ? split.row_groups : 1;
    const int64_t rows = max64(kInputRows<S>, steps.most_rows_of_group(parts)) + 2;
    copy_ = arena.take<X>(split.threads() * rows * ld_);
  }

  int64_t width() const { return width_; }

  // Where that is so, the largest group has no more rows in a step than are computed at once.
  static bool goes_ahead(const Steps& steps, Split split) {
    return 2 * ceil_div(steps.batch(), split.row_groups) <= kInputRows<S>;
  }

  // The chunk that begins with this iteration.
  void next(const Steps& steps, const Place& place, int64_t iteration, Chunk<S>& chunk) const {
    if (given_) {
      chunk.end = steps.count();
      return;
    }
    const auto rows_at = [&](int64_t t) {
      const Range rows = clip(place.rows, 0, steps.rows(t));
      return rows.end - rows.begin;
    };
    chunk.ahead = goes_ahead(steps, place.split);
    const int64_t most = min64(place.steps_at_once, Chunk<S>::kMaxSteps);
    chunk.begin = iteration;
    chunk.end = iteration + 1;
    chunk.rows = rows_at(steps.forward_step(iteration));
    for (; chunk.ahead && chunk.end < steps.count(); ++chunk.end) {
      const int64_t more = rows_at(steps.forward_step(chunk.end));
      if (chunk.end - chunk.begin == most || chunk.rows + more > kInputRows<S>) break;
      chunk.rows += more;
    }
    place.leader.await(chunk.end);
    const int64_t count = chunk.end - chunk.begin;
    const int64_t first = steps.forward_step(steps.reverse() ? chunk.end - 1 : chunk.begin);
    const bool as_it_is = !converts_ && place.split.row_groups == 1;
    const int64_t capacity = max64(kInputRows<S>, steps.most_rows_of_group(place.split.row_groups));
    X* copy = as_it_is ? nullptr : copy_ + place.thread * capacity * ld_;
    int64_t row = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = first + i, rows = rows_at(t);
      chunk.first_row[steps.reverse() ? count - 1 - i : i] = row;
      if (copy)
        copy_operand<S>(x_ + (steps.start(t) + place.rows.begin) * width_, width_, {0, rows},
                        copy + row * ld_, ld_);
      row += rows;
    }
    chunk.x = copy ? copy : reinterpret_cast<const X*>(x_ + steps.start(first) * width_);
    chunk.ld = copy ? ld_ : width_;
  }

 private:
  const S* x_;
  int64_t width_, ld_;
  bool given_;         // projected: x is not there
  bool converts_;      // a product cannot read x itself
  X* copy_ = nullptr;  // [threads][rows][ld]
};

// The input part of the outputs of one recurrent matrix, block by block.
template <class S>
class InputGates {
  using T = Arithmetic<S>;
  static constexpr int L = kLanes<T>;

 public:
  // `weights`: the rows of W_ih, in blocks like those of the recurrent matrix; not read where their
  // part is `given`: [N, *], rows `given_ld` apart, or null. With `apart`, a GRU whose reset gate
  // comes after: the input part of n is not what W_hn h starts from; that is `apart` [H], and the
  // former follows as a fourth vector.
  InputGates(const Weights<S>& weights, const S* given, int64_t given_ld, int threads,
             const Steps& steps, Split split, Arena& arena, const void* bias, const void* second,
             int vectors_of_second = kMaxVectors, bool apart = false,
             const void* bias_apart = nullptr)
      : weights_(weights), given_(given), given_ld_(given_ld), more_(apart ? 1 : 0) {
    weights_.reserve(arena, given ? Packing::none : packing(weights_, steps.sequence()), threads,
                     bias, second, vectors_of_second);
    if (apart) {
      bias_apart_ = static_cast<const S*>(bias_apart);
      apart_ = arena.take<T>(weights_.blocks() * L);
    }
    if (!given && Input<S>::goes_ahead(steps, split))
      ahead_ = arena.take<T>(split.row_groups * weights_.blocks() * block_size());
  }

  void pack(const Place& place) {
    weights_.pack(place);
    if (apart_ && place.thread == 0) copy_rows<S>(bias_apart_, weights_.units, {0, 1}, apart_, 0);
  }

  // For all steps of a chunk, where it is worth going ahead.
  void compute(const Place& place, const Chunk<S>& chunk) const {
    if (!chunk.ahead) return;
    const Range blocks = place.blocks(weights_.blocks());
    const int64_t at_once = rows_at_once<S>(chunk.rows);
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t row = 0; row < chunk.rows; row += at_once)
        multiply(place, block, row == 0, int(min64(at_once, chunk.rows - row)),
                 chunk.x + row * chunk.ld, chunk.ld, ahead(place, block) + row * row_size(block));
  }

  // What `rows` rows of an iteration start from; `space` is for as many, [kRowsAtOnce][4][L].
  RNNLM_INLINE Start<T> start(const Steps& steps, const Place& place, const Chunk<S>& chunk,
                              int64_t iteration, int64_t block, int64_t row, int rows,
                              T* space) const {
    if (given_) {
      read(block, steps.start(steps.forward_step(iteration)) + row, rows, space);
      return {space, row_size(block)};
    }
    const int64_t index = chunk.row_of(iteration) + row - place.rows.begin;
    if (chunk.ahead) return {ahead(place, block) + index * row_size(block), row_size(block)};
    multiply(place, block, row == place.rows.begin, rows, chunk.x + index * chunk.ld, chunk.ld,
             space);
    return {space, row_size(block)};
  }

 private:
  int64_t row_size(int64_t block) const { return (weights_.vectors_of(block) + more_) * L; }
  int64_t block_size() const { return kInputRows<S> * (weights_.vectors + more_) * L; }
  T* ahead(const Place& place, int64_t block) const {
    return ahead_ + (place.row_group * weights_.blocks() + block) * block_size();
  }

  // What is given of some rows, with the biases.
  void read(int64_t block, int64_t index, int rows, T* out) const {
    const int vectors = weights_.vectors_of(block);
    const T* bias = weights_.start(block).data;
    for (int i = 0; i < rows; ++i, out += row_size(block))
      for (int v = 0; v < vectors; ++v) {
        const S* from = given_ + (index + i) * given_ld_ + weights_.line(block, v);
        Vec<T> part = load(from, weights_.lanes(block, v));
        if (bias) part = part + load(bias + v * L);
        // The input part of n stands behind what its product starts from.
        if (apart_ && v == 2) store(out + 2 * L, load(apart_ + block * L));
        store(out + (apart_ && v == 2 ? 3 : v) * L, part);
      }
  }

  // `first`: of the rows that a block is multiplied with in turn.
  void multiply(const Place& place, int64_t block, bool first, int rows, const Operand<S>* x,
                int64_t ld, T* out) const {
    alignas(64) T sums[kRowsAtOnce * 3 * L];
    const Range blocks = place.blocks(weights_.blocks());
    const Operand<S>* panel = weights_.panel(place, block, first);
    const Operand<S>* next = weights_.panel(place, block + 1 < blocks.end ? block + 1 : block);
    weights_.multiply(*place.tiles, block, panel, next, rows, x, ld, weights_.start(block),
                      apart_ ? sums : out);
    if (!apart_) return;
    for (int i = 0; i < rows; ++i) {
      const T* sum = sums + i * 3 * L;
      T* row = out + i * 4 * L;
      store(row, load(sum));
      store(row + L, load(sum + L));
      store(row + 2 * L, load(apart_ + block * L));
      store(row + 3 * L, load(sum + 2 * L));
    }
  }

  Weights<S> weights_;
  const S* given_;
  int64_t given_ld_;
  int more_;  // vectors of a row of what it computes, besides those of weights_
  const S* bias_apart_ = nullptr;
  T* apart_ = nullptr;  // [blocks][L]
  T* ahead_ = nullptr;  // [row groups][blocks][kInputRows][vectors][L]
};

}  // namespace rnnlm::cpu::RNNLM_ISA
