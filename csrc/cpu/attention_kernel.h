// The SIMD kernel under block_attention: one tile of query rows of one key head against its slots.
#pragma once

#include "dparallel/launch.h"
#include "simd_level.h"

namespace dparallel::cpu {

// Query row r of the tile is row `first + r / group` of q and head `head * group + r % group`: the
// `group` query heads of a key head share its keys.
struct AttentionTile {
  int64_t first, rows;  // rows = query rows * group, at most kTileRows
  int64_t head, group;
  int64_t length;        // slots [0, length) are visible, to all rows or as `base` says
  const int64_t* pages;  // [table_width]
  // Slots [0, base) are visible to every row; which of the others a row sees, BlockAttentionArgs
  // says. `offset`: the number, within the segment, of the tile's first query row.
  int64_t base, offset;
};

constexpr int64_t kTileRows = 64;

struct AttentionKernel {
  // Indexed by DType. scratch: see block_attention.cpp; aligned to a cache line, since a vector
  // that lies in two takes twice as long to load.
  void (*tile[3])(const BlockAttentionArgs& args, const AttentionTile& tile, float* scratch);
};

DPARALLEL_KERNEL_TABLE(AttentionKernel, attention_kernel)

}  // namespace dparallel::cpu
