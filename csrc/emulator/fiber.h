// Fibers: threads of execution that run one at a time and hand over by themselves. One emulated
// CUDA thread is one fiber; the scheduler in machine.cpp is the context that starts them.
//
// A fiber that is never resumed again costs nothing: its stack goes back to the pool and its
// locals are forgotten, without destructors. No exception may leave a fiber.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(RNNLM_EMULATOR_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define RNNLM_EMULATOR_UCONTEXT
#endif
#if defined(RNNLM_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace rnnlm::emulator {

class Context {
 public:
  // The next switch to this context enters `entry`, which must never return, on the stack that
  // ends at `stack_top`.
  void prepare(char* stack_top, void (*entry)());
  // Goes on where `to` left off; returns when somebody switches back to *this.
  void switch_to(Context& to);

 private:
#if defined(RNNLM_EMULATOR_UCONTEXT)
  ucontext_t registers_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

// Stacks with a page below them that faults. They stay mapped for the next launch.
class StackPool {
 public:
  char* take();  // the upper end of a stack; null when there is no memory
  void give(char* stack_top) { free_.push_back(stack_top); }

 private:
  static constexpr std::size_t kBytes = 128 * 1024;  // only touched pages take memory
  static constexpr std::size_t kPerSlab = 64;
  // A guard page splits a mapping, and a process may have no more than 65530 of them.
  static constexpr std::size_t kMaxGuards = 16 * 1024;

  std::vector<char*> free_;
  std::size_t guards_ = 0;
};

}  // namespace rnnlm::emulator
