#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>

#if !defined(MAP_NORESERVE)
#define MAP_NORESERVE 0
#endif

#if !defined(RNNLM_EMULATOR_UCONTEXT)
// void rnnlm_emulator_switch(void** save, void* load): pushes the registers that a call preserves,
// stores the stack pointer in *save, takes `load` as the stack pointer, pops and returns there.
extern "C" void rnnlm_emulator_switch(void** save, void* load) __asm__("rnnlm_emulator_switch");

#if defined(__x86_64__)
__asm__(R"(
.text
.p2align 4
rnnlm_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
__asm__(R"(
.text
.p2align 4
rnnlm_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#endif
#endif

namespace rnnlm::emulator {

#if defined(RNNLM_EMULATOR_UCONTEXT)

void Context::prepare(char* stack_top, void (*entry)()) {
  constexpr std::size_t kUsed = 64 * 1024;
  (void)getcontext(&registers_);
  registers_.uc_stack.ss_sp = stack_top - kUsed;
  registers_.uc_stack.ss_size = kUsed;
  registers_.uc_link = nullptr;
  makecontext(&registers_, entry, 0);
}

void Context::switch_to(Context& to) {
  (void)swapcontext(&registers_, &to.registers_);
}

#else

void Context::prepare(char* stack_top, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_top);
#if defined(__x86_64__)
  // Six registers and the return address. At `entry` the stack must look as after a call: 8 bytes
  // off a multiple of 16.
  void** frame = top - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
#else
  void** frame = top - 20;
  for (int i = 0; i < 20; ++i) frame[i] = nullptr;
  frame[11] = reinterpret_cast<void*>(entry);  // x30
#endif
  stack_pointer_ = frame;
}

void Context::switch_to(Context& to) {
  rnnlm_emulator_switch(&stack_pointer_, to.stack_pointer_);
}

#endif

char* StackPool::take() {
  if (free_.empty()) {
    void* slab = mmap(nullptr, kPerSlab * kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) return nullptr;
    constexpr std::size_t kGuard = 16 * 1024;  // the largest page of the usual systems
    for (std::size_t i = kPerSlab; i-- > 0;) {
      char* stack = static_cast<char*>(slab) + i * kBytes;
      if (guards_ < kMaxGuards && mprotect(stack, kGuard, PROT_NONE) == 0) ++guards_;
      free_.push_back(stack + kBytes);
    }
  }
  char* top = free_.back();
  free_.pop_back();
  return top;
}

}  // namespace rnnlm::emulator
