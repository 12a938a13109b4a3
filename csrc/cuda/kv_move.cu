// kv_move: a block moves the path of one lane, in one head of the keys or the values of a layer.
// Its threads read the whole path into registers, wait for each other, and write it; no other block
// has these elements, so one launch moves all layers.
//
// A block holds kMoveThreads * kMoveVectors vectors, 32 KB. A longer path is cut across the head
// and not along the path: elements of different columns never meet, while of two entries each may
// be the other's target. So up to 128 entries of 128 16-bit elements a block reads whole heads, and
// of 256 entries 128 bytes of each.
//
// Bytes: each entry read and written once. An entry that is in place already, as all entries of a
// chain are, costs the look at its numbers. Three trips to memory: numbers, elements, and the way
// back. 256 threads with 8 vectors each are a guess, not measured against others.
#include <type_traits>

#include "device.cuh"

// after the header that knows the device
#include "dparallel/launch.h"

namespace dparallel::cuda {
namespace {

constexpr int kMoveThreads = 256;
constexpr int kMoveVectors = 8;  // of a thread, all in flight at once
static_assert(kMostMoves <= kMoveThreads * kMoveVectors, "a block holds a vector of each entry");

// How a head is cut: a block of `threads` takes `width` of its `vectors`.
struct MoveShape {
  uint32_t vectors, width, slices, threads;

  static MoveShape of(int64_t vectors, int64_t count) {
    const int64_t held = kMoveThreads * kMoveVectors / count;
    const int64_t width = held < vectors ? held : vectors;
    const int64_t items = (width * count + 31) / 32 * 32;
    return {static_cast<uint32_t>(vectors), static_cast<uint32_t>(width),
            static_cast<uint32_t>((vectors + width - 1) / width),
            static_cast<uint32_t>(items < kMoveThreads ? items : kMoveThreads)};
  }
};

// A vector of kBytes: 16, or an element.
template <int kBytes>
using VectorOf = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint64_t, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

template <int kBytes>
__global__ void __launch_bounds__(kMoveThreads) kv_move_kernel(KvMoveArgs args, MoveShape shape) {
  using Vector = VectorOf<kBytes>;
  const CacheLayout& layout = args.layout;
  const auto heads = static_cast<uint32_t>(layout.heads), lanes = static_cast<uint32_t>(args.lanes);
  const auto count = static_cast<uint32_t>(args.count);
  const uint32_t of_lane = blockIdx.x / shape.slices, slice = blockIdx.x - of_lane * shape.slices;
  const uint32_t of_head = of_lane / lanes, lane = of_lane - of_head * lanes;
  const uint32_t of_layer = of_head / heads, head = of_head - of_layer * heads;
  const uint32_t first = slice * shape.width, left = shape.vectors - first;
  const uint32_t width = left < shape.width ? left : shape.width;
  auto* cache =
      static_cast<char*>(args.kv_cache) +
      (of_layer / 2 * args.layer_stride + of_layer % 2 * args.kv_stride) * args.element_size +
      first * kBytes;
  const int64_t* source = args.source + static_cast<int64_t>(lane) * count;
  const int64_t* target = args.target + static_cast<int64_t>(lane) * count;
  const auto page_size = static_cast<uint32_t>(layout.page_size);
  const uint64_t slots = static_cast<uint64_t>(layout.pages) * page_size;
  const auto place = [&](int64_t slot, uint32_t column) {
    const uint32_t page = static_cast<uint32_t>(slot) / page_size;
    const uint32_t at = static_cast<uint32_t>(slot) - page * page_size;
    return reinterpret_cast<Vector*>(cache + layout.offset(page, at, head) * args.element_size) +
           column;
  };
  const Vector* from[kMoveVectors];
  Vector* to[kMoveVectors];  // null: nothing moves
#pragma unroll
  for (uint32_t k = 0; k < kMoveVectors; ++k) {
    const uint32_t item = k * shape.threads + threadIdx.x, entry = item / width;
    from[k] = to[k] = nullptr;
    if (entry >= count) continue;
    const int64_t old = source[entry], slot = target[entry];
    // Negative numbers are large ones.
    const bool inside = static_cast<uint64_t>(old) < slots && static_cast<uint64_t>(slot) < slots;
    if (!inside || old == slot) continue;
    from[k] = place(old, item - entry * width);
    to[k] = place(slot, item - entry * width);
  }
  Vector held[kMoveVectors];
#pragma unroll
  for (int k = 0; k < kMoveVectors; ++k)
    if (to[k] != nullptr) held[k] = *from[k];
  __syncthreads();  // the path is read
#pragma unroll
  for (int k = 0; k < kMoveVectors; ++k)
    if (to[k] != nullptr) *to[k] = held[k];
}

template <int kBytes>
int launch(const KvMoveArgs& args, void* stream) {
  const CacheLayout& layout = args.layout;
  const int64_t vectors = layout.head_dim * args.element_size / kBytes;
  const MoveShape shape = MoveShape::of(vectors, args.count);
  const int64_t blocks = args.layers * 2 * layout.heads * args.lanes * shape.slices;
  if (blocks > INT32_MAX || layout.pages * layout.page_size > INT32_MAX)
    return static_cast<int>(cudaErrorInvalidValue);
  DPARALLEL_LAUNCH((kv_move_kernel<kBytes>), blocks, shape.threads, stream, args, shape);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int kv_move(const KvMoveArgs& args, void* stream) {
  const CacheLayout& layout = args.layout;
  if (args.layers * layout.heads * layout.head_dim * args.lanes * args.count == 0) return 0;
  if (multiples_of_16({args.kv_cache},
                      {layout.head_dim, args.layer_stride, args.kv_stride, layout.page_stride,
                       layout.head_stride, layout.slot_stride},
                      args.element_size))
    return launch<16>(args, stream);
  switch (args.element_size) {
    case 2: return launch<2>(args, stream);
    case 4: return launch<4>(args, stream);
    default: return launch<8>(args, stream);
  }
}

}  // namespace dparallel::cuda
