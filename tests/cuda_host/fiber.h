// Fibers: stacks of their own that one thread switches between.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)

// Keeps what a callee must keep on the stack, the stack's top at `*from`, and goes on at `to`. Not
// swapcontext, which asks the kernel for the signal mask each time: thirty times as long.
extern "C" void cuda_host_switch(void** from, void* to);
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
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
.size cuda_host_switch, .-cuda_host_switch
)");

namespace cuda_host {

class Context {
 public:
  // The first switch to it calls `run`, which must not return.
  void start(char* stack, size_t bytes, void (*run)()) {
    constexpr size_t kKept = 6;
    const auto end = reinterpret_cast<size_t>(stack + bytes) & ~size_t{15};
    void** at = reinterpret_cast<void**>(end);
    *--at = nullptr;  // where `run` would return to
    *--at = reinterpret_cast<void*>(run);
    for (size_t i = 0; i < kKept; ++i) *--at = nullptr;
    top_ = at;
  }
  void switch_to(Context& other) { cuda_host_switch(&top_, other.top_); }

 private:
  void* top_ = nullptr;
};

}  // namespace cuda_host

#else
#include <ucontext.h>

namespace cuda_host {

class Context {
 public:
  void start(char* stack, size_t bytes, void (*run)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, run, 0);
  }
  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

}  // namespace cuda_host

#endif
