// Selection by one block: ranks by counting, then the rule's count.
#pragma once

#include "row_scan.cuh"

namespace dparallel::cuda {

// keys [n]: larger is better, NaN: not eligible. Writes ranks [n] (best 0, ties to the lowest
// index) and sorted, and returns to every thread how many of the `eligible` commit: those of rank
// below it.
__device__ inline int64_t select_block(const Policy& policy, const float* keys, float* sorted,
                                       int32_t* ranks, int64_t n, int64_t eligible) {
  DPARALLEL_SHARED(count, int64_t);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float key = keys[i];
    if (key != key) continue;
    int32_t rank = 0;
    for (int64_t j = 0; j < n; ++j) {
      const float other = keys[j];
      rank += other > key || (other == key && j < i);
    }
    ranks[i] = rank;
    sorted[rank] = key;
  }
  __syncthreads();
  if (threadIdx.x == 0) count = policy.count(eligible, [&](int64_t i) { return sorted[i]; });
  __syncthreads();
  return count;
}

// The sum over the block of one number per thread, for every thread.
__device__ inline int64_t sum_block(int64_t value) {
  DPARALLEL_SHARED(parts, int64_t[kWarps]);
  int32_t low = static_cast<int32_t>(value);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) low += __shfl_down_sync(kFullWarp, low, offset);
  __syncthreads();  // parts may still be read from a call before
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = low;
  __syncthreads();
  int64_t total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += parts[warp];
  return total;
}

}  // namespace dparallel::cuda
