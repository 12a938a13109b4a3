// rms_norm on the CPU: runs of rows in parallel.
#include "rms_norm_kernel.h"

#include "row_kernel.h"
#include "row_stats.h"

namespace dparallel::cpu {
namespace {

const RmsNormKernel& kernel() {
#if defined(__x86_64__)
  if (best_simd_level() == SimdLevel::avx512) return avx512::rms_norm_kernel;
  if (best_simd_level() == SimdLevel::avx2) return avx2::rms_norm_kernel;
#endif
  return portable::rms_norm_kernel;
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Parallel parallel) {
  run_rows(parallel, args.count, args.width, [&](int64_t begin, int64_t end) {
    kernel().rows[static_cast<int>(args.dtype)](args, begin, end);
  });
}

}  // namespace dparallel::cpu
