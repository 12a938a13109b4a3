// kv_write: one thread rotates W pairs of one head of one row: of q in place, of k into the cache,
// where it copies the same elements of v too. Nobody else reads or writes those elements.
#include "device.cuh"
#include "dparallel/launch.h"
#include "vectors.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kWriteThreads = 256;

// The pairs first ... first + W - 1 of a head: `from` rotated into `to`, which may be `from`. They
// lie in two runs of W elements, at `at[0]` and `at[1]`.
template <class T, int W>
__device__ __forceinline__ void rotate(const typename T::Storage* from, typename T::Storage* to,
                                       const int64_t (&at)[2], const float* cos, const float* sin,
                                       bool interleaved) {
  using E = Elements<T, W>;
  float x[2][W], y[2][W];
  E::load(from + at[0], x[0]);
  E::load(from + at[1], x[1]);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    // Element e of the two runs together is x[e / W][e % W]: pair i is (2i, 2i + 1), or (i, i + W).
    float &a = x[2 * i / W][2 * i % W], &b = x[(2 * i + 1) / W][(2 * i + 1) % W];
    const float first = interleaved ? a : x[0][i], second = interleaved ? b : x[1][i];
    const float turned_first = first * cos[i] - second * sin[i];
    const float turned_second = second * cos[i] + first * sin[i];
    if (interleaved) {
      y[2 * i / W][2 * i % W] = turned_first;
      y[(2 * i + 1) / W][(2 * i + 1) % W] = turned_second;
    } else {
      y[0][i] = turned_first;
      y[1][i] = turned_second;
    }
  }
  E::store(to + at[0], y[0]);
  E::store(to + at[1], y[1]);
}

// `units`: runs of W pairs in a head.
template <class T, int W>
__global__ void __launch_bounds__(kWriteThreads) kv_write_kernel(KvWriteArgs args, int64_t units) {
  using Storage = typename T::Storage;
  const int64_t dim = args.k_layout.head_dim, heads = args.k_layout.heads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWriteThreads + threadIdx.x;
  const int64_t row = item / (units * (args.q_heads + heads));
  if (row >= args.count) return;
  const int64_t head = item / units % (args.q_heads + heads);  // the query heads come first
  const int64_t pair = item % units * W;
  const int64_t at[2] = {args.interleaved ? 2 * pair : pair,
                         args.interleaved ? 2 * pair + W : pair + dim / 2};
  const int64_t entry = args.positions[row] * (dim / 2) + pair;
  float cos[W], sin[W];
#pragma unroll
  for (int i = 0; i < W; i += W < 4 ? 1 : 4) {
    Elements < Float32, W<4 ? 1 : 4>::load(args.cos + entry + i,
                                           *reinterpret_cast<float (*)[W < 4 ? 1 : 4]>(cos + i));
    Elements < Float32, W<4 ? 1 : 4>::load(args.sin + entry + i,
                                           *reinterpret_cast<float (*)[W < 4 ? 1 : 4]>(sin + i));
  }
  if (head < args.q_heads) {
    Storage* q = static_cast<Storage*>(args.q) + row * args.q_stride + head * dim;
    rotate<T, W>(q, q, at, cos, sin, args.interleaved);
    return;
  }
  const int64_t slot = args.slots[row], h = head - args.q_heads;
  if (slot < 0) return;
  const CacheLayout &kl = args.k_layout, &vl = args.v_layout;
  const auto* k = static_cast<const Storage*>(args.k) + row * args.k_stride + h * dim;
  const auto* v = static_cast<const Storage*>(args.v) + row * args.v_stride + h * dim;
  auto* k_out =
      static_cast<Storage*>(args.k_cache) + kl.offset(slot / kl.page_size, slot % kl.page_size, h);
  auto* v_out =
      static_cast<Storage*>(args.v_cache) + vl.offset(slot / vl.page_size, slot % vl.page_size, h);
  rotate<T, W>(k, k_out, at, cos, sin, args.interleaved);
  Elements<T, W>::copy(v + at[0], v_out + at[0]);
  Elements<T, W>::copy(v + at[1], v_out + at[1]);
}

// Whether every run of `width` pairs is two whole vectors in each of the tensors and the tables.
bool vectorises(const KvWriteArgs& args, int64_t width) {
  const CacheLayout &k = args.k_layout, &v = args.v_layout;
  return k.head_dim % (2 * width) == 0 &&
         multiples_of_16({args.q, args.k, args.v, args.k_cache, args.v_cache, args.cos, args.sin},
                         {args.q_stride, args.k_stride, args.v_stride, k.page_stride, k.head_stride,
                          k.slot_stride, v.page_stride, v.head_stride, v.slot_stride},
                         element_size(args.dtype));
}

}  // namespace

int kv_write(const KvWriteArgs& args, void* stream) {
  const int64_t heads = args.q_heads + args.k_layout.heads, pairs = args.k_layout.head_dim / 2;
  if (args.count * heads * pairs == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int W = T::kWidth;
    const bool vectors = vectorises(args, W);
    const int64_t units = vectors ? pairs / W : pairs;
    const auto grid =
        static_cast<unsigned>((args.count * heads * units + kWriteThreads - 1) / kWriteThreads);
    if (vectors)
      DPARALLEL_LAUNCH((kv_write_kernel<T, W>), grid, kWriteThreads, stream, args, units);
    else DPARALLEL_LAUNCH((kv_write_kernel<T, 1>), grid, kWriteThreads, stream, args, units);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
