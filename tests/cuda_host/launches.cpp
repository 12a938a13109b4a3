// What may be asked of launches: that they fail, that those of a kernel agree, and that a thread of
// an early one waits for the kernels before it, which may still run, before it reads or writes.
#include <map>
#include <utility>

#include "cuda_host.h"

namespace cuda_host {

const char* launch_frame = nullptr;
bool watches_early = false;

namespace {

constexpr cudaError_t kLaunchFailure = 719;

int launches_left = -1;  // that do not fail; negative: all
bool has_failed = false;
cudaError_t last_error = 0;
std::map<const void*, size_t> most_shared;  // by kernel
std::pair<const void*, size_t> constant_memory;

}  // namespace

void fail_launches(int most) {
  launches_left = most;
  has_failed = false;
  last_error = 0;
}

bool launch_failed() { return has_failed; }

bool launch_fails(int64_t grid) {
  const bool numbered = grid <= INT32_MAX;
  if (numbered && launches_left != 0) {
    launches_left -= launches_left > 0;
    return false;
  }
  has_failed = true;
  last_error = kLaunchFailure;
  return true;
}

void large_shared(const void* kernel, size_t bytes, size_t most) {
  const auto [known, first] = most_shared.emplace(kernel, most);
  if (bytes > most) fail("more shared memory than the most of the kernel");
  if (known->second != most) fail("the most shared memory of a kernel changes between launches");
}

void constant(const void* p, size_t bytes) { constant_memory = {p, bytes}; }

// The kernel's arguments are on the caller's stack.
void look_early(const void* p, size_t bytes, bool writes) {
  constexpr size_t kFrames = 64 * 1024;
  const auto within = [p, bytes](const void* begin, size_t size) {
    const auto at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(begin);
    return at < size && bytes <= size - at;
  };
  if (within(&threadIdx, sizeof threadIdx) || within(&blockIdx, sizeof blockIdx)) return;
  if (within(launch_frame, kFrames) || in_shared_memory(p, bytes)) return;
  if (!writes && within(constant_memory.first, constant_memory.second)) return;
  fail(writes ? "a write before the kernels before are done"
              : "a read before the kernels before are done");
}

}  // namespace cuda_host

cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, 0); }
