// fp8_linear on the CPU: runs of the weights' rows in parallel.
#include "fp8_linear_kernel.h"

#include "row_kernel.h"
#include "row_stats.h"

namespace dparallel::cpu {
namespace {

const Fp8LinearKernel& kernel() {
#if defined(__x86_64__)
  if (best_simd_level() == SimdLevel::avx512) return avx512::fp8_linear_kernel;
  if (best_simd_level() == SimdLevel::avx2) return avx2::fp8_linear_kernel;
#endif
  return portable::fp8_linear_kernel;
}

}  // namespace

void fp8_linear(const Fp8LinearArgs& args, Parallel parallel) {
  if (args.count == 0) return;
  run_rows(parallel, args.out_width, args.count * std::max<int64_t>(1, args.in),
           [&](int64_t begin, int64_t end) {
             kernel().rows[static_cast<int>(args.dtype)](args, begin, end);
           });
}

}  // namespace dparallel::cpu
