// The nucleus of a row (top-p, top-k), found by one block, in a launch ahead of the one that
// samples.
//
// Work: a radix selection (dparallel/nucleus.h): the block finds the largest logit, and then in
// each of up to six levels a histogram of 2048 bins, of counts and of probability, by atomic
// additions in shared memory. The first three levels are digits of the logit, and the others of the
// id, which decide between equal logits.
//
// Bytes: the row once for the maximum and once for each level; the L2 cache holds it after the
// first read where rows are few. 256 threads and a block for each row are guesses: this launch is
// not measured, and rows without top-p and top-k do without it.
#pragma once

#include "row_scan.cuh"

namespace dparallel::cuda {

// visit(z, id) for every admissible id whose logit is above -inf, each by one thread.
template <class T, class Visit>
__device__ __forceinline__ void visit_admissible(const void* row, int64_t vocab,
                                                 const Exclusions& ex, Visit visit) {
  constexpr int W = T::kWidth;
  const auto* z = static_cast<const typename T::Storage*>(row);
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  for (int64_t first = static_cast<int64_t>(threadIdx.x) * W; first < vocab;
       first += static_cast<int64_t>(kThreads) * W) {
    float values[W];
    if (first + W <= vocab) {
      widen<T>(load_stored<T>(z + first, aligned), values);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i)
        values[i] = first + i < vocab ? T::value(z[first + i]) : -kInfinity;
    }
#pragma unroll 1
    for (int64_t s = 0; s < ex.suppress_count; ++s) {
      const int64_t at = ex.suppress[s] - first;
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (i == at) values[i] = -kInfinity;
    }
#pragma unroll
    for (int i = 0; i < W; ++i)
      if (first + i != ex.mask_id && values[i] > -kInfinity)  // no NaN
        visit(clamp_logit(values[i]), first + i);
  }
}

// Called by every thread of the block; the result is the same for all.
template <class T>
__device__ Nucleus find_nucleus(const void* row, int64_t vocab, const Exclusions& ex,
                                const Sampling& sampling) {
  constexpr int kGroup = kNucleusBins / kThreads;
  DPARALLEL_SHARED(counts, uint32_t[kNucleusBins]);
  DPARALLEL_SHARED(masses, unsigned long long[kNucleusBins]);
  DPARALLEL_SHARED(group_counts, uint32_t[kThreads]);
  DPARALLEL_SHARED(group_masses, unsigned long long[kThreads]);
  DPARALLEL_SHARED(search, NucleusSearch);
  DPARALLEL_SHARED(lowest, uint32_t);  // ~ the key of the largest logit
  DPARALLEL_SHARED(done, bool);
  const bool by_mass = sampling.top_p < 1.0;
  const float inverse = sampling.inverse_temperature;
  if (threadIdx.x == 0) {
    lowest = ~0u;
    search = NucleusSearch::of(0, sampling.top_k);
    done = false;
  }
  __syncthreads();
  uint32_t largest = 0;
  visit_admissible<T>(row, vocab, ex, [&](float z, int64_t) {
    const uint32_t high = static_cast<uint32_t>(nucleus_key(z, 0) >> 32);
    if (high > largest) largest = high;
  });
  atomicMin(&lowest, ~largest);
  __syncthreads();
  if (lowest == ~0u) return {};  // a bad row, which the scan reports
  const float top = nucleus_logit(~lowest);
#pragma unroll 1
  for (int next = 0; next < kNucleusLevels && !done; ++next) {
    const int level = anew(next);  // or the first level would have code of its own
#pragma unroll 1
    for (int i = threadIdx.x; i < kNucleusBins; i += kThreads) {
      counts[i] = 0;
      masses[i] = 0;
    }
    __syncthreads();
    const uint64_t prefix = search.prefix;
    visit_admissible<T>(row, vocab, ex, [&](float z, int64_t id) {
      const int bin = NucleusSearch::digit(level, nucleus_key(z, id), prefix);
      if (bin < 0) return;
      atomicAdd(&counts[bin], 1u);
      if (by_mass)
        atomicAdd(&masses[bin], static_cast<unsigned long long>(nucleus_weight(z, top, inverse)));
    });
    __syncthreads();
    uint32_t count = 0;
    unsigned long long mass = 0;
    for (int i = 0; i < kGroup; ++i) {
      count += counts[threadIdx.x * kGroup + i];
      mass += masses[threadIdx.x * kGroup + i];
    }
    group_counts[threadIdx.x] = count;
    group_masses[threadIdx.x] = mass;
    __syncthreads();
    if (threadIdx.x == 0) {
      if (level == 0) {
        unsigned long long total = 0;
#pragma unroll 4
        for (int i = 0; i < kThreads; ++i) total += group_masses[i];
        search.limit = nucleus_limit(sampling.top_p, total);
      }
      int at = 0;  // a group, then one of its bins
#pragma unroll 1
      for (int n = kThreads; n > 0; n = n == kThreads ? kGroup : 0) {
        const uint32_t* of_counts = n == kThreads ? group_counts : counts + at * kGroup;
        const unsigned long long* of_masses = n == kThreads ? group_masses : masses + at * kGroup;
        at = at * kGroup +
             search.walk(n, [&](int i) { return NucleusBin{of_counts[i], of_masses[i]}; });
      }
      done = search.descend(level, at, {counts[at], masses[at]});
    }
    __syncthreads();
  }
  return search.found;
}

}  // namespace dparallel::cuda
