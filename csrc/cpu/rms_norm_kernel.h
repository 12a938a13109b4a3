// The SIMD kernel under rms_norm: rows [begin, end).
#pragma once

#include "dparallel/launch.h"

namespace dparallel::cpu {

struct RmsNormKernel {
  // Indexed by DType.
  void (*rows[3])(const RmsNormArgs& args, int64_t begin, int64_t end);
};

namespace portable {
extern const RmsNormKernel rms_norm_kernel;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RmsNormKernel rms_norm_kernel;
}
namespace avx512 {
extern const RmsNormKernel rms_norm_kernel;
}
#endif

}  // namespace dparallel::cpu
