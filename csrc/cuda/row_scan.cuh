// The scan of a row of logits: one block reads one chunk of 32 KB.
//
// Work: an element is widened, ranked (top two) and added to S = sum e and W = sum e (z - m), with
// e = exp(z - m). The loop takes 9.6 instructions for a bfloat16 (loops.json), and the code before
// and after it about 3 more, spread over the 128 elements of a thread. Instructions and bandwidth
// are both near their limits, therefore the loop holds the common case alone:
//  - The chunk is copied into shared memory asynchronously. Each thread copies 16 vectors of 16
//    bytes, all of them in flight at once, which costs no registers. A thread reads only vectors
//    that it copied itself, so no barrier is needed, and it begins when its first two have arrived.
//    Rows that are not aligned, and what is left of a row behind its last 2 KB, the block copies by
//    elements.
//  - The exceptions are written into shared memory before the loop: -inf fills up the end of the
//    row and replaces suppressed ids and the mask token, whose logit joins the sums of the block at
//    the end.
//  - The top two are kept without a branch: second = max(second, min(first, z)), first = max(first,
//    z); 16-bit elements go two at a time. The token's id is looked for once, in shared memory, by
//    the warps that hold the block's largest logit, in the vectors where it was met.
//  - The sums move to a larger maximum once in two vectors, whether or not there is a larger one.
//  - Infinities are counted after the loop, by the threads that met one.
// The id alone decides which thread reads it, and every sum has a fixed order: a row's result does
// not depend on its place in the batch or its alignment.
//
// Code: what happens once for a block or a row exists once, in rolled loops and without the
// subroutine of a division (Denominator), so that little is fetched before and after the loop. For
// bfloat16, without sampling, row_stats has 14 KB, row_topk 16, accept 19 and unmask 24: in each of
// them the loop has 2.4, the scan around it 6.3, and the merge of a row's chunks with its result 3.
// The times below were measured when row_stats had 20 KB.
//
// Bytes: the row once, and for each chunk a part of 24 bytes (more where the row is sampled), which
// is written to global memory and read again by the block that merges the row's parts.
//
// Why 32 KB and 128 threads: a row of LLaDA's 126464 ids in bfloat16 is 8 chunks, and 32 rows are
// 256 blocks, two for a multiprocessor, all resident at once. Of many rows six blocks are resident
// (by shared memory; registers would allow seven), with up to 192 KB in flight. Measured on an H200
// from a graph, without launches that report bad rows: row_stats of 32 rows takes 7.9 us, and of
// 512 rows 44 us, at two thirds of the memory's bandwidth. Of 512 rows, 256 threads take 47 us,
// chunks of 16 KB 46 us, seven blocks 45 us, and exponents in units of log 2, which save an
// instruction for an element, 44 us. So neither instructions nor loads alone are the limit.
#pragma once

#include "mma.cuh"
#include "row_parts.cuh"
#include "top_two.cuh"

// after the header that knows the device
#include "dparallel/launch.h"
#include "dparallel/nucleus.h"
#include "dparallel/philox.h"

namespace dparallel::cuda {

// For the search for a nucleus.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 2;  // at least: up to 128 registers a thread, so that nothing spills

// For the scan. The code besides the loop costs a thread as much as 30 elements, hence few threads.
constexpr int kScanThreads = 128;
constexpr int kScanWarps = kScanThreads / 32;
constexpr int kSlots = 16;  // vectors of a thread
constexpr int kGroup = 2;   // of them, between two moves of the maximum
constexpr int kScanBlocksPerSm = 6;
constexpr int kScanBytes = kSlots * kScanThreads * 16;

inline int64_t scan_chunks(const Logits& logits) {
  const int64_t ids = kScanBytes / element_size(logits.dtype);
  return (logits.vocab + ids - 1) / ids;
}

// Divides 31 bits without a division: by a multiplication and a shift.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  static Divisor of(int64_t divisor) {
    uint32_t bits = 0;
    while ((int64_t{1} << bits) < divisor) ++bits;
    const uint64_t power = uint64_t{1} << (31 + bits);
    const uint64_t d = divisor > 0 ? divisor : 1;
    return {static_cast<uint32_t>(d), static_cast<uint32_t>((power + d - 1) / d), 31 + bits};
  }
  __device__ uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

// The divisors of a launch of the scan: units of the grid, positions, and rows of the logits.
struct ScanShape {
  Divisor chunks, length, inner_rows;

  static ScanShape of(const Logits& logits, int64_t length) {
    return {Divisor::of(scan_chunks(logits)), Divisor::of(length), Divisor::of(logits.inner_rows)};
  }
};

struct Sampler {
  float inverse_temperature;
  SampleKey key;
  Nucleus nucleus = Nucleus::all();
};

// The shared memory of a block of the scan.
struct ScanMemory {
  uint4 slots[kSlots * kScanThreads];  // vector v of the chunk, by thread v % kScanThreads alone
  float first[kScanWarps], second[kScanWarps], sum[kScanWarps], weighted[kScanWarps];
  uint32_t token[kScanWarps];  // the lowest id of the block's largest logit that the warp holds
  float mask;                  // the logit of the mask token, where the chunk holds it
};

// The largest of the lanes' numbers, none of them NaN; of -0 and 0 it is 0.
__device__ __forceinline__ float largest_of_warp(float z) {
  const uint32_t bits = to_bits(z), ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return nucleus_logit(__reduce_max_sync(kFullWarp, ordered));
}

// A chunk of a row: ids first ... first + count - 1.
template <class T>
struct Chunk {
  using Storage = typename T::Storage;
  static constexpr int kWidth = T::kWidth;
  static constexpr int kIds = kScanBytes / static_cast<int>(sizeof(Storage));
  static constexpr int kGroupIds = kGroup * kScanThreads * kWidth;

  ScanMemory& memory;
  int first, count;

  __device__ Chunk(ScanMemory& memory, int vocab, int chunk) : memory(memory), first(chunk * kIds) {
    const int left = vocab - first;
    count = left < kIds ? left : kIds;
  }
  __device__ int groups() const {  // at least one
    return static_cast<int>(static_cast<uint32_t>(count + kGroupIds - 1) / kGroupIds);
  }

  __device__ uint4& slot(int k) const { return memory.slots[k * kScanThreads + threadIdx.x]; }
  __device__ Storage* elements() const { return reinterpret_cast<Storage*>(memory.slots); }
  __device__ bool mine(uint32_t at) const {
    return at < static_cast<uint32_t>(count) && at / kWidth % kScanThreads == threadIdx.x;
  }
  __device__ uint32_t place(int64_t id) const {  // at least `count` for ids of other chunks
    const auto at = static_cast<uint64_t>(id) - static_cast<uint32_t>(first);
    return at >> 32 == 0 ? static_cast<uint32_t>(at) : UINT32_MAX;
  }

  // The logits of vector k of the thread, which `top` sees.
  __device__ __forceinline__ void read(int k, float (&z)[kWidth], TopTwo<T>& top) const {
    const uint4 stored = slot(k);
    const uint32_t words[4] = {stored.x, stored.y, stored.z, stored.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      top.see(words[i]);
      if constexpr (kWidth == 8) {
        z[2 * i] = low<T>(words[i]);
        z[2 * i + 1] = high<T>(words[i]);
      } else {
        z[i] = from_bits(words[i]);
      }
    }
  }

  // Begins to copy the row, a group of copies for each group of vectors, and mends what that does
  // not bring: rows that are not aligned, the end of a row, and the -inf that fills up the last
  // group are copied by elements, as many at once as there are in a vector.
  __device__ __forceinline__ void copy(const void* row, const Exclusions& ex) const {
    constexpr int kStride = kScanThreads * kWidth;  // ids from a vector of a thread to its next
    const auto thread = static_cast<int>(threadIdx.x);
    const Storage* from = static_cast<const Storage*>(row) + first;
    const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
    const int in_vectors =
        aligned ? static_cast<int>(static_cast<uint32_t>(count) / kStride) * kStride : 0;
#pragma unroll 2
    for (int g = 0; g < kSlots / kGroup; ++g) {
#pragma unroll
      for (int k = g * kGroup; k < (g + 1) * kGroup; ++k)
        if (k * kStride < in_vectors)
          copy_async(&slot(k), from + k * kStride + thread * kWidth, true);
      commit_copies();
    }
    const int all = groups() * kGroupIds;
    if (in_vectors < all) {
#pragma unroll 1
      for (int at = in_vectors + thread; at < all; at += kStride) {
        decltype(+Storage{}) z[kWidth];  // 32 bits each
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          z[i] = T::narrow(-kInfinity);
          if (at + i * kScanThreads < count) z[i] = from[at + i * kScanThreads];
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          elements()[at + i * kScanThreads] = static_cast<Storage>(z[i]);
      }
      __syncthreads();
    }
    auto left = static_cast<int>(ex.suppress_count);
#pragma unroll 1
    do {  // the mask token after the suppressed ids
      const uint32_t at = place(left > 0 ? ex.suppress[left - 1] : ex.mask_id);
      if (!mine(at)) continue;
      wait_for_copies();
      if (left == 0) memory.mask = T::value(elements()[at]);
      elements()[at] = T::narrow(-kInfinity);
    } while (left-- > 0);
  }

  // The part of the chunk, written by thread 0. `largest`: of the logits that the thread has read.
  __device__ __forceinline__ void scan(const Exclusions& ex, RowPart* to,
                                       float* largest = nullptr) const {
    constexpr float kLowest = -kLargest;
    TopTwo<T> top;
    float max = kLowest, sum = 0.0f, weighted = 0.0f;
    int risen = 0;  // the group of the largest
    const int n = groups();
    int g = 0;
#pragma unroll 1
    do {
      wait_for_copies<kSlots / kGroup - 1>();
      float z[kGroup][kWidth];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) read(g * kGroup + j, z[j], top);
      const float rising = fmaxf(max, top.largest());
      if (rising > max) risen = g;
      const float moved = fmaxf(max - rising, kExpFloor), scale = exp2_fast(moved * kLog2e);
      weighted = scale * fmaf(sum, moved, weighted);
      sum *= scale;
      max = rising;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float d = max_nan(z[j][i] - max, kExpFloor), e = exp2_fast(d * kLog2e);
          sum += e;
          weighted = fmaf(e, d, weighted);
        }
      }
      commit_copies();  // none, so that the wait above is for one group more each time
    } while (++g < n);
    if (max > kLargest) {  // infinities share the probability evenly
      risen = 0;           // where kLargest may be, which is as large
      max = kLargest;
      sum = weighted = 0.0f;
#pragma unroll 1
      for (int i = 0; i < n * kGroup * kWidth; ++i) {
        const int vector = i / kWidth * kScanThreads + static_cast<int>(threadIdx.x);
        const float z = T::value(elements()[vector * kWidth + i % kWidth]);
        sum += z >= kLargest ? 1.0f : z != z ? z : 0.0f;
      }
    }

    const float own = clamp_logit(top.largest());
    if (largest != nullptr) *largest = own;
    float best = largest_of_warp(own), second = clamp_logit(top.next());
    const unsigned holders = __ballot_sync(kFullWarp, own == best);
    second = largest_of_warp(own < best ? own : (holders & (holders - 1)) != 0 ? best : second);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      memory.first[warp] = best;
      memory.second[warp] = second;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kScanWarps; ++w) best = fmaxf(best, memory.first[w]);
    // The id of the block's largest: the lanes look for it among the elements of each thread that
    // holds it.
    const int lane = static_cast<int>(threadIdx.x % 32);
    uint32_t token = INT32_MAX;
#pragma unroll 1
    for (unsigned left = __ballot_sync(kFullWarp, own == best && best > -kInfinity); left != 0;
         left &= left - 1) {
      const int holder = __ffs(left) - 1;
      int k = __shfl_sync(kFullWarp, risen, holder) * kGroup + lane / kWidth;
      bool ends;
#pragma unroll 1
      do {
        const int at = (k * kScanThreads + warp * 32 + holder) * kWidth + lane % kWidth;
        const auto id = static_cast<uint32_t>(first + at);
        const bool within = k < n * kGroup, found = within && T::value(elements()[at]) >= best;
        if (found && id < token) token = id;
        ends = found || !within;
        k += 32 / kWidth;
      } while (__ballot_sync(kFullWarp, ends) == 0);
    }
    token = __reduce_min_sync(kFullWarp, token);
    const float reference = fmaxf(best, kLowest);
    const float moved = fmaxf(max - reference, kExpFloor), scale = exp2_fast(moved * kLog2e);
    weighted = scale * fmaf(sum, moved, weighted);
    sum *= scale;
#pragma unroll 1
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, offset);
      weighted += __shfl_xor_sync(kFullWarp, weighted, offset);
    }
    if (threadIdx.x % 32 == 0) {
      memory.sum[warp] = sum;
      memory.weighted[warp] = weighted;
      memory.token[warp] = token;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    RowPart part;
    part.max = reference;
    part.top1 = memory.first[0];
    part.top2 = memory.second[0];
    part.sum = memory.sum[0];
    part.weighted = memory.weighted[0];
    token = memory.token[0];
#pragma unroll
    for (int w = 1; w < kScanWarps; ++w) {
      part.top2 = fmaxf(fmaxf(part.top2, memory.second[w]), fminf(part.top1, memory.first[w]));
      part.top1 = fmaxf(part.top1, memory.first[w]);
      part.sum += memory.sum[w];
      part.weighted += memory.weighted[w];
      token = memory.token[w] < token ? memory.token[w] : token;
    }
    if (part.top1 > -kInfinity) part.token = static_cast<int32_t>(token);
    const uint32_t mask = place(ex.mask_id);
    if (mask < static_cast<uint32_t>(count)) part.add(memory.mask, 0, false);
    *to = part;
  }

  // The sampled side, after `scan`, of the ids that the nucleus keeps. Each thread has a part of
  // its own, relative to the largest logit of the chunk, which the nucleus keeps if it keeps any of
  // them.
  //
  // An id can only win if its noise -ln(-ln(1 - v)), which is at most -ln v, lifts z / T above the
  // best score so far, which the warp shares: if v <= e^(z / T - best). So the two logarithms are
  // taken for few ids; `slack` is for the rounding of either side. No noise is below kLeastNoise,
  // so the best is at least the largest logit and that.
  __device__ __forceinline__ SamplePart draw(const Sampler& sampler) const {
    constexpr int kQuads = kWidth / 4, kShare = 4;
    struct alignas(4 * sizeof(Storage)) Quad {
      Storage z[4];
    };
    constexpr float kLeastNoise = -2.9f;
    const float inverse = sampler.inverse_temperature;
    SamplePart part;
#pragma unroll
    for (int w = 0; w < kScanWarps; ++w) part.max = fmaxf(part.max, memory.first[w]);
    const float reference = score_reference(part.max, inverse);
    const float top = (part.max - reference) * inverse;
    float best = top + kLeastNoise;
    const int n = groups() * kGroup * kQuads;
#pragma unroll 1
    for (int q = 0; q < n; ++q) {
      const int vector = q / kQuads * kScanThreads + static_cast<int>(threadIdx.x);
      const int at = vector * kWidth + q % kQuads * 4;
      const Quad stored = *reinterpret_cast<const Quad*>(elements() + at);
      float z[4], highest = -kInfinity;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        z[i] = clamp_logit(T::value(stored.z[i]));
        if (!sampler.nucleus.keeps(z[i], first + at + i)) z[i] = -kInfinity;
        highest = fmaxf(highest, z[i]);
      }
      if (highest > -kInfinity) {
        const float slack = 1e-3f + 1e-6f * (fabsf(top) + fabsf(best));
        const float reach = exp2_fast((top - best + slack) * kLog2e);
        const Random4 random = philox(sampler.key, static_cast<uint32_t>(first + at) / 4);
        unsigned can_win = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float e = exp2_fast(fmaxf((z[i] - part.max) * inverse, kExpFloor) * kLog2e);
          part.sum += e;
          if (!(static_cast<float>(random.word[i]) * 0x1p-32f > e * reach)) can_win |= 1u << i;
        }
#pragma unroll 1
        for (; can_win != 0; can_win &= can_win - 1) {
          const int i = __ffs(can_win) - 1;
          const auto of = [&](const auto& four) {
            return i < 2 ? (i == 0 ? four[0] : four[1]) : i == 2 ? four[2] : four[3];
          };
          const float score = (of(z) - reference) * inverse + gumbel(of(random.word));
          if (score > part.score) {
            part.score = score;
            part.logit = of(z);
            part.token = first + at + i;
          }
        }
      }
      if (q % kShare == 0) {
        best = fmaxf(best, part.score);
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
          best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, offset));
      }
    }
    return part;
  }
};

// The parts of rows: blocks write them, a part for each chunk, and the last block of a row reads
// them.
struct Scratch {
  RowPart* parts;       // [count, chunks]
  SamplePart* samples;  // [count, chunks], or null
  Nucleus* nuclei;      // [count], or null; by a launch before

  static int64_t bytes(int64_t count, int64_t chunks, const Sampling& sampling) {
    const int64_t per_chunk = sizeof(RowPart) + (sampling.samples() ? sizeof(SamplePart) : 0);
    return count * (chunks * per_chunk + (sampling.filters() ? sizeof(Nucleus) : 0));
  }
  static Scratch at(void* memory, int64_t count, int64_t chunks, const Sampling& sampling) {
    Scratch s;
    s.parts = static_cast<RowPart*>(memory);
    s.samples = reinterpret_cast<SamplePart*>(s.parts + count * chunks);
    s.nuclei = reinterpret_cast<Nucleus*>(s.samples + (sampling.samples() ? count * chunks : 0));
    if (!sampling.samples()) s.samples = nullptr;
    if (!sampling.filters()) s.nuclei = nullptr;
    return s;
  }
};

// By a block: the chunk of the row that starts at `row`, into place `to` of the scratch.
template <class T, bool kSample>
__device__ __forceinline__ void scan_chunk(ScanMemory& memory, const void* row, int vocab,
                                           int chunk, const Exclusions& ex, const Sampler& sampler,
                                           const Scratch& scratch, int64_t to) {
  const Chunk<T> ids(memory, vocab, chunk);
  ids.copy(row, ex);
  ids.scan(ex, scratch.parts + to);
  if constexpr (kSample) {
    DPARALLEL_SHARED(shared, SamplePart[kScanWarps]);
    const float inverse = sampler.inverse_temperature;
    const SamplePart sample =
        merge_block(ids.draw(sampler), shared,
                    [inverse](SamplePart& a, const SamplePart& b) { a.merge(b, inverse); });
    if (threadIdx.x == 0) scratch.samples[to] = sample;
  }
}

// Of a row that has no statistics.
__device__ inline RowResult blank_row() {
  RowResult result;
  result.token = result.sample = -1;
#pragma unroll
  for (float& field : result.field) field = from_bits(0x7fc00000u);  // NaN
  return result;
}

// Row and count are ints where they can be: then an address is an instruction.
template <class Index>
__device__ __forceinline__ void write_row(const RowOutput& out, Index row, Index count,
                                          const RowResult& result) {
  int64_t* token = out.tokens + row;
  token[0] = result.token;
  token[count] = result.sample;
  float* field = out.fields + row;
#pragma unroll
  for (int f = 0; f < kRowFields; ++f, field += count) *field = result.field[f];
}

// By a warp: the result of a row, and what is wrong with the row. All lanes whose number is below
// the number of chunks have both. A row with NaN has no result.
template <bool kSample>
__device__ __forceinline__ RowError finish_row(const Scratch& scratch, int row, int chunks,
                                               float inverse_temperature, RowResult& result) {
  const RowPart part = merge_chunks(scratch.parts, row * chunks, chunks,
                                    [](RowPart& a, const RowPart& b) { a.merge(b); });
  if constexpr (kSample) {
    const SamplePart sample =
        merge_chunks(scratch.samples, row * chunks, chunks,
                     [&](SamplePart& a, const SamplePart& b) { a.merge(b, inverse_temperature); });
    result = finish(part, sample, inverse_temperature);
  } else {
    result = finish(part);
  }
  return part.error();
}

__device__ inline const void* row_pointer(const Logits& logits, int64_t row) {
  return static_cast<const char*>(logits.data) + logits.offset(row) * element_size(logits.dtype);
}

template <class T>
__device__ __forceinline__ const void* scan_row(const Logits& logits, const ScanShape& shape,
                                                int64_t row) {
  const auto r = static_cast<uint32_t>(row), outer = shape.inner_rows.quotient(r);
  const uint32_t inner = r - outer * shape.inner_rows.divisor;
  return static_cast<const typename T::Storage*>(logits.data) +
         (outer * logits.outer_stride + inner * logits.inner_stride);
}

}  // namespace dparallel::cuda
