// rms_norm: a warp per row, or all of a block's where rows are long and few warps would wait for
// memory. A row is read, summed over its threads and read again, from the cache.
#include "device.cuh"
#include "dparallel/launch.h"
#include "vectors.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int64_t kLongRow = 1024;  // elements: 32 for each thread of a warp

// `Warps` of the block's share a row.
template <class T, int W, int Warps>
__global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(RmsNormArgs args) {
  using Storage = typename T::Storage;
  using E = Elements<T, W>;
  DPARALLEL_SHARED(squares, float[kNormWarps]);
  const int warp = static_cast<int>(threadIdx.x) / 32, team = warp / Warps * Warps;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kNormWarps / Warps) + warp / Warps;
  const int64_t width = row < args.count ? args.width : 0;  // every thread comes to the barrier
  const int64_t first = (static_cast<int64_t>(threadIdx.x) - 32 * team) * W, step = 32 * Warps * W;
  const auto* x = static_cast<const Storage*>(args.x) + args.x_rows.offset(row);
  float sum = 0.0f;
  if (args.delta == nullptr) {
    for (int64_t i = first; i < width; i += step) {
      float v[W];
      E::load(x + i, v);
#pragma unroll
      for (int j = 0; j < W; ++j) sum += v[j] * v[j];
    }
  } else {
    const auto* delta = static_cast<const Storage*>(args.delta) + args.delta_rows.offset(row);
    auto* to = static_cast<Storage*>(args.sum) + row * args.width;
    for (int64_t i = first; i < width; i += step) {
      float v[W], d[W];
      E::load(x + i, v);
      E::load(delta + i, d);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        v[j] = T::value(T::narrow(v[j] + d[j]));
        sum += v[j] * v[j];
      }
      E::store(to + i, v);
    }
    x = to;  // each thread reads what it wrote
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    sum += from_bits(__shfl_down_sync(kFullWarp, to_bits(sum), offset));
  if (threadIdx.x % 32 == 0) squares[warp] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < Warps; ++w) sum += squares[team + w];
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(args.width) + args.eps);
  const auto* weight = static_cast<const Storage*>(args.weight);
  const auto* bias = static_cast<const Storage*>(args.bias);
  auto* out = static_cast<Storage*>(args.out) + row * args.width;
  for (int64_t i = first; i < width; i += step) {
    float v[W], w[W];
    E::load(x + i, v);
    E::load(weight + i, w);
#pragma unroll
    for (int j = 0; j < W; ++j) v[j] = w[j] * T::value(T::narrow(v[j] * scale));
    if (bias != nullptr) {
      E::load(bias + i, w);
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] = T::value(T::narrow(v[j])) + w[j];
    }
    E::store(out + i, v);
  }
}

template <class T, int W>
void launch(const RmsNormArgs& args, void* stream) {
  const bool wide = args.width > kLongRow;
  const int64_t rows = wide ? 1 : kNormWarps;
  const auto grid = static_cast<unsigned>((args.count + rows - 1) / rows);
  if (wide) DPARALLEL_LAUNCH((rms_norm_kernel<T, W, kNormWarps>), grid, kNormThreads, stream, args);
  else DPARALLEL_LAUNCH((rms_norm_kernel<T, W, 1>), grid, kNormThreads, stream, args);
}

}  // namespace

int rms_norm(const RmsNormArgs& args, void* stream) {
  if (args.count == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const RowStrides &x = args.x_rows, &d = args.delta_rows;
    const bool vectors =
        multiples_of_16({args.x, args.delta, args.weight, args.bias, args.sum, args.out},
                        {args.width, x.outer, x.inner, d.outer, d.inner}, element_size(args.dtype));
    if (vectors) launch<T, T::kWidth>(args, stream);
    else launch<T, 1>(args, stream);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
