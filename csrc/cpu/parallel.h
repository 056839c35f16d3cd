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
