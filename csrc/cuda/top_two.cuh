// The two largest logits without a branch, and without their ids.
#pragma once

#include "device.cuh"

namespace dparallel::cuda {

// The halves of two 16-bit elements.
template <class T>
__device__ __forceinline__ float low(uint32_t pair) {
  return T::value(static_cast<uint16_t>(pair));
}
template <class T>
__device__ __forceinline__ float high(uint32_t pair) {
  if constexpr (T::kBrain) return from_bits(pair & 0xffff0000u);
  else return T::value(static_cast<uint16_t>(pair >> 16));
}

// The two largest logits that a thread has seen, as stored: for 16-bit elements, two of the even
// ids and two of the odd ids. NaN is passed over.
template <class T>
struct TopTwo {
  uint32_t first = minus_infinities(), second = minus_infinities();

  static __device__ __forceinline__ uint32_t minus_infinities() {
    return T::kBrain ? 0xff80ff80u : 0xfc00fc00u;
  }
  __device__ __forceinline__ void see(uint32_t pair) {
    second = max_pair<T>(second, min_pair<T>(first, pair));
    first = max_pair<T>(first, pair);
  }
  __device__ __forceinline__ float largest() const { return fmaxf(low<T>(first), high<T>(first)); }
  __device__ __forceinline__ float next() const {
    return fmaxf(fmaxf(low<T>(second), high<T>(second)), fminf(low<T>(first), high<T>(first)));
  }
};

template <>
struct TopTwo<Float32> {
  float first = -kInfinity, second = -kInfinity;

  __device__ __forceinline__ void see(uint32_t bits) {
    const float z = from_bits(bits);
    second = fmaxf(second, fminf(first, z));
    first = fmaxf(first, z);
  }
  __device__ __forceinline__ float largest() const { return first; }
  __device__ __forceinline__ float next() const { return second; }
};

}  // namespace dparallel::cuda
