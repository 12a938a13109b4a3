// Shared by the kernels of the losses: a block's chunk of a row, exponents in the device's units,
// and the merging of a row's parts.
#pragma once

#include "row_parts.cuh"
#include "vectors.cuh"

#include "dparallel/certainty_forcing_loss.h"

namespace dparallel::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float in_units(float x) { return exp2_fast(x); }
__device__ __forceinline__ double in_units(double x) { return exp(x); }
constexpr float units(float x) { return x * kLog2e; }
constexpr double units(double x) { return x; }

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }  // ignores NaN
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float floored(float x, float floor) { return max_nan(x, floor); }
__device__ __forceinline__ double floored(double x, double floor) { return x < floor ? floor : x; }
__device__ __forceinline__ float clamped(float z) { return min_nan(z, kLargest); }
__device__ __forceinline__ double clamped(double z) { return z > kLargest ? double{kLargest} : z; }

template <class T>
__device__ __forceinline__ uint4 all_of(typename T::Storage z) {
  typename T::Storage stored[T::kWidth];
#pragma unroll
  for (int i = 0; i < T::kWidth; ++i) stored[i] = z;
  uint4 bytes;
  memcpy(&bytes, stored, sizeof bytes);
  return bytes;
}

// A block's share of a row: kCount vectors for each thread.
template <class T, int kCount>
struct Chunk {
  static constexpr int kSize = kThreads * kCount * T::kWidth;
  uint32_t row, begin;
  int count;  // of numbers

  static uint32_t in(int64_t vocab) { return static_cast<uint32_t>((vocab + kSize - 1) / kSize); }
  __device__ __forceinline__ Chunk(uint32_t chunks, int64_t vocab) {
    row = blockIdx.x / chunks;
    begin = (blockIdx.x - row * chunks) * kSize;
    const int64_t left = vocab - begin;
    count = left < kSize ? static_cast<int>(left) : kSize;
  }
  // Of the thread's first number, and from one of its vectors to the next.
  static __device__ __forceinline__ int first() {
    return static_cast<int>(threadIdx.x) * T::kWidth;
  }
  static constexpr int kStep = kThreads * T::kWidth;
  // Whether the calling thread has the vector of the number at `i`.
  static __device__ __forceinline__ bool has(int i) {
    return i / T::kWidth % kThreads == static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ const typename T::Storage* logits(const Logits& z) const {
    const RowStrides rows{z.inner_rows, z.outer_stride, z.inner_stride};
    return static_cast<const typename T::Storage*>(z.data) + offset_of(rows, row) + begin;
  }
  // The calling thread's vectors of the row at `z`, with -inf behind its end.
  template <int kAtOnce>
  __device__ __forceinline__ void load(const typename T::Storage* z,
                                       uint4 (&stored)[kCount]) const {
    constexpr int W = T::kWidth;
    const uint4 nothing = all_of<T>(T::kMinusInfinity);
    if (count == kSize) {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        stored[k] = load_stored<T>(z + first() + k * kStep, kAtOnce > 1);
    } else {
      uint4 cut = nothing;  // the vector that the row's end cuts short
      const int whole = count / W * W;
      if (whole < count && has(whole)) {
        typename T::Storage last[W];
#pragma unroll
        for (int i = 0; i < W; ++i) last[i] = whole + i < count ? z[whole + i] : T::kMinusInfinity;
        memcpy(&cut, last, sizeof cut);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int at = first() + k * kStep;
        stored[k] = nothing;
        if (at < whole) stored[k] = load_stored<T>(z + first() + k * kStep, kAtOnce > 1);
        else if (at < count) stored[k] = cut;
      }
    }
  }
};

// The largest of N vectors, or -inf; NaN is ignored.
template <class T, int N>
__device__ __forceinline__ typename T::Real largest(const uint4* v) {
  using R = typename T::Real;
  R top = -kInfinity;
  if constexpr (sizeof(typename T::Storage) == 2) {
    uint32_t two = max_pair<T>(max_pair<T>(v[0].x, v[0].y), max_pair<T>(v[0].z, v[0].w));
#pragma unroll
    for (int k = 1; k < N; ++k)
      two = max_pair<T>(two, max_pair<T>(max_pair<T>(v[k].x, v[k].y), max_pair<T>(v[k].z, v[k].w)));
    R low, high;
    T::values(two, low, high);
    top = larger(larger(top, low), high);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      R values[T::kWidth];
      widen<T>(v[k], values);
#pragma unroll
      for (int i = 0; i < T::kWidth; ++i) top = larger(top, values[i]);
    }
  }
  return top;
}

// By a warp: the parts [chunks] of a row merged, in an order that depends on their number alone;
// valid in lane 0.
template <class Part, class Merge>
__device__ __forceinline__ Part merge_row(const Part* parts, uint32_t row, uint32_t chunks,
                                          Merge merge) {
  Part part;
#pragma unroll 1
  for (uint32_t c = threadIdx.x % 32; c < chunks; c += 32)
    merge(part, parts[static_cast<int64_t>(row) * chunks + c]);
  merge_lanes(part, chunks < 32 ? static_cast<int>(chunks) : 32, merge);
  return part;
}

// A vector that no kernel reads soon: the caches drop it first.
template <class T, int kAtOnce>
__device__ __forceinline__ void store_once(typename T::Storage* p, const uint4& bytes) {
  if (kAtOnce > 1) {
    __stcs(reinterpret_cast<uint4*>(p), bytes);
  } else {
    typename T::Storage stored[T::kWidth];
    memcpy(stored, &bytes, sizeof bytes);
#pragma unroll
    for (int i = 0; i < T::kWidth; ++i) p[i] = stored[i];
  }
}

// Calls body(T{}) with the element type of the logits.
template <class Body>
int dispatch_wide(DType dtype, Body body) {
  return dtype == DType::float64 ? body(Float64{}) : dispatch(dtype, body);
}

// Numbers that are read at once where rows are aligned. float64 is for checks: one way is enough.
template <class T>
constexpr int kVector = T::kWidth > 2 ? T::kWidth : 1;

// Whether every row of these logits, and of a gradient at `grad`, is of aligned vectors.
template <class T>
bool aligned(const Logits& z, const void* grad) {
  return multiples_of_16({z.data, grad}, {z.outer_stride, z.inner_stride, grad ? z.vocab : 0},
                         sizeof(typename T::Storage));
}

}  // namespace dparallel::cuda
