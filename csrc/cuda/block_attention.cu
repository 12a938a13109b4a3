// block_attention: flash attention to a cache, its slots split over CTAs (flash-decoding).
//
// Work. The query heads that share a key head stand side by side: packed row r of a segment's key
// head is query row r / group, query head head * group + r % group. A CTA of 128 threads takes a
// tile of packed rows through one split of the segment's slots, with an online softmax: the largest
// score so far, the sum of exponentials and the weighted sum of values. Where a segment has several
// splits, each CTA has a part of the answer, and parts are merged in their order: up to eight by
// the CTAs themselves, which are then a cluster and read one another's shared memory; more, or
// where there are no clusters, by a second kernel, through scratch. Nothing is counted, so that no
// launch can leave anything behind for the next.
//
// Cut. Splits have at least 128 slots, and there are so many that a segment has up to 256 CTAs, two
// for each SM of an H100: of the segment's own length and rows, so that what it yields depends on
// nothing else. A block of 32 queries at 512 slots is 4 splits for each of 32 heads. The grid is
// shaped by max_q_len and max_kv_len; CTAs beyond their segment leave at once. A few CTAs
// more write zeros into the rows that see nothing.
//
// Bytes. Each slot that is seen is read once per tile: 2 * head_dim elements per key head; tiles of
// one split run side by side, so that all but the first find it in the L2 cache. Slots that are not
// seen are not read, not even beside others: their place in shared memory holds zeros, so that NaN
// there cannot come through 0 * NaN.
//
// Tensor cores (16-bit, head_dim a multiple of 8 up to 128, 16-byte strides, a positive scale): a
// decode pass waits for memory, and between its copies for the few instructions of one warp, so
// there must be few of them. A step is 64 slots, 32 KB of keys and values in shared memory; two
// steps are on their way at once: all of a shortest split. A warp has 16 rows, whose queries stay
// in registers, by 32 slots at a time. A tile is 64 rows, each warp's own by all slots; or, where
// there are at most 32 or CTAs are few, 32 rows, and two warps share 16 of them, each with half of
// the slots of a step. What the warps have of a row is merged with what the other CTAs have, at
// once. Three CTAs an SM: 72 KB of shared memory (80 where tiles may be of 64 rows: two CTAs) and
// at most 168 registers.
//
// Restricted launches (causal, or by ancestors) are kernels of their own: a row's bits of 32 slots
// decide which scores count. Slots below `base` are seen by all, so only the steps behind it are
// looked at more closely: values there that are not finite become zeros, and NaN in the rows that
// see them.
//
// FMA (float32, other head_dims and strides): a tile is 16 rows, a step 128 slots; a thread scores
// one slot against every row, a warp takes the softmax of every fourth row, a thread gathers two
// elements of every row's sum. 16 KB of shared memory a CTA.
//
// Measured on an H200, 32 queries of LLaDA's heads: 512 slots 13 us alone, 34 in a batch of 8 (the
// memory's share 2 and 17); splits of 64 slots, in an earlier form of this kernel, took a third
// longer than of 128.
#include <algorithm>
#include <type_traits>

#include "cluster.cuh"
#include "mma.cuh"

#include "dparallel/launch.h"

namespace dparallel::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kLeastSplit = 128;   // slots; a multiple of kStep
constexpr int kEnough = 256;       // CTAs of a segment
constexpr int kFew = kEnough / 4;  // so few that smaller tiles are worth it
constexpr int kClusteredBits = 3;  // of the splits that may be a cluster
constexpr int kMostBits = 6;       // of the splits of a tile
constexpr int kLong = 8192;        // slots, from which on a tile may have those
constexpr int kTallRows = 64, kShortRows = 32, kPlainRows = 16;  // of a tile
constexpr int kStep = 64, kTensorDim = 128;
// CTAs an SM: before sm_90 its shared memory holds no third.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTogether = 2;
#else
constexpr int kTogether = 3;
#endif

// Parts of `size` that make up `count`.
DP_HD int parts_of(int count, int size) {
  return static_cast<int>(static_cast<uint32_t>(count + size - 1) / static_cast<uint32_t>(size));
}

// The power of two from `count` on, or of kMostBits where it is larger.
DP_HD int bits_above(int count) {
  int bits = 0;
  for (int b = 0; b < kMostBits; ++b) bits += count > 1 << b;
  return bits;
}

// Of the splits that bring so many tiles to kEnough CTAs: a power of two.
DP_HD int bits_to_enough(int tiles) {
  int bits = 0;
  for (int b = 1; b <= kMostBits; ++b) bits += tiles <= kEnough >> b;
  return bits;
}

// Of the splits that a length allows.
DP_HD int bits_of_length(bool on_tensor_cores, int length) {
  const int most = on_tensor_cores && length < kLong ? kClusteredBits : kMostBits;
  const int pieces = bits_above(parts_of(length, kLeastSplit));
  return pieces < most ? pieces : most;
}

// What a segment's work is cut into; of its own numbers alone.
struct Cut {
  int tile_rows, tiles;
  int bits;           // a tile has so many places for CTAs: a power of two
  int splits, split;  // that are taken; slots of one

  DP_HD static Cut of(bool on_tensor_cores, int heads, int rows, int length) {
    Cut cut{};
    if (rows <= 0 || length <= 0) return cut;
    const int most = bits_of_length(on_tensor_cores, length);
    const auto into = [&](int tile_rows) {
      cut.tile_rows = tile_rows;
      cut.tiles = parts_of(rows, tile_rows);
      const int bits = bits_to_enough(heads * cut.tiles);
      cut.bits = bits < most ? bits : most;
    };
    if (!on_tensor_cores) {
      into(kPlainRows);
    } else {
      into(kTallRows);
      if (rows <= kShortRows || heads * cut.tiles << cut.bits <= kFew) into(kShortRows);
    }
    const int pieces = parts_of(length, kLeastSplit);
    const int own = (pieces + (1 << cut.bits) - 1) >> cut.bits;
    cut.split = own * kLeastSplit;
    cut.splits = own == 1 ? pieces : parts_of(pieces, own);
    return cut;
  }
};

// Divides numbers below 2^31 without a division: size * factor is 2^(31 + shift) or less than
// 2^shift more.
struct Divisor {
  uint32_t size, factor, shift;

  static Divisor of(int64_t size) {
    Divisor by{static_cast<uint32_t>(size < INT32_MAX ? size : INT32_MAX), 0, 0};
    while ((uint64_t{1} << by.shift) < by.size) ++by.shift;
    const uint64_t power = uint64_t{1} << (31 + by.shift);
    by.factor = static_cast<uint32_t>((power + by.size - 1) / by.size);
    return by;
  }
  DP_HD uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{2 * n} * factor >> 32) >> shift;
  }
};

// The launch: `share` CTAs for each segment and key head, enough for any cut, and then those of the
// rows that see nothing.
struct Shape {
  bool on_tensor_cores;
  int max_q_len, max_kv_len;
  int cluster;    // a power of two
  int part_rows;  // of scratch for a CTA; 0: nothing is merged by the second kernel
  int64_t part_floats, units;
  int working;                        // CTAs before those of the rows that see nothing
  Divisor share, heads, group, page;  // the last two: query heads of a key head, slots of a page

  static Shape of(const BlockAttentionArgs& args, bool on_tensor_cores, bool clusters) {
    const auto bound = [](int64_t x) {
      return static_cast<int>(x < INT32_MAX / 2 ? x : INT32_MAX / 2);
    };
    const CacheLayout& k = args.k_layout;
    Shape shape{};
    shape.on_tensor_cores = on_tensor_cores;
    shape.heads = Divisor::of(k.heads);
    shape.group = Divisor::of(args.q_heads / k.heads);
    shape.page = Divisor::of(k.page_size);
    shape.max_q_len = bound(args.max_q_len < args.count ? args.max_q_len : args.count);
    shape.max_kv_len = bound(args.max_kv_len);
    shape.units = args.segments * k.heads;
    const int heads = static_cast<int>(k.heads);
    const int64_t rows = shape.max_q_len * int64_t{shape.group.size};
    int bits = bits_of_length(on_tensor_cores, shape.max_kv_len);
    if (bits_to_enough(heads) < bits) bits = bits_to_enough(heads);
    shape.cluster = 1;
    if (on_tensor_cores && clusters)
      shape.cluster = 1 << (bits < kClusteredBits ? bits : kClusteredBits);
    // Where tiles are split there are at most kEnough CTAs of a segment, and half of that where
    // tiles are short because they are few.
    const int64_t most = heads < kEnough ? kEnough / heads : 1;
    const auto tiles = [&](int tile_rows) { return (rows + tile_rows - 1) / tile_rows; };
    const auto split = [&](int64_t count, int64_t limit) {
      return count << bits < limit ? count << bits : limit;
    };
    const int tile_rows = on_tensor_cores ? kTallRows : kPlainRows;
    int64_t share = tiles(tile_rows) > 1 ? tiles(tile_rows) : 1;
    share = std::max(share, split(tiles(tile_rows), most));
    if (on_tensor_cores) share = std::max(share, split(tiles(kShortRows), most / 2));
    shape.share = Divisor::of((share + shape.cluster - 1) / shape.cluster * shape.cluster);
    shape.working = static_cast<int>(shape.units * shape.share.size);
    if (1 << bits > shape.cluster) {
      shape.part_rows = static_cast<int>(rows < tile_rows ? rows : tile_rows);
      shape.part_floats = (shape.part_rows * (k.head_dim + 2) + 3) / 4 * 4;
    }
    return shape;
  }

  // Of the parts of a segment's tile that lies at `place` of the unit's CTAs.
  DP_HD int64_t part(int64_t unit, int place) const {
    return (unit * share.size + place) * part_floats;
  }
};

// A segment and a key head.
struct Unit {
  const BlockAttentionArgs& args;
  const Shape& shape;
  int segment, head;
  int rows, length;    // packed rows, slots; within the launch's bounds, whatever the segment says
  int64_t begin;       // the segment's first query row
  int base;            // slots below it are seen by every row
  uint32_t only_page;  // of a segment that has one
  Cut cut;

  __device__ __forceinline__ Unit(const BlockAttentionArgs& args, const Shape& shape, int unit,
                                  bool on_tensor_cores)
      : args(args), shape(shape) {
    segment = static_cast<int>(shape.heads.quotient(static_cast<uint32_t>(unit)));
    head = unit - segment * static_cast<int>(shape.heads.size);
    begin = args.q_start[segment];
    only_page = args.table_width == 1 ? static_cast<uint32_t>(args.block_table[segment]) : 0;
    const int64_t queries = args.q_end[segment] - begin, slots = args.kv_lens[segment];
    rows = static_cast<int>(shape.group.size) *
           static_cast<int>(queries < shape.max_q_len ? queries : shape.max_q_len);
    length = static_cast<int>(slots < shape.max_kv_len ? slots : shape.max_kv_len);
    base = args.restricted() ? static_cast<int>(slots - queries) : length;
    cut = Cut::of(on_tensor_cores, static_cast<int>(shape.heads.size), rows, length);
  }

  // Whether a tile's splits are merged by their CTAs.
  __device__ __forceinline__ bool clustered() const {
    return cut.splits > 1 && 1 << cut.bits <= shape.cluster;
  }

  // What a row's weighted values are divided by; one that sees nothing has zeros.
  __device__ __forceinline__ float divisor(float sum) const {
    return args.restricted() && sum == 0.0f ? 1.0f : sum;
  }

  // Elements before a packed row, in q and in the output.
  __device__ __forceinline__ int64_t query(int row) const {
    const uint32_t of_query = shape.group.quotient(static_cast<uint32_t>(row));
    return (begin + of_query) * args.q_stride + in_query(row, of_query);
  }
  __device__ __forceinline__ int64_t output(int row) const {
    const uint32_t of_query = shape.group.quotient(static_cast<uint32_t>(row));
    const int dim = static_cast<int>(args.k_layout.head_dim);
    return (begin + of_query) * (args.q_heads * dim) + in_query(row, of_query);
  }

 private:
  __device__ __forceinline__ int in_query(int row, uint32_t of_query) const {
    const int size = static_cast<int>(shape.group.size),
              dim = static_cast<int>(args.k_layout.head_dim);
    return (head * size + row - static_cast<int>(of_query) * size) * dim;
  }
};

// The rows and slots of one CTA.
struct Work : Unit {
  int tile, split, place;
  int first, rows;  // packed rows [first, first + rows); none: nothing to do
  int start, end;   // slots

  __device__ __forceinline__ Work(const BlockAttentionArgs& args, const Shape& shape, int block,
                                  bool on_tensor_cores)
      : Unit(args, shape, static_cast<int>(shape.share.quotient(static_cast<uint32_t>(block))),
             on_tensor_cores),
        rows(0) {
    const int unit = segment * static_cast<int>(shape.heads.size) + head;
    place = block - unit * static_cast<int>(shape.share.size);
    tile = place >> cut.bits;  // a tile's CTAs are side by side
    split = place & ((1 << cut.bits) - 1);
    if (tile >= cut.tiles || split >= cut.splits) return;
    first = tile * cut.tile_rows;
    rows = Unit::rows - first < cut.tile_rows ? Unit::rows - first : cut.tile_rows;
    start = split * cut.split;
    end = start + cut.split < length ? start + cut.split : length;
    if (!args.causal) return;
    const int seen = base + row_of_segment(first + rows - 1) + 1;  // by the tile's last row
    end = seen < end ? (seen > start ? seen : start) : end;
  }

  // The query row that a packed row belongs to, from the segment's first.
  __device__ __forceinline__ int row_of_segment(int row) const {
    return static_cast<int>(shape.group.quotient(static_cast<uint32_t>(row)));
  }

  // Of 32 slots from `slot` on, a bit for each that packed row `row` sees.
  __device__ __forceinline__ uint32_t seen_of(int row, int slot) const {
    const int ahead = slot - base;      // the first one's bit among the segment's own slots
    const int last = first + rows - 1;  // a tile's padding rows see what its last one sees
    const int of_query = row_of_segment(row < last ? row : last);
    if (ahead <= -32) return ~0u;
    if (args.causal) {
      const int count = of_query + 1 - ahead;
      return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
    }
    const auto* words =
        reinterpret_cast<const uint64_t*>(args.ancestors) + (begin + of_query) * args.words;
    const auto word = [&](int i) { return i < args.words ? words[i] : uint64_t{0}; };
    if (ahead < 0) return static_cast<uint32_t>(word(0) << -ahead) | ((1u << -ahead) - 1);
    const int shift = ahead % 64;
    const uint64_t low = word(ahead / 64) >> shift;
    return static_cast<uint32_t>(shift > 32 ? low | word(ahead / 64 + 1) << (64 - shift) : low);
  }

  // All warps have their own rows; else two share them.
  __device__ __forceinline__ bool tall() const { return cut.tile_rows == kTallRows; }

  // Elements before the key and the value of a slot of key head 0.
  struct Place {
    int64_t key, value;
  };
  __device__ __forceinline__ Place place_of(int slot) const {
    const CacheLayout &k = args.k_layout, &v = args.v_layout;
    const uint32_t page = shape.page.quotient(static_cast<uint32_t>(slot));
    const uint32_t inside = static_cast<uint32_t>(slot) - page * shape.page.size;
    const auto number = static_cast<uint32_t>(
        args.table_width == 1 ? only_page : args.block_table[segment * args.table_width + page]);
    return {number * k.page_stride + inside * k.slot_stride,
            number * v.page_stride + inside * v.slot_stride};
  }
  // Those of the work's key head.
  template <class Storage>
  __device__ __forceinline__ const Storage* keys() const {
    return static_cast<const Storage*>(args.k_cache) + head * args.k_layout.head_stride;
  }
  template <class Storage>
  __device__ __forceinline__ const Storage* values() const {
    return static_cast<const Storage*>(args.v_cache) + head * args.v_layout.head_stride;
  }
};

// e^(score - top), where nothing was seen under a top of -inf. Scores of tensor cores are in units
// of log 2, and `unit` is 1; those of FMA are as they are, and it is kLog2e: they are subtracted
// before they are rounded again.
__device__ __forceinline__ float weight_of(float score, float top, float unit) {
  return exp2_fast((score - (top == -kInfinity ? 0.0f : top)) * unit);
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

// W elements of a row, of several parts together: the weighted sum of values, the score that
// weights are relative to, and the sum of weights.
template <int W, int kBatch>
struct Merged {
  float value[W] = {}, top = -kInfinity, sum = 0.0f;

  // load(i, value, top, sum) of part i, in order; kBatch parts are on their way at once.
  template <class Load>
  __device__ __forceinline__ Merged(int parts, float unit, Load load) {
    for (int from = 0; from < parts; from += kBatch) {
      float values[kBatch][W], tops[kBatch], sums[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        tops[i] = -kInfinity;
        sums[i] = 0.0f;
#pragma unroll
        for (int w = 0; w < W; ++w) values[i][w] = 0.0f;
        if (from + i < parts) load(from + i, values[i], tops[i], sums[i]);
      }
      float now = top;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) now = fmaxf(now, tops[i]);
      const float kept = weight_of(top, now, unit);
      top = now;
      sum *= kept;
#pragma unroll
      for (int w = 0; w < W; ++w) value[w] *= kept;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float weight = weight_of(tops[i], now, unit);
        sum += weight * sums[i];
#pragma unroll
        for (int w = 0; w < W; ++w) value[w] += weight * values[i][w];
      }
    }
  }
};

// Elements of the output, of values and the sum of their weights. Four are a vector.
template <class T, int W>
__device__ __forceinline__ void store(typename T::Storage* out, const float (&value)[W],
                                      float sum) {
  struct alignas(W * sizeof(*out)) Vector {
    typename T::Storage element[W];
  } vector;
  const float inverse = 1.0f / sum;
#pragma unroll
  for (int w = 0; w < W; ++w) vector.element[w] = T::narrow(value[w] * inverse);
  *reinterpret_cast<Vector*>(out) = vector;
}

// What a CTA leaves in scratch: weighted sums of values [rows, head_dim], then the score that each
// row's weights are relative to and their sum.
struct Part {
  float *values, *tops, *sums;

  __device__ __forceinline__ Part(const Unit& unit, float* scratch, int place) {
    const int64_t number = static_cast<int64_t>(unit.segment) * unit.shape.heads.size + unit.head;
    values = scratch + unit.shape.part(number, place);
    tops = values + unit.shape.part_rows * unit.args.k_layout.head_dim;
    sums = tops + unit.shape.part_rows;
  }
};

// ---- Rows that see nothing ----

constexpr int kBlankRows = 8, kBlankBlock = kBlankRows * kWarps;  // of a warp, of a CTA

// Zeros into those of a CTA's rows that are in no segment, or in one without slots.
template <class Storage>
__device__ __forceinline__ void write_blanks(const BlockAttentionArgs& args, const Shape& shape,
                                             int block) {
  const int lane = threadIdx.x % 32;
  const int64_t first =
      static_cast<int64_t>(block) * kBlankBlock + static_cast<int>(threadIdx.x) / 32 * kBlankRows;
  unsigned seeing = 0;  // a bit for each row
  for (int64_t s = lane; s < args.segments; s += 32) {
    if (args.kv_lens[s] <= 0 || shape.max_kv_len <= 0) continue;
    const int64_t begin = args.q_start[s], most = begin + shape.max_q_len;
    const int64_t end = args.q_end[s] < most ? args.q_end[s] : most;
#pragma unroll
    for (int r = 0; r < kBlankRows; ++r)
      if (begin <= first + r && first + r < end) seeing |= 1u << r;
  }
  for (int bits = 16; bits > 0; bits /= 2) seeing |= __shfl_xor_sync(kFullWarp, seeing, bits);
  const int64_t width = args.q_heads * args.k_layout.head_dim;
  for (int r = 0; r < kBlankRows && first + r < args.count; ++r) {
    if (seeing >> r & 1) continue;
    auto* row = static_cast<Storage*>(args.out) + (first + r) * width;
    for (int64_t i = lane; i < width; i += 32) row[i] = 0;
  }
}

// ---- Tensor cores ----

template <int kDim>
struct TensorShared {
  static constexpr int kPadded = kDim + 8;  // so that eight rows' elements are in different banks
  // Of a warp's 16 rows by its slots: the weighted sum of values, and then the score that weights
  // are relative to and their sum.
  using Sums = float[16 * kWarps][kPadded];
  union alignas(16) {
    struct {
      uint16_t step[2][2 * kStep * kDim];  // keys, values
      uint16_t query[kTallRows * kDim];
    };
    Sums sums;  // when all steps are done
  };
  // Of a launch whose segments have no more rows: where all tiles are short they need no more
  // queries.
  static size_t bytes(int longest) {
    return sizeof(TensorShared) -
           (longest <= kShortRows ? sizeof(uint16_t) * (kTallRows - kShortRows) * kDim : 0);
  }
};

template <class T, int kDim>
struct Steps {
  static constexpr int kChunks = kDim / 8, kTile = kStep * kDim;
  static constexpr int kLanes = 8;                   // share a row: a line of 128 bytes at a time
  static constexpr int kAtOnce = kThreads / kLanes;  // rows, a multiple of 8

  // A row of shared memory is kDim elements, in chunks of 16 bytes. Chunk c of row r lies at
  // c ^ r % 8: eight rows' same chunk, which ldmatrix reads at once, is in eight groups of banks.
  static __device__ __forceinline__ int chunk(int row, int c) {
    return row * kDim + (c ^ row % 8) * 8;
  }
  // The chunk 2k further on: every fourth of them is no new address to keep.
  static __device__ __forceinline__ int across(int chunk, int k) {
    return (chunk ^ 16 * (k % 4)) + 64 * (k / 4);
  }

  // Begins to copy the queries: zeros beyond the tile's rows, and beyond head_dim.
  static __device__ __forceinline__ void copy_queries(const Work& work, uint16_t* to) {
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const int dim = static_cast<int>(work.args.k_layout.head_dim);
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x / kLanes); r < work.cut.tile_rows; r += kAtOnce) {
      const bool there = r < work.rows;
      const uint16_t* from = static_cast<const uint16_t*>(work.args.q) +
                             work.query(work.first + (there ? r : 0)) + lane * 8;
      copy_row(to + chunk(r, lane), from, there && lane * 8 < dim,
               there && (lane + kLanes) * 8 < dim);
    }
  }

  // Begins to copy the slots [slot, slot + kStep) of the split: zeros beyond its end, and beyond
  // head_dim.
  static __device__ __forceinline__ void copy(const Work& work, int slot, uint16_t* to) {
    const int dim = static_cast<int>(work.args.k_layout.head_dim);
    const auto t = static_cast<unsigned>(anew(static_cast<int>(threadIdx.x)));
    const int lane = static_cast<int>(t % kLanes), row = static_cast<int>(t / kLanes);
    const uint16_t *keys[kRows], *values[kRows];  // their pages are looked up together
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int s = slot + row + i * kAtOnce;
      const Work::Place from = work.place_of(s < work.end ? s : work.end - 1);
      keys[i] = work.keys<uint16_t>() + lane * 8 + from.key;
      values[i] = work.values<uint16_t>() + lane * 8 + from.value;
    }
    to += chunk(row, lane);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool there = slot + row + i * kAtOnce < work.end;
      const bool near = there && lane * 8 < dim, far = there && (lane + kLanes) * 8 < dim;
      copy_row(to + i * kAtOnce * kDim, keys[i], near, far);
      copy_row(to + i * kAtOnce * kDim + kTile, values[i], near, far);
    }
  }

 private:
  static constexpr int kRows = kStep / kAtOnce;

  // A thread's chunks of a row.
  static __device__ __forceinline__ void copy_row(uint16_t* to, const uint16_t* from, bool near,
                                                  bool far) {
    static_assert(kChunks <= 2 * kLanes, "");
    copy_async<0>(to, from, near);
    if constexpr (kChunks > kLanes) copy_async<16 * kLanes>(to, from, far);
  }
};

// A warp's 16 rows and their softmax so far, over the slots that are the warp's.
template <class T, int kDim, bool kRestricted>
struct Rows {
  using S = Steps<T, kDim>;
  static constexpr int kDepth = kDim / 16;
  static constexpr int kKeys = 32;  // at a time
  // A row's sums are made relative to a larger score only when it is larger by a factor of
  // 2^kSlack: weights stay below that, of which 16 bits make no more than of 1.
  static constexpr float kSlack = 8.0f;

  uint32_t query[kDepth][4];
  float out[kDim / 8][4] = {};
  // Of rows g and g + 8. top: in units of log 2. sum: of this lane.
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {};

  __device__ __forceinline__ void load(const uint16_t* queries) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int at = S::chunk(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) load_matrices(query[k], queries + S::across(at, k));
  }

  // kKeys slots, whose keys are at `step`: `left` of them are seen; of a restricted launch those of
  // `seen` by rows g and g + 8, and `bad` hold values that are not finite. factor: of scores, to
  // units of log 2.
  __device__ __forceinline__ void attend(const uint16_t* step, int left, float factor,
                                         const uint32_t (&seen)[2], uint32_t bad) {
    const auto t = static_cast<unsigned>(anew(static_cast<int>(threadIdx.x)));
    const int lane = static_cast<int>(t % 32), q = static_cast<int>(t % 4);
    // Of the row that the lane names to ldmatrix. Its chunk c + 2k is then at `across(this, k)`.
    const int key = S::chunk(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const int value = S::kTile + S::chunk(lane % 16, lane / 16);
    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];  // keys 16n ... 16n + 7 by dims 16k ... 16k + 15, then the next eight keys
        load_matrices(b, step + S::across(key, k) + 16 * n * kDim);
        mma<T>(score[2 * n], query[k], b[0], b[1]);
        mma<T>(score[2 * n + 1], query[k], b[2], b[3]);
      }
    if constexpr (kRestricted) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int slot = 8 * n + 2 * q + i % 2;
          if (slot >= left || !(seen[i / 2] >> slot & 1)) score[n][i] = -kInfinity;
        }
#pragma unroll
      for (int half = 0; half < 2; ++half)  // the values themselves are zeros by now
        if (seen[half] & bad) sum[half] = __builtin_nanf("");
    } else if (left < kKeys) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * n + 2 * q + i % 2 >= left) score[n][i] = -kInfinity;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = -kInfinity;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)  // ignores NaN
        now = fmaxf(now, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      now = largest_of(now, 4) * factor;
      if (now > top[half] + kSlack) {
        const float kept = weight_of(top[half], now, 1.0f);
        top[half] = now;
        sum[half] *= kept;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          out[d][2 * half] *= kept;
          out[d][2 * half + 1] *= kept;
        }
      }
      const float base = top[half] == -kInfinity ? 0.0f : top[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          score[n][i] = exp2_fast(score[n][i] * factor - base);
          sum[half] += score[n][i];
        }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t a[4];  // a lane's scores of C are, two keys to a register, its part of A
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = T::narrow(score[2 * n + i / 2][i % 2 * 2], score[2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        uint32_t b[4];  // dims 16d ... 16d + 7 by keys 16n ... 16n + 15, then the next eight dims
        load_matrices_transposed(b, step + S::across(value, d) + 16 * n * kDim);
        mma<T>(out[2 * d], a, b[0], b[1]);
        mma<T>(out[2 * d + 1], a, b[2], b[3]);
      }
    }
  }

  // What the warp has, into 16 rows of the sums.
  __device__ __forceinline__ void store(float (*to)[TensorShared<kDim>::kPadded]) const {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* row = to[8 * half + g];
      const float total = sum_of(sum[half], 4);
      if (q == 0) {
        row[kDim] = top[half];
        row[kDim + 1] = total;
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        row[8 * n + 2 * q] = out[n][2 * half];
        row[8 * n + 2 * q + 1] = out[n][2 * half + 1];
      }
    }
  }
};

// From what each warp has of its rows in shared memory to the output, or to scratch.
template <class T, int kDim>
__device__ __forceinline__ void finish(const Work& work, typename TensorShared<kDim>::Sums& sums,
                                       float* scratch) {
  constexpr int kColumns = kDim / 4;
  const int dim = static_cast<int>(work.args.k_layout.head_dim);
  const int sharing = work.tall() ? 0 : 1;  // warps that share a row: 1 << sharing
  const bool clustered = work.clustered();
  const int own = static_cast<int>(blockIdx.x) & (work.shape.cluster - 1);
  const int parts = clustered ? work.cut.splits << sharing : 1 << sharing;
  const int first = clustered ? own - work.split : own;
  const int begin = clustered ? work.split : 0, step = clustered ? work.cut.splits : 1;
  if (clustered) cluster_barrier();
  else __syncthreads();
#pragma unroll 1
  for (int i = begin * kThreads + static_cast<int>(threadIdx.x); i < work.rows * kColumns;
       i += step * kThreads) {  // each CTA takes its share of the elements
    const int r = i / kColumns, d = i % kColumns * 4;
    const Merged<4, 8> merged(parts, 1.0f, [&](int p, float (&value)[4], float& top, float& sum) {
      const float* row = of_peer(sums[(p & sharing) * kShortRows + r],
                                 static_cast<unsigned>(first + (p >> sharing)));
      const uint4 four = *reinterpret_cast<const uint4*>(row + d);
      const uint2 about = *reinterpret_cast<const uint2*>(row + kDim);
      value[0] = from_bits(four.x);
      value[1] = from_bits(four.y);
      value[2] = from_bits(four.z);
      value[3] = from_bits(four.w);
      top = from_bits(about.x);
      sum = from_bits(about.y);
    });
    if (d >= dim) continue;
    if (clustered || work.cut.splits == 1) {
      auto* out = static_cast<typename T::Storage*>(work.args.out);
      store<T>(out + work.output(work.first + r) + d, merged.value, work.divisor(merged.sum));
      continue;
    }
    const Part part(work, scratch, work.place);
    store_stored<Float32>(part.values + r * dim + d, merged.value, true);
    if (d > 0) continue;
    part.tops[r] = merged.top;
    part.sums[r] = merged.sum;
  }
  if (clustered) leave_cluster();  // nobody leaves while others read
}

// Of kKeys slots of a step in shared memory, a bit for each whose values are not all finite. A row
// that does not see such a slot must not meet it as 0 * NaN.
template <class T, int kDim>
__device__ __forceinline__ uint32_t not_finite(const uint16_t* step, int from) {
  using S = Steps<T, kDim>;
  constexpr uint32_t kExponent = std::is_same<T, BFloat16>::value ? 0x7f80u : 0x7c00u;
  const int row = from + static_cast<int>(threadIdx.x % 32);
  bool bad = false;
#pragma unroll 1
  for (int c = 0; c < S::kChunks; ++c) {
    const uint4 eight = *reinterpret_cast<const uint4*>(step + S::kTile + S::chunk(row, c));
    for (const uint32_t two : {eight.x, eight.y, eight.z, eight.w})
      bad |= (two & kExponent) == kExponent || (two >> 16 & kExponent) == kExponent;
  }
  return __ballot_sync(kFullWarp, bad);
}

// Zeros in place of the values of `bad` slots of a step, by one warp.
template <class T, int kDim>
__device__ __forceinline__ void blank_values(uint16_t* step, int from, uint32_t bad) {
  using S = Steps<T, kDim>;
  const auto lane = threadIdx.x % 32;
  if (!(bad >> lane & 1)) return;
#pragma unroll 1
  for (int c = 0; c < S::kChunks; ++c)
    *reinterpret_cast<uint4*>(step + S::kTile + S::chunk(from + static_cast<int>(lane), c)) =
        uint4{0, 0, 0, 0};
}

template <class T, int kDim, bool kRestricted>
__global__ void __launch_bounds__(kThreads, kRestricted ? 2 : kTogether)
    block_attention_tensor_kernel(BlockAttentionArgs args, Shape shape, float* scratch) {
  using S = Steps<T, kDim>;
  DPARALLEL_LARGE_SHARED(shared, TensorShared<kDim>);
  wait_for_earlier();
  const int beyond = static_cast<int>(blockIdx.x) - shape.working;
  if (beyond >= 0) return write_blanks<typename T::Storage>(args, shape, beyond);
  const Work work(args, shape, static_cast<int>(blockIdx.x), true);
  if (work.rows == 0) return;
  S::copy_queries(work, shared.query);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (work.start + i * kStep < work.end) S::copy(work, work.start + i * kStep, shared.step[i]);
    commit_copies();
  }
  Rows<T, kDim, kRestricted> rows;
  static_assert(kShortRows == rows.kKeys && kStep == 2 * rows.kKeys, "");
  // Two warps share a short tile's rows, and take every other kKeys slots of a step.
  const int warp = static_cast<int>(threadIdx.x / 32), row = warp * 16 & (work.cut.tile_rows - 1);
  const int begin = warp * 16 - row;  // 0, or kKeys for the second half of a short tile's warps
  const int stride = work.tall() ? rows.kKeys : kStep;
  const float factor = args.scale * kLog2e;
  wait_for_copies<1>();
  __syncthreads();  // everyone's copies are there
  rows.load(shared.query + row * kDim);
  int now = 0;  // the step's half of shared memory
  for (int slot = work.start; slot < work.end; slot += kStep, now ^= 1) {
    uint32_t bad[2] = {};  // of the step's halves
    if constexpr (kRestricted) {
      if (slot + kStep > work.base) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          bad[half] = not_finite<T, kDim>(shared.step[now], half * rows.kKeys);
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (warp == half) blank_values<T, kDim>(shared.step[now], half * rows.kKeys, bad[half]);
        __syncthreads();
      }
    }
    if (row < work.rows)  // the whole warp
#pragma unroll 1
      for (int from = begin; from < kStep && slot + from < work.end; from += stride) {
        uint32_t seen[2] = {};
        if constexpr (kRestricted) {
          const int own = work.first + row + static_cast<int>(threadIdx.x % 32 / 4);
          seen[0] = work.seen_of(own, slot + from);
          seen[1] = work.seen_of(own + 8, slot + from);
        }
        rows.attend(shared.step[now] + from * kDim, work.end - slot - from, factor, seen,
                    from == 0 ? bad[0] : bad[1]);
      }
    const int next = slot + 2 * kStep;
    if (next < work.end) {
      __syncthreads();  // everyone is done with the step
      S::copy(work, next, shared.step[now]);
    }
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();  // the next step's copies are there; or everyone is done with the last
  }
  rows.store(shared.sums + warp * 16);
  finish<T, kDim>(work, shared.sums, scratch);
}

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

// ---- What no cluster has merged ----

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
  const int block = static_cast<int>(blockIdx.x);
  const Unit unit(args, shape, block / blocks, shape.on_tensor_cores);
  const int first = block % blocks * kMergeRows;
  if (unit.cut.splits <= 1 || unit.clustered() || first >= unit.rows) return;
  if (args.k_layout.head_dim % 4 == 0) merge_parts<T, 4>(unit, scratch, first);
  else merge_parts<T, 1>(unit, scratch, first);
}

// ---- The launch ----

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

}  // namespace

int64_t block_attention_scratch(const BlockAttentionArgs& args) {
  const Shape shape = shape_of(args);
  return shape.part(shape.units, 0) * static_cast<int64_t>(sizeof(float));
}

int block_attention(const BlockAttentionArgs& args, const Workspace& workspace, void* stream) {
  const Shape shape = shape_of(args);
  const int64_t blanks = parts_of(static_cast<int>(args.count), kBlankBlock);
  const auto grid = static_cast<unsigned>((shape.working + blanks + shape.cluster - 1) /
                                          shape.cluster * shape.cluster);
  if (grid == 0) return 0;
  auto* scratch = static_cast<float*>(workspace.scratch);
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto attend = [&](auto kernel, size_t shared_bytes) {
      return DPARALLEL_LAUNCH_CLUSTERS(kernel, grid, static_cast<unsigned>(shape.cluster), kThreads,
                                       shared_bytes, clusters(), stream, args, shape, scratch);
    };
    const int longest = shape.max_q_len * static_cast<int>(shape.group.size);
    const auto attend_by = [&](auto restricted) {
      constexpr bool kRestricted = decltype(restricted)::value;
      if constexpr (sizeof(typename T::Storage) == 2) {
        if (shape.on_tensor_cores && args.k_layout.head_dim <= 64)
          return attend(block_attention_tensor_kernel<T, 64, kRestricted>,
                        TensorShared<64>::bytes(longest));
        if (shape.on_tensor_cores)
          return attend(block_attention_tensor_kernel<T, kTensorDim, kRestricted>,
                        TensorShared<kTensorDim>::bytes(longest));
      }
      return attend(block_attention_plain_kernel<T, kRestricted>, 0);
    };
    const int code = args.restricted() ? attend_by(std::true_type{}) : attend_by(std::false_type{});
    if (code != 0 || shape.part_rows == 0) return code;
    // Only so many rows of a key head are ever split.
    const int most = kEnough / 2 / static_cast<int>(shape.heads.size) *
                     (shape.on_tensor_cores ? kTallRows : kPlainRows);
    const int rows = longest < most ? longest : most;
    const int blocks = parts_of(rows, kMergeRows);
    if (shape.units * blocks == 0) return 0;
    DPARALLEL_LAUNCH(block_attention_merge_kernel<T>, static_cast<unsigned>(shape.units * blocks),
                     kThreads, stream, args, shape, scratch, blocks);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
