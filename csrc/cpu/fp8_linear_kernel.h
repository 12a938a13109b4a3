// The SIMD kernels under fp8_linear and fp8_widen.
#pragma once

#include "product.h"
#include "simd_level.h"

namespace dparallel::cpu {

struct Fp8LinearKernel {
  ProductKernel product;
  // Rows [begin, end) of the weights; indexed by DType.
  void (*widened[3])(const Fp8WidenArgs& args, int64_t begin, int64_t end);
};

DPARALLEL_KERNEL_TABLE(Fp8LinearKernel, fp8_linear_kernel)

}  // namespace dparallel::cpu
