// Elements by 16-byte vectors where they are aligned, else one by one.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "dparallel/launch.h"

namespace dparallel::cuda {

// W elements: one 16-byte vector, or one element.
template <class T, int W>
struct Elements {
  static_assert(W == T::kWidth || W == 1, "");
  using Storage = typename T::Storage;
  using Vector = std::conditional_t<W == 1, Storage, uint4>;  // as stored

  static __device__ __forceinline__ Vector load(const Storage* p) {
    return *reinterpret_cast<const Vector*>(p);
  }
  // A vector that no thread reads again: the caches drop it first.
  static __device__ __forceinline__ Vector load_once(const Storage* p) {
    return __ldcs(reinterpret_cast<const Vector*>(p));
  }
  static __device__ __forceinline__ void store(Storage* p, const Vector& v) {
    *reinterpret_cast<Vector*>(p) = v;
  }
  static __device__ __forceinline__ void widen(const Vector& v, float (&x)[W]) {
    if constexpr (W == 1) x[0] = T::value(v);
    else cuda::widen<T>(v, x);
  }
  static __device__ __forceinline__ Vector narrow(const float (&x)[W]) {
    if constexpr (W == 1) return T::narrow(x[0]);
    else return cuda::narrow<T>(x);
  }
  // To the elements' precision.
  static __device__ __forceinline__ void round(float (&x)[W]) { widen(narrow(x), x); }
};

// Where a row begins, by a division of 32 bits: launches are of fewer rows than 2^31.
__device__ __forceinline__ int64_t offset_of(const RowStrides& rows, uint32_t row) {
  const auto inner = static_cast<uint32_t>(rows.inner_rows);
  if (row < inner) return row * rows.inner;
  const uint32_t outer = row / inner;
  return outer * rows.outer + (row - outer * inner) * rows.inner;
}

}  // namespace dparallel::cuda
