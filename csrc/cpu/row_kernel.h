// The SIMD kernel under row_stats, row_topk and unmask: part of one row in one read, tile by tile.
#pragma once

#include "dparallel/nucleus.h"
#include "dparallel/philox.h"
#include "dparallel/row_stats.h"
#include "dparallel/row_topk.h"
#include "simd_level.h"

namespace dparallel::cpu {

// Ids [begin, end) of the row at `row`, all of them admissible. `stats` adds to `part`, `topk`
// to `best` too; `sample` adds those of the nucleus to `sample`. No memory beyond a tile's vectors.
struct RowSpan {
  const void* row;
  int64_t begin, end;
};

struct RowKernel {
  // Indexed by DType.
  void (*stats[3])(const RowSpan& span, RowPart& part);
  void (*topk[3])(const RowSpan& span, RowPart& part, TopKeys& best);
  void (*sample[3])(const RowSpan& span, float inverse_temperature, const SampleKey& key,
                    const Nucleus& nucleus, SamplePart& sample);
};

DPARALLEL_KERNEL_TABLE(RowKernel, row_kernel)

}  // namespace dparallel::cpu
