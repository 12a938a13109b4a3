// Merging: the parts of a row that lanes, warps or blocks have become the row's, in a fixed order.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace dparallel::cuda {

template <class Part>
__device__ __forceinline__ Part shuffle_xor(const Part& part, int offset) {
  static_assert(sizeof(Part) % 4 == 0, "");
  uint32_t words[sizeof(Part) / 4];
  memcpy(words, &part, sizeof part);
#pragma unroll
  for (auto& word : words) word = __shfl_xor_sync(kFullWarp, word, offset);
  Part other;
  memcpy(&other, words, sizeof other);
  return other;
}

// The parts of `width` neighbouring lanes, merged in an order that depends on the width alone. All
// of them have the result, since merging is commutative to the bit; or lane 0 alone, where the
// width is no power of two and the lanes beyond it have empty parts.
template <class Part, class Merge>
__device__ __forceinline__ void merge_lanes(Part& part, int width, Merge merge) {
#pragma unroll 1
  for (int offset = 1; offset < width; offset *= 2) merge(part, shuffle_xor(part, offset));
}

// All of the block's parts, merged in a fixed order; valid in thread 0.
template <class Part, int kParts, class Merge>
__device__ __forceinline__ Part merge_block(Part part, Part (&shared)[kParts], Merge merge) {
  merge_lanes(part, 32, merge);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int warp = 1; warp < kParts; ++warp) merge(part, shared[warp]);
  }
  return part;
}

// Another block's part: past the L1 cache.
template <class Part>
__device__ __forceinline__ Part read_part(const Part* p) {
  using Word = std::conditional_t<alignof(Part) % 8 == 0, uint64_t, uint32_t>;
  Word words[sizeof(Part) / sizeof(Word)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof words / sizeof(Word)); ++i)
    words[i] = __ldcg(reinterpret_cast<const Word*>(p) + i);
  Part part;
  memcpy(&part, words, sizeof part);
  return part;
}

// Of the chunks of a row, at least one, parts[first] and on, by a warp: each lane merges every
// 32nd, then they merge theirs, in an order that depends on the number of chunks alone. All lanes
// whose number is below the number of chunks have the row's part.
template <class Part, class Merge>
__device__ __forceinline__ Part merge_chunks(const Part* parts, int first, int chunks,
                                             Merge merge) {
  Part part;
  int c = static_cast<int>(threadIdx.x % 32), left = chunks, offset = 1;
#pragma unroll 1
  do {
    Part other;
    if (left > 0) {
      if (c < chunks) other = read_part(parts + (first + c));
      c += 32;
      left -= 32;
    } else {
      other = shuffle_xor(part, offset);
      offset *= 2;
    }
    merge(part, other);
  } while (left > 0 || (offset < chunks && offset < 32));
  return part;
}

// Run i of a list of `listed`, within the list whatever the offsets are.
struct Run {
  int64_t begin, end;

  __device__ static Run of(const int64_t* offsets, int64_t i, int64_t listed) {
    const int64_t begin = offsets[i], end = offsets[i + 1];
    return {begin < 0 ? 0 : begin, end > listed ? listed : end};
  }
};

}  // namespace dparallel::cuda
