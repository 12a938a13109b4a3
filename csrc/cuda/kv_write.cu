// kv_write: one thread rotates W pairs of one head of one row: of q in place, of k into the cache,
// where it copies the same elements of v too. No other thread reads or writes these elements.
//
// Bytes: q read and written, k and v read and written once; the tables and the numbers of a row
// come from the caches. A row's position and slot, and the elements of q, k and v, are requested
// first, the tables as soon as the position is there, and nothing but an address waits for the
// slot: two trips to memory. Numbers of rows, heads and slots are of 32 bits, addresses of 64.
//
// With norms the sum of a head's squares is taken over its threads, neighbours in a warp, as a
// balanced tree (layer_math.cuh), which differs from the order of rms_norm. Where a head has no
// power of two of whole vectors, a warp takes it in single pairs, and reads each twice.
#include "cluster.cuh"
#include "layer_math.cuh"
#include "vectors.cuh"

namespace dparallel::cuda {
namespace {

// Small, so that the few rows of a decode pass reach every SM.
constexpr int kWriteThreads = 128;
// At least: up to 128 registers a thread. With fewer, ptxas puts loads behind code that waits for
// other loads.
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

// Rotates W pairs: pair i is element i of the one vector and of the other.
template <class T, int W>
__device__ __forceinline__ void rotate(typename Elements<T, W>::Vector (&stored)[2],
                                       const float (&cos)[W], const float (&sin)[W]) {
  using E = Elements<T, W>;
  float a[W], b[W], first[W], second[W];
  E::widen(stored[0], a);
  E::widen(stored[1], b);
#pragma unroll
  for (int i = 0; i < W; ++i) rotate_pair(a[i], b[i], cos[i], sin[i], first[i], second[i]);
  stored[0] = E::narrow(first);
  stored[1] = E::narrow(second);
}

template <class T, int W>
__device__ __forceinline__ float squares(const typename Elements<T, W>::Vector (&stored)[2]) {
  float a[W], b[W];
  Elements<T, W>::widen(stored[0], a);
  Elements<T, W>::widen(stored[1], b);
#pragma unroll
  for (int i = 0; i < W; ++i) a[i] = pair_squares(a[i], b[i]);
#pragma unroll
  for (int width = 1; width < W; width *= 2)
#pragma unroll
    for (int i = 0; i < W; i += 2 * width) a[i] += a[i + width];
  return a[0];
}

template <class T, int W>
__device__ __forceinline__ void scale(typename Elements<T, W>::Vector (&stored)[2],
                                      const typename Elements<T, W>::Vector (&weights)[2],
                                      float by) {
  using E = Elements<T, W>;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float x[W], weight[W];
    E::widen(stored[n], x);
    E::widen(weights[n], weight);
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] *= by;
    E::round(x);
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] *= weight[i];
    stored[n] = E::narrow(x);
  }
}

// Where run `run` of `width` pairs lies in its head, two vectors: the first `turned` runs are
// rotated, and the others are two vectors side by side.
struct Run {
  uint32_t pair, at[2];
  bool turns;

  __device__ __forceinline__ Run(uint32_t run, uint32_t width, uint32_t turned)
      : pair(run * width), turns(run < turned) {
    at[0] = turns ? pair : 2 * pair;  // the rotated ones before hold two vectors each
    at[1] = at[0] + (turns ? turned * width : width);
  }
};

// `units`: runs of W pairs in a head; `turned`: see Run.
template <class T, int W, bool kNorms>
__global__ void __launch_bounds__(kWriteThreads, kWriteBlocksPerSm)
    kv_write_kernel(KvWriteArgs args, uint32_t units, uint32_t turned) {
  using Storage = typename T::Storage;
  using E = Elements<T, W>;
  using Vector = typename E::Vector;
  const auto q_heads = static_cast<uint32_t>(args.q_heads);
  const auto dim = static_cast<uint32_t>(args.k_layout.head_dim);
  constexpr bool kWarp = kNorms && W == 1;  // a warp takes a head, each lane every 32nd run
  const uint32_t threads = kWarp ? 32 : units;
  const uint32_t of_row = threads * (q_heads + static_cast<uint32_t>(args.k_layout.heads));
  const uint32_t item = blockIdx.x * kWriteThreads + threadIdx.x;
  const uint32_t row = item / of_row, unit = item - row * of_row;
  wait_for_earlier();
  const bool here = row < args.count;
  if ((!kNorms || kWarp) && !here) return;  // else each lane comes to the sum
  int64_t position = 0, slot = 0;
  if (here) {
    position = args.positions[row];
    slot = args.slot_mapping[row];
  }
  uint32_t head = unit / threads;  // the query heads come first
  uint32_t run = unit - head * threads;
  const bool of_q = head < q_heads;
  if (!of_q) head -= q_heads;
  auto* q = static_cast<Storage*>(args.q) + row * args.q_stride + head * dim;
  const auto* k = static_cast<const Storage*>(args.k) + row * args.k_stride + head * dim;
  const auto* v = static_cast<const Storage*>(args.v) + row * args.v_stride + head * dim;
  const auto* from = of_q ? q : k;
  const auto* weight = static_cast<const Storage*>(of_q ? args.q_norm : args.k_norm);
  float sum = 0.0f;
  if constexpr (kWarp) {
    for (uint32_t other = run; other < units; other += threads) {
      const Run own(other, W, turned);
      sum += squares<T, W>({E::load(from + own.at[0]), E::load(from + own.at[1])});
    }
    sum = sum_over(sum, threads);
    if (run >= units) return;
  }
  do {  // once, but of a warp's lane
    const Run own(run, W, turned);
    const auto& at = own.at;
    Vector x[2], values[2], weights[2];
    if (here) {
      x[0] = E::load(from + at[0]);
      x[1] = E::load(from + at[1]);
      if (!of_q) {
        values[0] = E::load_once(v + at[0]);
        values[1] = E::load_once(v + at[1]);
      }
    }
    if constexpr (kNorms) {
      weights[0] = E::load(weight + at[0]);
      weights[1] = E::load(weight + at[1]);
    }
    float cos[W], sin[W];
    if (own.turns) {
      load_table<W>(args.cos + position * (turned * W) + own.pair, cos);
      load_table<W>(args.sin + position * (turned * W) + own.pair, sin);
      if constexpr (!kNorms) rotate<T, W>(x, cos, sin);
    } else if (of_q && !kNorms) {
      return;
    }
    if constexpr (kNorms) {
      if constexpr (!kWarp) sum = sum_over(here ? squares<T, W>(x) : 0.0f, threads);
      if (!here) return;
      scale<T, W>(x, weights, norm_factor(sum, dim, args.eps));
      if (own.turns) rotate<T, W>(x, cos, sin);
    }
    if (!of_q && slot < 0) return;  // every thread asks for the slot, lest it come last
    const auto page_size = static_cast<uint32_t>(args.k_layout.page_size);  // of the values too
    const uint32_t page = static_cast<uint32_t>(slot) / page_size;
    const uint32_t place = static_cast<uint32_t>(slot) - page * page_size;
    auto* keys = static_cast<Storage*>(args.k_cache) + args.k_layout.offset(page, place, head);
    auto* to = of_q ? q : keys;
    E::store(to + at[0], x[0]);
    E::store(to + at[1], x[1]);
    if (of_q) continue;
    auto* out = static_cast<Storage*>(args.v_cache) + args.v_layout.offset(page, place, head);
    E::store(out + at[0], values[0]);
    E::store(out + at[1], values[1]);
  } while (kWarp && (run += threads) < units);
}

// Whether every run of `width` pairs is two whole vectors in each of the tensors and the tables.
bool vectorises(const KvWriteArgs& args, int64_t width) {
  const CacheLayout &k = args.k_layout, &v = args.v_layout;
  return k.head_dim % (2 * width) == 0 && args.rotary_dim % (2 * width) == 0 &&
         multiples_of_16({args.q, args.k, args.v, args.k_cache, args.v_cache, args.cos, args.sin,
                          args.q_norm, args.k_norm},
                         {args.q_stride, args.k_stride, args.v_stride, k.page_stride, k.head_stride,
                          k.slot_stride, v.page_stride, v.head_stride, v.slot_stride},
                         element_size(args.dtype));
}

template <class T, int W, bool kNorms>
int launch(const KvWriteArgs& args, void* stream) {
  const int64_t heads = args.q_heads + args.k_layout.heads, units = args.k_layout.head_dim / 2 / W;
  const int64_t items = args.count * heads * (kNorms && W == 1 ? 32 : units);
  if (items > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  const int64_t grid = (items + kWriteThreads - 1) / kWriteThreads;
  return DPARALLEL_LAUNCH_EARLY((kv_write_kernel<T, W, kNorms>), grid, kWriteThreads, stream, args,
                                static_cast<uint32_t>(units),
                                static_cast<uint32_t>(args.rotary_dim / 2 / W));
}

}  // namespace

int kv_write(const KvWriteArgs& args, void* stream) {
  const int64_t heads = args.q_heads + args.k_layout.heads, pairs = args.k_layout.head_dim / 2;
  if (args.count * heads * pairs == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int W = T::kWidth;
    const bool vectors = vectorises(args, W);
    if (args.q_norm == nullptr)
      return vectors ? launch<T, W, false>(args, stream) : launch<T, 1, false>(args, stream);
    const int64_t units = pairs / W;
    const bool in_warp = units <= 32 && (units & (units - 1)) == 0;
    return vectors && in_warp ? launch<T, W, true>(args, stream) : launch<T, 1, true>(args, stream);
  });
}

}  // namespace dparallel::cuda
