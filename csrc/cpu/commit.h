// The check of commit_ on the CPU, before it writes anything.
#pragma once

#include "dparallel/launch.h"

namespace dparallel::cpu {

// The first row whose token may not be written; -1: none.
int64_t first_unwritable(const CommitArgs& args);

}  // namespace dparallel::cpu
