// The sequential part of LSTM and GRU layers on CPUs, forward and backward. Compiled once per
// instruction set (RNNLM_ISA names it); isa.cpp chooses among them.
//
// How a call runs. A team of threads splits the rows, the hidden units, or both (`Split`). Each
// thread walks through all steps; in one it computes, block of units by block of units, the
// products with the input and with h, the gates and the new state while the block's accumulators
// are in the L1 cache. Threads that work on the same rows meet at a barrier once a step
// (reset-before GRU and projection: twice); threads with different rows meet only once, when the
// weights are packed. The state is kept in the arithmetic dtype in the workspace, twice where a
// step reads all of the old one while it writes the new one.
//
// Rows of different lengths: rows are sorted by length, so step t is rows 0 .. rows(t). A row that
// is not in a step is not touched: cost is proportional to the valid steps. Groups of rows have
// nearly equal sums of lengths, so the first ones have fewer rows.
//
// What a product reads (h, and backward the gradients of the gates) is stored as the product wants
// it, bfloat16 where the CPU multiplies that (product.h); an LSTM's gradients not twice, where the
// product can read them from the tensor that they are left in. c and a GRU's own h stay float32.
//
// Arithmetic per element is the same for any number of threads, so results are the same bits.
// Backward runs one iteration more than there are steps, for dh0 and dc0, unless nobody wants them.

#include <optional>

#include "device/gates.h"
#include "input.h"

namespace rnnlm::cpu::RNNLM_ISA {
namespace {

// --- LSTM ----------------------------------------------------------------------------------------

// 16-bit tensors save pre-activations: near 1 an activation has no bits left for 1 - sigma.
template <class S>
constexpr bool kSavesPreactivations = sizeof(S) == 2;

#if defined(__AVX512BF16__)
template <class S>
using MathOf = std::conditional_t<kPairs<S>, BriefMath, Math<Arithmetic<S>>>;
#else
template <class S>
using MathOf = Math<Arithmetic<S>>;
#endif

template <class S>
class LstmForwardTask {
  using T = Arithmetic<S>;
  using X = Operand<S>;
  using M = MathOf<S>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

 public:
  Steps steps;

  LstmForwardTask(const LstmForward& p, Arena& arena)
      : steps(p.seq, arena),
        p_(p),
        width_(p.proj ? p.proj : p.hidden),
        h_ld_(operand_ld<S>(width_)),
        c_ld_(operand_ld<S>(p.hidden)),
        input_(p.projection, p.gates_x, steps, split(), arena),
        input_gates_(gate_rows<S>(p.projection.w_ih, p.hidden, p.projection.input, 4),
                     static_cast<const S*>(p.gates_x), 4 * p.hidden, p.threads, steps, split(),
                     arena, p.projection.b_ih, p.b_hh),
        gates_(gate_rows<S>(p.w_hh, p.hidden, width_, 4)),
        project_(plain_rows<S>(p.w_hr, p.proj, p.hidden, split().unit_groups)) {
    gates_.reserve(arena, packing(gates_, p.seq), p.threads);
    if (p.proj) project_.reserve(arena, packing(project_, p.seq), p.threads);
    for (X*& h : h_) h = arena.take<X>(p.seq.batch * h_ld_);
    c_ = arena.take<T>(p.seq.batch * c_ld_);
    if (p.proj) unprojected_ = arena.take<X>(p.seq.batch * c_ld_);
  }

  Split split() const {
    const int64_t input = p_.gates_x ? 0 : 4 * p_.hidden * p_.projection.input;
    const int64_t recurrent = 4 * p_.hidden * width_ + p_.proj * p_.hidden;
    return choose_split<S>(p_.threads, p_.seq, recurrent, input);
  }

  void run(const Place& place) {
    place.map(static_cast<S*>(p_.saved), steps.total_rows() * 4 * p_.hidden);
    place.map(static_cast<T*>(p_.cells), steps.total_rows() * p_.hidden);
    place.map(static_cast<S*>(p_.output), steps.total_rows() * width_);
    input_gates_.pack(place);
    gates_.pack(place);
    if (p_.proj) project_.pack(place);
    const Range mine = place.everything(steps.batch());
    for (X* h : h_) copy_operand<S>(p_.h0, width_, mine, h, h_ld_);
    if (p_.proj) clear_operand<S>(mine, unprojected_, c_ld_);
    copy_rows<S>(p_.c0, p_.hidden, mine, c_, c_ld_);
    place.meet_all();
    Chunk<S> chunk;
    alignas(64) T input_part[kRowsAtOnce * 4 * L];
    for (int64_t s = 0; s < steps.count(); ++s) {
      if (s == chunk.end) {
        input_.next(steps, place, s, chunk);
        input_gates_.compute(place, chunk);
      }
      const int64_t t = steps.forward_step(s), ahead = steps.ahead_in_forward(s);
      const Range rows = clip(place.rows, 0, steps.rows(t));
      const int64_t ending = steps.first_ending_row(s);
      const X* h_in = h_[s & 1];
      X* h_out = h_[(s + 1) & 1];
      for_each_gates(
          gates_, place, rows, s & 1, h_in, h_ld_,
          [&](int64_t block, int64_t row, int count) {
            return input_gates_.start(steps, place, chunk, s, block, row, count, input_part);
          },
          [&](int64_t row, int64_t unit, int64_t lanes, T* sums, const T*) {
            update_c(steps.start(t) + row, ahead, row, unit, lanes, sums);
          },
          [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
            update_h(steps.start(t) + row, row, unit, lanes, load(sums), row >= ending, h_out);
          });
      place.meet_rows();
      if (p_.proj) {
        for_each_output(project_, place, rows, s & 1, unprojected_, c_ld_,
                        [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                          emit_h(steps.start(t) + row, row, unit, lanes, load(sums), row >= ending,
                                 h_out);
                        });
        place.meet_rows();
      }
      place.publish(s + 1);
    }
  }

 private:
  // From the sums of the product to the new c; leaves the output gate in their place.
  RNNLM_INLINE void update_c(int64_t index, int64_t ahead, int64_t row, int64_t unit, int64_t lanes,
                             T* sums) {
    const int64_t H = p_.hidden;
    const LstmGates<V> pre = {load(sums), load(sums + L), load(sums + 2 * L), load(sums + 3 * L)};
    const LstmGates<V> y = lstm_activate<M>(pre);
    T* c = c_ + row * c_ld_ + unit;
    store(c, lstm_cell<M>(y, load(c)));
    store(sums, y.o);
    if (!p_.saved) return;
    const LstmGates<V>& kept = kSavesPreactivations<S> ? pre : y;
    S* saved = static_cast<S*>(p_.saved) + index * 4 * H + unit;
    prefetch<4, true>(saved + ahead * 4 * H, H * int64_t(sizeof(S)));
    store_flushing(saved, kept.i, lanes);
    store_flushing(saved + H, kept.f, lanes);
    store_flushing(saved + 2 * H, kept.g, lanes);
    store_flushing(saved + 3 * H, kept.o, lanes);
  }

  RNNLM_INLINE void update_h(int64_t index, int64_t row, int64_t unit, int64_t lanes, V o,
                             bool ending, X* h_out) {
    const int64_t H = p_.hidden;
    const V c = load(c_ + row * c_ld_ + unit);
    if (p_.cells) store(static_cast<T*>(p_.cells) + index * H + unit, c, lanes);
    if (ending) store(static_cast<S*>(p_.c_n) + row * H + unit, c, lanes);
    const V h = lstm_hidden<M>(o, c);
    if (p_.proj)
      store_flushing(unprojected_ + row * c_ld_ + unit, h, L);
    else
      emit_h(index, row, unit, lanes, h, ending, h_out);
  }

  RNNLM_INLINE void emit_h(int64_t index, int64_t row, int64_t unit, int64_t lanes, V h,
                           bool ending, X* h_out) {
    store_flushing(h_out + row * h_ld_ + unit, h, L);
    store(static_cast<S*>(p_.output) + index * width_ + unit, h, lanes);
    if (ending) store(static_cast<S*>(p_.h_n) + row * width_ + unit, h, lanes);
  }

  LstmForward p_;
  int64_t width_, h_ld_, c_ld_;
  Input<S> input_;
  InputGates<S> input_gates_;
  Weights<S> gates_, project_;
  X* h_[2];
  T* c_;
  X* unprojected_ = nullptr;  // [B, H]: h of this step before the projection
};

template <class S>
class LstmBackwardTask {
  using T = Arithmetic<S>;
  using X = Operand<S>;
  using M = MathOf<S>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

 public:
  Steps steps;

  LstmBackwardTask(const LstmBackward& p, Arena& arena)
      : steps(p.seq, arena),
        p_(p),
        wants_initial_(p.dh0 != nullptr),
        reads_dgates_(is_operand<S>(4 * p.hidden)),
        width_(p.proj ? p.proj : p.hidden),
        gate_ld_(reads_dgates_ ? 4 * p.hidden : operand_ld<S>(4 * p.hidden)),
        c_ld_(ceil_div(p.hidden, L) * L),
        r_ld_(operand_ld<S>(width_)),
        recurrent_(columns<S>(p.w_hh, width_, 4 * p.hidden, split().unit_groups)),
        unproject_(columns<S>(p.w_hr, p.hidden, p.proj, split().unit_groups)) {
    recurrent_.reserve(arena, packing(recurrent_, p.seq), p.threads);
    if (p.proj) unproject_.reserve(arena, packing(unproject_, p.seq), p.threads);
    if (!reads_dgates_)
      for (X*& d : dgates_) d = arena.take<X>(p.seq.batch * gate_ld_);
    dc_ = arena.take<T>(p.seq.batch * c_ld_);
    if (p.proj) dr_ = arena.take<X>(p.seq.batch * r_ld_);
  }

  Split split() const {
    const int64_t weights = 4 * p_.hidden * width_ + p_.proj * p_.hidden;
    return choose_split<S>(p_.threads, p_.seq, weights);
  }

  void run(const Place& place) {
    place.map(static_cast<S*>(p_.dgates), steps.total_rows() * 4 * p_.hidden);
    recurrent_.pack(place);
    if (p_.proj) unproject_.pack(place);
    const Range mine = place.everything(steps.batch());
    copy_rows<S>(p_.grad_c_n, p_.hidden, mine, dc_, c_ld_);
    if (!reads_dgates_)
      for (X* d : dgates_) clear_operand<S>(mine, d, gate_ld_);
    if (p_.proj) clear_operand<S>(mine, dr_, r_ld_);
    place.meet_all();
    int64_t next_rows = 0;  // rows of the step that forward took after this one
    for (int64_t s = 0; s <= steps.count(); ++s) {
      // One iteration more than steps: the last hands the gradient on to h0 and c0.
      const bool last = s == steps.count();
      if (last && !wants_initial_) break;
      const int64_t t = last ? 0 : steps.backward_step(s);
      const int64_t rows = last ? 0 : steps.rows(t), ahead = steps.ahead_in_backward(s);
      const X* next = reads_dgates_ ? dgates_of(s - 1) : dgates_[s & 1];
      X* own = dgates_[(s + 1) & 1];
      // Rows that forward took on to another step.
      for_each_output(recurrent_, place, clip(place.rows, 0, min64(rows, next_rows)), s & 1, next,
                      gate_ld_, [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                        arrive(t, ahead, row, unit, lanes, load(sums), own);
                      });
      // Rows whose last step this is.
      for_each_unit(recurrent_, place, clip(place.rows, next_rows, rows),
                    [&](int64_t row, int64_t unit, int64_t lanes) {
                      arrive(t, ahead, row, unit, lanes, grad_h_n(row, unit, lanes), own);
                    });
      // Rows whose first step was the one before: what is left belongs to the initial state.
      const Range done = wants_initial_ ? clip(place.rows, rows, next_rows) : Range{0, 0};
      for_each_output(recurrent_, place, done, s & 1, next, gate_ld_,
                      [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                        store(static_cast<S*>(p_.dh0) + row * width_ + unit, load(sums), lanes);
                      });
      const Weights<S>& units = p_.proj ? unproject_ : recurrent_;
      for_each_unit(units, place, done, [&](int64_t row, int64_t unit, int64_t lanes) {
        store(static_cast<S*>(p_.dc0) + row * p_.hidden + unit, load(dc_ + row * c_ld_ + unit),
              lanes);
      });
      if (p_.proj) {
        place.meet_rows();
        for_each_output(unproject_, place, clip(place.rows, 0, rows), s & 1, dr_, r_ld_,
                        [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                          step(t, row, unit, lanes, load(sums), own);
                        });
      }
      place.meet_rows();
      next_rows = rows;
    }
  }

 private:
  // Of the next step, whose c this one reads too; hence the c before that.
  RNNLM_INLINE void prefetch_inputs(int64_t here, int64_t ahead, int64_t unit) const {
    const int64_t H = p_.hidden, index = here + ahead;
    prefetch<4>(static_cast<const S*>(p_.saved) + index * 4 * H + unit, H * int64_t(sizeof(S)));
    prefetch<1>(static_cast<const T*>(p_.cells) + (index + ahead) * H + unit, 0);
    prefetch<4, true>(static_cast<S*>(p_.dgates) + index * 4 * H + unit, H * int64_t(sizeof(S)));
    if (p_.grad_output && !p_.proj)
      prefetch<1>(static_cast<const S*>(p_.grad_output) + index * H + unit, 0);
  }
  // Gradients of the gates that an iteration has left behind; before the first one nobody reads.
  const X* dgates_of(int64_t iteration) const {
    if (iteration < 0) return nullptr;
    return static_cast<const X*>(p_.dgates) +
           steps.start(steps.backward_step(iteration)) * gate_ld_;
  }
  V grad_h_n(int64_t row, int64_t unit, int64_t lanes) const {
    const S* grad = static_cast<const S*>(p_.grad_h_n);
    return grad ? load(grad + row * width_ + unit, lanes) : V{};
  }
  RNNLM_INLINE V with_grad_output(int64_t index, int64_t unit, int64_t lanes, V dh) const {
    const S* grad = static_cast<const S*>(p_.grad_output);
    return grad ? dh + load(grad + index * width_ + unit, lanes) : dh;
  }
  void gather_projected(int64_t index, int64_t row, int64_t unit, int64_t lanes, V dh) {
    dh = with_grad_output(index, unit, lanes, dh);
    store_flushing(dr_ + row * r_ld_ + unit, dh, L);
    store(static_cast<S*>(p_.dproj) + index * width_ + unit, dh, lanes);
  }

  // The gradient of h from the step that forward took next; `ahead`: how far the next rows lie.
  RNNLM_INLINE void arrive(int64_t t, int64_t ahead, int64_t row, int64_t unit, int64_t lanes, V dh,
                           X* own) {
    const int64_t index = steps.start(t) + row;
    prefetch_inputs(index, ahead, unit);
    if (p_.proj)
      gather_projected(index, row, unit, lanes, dh);
    else
      step(t, row, unit, lanes, with_grad_output(index, unit, lanes, dh), own);
  }
  RNNLM_INLINE void step(int64_t t, int64_t row, int64_t unit, int64_t lanes, V dh, X* own) {
    const int64_t H = p_.hidden, index = steps.start(t) + row;
    const S* saved = static_cast<const S*>(p_.saved) + index * 4 * H + unit;
    LstmGates<V> y = {load(saved, lanes), load(saved + H, lanes), load(saved + 2 * H, lanes),
                      load(saved + 3 * H, lanes)};
    if (kSavesPreactivations<S>) y = lstm_activate<M>(y);
    const T* cells = static_cast<const T*>(p_.cells);
    const V c = load(cells + index * H + unit, lanes);
    const int64_t before = steps.previous(t, row);
    const V c_prev = before < 0 ? load(static_cast<const S*>(p_.c0) + row * H + unit, lanes)
                                : load(cells + before * H + unit, lanes);
    V dc = load(dc_ + row * c_ld_ + unit);
    if (p_.grad_cells)
      dc = dc + load(static_cast<const T*>(p_.grad_cells) + index * H + unit, lanes);
    const LstmGates<V> d = lstm_backward<M>(y, c_prev, c, dh, dc);
    store(dc_ + row * c_ld_ + unit, dc);
    if (p_.proj) store(static_cast<S*>(p_.unprojected) + index * H + unit, y.o * M::tanh(c), lanes);
    S* out = static_cast<S*>(p_.dgates) + index * 4 * H + unit;
    const V values[4] = {d.i, d.f, d.g, d.o};
    for (int g = 0; g < 4; ++g) store_flushing(out + g * H, values[g], lanes);
    if (reads_dgates_) return;
    X* copy = own + row * gate_ld_ + unit;
    for (int g = 0; g < 4; ++g) store_flushing(copy + g * H, values[g], lanes);
  }

  LstmBackward p_;
  bool wants_initial_;  // dh0 and dc0: with truncated backpropagation nobody asks
  bool reads_dgates_;   // products read the gradients where they are left
  int64_t width_, gate_ld_, c_ld_, r_ld_;
  Weights<S> recurrent_, unproject_;
  X* dgates_[2] = {};  // [B, 4H] of the step that forward took next, and of this one, or null
  T* dc_;
  X* dr_ = nullptr;  // [B, R]: gradient of this step's projected h
};

// --- GRU -----------------------------------------------------------------------------------------

template <class S>
class GruForwardTask {
  using T = Arithmetic<S>;
  using X = Operand<S>;
  using M = MathOf<S>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

 public:
  Steps steps;

  GruForwardTask(const GruForward& p, Arena& arena)
      : steps(p.seq, arena),
        p_(p),
        ld_(operand_ld<S>(p.hidden)),
        input_(p.projection, p.gates_x, steps, split(), arena),
        input_gates_(
            gate_rows<S>(p.projection.w_ih, p.hidden, p.projection.input, p.reset_before ? 2 : 3),
            static_cast<const S*>(p.gates_x), 3 * p.hidden, p.threads, steps, split(), arena,
            p.projection.b_ih, p.b_hh, 2, !p.reset_before, of_n(p.b_hh, 1)),
        gates_(gate_rows<S>(p.w_hh, p.hidden, p.hidden, p.reset_before ? 2 : 3)) {
    gates_.reserve(arena, packing(gates_, p.seq), p.threads);
    if (p.reset_before) {
      const int64_t parts = split().unit_groups;
      candidate_ = plain_rows<S>(of_n(p.w_hh, p.hidden), p.hidden, p.hidden, parts);
      candidate_.reserve(arena, packing(candidate_, p.seq), p.threads);
      input_candidate_.emplace(plain_rows<S>(of_n(p.projection.w_ih, p.projection.input), p.hidden,
                                             p.projection.input, parts),
                               of_n(p.gates_x, 1), 3 * p.hidden, p.threads, steps, split(), arena,
                               of_n(p.projection.b_ih, 1), of_n(p.b_hh, 1));
      rh_ = arena.take<X>(p.seq.batch * ld_);
      z_ = arena.take<T>(p.seq.batch * ld_);
    }
    for (T*& h : h_) h = arena.take<T>(p.seq.batch * ld_);
    for (int i = 0; i < 2; ++i) x_[i] = operand(h_[i], arena);
  }

  Split split() const {
    const int64_t input = p_.gates_x ? 0 : 3 * p_.hidden * p_.projection.input;
    const int64_t recurrent = 3 * p_.hidden * p_.hidden;
    return choose_split<S>(p_.threads, p_.seq, recurrent, input);
  }

  void run(const Place& place) {
    place.map(static_cast<S*>(p_.saved),
              steps.total_rows() * (p_.reset_before ? 3 : 4) * p_.hidden);
    place.map(static_cast<S*>(p_.output), steps.total_rows() * p_.hidden);
    input_gates_.pack(place);
    gates_.pack(place);
    if (p_.reset_before) {
      input_candidate_->pack(place);
      candidate_.pack(place);
    }
    const Range mine = place.everything(steps.batch());
    for (T* h : h_) copy_rows<S>(p_.h0, p_.hidden, mine, h, ld_);
    if (kPairs<S>)
      for (X* x : x_) copy_operand<S>(p_.h0, p_.hidden, mine, x, ld_);
    if (p_.reset_before) clear_operand<S>(mine, rh_, ld_);
    place.meet_all();
    Chunk<S> chunk;
    alignas(64) T input_part[kRowsAtOnce * 4 * L];
    for (int64_t s = 0; s < steps.count(); ++s) {
      if (s == chunk.end) {
        input_.next(steps, place, s, chunk);
        input_gates_.compute(place, chunk);
        if (p_.reset_before) input_candidate_->compute(place, chunk);
      }
      const int64_t t = steps.forward_step(s), start = steps.start(t);
      const int64_t ahead = steps.ahead_in_forward(s);
      const Range rows = clip(place.rows, 0, steps.rows(t));
      const int64_t ending = steps.first_ending_row(s);
      const T* h_in = h_[s & 1];
      const X* x_in = x_[s & 1];
      T* h_out = h_[(s + 1) & 1];
      X* x_out = x_[(s + 1) & 1];
      const auto input_of = [&](const InputGates<S>& part) {
        return [&](int64_t block, int64_t row, int count) {
          return part.start(steps, place, chunk, s, block, row, count, input_part);
        };
      };
      if (!p_.reset_before) {
        for_each_gates(gates_, place, rows, s & 1, x_in, ld_, input_of(input_gates_),
                       [&](int64_t row, int64_t unit, int64_t lanes, const T* sums, const T* from) {
                         reset_after(start + row, ahead, row, unit, lanes, sums, load(from + 3 * L),
                                     h_in, h_out, x_out, row >= ending);
                       });
      } else {
        for_each_gates(gates_, place, rows, s & 1, x_in, ld_, input_of(input_gates_),
                       [&](int64_t row, int64_t unit, int64_t lanes, const T* sums, const T*) {
                         reset_before(start + row, ahead, row, unit, lanes, sums, h_in);
                       });
        place.meet_rows();
        for_each_output(candidate_, place, rows, s & 1, rh_, ld_, input_of(*input_candidate_),
                        [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                          finish_reset_before(start + row, row, unit, lanes, load(sums), h_in,
                                              h_out, x_out, row >= ending);
                        });
      }
      place.meet_rows();
      place.publish(s + 1);
    }
  }

 private:
  // n's rows of a [3H, width] matrix, or null.
  const S* of_n(const void* weights, int64_t width) const {
    return weights ? static_cast<const S*>(weights) + 2 * p_.hidden * width : nullptr;
  }

  S* saved(int64_t index, int64_t unit) const {
    return static_cast<S*>(p_.saved) + index * (p_.reset_before ? 3 : 4) * p_.hidden + unit;
  }

  RNNLM_INLINE void reset_after(int64_t index, int64_t ahead, int64_t row, int64_t unit,
                                int64_t lanes, const T* sums, V x_n, const T* h_in, T* h_out,
                                X* x_out, bool ending) {
    const int64_t H = p_.hidden;
    const V a_r = load(sums), a_z = load(sums + L), hn = load(sums + 2 * L);
    const V r = M::sigmoid(a_r), z = M::sigmoid(a_z);
    const V a_n = M::fma(r, hn, x_n);
    const V n = M::tanh(a_n);
    if (p_.saved) {
      S* out = saved(index, unit);
      prefetch<4, true>(out + ahead * 4 * H, H * int64_t(sizeof(S)));
      store_flushing(out, kSavesPreactivations<S> ? a_r : r, lanes);
      store_flushing(out + H, kSavesPreactivations<S> ? a_z : z, lanes);
      store_flushing(out + 2 * H, kSavesPreactivations<S> ? a_n : n, lanes);
      store_flushing(out + 3 * H, hn, lanes);
    }
    emit_h(index, row, unit, lanes, z, n, h_in, h_out, x_out, ending);
  }

  RNNLM_INLINE void reset_before(int64_t index, int64_t ahead, int64_t row, int64_t unit,
                                 int64_t lanes, const T* sums, const T* h_in) {
    const int64_t H = p_.hidden, at = row * ld_ + unit;
    const V a_r = load(sums), a_z = load(sums + L);
    const V r = M::sigmoid(a_r), z = M::sigmoid(a_z);
    store_flushing(rh_ + at, r * load(h_in + at), L);
    store(z_ + at, z);
    if (p_.saved) {
      S* out = saved(index, unit);
      prefetch<3, true>(out + ahead * 3 * H, H * int64_t(sizeof(S)));
      store_flushing(out, kSavesPreactivations<S> ? a_r : r, lanes);
      store_flushing(out + H, kSavesPreactivations<S> ? a_z : z, lanes);
    }
  }

  RNNLM_INLINE void finish_reset_before(int64_t index, int64_t row, int64_t unit, int64_t lanes,
                                        V a_n, const T* h_in, T* h_out, X* x_out, bool ending) {
    const V n = M::tanh(a_n);
    if (p_.saved)
      store_flushing(saved(index, unit) + 2 * p_.hidden, kSavesPreactivations<S> ? a_n : n, lanes);
    emit_h(index, row, unit, lanes, load(z_ + row * ld_ + unit), n, h_in, h_out, x_out, ending);
  }

  RNNLM_INLINE void emit_h(int64_t index, int64_t row, int64_t unit, int64_t lanes, V z, V n,
                           const T* h_in, T* h_out, X* x_out, bool ending) {
    const V h = gru_update<M>(z, n, load(h_in + row * ld_ + unit));
    store(h_out + row * ld_ + unit, h);
    if constexpr (kPairs<S>) store_flushing(x_out + row * ld_ + unit, h, L);
    store(static_cast<S*>(p_.output) + index * p_.hidden + unit, h, lanes);
    if (ending) store(static_cast<S*>(p_.h_n) + row * p_.hidden + unit, h, lanes);
  }

  // Where a product reads h from: a copy, or h itself.
  X* operand([[maybe_unused]] T* h, [[maybe_unused]] Arena& arena) const {
    if constexpr (kPairs<S>)
      return arena.take<X>(p_.seq.batch * ld_);
    else
      return h;
  }

  GruForward p_;
  int64_t ld_;
  Input<S> input_;
  InputGates<S> input_gates_;                     // of gates_
  std::optional<InputGates<S>> input_candidate_;  // of candidate_
  Weights<S> gates_;                              // r, z and, for reset-after, n
  Weights<S> candidate_;                          // n, for reset-before
  T* h_[2];
  X* x_[2];
  X* rh_ = nullptr;  // [B, H]: r * h of this step
  T* z_ = nullptr;
};

template <class S>
class GruBackwardTask {
  using T = Arithmetic<S>;
  using X = Operand<S>;
  using M = MathOf<S>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

 public:
  Steps steps;

  GruBackwardTask(const GruBackward& p, Arena& arena)
      : steps(p.seq, arena),
        p_(p),
        wants_initial_(p.dh0 != nullptr),
        ld_(operand_ld<S>(p.hidden)),
        depth_((p.reset_before ? 2 : 3) * p.hidden),
        gate_ld_(operand_ld<S>(depth_)),
        recurrent_(columns<S>(p.w_hh, p.hidden, depth_, split().unit_groups)),
        candidate_(columns<S>(static_cast<const S*>(p.w_hh) + 2 * p.hidden * p.hidden, p.hidden,
                              p.hidden, split().unit_groups)) {
    recurrent_.reserve(arena, packing(recurrent_, p.seq), p.threads);
    if (p.reset_before) {
      candidate_.reserve(arena, packing(candidate_, p.seq), p.threads);
      da_n_ = arena.take<X>(p.seq.batch * ld_);
    }
    for (X*& d : dgates_) d = arena.take<X>(p.seq.batch * gate_ld_);
    direct_ = arena.take<T>(p.seq.batch * ld_);
  }

  Split split() const {
    const int64_t weights = 3 * p_.hidden * p_.hidden;
    return choose_split<S>(p_.threads, p_.seq, weights);
  }

  void run(const Place& place) {
    place.map(static_cast<S*>(p_.dgates), steps.total_rows() * 3 * p_.hidden);
    place.map(static_cast<S*>(p_.candidate), steps.total_rows() * p_.hidden);
    recurrent_.pack(place);
    if (p_.reset_before) candidate_.pack(place);
    const Range mine = place.everything(steps.batch());
    for (X* d : dgates_) clear_operand<S>(mine, d, gate_ld_);
    if (p_.reset_before) clear_operand<S>(mine, da_n_, ld_);
    place.meet_all();
    int64_t next_rows = 0;
    for (int64_t s = 0; s <= steps.count(); ++s) {
      // See LstmBackwardTask::run.
      const bool last = s == steps.count();
      if (last && !wants_initial_) break;
      const int64_t t = last ? 0 : steps.backward_step(s);
      const int64_t rows = last ? 0 : steps.rows(t), ahead = steps.ahead_in_backward(s);
      const X* next = dgates_[s & 1];
      X* own = dgates_[(s + 1) & 1];

      for_each_output(recurrent_, place, clip(place.rows, 0, min64(rows, next_rows)), s & 1, next,
                      gate_ld_, [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                        prefetch_inputs(steps.start(t) + row, ahead, unit);
                        step(t, row, unit, lanes, load(sums) + load(direct_ + row * ld_ + unit),
                             own);
                      });
      for_each_unit(recurrent_, place, clip(place.rows, next_rows, rows),
                    [&](int64_t row, int64_t unit, int64_t lanes) {
                      const S* grad = static_cast<const S*>(p_.grad_h_n);
                      step(t, row, unit, lanes,
                           grad ? load(grad + row * p_.hidden + unit, lanes) : V{}, own);
                    });
      const Range done = wants_initial_ ? clip(place.rows, rows, next_rows) : Range{0, 0};
      for_each_output(recurrent_, place, done, s & 1, next, gate_ld_,
                      [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                        store(static_cast<S*>(p_.dh0) + row * p_.hidden + unit,
                              load(sums) + load(direct_ + row * ld_ + unit), lanes);
                      });
      if (p_.reset_before) {
        place.meet_rows();
        for_each_output(candidate_, place, clip(place.rows, 0, rows), s & 1, da_n_, ld_,
                        [&](int64_t row, int64_t unit, int64_t lanes, const T* sums) {
                          finish_reset_before(t, row, unit, lanes, load(sums), own);
                        });
      }
      place.meet_rows();
      next_rows = rows;
    }
  }

 private:
  struct Saved {
    V r, z, n, hn;
  };

  // Of the next step; of h the one before it.
  RNNLM_INLINE void prefetch_inputs(int64_t here, int64_t ahead, int64_t unit) const {
    const int64_t H = p_.hidden, bytes = H * int64_t(sizeof(S)), index = here + ahead;
    prefetch<1>(static_cast<const S*>(p_.output) + (index + ahead) * H + unit, 0);
    if (p_.reset_before)
      prefetch<3>(static_cast<const S*>(p_.saved) + index * 3 * H + unit, bytes);
    else
      prefetch<4>(static_cast<const S*>(p_.saved) + index * 4 * H + unit, bytes);
    if (p_.grad_output) prefetch<1>(static_cast<const S*>(p_.grad_output) + index * H + unit, 0);
    prefetch<3, true>(static_cast<S*>(p_.dgates) + index * 3 * H + unit, bytes);
    prefetch<1, true>(static_cast<S*>(p_.candidate) + index * H + unit, 0);
  }

  RNNLM_INLINE Saved load_saved(int64_t index, int64_t unit, int64_t lanes) const {
    const int64_t H = p_.hidden;
    const S* in = static_cast<const S*>(p_.saved) + index * (p_.reset_before ? 3 : 4) * H + unit;
    Saved y = {load(in, lanes), load(in + H, lanes), load(in + 2 * H, lanes),
               p_.reset_before ? V{} : load(in + 3 * H, lanes)};
    if (kSavesPreactivations<S>) {
      y.r = M::sigmoid(y.r);
      y.z = M::sigmoid(y.z);
      y.n = M::tanh(y.n);
    }
    return y;
  }

  RNNLM_INLINE V h_prev(int64_t t, int64_t row, int64_t unit, int64_t lanes) const {
    const int64_t before = steps.previous(t, row);
    const S* from = before < 0 ? static_cast<const S*>(p_.h0) + row * p_.hidden
                               : static_cast<const S*>(p_.output) + before * p_.hidden;
    return load(from + unit, lanes);
  }

  RNNLM_INLINE void step(int64_t t, int64_t row, int64_t unit, int64_t lanes, V dh, X* own) {
    const int64_t H = p_.hidden, index = steps.start(t) + row;
    const Saved y = load_saved(index, unit, lanes);
    const V h = h_prev(t, row, unit, lanes);
    if (p_.grad_output)
      dh = dh + load(static_cast<const S*>(p_.grad_output) + index * H + unit, lanes);
    const GruUpdateGrad<V> d = gru_update_backward<M>(y.z, y.n, h, dh);
    store(direct_ + row * ld_ + unit, d.h_direct);
    S* out = static_cast<S*>(p_.dgates) + index * 3 * H + unit;
    X* scratch = own + row * gate_ld_ + unit;
    store_flushing(out + H, d.a_z, lanes);
    store_flushing(scratch + H, d.a_z, lanes);
    store_flushing(out + 2 * H, d.a_n, lanes);
    if (p_.reset_before) {
      store_flushing(da_n_ + row * ld_ + unit, d.a_n, L);
      return;
    }
    const GruAfterGrad<V> a = gru_reset_after_backward<M>(y.r, y.hn, d.a_n);
    store_flushing(out, a.a_r, lanes);
    store_flushing(scratch, a.a_r, lanes);
    store_flushing(scratch + 2 * H, a.d_hn, lanes);
    store_flushing(static_cast<S*>(p_.candidate) + index * H + unit, a.d_hn, lanes);
  }

  RNNLM_INLINE void finish_reset_before(int64_t t, int64_t row, int64_t unit, int64_t lanes, V d_rh,
                                        X* own) {
    const int64_t H = p_.hidden, index = steps.start(t) + row;
    const V h = h_prev(t, row, unit, lanes);
    V r = load(static_cast<const S*>(p_.saved) + index * 3 * H + unit, lanes);
    if (kSavesPreactivations<S>) r = M::sigmoid(r);
    const GruBeforeGrad<V> b = gru_reset_before_backward<M>(r, h, d_rh);
    T* direct = direct_ + row * ld_ + unit;
    store(direct, load(direct) + b.h_direct);
    store_flushing(static_cast<S*>(p_.dgates) + index * 3 * H + unit, b.a_r, lanes);
    store_flushing(own + row * gate_ld_ + unit, b.a_r, lanes);
    store_flushing(static_cast<S*>(p_.candidate) + index * H + unit, r * h, lanes);
  }

  GruBackward p_;
  bool wants_initial_;  // dh0
  int64_t ld_, depth_, gate_ld_;
  Weights<S> recurrent_;  // r, z and, for reset-after, n
  Weights<S> candidate_;  // n, for reset-before
  X* dgates_[2];          // [B, depth]: gradients that the recurrent product is taken with
  T* direct_;             // [B, H]: gradient of h that does not pass through recurrent_
  X* da_n_ = nullptr;     // [B, H]: gradient of n's pre-activation, for reset-before
};

// --- entry points --------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
}  // namespace

#define RNNLM_STRING(x) #x
#define RNNLM_NAME(x) RNNLM_STRING(x)
Kernels kernels() {
  Kernels k = avx512::kernels();
  k.isa = RNNLM_NAME(RNNLM_ISA);
  k.linear = linear;
  k.layer_gradients = layer_gradients;
  k.lstm_forward = [](const LstmForward* problems, int count) {
    return dispatch<LstmForwardTask>(problems, count, avx512::kernels().lstm_forward);
  };
  k.lstm_backward = [](const LstmBackward* problems, int count) {
    return dispatch<LstmBackwardTask>(problems, count, avx512::kernels().lstm_backward);
  };
  k.gru_forward = [](const GruForward* problems, int count) {
    return dispatch<GruForwardTask>(problems, count, avx512::kernels().gru_forward);
  };
  k.gru_backward = [](const GruBackward* problems, int count) {
    return dispatch<GruBackwardTask>(problems, count, avx512::kernels().gru_backward);
  };
  return k;
}

#else
template <class T>
void elementwise(int function, int64_t n, const T* x, T* y) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < n; i += L) {
    const Vec<T> v = load(x + i, n - i);
    store(y + i,
          function == 0   ? exp<T>(v)
          : function == 1 ? Math<T>::sigmoid(v)
                          : Math<T>::tanh(v),
          n - i);
  }
}

}  // namespace

Kernels kernels() {
#define RNNLM_STRING(x) #x
#define RNNLM_NAME(x) RNNLM_STRING(x)
  return {RNNLM_NAME(RNNLM_ISA),
          dispatch<LstmForwardTask, LstmForward>,
          dispatch<LstmBackwardTask, LstmBackward>,
          dispatch<GruForwardTask, GruForward>,
          dispatch<GruBackwardTask, GruBackward>,
          linear,
          layer_gradients,
          cross_entropy,
          dropout,
          [](int function, DType dtype, int64_t n, const void* x, void* y) {
            if (dtype == DType::f64)
              elementwise(function, n, static_cast<const double*>(x), static_cast<double*>(y));
            else
              elementwise(function, n, static_cast<const float*>(x), static_cast<float*>(y));
          }};
}

#endif

}  // namespace rnnlm::cpu::RNNLM_ISA
