// block_attention: flash attention to a cache, its slots split over CTAs (flash-decoding).
//
// Work. The query heads that share a key head stand side by side: packed row r of a segment's key
// head is query row r / group, query head head * group + r % group. A CTA of 128 threads takes a
// tile of packed rows, 64 (tensor cores) or 16 (FMA), through one split of the segment's slots,
// with an online softmax: the largest score so far, the sum of exponentials and the weighted sum of
// values, rescaled when a larger score comes. Where a segment has several splits, each CTA leaves
// its rows in scratch, and the last of a tile's CTAs to arrive merges them, in order.
//
// Splits are 256 slots, longer where the tiles and splits of a key head would be more than 32: of
// the segment's own length and rows alone, so that what it yields depends on nothing else. The grid
// is shaped by longest_query and longest_length; CTAs beyond their segment leave at once.
//
// Bytes. Each slot that is seen is read once per tile: 2 * head_dim elements per key head; tiles of
// one split run side by side, so that all but the first find it in the L2 cache. A split writes and
// its merger reads rows * (head_dim + 2) floats. Slots that are not seen are not read, not even
// beside others: their place in shared memory holds zeros, so that NaN there cannot come through
// 0 * NaN.
//
// Tensor cores (16-bit, head_dim a multiple of 8 up to 128, 16-byte strides): four warps, each 16
// rows by every slot of the split, in steps of 32 slots (64 where head_dim <= 64). Keys and values
// of the next step are copied to shared memory while this one is computed: 2 steps of 16 KB, 32 KB
// a CTA. Scores, softmax and sums stay in registers, 168 at most: three CTAs an SM.
//
// FMA (float32, other head_dims and strides): a step is 128 slots; a thread scores one slot against
// every row, a warp takes the softmax of every fourth row, a thread gathers two elements of every
// row's sum. 16 KB of shared memory a CTA.
#include "mma.cuh"

#include "dparallel/launch.h"

namespace dparallel::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSplit = 256;  // slots, at least
constexpr int kShare = 32;   // CTAs of a key head, beyond which splits grow
constexpr int kMostSplitTiles = kShare / 2;

// What a segment's work is cut into; of its own numbers alone.
struct Cut {
  int tiles, splits, split;  // split: slots of one

  DP_HD static Cut of(int rows, int tile_rows, int length) {
    Cut cut;
    cut.tiles = (rows + tile_rows - 1) / tile_rows;
    const int most = cut.tiles > 0 && cut.tiles <= kMostSplitTiles ? kShare / cut.tiles : 1;
    cut.split = (length + kSplit * most - 1) / (kSplit * most) * kSplit;
    cut.splits = length > 0 ? (length + cut.split - 1) / cut.split : 0;
    return cut;
  }
};

// The launch: `share` CTAs for each segment and key head, enough for any cut.
struct Shape {
  int tile_rows;     // of the kernel
  int part_rows;     // of scratch for a CTA
  int share, parts;  // CTAs, and those that may have scratch
  int64_t part_floats;

  static Shape of(const BlockAttentionArgs& args, int tile_rows) {
    const int64_t rows = args.longest_query * (args.q_heads / args.k_layout.heads);
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    const int64_t splits = (args.longest_length + kSplit - 1) / kSplit;
    const int64_t split = tiles * splits < kShare ? tiles * splits : kShare;
    Shape shape;
    shape.tile_rows = tile_rows;
    shape.part_rows = static_cast<int>(rows < tile_rows ? rows : tile_rows);
    shape.share = static_cast<int>(tiles > split ? tiles : split);
    shape.parts = static_cast<int>(splits > 1 ? split : 0);
    shape.part_floats = (shape.part_rows * (args.k_layout.head_dim + 2) + 3) / 4 * 4;
    return shape;
  }
};

// The rows and slots of one CTA.
struct Work {
  const BlockAttentionArgs& args;
  const Shape& shape;
  int segment, head, group;
  int64_t begin;  // the segment's first query row
  const int64_t* pages;
  int tile, tiles, split, splits;
  int first, rows;  // packed rows [first, first + rows); none: nothing to do
  int start, end;   // slots

  __device__ Work(const BlockAttentionArgs& args, const Shape& shape) : args(args), shape(shape) {
    const int block = static_cast<int>(blockIdx.x), heads = static_cast<int>(args.k_layout.heads);
    const int unit = block / shape.share, place = block % shape.share;
    segment = unit / heads;
    head = unit % heads;
    group = static_cast<int>(args.q_heads) / heads;
    begin = args.begin[segment];
    const int all = static_cast<int>(args.end[segment] - begin) * group;
    const int length = static_cast<int>(args.length[segment]);
    const Cut cut = Cut::of(all, shape.tile_rows, length);
    pages = args.pages + segment * args.table_width;
    tiles = cut.tiles;
    splits = cut.splits;
    rows = 0;
    if (tiles <= 0 || place >= tiles * splits) return;
    tile = place % tiles;
    split = place / tiles;
    first = tile * shape.tile_rows;
    rows = all - first < shape.tile_rows ? all - first : shape.tile_rows;
    start = split * cut.split;
    end = start + cut.split < length ? start + cut.split : length;
  }

  // Elements before a row of the tile, in q and in the output.
  __device__ int64_t query(int r) const {
    const int row = first + r;
    return (begin + row / group) * args.q_stride +
           (head * group + row % group) * args.k_layout.head_dim;
  }
  __device__ int64_t output(int r) const {
    const int row = first + r;
    return ((begin + row / group) * args.q_heads + head * group + row % group) *
           args.k_layout.head_dim;
  }

  // Elements before the key and the value of a slot.
  struct Place {
    int64_t key, value;
  };
  __device__ __forceinline__ Place place(int slot) const {
    const auto size = static_cast<uint32_t>(args.k_layout.page_size);
    const uint32_t page = static_cast<uint32_t>(slot) / size;
    const uint32_t inside = static_cast<uint32_t>(slot) - page * size;
    return {args.k_layout.offset(pages[page], inside, head),
            args.v_layout.offset(pages[page], inside, head)};
  }

  // What split `s` of the tile leaves: weighted sums of values [rows, head_dim], then the largest
  // score and the sum of exponentials of each row.
  __device__ float* part(float* scratch, int s) const {
    const int64_t unit = static_cast<int64_t>(segment) * args.k_layout.heads + head;
    return scratch + (unit * shape.parts + s * tiles + tile) * shape.part_floats;
  }
  __device__ float* tops(float* part) const {
    return part + shape.part_rows * args.k_layout.head_dim;
  }
  __device__ float* sums(float* part) const { return tops(part) + shape.part_rows; }
};

// e^(score - top), where nothing was seen under a top of -inf.
__device__ __forceinline__ float weight_of(float score, float top) {
  return exp2_fast((score - (top == -kInfinity ? 0.0f : top)) * kLog2e);
}

__device__ __forceinline__ float largest_of(float x, int lanes) {
  for (int bits = lanes / 2; bits > 0; bits /= 2)
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, bits));  // ignores NaN
  return x;
}

__device__ __forceinline__ float sum_of(float x, int lanes) {
  for (int bits = lanes / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullWarp, x, bits);
  return x;
}

template <int kRows>
struct MergeShared {
  float share[kShare][kRows];  // of a split in the softmax of a row; at first its largest score
  float sum[kShare][kRows];    // of the split's exponentials
};

// The rows of every split by their shares, W elements at a time, several of them on their way to
// each thread.
template <class T, int W, int kRows>
__device__ __forceinline__ void gather(const Work& work, float* scratch,
                                       const MergeShared<kRows>& merge) {
  constexpr int kBatch = 8;
  const int dim = static_cast<int>(work.args.k_layout.head_dim), count = work.rows * dim / W;
  for (int first = threadIdx.x; first < count; first += kBatch * kThreads) {
    float value[kBatch][W] = {};
    for (int s = 0; s < work.splits; ++s) {
      const float* part = work.part(scratch, s);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = first + b * kThreads < count ? first + b * kThreads : first;
        float x[W];
        if constexpr (W == 4) widen<Float32>(__ldcg(reinterpret_cast<const uint4*>(part) + i), x);
        else x[0] = __ldcg(part + i);
        const float share = merge.share[s][i * W / dim];
#pragma unroll
        for (int w = 0; w < W; ++w) value[b][w] += share * x[w];
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = (first + b * kThreads) * W;
      if (i >= count * W) continue;
      auto* to = static_cast<typename T::Storage*>(work.args.out) + work.output(i / dim) + i % dim;
#pragma unroll
      for (int w = 0; w < W; ++w) to[w] = T::narrow(value[b][w]);
    }
  }
}

// By the last CTA of a tile: the softmax over the splits, and their rows by it.
template <class T, int kRows>
__device__ __forceinline__ void merge_splits(const Work& work, float* scratch,
                                             MergeShared<kRows>& merge) {
  for (int i = threadIdx.x; i < work.splits * work.rows; i += kThreads) {
    const int s = i / work.rows, r = i % work.rows;
    float* part = work.part(scratch, s);
    merge.share[s][r] = __ldcg(work.tops(part) + r);
    merge.sum[s][r] = __ldcg(work.sums(part) + r);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < work.rows; r += kThreads) {
    float top = -kInfinity, sum = 0.0f;
    for (int s = 0; s < work.splits; ++s) top = fmaxf(top, merge.share[s][r]);
    for (int s = 0; s < work.splits; ++s) {
      merge.share[s][r] = weight_of(merge.share[s][r], top);
      sum += merge.share[s][r] * merge.sum[s][r];
    }
    for (int s = 0; s < work.splits; ++s) merge.share[s][r] /= sum;
  }
  __syncthreads();
  if (work.args.k_layout.head_dim % 4 == 0) gather<T, 4>(work, scratch, merge);
  else gather<T, 1>(work, scratch, merge);
}

// True in the CTA that merges.
__device__ __forceinline__ bool last_of_tile(const Work& work, int32_t* counters) {
  const int64_t unit = static_cast<int64_t>(work.segment) * work.args.k_layout.heads + work.head;
  return last_to_arrive(counters + unit * kMostSplitTiles + work.tile, work.splits);
}

// ---- Tensor cores ----

constexpr int kTensorRows = 16 * kWarps, kTensorDim = 128;
constexpr int kStepElements = 4096;  // of keys, and of values, in a step

template <int kDim>
struct Steps {
  static constexpr int kKeys = kStepElements / kDim, kChunks = kDim / 8;

  // A tile of shared memory is [kKeys, kDim], a row in chunks of 16 bytes. Chunk c of row k lies at
  // c ^ k % 8: eight rows' same chunk, which ldmatrix reads at once, is in eight groups of banks.
  static __device__ __forceinline__ int chunk(int key, int c) {
    return key * kDim + (c ^ key % 8) * 8;
  }
  union alignas(16) Shared {
    uint16_t tile[4 * kStepElements];  // keys, values, and those of the next step
    MergeShared<kTensorRows> merge;
  };

  // Begins to copy the slots [slot, slot + kKeys) of the split: zeros beyond its end, and beyond
  // head_dim. Four threads (two where kDim is 64) share a slot, and take its chunks in such an
  // order that eight neighbours' are in eight groups of banks.
  static __device__ __forceinline__ void copy(const Work& work, int slot, uint16_t* tile) {
    constexpr int kLanes = kThreads / kKeys;
    const BlockAttentionArgs& args = work.args;
    const int key = threadIdx.x / kLanes;
    const bool seen = slot + key < work.end;
    const Work::Place from = work.place(seen ? slot + key : work.start);
#pragma unroll
    for (int i = 0; i < kChunks / kLanes; ++i) {
      const int c = (i * kLanes + static_cast<int>(threadIdx.x) % kLanes) ^ 4 * (key % 2);
      const bool there = seen && c * 8 < args.k_layout.head_dim;
      const int skip = there ? c * 8 : 0;
      uint16_t* to = tile + chunk(key, c);
      copy_async(to, static_cast<const uint16_t*>(args.k_cache) + from.key + skip, there);
      copy_async(to + kStepElements, static_cast<const uint16_t*>(args.v_cache) + from.value + skip,
                 there);
    }
  }
};

// The scaled scores of 16 rows by kKeys slots, and their softmax so far.
template <class T, int kDim>
struct Rows {
  using S = Steps<kDim>;
  static constexpr int kDepth = kDim / 16;

  uint32_t query[kDepth][4];
  float out[kDim / 8][4] = {};
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {};  // of rows g and g + 8; sum: of this lane

  __device__ __forceinline__ void load(const Work& work, int warp_row) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const auto* data = static_cast<const uint16_t*>(work.args.q);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + g + 8 * half;
      const uint16_t* row = data + work.query(r < work.rows ? r : 0);
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int d = 16 * k + 8 * i + 2 * q;
          query[k][half + 2 * i] = r < work.rows && d < work.args.k_layout.head_dim
                                       ? *reinterpret_cast<const uint32_t*>(row + d)
                                       : 0u;
        }
    }
  }

  // One step, whose keys are at `step` of shared memory: `left` of its slots are seen.
  __device__ __forceinline__ void attend(const uint16_t* tile, int step, int left, float scale) {
    const int lane = threadIdx.x % 32, q = lane % 4;
    // Of the row that the lane names to ldmatrix. Its chunk c + 2k is then at this ^ 16k.
    const int key = step + S::chunk(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const int value = step + kStepElements + S::chunk(lane % 16, lane / 16);
    float score[S::kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int n = 0; n < S::kKeys / 16; ++n) {
        uint32_t b[4];  // keys 16n ... 16n + 7 by dims 16k ... 16k + 15, then the next eight keys
        load_matrices(b, tile + (key ^ 16 * k) + 16 * n * kDim);
        mma<T>(score[2 * n], query[k], b[0], b[1]);
        mma<T>(score[2 * n + 1], query[k], b[2], b[3]);
      }
    float now[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] = 8 * n + 2 * q + i % 2 < left ? score[n][i] * scale : -kInfinity;
        now[i / 2] = fmaxf(now[i / 2], score[n][i]);  // ignores NaN
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      now[half] = largest_of(now[half], 4);
      const float kept = weight_of(top[half], now[half]);
      top[half] = now[half];
      sum[half] *= kept;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        out[d][2 * half] *= kept;
        out[d][2 * half + 1] *= kept;
      }
    }
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] = weight_of(score[n][i], top[i / 2]);
        sum[i / 2] += score[n][i];
      }
#pragma unroll
    for (int n = 0; n < S::kKeys / 16; ++n) {
      // A lane's scores of C are, two keys to a register, its part of A.
      const uint32_t a[4] = {pack<T>(score[2 * n][0], score[2 * n][1]),
                             pack<T>(score[2 * n][2], score[2 * n][3]),
                             pack<T>(score[2 * n + 1][0], score[2 * n + 1][1]),
                             pack<T>(score[2 * n + 1][2], score[2 * n + 1][3])};
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        uint32_t b[4];  // dims 16d ... 16d + 7 by keys 16n ... 16n + 15, then the next eight dims
        load_matrices_transposed(b, tile + (value ^ 16 * d) + 16 * n * kDim);
        mma<T>(out[2 * d], a, b[0], b[1]);
        mma<T>(out[2 * d + 1], a, b[2], b[3]);
      }
    }
  }

  // Into the output, or where the tile has several splits into `part`.
  __device__ __forceinline__ void store(const Work& work, int warp_row, float* part) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const auto dim = static_cast<int>(work.args.k_layout.head_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = sum_of(sum[half], 4);
      const int r = warp_row + g + 8 * half;
      if (r >= work.rows) continue;
      if (part != nullptr && q == 0) {
        work.tops(part)[r] = top[half];
        work.sums(part)[r] = total;
      }
      const float inverse = part != nullptr ? 1.0f : 1.0f / total;
      auto* to = static_cast<uint16_t*>(work.args.out) + work.output(r);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int d = 8 * n + 2 * q;
        const float x = out[n][2 * half] * inverse, y = out[n][2 * half + 1] * inverse;
        if (d >= dim) continue;
        if (part != nullptr) {
          part[r * dim + d] = x;
          part[r * dim + d + 1] = y;
        } else {
          *reinterpret_cast<uint32_t*>(to + d) = pack<T>(x, y);
        }
      }
    }
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads)
    block_attention_tensor_kernel(BlockAttentionArgs args, Shape shape, float* scratch,
                                  int32_t* counters) {
  using S = Steps<kDim>;
  DPARALLEL_SHARED(shared, typename S::Shared);
  const Work work(args, shape);
  if (work.rows == 0) return;
  const int warp_row = threadIdx.x / 32 * 16;
  const bool computes = warp_row < work.rows;  // the whole warp, or none of it; all of them copy
  S::copy(work, work.start, shared.tile);
  Rows<T, kDim> rows;
  rows.load(work, warp_row);
  int step = 0;  // elements before the tiles of this one
  for (int slot = work.start; slot < work.end; slot += S::kKeys) {
    wait_for_copies();
    __syncthreads();  // everyone's copies are there, and everyone is done with the step before
    const int next = slot + S::kKeys;
    if (next < work.end) S::copy(work, next, shared.tile + (2 * kStepElements - step));
    if (computes) rows.attend(shared.tile, step, work.end - slot, args.scale);
    step = 2 * kStepElements - step;
  }
  const Work done(args, shape);  // as `work`, whose numbers need not stay in registers for it
  float* part = done.splits > 1 ? done.part(scratch, done.split) : nullptr;
  if (computes) rows.store(done, warp_row, part);
  if (part != nullptr && last_of_tile(done, counters)) merge_splits<T>(done, scratch, shared.merge);
}

// ---- FMA ----

constexpr int kPlainRows = 16;
constexpr int kOwned = 2;                  // elements of every row's sum that a thread gathers
constexpr int kSlice = kOwned * kThreads;  // a longer head is taken in slices

union PlainShared {
  struct {
    float query[kPlainRows][kThreads];   // some dims of the scaled queries
    float weight[kPlainRows][kThreads];  // scores, then their exponentials
    float kept[kPlainRows], sum[kPlainRows];
  } step;
  MergeShared<kPlainRows> merge;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    block_attention_plain_kernel(BlockAttentionArgs args, Shape shape, float* scratch,
                                 int32_t* counters) {
  using Storage = typename T::Storage;
  DPARALLEL_SHARED(shared, PlainShared);
  auto& step = shared.step;
  const Work work(args, shape);
  if (work.rows == 0) return;
  const int dim = static_cast<int>(args.k_layout.head_dim), t = threadIdx.x;
  const int warp = t / 32, lane = t % 32;
  float* part = work.splits > 1 ? work.part(scratch, work.split) : nullptr;
  for (int slice = 0; slice < dim; slice += kSlice) {
    float top[kPlainRows / kWarps], sum[kPlainRows / kWarps];  // of rows warp, warp + kWarps, ...
    float out[kPlainRows][kOwned] = {};
#pragma unroll
    for (int i = 0; i < kPlainRows / kWarps; ++i) {
      top[i] = -kInfinity;
      sum[i] = 0.0f;
    }
    for (int slot = work.start; slot < work.end; slot += kThreads) {
      const int left = work.end - slot < kThreads ? work.end - slot : kThreads;
      // This thread's slot against every row, some dims at a time.
      const Storage* key = static_cast<const Storage*>(args.k_cache) +
                           work.place(t < left ? slot + t : work.start).key;
      float score[kPlainRows] = {};
      for (int from = 0; from < dim; from += kThreads) {
        const int dims = dim - from < kThreads ? dim - from : kThreads;
        __syncthreads();  // the last queries and weights are done with
        for (int r = 0; r < kPlainRows; ++r)
          step.query[r][t] =
              r < work.rows && t < dims
                  ? args.scale *
                        T::value(static_cast<const Storage*>(args.q)[work.query(r) + from + t])
                  : 0.0f;
        __syncthreads();
        if (t < left)
#pragma unroll 2
          for (int d = 0; d < dims; ++d) {
            const float x = T::value(key[from + d]);
#pragma unroll
            for (int r = 0; r < kPlainRows; ++r) score[r] += step.query[r][d] * x;
          }
      }
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) step.weight[r][t] = t < left ? score[r] : -kInfinity;
      __syncthreads();
      // A warp's rows: their largest score, exponentials and sums.
#pragma unroll
      for (int i = 0; i < kPlainRows / kWarps; ++i) {
        float* weight = step.weight[warp + i * kWarps];
        float now = top[i], added = 0.0f;
        for (int j = lane; j < kThreads; j += 32) now = fmaxf(now, weight[j]);  // ignores NaN
        now = largest_of(now, 32);
        for (int j = lane; j < kThreads; j += 32) {
          weight[j] = weight_of(weight[j], now);
          added += weight[j];
        }
        const float kept = weight_of(top[i], now);
        sum[i] = sum[i] * kept + sum_of(added, 32);
        top[i] = now;
        if (lane == 0) step.kept[warp + i * kWarps] = kept;
      }
      __syncthreads();
      // This thread's elements of every row's sum.
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r)
#pragma unroll
        for (int i = 0; i < kOwned; ++i) out[r][i] *= step.kept[r];
#pragma unroll 2
      for (int j = 0; j < left; ++j) {
        const Storage* value =
            static_cast<const Storage*>(args.v_cache) + work.place(slot + j).value;
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
          const int d = slice + i * kThreads + t;
          if (d >= dim) continue;
          const float x = T::value(value[d]);
#pragma unroll
          for (int r = 0; r < kPlainRows; ++r) out[r][i] += step.weight[r][j] * x;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPlainRows / kWarps; ++i) {
      const int r = warp + i * kWarps;
      if (lane != 0 || r >= work.rows) continue;
      step.sum[r] = sum[i];
      if (part == nullptr) continue;
      work.tops(part)[r] = top[i];
      work.sums(part)[r] = sum[i];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r)
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        const int d = slice + i * kThreads + t;
        if (r >= work.rows || d >= dim) continue;
        if (part != nullptr) part[r * dim + d] = out[r][i];
        else
          static_cast<Storage*>(args.out)[work.output(r) + d] = T::narrow(out[r][i] / step.sum[r]);
      }
  }
  if (part != nullptr && last_of_tile(work, counters)) merge_splits<T>(work, scratch, shared.merge);
}

// ---- The launch ----

bool on_tensor_cores(const BlockAttentionArgs& args) {
  const CacheLayout &k = args.k_layout, &v = args.v_layout;
  return args.dtype != DType::float32 && k.head_dim % 8 == 0 && k.head_dim <= kTensorDim &&
         multiples_of_16({args.q, args.k_cache, args.v_cache, args.out},
                         {args.q_stride, k.page_stride, k.head_stride, k.slot_stride, v.page_stride,
                          v.head_stride, v.slot_stride},
                         element_size(args.dtype));
}

Shape shape_of(const BlockAttentionArgs& args) {
  return Shape::of(args, on_tensor_cores(args) ? kTensorRows : kPlainRows);
}

int64_t units_of(const BlockAttentionArgs& args) { return args.segments * args.k_layout.heads; }

}  // namespace

int64_t block_attention_scratch(const BlockAttentionArgs& args) {
  const Shape shape = shape_of(args);
  return units_of(args) * shape.parts * shape.part_floats * static_cast<int64_t>(sizeof(float));
}

int64_t block_attention_counters(const BlockAttentionArgs& args) {
  return units_of(args) * kMostSplitTiles;
}

int block_attention(const BlockAttentionArgs& args, const Workspace& workspace, void* stream) {
  const Shape shape = shape_of(args);
  const auto grid = static_cast<unsigned>(units_of(args) * shape.share);
  if (grid == 0 || args.longest_length <= 0) return 0;
  auto* scratch = static_cast<float*>(workspace.scratch);
  const auto launch = [&](auto kernel) {
    DPARALLEL_LAUNCH(kernel, grid, kThreads, stream, args, shape, scratch, workspace.counters);
    return static_cast<int>(cudaGetLastError());
  };
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(typename T::Storage) == 2)
      if (on_tensor_cores(args))
        return args.k_layout.head_dim <= 64 ? launch(block_attention_tensor_kernel<T, 64>)
                                            : launch(block_attention_tensor_kernel<T, kTensorDim>);
    return launch(block_attention_plain_kernel<T>);
  });
}

}  // namespace dparallel::cuda
