// CUDA on the CPU, enough of it to execute csrc/cuda without a GPU: the threads of a block are
// fibers, switched at barriers, shuffles, fences and atomics, in an order drawn from a seed; blocks
// run one after another, in an order drawn from it too. A barrier that not all threads reach, a
// misaligned vector load and a partial shuffle mask abort with a message.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx;

using cudaError_t = int;
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace cuda_host {

void seed(uint64_t value);
void launch(unsigned grid, unsigned block, const std::function<void()>& thread);
void yield();
void block_barrier();
void warp_barrier();
uint32_t& lane_slot(unsigned lane);  // of the calling thread's warp
[[noreturn]] void fail(const char* what);

template <class T>
T load(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail("misaligned load");
  return *p;
}

}  // namespace cuda_host

#define DPARALLEL_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), cuda_host::launch(grid, block, [&] { kernel(__VA_ARGS__); }))

template <class T>
T __ldcs(const T* p) {
  return cuda_host::load(p);
}
template <class T>
T __ldcg(const T* p) {
  return cuda_host::load(p);
}

inline void __syncthreads() {
#ifdef CUDA_HOST_FAULT_NO_BARRIER  // planted: a kernel without its barriers
  cuda_host::yield();
#else
  cuda_host::block_barrier();
#endif
}

inline void __threadfence() { cuda_host::yield(); }

inline uint32_t __shfl_down_sync(unsigned mask, uint32_t value, int offset) {
  if (mask != 0xffffffffu) cuda_host::fail("shuffle with a partial mask");
  const unsigned lane = threadIdx.x % 32, from = lane + static_cast<unsigned>(offset);
  cuda_host::lane_slot(lane) = value;
  cuda_host::warp_barrier();
  const uint32_t other = from < 32 ? cuda_host::lane_slot(from) : value;
  cuda_host::warp_barrier();
  return other;
}
inline int32_t __shfl_down_sync(unsigned mask, int32_t value, int offset) {
  return static_cast<int32_t>(__shfl_down_sync(mask, static_cast<uint32_t>(value), offset));
}

template <class T>
T atomicAdd(T* p, T value) {
  cuda_host::yield();
  const T old = *p;
  *p = old + value;
  return old;
}

template <class T>
T atomicMin(T* p, T value) {
  cuda_host::yield();
  const T old = *p;
  if (value < old) *p = value;
  return old;
}
