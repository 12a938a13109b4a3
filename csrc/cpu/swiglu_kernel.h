// The SIMD kernel under swiglu: rows [begin, end).
#pragma once

#include "dparallel/launch.h"
#include "simd_level.h"

namespace dparallel::cpu {

struct SwigluKernel {
  // Indexed by DType.
  void (*rows[3])(const SwigluArgs& args, int64_t begin, int64_t end);
};

DPARALLEL_KERNEL_TABLE(SwigluKernel, swiglu_kernel)

}  // namespace dparallel::cpu
