// The SIMD kernel under linear.
#pragma once

#include "product.h"
#include "simd_level.h"

namespace dparallel::cpu {

using LinearKernel = ProductKernel<LinearArgs>;

DPARALLEL_KERNEL_TABLE(LinearKernel, linear_kernel)

}  // namespace dparallel::cpu
