// Threads, barriers and scratch memory for the CPU kernels. Compiled once, for the baseline
// instruction set (the kernels themselves are compiled per instruction set and include only this).
#pragma once

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
  int threads;     // that it has a use for
  int64_t caches;  // of cores, that its weights fill (to the nearest)
  int64_t work;    // multiply-adds
};

// Whether a team of `threads` should run two problems, which need not wait for each other, side by
// side, half a team for each; otherwise it is one after the other by all. Half a team waits less at
// barriers and has more rows for each weight that it loads, and may be all that a problem can use.
// A whole one has room in its caches for twice the weights.
bool side_by_side(int threads, const Demand& first, const Demand& second);

// Some threads of a team, the neighbours begin .. begin + size.
struct Crew {
  int begin, size;
};

// Which of the `came` threads of a team run the first and the second problem side by side, which
// asked for `first` and `second` threads: so many, or as large a part of them as there is. A single
// thread is the crew of both.
void divide(int came, int first, int second, Crew crews[2]);

// Has the system map memory that is about to be written, part `part` of `parts` of it. Otherwise it
// is mapped page by page, and where two threads first write to a page at the same moment, each has
// one cleared. Does nothing for small memory, or where the system does not know how.
void map_pages(void* memory, int64_t bytes, int part, int parts);

// Where `parallel` gets its threads from: the name of the runtime's library, or "std::thread".
const char* parallel_runtime();

// All of `participants` threads wait until all have arrived. Spins: steps take microseconds.
class alignas(64) Barrier {
 public:
  void wait(int participants);

 private:
  alignas(64) int arrived_ = 0;
  alignas(64) int phase_ = 0;
};

// At least `bytes` of 64-byte-aligned memory that stays valid until this thread's next call, kept
// for reuse (fresh pages cost more than most kernels). Null when memory is exhausted.
void* workspace(size_t bytes);

}  // namespace rnnlm::cpu
