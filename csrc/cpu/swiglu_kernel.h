// The SIMD kernel under swiglu: rows [begin, end).
#pragma once

#include "dparallel/launch.h"

namespace dparallel::cpu {

struct SwigluKernel {
  // Indexed by DType.
  void (*rows[3])(const SwigluArgs& args, int64_t begin, int64_t end);
};

namespace portable {
extern const SwigluKernel swiglu_kernel;
}
#if defined(__x86_64__)
namespace avx2 {
extern const SwigluKernel swiglu_kernel;
}
namespace avx512 {
extern const SwigluKernel swiglu_kernel;
}
#endif

}  // namespace dparallel::cpu
