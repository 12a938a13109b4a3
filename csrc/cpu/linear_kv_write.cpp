// linear_kv_write on the CPU: its three steps.
#include <memory>

#include "dparallel/linear_steps.h"

namespace dparallel::cpu {

void linear_kv_write(const LinearKvWriteArgs& args, Parallel parallel) {
  const std::unique_ptr<char[]> scratch(new char[LinearKvWriteSteps::scratch(args)]);
  const LinearKvWriteSteps steps(args, scratch.get());
  const auto product = args.product.scale != nullptr ? fp8_linear : linear;
  product(steps.queries, parallel);
  product(steps.keys_values, parallel);
  kv_write(steps.write, parallel);
}

}  // namespace dparallel::cpu
