// The SIMD kernel under kv_write: rows [begin, end).
#pragma once

#include "dparallel/launch.h"
#include "simd_level.h"

namespace dparallel::cpu {

struct KvWriteKernel {
  // Indexed by DType.
  void (*rows[3])(const KvWriteArgs& args, int64_t begin, int64_t end);
};

DPARALLEL_KERNEL_TABLE(KvWriteKernel, kv_write_kernel)

}  // namespace dparallel::cpu
