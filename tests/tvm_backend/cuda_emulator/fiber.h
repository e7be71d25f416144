// Threads of control that hand over to each other when they choose to.
#pragma once
#include <cstdint>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cat {
#ifdef __x86_64__
// A stack whose top holds the registers that a call leaves as they are. ucontext asks the kernel for the signals' mask with every
// switch, which took more than half of a kernel's time.
struct Context {
  void* top = nullptr;
};
__attribute__((naked, noinline)) inline void hand_over(Context&, Context&) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void begin(Context& context, std::vector<char>& stack, void (*function)()) {
  const uint64_t end = reinterpret_cast<uint64_t>(stack.data() + stack.size()) & ~uint64_t(15);
  uint64_t* top = reinterpret_cast<uint64_t*>(end) - 8;
  for (int i = 0; i < 8; ++i) top[i] = 0;
  top[6] = reinterpret_cast<uint64_t>(function);  // where hand_over returns to, as if called from nowhere
  context.top = top;
}
#else
using Context = ucontext_t;
inline void hand_over(Context& from, Context& to) { swapcontext(&from, &to); }
inline void begin(Context& context, std::vector<char>& stack, void (*function)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack.data();
  context.uc_stack.ss_size = stack.size();
  context.uc_link = nullptr;
  makecontext(&context, function, 0);
}
#endif
}  // namespace cat
