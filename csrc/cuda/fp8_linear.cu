// fp8_linear: a matrix product that reads its weights once, as bytes. And fp8_widen: those weights
// in 16 or 32 bits, for products of so many rows that they are no longer bound by reading weights.
//
// Work: 32 rows of x through a layer of LLaDA-8B, 4096 -> 12288, read 50 MB of weights, 0.25 MB of
// x, and write 0.75 MB; 3.2 GFLOP. At 4.3 TB/s an SM takes 18 bytes of weights a cycle, and some
// 40 KB must be on their way to it at any time.
//
// On tensor cores (16-bit rows, aligned, of a multiple of 64 numbers): a CTA has an SM to itself
// and takes a tile of 128, 256 or 384 rows of the weights and up to 64 rows of x. A step is 128
// numbers of each of these rows, a line of the L2 cache of the weights, copied past the registers
// into a ring that fills the SM's shared memory: some 100 KB are on their way at any time.
//
// A tile also reads all of x, from the L2 cache, whose rate is not much above that of memory: for a
// tile of 128 rows, 32 rows of x are half as many bytes as the weights, for 384 a sixth. So tiles
// are high, and two to eight CTAs, a cluster, share a tile and divide its inner dimension, so that
// all SMs have work and each reads its part of x alone. They then add up their sums, each some of
// the outputs, out of one another's shared memory, in the order of their parts. The cut is of the
// weights' shape and the device: a row of x comes out to the bit as it does alone. More than 64
// rows of x are chunks, next to each other in the grid, so that all but the first find the weights
// in the L2 cache. Devices without clusters, which have less shared memory too, take tiles of 128
// rows, each a CTA's alone.
//
// A warp takes an eighth of the tile's rows, as the left operand of its multiplications. The order
// in which the inner dimension is summed is free: a lane reads 16 bytes of a row at once, which are
// its operands of four multiplications, and 32 of each row of x. A byte becomes 16 bits, exactly,
// by two instructions a byte. Of 64 numbers of 384 rows of the weights and 32 of x a warp issues
// some 340 instructions, 192 of them to widen and 48 multiplications of matrices; two warps share a
// scheduler, and the memory leaves them 1400 cycles.
//
// Measured on an H200: 32 rows through that layer in 23 us, half of its bandwidth. A CTA reads some
// 40 bytes a nanosecond, and a launch takes some 6 us more than its bytes: where the weights are
// constant it begins early, while the kernel before still runs, and asks for the first of them,
// which takes 5 % off a decode in 8 bits. Steps of 64 numbers took 27 us, twice the warps or lower
// tiles as long; clusters of 3, 5 or 7 were faster alone, and slower in a decode.
//
// Else a warp takes a row of the weights, by FMA.
#include "cluster.cuh"
#include "dparallel/launch.h"
#include "mma.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kDepth = 128;             // of the inner dimension, a step: a line of the L2 cache
constexpr int kPieces = kDepth / 16;    // of 16 bytes, of a row of the weights
constexpr int kXPieces = kDepth / 8;    // of a row of x
constexpr int kMultiple = 64;           // of it, the inner dimension
constexpr int kChunkRows = 64;          // of x
constexpr int kMostHeight = 3;          // tiles of 16 rows of the weights, of a warp
constexpr int kAhead = 2;               // steps whose weights are asked for before x is there
constexpr int kMostClustered = 8;       // CTAs
constexpr int kTileRows = 16 * kWarps;  // of the weights, for each 16 of a warp

// kTiles: of 8 rows of x. kHeight: tiles of 16 rows of the weights, of a warp.
template <int kTiles, int kHeight>
struct Ring {
  static constexpr int kRows = kTileRows * kHeight;
  static constexpr int kStage = kRows * kPieces + 8 * kTiles * kXPieces;  // vectors of 16 bytes
  // What a CTA can have: where there are no clusters, and on sm_90 and sm_100.
  static constexpr int kBytes = (kHeight == 1 ? 99 : 227) * 1024;
  static constexpr int kStages = kBytes / 16 / kStage;
  // The sums [8 kTiles, kRows] lie there afterwards; with these gaps lanes' writes do not collide.
  static constexpr int kPitch = kRows + 4;
  static_assert(8 * kTiles * kPitch * 4 <= kStages * kStage * 16 && kStages > 2, "");

  uint4 vectors[kStages * kStage];
};

// Of the weights: tiles of `height`, each of `cluster` CTAs.
struct Fp8Cut {
  int height, cluster;
};

template <class T, int kTiles, int kHeight>
__global__ void __launch_bounds__(kThreads, 1)
    fp8_linear_tensor_kernel(Fp8LinearArgs args, int cluster, int chunks) {
  using Storage = typename T::Storage;
  using Shared = Ring<kTiles, kHeight>;
  constexpr int kRows = Shared::kRows, kStage = Shared::kStage, kStages = Shared::kStages;
  DPARALLEL_LARGE_SHARED(ring, Shared);
  const int rank = static_cast<int>(blockIdx.x) % cluster;
  const int unit = static_cast<int>(blockIdx.x) / cluster;
  const int64_t first = static_cast<int64_t>(unit / chunks) * kRows;
  const int64_t first_n = static_cast<int64_t>(unit % chunks) * kChunkRows;
  const int left =
      static_cast<int>(args.out_width - first < kRows ? args.out_width - first : kRows);
  const int count =
      static_cast<int>(args.count - first_n < 8 * kTiles ? args.count - first_n : 8 * kTiles);
  const int in = static_cast<int>(args.in), all = (in + kDepth - 1) / kDepth;
  const int begin = all * rank / cluster, steps = all * (rank + 1) / cluster - begin;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;

  // What this thread copies of a step: one piece of every 32nd row of the weights, and of every
  // 16th of x; zeros beyond their ends. In odd rows pieces change places, of the weights the halves
  // of a row, of x neighbours, so that eight lanes of two rows read eight different ones of 128
  // bytes.
  constexpr int kTurn = kThreads / kPieces, kXTurn = kThreads / kXPieces;
  const int own = threadIdx.x / kPieces, own_n = threadIdx.x / kXPieces;
  const int piece = threadIdx.x % kPieces, x_piece = threadIdx.x % kXPieces;
  const int to_x = kRows * kPieces + own_n * kXPieces + (x_piece ^ own_n % 2);
  const int64_t offset = static_cast<int64_t>(begin) * kDepth;
  const uint8_t* weight = args.weight + (first + own) * args.in + offset + 16 * piece;
  const auto* x = static_cast<const Storage*>(args.x) + (first_n + own_n) * args.x_stride + offset +
                  8 * x_piece;
  uint4* const vectors = anew(ring.vectors);  // else each copy would make its address from scratch
  const auto bring_weights = [&](int step, int stage) {
    uint4* to = vectors + stage * kStage;
    const bool there = (begin + step) * kDepth + 16 * piece < in;
    const uint8_t* from = weight + step * kDepth;
#pragma unroll
    for (int row = 0; row < kRows; row += kTurn) {
      if (row + own < left)
        copy_async(to + (row + own) * kPieces + (piece ^ own % 2 * 4), from, there);
      from += kTurn * args.in;
    }
  };
  // Of row n + own_n of x: put(n, from, there), a piece of 16 bytes.
  constexpr int kXPut = (8 * kTiles + kXTurn - 1) / kXTurn;
  const auto bring_x = [&](int step, auto put) {
    const bool there = (begin + step) * kDepth + 8 * x_piece < in;
    const Storage* from = x + step * kDepth;
#pragma unroll
    for (int n = 0; n < kXPut; ++n) {
      if (n * kXTurn + own_n < count) put(n, from, there);
      from += kXTurn * args.x_stride;
    }
  };

  const auto copy_x = [&](int step, int stage) {
    bring_x(step, [&](int n, const Storage* from, bool there) {
      copy_async(vectors + stage * kStage + to_x + n * kXTurn * kXPieces, from, there);
    });
  };

  // What the kernel before may write is x alone: the weights of the first steps are on their way
  // meanwhile. Their x comes by way of registers: copies would complete behind all others. More
  // steps would keep it waiting behind their weights.
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) {
    if (stage < steps) bring_weights(stage, stage);
    commit_copies();
  }
  wait_for_earlier();
  uint4 first_x[kAhead][kXPut];
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage)
    if (stage < steps)
      bring_x(stage, [&](int n, const Storage* from, bool there) {
        first_x[stage][n] = there ? __ldcg(reinterpret_cast<const uint4*>(from)) : uint4{};
      });
#pragma unroll 1
  for (int stage = kAhead; stage < kStages - 1; ++stage) {
    if (stage < steps) {
      bring_weights(stage, stage);
      copy_x(stage, stage);
    }
    commit_copies();
  }
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage)
    if (stage < steps)
      bring_x(stage, [&](int n, const Storage*, bool) {
        vectors[stage * kStage + to_x + n * kXTurn * kXPieces] = first_x[stage][n];
      });
  float sums[kHeight][kTiles][4] = {};
#pragma unroll 1
  for (int step = 0, stage = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the step is there, and nobody reads the one before it any more
    if (const int next = step + kStages - 1; next < steps) {
      const int emptied = stage > 0 ? stage - 1 : kStages - 1;
      bring_weights(next, emptied);
      copy_x(next, emptied);
    }
    commit_copies();
    const uint4* rows = ring.vectors + stage * kStage + (16 * kHeight * warp + g) * kPieces;
    const uint4* x_rows = ring.vectors + stage * kStage + kRows * kPieces + g * kXPieces;
#pragma unroll
    for (int part = 0; part < kDepth / 64; ++part) {  // 16 bytes of each row for each of four lanes
      uint32_t words[kHeight][2][4];
#pragma unroll
      for (int h = 0; h < kHeight; ++h)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          memcpy(words[h][half],
                 rows + (16 * h + 8 * half) * kPieces + ((4 * part + q) ^ g % 2 * 4),
                 sizeof words[h][half]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // of the lane's two pieces of each row of x
        uint32_t numbers[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          memcpy(numbers[t], x_rows + 8 * t * kXPieces + ((8 * part + 2 * q + i) ^ g % 2),
                 sizeof numbers[t]);
#pragma unroll
        for (int h = 0; h < kHeight; ++h)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            uint32_t a[4];
            widen_e4m3<T>(words[h][0][2 * i + j], a[0], a[2]);
            widen_e4m3<T>(words[h][1][2 * i + j], a[1], a[3]);
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
              mma<T>(sums[h][t], a, numbers[t][2 * j], numbers[t][2 * j + 1]);
          }
      }
    }
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }

  // sums[h][t][i]: of row 16 h + g, or 8 on for i >= 2, of the warp's; of x's row 8 t + 2 q + i
  // % 2.
  constexpr int kPitch = Shared::kPitch;
  auto* totals = reinterpret_cast<float*>(ring.vectors);
  float* mine = totals + 2 * q * kPitch + 16 * kHeight * warp + g;
  __syncthreads();  // nobody reads the ring any more
#pragma unroll
  for (int h = 0; h < kHeight; ++h)
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mine[(8 * t + i % 2) * kPitch + 16 * h + i / 2 * 8] = sums[h][t][i];
  if (cluster > 1) cluster_barrier();
  else __syncthreads();

  auto* out = static_cast<Storage*>(args.out) + first_n * args.out_width + first;
  const auto* bias = static_cast<const Storage*>(args.bias);
  const bool whole = args.out_width % 4 == 0;
  constexpr int kVectors = kRows / 4;  // of 4 outputs
#pragma unroll 1
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
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + i < left) {
        const float added = bias != nullptr ? T::value(bias[first + row + i]) : 0.0f;
        sum[i] = args.scale[first + row + i] * sum[i] + added;
      }
    Storage* to = out + n * args.out_width + row;
    const uint32_t both[2] = {T::narrow(sum[0], sum[1]), T::narrow(sum[2], sum[3])};
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

template <class T>
__global__ void __launch_bounds__(kThreads) fp8_linear_plain_kernel(Fp8LinearArgs args) {
  using Storage = typename T::Storage;
  constexpr int kGroup = 8;  // rows of x between two readings of the weights
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= args.out_width) return;
  const uint8_t* weight = args.weight + row * args.in;
  const float scale = args.scale[row];
  float bias = 0.0f;
  if (args.bias != nullptr) bias = T::value(static_cast<const Storage*>(args.bias)[row]);
  for (int64_t n = 0; n < args.count; n += kGroup) {
    float sums[kGroup] = {};
    for (int64_t k = lane; k < args.in; k += 32) {
      const float w = e4m3_value(weight[k]);
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
            T::narrow(scale * sums[j] + bias);
    }
  }
}

bool on_tensor_cores(const Fp8LinearArgs& args) {
  return args.dtype != DType::float32 && args.in > 0 && args.in % kMultiple == 0 &&
         multiples_of_16({args.x, args.weight, args.out}, {args.x_stride},
                         element_size(args.dtype));
}

template <int kTiles, int kHeight>
constexpr size_t shared_bytes() {
  return sizeof(Ring<kTiles, kHeight>);
}

// Rounds in which all tiles get done, times what each takes: the bytes of a CTA, over 64, those of
// 32 rows of x among them, and what its beginning and its end cost beside.
Fp8Cut cut_of(const Fp8LinearArgs& args) {
  constexpr int64_t kOverhead = 1500;
  const int64_t all = (args.in + kDepth - 1) / kDepth;
  Fp8Cut best{1, 1};
  int64_t least = INT64_MAX;
  for (int cluster = 1; cluster <= kMostClustered; cluster *= 2) {
    const int slots = clusters_at_once<fp8_linear_tensor_kernel<BFloat16, 4, kMostHeight>>(
        static_cast<unsigned>(cluster), kThreads, shared_bytes<4, kMostHeight>());
    if (cluster == 2 && slots == 0) return {1, 1};  // nor so much shared memory
    for (int height = 1; height <= kMostHeight && slots > 0; ++height) {
      const int64_t rows = kTileRows * height, tiles = (args.out_width + rows - 1) / rows;
      const int64_t rounds = (tiles + slots - 1) / slots, steps = (all + cluster - 1) / cluster;
      const int64_t cost = rounds * ((rows + 64) * steps + kOverhead);
      if (cost < least) {
        least = cost;
        best = {height, cluster};
      }
    }
  }
  return best;
}

template <class T, int kTiles, int kHeight>
int launch(const Fp8LinearArgs& args, int cluster, void* stream) {
  constexpr int64_t kRows = kTileRows * kHeight;
  const int64_t tiles = (args.out_width + kRows - 1) / kRows;
  const int64_t chunks = (args.count + kChunkRows - 1) / kChunkRows;
  const bool early =
      args.constant && has_clusters_here<fp8_linear_tensor_kernel<T, kTiles, kHeight>>();
  return DPARALLEL_LAUNCH_CLUSTERS(
      (fp8_linear_tensor_kernel<T, kTiles, kHeight>),
      static_cast<unsigned>(tiles * chunks * cluster), static_cast<unsigned>(cluster), kThreads,
      (shared_bytes<kTiles, kHeight>()), early, stream, args, cluster, static_cast<int>(chunks));
}

template <class T, int kTiles>
int launch(const Fp8LinearArgs& args, void* stream) {
  const Fp8Cut cut = cut_of(args);
  switch (cut.height) {
    case 1: return launch<T, kTiles, 1>(args, cut.cluster, stream);
    case 2: return launch<T, kTiles, 2>(args, cut.cluster, stream);
    default: return launch<T, kTiles, 3>(args, cut.cluster, stream);
  }
}

// Weights in T: of a row twice kEach to a thread, 8, so that the warp's stores of 16 bytes lie side
// by side, or, where vectors do not fit, 1.
template <class T, int kEach>
__global__ void __launch_bounds__(kThreads) fp8_widen_kernel(Fp8WidenArgs args, unsigned per_row) {
  using Storage = typename T::Storage;
  constexpr int kTurns = 2, kTurn = kThreads * kEach;
  const int64_t row = blockIdx.x / per_row;
  const int64_t k =
      static_cast<int64_t>(blockIdx.x % per_row) * kTurns * kTurn + threadIdx.x * kEach;
  const uint8_t* from = args.weight + row * args.in + k;
  auto* to = static_cast<Storage*>(args.out) + row * args.in + k;
  const float scale = args.scale[row];
  if constexpr (kEach == 8) {
    uint2 loaded[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn)
      if (k + turn * kTurn < args.in)
        loaded[turn] = __ldcs(reinterpret_cast<const uint2*>(from + turn * kTurn));
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (k + turn * kTurn >= args.in) break;
      uint32_t pairs[4], wide[4];
      widen_e4m3<T>(loaded[turn].x, pairs[0], pairs[1]);
      widen_e4m3<T>(loaded[turn].y, pairs[2], pairs[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float low, high;
        T::values(pairs[i], low, high);
        wide[i] = T::narrow(scale * low, scale * high);
      }
      uint4 bits;
      memcpy(&bits, wide, sizeof bits);
      *reinterpret_cast<uint4*>(to + turn * kTurn) = bits;
    }
  } else {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn)
      if (k + turn * kTurn < args.in)
        to[turn * kTurn] = T::narrow(scale * e4m3_value(from[turn * kTurn]));
  }
}

}  // namespace

int fp8_linear(const Fp8LinearArgs& args, void* stream) {
  if (args.count == 0 || args.out_width == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(typename T::Storage) == 2)
      if (on_tensor_cores(args))
        return args.count <= 32 ? launch<T, 4>(args, stream) : launch<T, 8>(args, stream);
    const auto grid = static_cast<unsigned>((args.out_width + kWarps - 1) / kWarps);
    DPARALLEL_LAUNCH((fp8_linear_plain_kernel<T>), grid, kThreads, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

int fp8_widen(const Fp8WidenArgs& args, void* stream) {
  if (args.out_width == 0 || args.in == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto kernel, int each) {
      const int64_t per_row = (args.in + 2 * each * kThreads - 1) / (2 * each * kThreads);
      DPARALLEL_LAUNCH(kernel, static_cast<unsigned>(args.out_width * per_row), kThreads, stream,
                       args, static_cast<unsigned>(per_row));
      return static_cast<int>(cudaGetLastError());
    };
    if constexpr (sizeof(typename T::Storage) == 2)
      if (multiples_of_16({args.weight, args.out}, {args.in}, 1))
        return launch(fp8_widen_kernel<T, 8>, 8);
    return launch(fp8_widen_kernel<T, 1>, 1);
  });
}

}  // namespace dparallel::cuda
