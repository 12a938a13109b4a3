// fp8_linear: a matrix product that reads its weights once, as bytes. And fp8_widen: those weights
// in 16 or 32 bits, for products of so many rows that they are no longer bound by reading weights.
//
// Work: 32 rows of x through a layer of LLaDA-8B, 4096 -> 12288, read 50 MB of weights, 0.25 MB of
// x, and write 0.75 MB; 3.2 GFLOP. At 4.3 TB/s a multiprocessor takes 18 bytes of weights a cycle,
// and some 32 KB must be on their way to it at any time.
//
// On tensor cores (16-bit rows, aligned, of a multiple of 64 numbers): a CTA takes 128 rows of the
// weights, 32 to a warp, and up to 64 rows of x. Its eight warps are two teams, which take steps of
// 64 numbers of the inner dimension in turn. In a step a lane loads 16 bytes of four rows of the
// weights, which are its operands of four multiplications: the order in which the inner dimension
// is summed is free. Two steps of a warp are in flight, in registers, 32 KB of a CTA; two CTAs run
// on a multiprocessor. x comes in batches of steps through shared memory, twice buffered, once for
// all warps, each of which multiplies every number of it with 32 rows of weights: with 16 rows,
// reading shared memory would take longer than the weights at 64 rows of x. From the L2 cache x is
// read once for each 128 rows of weights, half as many bytes as the weights at 32 rows.
//
// A byte becomes 16 bits, exactly, by two multiply-adds and a multiplication, on the pipe of the
// FMAs; by shifts and masks alone it would keep the other pipe busy for 60 % of the time. Of a step
// for 32 rows of x a warp issues some 220 instructions, 32 of them multiplications of matrices,
// where the memory leaves it 440 cycles.
//
// Where a weight has too few rows to fill the GPU, its inner dimension is split over CTAs, by its
// own shape alone, and the last one to arrive adds the parts up in their order: a row of x comes
// out to the bit as it does alone. More than 64 rows of x are chunks, next to each other in the
// grid, so that all but the first find the weights in the L2 cache.
//
// kEnough, kRing, the 32 rows of a warp and its two teams are by arithmetic, not yet by
// measurement.
//
// Else a warp takes a row of the weights, by FMA.
#include "device.cuh"
#include "dparallel/launch.h"
#include "mma.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kWarpRows = 32, kGroups = 4, kTileRows = kGroups * kWarpRows;  // of the weights
constexpr int kTeams = 2;  // of warps, which share the steps
constexpr int kThreads = 32 * kGroups * kTeams;
constexpr int kStep = 64;                   // of the inner dimension
constexpr int kRing = 2;                    // steps of a warp in flight
constexpr int kMostTiles = 8;               // of 8 rows of x
constexpr int kChunkRows = 8 * kMostTiles;  // of x
constexpr int64_t kEnough = 128;            // CTAs that occupy an H100
constexpr int64_t kLeastSteps = 8;          // of a split

struct Fp8Shape {
  // Tiles of the weights, splits of the inner dimension, chunks of the rows of x, steps in all and
  // of a split.
  unsigned tiles, splits, chunks;
  int all, steps;

  static Fp8Shape of(const Fp8LinearArgs& args) {
    const int64_t tiles = (args.out_width + kTileRows - 1) / kTileRows, all = args.in / kStep;
    const int64_t wanted = (kEnough + tiles - 1) / (tiles > 0 ? tiles : 1);
    const int64_t most = all >= kLeastSteps ? all / kLeastSteps : 1;
    const int64_t splits = wanted < most ? wanted : most;
    const int64_t steps = all > 0 ? (all + splits - 1) / splits : 1;
    return {static_cast<unsigned>(tiles), static_cast<unsigned>((all + steps - 1) / steps),
            static_cast<unsigned>((args.count + kChunkRows - 1) / kChunkRows),
            static_cast<int>(all), static_cast<int>(steps)};
  }
};

__device__ __forceinline__ uint4 bits_of(const float (&four)[4]) {
  uint4 bits;
  memcpy(&bits, four, sizeof bits);
  return bits;
}

__device__ __forceinline__ void add(float (&to)[4], const uint4& bits) {
  float four[4];
  memcpy(four, &bits, sizeof four);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] += four[i];
}

// kTiles: of 8 rows of x, those of the largest chunk.
template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 2)
    fp8_linear_tensor_kernel(Fp8LinearArgs args, Fp8Shape shape, float* scratch,
                             int32_t* counters) {
  using Storage = typename T::Storage;
  constexpr int kRows = 8 * kTiles;           // of x
  constexpr int kTurns = kTiles > 4 ? 1 : 2;  // steps of a warp in a batch of x
  constexpr int kBatch = kTurns * kTeams;     // steps
  constexpr int kPieces = kStep / T::kWidth;  // 16 bytes each, of a row of x
  constexpr int kHalves = kWarpRows / 8;      // rows of the weights to a lane
  static_assert(kRing % kTurns == 0 && kTeams == 2 && kWarpRows == 32, "");
  DPARALLEL_SHARED(staged, uint4[2][kBatch][kRows][kPieces]);

  const unsigned chunk = blockIdx.x % shape.chunks, unit = blockIdx.x / shape.chunks;
  const unsigned split = unit % shape.splits, tile = unit / shape.splits;
  const int group = threadIdx.x / 32 % kGroups, team = threadIdx.x / (32 * kGroups);
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const int first = split * shape.steps;
  const int steps = shape.all - first < shape.steps ? shape.all - first : shape.steps;
  const int64_t n0 = static_cast<int64_t>(chunk) * kChunkRows;
  const int rows = args.count - n0 < kRows ? static_cast<int>(args.count - n0) : kRows;
  const int64_t tile_row = static_cast<int64_t>(tile) * kTileRows;
  const int jump = 8 * static_cast<int>(args.in);
  const int width = args.out_width - tile_row < kTileRows
                        ? static_cast<int>(args.out_width - tile_row)
                        : kTileRows;

  // The lane's rows of the weights are g, g + 8 and so on of its group's; the steps are its team's.
  // Rows that the weights do not have are zeros.
  const int row = group * kWarpRows + g;
  const uint8_t* weight = args.weight + (tile_row + row) * args.in +
                          static_cast<int64_t>(first + team) * kStep + 16 * q;
  uint4 ring[kRing][kHalves] = {};
  const auto load = [&](int slot, int turn) {  // counted from where `weight` is
    const uint8_t* at = weight + turn * (kTeams * kStep);
#pragma unroll
    for (int half = 0; half < kHalves; ++half, at += jump)
      if (row + 8 * half < width) ring[slot][half] = __ldcs(reinterpret_cast<const uint4*>(at));
  };
#pragma unroll
  for (int slot = 0; slot < kRing; ++slot)
    if (slot * kTeams + team < steps) load(slot, slot);

  // Batch b of x goes to staged[b % 2]: of row n and step s its pieces, in pairs that change places
  // in odd rows, so that eight lanes of two rows read eight different ones of 128 bytes. Rows that
  // x does not have stay what they are: a row comes into no sum but its own.
  constexpr int kPerRow = kBatch * kPieces, kRowsAtOnce = kThreads / kPerRow;
  static_assert(kRowsAtOnce % 2 == 0 && kRowsAtOnce <= 16, "");
  const int own_n = threadIdx.x / kPerRow, own_step = threadIdx.x / kPieces % kBatch;
  const int stride = static_cast<int>(args.x_stride / T::kWidth);
  const uint4* const x = static_cast<const uint4*>(args.x) + n0 * stride + first * kPieces;
  const int own = own_n * stride + own_step * kPieces + threadIdx.x % kPieces;
  uint4* const to = &staged[0][own_step][own_n][threadIdx.x % kPieces ^ own_n % 2];
  const auto bring = [&](int b) {
    if (b * kBatch + own_step >= steps) return;
#pragma unroll 1
    for (int n = 0; n < kRows; n += kRowsAtOnce)
      if (n + own_n < rows)
        copy_async(to + (b % 2 * kBatch * kRows + n) * kPieces,
                   x + (own + n * stride + b * kBatch * kPieces), true);
  };
  bring(0);

  float sums[2][kTiles][4] = {};  // of 16 rows of the weights each
  for (int base = 0; base * kTeams < steps; base += kRing) {
#pragma unroll
    for (int slot = 0; slot < kRing; ++slot) {
      const int b = (base + slot) / kTurns, step = (base + slot) * kTeams + team;
      if (slot % kTurns == 0) {
        if (b * kBatch >= steps) break;
        wait_for_copies();
        __syncthreads();  // batch b is there, and nobody reads the one before it any more
        bring(b + 1);
      }
      if (step >= steps) continue;
      const uint4* mine = &staged[b % 2][slot % kTurns * kTeams + team][g][0];
      uint32_t words[kHalves][4];
      memcpy(words, ring[slot], sizeof words);
      // A loop of its own where the registers hardly suffice; the words move up in it.
#pragma unroll(kTiles > 4 ? 1 : 2)
      for (int piece = 0; piece < 2; ++piece) {  // of the lane's two of each row of x
        uint32_t a[2][2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < kHalves; ++half)
            widen_e4m3<T>(words[half][i], a[i][half / 2][half % 2], a[i][half / 2][half % 2 + 2]);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint4 loaded = mine[8 * t * kPieces + ((2 * q + piece) ^ g % 2)];
          uint32_t numbers[4];
          memcpy(numbers, &loaded, sizeof numbers);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int w = 0; w < 2; ++w)
              mma<T>(sums[w][t], a[i][w], numbers[2 * i], numbers[2 * i + 1]);
        }
#pragma unroll
        for (auto& four : words) {
          four[0] = four[2];
          four[1] = four[3];
        }
      }
      if (step + kRing * kTeams < steps) load(slot, slot + kRing);
    }
    weight += kRing * kTeams * kStep;
  }

  // Of each group's two tiles of 16 rows, the teams keep one each and give the other away.
  __syncthreads();  // nobody reads x any more
  auto* given = reinterpret_cast<uint4*>(&staged);
  static_assert(kTiles * kThreads * sizeof(uint4) <= sizeof staged, "");
  float sum[kTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    float other[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[t][i] = team == 0 ? sums[0][t][i] : sums[1][t][i];
      other[i] = team == 0 ? sums[1][t][i] : sums[0][t][i];
    }
    given[t * kThreads + (threadIdx.x ^ kThreads / 2)] = bits_of(other);
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) add(sum[t], given[t * kThreads + threadIdx.x]);

  // The parts of the splits lie as their lanes hold them, 16 bytes of each thread side by side.
  if (shape.splits > 1) {
    const int64_t place = static_cast<int64_t>(tile) * shape.chunks + chunk;
    constexpr int kPart = kTiles * kThreads;
    uint4* const parts =
        reinterpret_cast<uint4*>(scratch) + place * shape.splits * kPart + threadIdx.x;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) parts[split * kPart + t * kThreads] = bits_of(sum[t]);
    if (!last_to_arrive(counters + place, shape.splits)) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (float& number : sum[t]) number = 0.0f;
#pragma unroll(kTiles > 4 ? 2 : 4)
    for (unsigned s = 0; s < shape.splits; ++s)
#pragma unroll
      for (int t = 0; t < kTiles; ++t) add(sum[t], __ldcg(parts + s * kPart + t * kThreads));
  }

  // sum[t][i]: of the lane's row or, for i >= 2, of that 8 on; of x's row 8 t + 2 q + i % 2 of the
  // chunk. They leave by way of shared memory, 16 bytes of a row of the output to a thread; the gap
  // between two rows there keeps the lanes' writes off each other.
  constexpr int kPitch = kTileRows + T::kWidth;
  static_assert(kRows * kPitch * sizeof(Storage) <= sizeof staged, "");
  auto* turned = reinterpret_cast<Storage*>(&staged);
  __syncthreads();  // nobody reads what was given any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at_row = row + 16 * team + 8 * half;
    const int64_t own = tile_row + (at_row < width ? at_row : width - 1);
    const float scale = args.scale[own];
    float bias = 0.0f;
    if (args.bias != nullptr) bias = T::value(static_cast<const Storage*>(args.bias)[own]);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint32_t both =
          pack<T>(scale * sum[t][2 * half] + bias, scale * sum[t][2 * half + 1] + bias);
      Storage* at = turned + (8 * t + 2 * q) * kPitch + at_row;
      at[0] = static_cast<Storage>(both);
      at[kPitch] = static_cast<Storage>(both >> 16);
    }
  }
  __syncthreads();
  auto* out = static_cast<Storage*>(args.out) + n0 * args.out_width + tile_row;
  constexpr int kVectors = kTileRows / T::kWidth;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kVectors; i += kThreads) {
    const int n = i / kVectors, column = i % kVectors * T::kWidth;
    const Storage* at = turned + n * kPitch + column;
    Storage* end = out + n * args.out_width + column;
    if (args.out_width % T::kWidth == 0) {
      if (column < width) *reinterpret_cast<uint4*>(end) = *reinterpret_cast<const uint4*>(at);
    } else {
#pragma unroll 1
      for (int j = 0; j < T::kWidth && column + j < width; ++j) end[j] = at[j];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) fp8_linear_plain_kernel(Fp8LinearArgs args) {
  using Storage = typename T::Storage;
  constexpr int kGroup = 8;  // rows of x between two readings of the weights
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
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
  return args.dtype != DType::float32 && args.in > 0 && args.in % kStep == 0 &&
         args.x_stride < int64_t{1} << 27 &&  // so that 64 rows are in the reach of an int
         multiples_of_16({args.x, args.weight, args.out}, {args.x_stride},
                         element_size(args.dtype));
}

// Tiles of 8 rows of x that a CTA holds: 1, 2, 4 or 8.
int tiles_of_x(const Fp8LinearArgs& args) {
  const int64_t tiles = (args.count + 7) / 8;
  return tiles > 4 ? 8 : tiles > 2 ? 4 : static_cast<int>(tiles);
}

// Weights in T: kEach of a row to a thread, 16 or, where vectors do not fit, 1.
template <class T, int kEach>
__global__ void __launch_bounds__(kThreads) fp8_widen_kernel(Fp8WidenArgs args, unsigned per_row) {
  using Storage = typename T::Storage;
  const int64_t row = blockIdx.x / per_row;
  const int64_t k = (static_cast<int64_t>(blockIdx.x % per_row) * kThreads + threadIdx.x) * kEach;
  if (k >= args.in) return;
  const uint8_t* from = args.weight + row * args.in + k;
  auto* to = static_cast<Storage*>(args.out) + row * args.in + k;
  const float scale = args.scale[row];
  if constexpr (kEach == 16) {
    const uint4 loaded = __ldcs(reinterpret_cast<const uint4*>(from));
    uint32_t words[4], wide[2][4];
    memcpy(words, &loaded, sizeof words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pairs[2];
      widen_e4m3<T>(words[i], pairs[0], pairs[1]);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        wide[i / 2][i % 2 * 2 + j] =
            pack<T>(scale * T::value(static_cast<Storage>(pairs[j])),
                    scale * T::value(static_cast<Storage>(pairs[j] >> 16)));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 bits;
      memcpy(&bits, wide[half], sizeof bits);
      reinterpret_cast<uint4*>(to)[half] = bits;
    }
  } else {
    *to = T::narrow(scale * e4m3_value(*from));
  }
}

}  // namespace

int64_t fp8_linear_scratch(const Fp8LinearArgs& args) {
  if (!on_tensor_cores(args)) return 0;
  const Fp8Shape shape = Fp8Shape::of(args);
  const int64_t part = 8 * tiles_of_x(args) * kTileRows * static_cast<int64_t>(sizeof(float));
  return shape.splits > 1 ? part * shape.tiles * shape.chunks * shape.splits : 0;
}

int64_t fp8_linear_counters(const Fp8LinearArgs& args) {
  const Fp8Shape shape = Fp8Shape::of(args);
  return static_cast<int64_t>(shape.tiles) * shape.chunks;
}

int fp8_linear(const Fp8LinearArgs& args, const Workspace& workspace, void* stream) {
  if (args.count == 0 || args.out_width == 0) return 0;
  const Fp8Shape shape = Fp8Shape::of(args);
  auto* scratch = static_cast<float*>(workspace.scratch);
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(typename T::Storage) == 2)
      if (on_tensor_cores(args)) {
        const unsigned grid = shape.chunks * shape.tiles * shape.splits;
        const auto launch = [&](auto kernel) {
          DPARALLEL_LAUNCH(kernel, grid, kThreads, stream, args, shape, scratch,
                           workspace.counters);
          return static_cast<int>(cudaGetLastError());
        };
        switch (tiles_of_x(args)) {
          case 1: return launch(fp8_linear_tensor_kernel<T, 1>);
          case 2: return launch(fp8_linear_tensor_kernel<T, 2>);
          case 4: return launch(fp8_linear_tensor_kernel<T, 4>);
          default: return launch(fp8_linear_tensor_kernel<T, 8>);
        }
      }
    const auto grid = static_cast<unsigned>((args.out_width + kThreads / 32 - 1) / (kThreads / 32));
    DPARALLEL_LAUNCH((fp8_linear_plain_kernel<T>), grid, kThreads, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

int fp8_widen(const Fp8WidenArgs& args, void* stream) {
  if (args.out_width == 0 || args.in == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto kernel, int each) {
      const int64_t per_row = (args.in + each * kThreads - 1) / (each * kThreads);
      DPARALLEL_LAUNCH(kernel, static_cast<unsigned>(args.out_width * per_row), kThreads, stream,
                       args, static_cast<unsigned>(per_row));
      return static_cast<int>(cudaGetLastError());
    };
    if constexpr (sizeof(typename T::Storage) == 2)
      if (multiples_of_16({args.weight, args.out}, {args.in}, 1))
        return launch(fp8_widen_kernel<T, 16>, 16);
    return launch(fp8_widen_kernel<T, 1>, 1);
  });
}

}  // namespace dparallel::cuda
