// Selection by one block: ranks by counting, then the rule's count.
#pragma once

#include "row_scan.cuh"

namespace dparallel::cuda {

// Keys, larger is better, and what becomes of them; in shared memory for as many as a sequence
// usually has.
struct Ranking {
  float* keys;     // [n]; NaN: not to be selected
  float* sorted;   // [n]
  int32_t* ranks;  // [n]

  static constexpr int kBytes = 12;
  __host__ __device__ static Ranking at(void* memory, int64_t n) {
    auto* keys = static_cast<float*>(memory);
    return {keys, keys + n, reinterpret_cast<int32_t*>(keys + 2 * n)};
  }
};

// Ranks the n keys (best 0, ties to the lowest index) and returns to every thread how many of the
// `eligible` commit: those of rank below it. Begins and ends with a barrier.
__device__ __forceinline__ int select_block(const Policy& policy, const Ranking& ranking, int n,
                                            int eligible) {
  DPARALLEL_SHARED(reached, int32_t);  // the most that the rule alone lets commit
  if (threadIdx.x == 0) reached = 0;
  __syncthreads();
  const bool cumulative = policy.selector == kSelectEntropyBound;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
    const float key = ranking.keys[i];
    if (key != key) continue;
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < n; ++j) {
      const float other = ranking.keys[j];
      rank += other > key || (other == key && j < i);
    }
    ranking.ranks[i] = rank;
    if (cumulative) ranking.sorted[rank] = key;
    else if (policy.reaches(rank, key)) atomicMax(&reached, rank + 1);
  }
  __syncthreads();
  if (cumulative) {
    if (threadIdx.x == 0)
      reached = static_cast<int32_t>(
          policy.count(eligible, [&](int64_t i) { return ranking.sorted[i]; }));
    __syncthreads();
  }
  return static_cast<int>(policy.limit(reached, eligible));
}

// The sum over the block of one number per thread, for every thread.
__device__ inline int sum_block(int value) {
  DPARALLEL_SHARED(parts, int32_t[kScanWarps]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  __syncthreads();  // parts may still be read from a call before
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int warp = 0; warp < kScanWarps; ++warp) total += parts[warp];
  return total;
}

}  // namespace dparallel::cuda
