// Selection by one block: ranks by counting, then the rule's count.
#pragma once

#include "row_scan.cuh"

namespace dparallel::cuda {

// A key, larger is better, and its rank; in shared memory for as many as a sequence usually has.
struct Ranked {
  float key;     // NaN: not to be selected
  float sorted;  // of item i: the key of rank i
  int32_t rank;
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

// The ranks of n items: best 0, ties to the lowest index. A thread writes those of its own items,
// and reads the next two keys while it compares two.
template <class Item>
__device__ __forceinline__ void rank_block(Item* items, int n) {
  const auto key_at = [=](int i) { return i < n ? items[i].key : from_bits(0x7fc00000u); };
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < n; first += kAtOnce * kScanThreads) {
    float key[kAtOnce];
    int rank[kAtOnce];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      key[c] = key_at(first + c * kScanThreads);
      rank[c] = 0;
    }
    float next[2] = {key_at(0), key_at(1)};
#pragma unroll 1
    for (int j = 0; j < n; j += 2) {
      const float other[2] = {next[0], next[1]};
      next[0] = key_at(j + 2);
      next[1] = key_at(j + 3);
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const int i = first + c * kScanThreads;
#pragma unroll
        for (int e = 0; e < 2; ++e)
          rank[c] += (other[e] > key[c]) | ((other[e] == key[c]) & (j + e < i));
      }
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c)
      if (key[c] == key[c]) items[first + c * kScanThreads].rank = rank[c];
  }
}

// How many of the `eligible` items commit: for every thread, all items of rank below it. Where all
// keys beyond a threshold commit, they are not ranked: the rank is 0 or the largest number. Begins
// and ends with a barrier.
template <class Item>
__device__ __forceinline__ int select_block(const Policy& policy, Item* items, int n,
                                            int eligible) {
  DPARALLEL_SHARED(reached, int32_t);  // the most that the rule alone lets commit
  if (threadIdx.x == 0) reached = 0;
  __syncthreads();
  const bool cumulative = policy.cumulative(), by_threshold = policy.by_threshold();
#pragma unroll 1
  for (bool ranked = !by_threshold;; ranked = true) {
    if (ranked) rank_block(items, n);
    int passing = 0;  // the keys that pass are the best
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
      const float key = items[i].key;
      if (key != key) continue;
      const int rank = ranked ? items[i].rank : 0;  // this thread's own
      const bool passes = policy.reaches(rank, key);
      passing += passes;
      if (!ranked) items[i].rank = passes ? 0 : INT32_MAX;
      else if (cumulative) items[rank].sorted = key;
    }
    if (passing > 0 && ranked != by_threshold) atomicAdd(&reached, passing);
    __syncthreads();
    if (cumulative) {
      if (threadIdx.x == 0)
        reached = static_cast<int32_t>(
            policy.reached(eligible, [&](int64_t i) { return items[i].sorted; }));
      __syncthreads();
    }
    const auto limit = static_cast<int>(policy.limit(reached, eligible));
    if (ranked || limit == reached) return limit;
  }
}

}  // namespace dparallel::cuda
