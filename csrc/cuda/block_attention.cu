// block_attention: a block of threads takes kRows query rows of one segment and key head (the heads
// that share it side by side) through the segment's slots, kKeys at a time. In a step a thread
// scores one key against every row, then gathers one element of every row's sum.
#include "device.cuh"
#include "dparallel/launch.h"

namespace dparallel::cuda {
namespace {

constexpr int kThreads = 128, kKeys = kThreads, kRows = 4;
constexpr int kMaxDim = 256,
              kOwned = kMaxDim / kThreads;  // elements of the head that a thread owns

struct Shared {
  float query[kRows][kMaxDim];
  float weight[kRows][kKeys];  // scores, then their exponentials
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    block_attention_kernel(BlockAttentionArgs args, int64_t tiles) {
  using Storage = typename T::Storage;
  DPARALLEL_SHARED(shared, Shared);
  const CacheLayout &keys = args.k_layout, &values = args.v_layout;
  const int64_t dim = keys.head_dim, group = args.q_heads / keys.heads;
  const int64_t head = blockIdx.x % keys.heads, tile = blockIdx.x / keys.heads % tiles;
  const int64_t segment = blockIdx.x / (keys.heads * tiles);
  const int64_t begin = args.begin[segment], length = args.length[segment];
  const int64_t* pages = args.pages + segment * args.table_width;
  const int64_t first = tile * kRows;  // row r of the tile: query row (first + r) / group
  const int64_t left = (args.end[segment] - begin) * group - first;
  if (left <= 0) return;
  const int rows = left < kRows ? static_cast<int>(left) : kRows;
  const auto row_at = [&](int r) {
    return (begin + (first + r) / group) * args.q_stride +
           (head * group + (first + r) % group) * dim;
  };
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    for (int64_t d = threadIdx.x; d < dim; d += kThreads)
      shared.query[r][d] =
          r < rows ? args.scale * T::value(static_cast<const Storage*>(args.q)[row_at(r) + d])
                   : 0.0f;
  float top[kRows], sum[kRows], out[kRows][kOwned];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    top[r] = -kInfinity;
    sum[r] = 0.0f;
    for (int i = 0; i < kOwned; ++i) out[r][i] = 0.0f;
  }
  for (int64_t start = 0; start < length; start += kKeys) {
    const int count = length - start < kKeys ? static_cast<int>(length - start) : kKeys;
    const int64_t slot = start + threadIdx.x;
    __syncthreads();  // the queries are there; the last step's weights are done with
    float score[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) score[r] = 0.0f;
    if (static_cast<int>(threadIdx.x) < count) {
      const auto* k = static_cast<const Storage*>(args.k_cache) +
                      keys.offset(pages[slot / keys.page_size], slot % keys.page_size, head);
#pragma unroll 2
      for (int d = 0; d < static_cast<int>(dim); ++d) {
        const float x = T::value(k[d]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) score[r] += shared.query[r][d] * x;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared.weight[r][threadIdx.x] = score[r];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // every thread the same maximum and sum, in the same order
      float now = top[r];
#pragma unroll 2
      for (int j = 0; j < count; ++j) now = shared.weight[r][j] > now ? shared.weight[r][j] : now;
      const float m = now == -kInfinity ? 0.0f : now;
      const float kept = top[r] == -kInfinity ? 0.0f : exp2_fast((top[r] - m) * kLog2e);
      top[r] = now;
      sum[r] *= kept;
#pragma unroll 2
      for (int j = 0; j < count; ++j) sum[r] += exp2_fast((shared.weight[r][j] - m) * kLog2e);
#pragma unroll
      for (int i = 0; i < kOwned; ++i) out[r][i] *= kept;
    }
    __syncthreads();  // every thread has read the scores
    if (static_cast<int>(threadIdx.x) < count)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float m = top[r] == -kInfinity ? 0.0f : top[r];
        shared.weight[r][threadIdx.x] = exp2_fast((shared.weight[r][threadIdx.x] - m) * kLog2e);
      }
    __syncthreads();
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const int64_t at = start + j;
      const auto* v = static_cast<const Storage*>(args.v_cache) +
                      values.offset(pages[at / keys.page_size], at % keys.page_size, head);
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        const int64_t d = threadIdx.x + i * kThreads;
        if (d >= dim) continue;
        const float x = T::value(v[d]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) out[r][i] += shared.weight[r][j] * x;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    const int64_t d = threadIdx.x + i * kThreads;
    if (d >= dim) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      const int64_t at =
          ((begin + (first + r) / group) * args.q_heads + head * group + (first + r) % group) *
              dim +
          d;
      static_cast<Storage*>(args.out)[at] = T::narrow(length > 0 ? out[r][i] / sum[r] : 0.0f);
    }
  }
}

}  // namespace

int64_t block_attention_scratch(const BlockAttentionArgs&) { return 0; }
int64_t block_attention_counters(const BlockAttentionArgs&) { return 0; }

int block_attention(const BlockAttentionArgs& args, const Workspace&, void* stream) {
  const int64_t group = args.q_heads / args.k_layout.heads;
  const int64_t tiles = (args.longest_query * group + kRows - 1) / kRows;
  const int64_t grid = args.segments * tiles * args.k_layout.heads;
  if (grid == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    DPARALLEL_LAUNCH(block_attention_kernel<T>, static_cast<unsigned>(grid), kThreads, stream, args,
                     tiles);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
