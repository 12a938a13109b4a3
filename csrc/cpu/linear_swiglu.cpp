// linear_swiglu on the CPU: its two steps.
#include <memory>

#include "dparallel/linear_steps.h"

namespace dparallel::cpu {

void linear_swiglu(const LinearArgs& args, Parallel parallel) {
  const std::unique_ptr<char[]> scratch(new char[LinearSwigluSteps::scratch(args)]);
  const LinearSwigluSteps steps(args, scratch.get());
  (args.scale != nullptr ? fp8_linear : linear)(steps.product, parallel);
  swiglu(steps.swiglu, parallel);
}

}  // namespace dparallel::cpu
