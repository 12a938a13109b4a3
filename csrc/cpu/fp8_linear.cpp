// fp8_linear and fp8_widen on the CPU.
#include "fp8_linear_kernel.h"

namespace dparallel::cpu {

void fp8_linear(const LinearArgs& args, Parallel parallel) {
  product(fp8_linear_kernel_in_use().product, args, parallel);
}

void fp8_widen(const Fp8WidenArgs& args, Parallel parallel) {
  run_rows(parallel, args.out_width, std::max<int64_t>(1, args.in),
           [&](int64_t begin, int64_t end) {
             fp8_linear_kernel_in_use().widened[static_cast<int>(args.dtype)](args, begin, end);
           });
}

}  // namespace dparallel::cpu
