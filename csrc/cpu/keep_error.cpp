// keep_error on the CPU.
#include <algorithm>

#include "dparallel/launch.h"

namespace dparallel::cpu {

void keep_error(const KeepErrorArgs& args, Parallel) {
  if (*args.word != kNoError || args.count == 0) return;
  *args.word = *std::min_element(args.error, args.error + args.count);
}

}  // namespace dparallel::cpu
