// How a call is run by a team of threads: its workspace, which rows take part in which step, who
// does what, and the run itself, of one problem or of two.
#pragma once

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
  int64_t previous(int64_t t, int64_t row) const {
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

// `weights`: multiply-adds per row and step; `weight_bytes`: what a thread reads again every step.
inline Split choose_split(int threads, int64_t steps, int64_t batch, int64_t weights,
                          int64_t weight_bytes) {
  const int64_t work = steps * batch * weights;
  threads = int(max64(1, min64(threads, work / kThreadWork)));
  Split split;
  // A single step reads every weight once, wherever it is.
  const int64_t units =
      steps == 1 ? threads : min64(threads, ceil_div(weight_bytes, kCachedWeights));
  split.row_groups = int(max64(1, min64(threads / units, batch)));
  split.unit_groups = threads / split.row_groups;
  if (batch * weights / split.threads() < kStepWork) split.unit_groups = 1;
  const int64_t caches = max64(1, (weight_bytes + kCachedWeights / 2) / kCachedWeights);
  split.demand = {split.threads(), caches, work};
  return split;
}

// Same split for the team that really came, which may be smaller.
inline Split shrink(Split split, int threads) {
  if (threads >= split.threads()) return split;
  return split.unit_groups == 1 ? Split{threads, 1} : Split{1, threads};
}

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

// Asks for some pieces of a row that will be read, or written, a step later. The pieces of one
// block of units are too far apart for the CPU to guess the next.
template <int count, bool written = false>
RNNLM_INLINE void prefetch(const void* row, int64_t bytes_apart) {
  for (int i = 0; i < count; ++i)
    __builtin_prefetch(static_cast<const char*>(row) + i * bytes_apart, written);
}

// A thread's place in its team.
struct Place {
  int thread, threads;
  Split split;
  Range rows;
  int row_group, unit_group;
  Barrier* all;
  Barrier* rows_barrier;
  Tiles* tiles;

  bool idle() const { return thread >= split.threads(); }
  Range blocks(int64_t count) const { return share(count, unit_group, split.unit_groups); }
  Range everything(int64_t count) const { return share(count, thread, split.threads()); }
  // Memory that the team is going to write, `count` numbers.
  template <class T>
  void map(T* memory, int64_t count) const {
    map_pages(memory, count * int64_t(sizeof(T)), thread, split.threads());
  }
  void meet_all() const { all->wait(split.threads()); }
  void meet_rows() const { rows_barrier->wait(split.unit_groups); }
};

// A problem with its part of the workspace. A task has Task(const Params&, Arena&), split(), and
// run(const Place&).
template <class Task>
struct Prepared {
  static constexpr int64_t kMaxGroups = 256;
  Barrier* barriers;  // for all threads, then for each group of rows
  Task task;
  Split split;

  template <class Params>
  Prepared(const Params& params, Arena& arena)
      : barriers(arena.take<Barrier>(1 + kMaxGroups)), task(params, arena), split(task.split()) {
    split.row_groups = int(min64(split.row_groups, kMaxGroups));
  }

  void start() {
    __builtin_memset(static_cast<void*>(barriers), 0,
                     sizeof(Barrier) * size_t(1 + split.row_groups));
    task.steps.fill();
  }
  // What the thread with this number among `threads` does.
  void run(int thread, int threads) {
    Place place;
    place.thread = thread;
    place.threads = threads;
    place.split = shrink(split, threads);
    if (place.idle()) return;
    place.row_group = thread / place.split.unit_groups;
    place.unit_group = thread % place.split.unit_groups;
    place.rows = share(task.steps.batch(), place.row_group, place.split.row_groups);
    place.all = barriers;
    place.rows_barrier = barriers + 1 + place.row_group;
    Tiles tiles;
    place.tiles = &tiles;
    task.run(place);
  }
};

// Runs one problem or two in one team: side by side, or one after the other. In the latter case
// threads that are through with the first go on to the second: there is nothing to wait for.
template <class Task>
struct Together {
  Prepared<Task>* problems[2];
  int count;
  bool apart;

  int crew(int i) const { return problems[i]->split.threads(); }
  void run(int thread, int came) const {
    Crew crews[2] = {{0, came}, {0, came}};
    if (apart) divide(came, crew(0), crew(1), crews);
    for (int i = 0; i < count; ++i) {
      const int member = thread - crews[i].begin;
      if (member >= 0 && member < crews[i].size) problems[i]->run(member, crews[i].size);
    }
  }
  void start() {
    int threads = 0;
    for (int i = 0; i < count; ++i) {
      problems[i]->start();
      threads = int(apart ? threads + crew(i) : max64(threads, crew(i)));
    }
    parallel(
        threads,
        [](void* data, int thread, int came) {
          static_cast<const Together*>(data)->run(thread, came);
        },
        this);
  }
};

template <class Task, class Params>
Result run(const Params* problems, int count) {
  Params own[2] = {problems[0], problems[count - 1]};
  bool apart = false;
  if (count == 2) {
    Arena none(nullptr);
    const auto demand = [&](int i) { return Prepared<Task>(own[i], none).split.demand; };
    apart = side_by_side(problems->threads, demand(0), demand(1));
    for (Params& params : own) params.threads /= apart ? 2 : 1;
  }
  Arena sizing(nullptr);
  for (int i = 0; i < count; ++i) Prepared<Task>(own[i], sizing);
  void* memory = workspace(size_t(sizing.used()));
  if (!memory) return Result::out_of_memory;
  Arena arena(memory);
  Prepared<Task> first(own[0], arena);
  if (count == 1) {
    Together<Task>{{&first, nullptr}, 1, false}.start();
  } else {
    Prepared<Task> second(own[1], arena);
    Together<Task>{{&first, &second}, 2, apart}.start();
  }
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
