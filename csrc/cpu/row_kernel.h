// The SIMD kernel under row_stats, row_topk and unmask: part of one row in one read, tile by tile.
#pragma once

#include "dparallel/nucleus.h"
#include "dparallel/philox.h"
#include "dparallel/row_stats.h"
#include "dparallel/row_topk.h"
#include "simd_level.h"

namespace dparallel::cpu {

// Ids [begin, end) of the row at `row`, all of them admissible. `stats` adds them to `part`, `topk`
// to `best` too; `sample` adds those in the nucleus to `sample`.
struct RowSpan {
  const void* row;
  int64_t begin, end;
};

// The largest keys so far, in descending order.
struct TopKeys {
  uint64_t keys[kMostTop] = {};
  int k;
  float floor = -kInfinity;  // from other parts of the row: none of the k largest is below it

  DP_HD explicit TopKeys(int64_t k) : k(static_cast<int>(k)) {}

  // The logit that the next one must exceed to be among the k, where ids ascend.
  DP_HD float bar() const {
    const float last = keys[k - 1] == kNoKey ? -kInfinity : top_logit(keys[k - 1]);
    return last > floor ? last : floor;
  }
  DP_HD void rank(float z, int64_t id) { rank(top_key(z, id)); }
  DP_HD void rank(uint64_t key) {
    if (key <= keys[k - 1]) return;
    int at = k - 1;
    for (; at > 0 && keys[at - 1] < key; --at) keys[at] = keys[at - 1];
    keys[at] = key;
  }
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
