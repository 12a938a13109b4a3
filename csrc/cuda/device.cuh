// The kernels' access to the device: launches, a few PTX instructions, loads. Under nvcc this is
// CUDA; under DPARALLEL_CUDA_HOST a header of tests/cuda_host stands in for it and the kernels run
// on the CPU.
#pragma once

#if defined(DPARALLEL_CUDA_HOST)
#include "cuda_host.h"
#else
#include <cuda_runtime.h>
// The one place that spells a launch, and the one that spells memory shared by a block:
// DPARALLEL_SHARED(parts, Part[8]). grid: 64 bits; a launch of more blocks than a device can number
// fails.
#define DPARALLEL_LAUNCH(kernel, grid, block, stream, ...)                                 \
  kernel<<<dparallel::cuda::grid_of(grid), block, 0, static_cast<cudaStream_t>(stream)>>>( \
      __VA_ARGS__)
#define DPARALLEL_SHARED(name, ...) __shared__ dparallel::cuda::Same<__VA_ARGS__> name
#endif

#include <initializer_list>

#include "dparallel/numeric.h"

namespace dparallel::cuda {

template <class T>
using Same = T;

// The blocks of a launch as the device takes them, or none, which it refuses, where they are too
// many.
constexpr unsigned grid_of(int64_t blocks) {
  return blocks <= INT32_MAX ? static_cast<unsigned>(blocks) : 0u;
}

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;

#if defined(DPARALLEL_CUDA_HOST)
inline bool is_thread_0() { return threadIdx.x == 0; }
inline float max_nan(float a, float b) { return a != a || a > b ? a : b; }
inline float min_nan(float a, float b) { return a != a || a < b ? a : b; }
inline float exp2_fast(float x) { return exp2f(x); }
inline int32_t add_acquire_release(int32_t* p, int32_t value) {
  __threadfence();
  const int32_t old = atomicAdd(p, value);
  __threadfence();
  return old;
}
inline int32_t count_acquire_release(int32_t* p, int32_t last) {
  __threadfence();
  const int32_t old = atomic_update(p, [=](int32_t at) {
    return static_cast<uint32_t>(at) >= static_cast<uint32_t>(last) ? 0 : at + 1;
  });
  __threadfence();
  return old;
}
#else
// Asked anew each time. Of an atomic addition ptxas makes 30 instructions, for the sum of the
// lanes, unless it sees that one lane adds, and it does not see so in a copy of the thread's
// number.
__device__ __forceinline__ bool is_thread_0() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread == 0;
}

// Maximum and minimum that keep NaN, and 2^x to 2 ulp without care for subnormals.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Adds to a counter in global memory and returns the earlier value. Writes of this thread, and
// writes that it knows of by a barrier, are visible to threads that add later; the writes of
// threads that added before are visible to it.
__device__ __forceinline__ int32_t add_acquire_release(int32_t* p, int32_t value) {
  int32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(p)), "r"(value)
               : "memory");
  return old;
}
// Likewise adds 1, or goes back from `last`, or any larger number without a sign, to 0.
__device__ __forceinline__ int32_t count_acquire_release(int32_t* p, int32_t last) {
  int32_t old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(p)), "r"(last)
               : "memory");
  return old;
}
#endif

// kWidth stored logits, 16 bytes, as float32.
struct Float32 {
  using Storage = float;
  using Real = float;
  static constexpr int kWidth = 4;
  static constexpr float kMinusInfinity = -kInfinity;
  static __device__ __forceinline__ float value(float z) { return z; }
  static __device__ __forceinline__ float narrow(float z) { return z; }
};

// 16-bit elements are rounded to nearest, ties to even, two at a time where there are two: by one
// instruction of the device. NaN becomes 0x7fff, as in torch's own kernels; all else has the bits
// that the CPU's kernels give.
struct BFloat16 {
  using Storage = uint16_t;
  using Real = float;
  static constexpr int kWidth = 8;
  static constexpr bool kBrain = true;
  static constexpr uint16_t kMinusInfinity = 0xff80u;
  static __device__ __forceinline__ float value(uint16_t z) { return bfloat16_value(z); }
  static __device__ __forceinline__ void values(uint32_t two, float& low, float& high) {
    low = from_bits(two << 16);
    high = from_bits(two & 0xffff0000u);
  }
#if defined(DPARALLEL_CUDA_HOST)
  static uint16_t narrow(float z) { return z != z ? 0x7fffu : bfloat16_bits(z); }
  static uint32_t narrow(float low, float high) {
    return narrow(low) | static_cast<uint32_t>(narrow(high)) << 16;
  }
#else
  static __device__ __forceinline__ uint16_t narrow(float z) {
    uint16_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(z));
    return y;
  }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
#endif
};

struct Float16 {
  using Storage = uint16_t;
  using Real = float;
  static constexpr int kWidth = 8;
  static constexpr bool kBrain = false;
  static constexpr uint16_t kMinusInfinity = 0xfc00u;
#if defined(DPARALLEL_CUDA_HOST)
  static float value(uint16_t z) { return float16_value(z); }
  static void values(uint32_t two, float& low, float& high) {
    low = value(static_cast<uint16_t>(two));
    high = value(static_cast<uint16_t>(two >> 16));
  }
  static uint16_t narrow(float z) { return z != z ? 0x7fffu : float16_bits(z); }
  static uint32_t narrow(float low, float high) {
    return narrow(low) | static_cast<uint32_t>(narrow(high)) << 16;
  }
#else
  static __device__ __forceinline__ float value(uint16_t z) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(z));
    return y;
  }
  static __device__ __forceinline__ void values(uint32_t two, float& low, float& high) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(two));
  }
  static __device__ __forceinline__ uint16_t narrow(float z) {
    uint16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(z));
    return y;
  }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
#endif
};

struct Float64 {
  using Storage = double;
  using Real = double;
  static constexpr int kWidth = 2;
  static constexpr double kMinusInfinity = -kInfinity;
  static __device__ __forceinline__ double value(double z) { return z; }
  static __device__ __forceinline__ double narrow(double z) { return z; }
};

// The larger and the smaller of two pairs of T, lower and upper half each for itself. Of NaN and a
// number the number.
#if defined(DPARALLEL_CUDA_HOST)
template <class T, class Choose>
uint32_t choose_pair(uint32_t a, uint32_t b, Choose second) {
  uint32_t chosen = 0;
  for (const int shift : {0, 16}) {
    const auto low = static_cast<uint16_t>(a >> shift), high = static_cast<uint16_t>(b >> shift);
    const float x = T::value(low), y = T::value(high);
    const bool other = x != x || (y == y && second(x, y));
    chosen |= static_cast<uint32_t>(other ? high : low) << shift;
  }
  return chosen;
}
template <class T>
uint32_t max_pair(uint32_t a, uint32_t b) {
  return choose_pair<T>(a, b, [](float x, float y) { return y > x; });
}
template <class T>
uint32_t min_pair(uint32_t a, uint32_t b) {
  return choose_pair<T>(a, b, [](float x, float y) { return y < x; });
}
#else
template <class T>
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
  uint32_t c;
  if constexpr (T::kBrain) asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
template <class T>
__device__ __forceinline__ uint32_t min_pair(uint32_t a, uint32_t b) {
  uint32_t c;
  if constexpr (T::kBrain) asm("min.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else asm("min.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
#endif

// kWidth logits as stored. `aligned`: p is a multiple of 16 bytes. Each logit is read once, so the
// caches drop it first.
template <class T>
__device__ __forceinline__ uint4 load_stored(const typename T::Storage* p, bool aligned) {
  if (aligned) return __ldcs(reinterpret_cast<const uint4*>(p));
  typename T::Storage stored[T::kWidth];
#pragma unroll
  for (int i = 0; i < T::kWidth; ++i) stored[i] = __ldcs(p + i);
  uint4 bytes;
  memcpy(&bytes, stored, sizeof bytes);
  return bytes;
}

template <class T>
__device__ __forceinline__ void widen(const uint4& bytes, typename T::Real (&z)[T::kWidth]) {
  if constexpr (sizeof(typename T::Storage) == 2) {
    T::values(bytes.x, z[0], z[1]);
    T::values(bytes.y, z[2], z[3]);
    T::values(bytes.z, z[4], z[5]);
    T::values(bytes.w, z[6], z[7]);
  } else {
    memcpy(z, &bytes, sizeof bytes);
  }
}

// kWidth numbers as they are stored, each rounded.
template <class T>
__device__ __forceinline__ uint4 narrow(const typename T::Real (&v)[T::kWidth]) {
  uint4 bytes;
  if constexpr (sizeof(typename T::Storage) == 2) {
    bytes = {T::narrow(v[0], v[1]), T::narrow(v[2], v[3]), T::narrow(v[4], v[5]),
             T::narrow(v[6], v[7])};
  } else {
    memcpy(&bytes, v, sizeof bytes);
  }
  return bytes;
}

template <class T>
__device__ __forceinline__ void store_stored(typename T::Storage* p,
                                             const typename T::Real (&v)[T::kWidth], bool aligned) {
  const uint4 bytes = narrow<T>(v);
  if (aligned) {
    *reinterpret_cast<uint4*>(p) = bytes;
  } else {
    typename T::Storage stored[T::kWidth];
    memcpy(stored, &bytes, sizeof bytes);
#pragma unroll
    for (int i = 0; i < T::kWidth; ++i) p[i] = stored[i];
  }
}

// Whether this block brings the counter to zero by adding `change`. Then the writes that other
// blocks made before they added are visible. Called by every thread; the answer is the same for
// all.
__device__ inline bool brings_to_zero(int32_t* counter, int32_t change) {
  __syncthreads();  // every thread's writes come before thread 0's release
  return __syncthreads_or(is_thread_0() && add_acquire_release(counter, change) + change == 0);
}

// Whether this block is the last of `expected` to arrive; the counter is zero again when it is.
// Then the writes that other blocks made before they arrived are visible.
__device__ inline bool last_to_arrive(int32_t* counter, int64_t expected) {
  __syncthreads();  // every thread's writes come before thread 0's release
  const auto last = static_cast<int32_t>(expected - 1);
  return __syncthreads_or(is_thread_0() && count_acquire_release(counter, last) == last);
}

// Whether vectors of 16 bytes fit: pointers, and strides in elements of `element` bytes.
inline bool multiples_of_16(std::initializer_list<const void*> pointers,
                            std::initializer_list<int64_t> strides, int64_t element) {
  bool all = true;
  for (const void* p : pointers) all = all && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (const int64_t s : strides) all = all && s * element % 16 == 0;
  return all;
}

// Calls body(T{}) with the element type.
template <class Body>
int dispatch(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32: return body(Float32{});
    case DType::bfloat16: return body(BFloat16{});
    default: return body(Float16{});
  }
}

}  // namespace dparallel::cuda
