// fp8_linear: a matrix product that reads its weights once, as bytes.
//
// On tensor cores (16-bit rows, aligned, of a multiple of 64 numbers): a CTA takes 64 rows of the
// weights, 16 to a warp, and up to 64 rows of x. A lane loads 16 bytes of two rows, which are its
// operands of four multiplications: the order in which the inner dimension is summed is free, so
// the lane takes the same numbers of x, from the L1 cache, which the four warps share. A byte
// becomes 16 bits by a shift and a multiplication, exactly. Where a weight has too few rows to
// occupy the GPU, its inner dimension is split over CTAs, by its own shape alone, and the last one
// to arrive adds the parts up in their order: a row of x comes out to the bit as it does alone.
//
// Else a warp takes a row of the weights, by FMA.
#include "device.cuh"
#include "dparallel/launch.h"
#include "mma.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpRows = 16, kTileRows = 64;  // of the weights
constexpr int kStep = 64;                      // of the inner dimension
constexpr int kMostTiles = 8;                  // of 8 rows of x
constexpr int64_t kEnough = 512;               // CTAs that occupy any GPU
constexpr int64_t kLeastSteps = 8;             // of a split

struct Fp8Shape {
  int64_t tiles, splits, chunks;  // tiles of the weights, splits of the inner dimension, rows of x
  int64_t steps;                  // of a split

  static Fp8Shape of(const Fp8LinearArgs& args) {
    Fp8Shape shape;
    shape.tiles = (args.out_width + kTileRows - 1) / kTileRows;
    shape.chunks = (args.count + 8 * kMostTiles - 1) / (8 * kMostTiles);
    const int64_t all = args.in / kStep, tiles = shape.tiles > 0 ? shape.tiles : 1;
    const int64_t wanted = (kEnough + tiles - 1) / tiles;
    const int64_t most = all >= kLeastSteps ? all / kLeastSteps : 1;
    const int64_t splits = wanted < most ? wanted : most;
    shape.steps = all > 0 ? (all + splits - 1) / splits : 1;
    shape.splits = (all + shape.steps - 1) / shape.steps;
    return shape;
  }
};

template <class T>
__device__ __forceinline__ void write_sum(const Fp8LinearArgs& args, int64_t n, int64_t row,
                                          float sum) {
  using Storage = typename T::Storage;
  float value = args.scale[row] * sum;
  if (args.bias != nullptr) value += T::value(static_cast<const Storage*>(args.bias)[row]);
  static_cast<Storage*>(args.out)[n * args.out_width + row] = T::narrow(value);
}

// kTiles: of 8 rows of x, those of the largest chunk.
template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads)
    fp8_linear_tensor_kernel(Fp8LinearArgs args, Fp8Shape shape, float* scratch,
                             int32_t* counters) {
  using Storage = typename T::Storage;
  constexpr int kWords = 4;  // of 4 weights, in 16 bytes
  const int64_t split = blockIdx.x % shape.splits, unit = blockIdx.x / shape.splits;
  const int64_t tile = unit % shape.tiles, n0 = unit / shape.tiles * 8 * kMostTiles;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const int64_t row = tile * kTileRows + warp * kWarpRows + g;  // and row + 8
  const int64_t last_row = args.out_width - 1;
  const int64_t first = split * shape.steps, all = args.in / kStep;
  const int64_t end = first + shape.steps < all ? first + shape.steps : all;

  const uint8_t* weight[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t own = row + 8 * half < last_row ? row + 8 * half : last_row;
    weight[half] = args.weight + own * args.in + 16 * q;
  }
  const auto load = [&](int half, int64_t step) {
    return __ldcs(reinterpret_cast<const uint4*>(weight[half] + step * kStep));
  };
  const auto* x = static_cast<const Storage*>(args.x) + 16 * q;

  float sums[kTiles][4] = {};
  uint4 next[2] = {load(0, first), load(1, first)};
  for (int64_t step = first; step < end; ++step) {
    uint32_t bytes[2][kWords], a[kWords][4];
    memcpy(bytes, next, sizeof bytes);
    if (step + 1 < end) {
      next[0] = load(0, step + 1);
      next[1] = load(1, step + 1);
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      widen_e4m3<T>(bytes[0][i], a[i][0], a[i][2]);
      widen_e4m3<T>(bytes[1][i], a[i][1], a[i][3]);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t n = n0 + 8 * t + g;
      uint4 numbers[2] = {};
      if (n < args.count) {
        const auto* from = reinterpret_cast<const uint4*>(x + n * args.x_stride + step * kStep);
        numbers[0] = from[0];
        numbers[1] = from[1];
      }
      uint32_t b[2 * kWords];
      memcpy(b, numbers, sizeof b);
#pragma unroll
      for (int i = 0; i < kWords; ++i) mma<T>(sums[t], a[i], b[2 * i], b[2 * i + 1]);
    }
  }

  // sums[t][i]: of row or, for i >= 2, row + 8; of x's row 8 t + 2 q + i % 2 of the chunk.
  if (shape.splits == 1) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t n = n0 + 8 * t + 2 * q + i % 2, own = row + 8 * (i / 2);
        if (n < args.count && own <= last_row) write_sum<T>(args, n, own, sums[t][i]);
      }
    return;
  }
  constexpr int kPart = 8 * kTiles * kTileRows;
  float* parts = scratch + unit * shape.splits * kPart;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      parts[split * kPart + (8 * t + 2 * q + i % 2) * kTileRows + warp * kWarpRows + g +
            8 * (i / 2)] = sums[t][i];
  if (!last_to_arrive(counters + unit, shape.splits)) return;
  for (int at = threadIdx.x; at < kPart; at += kThreads) {
    const int64_t n = n0 + at / kTileRows, own = tile * kTileRows + at % kTileRows;
    if (n >= args.count || own > last_row) continue;
    float sum = 0.0f;
    for (int64_t s = 0; s < shape.splits; ++s) sum += __ldcg(parts + s * kPart + at);
    write_sum<T>(args, n, own, sum);
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
      if (lane == 0 && n + j < args.count) write_sum<T>(args, n + j, row, sums[j]);
    }
  }
}

bool on_tensor_cores(const Fp8LinearArgs& args) {
  return args.dtype != DType::float32 && args.in > 0 && args.in % kStep == 0 &&
         multiples_of_16({args.x, args.weight}, {args.x_stride}, element_size(args.dtype));
}

// Tiles of 8 rows of x that a CTA holds: 1, 2, 4 or 8.
int tiles_of_x(const Fp8LinearArgs& args) {
  const int64_t tiles = (args.count + 7) / 8;
  return tiles > 4 ? 8 : tiles > 2 ? 4 : static_cast<int>(tiles);
}

}  // namespace

int64_t fp8_linear_scratch(const Fp8LinearArgs& args) {
  if (!on_tensor_cores(args)) return 0;
  const Fp8Shape shape = Fp8Shape::of(args);
  const int64_t part = 8 * tiles_of_x(args) * kTileRows * static_cast<int64_t>(sizeof(float));
  return shape.splits > 1 ? shape.chunks * shape.tiles * shape.splits * part : 0;
}

int64_t fp8_linear_counters(const Fp8LinearArgs& args) {
  const Fp8Shape shape = Fp8Shape::of(args);
  return shape.chunks * shape.tiles;
}

int fp8_linear(const Fp8LinearArgs& args, const Workspace& workspace, void* stream) {
  if (args.count == 0 || args.out_width == 0) return 0;
  const Fp8Shape shape = Fp8Shape::of(args);
  auto* scratch = static_cast<float*>(workspace.scratch);
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(typename T::Storage) == 2)
      if (on_tensor_cores(args)) {
        const auto grid = static_cast<unsigned>(shape.chunks * shape.tiles * shape.splits);
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

}  // namespace dparallel::cuda
