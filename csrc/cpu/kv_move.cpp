// kv_move on the CPU: heads of a lane in parallel, each read whole and then written.
#include <cstring>
#include <memory>

#include "dparallel/launch.h"
#include "parallel.h"

namespace dparallel::cpu {

void kv_move(const KvMoveArgs& args, Parallel parallel) {
  const CacheLayout& layout = args.layout;
  const int64_t bytes = layout.head_dim * args.element_size;
  if (bytes == 0 || args.count == 0) return;  // an empty tensor has no address
  run_parallel(parallel, args.layers * 2 * layout.heads * args.lanes, [&](int64_t item) {
    const int64_t lane = item % args.lanes, head = item / args.lanes % layout.heads;
    const int64_t kv = item / args.lanes / layout.heads % 2;
    const int64_t layer = item / args.lanes / layout.heads / 2;
    auto* cache = static_cast<char*>(args.kv_cache) +
                  (layer * args.layer_stride + kv * args.kv_stride) * args.element_size;
    const int64_t* source = args.source + lane * args.count;
    const int64_t* target = args.target + lane * args.count;
    const auto at = [&](int64_t slot) {
      return cache + args.element_size *
                         layout.offset(slot / layout.page_size, slot % layout.page_size, head);
    };
    const auto moves = [&](int64_t i) {
      return source[i] >= 0 && target[i] >= 0 && source[i] != target[i];
    };
    const std::unique_ptr<char[]> path(new char[args.count * bytes]);
    for (int64_t i = 0; i < args.count; ++i)
      if (moves(i)) std::memcpy(path.get() + i * bytes, at(source[i]), bytes);
    for (int64_t i = 0; i < args.count; ++i)
      if (moves(i)) std::memcpy(at(target[i]), path.get() + i * bytes, bytes);
  });
}

}  // namespace dparallel::cpu
