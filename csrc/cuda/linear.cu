// linear: a product of few rows, whose time is that of reading the weights once.
//
// 64 rows of x take 64 multiplications a weight, a quarter of what tensor cores do while a weight
// comes from memory: only bytes count. The weights are cut into as many tiles of rows as run at
// once, one to an SM, so that all SMs read all the time and stop together, without a second round.
// A step of a tile is 64 numbers of each of its rows and of the rows of x, copied past the
// registers into a ring that fills the SM's shared memory: 140 to 190 KB are on their way to an SM
// at any time, where 40 would hide the latency of memory at its full rate.
//
// A tile has 128 to 320 rows, because it also reads all of x, from the L2 cache, whose rate is not
// much above that of memory: 32 rows of x add 10 to 25 % of the weights' bytes, 64 the double.
// Where there are too few rows of weights for that, two or four CTAs, a cluster, share a tile and
// divide its inner dimension, so that each reads its part of x alone. They then add up their sums,
// each some of the outputs, out of one another's shared memory, in the order of their parts. The
// cut is of the weights' shape and the device: a row of x comes out to the bit as it does alone.
//
// A warp takes a quarter of the tile's rows and half of each step, the weights being the left
// operand of the multiplications: with half of each step, what it reads of x serves more rows.
// Tile heights, depth of the ring and the choice of clusters are guesses: not yet measured.
#include "cluster.cuh"
#include "dparallel/launch.h"
#include "mma.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kDepth = LinearArgs::kDepth;  // of the inner dimension, a step
constexpr int kPieces = kDepth / 8;         // of 16 bytes
constexpr int kRowWarps = 4, kDepthWarps = 2;
constexpr int kThreads = 32 * kRowWarps * kDepthWarps;
constexpr int kRowsATurn = kThreads / kPieces;  // of a step, copied by all threads
constexpr int kMostStages = 8;
constexpr int kSharedBytes = 227 * 1024;  // of a CTA on sm_90 and sm_100
constexpr int kMostClustered = 4;
constexpr int64_t kFewestRows = 96;  // of the weights in a tile, lest x weigh more than a third

// kTiles: of 8 rows of x. kHeight: tiles of 16 rows of the weights, of a warp.
template <int kTiles, int kHeight>
struct Ring {
  static constexpr int kRows = 16 * kHeight * kRowWarps;
  static constexpr int kStage = (kRows + 8 * kTiles) * kPieces;  // vectors of 16 bytes
  static constexpr int kFitting = kSharedBytes / 16 / kStage;
  static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
  // The sums [8 kTiles, kRows] lie there afterwards; with these gaps lanes' writes do not collide.
  static constexpr int kPitch = kRows + 4;
  static_assert(8 * kTiles * kPitch * 4 <= kStages * kStage * 16, "");

  uint4 vectors[kStages * kStage];
};

// Of the weights: `tiles` of rows, each of `cluster` CTAs.
struct LinearCut {
  int height, cluster;
  unsigned tiles;
};

// A row of a stage is 128 bytes: its pieces change places with the row, so that neither those of 8
// rows that a warp reads at a time nor those that it writes lie in the same banks.
__device__ __forceinline__ int place(int row, int piece) {
  return row * kPieces + (piece ^ row % 8);
}

template <class T, int kTiles, int kHeight>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(LinearArgs args, int cluster) {
  using Storage = typename T::Storage;
  using Shared = Ring<kTiles, kHeight>;
  constexpr int kRows = Shared::kRows, kStage = Shared::kStage, kStages = Shared::kStages;
  DPARALLEL_LARGE_SHARED(ring, Shared);
  const int rank = static_cast<int>(blockIdx.x) % cluster;
  const int64_t first = static_cast<int64_t>(static_cast<int>(blockIdx.x) / cluster) * kRows;
  const int all = static_cast<int>(args.in / kDepth), count = static_cast<int>(args.count);
  const int begin = all * rank / cluster, steps = all * (rank + 1) / cluster - begin;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_warp = warp % kRowWarps, depth_warp = warp / kRowWarps;

  // What this thread copies of a step: one piece of every 32nd row.
  const int piece = threadIdx.x % kPieces, own = threadIdx.x / kPieces;
  const int left =
      static_cast<int>(args.out_width - first < kRows ? args.out_width - first : kRows);
  const int64_t offset = static_cast<int64_t>(begin) * kDepth + 8 * piece;
  const auto* weight = static_cast<const Storage*>(args.weight) + (first + own) * args.in + offset;
  const auto* x = static_cast<const Storage*>(args.x) + own * args.x_stride + offset;
  int brought = 0, filled = 0;  // steps; the stage of the next one
  const auto bring = [&] {
    if (brought < steps) {
      uint4* to = ring.vectors + filled * kStage + place(own, piece);
      const Storage* from = weight;
#pragma unroll
      for (int row = 0; row < kRows; row += kRowsATurn) {
        if (row + own < left) copy_async(to + row * kPieces, from, true);
        from += kRowsATurn * args.in;
      }
      to += kRows * kPieces;
      from = x;
#pragma unroll
      for (int n = 0; n < 8 * kTiles; n += kRowsATurn) {
        if (n + own < count) copy_async(to + n * kPieces, from, true);
        from += kRowsATurn * args.x_stride;
      }
      weight += kDepth;
      x += kDepth;
      ++brought;
      filled = filled + 1 < kStages ? filled + 1 : 0;
    }
    commit_copies();
  };

#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) bring();
  float sums[kHeight][kTiles][4] = {};
  for (int step = 0, stage = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the step is there, and nobody reads the one before it any more
    bring();
    const uint4* own_rows = ring.vectors + stage * kStage + 16 * kHeight * row_warp * kPieces;
    const uint4* rows_of_x = ring.vectors + stage * kStage + kRows * kPieces;
#pragma unroll
    for (int i = 0; i < kDepth / 16 / kDepthWarps; ++i) {
      const int k = 2 * (kDepth / 16 / kDepthWarps * depth_warp + i);  // the first piece of 16
      uint32_t b[kTiles / 2][4];
#pragma unroll
      for (int t = 0; t < kTiles / 2; ++t)
        load_matrices(b[t], rows_of_x + place(16 * t + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
#pragma unroll
      for (int h = 0; h < kHeight; ++h) {
        uint32_t a[4];
        load_matrices(a, own_rows + place(16 * h + lane % 16, k + lane / 16));
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          mma<T>(sums[h][t], a, b[t / 2][t % 2 * 2], b[t / 2][t % 2 * 2 + 1]);
      }
    }
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }

  // sums[h][t][i]: of row 16 h + lane / 4, or 8 on for i >= 2, of the warp's; of x's row
  // 8 t + 2 (lane % 4) + i % 2. The warps of one half of the steps leave theirs, and those of the
  // other add to them.
  constexpr int kPitch = Shared::kPitch;
  auto* totals = reinterpret_cast<float*>(ring.vectors);
  float* mine = totals + 2 * (lane % 4) * kPitch + 16 * kHeight * row_warp + lane / 4;
  const auto each = [&](auto put) {
#pragma unroll
    for (int h = 0; h < kHeight; ++h)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          put(mine[(8 * t + i % 2) * kPitch + 16 * h + i / 2 * 8], sums[h][t][i]);
  };
  __syncthreads();  // nobody reads the ring any more
  if (depth_warp == 1) each([](float& total, float sum) { total = sum; });
  __syncthreads();
  if (depth_warp == 0) each([](float& total, float sum) { total += sum; });
  if (cluster > 1) cluster_barrier();
  else __syncthreads();

  auto* out = static_cast<Storage*>(args.out) + first;
  const auto* bias = static_cast<const Storage*>(args.bias);
  const bool whole = args.out_width % 4 == 0;
  constexpr int kVectors = kRows / 4;  // of 4 outputs
  for (int v = rank * kThreads + threadIdx.x; v < count * kVectors; v += cluster * kThreads) {
    const int n = v / kVectors, row = v % kVectors * 4;
    if (row >= left) continue;
    const auto* part = reinterpret_cast<const uint4*>(totals + n * kPitch + row);
    uint4 parts[kMostClustered];
    if (cluster == 1) {
      parts[0] = *part;
    } else {
#pragma unroll
      for (int r = 0; r < kMostClustered; ++r)
        if (r < cluster) parts[r] = load_of_peer(part, r);
    }
    float sum[4];
    memcpy(sum, &parts[0], sizeof sum);
#pragma unroll
    for (int r = 1; r < kMostClustered; ++r)
      if (r < cluster) {
        float more[4];
        memcpy(more, &parts[r], sizeof more);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += more[i];
      }
    if (bias != nullptr)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (row + i < left) sum[i] += T::value(bias[first + row + i]);
    Storage* to = out + n * args.out_width + row;
    const uint32_t both[2] = {pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3])};
    if (whole) {
      *reinterpret_cast<uint2*>(to) = {both[0], both[1]};
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (row + i < left) to[i] = static_cast<Storage>(both[i / 2] >> 16 * (i % 2));
    }
  }
  if (cluster > 1) leave_cluster();
}

template <int kTiles, int kHeight>
constexpr size_t shared_bytes() {
  return sizeof(Ring<kTiles, kHeight>);
}

LinearCut cut_of(const LinearArgs& args) {
  LinearCut cut{};
  int64_t rows = 0;
  for (int cluster = 1; cluster <= kMostClustered && rows < kFewestRows; cluster *= 2) {
    const int slots = clusters_at_once<linear_kernel<BFloat16, 4, 2>>(
        static_cast<unsigned>(cluster), kThreads, shared_bytes<4, 2>());
    if (slots == 0) break;
    rows = (args.out_width + slots - 1) / slots;
    cut.cluster = cluster;
  }
  cut.height = rows <= 128 ? 2 : rows <= 192 ? 3 : 5;
  const int64_t tile = 16 * kRowWarps * cut.height;
  cut.tiles = static_cast<unsigned>((args.out_width + tile - 1) / tile);
  return cut;
}

template <class T, int kTiles, int kHeight>
int launch(const LinearArgs& args, const LinearCut& cut, void* stream) {
  const auto cluster = static_cast<unsigned>(cut.cluster);
  return DPARALLEL_LAUNCH_CLUSTERS((linear_kernel<T, kTiles, kHeight>), cut.tiles * cluster,
                                   cluster, kThreads, (shared_bytes<kTiles, kHeight>()), stream,
                                   args, cut.cluster);
}

template <class T, int kTiles>
int launch(const LinearArgs& args, const LinearCut& cut, void* stream) {
  switch (cut.height) {
    case 2: return launch<T, kTiles, 2>(args, cut, stream);
    case 3: return launch<T, kTiles, 3>(args, cut, stream);
    default: return launch<T, kTiles, 5>(args, cut, stream);
  }
}

template <class T>
int launch(const LinearArgs& args, const LinearCut& cut, void* stream) {
  return args.count <= 32 ? launch<T, 4>(args, cut, stream) : launch<T, 8>(args, cut, stream);
}

}  // namespace

int linear(const LinearArgs& args, void* stream) {
  if (args.count == 0 || args.out_width == 0) return 0;
  const LinearCut cut = cut_of(args);
  return args.dtype == DType::bfloat16 ? launch<BFloat16>(args, cut, stream)
                                       : launch<Float16>(args, cut, stream);
}

}  // namespace dparallel::cuda
