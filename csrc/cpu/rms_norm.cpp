// rms_norm on the CPU: runs of rows in parallel.
#include "rms_norm_kernel.h"

#include "parallel.h"

namespace dparallel::cpu {

void rms_norm(const RmsNormArgs& args, Parallel parallel) {
  run_rows(parallel, args.count, args.width, [&](int64_t begin, int64_t end) {
    rms_norm_kernel_in_use().rows[static_cast<int>(args.dtype)](args, begin, end);
  });
}

}  // namespace dparallel::cpu
