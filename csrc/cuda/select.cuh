// Selection by one block: ranks by counting, then the rule's count.
#pragma once

#include "row_scan.cuh"

namespace dparallel::cuda {

// Keys, larger is better, and their ranks; in shared memory for as many as a sequence usually has.
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

// The sum over the block of one number per thread, for every thread.
__device__ inline int sum_block(int value) {
  DPARALLEL_SHARED(parts, int32_t[kScanWarps]);
  value = __reduce_add_sync(kFullWarp, value);
  __syncthreads();  // parts may still be read from a call before
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int warp = 0; warp < kScanWarps; ++warp) total += parts[warp];
  return total;
}

constexpr int kAtOnce = 4;  // keys that a thread ranks at once

// Ranks the n keys (best 0, ties to the lowest index) and returns to every thread how many of the
// `eligible` commit: all keys of rank below it. Where all keys beyond a threshold commit, keys are
// not ranked: the rank is 0 or the largest number. Begins and ends with a barrier.
__device__ __forceinline__ int select_block(const Policy& policy, const Ranking& ranking, int n,
                                            int eligible) {
  DPARALLEL_SHARED(reached, int32_t);  // the most that the rule alone lets commit
  if (threadIdx.x == 0) reached = 0;
  if (policy.by_threshold()) {
    __syncthreads();
    int mine = 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
      const bool passes = policy.reaches(0, ranking.keys[i]);
      ranking.ranks[i] = passes ? 0 : INT32_MAX;
      mine += passes;
    }
    const int passing = sum_block(mine);
    if (policy.limit(passing, eligible) == passing) return passing;
  }
  __syncthreads();
  const bool cumulative = policy.cumulative();
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < n; first += kAtOnce * kScanThreads) {
    float key[kAtOnce];
    int rank[kAtOnce];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      const int i = first + c * kScanThreads;
      key[c] = i < n ? ranking.keys[i] : from_bits(0x7fc00000u);
      rank[c] = 0;
    }
#pragma unroll 2
    for (int j = 0; j < n; ++j) {
      const float other = ranking.keys[j];
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c)
        rank[c] += (other > key[c]) | ((other == key[c]) & (j < first + c * kScanThreads));
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c)
      if (key[c] == key[c]) ranking.ranks[first + c * kScanThreads] = rank[c];
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
    const float key = ranking.keys[i];
    if (key != key) continue;
    const int rank = ranking.ranks[i];  // this thread's own
    if (cumulative) ranking.sorted[rank] = key;
    else if (policy.reaches(rank, key)) atomicMax(&reached, rank + 1);
  }
  __syncthreads();
  if (cumulative) {
    if (threadIdx.x == 0)
      reached = static_cast<int32_t>(
          policy.reached(eligible, [&](int64_t i) { return ranking.sorted[i]; }));
    __syncthreads();
  }
  return static_cast<int>(policy.limit(reached, eligible));
}

}  // namespace dparallel::cuda
