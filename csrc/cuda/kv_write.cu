// kv_write: one thread rotates W pairs of one head of one row: of q in place, of k into the cache,
// where it copies the same elements of v too. Nobody else reads or writes those elements.
//
// Bytes: q read and written, k and v read and written once; the tables and the numbers of a row
// come from the caches. A row's position and slot, and the elements of q, k and v, are requested
// first, the tables as soon as the position is there, and nothing but an address waits for the
// slot: two trips to memory. Numbers of rows, heads and slots are of 32 bits, addresses of 64.
#include "vectors.cuh"

namespace dparallel::cuda {
namespace {

// Small, so that the few rows of a decode pass reach every SM.
constexpr int kWriteThreads = 128;
// At least: up to 128 registers a thread. With fewer, ptxas puts loads after what waits for others.
constexpr int kWriteBlocksPerSm = 4;

// Of a table, the W numbers from `p` on.
template <int W>
__device__ __forceinline__ void load_table(const float* p, float (&x)[W]) {
  if constexpr (W == 1) {
    x[0] = *p;
  } else {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(p + i);
      memcpy(x + i, &four, sizeof four);
    }
  }
}

// Rotates W pairs. Element e of the two vectors together is x[e / W][e % W]; pair i is (2i, 2i + 1)
// of them, or (i, i + W).
template <class T, int W>
__device__ __forceinline__ void rotate(typename Elements<T, W>::Vector (&stored)[2],
                                       const float (&cos)[W], const float (&sin)[W],
                                       bool interleaved) {
  using E = Elements<T, W>;
  float x[2][W], y[2][W];
  E::widen(stored[0], x[0]);
  E::widen(stored[1], x[1]);
#pragma unroll
  for (int i = 0; i < W; ++i) {
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
  stored[0] = E::narrow(y[0]);
  stored[1] = E::narrow(y[1]);
}

// `units`: runs of W pairs in a head.
template <class T, int W>
__global__ void __launch_bounds__(kWriteThreads, kWriteBlocksPerSm)
    kv_write_kernel(KvWriteArgs args, uint32_t units) {
  using Storage = typename T::Storage;
  using E = Elements<T, W>;
  using Vector = typename E::Vector;
  const auto q_heads = static_cast<uint32_t>(args.q_heads);
  const auto dim = static_cast<uint32_t>(args.k_layout.head_dim);
  const uint32_t of_row = units * (q_heads + static_cast<uint32_t>(args.k_layout.heads));
  const uint32_t item = blockIdx.x * kWriteThreads + threadIdx.x;
  const uint32_t row = item / of_row, unit = item - row * of_row;
  if (row >= args.count) return;
  const int64_t position = args.positions[row], slot = args.slot_mapping[row];
  uint32_t head = unit / units;  // the query heads come first
  const uint32_t pair = (unit - head * units) * W;
  const uint32_t at[2] = {args.interleaved ? 2 * pair : pair,
                          args.interleaved ? 2 * pair + W : pair + dim / 2};
  const bool of_q = head < q_heads;
  if (!of_q) head -= q_heads;
  auto* q = static_cast<Storage*>(args.q) + row * args.q_stride + head * dim;
  const auto* k = static_cast<const Storage*>(args.k) + row * args.k_stride + head * dim;
  const auto* v = static_cast<const Storage*>(args.v) + row * args.v_stride + head * dim;
  const auto* from = of_q ? q : k;
  Vector x[2] = {E::load(from + at[0]), E::load(from + at[1])}, values[2];
  if (!of_q) {
    values[0] = E::load_once(v + at[0]);
    values[1] = E::load_once(v + at[1]);
  }
  float cos[W], sin[W];
  load_table<W>(args.cos + position * (dim / 2) + pair, cos);
  load_table<W>(args.sin + position * (dim / 2) + pair, sin);
  rotate<T, W>(x, cos, sin, args.interleaved);
  if (!of_q && slot < 0) return;  // every thread asks for the slot, lest it come last
  const auto page_size = static_cast<uint32_t>(args.k_layout.page_size);  // of the values too
  const uint32_t page = static_cast<uint32_t>(slot) / page_size;
  const uint32_t place = static_cast<uint32_t>(slot) - page * page_size;
  auto* keys = static_cast<Storage*>(args.k_cache) + args.k_layout.offset(page, place, head);
  auto* to = of_q ? q : keys;
  E::store(to + at[0], x[0]);
  E::store(to + at[1], x[1]);
  if (of_q) return;
  auto* out = static_cast<Storage*>(args.v_cache) + args.v_layout.offset(page, place, head);
  E::store(out + at[0], values[0]);
  E::store(out + at[1], values[1]);
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
    const auto units = static_cast<uint32_t>(vectors ? pairs / W : pairs);
    const int64_t items = args.count * heads * units;
    if (items > INT32_MAX)
      return static_cast<int>(cudaErrorInvalidValue);  // 8 GB of q and k, at least
    const auto grid = static_cast<unsigned>((items + kWriteThreads - 1) / kWriteThreads);
    if (vectors)
      DPARALLEL_LAUNCH((kv_write_kernel<T, W>), grid, kWriteThreads, stream, args, units);
    else DPARALLEL_LAUNCH((kv_write_kernel<T, 1>), grid, kWriteThreads, stream, args, units);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
