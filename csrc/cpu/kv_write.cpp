// kv_write on the CPU: runs of rows in parallel, each read once and written once.
#include "kv_write_kernel.h"

#include "row_stats.h"

namespace dparallel::cpu {

void kv_write(const KvWriteArgs& args, Parallel parallel) {
  const int64_t width = (args.q_heads + args.k_layout.heads) * args.k_layout.head_dim;
  if (width == 0) return;  // an empty tensor has no address
  run_rows(parallel, args.count, width, [&](int64_t begin, int64_t end) {
    kv_write_kernel_in_use().rows[static_cast<int>(args.dtype)](args, begin, end);
  });
}

}  // namespace dparallel::cpu
