// The SIMD kernel under fp8_linear: rows [begin, end) of the weights.
#pragma once

#include "dparallel/launch.h"

namespace dparallel::cpu {

struct Fp8LinearKernel {
  // Indexed by DType.
  void (*rows[3])(const Fp8LinearArgs& args, int64_t begin, int64_t end);
};

namespace portable {
extern const Fp8LinearKernel fp8_linear_kernel;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Fp8LinearKernel fp8_linear_kernel;
}
namespace avx512 {
extern const Fp8LinearKernel fp8_linear_kernel;
}
#endif

}  // namespace dparallel::cpu
