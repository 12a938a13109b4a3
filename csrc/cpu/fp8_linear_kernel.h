// The SIMD kernels under fp8_linear and fp8_widen: rows [begin, end) of the weights.
#pragma once

#include "dparallel/launch.h"
#include "simd_level.h"

namespace dparallel::cpu {

struct Fp8LinearKernel {
  // Indexed by DType.
  void (*rows[3])(const Fp8LinearArgs& args, int64_t begin, int64_t end);
  void (*widened[3])(const Fp8WidenArgs& args, int64_t begin, int64_t end);
};

DPARALLEL_KERNEL_TABLE(Fp8LinearKernel, fp8_linear_kernel)

}  // namespace dparallel::cpu
