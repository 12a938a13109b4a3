// block_attention: flash attention to a cache, its slots split over CTAs (flash-decoding).
//
// Work. The query heads that share a key head stand side by side: packed row r of a segment's key
// head is query row r / group, query head head * group + r % group. A CTA of 128 threads takes a
// tile of packed rows through one split of the segment's slots, with an online softmax: the largest
// score so far, the sum of exponentials and the weighted sum of values. If a segment has several
// splits, each CTA has a part of the answer, and the parts are merged in the order of the splits.
// Up to eight CTAs are a cluster and merge their parts themselves, out of one another's shared
// memory. More parts, or parts on devices without clusters, are merged by a second kernel, through
// scratch. There are no counters, so no launch can leave anything behind for the next.
//
// Cut. Splits have at least 128 slots, and there are as many as give a segment up to 256 CTAs, two
// for each SM of an H100. The segment's own length and rows decide the cut, and nothing else, so
// that its result does not depend on the rest of the batch. A block of 32 queries at 512 slots is 4
// splits for each of 32 heads. The grid is shaped by max_q_len and max_kv_len; CTAs beyond their
// segment leave at once. A few CTAs more write zeros into the rows that see nothing.
//
// Scratch. A segment whose parts the second kernel merges leaves up to 256 of them, 8.5 MB for
// heads of 128. Where the parts of all segments would take more than 64 MB, a guess, launches take
// some segments at a time, one after another, and share the scratch; no result depends on that.
//
// Bytes. Each slot that is seen is read once per tile: 2 * head_dim elements per key head; tiles of
// one split run side by side, so that all but the first find it in the L2 cache. Slots that are not
// seen are not read, even if their neighbours are: their place in shared memory holds zeros, so
// that NaN there cannot come through 0 * NaN.
//
// Tensor cores (16-bit, head_dim a multiple of 8 up to 128, 16-byte strides, a positive scale): a
// decode pass waits for memory, and between its copies for the few instructions of one warp, so
// there must be few of them. A step is 64 slots, 32 KB of keys and values in shared memory; two
// steps are in flight at once: all of a shortest split. A warp has 16 rows, whose queries stay in
// registers, by 32 slots at a time, in 337 instructions, 64 of them multiplications. A tile is 64
// rows, each warp's own by all slots. Where there are at most 32 rows, or few CTAs, a tile is 32
// rows, and two warps share 16 of them, each with half of the slots of a step. The parts of such
// warps are merged together with the parts of the other CTAs. Three CTAs an SM: 72 KB of shared
// memory (80 where tiles may be of 64 rows: two CTAs) and, on sm_90a, at most 168 registers.
//
// Restricted launches (causal, or by ancestors) are kernels of their own: a row's bits of 32 slots
// decide which scores count. Slots below `base` are seen by all, so only the steps behind it are
// looked at more closely: values there that are not finite become zeros, and NaN in the rows that
// see them.
//
// FMA (float32, other head_dims and strides): a tile is 16 rows, a step 128 slots; a thread scores
// one slot against every row, a warp takes the softmax of every fourth row, a thread gathers two
// elements of every row's sum. 16 KB of shared memory a CTA. The sizes are guesses: this path is
// for checks and for models that tensor cores do not take, and is not measured.
//
// Measured on an H200 from a graph, 32 queries of LLaDA's heads: 512 slots 10.2 us (the bytes take
// 2.1, torch's attention 12.2); in a batch of 8, in an earlier form, 34 us (17 and 24).
// Splits of 64 slots, in an earlier form of this kernel, took a third longer than of 128. The other
// sizes, among them 256 CTAs for a segment, are not measured against others.
#include "attention_tensor.cuh"

namespace dparallel::cuda {
namespace {

// ---- FMA ----

constexpr int kOwned = 2;                  // elements of every row's sum that a thread gathers
constexpr int kSlice = kOwned * kThreads;  // a longer head is taken in slices

struct PlainShared {
  float query[kPlainRows][kThreads];   // some dims of the scaled queries
  float weight[kPlainRows][kThreads];  // scores, then their exponentials
  float kept[kPlainRows], sum[kPlainRows];
};

template <class T, bool kRestricted>
__global__ void __launch_bounds__(kThreads, kRestricted ? 2 : 3)
    block_attention_plain_kernel(BlockAttentionArgs args, Shape shape, float* scratch) {
  using Storage = typename T::Storage;
  DPARALLEL_SHARED(step, PlainShared);
  wait_for_earlier();
  const int beyond = static_cast<int>(blockIdx.x) - shape.working;
  if (beyond >= 0) return write_blanks<Storage>(args, shape, beyond);
  const Work work(args, shape, static_cast<int>(blockIdx.x), false);
  if (work.rows == 0) return;
  const int dim = static_cast<int>(args.k_layout.head_dim), t = threadIdx.x;
  const int warp = t / 32, lane = t % 32;
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
      const Storage* key =
          work.keys<Storage>() + work.place_of(t < left ? slot + t : work.start).key;
      float score[kPlainRows] = {};
      for (int from = 0; from < dim; from += kThreads) {
        const int dims = dim - from < kThreads ? dim - from : kThreads;
        __syncthreads();  // the last queries and weights are done with
#pragma unroll 1
        for (int r = 0; r < kPlainRows; ++r)
          step.query[r][t] = r < work.rows && t < dims
                                 ? args.scale * T::value(static_cast<const Storage*>(
                                                    args.q)[work.query(work.first + r) + from + t])
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
      for (int r = 0; r < kPlainRows; ++r) {
        bool seen = t < left;
        if constexpr (kRestricted)
          if (r < work.rows)
            seen = seen && work.seen_of(work.first + r, slot + t - lane) >> lane & 1;
        step.weight[r][t] = seen ? score[r] : -kInfinity;
      }
      __syncthreads();
      // A warp's rows: their largest score, exponentials and sums.
#pragma unroll
      for (int i = 0; i < kPlainRows / kWarps; ++i) {
        float* weight = step.weight[warp + i * kWarps];
        float now = top[i], added = 0.0f;
        for (int j = lane; j < kThreads; j += 32) now = fmaxf(now, weight[j]);  // ignores NaN
        now = largest_of(now, 32);
        for (int j = lane; j < kThreads; j += 32) {
          weight[j] = weight_of(weight[j], now, kLog2e);
          added += weight[j];
        }
        const float kept = weight_of(top[i], now, kLog2e);
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
        const Storage* value = work.values<Storage>() + work.place_of(slot + j).value;
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
          const int d = slice + i * kThreads + t;
          if (d >= dim) continue;
          const float x = T::value(value[d]);
#pragma unroll
          for (int r = 0; r < kPlainRows; ++r)
            if (!kRestricted || step.weight[r][j] != 0.0f) out[r][i] += step.weight[r][j] * x;
        }
      }
    }
    // As `work`, whose numbers need not stay in registers for it.
    const Work done(args, shape, anew(static_cast<int>(blockIdx.x)), false);
    const bool split = done.cut.splits > 1;
    const Part part(done, scratch, done.place);  // there where it is split
#pragma unroll
    for (int i = 0; i < kPlainRows / kWarps; ++i) {
      const int r = warp + i * kWarps;
      if (lane != 0 || r >= done.rows) continue;
      step.sum[r] = sum[i];
      if (!split) continue;
      part.tops[r] = top[i];
      part.sums[r] = sum[i];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r)
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        const int d = slice + i * kThreads + t;
        if (r >= done.rows || d >= dim) continue;
        if (split) part.values[r * dim + d] = out[r][i];
        else
          static_cast<Storage*>(args.out)[done.output(done.first + r) + d] =
              T::narrow(out[r][i] / (kRestricted ? done.divisor(step.sum[r]) : step.sum[r]));
      }
  }
}

// ---- Parts that no cluster has merged ----

constexpr int kMergeRows = 8;  // of a CTA

template <class T, int W>
__device__ __forceinline__ void merge_parts(const Unit& unit, const float* scratch, int first) {
  const int dim = static_cast<int>(unit.args.k_layout.head_dim), columns = dim / W;
  const float scores = unit.shape.on_tensor_cores ? 1.0f : kLog2e;
  const int rows = unit.rows - first < kMergeRows ? unit.rows - first : kMergeRows;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kThreads) {
    const int row = first + i / columns, d = i % columns * W;
    const int tile = row / unit.cut.tile_rows, r = row % unit.cut.tile_rows;
    const Merged<W, 8> merged(
        unit.cut.splits, scores, [&](int s, float (&value)[W], float& top, float& sum) {
          const Part part(unit, const_cast<float*>(scratch), (tile << unit.cut.bits) + s);
          const float* from = part.values + r * dim + d;
          if constexpr (W == 4) widen<Float32>(*reinterpret_cast<const uint4*>(from), value);
          else value[0] = *from;
          top = part.tops[r];
          sum = part.sums[r];
        });
    store<T>(static_cast<typename T::Storage*>(unit.args.out) + unit.output(row) + d, merged.value,
             unit.divisor(merged.sum));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    block_attention_merge_kernel(BlockAttentionArgs args, Shape shape, const float* scratch,
                                 int blocks) {
  wait_for_earlier();
  const int block = static_cast<int>(blockIdx.x);
  const Unit unit(args, shape, block / blocks, shape.on_tensor_cores);
  const int first = block % blocks * kMergeRows;
  if (unit.cut.splits <= 1 || unit.clustered() || first >= unit.rows) return;
  if (args.k_layout.head_dim % 4 == 0) merge_parts<T, 4>(unit, scratch, first);
  else merge_parts<T, 1>(unit, scratch, first);
}

// ---- The launch ----

// A kernel as a type, which a generic function can take.
template <auto kernel>
struct Kernel {
  static constexpr auto value = kernel;
};

bool on_tensor_cores(const BlockAttentionArgs& args) {
  const CacheLayout &k = args.k_layout, &v = args.v_layout;
  return args.dtype != DType::float32 && k.head_dim % 8 == 0 && k.head_dim <= kTensorDim &&
         args.scale > 0.0f && args.scale < kInfinity &&
         multiples_of_16({args.q, args.k_cache, args.v_cache, args.out},
                         {args.q_stride, k.page_stride, k.head_stride, k.slot_stride, v.page_stride,
                          v.head_stride, v.slot_stride},
                         element_size(args.dtype));
}

bool clusters() {
  return has_clusters_here<block_attention_tensor_kernel<BFloat16, kTensorDim, false>>();
}

Shape shape_of(const BlockAttentionArgs& args) {
  return Shape::of(args, on_tensor_cores(args), clusters());
}

// One launch of the segments' CTAs, and of `blanks` CTAs for rows that see nothing.
template <class T>
int attend(const BlockAttentionArgs& args, const Shape& shape, int64_t blanks, float* scratch,
           void* stream) {
  const int64_t grid = (shape.working + blanks + shape.cluster - 1) / shape.cluster * shape.cluster;
  if (grid == 0) return 0;
  const auto launch = [&](auto kernel, LargeShared shared) {
    return DPARALLEL_LAUNCH_CLUSTERS(decltype(kernel)::value, grid,
                                     static_cast<unsigned>(shape.cluster), kThreads, shared,
                                     clusters(), stream, args, shape, scratch);
  };
  const auto launch_by = [&](auto restricted) {
    constexpr bool kRestricted = decltype(restricted)::value;
    if constexpr (sizeof(typename T::Storage) == 2) {
      const int longest = shape.longest();
      if (shape.on_tensor_cores && args.k_layout.head_dim <= 64)
        return launch(Kernel<block_attention_tensor_kernel<T, 64, kRestricted>>{},
                      TensorShared<64>::of_launch(longest));
      if (shape.on_tensor_cores)
        return launch(Kernel<block_attention_tensor_kernel<T, kTensorDim, kRestricted>>{},
                      TensorShared<kTensorDim>::of_launch(longest));
    }
    return launch(Kernel<block_attention_plain_kernel<T, kRestricted>>{}, {});
  };
  return args.restricted() ? launch_by(std::true_type{}) : launch_by(std::false_type{});
}

// Merges the parts that the launch before has left in scratch.
template <class T>
int merge(const BlockAttentionArgs& args, const Shape& shape, float* scratch, void* stream) {
  if (shape.part_rows == 0) return 0;
  // A key head with more rows than `most` has no splits.
  const int most = kEnough / 2 / static_cast<int>(shape.heads.size) *
                   (shape.on_tensor_cores ? kTallRows : kPlainRows);
  const int blocks = parts_of(std::min(shape.longest(), most), kMergeRows);
  if (shape.units * blocks == 0) return 0;
  return DPARALLEL_LAUNCH_EARLY(block_attention_merge_kernel<T>, shape.units * blocks, kThreads,
                                stream, args, shape, scratch, blocks);
}

// Segments [first, first + count), which leave the others' rows alone.
BlockAttentionArgs segments_of(const BlockAttentionArgs& args, int64_t first, int64_t count) {
  BlockAttentionArgs some = args;
  some.segments = count;
  some.q_start += first;
  some.q_end += first;
  some.kv_lens += first;
  some.block_table += first * args.table_width;
  return some;
}

}  // namespace

int64_t block_attention_scratch(const BlockAttentionArgs& args) {
  const Shape shape = shape_of(args);
  const int64_t segments = std::min(args.segments, shape.segments_at_once());
  return shape.part(segments * args.k_layout.heads, 0) * static_cast<int64_t>(sizeof(float));
}

int block_attention(const BlockAttentionArgs& args, const Workspace& workspace, void* stream) {
  const Shape shape = shape_of(args);
  const int64_t at_once = shape.segments_at_once();
  const int64_t blanks = parts_of(static_cast<int>(args.count), kBlankBlock);
  auto* scratch = static_cast<float*>(workspace.scratch);
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.segments <= at_once) {
      const int code = attend<T>(args, shape, blanks, scratch, stream);
      return code != 0 ? code : merge<T>(args, shape, scratch, stream);
    }
    Shape none = shape;
    none.working = 0;
    int code = attend<T>(args, none, blanks, scratch, stream);
    for (int64_t first = 0; code == 0 && first < args.segments; first += at_once) {
      const BlockAttentionArgs some =
          segments_of(args, first, std::min(at_once, args.segments - first));
      const Shape own = shape_of(some);
      code = attend<T>(some, own, 0, scratch, stream);
      if (code == 0) code = merge<T>(some, own, scratch, stream);
    }
    return code;
  });
}

}  // namespace dparallel::cuda
