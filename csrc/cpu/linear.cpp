// linear on the CPU. `dparallel_ext.linear` calls torch's own product where the CPU has
// instructions for it.
#include "linear_kernel.h"

namespace dparallel::cpu {

void linear(const LinearArgs& args, Parallel parallel) {
  product(linear_kernel_in_use(), args, parallel);
}

}  // namespace dparallel::cpu
