// Elements by 16-byte vectors where they are aligned, else one by one.
#pragma once

#include "device.cuh"

namespace dparallel::cuda {

// W elements: one 16-byte vector, or one by one.
template <class T, int W>
struct Elements {
  using Storage = typename T::Storage;

  static __device__ __forceinline__ void load(const Storage* p, float (&x)[W]) {
    if constexpr (W == T::kWidth) widen<T>(load_stored<T>(p, true), x);
    else x[0] = T::value(*p);
  }
  static __device__ __forceinline__ void store(Storage* p, const float (&x)[W]) {
    if constexpr (W == T::kWidth) store_stored<T>(p, x, true);
    else *p = T::narrow(x[0]);
  }
  static __device__ __forceinline__ void copy(const Storage* from, Storage* to) {
    if constexpr (W == T::kWidth) *reinterpret_cast<uint4*>(to) = load_stored<T>(from, true);
    else *to = *from;
  }
};

}  // namespace dparallel::cuda
