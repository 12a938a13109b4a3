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
// Cut. Splits have at least 64 slots, and there are so many that a segment has about 256 CTAs, two
// for each SM of an H100: of the segment's own length and rows, so that what it yields depends on
// nothing else. The grid is shaped by longest_query and longest_length; CTAs beyond their segment
// leave at once. A few CTAs more write zeros into the rows that see nothing.
//
// Bytes. Each slot that is seen is read once per tile: 2 * head_dim elements per key head; tiles of
// one split run side by side, so that all but the first find it in the L2 cache. Slots that are not
// seen are not read, not even beside others: their place in shared memory holds zeros, so that NaN
// there cannot come through 0 * NaN.
//
// Tensor cores (16-bit, head_dim a multiple of 8 up to 128, 16-byte strides, a positive scale): a
// step is 64 slots, whose keys and values, 32 KB, are copied to shared memory while the step before
// is computed; the first two are asked for at once. A warp has 32 rows, so that what it reads of
// shared memory (80 ldmatrix for 256 mma) keeps up with its mma. Of a tile of more than 64 rows
// each warp takes its own rows by all slots of a step; of at most 64 or 32 rows two or four warps
// share the rows, each with its own half or quarter of the slots: a block of 32 queries uses all
// four. Queries are read from shared memory again in every step: sums (128 registers) and scores
// (64) take the rest. Two CTAs an SM: 97 KB of shared memory and at most 255 registers.
//
// FMA (float32, other head_dims and strides): a tile is 16 rows, a step 128 slots; a thread scores
// one slot against every row, a warp takes the softmax of every fourth row, a thread gathers two
// elements of every row's sum. 16 KB of shared memory a CTA.
//
// The numbers of `Cut` are reckoned, not yet measured on a GPU.
#include "cluster.cuh"
#include "mma.cuh"

#include "dparallel/launch.h"

namespace dparallel::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kLeastSplit = 64;  // slots; a multiple of kStep
constexpr int kEnough = 256;     // CTAs of a segment
constexpr int kClusterBits = 3;  // 8 splits of a tile that are a cluster: what any GPU allows
constexpr int kMostBits = 6;     // 64 splits of a tile
constexpr int kLong = 8192;      // slots, from which on few large tiles have many splits
constexpr int kTensorRows = 128, kPlainRows = 16;
constexpr int kStep = 64, kTensorDim = 128;

// Parts of `size` that make up `count`.
DP_HD int parts_of(int count, int size) {
  return static_cast<int>(static_cast<uint32_t>(count + size - 1) / static_cast<uint32_t>(size));
}

// Of the most splits of a tile, a power of two, where a key head has so many tiles.
DP_HD int split_bits(int heads, int tiles, int pieces, int limit) {
  int bits = limit;
  while (bits > 0 && (heads * tiles > kEnough >> bits || pieces <= 1 << bits >> 1)) --bits;
  return bits;
}

// What a segment's work is cut into; of its own numbers alone.
struct Cut {
  int tile_rows, tiles;
  int splits, bits, split;  // splits: at most 1 << bits; split: slots of one

  DP_HD static Cut of(bool on_tensor_cores, int heads, int rows, int length) {
    Cut cut{on_tensor_cores ? kTensorRows : kPlainRows, 0, 0, 0, kLeastSplit};
    if (rows <= 0 || length <= 0) return cut;
    cut.tiles = on_tensor_cores ? parts_of(rows, kTensorRows) : parts_of(rows, kPlainRows);
    int limit = on_tensor_cores ? kClusterBits : kMostBits;
    // Few key heads and few rows: smaller tiles are more CTAs, but read more of the L2 cache.
    if (on_tensor_cores && heads * cut.tiles << kClusterBits < kEnough / 2) {
      if (length < kLong) {
        cut.tile_rows = kTensorRows / 2;
        cut.tiles = parts_of(rows, kTensorRows / 2);
      } else {
        limit = kMostBits;
      }
    }
    const int pieces = parts_of(length, kLeastSplit);
    cut.bits = split_bits(heads, cut.tiles, pieces, limit);
    const int own = (pieces + (1 << cut.bits) - 1) >> cut.bits;
    cut.split = own * kLeastSplit;
    cut.splits = parts_of(pieces, own);
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

// Bytes from one page, head or slot to the next.
struct Strides {
  uint32_t page, head, slot;

  static bool fit(const CacheLayout& layout) {
    const auto fits = [](int64_t stride) { return 0 <= stride && stride < INT32_MAX; };
    return fits(layout.page_stride) && fits(layout.head_stride) && fits(layout.slot_stride);
  }
  static Strides of(const CacheLayout& layout) {  // of elements of 2 bytes
    return {2 * static_cast<uint32_t>(layout.page_stride),
            2 * static_cast<uint32_t>(layout.head_stride),
            2 * static_cast<uint32_t>(layout.slot_stride)};
  }
};

// The launch: `share` CTAs for each segment and key head, enough for any cut, and then those of the
// rows that see nothing.
struct Shape {
  bool on_tensor_cores;
  int longest_query, longest_length;
  int cluster;
  int part_rows;  // of scratch for a CTA; 0: nothing is merged by the second kernel
  int64_t part_floats, units;
  Divisor share, heads, group, page;  // the last two: query heads of a key head, slots of a page
  Strides keys, values;               // on tensor cores

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
    shape.longest_query = bound(args.longest_query < args.count ? args.longest_query : args.count);
    shape.longest_length = bound(args.longest_length);
    shape.units = args.segments * k.heads;
    shape.keys = Strides::of(args.k_layout);
    shape.values = Strides::of(args.v_layout);
    const int rows = shape.longest_query * static_cast<int>(shape.group.size);
    const int tile_rows = on_tensor_cores ? kTensorRows : kPlainRows;
    const int tiles = parts_of(rows, tile_rows);
    const bool many = !on_tensor_cores || shape.longest_length >= kLong;
    const int heads = static_cast<int>(k.heads);
    const int pieces = parts_of(shape.longest_length, kLeastSplit);
    const int bits = split_bits(heads, 1, pieces, many ? kMostBits : kClusterBits);
    const int splits = 1 << bits;
    shape.cluster = 1;
    if (on_tensor_cores && clusters)
      shape.cluster = 1 << (bits < kClusterBits ? bits : kClusterBits);
    // Tiles are half as large in some cuts. A cluster has places for a power of two.
    const int most = kEnough > heads ? kEnough / heads : 1;
    const int64_t split = int64_t{2} * tiles * splits;
    int shared = static_cast<int>(split < most ? split : most);
    if (shared < tiles) shared = tiles;
    if (shared < 1) shared = 1;
    shape.share = Divisor::of(parts_of(shared, shape.cluster) * shape.cluster);
    if (splits > shape.cluster) {
      shape.part_rows = rows < tile_rows ? rows : tile_rows;
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
  int rows, length;  // packed rows, slots; within the launch's bounds, whatever the segment says
  int64_t begin;     // the segment's first query row
  Cut cut;

  __device__ __forceinline__ Unit(const BlockAttentionArgs& args, const Shape& shape, int unit,
                                  bool on_tensor_cores)
      : args(args), shape(shape) {
    segment = static_cast<int>(shape.heads.quotient(static_cast<uint32_t>(unit)));
    head = unit - segment * static_cast<int>(shape.heads.size);
    if (args.table_width > 0) prefetch(args.pages + segment * args.table_width);
    begin = args.begin[segment];
    const int64_t queries = args.end[segment] - begin, slots = args.length[segment];
    rows = static_cast<int>(shape.group.size) *
           static_cast<int>(queries < shape.longest_query ? queries : shape.longest_query);
    length = static_cast<int>(slots < shape.longest_length ? slots : shape.longest_length);
    cut = Cut::of(on_tensor_cores, static_cast<int>(shape.heads.size), rows, length);
  }

  // Whether a tile's splits are merged by their CTAs.
  __device__ __forceinline__ bool clustered() const {
    return cut.splits > 1 && 1 << cut.bits <= shape.cluster;
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
    if (cut.splits == 0) return;
    if (clustered()) {  // a tile's CTAs are side by side
      tile = place >> cut.bits;
      split = place & ((1 << cut.bits) - 1);
    } else {  // those that read the same slots are
      split = static_cast<int>(static_cast<uint32_t>(place) / static_cast<uint32_t>(cut.tiles));
      tile = place - split * cut.tiles;
    }
    if (tile >= cut.tiles) return;
    if (split >= cut.splits) return;
    first = tile * cut.tile_rows;
    rows = Unit::rows - first < cut.tile_rows ? Unit::rows - first : cut.tile_rows;
    start = split * cut.split;
    end = start + cut.split < length ? start + cut.split : length;
  }

  // Elements before the key and the value of a slot.
  struct Place {
    int64_t key, value;
  };
  __device__ __forceinline__ Place place_of(int slot) const {
    const uint32_t page = shape.page.quotient(static_cast<uint32_t>(slot));
    const uint32_t inside = static_cast<uint32_t>(slot) - page * shape.page.size;
    const int64_t number = args.pages[segment * args.table_width + page];
    return {args.k_layout.offset(number, inside, head), args.v_layout.offset(number, inside, head)};
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
    if (args.length[s] <= 0 || shape.longest_length <= 0) continue;
    const int64_t begin = args.begin[s], most = begin + shape.longest_query;
    const int64_t end = args.end[s] < most ? args.end[s] : most;
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
  struct Sums {
    float value[kTensorRows][kPadded], top[kTensorRows], sum[kTensorRows];
    float merged_top[kTensorRows], merged_sum[kTensorRows];  // of the warps that share rows
  };
  union alignas(16) {
    struct {
      uint16_t query[kTensorRows * kDim];
      uint16_t step[2][2 * kStep * kDim];  // keys, values
    };
    Sums sums;  // when all steps are done
  };
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

  // Begins to copy the queries: zeros beyond the tile's rows up to `rows`, and beyond head_dim.
  static __device__ __forceinline__ void copy_queries(const Work& work, uint16_t* to, int rows) {
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const int dim = static_cast<int>(work.args.k_layout.head_dim);
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x / kLanes); r < rows; r += kAtOnce) {
      const uint16_t* from = static_cast<const uint16_t*>(work.args.q) +
                             work.query(work.first + (r < work.rows ? r : 0)) + lane * 8;
#pragma unroll
      for (int c = 0; c < kChunks; c += kLanes)
        copy_async(to + chunk(r, lane) + c * 8, from + c * 8,
                   r < work.rows && (lane + c) * 8 < dim);
    }
  }

  // Begins to copy the slots [slot, slot + kStep) of the split: zeros beyond its end, and beyond
  // head_dim.
  static __device__ __forceinline__ void copy(const Work& work, int slot, uint16_t* to) {
    const Shape& shape = work.shape;
    const int dim = static_cast<int>(work.args.k_layout.head_dim);
    const auto t = static_cast<unsigned>(anew(static_cast<int>(threadIdx.x)));
    const int lane = static_cast<int>(t % kLanes), row = static_cast<int>(t / kLanes);
    const int64_t* pages = work.args.pages + work.segment * work.args.table_width;
    const uint64_t head = static_cast<uint32_t>(anew(work.head));
    const char* keys =
        static_cast<const char*>(work.args.k_cache) + head * shape.keys.head + lane * 16;
    const char* values =
        static_cast<const char*>(work.args.v_cache) + head * shape.values.head + lane * 16;
    uint32_t page[kStep / kAtOnce], inside[kStep / kAtOnce];  // looked up together
#pragma unroll
    for (int i = 0; i < kStep / kAtOnce; ++i) {
      const int s = slot + row + i * kAtOnce;
      const auto at = static_cast<uint32_t>(s < work.end ? s : work.end - 1);
      const uint32_t number = shape.page.quotient(at);
      inside[i] = at - number * shape.page.size;
      page[i] = static_cast<uint32_t>(pages[number]);
    }
    to += chunk(row, lane);
#pragma unroll
    for (int i = 0; i < kStep / kAtOnce; ++i) {
      const auto from = [&](const char* base, const Strides& by) {
        return base + uint64_t{page[i]} * by.page + uint64_t{inside[i]} * by.slot;
      };
      const char *key = from(keys, shape.keys), *value = from(values, shape.values);
#pragma unroll
      for (int c = 0; c < kChunks; c += kLanes) {
        const bool there = slot + row + i * kAtOnce < work.end && (lane + c) * 8 < dim;
        uint16_t* at = to + i * kAtOnce * kDim + c * 8;
        copy_async(at, key + c * 16, there);
        copy_async(at + kTile, value + c * 16, there);
      }
    }
  }
};

// A warp's 32 rows and their softmax so far, over the slots that are the warp's.
template <class T, int kDim>
struct Rows {
  using S = Steps<T, kDim>;
  static constexpr int kDepth = kDim / 16, kTiles = 2;  // of 16 rows
  // A row's sums are made relative to a larger score only when it is larger by a factor of
  // 2^kSlack: weights stay below that, of which 16 bits make no more than of 1.
  static constexpr float kSlack = 8.0f;

  float out[kTiles][kDim / 8][4] = {};
  // Of rows g and g + 8 of each 16. top: in units of log 2. sum: of this lane.
  float top[kTiles][2], sum[kTiles][2] = {};

  __device__ __forceinline__ Rows() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) top[i / 2][i % 2] = -kInfinity;
  }

  // kKeys slots of a step, from `first` on: `left` of them are seen. factor: of scores, to units of
  // log 2.
  template <int kKeys>
  __device__ __forceinline__ void attend(const uint16_t* queries, const uint16_t* step, int first,
                                         int left, float factor) {
    if (left <= 0) return;
    const int lane = anew(static_cast<int>(threadIdx.x)) % 32, q = lane % 4;
    // Of the row that the lane names to ldmatrix. Its chunk c + 2k is then at `across(this, k)`.
    const int query = S::chunk(lane % 16, lane / 16);
    const int key = first * kDim + S::chunk(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const int value = S::kTile + first * kDim + S::chunk(lane % 16, lane / 16);
    float score[kTiles][kKeys / 8][4] = {};
#pragma unroll 2  // all of them at once want more registers than there are
    for (int k = 0; k < kDepth; ++k) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
        load_matrices(a[m], queries + S::across(query, k) + 16 * m * kDim);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];  // keys 16n ... 16n + 7 by dims 16k ... 16k + 15, then the next eight keys
        load_matrices(b, step + S::across(key, k) + 16 * n * kDim);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma<T>(score[m][2 * n], a[m], b[0], b[1]);
          mma<T>(score[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
    if (left < kKeys) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int m = 0; m < kTiles; ++m)
            if (8 * n + 2 * q + i % 2 >= left) score[m][n][i] = -kInfinity;
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float now = -kInfinity;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)  // ignores NaN
          now = fmaxf(now, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
        now = largest_of(now, 4) * factor;
        const float before = top[m][half];
        if (now > before + kSlack) top[m][half] = now;
        if (now > before + kSlack && before > -kInfinity) {
          const float kept = exp2_fast(before - now);
          sum[m][half] *= kept;
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d) {
            out[m][d][2 * half] *= kept;
            out[m][d][2 * half + 1] *= kept;
          }
        }
        const float base = top[m][half] == -kInfinity ? 0.0f : top[m][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            score[m][n][i] = exp2_fast(score[m][n][i] * factor - base);
            sum[m][half] += score[m][n][i];
          }
      }
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t a[kTiles][4];  // a lane's scores of C are, two keys to a register, its part of A
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] =
              pack<T>(score[m][2 * n + i / 2][i % 2 * 2], score[m][2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        uint32_t b[4];  // dims 16d ... 16d + 7 by keys 16n ... 16n + 15, then the next eight dims
        load_matrices_transposed(b, step + S::across(value, d) + 16 * n * kDim);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma<T>(out[m][2 * d], a[m], b[0], b[1]);
          mma<T>(out[m][2 * d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Two neighbouring elements of each of the warp's rows at a time: body(row, d, x, y), and before
  // them begin(row, top, sum), which yields what they are multiplied by.
  template <class Begin, class Body>
  __device__ __forceinline__ void each(Begin begin, Body body) const {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = 16 * m + 8 * half + g;
        const float by = begin(r, top[m][half], sum_of(sum[m][half], 4));
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
          body(r, 8 * n + 2 * q, out[m][n][2 * half] * by, out[m][n][2 * half + 1] * by);
      }
  }
};

__device__ __forceinline__ int warps_to_a_row(const Work& work) {
  return work.rows <= 32 ? 4 : work.rows <= 64 ? 2 : 1;
}

// From the sums of each warp's rows in shared memory to the output, or to scratch.
template <class T, int kDim>
__device__ __forceinline__ void finish(const Work& work, typename TensorShared<kDim>::Sums& sums,
                                       float* scratch) {
  constexpr int kColumns = kDim / 4;
  const int dim = static_cast<int>(work.args.k_layout.head_dim);
  const int elements = work.rows * kColumns, t = static_cast<int>(threadIdx.x);
  auto* out = static_cast<typename T::Storage*>(work.args.out);
  const auto load = [&](int row, int d, float (&value)[4]) {
    widen<Float32>(*reinterpret_cast<const uint4*>(&sums.value[row][d]), value);
  };
  float *tops = sums.top, *totals = sums.sum;
  const int sharing = warps_to_a_row(work);
  __syncthreads();
  if (sharing > 1) {  // into the first warp's
    const int stride = kTensorRows / sharing;
    tops = sums.merged_top;
    totals = sums.merged_sum;
#pragma unroll 4
    for (int i = t; i < elements; i += kThreads) {
      const int r = i / kColumns, d = i % kColumns * 4;
      const Merged<4, kWarps> merged(sharing, 1.0f,
                                     [&](int p, float (&value)[4], float& top, float& sum) {
                                       load(p * stride + r, d, value);
                                       top = sums.top[p * stride + r];
                                       sum = sums.sum[p * stride + r];
                                     });
      store_stored<Float32>(&sums.value[r][d], merged.value, true);
      if (d > 0) continue;
      tops[r] = merged.top;
      totals[r] = merged.sum;
    }
    __syncthreads();
  }
  if (work.clustered()) {  // each CTA takes its share of the elements
    cluster_barrier();
    const unsigned first = blockIdx.x % work.shape.cluster - work.split;
#pragma unroll 1
    for (int i = work.split * kThreads + t; i < elements; i += work.cut.splits * kThreads) {
      const int r = i / kColumns, d = i % kColumns * 4;
      if (d >= dim) continue;
      const Merged<4, 1 << kClusterBits> merged(
          work.cut.splits, 1.0f, [&](int p, float (&value)[4], float& top, float& sum) {
            const auto* at = reinterpret_cast<const uint4*>(&sums.value[r][d]);
            widen<Float32>(load_of_peer(at, first + p), value);
            top = load_of_peer(tops + r, first + p);
            sum = load_of_peer(totals + r, first + p);
          });
      store<T>(out + work.output(work.first + r) + d, merged.value, merged.sum);
    }
    leave_cluster();  // nobody leaves while others read
    return;
  }
  const Part part(work, scratch, work.place);
#pragma unroll 1
  for (int i = t; i < elements; i += kThreads) {
    const int r = i / kColumns, d = i % kColumns * 4;
    float value[4];
    load(r, d, value);
    if (d >= dim) continue;
    if (work.cut.splits == 1) {
      store<T>(out + work.output(work.first + r) + d, value, totals[r]);
      continue;
    }
    store_stored<Float32>(part.values + r * dim + d, value, true);
    if (d > 0) continue;
    part.tops[r] = tops[r];
    part.sums[r] = totals[r];
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    block_attention_tensor_kernel(BlockAttentionArgs args, Shape shape, float* scratch) {
  using S = Steps<T, kDim>;
  DPARALLEL_LARGE_SHARED(shared, TensorShared<kDim>);
  const int64_t beyond = blockIdx.x - shape.units * shape.share.size;
  if (beyond >= 0) return write_blanks<typename T::Storage>(args, shape, static_cast<int>(beyond));
  const Work work(args, shape, static_cast<int>(blockIdx.x), true);
  if (work.rows == 0) return;
  const int sharing = warps_to_a_row(work);
#pragma unroll 1
  for (int slot = work.start; slot < work.start + 2 * kStep && slot < work.end; slot += kStep)
    S::copy(work, slot, shared.step[(slot - work.start) / kStep]);
  S::copy_queries(work, shared.query, kTensorRows / sharing);
  Rows<T, kDim> rows;
  for (int slot = work.start; slot < work.end; slot += kStep) {
    wait_for_copies();
    __syncthreads();  // everyone's copies are there, and everyone is done with the step before
    const int next = slot + kStep;
    if (slot > work.start && next < work.end)
      S::copy(work, next, shared.step[(next - work.start) / kStep % 2]);
    const int warp = anew(static_cast<int>(threadIdx.x)) / 32;
    const int row = warp % (kWarps / sharing) * 32, part = warp / (kWarps / sharing);
    if (row >= work.rows) continue;  // the whole warp
    const uint16_t* queries = shared.query + row * kDim;
    const uint16_t* now = shared.step[(slot - work.start) / kStep % 2];
    const float factor = args.scale * kLog2e;
    const int left = work.end - slot;
    if (sharing == 1) rows.template attend<64>(queries, now, 0, left, factor);
    else if (sharing == 2)
      rows.template attend<32>(queries, now, 32 * part, left - 32 * part, factor);
    else rows.template attend<16>(queries, now, 16 * part, left - 16 * part, factor);
  }
  // As `work`, whose numbers need not stay in registers for it.
  const Work done(args, shape, anew(static_cast<int>(blockIdx.x)), true);
  __syncthreads();  // everyone is done with the steps
  auto& sums = shared.sums;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  rows.each(
      [&](int r, float top, float sum) {
        if (threadIdx.x % 4 == 0) {
          sums.top[32 * warp + r] = top;
          sums.sum[32 * warp + r] = sum;
        }
        return 1.0f;
      },
      [&](int r, int d, float x, float y) {
        sums.value[32 * warp + r][d] = x;
        sums.value[32 * warp + r][d + 1] = y;
      });
  finish<T, kDim>(done, sums, scratch);
}

// ---- FMA ----

constexpr int kOwned = 2;                  // elements of every row's sum that a thread gathers
constexpr int kSlice = kOwned * kThreads;  // a longer head is taken in slices

struct PlainShared {
  float query[kPlainRows][kThreads];   // some dims of the scaled queries
  float weight[kPlainRows][kThreads];  // scores, then their exponentials
  float kept[kPlainRows], sum[kPlainRows];
};

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    block_attention_plain_kernel(BlockAttentionArgs args, Shape shape, float* scratch) {
  using Storage = typename T::Storage;
  DPARALLEL_SHARED(step, PlainShared);
  const int64_t beyond = blockIdx.x - shape.units * shape.share.size;
  if (beyond >= 0) return write_blanks<Storage>(args, shape, static_cast<int>(beyond));
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
      const Storage* key = static_cast<const Storage*>(args.k_cache) +
                           work.place_of(t < left ? slot + t : work.start).key;
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
        const Storage* value =
            static_cast<const Storage*>(args.v_cache) + work.place_of(slot + j).value;
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
              T::narrow(out[r][i] / step.sum[r]);
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
          const Part part(unit, const_cast<float*>(scratch), s * unit.cut.tiles + tile);
          const float* from = part.values + r * dim + d;
          if constexpr (W == 4) widen<Float32>(*reinterpret_cast<const uint4*>(from), value);
          else value[0] = *from;
          top = part.tops[r];
          sum = part.sums[r];
        });
    store<T>(static_cast<typename T::Storage*>(unit.args.out) + unit.output(row) + d, merged.value,
             merged.sum);
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
         args.scale > 0.0f && args.scale < kInfinity && Strides::fit(k) && Strides::fit(v) &&
         multiples_of_16({args.q, args.k_cache, args.v_cache, args.out},
                         {args.q_stride, k.page_stride, k.head_stride, k.slot_stride, v.page_stride,
                          v.head_stride, v.slot_stride},
                         element_size(args.dtype));
}

Shape shape_of(const BlockAttentionArgs& args) {
  const bool clusters = has_clusters(block_attention_tensor_kernel<BFloat16, kTensorDim>);
  return Shape::of(args, on_tensor_cores(args), clusters);
}

}  // namespace

int64_t block_attention_scratch(const BlockAttentionArgs& args) {
  const Shape shape = shape_of(args);
  return shape.part(shape.units, 0) * static_cast<int64_t>(sizeof(float));
}

int block_attention(const BlockAttentionArgs& args, const Workspace& workspace, void* stream) {
  const Shape shape = shape_of(args);
  const int64_t blanks = parts_of(static_cast<int>(args.count), kBlankBlock);
  const auto grid =
      static_cast<unsigned>((shape.units * shape.share.size + blanks + shape.cluster - 1) /
                            shape.cluster * shape.cluster);
  if (grid == 0) return 0;
  auto* scratch = static_cast<float*>(workspace.scratch);
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto attend = [&](auto kernel, size_t shared_bytes) {
      return DPARALLEL_LAUNCH_CLUSTERS(kernel, grid, static_cast<unsigned>(shape.cluster), kThreads,
                                       shared_bytes, stream, args, shape, scratch);
    };
    int code = 0;
    if constexpr (sizeof(typename T::Storage) == 2) {
      if (!shape.on_tensor_cores) code = attend(block_attention_plain_kernel<T>, 0);
      else if (args.k_layout.head_dim <= 64)
        code = attend(block_attention_tensor_kernel<T, 64>, sizeof(TensorShared<64>));
      else
        code =
            attend(block_attention_tensor_kernel<T, kTensorDim>, sizeof(TensorShared<kTensorDim>));
    } else {
      code = attend(block_attention_plain_kernel<T>, 0);
    }
    if (code != 0 || shape.part_rows == 0) return code;
    // Only so many rows of a key head are ever split.
    const int longest = shape.longest_query * static_cast<int>(shape.group.size);
    const int most = kEnough / static_cast<int>(shape.heads.size) *
                     (shape.on_tensor_cores ? kTensorRows : kPlainRows);
    const int rows = longest < most ? longest : most;
    const int blocks = parts_of(rows, kMergeRows);
    if (shape.units * blocks == 0) return 0;
    DPARALLEL_LAUNCH(block_attention_merge_kernel<T>, static_cast<unsigned>(shape.units * blocks),
                     kThreads, stream, args, shape, scratch, blocks);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
