// block_attention on the CPU: tiles of query rows, one key head each, in parallel.
#include <algorithm>
#include <cstring>
#include <vector>

#include "attention_kernel.h"
#include "dparallel/launch.h"
#include "parallel.h"

namespace dparallel::cpu {
namespace {

constexpr int64_t kLine = 16;  // floats of a cache line, and of the widest vector

struct alignas(4 * kLine) Line {
  float number[kLine];
};

// Room for a tile's queries, output, keys and values, scores and which of them are seen, and three
// numbers of each row's softmax.
int64_t scratch_lines(int64_t head_dim) {
  return kTileRows * (4 * ((head_dim + kLine - 1) / kLine * kLine) + 2 * kTileRows + 3) / kLine;
}

}  // namespace

void block_attention(const BlockAttentionArgs& args, Parallel parallel) {
  const int64_t heads = args.k_layout.heads, group = args.q_heads / heads;
  std::memset(args.out, 0,
              args.count * args.q_heads * args.k_layout.head_dim * element_size(args.dtype));
  const int64_t step = std::max<int64_t>(1, kTileRows / group);  // query rows of a tile
  // A segment's tiles begin at its own first row, so that its result depends on no other segment.
  std::vector<AttentionTile> tiles;
  for (int64_t s = 0; s < args.segments; ++s) {
    const int64_t queries = args.q_end[s] - args.q_start[s], length = args.kv_lens[s];
    const int64_t base = args.restricted() ? length - queries : length;
    for (int64_t offset = 0; offset < queries; offset += step) {
      const int64_t rows = std::min(step, queries - offset);
      // The slots that the tile's last row sees.
      const int64_t seen = args.causal ? base + offset + rows : length;
      for (int64_t head = 0; head < heads; ++head)
        tiles.push_back({args.q_start[s] + offset, rows * group, head, group, seen,
                         args.block_table + s * args.table_width, base, offset});
    }
  }
  run_parallel(parallel, static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    static thread_local std::vector<Line> scratch;
    scratch.resize(scratch_lines(args.k_layout.head_dim));
    attention_kernel_in_use().tile[static_cast<int>(args.dtype)](args, tiles[i],
                                                                 scratch.data()->number);
  });
}

}  // namespace dparallel::cpu
