// The SIMD kernel under linear.
#pragma once

#include "product.h"
#include "simd_level.h"

namespace dparallel::cpu {

DPARALLEL_KERNEL_TABLE(ProductKernel, linear_kernel)

}  // namespace dparallel::cpu
