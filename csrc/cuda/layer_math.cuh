// What swiglu and kv_write compute of single numbers, and products that end in them.
#pragma once

#include "device.cuh"

namespace dparallel::cuda {

// z / (1 + e^-z). -inf / inf is NaN, as of F.silu; a finite number / inf is 0. Of 16-bit gates e^-z
// comes by one multiplication and the device's 2^x: the argument's rounding is then 2^-18 of the
// result at most, where the result has 11 bits.
template <class T>
__device__ __forceinline__ float silu(float z) {
  float e;
  if constexpr (sizeof(typename T::Storage) == 2) e = exp2_fast(z * -kLog2e);
  else e = expf(-z);
  return __fdividef(z, 1.0f + e);
}

// Turns a pair by an angle. Which products are fused with a sum is written down: the compiler would
// choose, and not the same in all kernels that have the bits of one another.
__device__ __forceinline__ void rotate_pair(float a, float b, float cos, float sin, float& first,
                                            float& second) {
  first = fmaf(a, cos, -(b * sin));
  second = fmaf(a, sin, b * cos);
}

// The norm of a head: x becomes weight * x * norm_factor(sum of squares, ...), rounded in between.
// In all kernels that have the bits of one another the sum is a balanced tree over the pairs (i, i
// + half) in their order.
__device__ __forceinline__ float pair_squares(float a, float b) { return fmaf(b, b, a * a); }

__device__ __forceinline__ float norm_factor(float squares, int64_t dim, float eps) {
  return __frsqrt_rn(__fdividef(squares, static_cast<float>(dim)) + eps);
}

// The sum of x over groups of `lanes` neighbours, a power of two up to 32, the same in each of
// them: a balanced tree in their order.
__device__ __forceinline__ float sum_over(float x, uint32_t lanes) {
  for (uint32_t bits = 1; bits < lanes; bits *= 2)
    x += __shfl_xor_sync(kFullWarp, x, static_cast<int>(bits));
  return x;
}

}  // namespace dparallel::cuda
