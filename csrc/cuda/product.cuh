// The product of a few rows of x and a matrix of weights: linear and fp8_linear, and linear_swiglu
// and linear_kv_write, which end in more. Reading the weights bounds it.
//
// Bytes: the weights once; x once for each tile, from the L2 cache; the output once.
//
// Tensor cores (16-bit rows, aligned, of a multiple of 64 numbers). A CTA has an SM to itself, and
// takes a tile of 64, 128 or 192 rows of the weights and up to 64 rows of x. In a step it takes a
// line of the L2 cache, 128 bytes, of each row of the tile (two lines, where the tile has 64 rows)
// and the numbers of x that belong to it. Both are copied past the registers into a ring that fills
// the SM's shared memory: some 200 KB, most of them in flight. Two teams of four warps, each with a
// ring, take every other line: while one team waits at its barrier the other multiplies. A warp has
// 16 of each 64 rows, as the left operand of its multiplications.
//
// Clusters. Up to eight CTAs share a tile and divide its lines, so that all SMs have work. Then
// they add up their sums out of one another's shared memory, each CTA a part of the outputs, in the
// order of the CTAs. The shape of the weights and the device decide the cut and the order of a
// row's sum, so a row of x has the same result, to the bit, as alone. More than 64 rows of x are
// chunks, next to each other in the grid, so that all but the first find the weights in the L2
// cache. Devices with less shared memory, or without clusters, take tiles of 128 rows, each by one
// CTA, and 32 rows of x at a time.
//
// Ends. An object of a class like Rounded says what becomes of the sums. Where pairs of the
// weights' rows, (i, i + half), belong together (a gate and its up, the two numbers that a rotary
// embedding turns), a tile takes the rows in an order in which four neighbours are two pairs, so
// that a thread has all of what it needs; what it copies has the same bytes in other places. Where
// the norm of a whole head comes first, a tile is the head's 128 rows, and a thread has outputs of
// both halves of it.
//
// Early launches. Where the weights are constant, CTAs begin while earlier kernels still run, as
// soon as the last product leaves the SM, and fill their rings, 26 MB over all SMs. So memory is
// busy while norms, attention and activations run.
//
// Limits, as measured on an H200. Memory brings an SM some 32 bytes a nanosecond. The
// multiplications of a line by 32 rows, with weights in 8 bits, take the tensor cores half of that
// time, and the copies and reads of shared memory as much. docs/design.md says what was no faster.
#pragma once

#include "cluster.cuh"
#include "dparallel/launch.h"
#include "product_weights.cuh"

namespace dparallel::cuda {

constexpr int kTeams = 2, kTeamThreads = 128, kProductThreads = kTeams * kTeamThreads;
// Bytes of shared memory: an SM's, less the share of small kernels, and that of a device with less.
constexpr int kWhole = 224 * 1024, kSmall = 99 * 1024;
constexpr int kMostHeight = 3;  // of a tile, in 64 rows

// kTiles: of 8 rows of x. kHeight: of 64 rows of the weights.
template <class W, int kTiles, int kHeight, int kBytes>
struct Ring {
  static constexpr int kRows = 64 * kHeight;
  // Of a step of a team, which is 16 KB of weights or more.
  static constexpr int kLines = kBytes == kWhole && kHeight == 1 ? 2 : 1;
  static constexpr int kNumbers = kPieces * W::kNumbers;  // of a line
  static constexpr int kXPieces = kNumbers / 8;           // of a row of x, a line
  static constexpr int kLine = kRows * kPieces, kXLine = 8 * kTiles * kXPieces;  // vectors
  static constexpr int kStage = kLines * (kLine + kXLine);
  static constexpr int kStages = kBytes / 16 / kTeams / kStage;
  static constexpr int kPitch = kRows + 4;  // so that lanes' writes of sums do not collide
  static_assert(kStages > 1 && kTeams * 8 * kTiles * kPitch * 4 <= kBytes, "");

  union {
    uint4 stages[kTeams][kStages][kStage];   // a step's weights [kLines, kRows], and then its x
    float sums[kTeams][8 * kTiles][kPitch];  // when all steps are done
  };
};

// Of the weights: tiles of 64 `height` rows, each of `cluster` CTAs.
struct ProductCut {
  int height, cluster;
};

// Whether the device that this is compiled for has kBytes of shared memory.
template <int kBytes>
__device__ constexpr bool has_room() {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
  return kBytes <= kSmall;
#else
  return true;
#endif
}

// The row of the weights that is row `at` of the tiles, of groups of 2 half rows, half a multiple
// of 32: of each 64 rows of a tile 32 are of the first half of a group, and 32 of the second.
struct Pairs {
  int32_t half;

  __device__ __forceinline__ int64_t row(int64_t at) const {
    const auto slab = static_cast<uint32_t>(at / 64), slabs = static_cast<uint32_t>(half) / 32;
    const uint32_t group = slab / slabs;
    const int in = static_cast<int>(at % 64);
    return static_cast<int64_t>(group) * 2 * half + in / 2 % 2 * half +
           (slab - group * slabs) * 32 + in / 4 * 2 + in % 2;
  }
  // Whether the 64 rows of tiles before row `at`, a multiple of 64, are the last of a group.
  __device__ __forceinline__ bool ends(int64_t at) const {
    return static_cast<uint32_t>(at / 64) % (static_cast<uint32_t>(half) / 32) == 0;
  }
};

// The end of linear and fp8_linear: out = round(scale * sum + bias).
struct Rounded {
  static constexpr bool kPaired = false;
  static constexpr int kSlabs = 1;  // of 64 rows of the weights, whose sums a thread needs together
  struct Ahead {};                  // what is read before the sums are

  // By all threads, once: what rows [first_n, first_n + count) of x need, into shared memory.
  __device__ __forceinline__ void keep(int64_t, int) const {}
  __device__ __forceinline__ Ahead ahead(int, int64_t) const { return {}; }
  // Of row first_n + n of x, the `left` rows of the weights from `row` on, four at most.
  template <class T>
  __device__ __forceinline__ void put(const LinearArgs& args, int64_t first_n, int n, int64_t row,
                                      int left, const float (&sum)[4], Ahead) const {
    using Storage = typename T::Storage;
    Storage* to = static_cast<Storage*>(args.out) + (first_n + n) * args.out_width + row;
    const uint32_t both[2] = {T::narrow(sum[0], sum[1]), T::narrow(sum[2], sum[3])};
    if (args.out_width % 4 == 0) {
      *reinterpret_cast<uint2*>(to) = {both[0], both[1]};
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < left) to[j] = static_cast<Storage>(both[j / 2] >> 16 * (j % 2));
    }
  }
};

template <class T, class W, int kTiles, int kHeight, int kBytes, class End>
__device__ __forceinline__ void product_tile(const LinearArgs& args, const End& at_end, int cluster,
                                             int chunks) {
  using Storage = typename T::Storage;
  using Shared = Ring<W, kTiles, kHeight, kBytes>;
  constexpr int kRows = Shared::kRows, kLines = Shared::kLines, kNumbers = Shared::kNumbers;
  constexpr int kStages = Shared::kStages, kXPieces = Shared::kXPieces, kAhead = kStages - 1;
  DPARALLEL_LARGE_SHARED(ring, Shared);
  let_next_begin();
  const int rank = static_cast<int>(blockIdx.x) % cluster;
  const int unit = static_cast<int>(blockIdx.x) / cluster;
  const int64_t first = static_cast<int64_t>(unit / chunks) * kRows;
  const int64_t first_n = static_cast<int64_t>(unit % chunks) * (8 * kTiles);
  const int left =
      static_cast<int>(args.out_width - first < kRows ? args.out_width - first : kRows);
  const int count =
      static_cast<int>(args.count - first_n < 8 * kTiles ? args.count - first_n : 8 * kTiles);
  // Each team takes every other line of this CTA's. `in`: the length of the inner dimension from
  // the team's first line on.
  const int team = threadIdx.x / kTeamThreads, t = threadIdx.x % kTeamThreads;
  const int all = (static_cast<int>(args.in) + kNumbers - 1) / kNumbers;
  const int begin = all * rank / cluster + team, end = all * (rank + 1) / cluster;
  const int in = static_cast<int>(args.in) - begin * kNumbers;
  const int lines = (end - begin + kTeams - 1) / kTeams, steps = (lines + kLines - 1) / kLines;

  // This thread copies of a line one piece of every 16th row of the weights, and of every 16th, or
  // 8th, of x; zeros beyond their ends.
  constexpr int kTurn = kTeamThreads / kPieces, kXTurn = kTeamThreads / kXPieces;
  const int own = t / kPieces, own_n = t / kXPieces, piece = t % kPieces, x_piece = t % kXPieces;
  const int64_t row_bytes = args.in * 16 / W::kNumbers;
  const auto row_at = [&](int at) {  // of the weights, of a row of the tile
    if constexpr (End::kPaired) return at_end.pairs.row(first + at);
    else return first + at;
  };
  int64_t turn_bytes = kTurn * row_bytes;
  int64_t skipped[kHeight] = {};  // after each 64 rows, where they are the last of a group
  if constexpr (End::kPaired) {
    turn_bytes /= 2;
#pragma unroll
    for (int h = 0; h < kHeight; ++h)
      if (at_end.pairs.ends(first + 64 * (h + 1))) skipped[h] = at_end.pairs.half * row_bytes;
  }
  const auto* weight = static_cast<const char*>(args.weight) + row_at(own) * row_bytes +
                       static_cast<int64_t>(begin) * (16 * kPieces) + 16 * piece;
  const auto* x = static_cast<const Storage*>(args.x) + (first_n + own_n) * args.x_stride +
                  static_cast<int64_t>(begin) * kNumbers + 8 * x_piece;
  uint4* const to_weights = ring.stages[team][0] + own * kPieces + (piece ^ turned(own));
  uint4* const to_x = ring.stages[team][0] + kLines * Shared::kLine + W::place(own_n, x_piece);
  const auto bring_weights = [&](int step, int stage) {
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      const int line = step * kLines + l;
      uint4* to = anew(to_weights) + stage * Shared::kStage + l * Shared::kLine;
      const bool there = line < lines && line * (kTeams * kNumbers) + W::kNumbers * piece < in;
      const char* from = weight + line * (kTeams * 16 * kPieces);
#pragma unroll
      for (int row = 0; row < kRows; row += kTurn) {
        if (row + own < left) copy_async(to + row * kPieces, from, there);
        from += turn_bytes;
        if (row % 64 == 64 - kTurn) from += skipped[row / 64];
      }
    }
  };
  // Of row n kXTurn + own_n of x in a line: put(l, n, from, there), a piece of 16 bytes.
  constexpr int kXPut = 8 * kTiles / kXTurn;
  const auto bring_x = [&](int step, auto put) {
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      const int line = step * kLines + l;
      const bool there = line < lines && line * (kTeams * kNumbers) + 8 * x_piece < in;
      const Storage* from = x + line * (kTeams * kNumbers);
#pragma unroll
      for (int n = 0; n < kXPut; ++n) {
        if (n * kXTurn + own_n < count) put(l, n, from, there);
        from += kXTurn * args.x_stride;
      }
    }
  };
  const auto place_of_x = [&](int stage, int l, int n) {
    return to_x + stage * Shared::kStage + l * Shared::kXLine + n * kXTurn * kXPieces;
  };

  // Earlier kernels may still be writing x, but not the weights, with which the ring fills
  // meanwhile. The x of these steps comes by way of registers: copies of it would complete behind
  // the weights'.
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) {
    if (stage < steps) bring_weights(stage, stage);
    commit_copies();
  }
  wait_for_earlier();
  at_end.keep(first_n, count);
  uint4 first_x[kAhead][kLines][kXPut];
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage)
    if (stage < steps)
      bring_x(stage, [&](int l, int n, const Storage* from, bool there) {
        first_x[stage][l][n] = there ? __ldcg(reinterpret_cast<const uint4*>(from)) : uint4{};
      });
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage)
    if (stage < steps)
      bring_x(stage, [&](int l, int n, const Storage*, bool) {
        *place_of_x(stage, l, n) = first_x[stage][l][n];
      });

  // A warp takes rows 16 (warp % 4) and on of each 64.
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, row = t / 32 * 16;
  float sums[kHeight][kTiles][4] = {};
#pragma unroll 1
  for (int step = 0, stage = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    team_barrier();  // the step is there, and no warp reads the one before it any more
    if (const int next = step + kAhead; next < steps) {
      const int emptied = stage > 0 ? stage - 1 : kAhead;
      bring_weights(next, emptied);
      bring_x(next, [&](int l, int n, const Storage* from, bool there) {
        copy_async(place_of_x(emptied, l, n), from, there);
      });
    }
    commit_copies();
    const uint4* rows = ring.stages[team][stage] + row * kPieces;
    const uint4* x_rows = ring.stages[team][stage] + kLines * Shared::kLine;
#pragma unroll
    for (int half = 0; half < 2 * kLines; ++half) {
      uint32_t b[W::kMultiplications][kTiles][2];
      W::load_x(b, x_rows + half / 2 * Shared::kXLine, half % 2);
#pragma unroll
      for (int h = 0; h < kHeight; ++h) {
        uint32_t a[W::kMultiplications][4];
        W::load(a, rows + half / 2 * Shared::kLine + 64 * h * kPieces, half % 2);
#pragma unroll
        for (int m = 0; m < W::kMultiplications; ++m)
#pragma unroll
          for (int n = 0; n < kTiles; ++n) mma<T>(sums[h][n], a[m], b[m][n][0], b[m][n][1]);
      }
    }
    stage = stage < kAhead ? stage + 1 : 0;
  }

  // sums[h][n][i]: of row 64 h + row + g, or 8 on for i >= 2; of x's row 8 n + 2 q + i % 2.
  __syncthreads();  // no warp reads the ring any more
#pragma unroll
  for (int h = 0; h < kHeight; ++h)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        ring.sums[team][8 * n + 2 * q + i % 2][64 * h + row + g + i / 2 * 8] = sums[h][n][i];
  if (cluster > 1) cluster_barrier();
  else __syncthreads();

  // 16 rows of x by kSlabs times 64 of the weights are a unit, of which each thread has four
  // outputs in each slab; a CTA has every `cluster`th, and takes kBatch slabs at once.
  constexpr int kSlabs = End::kSlabs, kBatch = kSlabs == 1 ? 3 : kSlabs, kAcross = kTiles / 2;
  constexpr int kUnits = kHeight / kSlabs * kAcross;
  static_assert(kHeight % kSlabs == 0 && kBatch % kSlabs == 0, "");
  struct Outputs {
    int n, at;  // the row of x, and of the tile
    bool exist;
  };
  const auto outputs_of = [&](int u, int k) -> Outputs {
    const int v = u + k / kSlabs * cluster;
    const int n = v % kAcross * 16 + static_cast<int>(threadIdx.x) / 16;
    const int slab = v / kAcross * kSlabs + k % kSlabs;
    const int at = slab * 64 + static_cast<int>(threadIdx.x) % 16 * 4;
    return {n, at, v < kUnits && n < count && at < left};
  };
  const auto* bias = static_cast<const Storage*>(args.bias);
  int64_t beside = 0;  // from a row to the other of its pair
  if constexpr (End::kPaired) beside = at_end.pairs.half;
#pragma unroll 1
  for (int u = rank; u < kUnits; u += kBatch / kSlabs * cluster) {
    float sum[kBatch][4] = {};
    int64_t row[kBatch];  // of the weights
    typename End::Ahead ahead[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const Outputs own = outputs_of(u, k);
      row[k] = row_at(own.at);
      if (own.exist) ahead[k] = at_end.ahead(own.n, row[k]);
    }
#pragma unroll 1
    for (int r = 0; r < cluster; ++r) {
      uint4 parts[kBatch][kTeams] = {};
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (u + k / kSlabs * cluster >= kUnits) break;
        const Outputs own = outputs_of(u, k);
#pragma unroll
        for (int i = 0; i < kTeams; ++i) {
          const auto* part = reinterpret_cast<const uint4*>(&ring.sums[i][own.n][own.at]);
          parts[k][i] = cluster == 1 ? *part : load_of_peer(part, r);
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
#pragma unroll
        for (int i = 0; i < kTeams; ++i) {
          float more[4];
          memcpy(more, &parts[k][i], sizeof more);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[k][j] += more[j];
        }
    }
    const auto put = [&](const Outputs& own, int k) {
      at_end.template put<T>(args, first_n, own.n, row[k], left - own.at, sum[k], ahead[k]);
    };
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const Outputs own = outputs_of(u, k);
      if (!own.exist) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (own.at + j < left) {
          const int64_t o = row[k] + (End::kPaired ? j % 2 + j / 2 * beside : j);
          const float added = bias != nullptr ? T::value(bias[o]) : 0.0f;
          sum[k][j] = fmaf(args.scale != nullptr ? args.scale[o] : 1.0f, sum[k][j], added);
        }
      if constexpr (kSlabs == 1) put(own, k);
    }
    if constexpr (kSlabs > 1) {
      at_end.template norm<T>(row[0], sum);
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (const Outputs own = outputs_of(u, k); own.exist) put(own, k);
    }
  }
  if (cluster > 1) leave_cluster();
}

template <class T, class W, int kTiles, int kHeight, int kBytes, class End>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_kernel(LinearArgs args, End at_end, int cluster, int chunks) {
  if constexpr (has_room<kBytes>())
    product_tile<T, W, kTiles, kHeight, kBytes>(args, at_end, cluster, chunks);
}

// A warp takes a row of the weights, by FMA.
template <class T, class W>
__global__ void __launch_bounds__(kProductThreads) product_plain_kernel(LinearArgs args) {
  using Storage = typename T::Storage;
  constexpr int kGroup = 8;  // rows of x between two readings of the weights
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kProductThreads / 32) + threadIdx.x / 32;
  if (row >= args.out_width) return;
  const auto* weight = static_cast<const typename W::Weight*>(args.weight) + row * args.in;
  const float by = args.scale != nullptr ? args.scale[row] : 1.0f;
  float bias = 0.0f;
  if (args.bias != nullptr) bias = T::value(static_cast<const Storage*>(args.bias)[row]);
  for (int64_t n = 0; n < args.count; n += kGroup) {
    float sums[kGroup] = {};
    for (int64_t k = lane; k < args.in; k += 32) {
      const float w = W::value(weight[k]);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (n + j < args.count)
          sums[j] += w * T::value(static_cast<const Storage*>(args.x)[(n + j) * args.x_stride + k]);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
#pragma unroll
      for (int bits = 16; bits > 0; bits /= 2) sums[j] += __shfl_xor_sync(kFullWarp, sums[j], bits);
      if (lane == 0 && n + j < args.count)
        static_cast<Storage*>(args.out)[(n + j) * args.out_width + row] =
            T::narrow(fmaf(by, sums[j], bias));
    }
  }
}

// The cut by which a product takes least. The cost of a cut, in bytes: the bytes of a CTA in all
// rounds, or an SM's share of all bytes, whichever takes longer, and a constant for each round.
// Measured on an H200: memory brings an SM five sevenths of the bytes that a CTA can take, and a
// CTA takes a quarter more of weights in 16 bits than in 8; a round costs as much as 45 KB, and
// twice that where clusters add up.
template <class W, class End>
ProductCut cut_of(const LinearArgs& args) {
  constexpr int64_t kRound = 45000;
  constexpr int kHighest = kMostHeight / End::kSlabs * End::kSlabs;
  constexpr auto slots_of =
      &clusters_at_once<product_kernel<BFloat16, W, 4, kHighest, kWhole, End>>;
  constexpr size_t kBytes = sizeof(Ring<W, 4, kHighest, kWhole>);
  const int64_t row_bytes = args.in * 16 / W::kNumbers;
  const int64_t share = args.out_width * row_bytes / slots_of(1, kProductThreads, kBytes) * 7 / 5;
  ProductCut best{0, 1};
  int64_t least = INT64_MAX;
  for (const int cluster : {1, 2, 3, 4, 6, 8}) {
    const int slots = slots_of(static_cast<unsigned>(cluster), kProductThreads, kBytes);
    if (cluster == 2 && slots == 0) return {0, 1};  // nor kWhole bytes of shared memory
    for (int height = End::kSlabs; height <= kHighest && slots > 0; height += End::kSlabs) {
      const int64_t tiles = (args.out_width + 64 * height - 1) / (64 * height);
      const int64_t rounds = (tiles + slots - 1) / slots;
      const int64_t own =
          rounds * 64 * height * row_bytes / cluster * (W::kNumbers == 16 ? 5 : 4) / 4;
      const int64_t cost = (own > share ? own : share) + rounds * (cluster > 1 ? 2 : 1) * kRound;
      if (cost < least) {
        least = cost;
        best = {height, cluster};
      }
    }
  }
  return best;
}

template <class T, class W, int kTiles, int kHeight, int kBytes, class End>
int launch_product(const LinearArgs& args, const End& at_end, int cluster, void* stream) {
  const int64_t tiles = (args.out_width + 64 * kHeight - 1) / (64 * kHeight);
  const int64_t chunks = (args.count + 8 * kTiles - 1) / (8 * kTiles);
  constexpr auto kernel = product_kernel<T, W, kTiles, kHeight, kBytes, End>;
  constexpr auto shared = LargeShared::of(sizeof(Ring<W, kTiles, kHeight, kBytes>));
  const bool early = args.constant && has_clusters_here<kernel>();
  return DPARALLEL_LAUNCH_CLUSTERS(kernel, tiles * chunks * cluster, static_cast<unsigned>(cluster),
                                   kProductThreads, shared, early, stream, args, at_end, cluster,
                                   static_cast<int>(chunks));
}

template <class T, class W, int kTiles = 4, class End>
int launch_product(const LinearArgs& args, const End& at_end, ProductCut cut, void* stream) {
  if constexpr (kTiles == 4)
    if (args.count > 32) return launch_product<T, W, 8>(args, at_end, cut, stream);
  if constexpr (End::kSlabs == 1) {
    if (cut.height == 1)
      return launch_product<T, W, kTiles, 1, kWhole>(args, at_end, cut.cluster, stream);
    if (cut.height == 3)
      return launch_product<T, W, kTiles, 3, kWhole>(args, at_end, cut.cluster, stream);
  }
  return launch_product<T, W, kTiles, 2, kWhole>(args, at_end, cut.cluster, stream);
}

inline bool on_tensor_cores(const LinearArgs& args) {
  return args.dtype != DType::float32 && args.in > 0 && args.in % 64 == 0 &&
         multiples_of_16({args.x, args.weight, args.out}, {args.x_stride},
                         element_size(args.dtype));
}

template <template <class> class Weights>
int product(const LinearArgs& args, void* stream) {
  if (args.count == 0 || args.out_width == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using W = Weights<T>;
    if constexpr (sizeof(typename T::Storage) == 2)
      if (on_tensor_cores(args)) {
        const ProductCut cut = cut_of<Weights<BFloat16>, Rounded>(args);
        if (cut.height == 0) return launch_product<T, W, 4, 2, kSmall>(args, Rounded{}, 1, stream);
        return launch_product<T, W>(args, Rounded{}, cut, stream);
      }
    constexpr int kWarps = kProductThreads / 32;
    const int64_t grid = (args.out_width + kWarps - 1) / kWarps;
    DPARALLEL_LAUNCH((product_plain_kernel<T, W>), grid, kProductThreads, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

// The cut of a product whose rows are pairs, `half` apart; height 0: no kernel takes it. Kernels
// that end in more take bfloat16 alone, and a device's whole shared memory.
template <class End>
ProductCut cut_of_pairs(const LinearArgs& args, int64_t half) {
  if (args.dtype != DType::bfloat16 || half % 32 != 0 || half == 0 || args.count == 0 ||
      args.out_width % 64 != 0 || !on_tensor_cores(args))
    return {0, 1};
  return args.scale != nullptr ? cut_of<EightBits<BFloat16>, End>(args)
                               : cut_of<SixteenBits<BFloat16>, End>(args);
}

template <class End>
int product_of_pairs(const LinearArgs& args, const End& at_end, ProductCut cut, void* stream) {
  return args.scale != nullptr
             ? launch_product<BFloat16, EightBits<BFloat16>>(args, at_end, cut, stream)
             : launch_product<BFloat16, SixteenBits<BFloat16>>(args, at_end, cut, stream);
}

}  // namespace dparallel::cuda
