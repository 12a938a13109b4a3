// The SIMD kernel under rms_norm: rows [begin, end).
#pragma once

#include "dparallel/launch.h"
#include "simd_level.h"

namespace dparallel::cpu {

struct RmsNormKernel {
  // Indexed by DType.
  void (*rows[3])(const RmsNormArgs& args, int64_t begin, int64_t end);
};

DPARALLEL_KERNEL_TABLE(RmsNormKernel, rms_norm_kernel)

}  // namespace dparallel::cpu
