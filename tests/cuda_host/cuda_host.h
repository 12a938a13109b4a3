// CUDA on the CPU, enough of it to execute csrc/cuda without a GPU: the threads of a block are
// fibers, switched at barriers, shuffles, fences, atomics and reads of other blocks' results, in an
// order drawn from a seed. One to eight blocks, drawn for each launch, are in flight at once, their
// fibers interleaved, some blocks slower than others; they start in an order drawn too. Shared
// memory is each block's own, of exact size and full of NaN at first; blocks of a cluster are in
// flight together and may read one another's until they leave. A barrier that not all threads
// reach, a misaligned vector load, a partial shuffle mask and more shared memory than a block may
// have abort with a message. Kernels are compiled with -fsanitize=thread, and so tell of each
// access: one beyond its memory aborts where the program has the address sanitizer. Where races are
// looked for, threads also switch at any access, and a race aborts: see races.h. A thread of an
// early launch that does not wait for the kernels before, or that first reads or writes memory that
// may be theirs, aborts, too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx;

using cudaError_t = int;
constexpr cudaError_t cudaErrorInvalidValue = 1;
cudaError_t cudaGetLastError();  // and takes it away
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace cuda_host {

constexpr size_t kLaneBytes = 32;
constexpr size_t kStack = 64 * 1024;
extern const char* own_stack;  // of the running thread
extern bool looks_for_races;   // no at first
extern bool before_wait;       // whether the running thread has kernels to wait for

// What every thread of a launch calls. It keeps no copy.
class Body {
 public:
  template <class Call>
  Body(const Call& call)
      : object_(&call), call_([](const void* object) { (*static_cast<const Call*>(object))(); }) {}
  void operator()() const { call_(object_); }

 private:
  const void* object_;
  void (*call_)(const void*);
};

void seed(uint64_t value);
void resident(unsigned blocks);  // in flight at once, from now on; 0: drawn
// `cluster` blocks in a row are a cluster. `early`: kernels before may still run.
// A launch of more blocks than a device can number fails.
void launch(int64_t grid, unsigned threads, Body thread, unsigned cluster = 1, bool early = false);
// After `most` more, launches run nothing and fail, until the next call; negative: none does.
void fail_launches(int most);
bool launch_failed();  // since that call
// The bytes of a launch's large shared memory, and the most of its kernel, which does not change.
void large_shared(const void* kernel, size_t bytes, size_t most);
extern const char* launch_frame;  // of the launch that runs: its caller's are above
extern bool watches_early;        // whether early launches are watched: no at first
bool launch_fails(int64_t grid);  // of a launch that begins
// Memory that threads of an early launch may read before they wait, from now on.
void constant(const void* p, size_t bytes);
void wait_for_earlier();
// An access of a thread that has not waited.
void look_early(const void* p, size_t bytes, bool writes);
void clusters(bool on);  // whether kernels are told that there are clusters: yes at first
bool has_clusters();
bool chance(unsigned of);     // true once in so many times
void yield(unsigned of = 2);  // to other threads, once in so many times
void barriers(bool on);       // off: a planted fault, kernels without their blocks' barriers
void block_barrier();
void team_barrier();  // of 128 threads of the block
void cluster_barrier();
// Lane i's `bytes` at kLaneBytes * i, once every lane of the warp has given its own; until the
// calling thread's next but one.
const char* exchange(const void* mine, size_t bytes);
// c += A B of a warp, its registers as mma.cuh says, of bfloat16 (`brain`) or float16.
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool brain);
void* shared_memory(const void* key, size_t bytes);  // of the calling block
bool in_shared_memory(const void* p, size_t bytes);  // of the calling block
// Where what lies at `p`, in the calling block's, lies in that of block `rank` of its cluster.
const void* peer(const void* p, unsigned rank);
// 16 bytes, zeros where `from` is null, into shared memory, at once or when the calling thread
// finishes its copies; until then what was there is lost.
void copy_later(void* to, const void* from);
void commit_copies();                  // those begun since the last commit become a group
void finish_copies(unsigned pending);  // of all groups but the last so many
// An access, about to be made: fails beyond memory, and, where they are looked for, at a race.
void touch(const void* p, size_t bytes, bool writes);
void look(const void* p, size_t bytes, bool writes);  // for a race
void fence();
void atomic_begins(const void* p);
void atomic_ends();
[[noreturn]] void fail(const char* what);

template <class T>
T load(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail("misaligned load");
  return *p;
}

template <class T>
T& shared(const void* key) {
  static_assert(alignof(T) <= 16, "");
  return *static_cast<T*>(shared_memory(key, sizeof(T)));
}

// The value that lane `from` of the warp gave.
template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  if (mask != 0xffffffffu) fail("shuffle with a partial mask");
  const char* all = exchange(&value, sizeof value);
  if (from < 32) std::memcpy(&value, all + kLaneBytes * from, sizeof value);
  return value;
}

}  // namespace cuda_host

#define DPARALLEL_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), cuda_host::launch(grid, block, [&] { kernel(__VA_ARGS__); }))

#define DPARALLEL_SHARED(name, ...) \
  static char name##_key;           \
  auto& name = cuda_host::shared<__VA_ARGS__>(&name##_key)

template <class T>
T __ldcs(const T* p) {
  return cuda_host::load(p);
}
template <class T>
void __stcs(T* p, T value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) cuda_host::fail("misaligned store");
  *p = value;
}
template <class T>
T __ldcg(const T* p) {
  cuda_host::yield(16);
  return cuda_host::load(p);
}

inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(double{x})); }

inline void __syncthreads() { cuda_host::block_barrier(); }

inline void __threadfence() { cuda_host::fence(); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  return cuda_host::shuffle(mask, value, threadIdx.x % 32 + static_cast<unsigned>(offset));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_host::shuffle(mask, value, threadIdx.x % 32 ^ static_cast<unsigned>(bits));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_host::shuffle(mask, value, static_cast<unsigned>(lane));
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  if (mask != 0xffffffffu) cuda_host::fail("ballot with a partial mask");
  const char* all = cuda_host::exchange(&value, sizeof value);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    bits |= static_cast<unsigned>(all[cuda_host::kLaneBytes * lane]) << lane;
  return bits;
}
template <class T, class Update>
T reduce_warp(unsigned mask, T value, Update update) {
  if (mask != 0xffffffffu) cuda_host::fail("a reduction with a partial mask");
  const char* all = cuda_host::exchange(&value, sizeof value);
  for (unsigned lane = 0; lane < 32; ++lane) {
    T one;
    memcpy(&one, all + cuda_host::kLaneBytes * lane, sizeof one);
    value = lane == 0 ? one : update(value, one);
  }
  return value;
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return reduce_warp(mask, value, [](int a, int b) { return a + b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return reduce_warp(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return reduce_warp(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Of one read-modify-write by nobody else in between; other threads may run before and after.
template <class T, class Update>
T atomic_update(T* p, Update update) {
  cuda_host::atomic_begins(p);
  const T old = *p;
  *p = update(old);
  cuda_host::atomic_ends();
  return old;
}
template <class T>
T atomicAdd(T* p, T value) {
  return atomic_update(p, [=](T old) { return static_cast<T>(old + value); });
}
inline int __syncthreads_count(bool value) {
  static char key;
  auto& count = cuda_host::shared<int32_t>(&key);
  __syncthreads();  // the count of a call before is read
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, static_cast<int32_t>(value));
  __syncthreads();
  return count;
}
inline bool __syncthreads_or(bool value) { return __syncthreads_count(value) > 0; }
template <class T>
T atomicMin(T* p, T value) {
  return atomic_update(p, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* p, T value) {
  return atomic_update(p, [=](T old) { return value > old ? value : old; });
}
