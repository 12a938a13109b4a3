// swiglu on the CPU: runs of rows in parallel.
#include "swiglu_kernel.h"

#include "parallel.h"

namespace dparallel::cpu {

void swiglu(const SwigluArgs& args, Parallel parallel) {
  run_rows(parallel, args.count, args.width, [&](int64_t begin, int64_t end) {
    swiglu_kernel_in_use().rows[static_cast<int>(args.dtype)](args, begin, end);
  });
}

}  // namespace dparallel::cpu
