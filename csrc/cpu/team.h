// How a call is run by a team of threads: its workspace, which rows take part in which step, who
// does what, and the run itself, of one problem or of several.
#pragma once

#include <new>
#include <type_traits>

#include "core/params.h"
#include "kernels.h"
#include "parallel.h"
#include "product.h"

namespace rnnlm::cpu::RNNLM_ISA {

// Hands out pieces of the workspace. Run once on null to learn the size, once to get the pointers.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Range {
  int64_t begin, end;
};

inline Range share(int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

inline Range clip(Range range, int64_t begin, int64_t end) {
  begin = max64(range.begin, begin);
  return {begin, max64(begin, min64(range.end, end))};
}

// The sequence with the start of each step worked out.
class Steps {
 public:
  Steps() = default;
  Steps(const Sequence& seq, Arena& arena)
      : seq_(seq), starts_(seq.batch_sizes ? arena.take<int64_t>(seq.steps) : nullptr) {}

  void fill() {
    if (!starts_) return;
    int64_t start = 0;
    for (int64_t t = 0; t < seq_.steps; ++t) {
      starts_[t] = start;
      start += seq_.batch_sizes[t];
    }
  }
  const Sequence& sequence() const { return seq_; }
  int64_t count() const { return seq_.steps; }
  int64_t batch() const { return seq_.batch; }
  bool reverse() const { return seq_.reverse; }
  // Of a group of rows, of which there are `groups`; and how many one has at most.
  Range rows_of_group(int group, int groups) const {
    if (!seq_.batch_sizes) return share(seq_.batch, group, groups);
    const Rows rows = cpu::rows_of_group(seq_.batch_sizes, seq_.steps, seq_.batch, group, groups);
    return {rows.begin, rows.end};
  }
  int64_t most_rows_of_group(int groups) const {
    return seq_.batch_sizes ? cpu::most_rows_of_group(seq_.batch, groups)
                            : ceil_div(seq_.batch, groups);
  }
  int64_t rows(int64_t t) const { return seq_.batch_sizes ? seq_.batch_sizes[t] : seq_.batch; }
  int64_t start(int64_t t) const { return starts_ ? starts_[t] : t * seq_.batch; }
  int64_t total_rows() const { return start(seq_.steps - 1) + rows(seq_.steps - 1); }
  // The step that the s-th iteration of forward (backward) computes.
  int64_t forward_step(int64_t s) const { return seq_.reverse ? seq_.steps - 1 - s : s; }
  int64_t backward_step(int64_t s) const { return seq_.reverse ? s : seq_.steps - 1 - s; }
  // How far ahead of iteration s the rows of the next one lie.
  int64_t ahead_in_forward(int64_t s) const {
    return s + 1 < seq_.steps ? start(forward_step(s + 1)) - start(forward_step(s)) : 0;
  }
  int64_t ahead_in_backward(int64_t s) const {
    return s + 1 < seq_.steps ? start(backward_step(s + 1)) - start(backward_step(s)) : 0;
  }
  // Rows from this one on have their last forward step at iteration s.
  int64_t first_ending_row(int64_t s) const {
    if (s + 1 == seq_.steps) return 0;
    return seq_.reverse ? rows(forward_step(s)) : rows(s + 1);
  }
  // Index of the state of `row` before step t, or -1 if that is the initial state.
  RNNLM_INLINE int64_t previous(int64_t t, int64_t row) const {
    const int64_t before = seq_.reverse ? t + 1 : t - 1;
    if (before < 0 || before >= seq_.steps || row >= rows(before)) return -1;
    return start(before) + row;
  }

 private:
  Sequence seq_{};
  int64_t* starts_ = nullptr;
};

// How a team divides the work: row groups times unit groups.
struct Split {
  int row_groups = 1, unit_groups = 1;
  Demand demand{};  // `threads` and what else `side_by_side` asks for
  int threads() const { return row_groups * unit_groups; }
};

constexpr int64_t kStepWork = 20'000;          // multiply-adds a step that make a barrier worth it
constexpr int64_t kCachedWeights = 1'000'000;  // bytes of weights that a core keeps at hand
// Up to so many bytes come from the cache that AMD's cores share as fast as a core multiplies so
// many rows with them (docs/performance-log.md; not measured on others). Threads that share rows
// wait for each other in every step: long where their cores are far apart, and for time slices
// where another process takes one.
template <class S>
constexpr int64_t kStreamedWeights = kPairs<S> ? 0 : 8'000'000;
constexpr int64_t kRowsToStream = 8;

// `recurrent` and `input`: weights that a row is multiplied with in a step; a thread reads the
// former again every step, the latter every few.
template <class S>
Split choose_split(int threads, const Sequence& seq, int64_t recurrent, int64_t input = 0) {
  const int64_t batch = seq.batch, weights = recurrent + input, bytes = sizeof(Operand<S>);
  const int64_t weight_bytes = recurrent * bytes, work = seq.steps * batch * weights;
  threads = int(max64(1, min64(threads, work / kThreadWork)));
  Split split;
  // A single step reads every weight once, wherever it is.
  int64_t units = threads;
  if (seq.steps > 1) units = min64(units, ceil_div(weight_bytes, kCachedWeights));
  if (seq.steps > 1 && batch > 0 && weight_bytes <= kStreamedWeights<S> && is_amd())
    units = min64(units, ceil_div(kRowsToStream * threads, batch));
  split.row_groups = int(max64(1, min64(threads / units, batch)));
  split.unit_groups = threads / split.row_groups;
  if (batch * weights / split.threads() < kStepWork) split.unit_groups = 1;
  const auto caches = [](int64_t bytes) {
    return max64(1, (bytes + kCachedWeights / 2) / kCachedWeights);
  };
  split.demand = {split.threads(), caches(weight_bytes), work, caches(weights * bytes)};
  return split;
}

// Same split for the team that really came, which may be smaller.
inline Split shrink(Split split, int threads) {
  if (threads >= split.threads()) return split;
  return split.unit_groups == 1 ? Split{threads, 1} : Split{1, threads};
}

// Asks for some pieces of a row that will be read, or written, a step later. The pieces of one
// block of units are too far apart for the CPU to guess the next.
template <int count, bool written = false>
RNNLM_INLINE void prefetch(const void* row, int64_t bytes_apart) {
  for (int i = 0; i < count; ++i)
    __builtin_prefetch(static_cast<const char*>(row) + i * bytes_apart, written);
}

// The problem that writes another's input at the same time: how far its groups of rows have come.
struct Leader {
  const Progress* groups = nullptr;
  int count = 0;
  void await(int64_t iterations) const {
    for (int i = 0; i < count; ++i) groups[i].await(iterations);
  }
};

// A thread's place in its team.
struct Place {
  int thread, threads;
  Split split;
  Range rows;
  int row_group, unit_group;
  Barrier* all;
  Barrier* rows_barrier;
  Progress* progress;
  Handout* handout;
  Leader leader;
  int64_t steps_at_once;  // that the input is projected for, at most
  Tiles* tiles;

  bool idle() const { return thread >= split.threads(); }
  Range blocks(int64_t count) const { return share(count, unit_group, split.unit_groups); }
  Range everything(int64_t count) const { return share(count, thread, split.threads()); }
  // As if each of `count` blocks had a thread of its own, and this were that of `block`.
  Place only(int64_t block, int64_t count) const {
    Place place = *this;
    place.unit_group = int(block);
    place.split.unit_groups = int(count);
    return place;
  }
  // The next piece of work that all share, see Handout.
  Range take(int64_t end, int64_t most, int64_t unit = 1) const {
    const Handout::Piece piece = handout->take(end, most, unit, split.threads());
    return {piece.begin, piece.end};
  }
  // Memory that the team is going to write, `count` numbers.
  template <class T>
  void map(T* memory, int64_t count) const {
    map_pages(memory, count * int64_t(sizeof(T)), thread, split.threads());
  }
  void meet_all() const { all->wait(split.threads()); }
  void meet_rows() const { rows_barrier->wait(split.unit_groups); }
  // Having met, the threads of these rows have written the output of so many iterations.
  void publish(int64_t iterations) const {
    if (unit_group == 0) progress->publish(iterations);
  }
};

// Whether a problem's input is what the one before it in the call writes.
template <class Params>
bool follows(const Params&) {
  return false;
}
inline bool follows(const LstmForward& problem) {
  return problem.projection.follows;
}
inline bool follows(const GruForward& problem) {
  return problem.projection.follows;
}

// A problem with its part of the workspace. A task has Task(const Params&, Arena&), split(), and
// run(const Place&).
template <class Task>
struct Prepared {
  static constexpr int64_t kMaxGroups = 256;
  Barrier* barriers;   // for all threads, then for each group of rows
  Progress* progress;  // of each group of rows
  Handout* handout;
  Task task;
  Split split;
  bool follower;

  template <class Params>
  Prepared(const Params& params, Arena& arena)
      : barriers(arena.take<Barrier>(1 + kMaxGroups)),
        progress(arena.take<Progress>(kMaxGroups)),
        handout(arena.take<Handout>(1)),
        task(params, arena),
        split(task.split()),
        follower(follows(params)) {
    split.row_groups = int(min64(split.row_groups, kMaxGroups));
  }

  void start() {
    __builtin_memset(static_cast<void*>(barriers), 0,
                     sizeof(Barrier) * size_t(1 + split.row_groups));
    __builtin_memset(static_cast<void*>(progress), 0, sizeof(Progress) * size_t(split.row_groups));
    __builtin_memset(static_cast<void*>(handout), 0, sizeof(Handout));
    task.steps.fill();
  }
  // What the thread with this number among `threads` does.
  void run(int thread, int threads, Leader leader, int64_t steps_at_once) {
    Place place;
    place.thread = thread;
    place.threads = threads;
    place.split = shrink(split, threads);
    if (place.idle()) return;
    place.row_group = thread / place.split.unit_groups;
    place.unit_group = thread % place.split.unit_groups;
    place.rows = task.steps.rows_of_group(place.row_group, place.split.row_groups);
    place.all = barriers;
    place.rows_barrier = barriers + 1 + place.row_group;
    place.progress = progress + place.row_group;
    place.handout = handout;
    place.leader = leader;
    place.steps_at_once = steps_at_once;
    Tiles tiles;
    place.tiles = &tiles;
    task.run(place);
  }
  Leader as_leader(int threads) const { return {progress, shrink(split, threads).row_groups}; }
};

// Runs problems in one team, as many at a time as there are crews: number i is crew i % crews',
// which takes up one after the other. Who follows waits only for problems before its own, so that
// there is always somebody who can go on. Threads that are through with a problem go on to the
// next: there is nothing to wait for.
template <class Task>
struct Together {
  static constexpr int kMaxCrews = 8;
  Prepared<Task>* problems;
  int count, crews;

  // Fills in what each crew has a use for; returns the sum.
  int ask(int* threads) const {
    int sum = 0;
    for (int k = 0; k < crews; ++k) {
      threads[k] = 0;
      for (int i = k; i < count; i += crews)
        threads[k] = int(max64(threads[k], problems[i].split.threads()));
      sum += threads[k];
    }
    return sum;
  }
  void run(int thread, int came) const {
    int asked[kMaxCrews];
    Crew crew[kMaxCrews];
    ask(asked);
    divide(came, asked, crews, crew);
    const bool stacked = count > 1 && problems[1].follower;
    const int64_t steps_at_once = stacked ? kStepsBehind : INT64_MAX;
    for (int i = 0; i < count; ++i) {
      const Crew own = crew[i % crews];
      const int member = thread - own.begin;
      if (member < 0 || member >= own.size) continue;
      Leader leader;
      if (stacked && i > 0) leader = problems[i - 1].as_leader(crew[(i - 1) % crews].size);
      problems[i].run(member, own.size, leader, steps_at_once);
    }
  }
  void start() {
    for (int i = 0; i < count; ++i) problems[i].start();
    int asked[kMaxCrews];
    parallel(
        ask(asked),
        [](void* data, int thread, int came) {
          static_cast<const Together*>(data)->run(thread, came);
        },
        this);
  }
};

// How many problems of a call run at a time.
template <class Task, class Params>
int choose_crews(const Params* problems, int count) {
  if (count == 1) return 1;
  Arena none(nullptr);
  const auto demand = [&](int i) { return Prepared<Task>(problems[i], none).split.demand; };
  const int threads = problems->threads;
  if (!follows(problems[1])) return side_by_side(threads, demand(0), demand(1)) ? 2 : 1;
  Demand most = demand(0);
  for (int i = 1; i < count; ++i) {
    const Demand d = demand(i);
    most = {int(max64(most.threads, d.threads)), max64(most.caches, d.caches),
            min64(most.work, d.work), max64(most.caches_with_input, d.caches_with_input)};
  }
  const int64_t steps = Prepared<Task>(*problems, none).task.steps.count();
  const int crews = layers_at_once(threads, count, steps, most);
  return int(min64(crews, Together<Task>::kMaxCrews));
}

template <class Task, class Params>
Result run(const Params* problems, int count) {
  const int crews = choose_crews<Task>(problems, count);
  if (count > 1 && crews == 1 && follows(problems[1])) {  // In turn they use the same workspace.
    for (int i = 0; i < count; ++i)
      if (const Result result = run<Task>(problems + i, 1); result != Result::ok) return result;
    return Result::ok;
  }
  const auto lay_out = [&](Arena& arena) {
    auto* prepared = arena.take<Prepared<Task>>(count);
    for (int i = 0; i < count; ++i) {
      Params params = problems[i];
      params.threads /= crews;
      if (prepared)
        new (prepared + i) Prepared<Task>(params, arena);  // may point to itself: never copied
      else
        Prepared<Task>(params, arena);
    }
    return prepared;
  };
  static_assert(std::is_trivially_destructible_v<Prepared<Task>>);
  Arena sizing(nullptr);
  lay_out(sizing);
  void* memory = workspace(size_t(sizing.used()));
  if (!memory) return Result::out_of_memory;
  Arena arena(memory);
  Together<Task>{lay_out(arena), count, crews}.start();
  return Result::ok;
}

// Runs a task of the dtype that the problems have.
#if defined(__AVX512BF16__)
// Only bfloat16 is any different from AVX-512's: `other` is for the other dtypes.
template <template <class> class Task, class Params>
Result dispatch(const Params* problems, int count, LayerKernel<Params> other) {
  if (problems->dtype == DType::bf16) return run<Task<bf16>>(problems, count);
  return other(problems, count);
}
#else
template <template <class> class Task, class Params>
Result dispatch(const Params* problems, int count) {
  switch (problems->dtype) {
    case DType::f64:
      return run<Task<double>>(problems, count);
    case DType::bf16:
      return run<Task<bf16>>(problems, count);
    case DType::f16:
      return run<Task<f16>>(problems, count);
    case DType::f32:
      break;
  }
  return run<Task<float>>(problems, count);
}
#endif

}  // namespace rnnlm::cpu::RNNLM_ISA
