// How block_attention's work is cut, a CTA's share of it, and how shares of a row are merged. The
// sizes below are guesses but for kLeastSplit and kTogether (block_attention.cu has the figures).
#pragma once

#include <algorithm>

#include "device.cuh"
#include "dparallel/launch.h"

namespace dparallel::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kLeastSplit = 128;   // slots; a multiple of kStep
constexpr int kEnough = 256;       // CTAs of a segment
constexpr int kFew = kEnough / 4;  // so few that smaller tiles are worth it
constexpr int kClusteredBits = 3;  // of the splits that may be a cluster
constexpr int kMostBits = 6;       // of the splits of a tile
constexpr int kLong = 8192;        // slots, from which on a tile may have 1 << kMostBits splits
constexpr int kTallRows = 64, kShortRows = 32, kPlainRows = 16;  // of a tile
constexpr int kStep = 64, kTensorDim = 128;
// Bytes of scratch, unless one segment needs more.
#if defined(DPARALLEL_CUDA_HOST)
constexpr int64_t kMostScratch = 1 << 14;  // so that launches of some segments at a time are tested
#else
constexpr int64_t kMostScratch = 64 << 20;
#endif
constexpr int64_t kMostBlocks = 1 << 30;  // of a launch, and some more for rows that see nothing
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

// Of the splits that bring `tiles` to kEnough CTAs: a power of two.
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

// How a segment's work is cut, by its own numbers alone.
struct Cut {
  int tile_rows, tiles;
  int bits;           // a tile has 1 << bits places for CTAs
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

// The launch: `share` CTAs for each segment and key head, enough for any cut, and then the CTAs for
// rows that see nothing.
struct Shape {
  bool on_tensor_cores;
  int max_q_len, max_kv_len;
  int cluster;      // a power of two
  int part_rows;    // of scratch for a CTA; 0: nothing is merged by the second kernel
  uint32_t places;  // of a unit's CTAs, the first, that may have a part in scratch
  int64_t part_floats, units;
  int working;                        // CTAs before the CTAs for rows that see nothing
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
    int64_t places = split(tiles(tile_rows), most);
    if (on_tensor_cores) places = std::max(places, split(tiles(kShortRows), most / 2));
    const int64_t share = std::max(places, std::max(tiles(tile_rows), int64_t{1}));
    shape.share = Divisor::of((share + shape.cluster - 1) / shape.cluster * shape.cluster);
    shape.working = static_cast<int>(shape.units * shape.share.size);
    if (1 << bits > shape.cluster) {
      shape.places = static_cast<uint32_t>(places);
      shape.part_rows = static_cast<int>(rows < tile_rows ? rows : tile_rows);
      shape.part_floats = (shape.part_rows * (k.head_dim + 2) + 3) / 4 * 4;
    }
    return shape;
  }

  int longest() const { return max_q_len * static_cast<int>(group.size); }  // packed rows

  // Of the parts of a segment's tile that lies at `place` of the unit's CTAs.
  DP_HD int64_t part(int64_t unit, int place) const {
    return (unit * places + place) * part_floats;
  }

  // The segments of a launch: as many as scratch holds, and as there are numbers for their CTAs.
  int64_t segments_at_once() const {
    const int64_t bytes = part(heads.size, 0) * static_cast<int64_t>(sizeof(float));
    const int64_t most = kMostBlocks / (int64_t{heads.size} * share.size);
    return std::max(std::min(bytes > 0 ? kMostScratch / bytes : most, most), int64_t{1});
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

  // The divisor of a row's weighted values; a row that sees nothing has zeros.
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
    const int ahead = slot - base;      // the bit of `slot` among the segment's own slots
    const int last = first + rows - 1;  // padding rows see the slots that the tile's last row sees
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
  // Keys and values of the work's key head.
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
// of log 2, and `unit` is 1; scores of FMA are as they are, and `unit` is kLog2e: they are
// subtracted before they are rounded again.
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

// A CTA's part in scratch: weighted sums of values [rows, head_dim], then the score that each row's
// weights are relative to and their sum.
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

// Writes zeros into the rows, of a CTA's share, that are in no segment or in a segment without
// slots.
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

}  // namespace
}  // namespace dparallel::cuda
