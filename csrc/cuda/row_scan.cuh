// One block reads one chunk of one row: every thread keeps a RowPart of its own logits, in
// registers; then the block merges them in a fixed order. Which thread reads which id depends on
// the id alone, so that a row's result does not depend on its place in the batch or its alignment.
#pragma once

#include "device.cuh"
#include "dparallel/launch.h"
#include "dparallel/nucleus.h"
#include "dparallel/philox.h"

namespace dparallel::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 2;    // at least: up to 128 registers a thread, so that nothing spills
constexpr int64_t kChunk = 16384;  // ids per block: 8 blocks for a row of LLaDA's 126464
constexpr float kLargestNoise = 22.9f;  // see gumbel(): -ln 2^-33

inline int64_t chunks_of(int64_t vocab) { return (vocab + kChunk - 1) / kChunk; }

struct Sampler {
  float inverse_temperature;
  SampleKey key;
  Nucleus nucleus = Nucleus::all();
};

// Ids first_id ... first_id + W - 1 into the thread's parts.
template <int W, bool kSample>
__device__ __forceinline__ void accumulate(float (&z)[W], int64_t first_id, const Exclusions& ex,
                                           RowPart& part, float& base, SamplePart& sample,
                                           const Sampler& sampler) {
  float top = -kInfinity;
#pragma unroll
  for (int i = 0; i < W; ++i) z[i] = min_nan(z[i], kLargest);
  for (int64_t s = 0; s < ex.suppress_count; ++s) {
    const int64_t at = ex.suppress[s] - first_id;
#pragma unroll
    for (int i = 0; i < W; ++i)
      if (i == at) z[i] = -kInfinity;
  }
#pragma unroll
  for (int i = 0; i < W; ++i) top = fmaxf(top, z[i]);  // ignores NaN
  if (top > part.max) {
    part.rescale(top);
    base = top;
  }
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const float d = max_nan(z[i] - base, kExpFloor);
    const float e = exp2_fast(d * kLog2e);
    part.sum += e;
    part.weighted += e * d;
  }
  if (top > part.top2) {
#pragma unroll
    for (int i = 0; i < W; ++i)
      if (z[i] > part.top2 && first_id + i != ex.mask_id)
        part.rank(z[i], static_cast<int32_t>(first_id + i));
  }
  if (!kSample) return;
  const float inverse = sampler.inverse_temperature;
  float highest = -kInfinity;  // of what may be drawn
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const int64_t id = first_id + i;
    if (id == ex.mask_id || !sampler.nucleus.keeps(z[i], id)) z[i] = -kInfinity;
    highest = fmaxf(highest, z[i]);
  }
  if (highest == -kInfinity) return;
  if (highest > sample.max) sample.rescale(highest, inverse);
#pragma unroll
  for (int i = 0; i < W; ++i)
    sample.sum += exp2_fast(max_nan((z[i] - sample.max) * inverse, kExpFloor) * kLog2e);
  if (highest * inverse + kLargestNoise < sample.score) return;  // none of these can win
#pragma unroll
  for (int group = 0; group < W / 4; ++group) {
    const Random4 random = philox(sampler.key, static_cast<uint32_t>(first_id / 4) + group);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * group + j;
      const float score = z[i] * inverse + gumbel(random.word[j]);
      if (score > sample.score) {
        sample.score = score;
        sample.logit = z[i];
        sample.token = static_cast<int32_t>(first_id + i);
      }
    }
  }
}

template <class Part>
__device__ __forceinline__ Part shuffle_down(const Part& part, int offset) {
  static_assert(sizeof(Part) % 4 == 0, "");
  uint32_t words[sizeof(Part) / 4];
  memcpy(words, &part, sizeof part);
#pragma unroll
  for (auto& word : words) word = __shfl_down_sync(kFullWarp, word, offset);
  Part other;
  memcpy(&other, words, sizeof other);
  return other;
}

// All of the block's parts, merged in the order of the threads; valid in thread 0.
template <class Part, class Merge>
__device__ __forceinline__ Part merge_block(Part part, Part (&shared)[kWarps], Merge merge) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Part other = shuffle_down(part, offset);
    if (threadIdx.x % (2 * offset) == 0) merge(part, other);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) merge(part, shared[warp]);
  return part;
}

// The parts of chunk `chunk` of the row that starts at `row`; valid in thread 0.
template <class T, bool kSample>
__device__ void scan_chunk(const void* row, int64_t vocab, int64_t chunk, const Exclusions& ex,
                           const Sampler& sampler, RowPart& part, SamplePart& sample) {
  DPARALLEL_SHARED(shared_parts, RowPart[kWarps]);
  DPARALLEL_SHARED(shared_samples, SamplePart[kWarps]);
  constexpr int W = T::kWidth;
  const auto* z = static_cast<const typename T::Storage*>(row);
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  const int64_t begin = chunk * kChunk, end = begin + kChunk < vocab ? begin + kChunk : vocab;
  const int64_t whole = begin + (end - begin) / W * W;
  float base = 0.0f;  // part.max, once there is one
  int64_t id = begin + static_cast<int64_t>(threadIdx.x) * W;
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * W;
  constexpr int kDeep = 4;  // loads in flight per thread
  for (; id + (kDeep - 1) * kStride < whole; id += kDeep * kStride) {
    uint4 stored[kDeep];
#pragma unroll
    for (int k = 0; k < kDeep; ++k) stored[k] = load_stored<T>(z + id + k * kStride, aligned);
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      float values[W];
      widen<T>(stored[k], values);
      accumulate<W, kSample>(values, id + k * kStride, ex, part, base, sample, sampler);
    }
  }
  for (; id < whole; id += kStride) {
    float values[W];
    widen<T>(load_stored<T>(z + id, aligned), values);
    accumulate<W, kSample>(values, id, ex, part, base, sample, sampler);
  }
  if (id == whole && whole < end) {  // the thread whose turn it is takes the short last vector
    float values[W];
#pragma unroll
    for (int i = 0; i < W; ++i) values[i] = whole + i < end ? T::value(z[whole + i]) : -kInfinity;
    accumulate<W, kSample>(values, whole, ex, part, base, sample, sampler);
  }
  part = merge_block(part, shared_parts, [](RowPart& a, const RowPart& b) { a.merge(b); });
  if (kSample) {
    const float inverse = sampler.inverse_temperature;
    sample = merge_block(sample, shared_samples,
                         [inverse](SamplePart& a, const SamplePart& b) { a.merge(b, inverse); });
  }
}

// Parts of every chunk of every row; written by one block, read by another.
struct Scratch {
  RowPart* parts;       // [count, chunks]
  SamplePart* samples;  // [count, chunks], or null
  Nucleus* nuclei;      // [count], or null; by a launch before
  float* keys;          // [count]; NaN: not to be selected
  float* sorted;        // [count]
  int32_t* ranks;       // [count]

  static int64_t bytes(int64_t count, int64_t chunks, const Sampling& sampling) {
    const int64_t per_chunk = sizeof(RowPart) + (sampling.samples() ? sizeof(SamplePart) : 0);
    return count * (chunks * per_chunk + 12 + (sampling.filters() ? sizeof(Nucleus) : 0));
  }
  static Scratch at(void* memory, int64_t count, int64_t chunks, const Sampling& sampling) {
    Scratch s;
    s.parts = static_cast<RowPart*>(memory);
    s.samples = reinterpret_cast<SamplePart*>(s.parts + count * chunks);
    s.nuclei = reinterpret_cast<Nucleus*>(s.samples + (sampling.samples() ? count * chunks : 0));
    s.keys = reinterpret_cast<float*>(s.nuclei + (sampling.filters() ? count : 0));
    if (!sampling.samples()) s.samples = nullptr;
    if (!sampling.filters()) s.nuclei = nullptr;
    s.sorted = s.keys + count;
    s.ranks = reinterpret_cast<int32_t*>(s.sorted + count);
    return s;
  }
};

// Another block's part: past the L1 cache.
template <class Part>
__device__ __forceinline__ Part read_part(const Part* p) {
  uint32_t words[sizeof(Part) / 4];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Part) / 4); ++i)
    words[i] = __ldcg(reinterpret_cast<const uint32_t*>(p) + i);
  Part part;
  memcpy(&part, words, sizeof part);
  return part;
}

// The row's result from its chunks, in order.
__device__ inline RowError finish_row(const Scratch& scratch, int64_t row, int64_t chunks,
                                      float inverse_temperature, RowResult& result) {
  RowPart part = read_part(scratch.parts + row * chunks);
  for (int64_t c = 1; c < chunks; ++c) part.merge(read_part(scratch.parts + row * chunks + c));
  const RowError error = part.error();
  if (error != kRowOk) return error;
  if (scratch.samples == nullptr) {
    result = finish(part);
    return kRowOk;
  }
  SamplePart sample = read_part(scratch.samples + row * chunks);
  for (int64_t c = 1; c < chunks; ++c)
    sample.merge(read_part(scratch.samples + row * chunks + c), inverse_temperature);
  result = finish(part, sample, inverse_temperature);
  return kRowOk;
}

__device__ inline void write_row(const RowOutput& out, int64_t row, int64_t count,
                                 const RowResult& result) {
  out.tokens[row] = result.token;
  out.tokens[count + row] = result.sample;
#pragma unroll
  for (int f = 0; f < kRowFields; ++f) out.fields[f * count + row] = result.field[f];
}

__device__ inline void write_blank(const RowOutput& out, int64_t row, int64_t count) {
  RowResult blank;
  blank.token = blank.sample = -1;
#pragma unroll
  for (int f = 0; f < kRowFields; ++f) blank.field[f] = from_bits(0x7fc00000u);  // NaN
  write_row(out, row, count, blank);
}

__device__ inline const void* row_pointer(const Logits& logits, int64_t row) {
  return static_cast<const char*>(logits.data) + logits.offset(row) * element_size(logits.dtype);
}

}  // namespace dparallel::cuda
