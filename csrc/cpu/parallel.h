// Threads, barriers and scratch memory for the CPU kernels. Compiled once, for the baseline
// instruction set (the kernels themselves are compiled per instruction set and include only this).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace rnnlm::cpu {

using Body = void (*)(void* context, int thread, int num_threads);

// Run `body` on up to `threads` threads at once, the caller among them, and wait for all. All
// threads of the team run concurrently, so they may wait for each other. The team can be smaller
// than asked for: `body` is told.
//
// The team comes from the OpenMP runtime that is already loaded in the process (torch's), if there
// is one: a second pool of spinning threads would fight the first for the cores. See
// docs/decisions.md.
void parallel(int threads, Body body, void* context);

// Multiply-adds that make one more thread worth waking.
constexpr int64_t kThreadWork = 100'000;

// What a problem asks of a team by itself.
struct Demand {
  int threads;                         // that it has a use for
  int64_t caches;                      // of cores, that its weights fill (to the nearest)
  int64_t work;                        // multiply-adds
  int64_t caches_with_input = caches;  // the same with the weights of the input
};

// Whether AMD made this CPU: some choices were measured on those only, so far.
bool is_amd();

// Whether a team of `threads` should run two problems, which need not wait for each other, side by
// side, half a team for each; otherwise it is one after the other by all. Half a team waits less at
// barriers and has more rows for each weight that it loads, and may be all that a problem can use.
// A whole one has room in its caches for twice the weights.
bool side_by_side(int threads, const Demand& first, const Demand& second);

// Steps that a layer of a stack stays behind the one whose output it reads. All project their input
// for so many at once: fewer would have W_ih read more often, more would have it start later.
constexpr int64_t kStepsBehind = 8;

// How many layers of a stack a team of `threads` should run at a time, with an equal part of the
// team for each. Of what the layers demand, `most` has the most threads and caches and the least
// work. W_ih counts, for they read it every few steps.
int layers_at_once(int threads, int layers, int64_t steps, const Demand& most);

// Some threads of a team, the neighbours begin .. begin + size.
struct Crew {
  int begin, size;
};

// Which of the `came` threads of a team each of `count` crews gets, which asked for so many: those,
// or as large a part of them as there is. With fewer threads than crews, some have the same one.
void divide(int came, const int* asked, int count, Crew* crews);

// The most rows that `rows_of_group` gives to one of `groups` groups.
int64_t most_rows_of_group(int64_t batch, int groups);

// Rows begin .. end of a batch of sequences of different lengths, the longest first, for group
// number `group`: the sums of the groups' lengths are as equal as whole rows allow, so that no
// group waits long for another; but a group has no more than twice an equal share of the rows, for
// which there is memory. `batch_sizes` [steps]: how many rows each step has.
struct Rows {
  int64_t begin, end;
};
Rows rows_of_group(const int64_t* batch_sizes, int64_t steps, int64_t batch, int group, int groups);

// Has the system map memory that is about to be written, part `part` of `parts` of it. Otherwise it
// is mapped page by page, and where two threads first write to a page at the same moment, each has
// one cleared. Does nothing where the memory is small or mapped already, or where the system does
// not know how.
void map_pages(void* memory, int64_t bytes, int part, int parts);

// Where `parallel` gets its threads from: the name of the runtime's library, or "std::thread".
const char* parallel_runtime();

// Which processors the threads of a team run on. Linux wakes a thread on the processor of the one
// that wakes it, rather than on an idle one, when it thinks that the other is not really idle, as
// it does in virtual machines. There the two take turns for a whole time slice, some milliseconds.
class Seats {
 public:
  // Each thread takes the processor that it runs on. Where another has taken that, it moves to one
  // of those that it may run on and nobody has taken, if there is any.
  void take();

 private:
  static constexpr int kMost = 1024;
  bool claim(int cpu);  // true if nobody had it

  std::atomic<uint64_t> taken_[kMost / 64] = {};
};

// All of `participants` threads wait until all have arrived. Spins: steps take microseconds.
class alignas(64) Barrier {
 public:
  void wait(int participants);

 private:
  alignas(64) int arrived_ = 0;
  alignas(64) int phase_ = 0;
};

// Work that the threads of a team take from piece by piece, for as long as there is some: a core
// that is slower, or taken away for a while, is left with less of it. Memory of zeros is one from
// which nothing has been taken.
class alignas(64) Handout {
 public:
  struct Piece {
    int64_t begin, end;
  };
  // The next piece of what lies before `end`: `most` long, but no longer than an equal share of
  // what is left, in multiples of `unit`, so that all of `threads` are done at nearly the same
  // time. Empty: nothing is left before `end`; who has seen that may ask again with a later one.
  Piece take(int64_t end, int64_t most, int64_t unit, int threads);

 private:
  int64_t next_ = 0;
};

// How far a group of threads has come, for others to wait until they may read what it has written.
// Spins as well.
class alignas(64) Progress {
 public:
  void publish(int64_t iterations);
  void await(int64_t iterations) const;

 private:
  int64_t iterations_ = 0;
};

// At least `bytes` of 64-byte-aligned memory that stays valid until this thread's next call, kept
// for reuse (fresh pages cost more than most kernels). Null when memory is exhausted.
void* workspace(size_t bytes);

}  // namespace rnnlm::cpu
