// The hooks that a compiler puts before every access under -fsanitize=thread, whose own runtime is
// not linked. Memory is looked at by reading it here: where this file is compiled with the address
// sanitizer, that finds what lies beyond.
#include "races.h"

#include "cuda_host.h"

namespace cuda_host {

void touch(const void* p, size_t bytes, bool writes) {
#if !defined(__SANITIZE_ADDRESS__)
  if (!looks_for_races) return;
#endif
  if (reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(own_stack) < kStack) return;
  if (before_wait) look_early(p, bytes, writes);
  const auto* at = static_cast<const volatile char*>(p);
  static_cast<void>(at[0]);
  static_cast<void>(at[bytes - 1]);
  if (looks_for_races) look(p, bytes, writes);
}

void Clock::learn(const Clock& other) {
  for (const auto& [block, barriers] : other.barriers_)
    barriers_[block] = std::max(barriers_[block], barriers);
  for (const auto& [thread, fences] : other.fences_)
    fences_[thread] = std::max(fences_[thread], fences);
}

void Clock::learn(const Epoch& fence) {
  auto& barriers = barriers_[fence.block];
  barriers = std::max(barriers, fence.barriers);
  auto& fences = fences_[{fence.block, fence.thread}];
  fences = std::max(fences, fence.fences);
}

bool Clock::covers(const Epoch& access) const {
  const auto barriers = barriers_.find(access.block);
  if (barriers != barriers_.end() && access.barriers < barriers->second) return true;
  const auto fences = fences_.find({access.block, access.thread});
  return fences != fences_.end() && access.fences < fences->second;
}

}  // namespace cuda_host

#define HOOK(name, writes, size) \
  extern "C" void __tsan_##name(void* p) { cuda_host::touch(p, size, writes); }
#define HOOKS(size)                       \
  HOOK(read##size, false, size)           \
  HOOK(write##size, true, size)           \
  HOOK(unaligned_read##size, false, size) \
  HOOK(unaligned_write##size, true, size)
HOOK(read1, false, 1)
HOOK(write1, true, 1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" {
void __tsan_read_range(void* p, size_t size) { cuda_host::touch(p, size, false); }
void __tsan_write_range(void* p, size_t size) { cuda_host::touch(p, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
}
