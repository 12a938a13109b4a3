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

// How many of the `eligible` items commit: for every thread, all items of rank below it. Ranks are
// counted: best 0, ties to the lowest index. Where all keys beyond a threshold commit, they are not
// ranked: the rank is 0 or the largest number. The items are there before the last barrier, and
// ranks are after this call.
template <class Item>
__device__ __forceinline__ int select_block(const Policy& policy, Item* items, int n,
                                            int eligible) {
  int reached = 0;  // the most that the rule alone lets commit
#pragma unroll 1
  for (bool ranked = !policy.by_threshold();; ranked = true) {
    int passing = 0;  // the keys that pass are the best
#pragma unroll 1
    for (int first = 0; first < n; first += kScanThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      const float key = i < n ? items[i].key : from_bits(0x7fc00000u);
      bool passes = false;
      if (key == key) {
        int rank = 0;
        if (ranked) {
          float next = items[0].key;
#pragma unroll 1
          for (int j = 0; j < n; ++j) {
            const float other = next;
            next = items[j + 1 < n ? j + 1 : 0].key;  // on its way while two are compared
            rank += (other > key) | ((other == key) & (j < i));
          }
          items[rank].sorted = key;
        }
        passes = policy.reaches(rank, key);
        items[i].rank = ranked || passes ? rank : INT32_MAX;
      }
      passing += __syncthreads_count(passes);
    }
    if (ranked != policy.by_threshold()) reached = passing;
    if (policy.cumulative())
      reached = policy.reached(eligible, [&](int i) { return items[i].sorted; });
    const int limit = policy.limit(reached, eligible);
    if (ranked || limit == reached) return limit;
  }
}

}  // namespace dparallel::cuda
