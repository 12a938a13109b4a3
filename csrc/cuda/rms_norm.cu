// rms_norm: a warp per row, or all of a block's where rows are long and few warps would wait for
// memory.
//
// Bytes: x read and out written, and with a residual delta read and the sum written: 4 of the dtype
// for each element at most. A thread requests all of its vectors of x, delta and weight at once and
// keeps them in registers, so that a row of few numbers costs one trip to memory, the sum over the
// threads and the store. Only rows longer than kKept vectors a thread are read again, from the
// cache. x, the sum and the weight stay in the caches for the next kernel; delta is not needed
// again.
//
// Rows are long from 1025 numbers on: a guess, as is kKept; neither is measured against others.
#include "cluster.cuh"
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
  using Vector = typename E::Vector;
  // Vectors of a row that a thread keeps: in a block, 4096 numbers of 16 bits. More would cost
  // registers, and with them blocks on an SM; not measured against others.
  constexpr int kKept = W == 1 ? 4 : 2;
  DPARALLEL_SHARED(squares, float[kNormWarps]);
  wait_for_earlier();
  const int warp = static_cast<int>(threadIdx.x) / 32, team = warp / Warps * Warps;
  const uint32_t row = blockIdx.x * (kNormWarps / Warps) + warp / Warps;
  const bool here = row < args.count;  // every thread comes to the barrier
  const int width = here ? static_cast<int>(args.width) : 0;
  const int first = (static_cast<int>(threadIdx.x) - 32 * team) * W;
  constexpr int kStep = 32 * Warps * W;
  const auto* x = static_cast<const Storage*>(args.x) + offset_of(args.x_rows, row);
  const auto* delta = static_cast<const Storage*>(args.delta);
  const auto* weight = static_cast<const Storage*>(args.weight);
  const auto* bias = static_cast<const Storage*>(args.bias);
  auto* to = static_cast<Storage*>(args.sum) + row * args.width;
  auto* out = static_cast<Storage*>(args.out) + row * args.width;
  if (delta != nullptr) delta += offset_of(args.delta_rows, row);

  Vector kept[kKept], scales[kKept];  // of s = x + delta, and of the weight
#pragma unroll
  for (int n = 0; n < kKept; ++n)
    if (first + n * kStep < width) kept[n] = E::load(x + first + n * kStep);
  Vector added[kKept];
  if (delta != nullptr) {
#pragma unroll
    for (int n = 0; n < kKept; ++n)
      if (first + n * kStep < width) added[n] = E::load_once(delta + first + n * kStep);
  }
#pragma unroll
  for (int n = 0; n < kKept; ++n)
    if (first + n * kStep < width) scales[n] = E::load(weight + first + n * kStep);

  float sum = 0.0f;
  // The vector `s` at i, after the residual, into the sum.
  const auto square = [&](Vector& s, const Vector& other, int i) {
    float v[W];
    E::widen(s, v);
    if (delta != nullptr) {
      float d[W];
      E::widen(other, d);
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] += d[j];
      s = E::narrow(v);
      E::widen(s, v);
      E::store(to + i, s);
    }
#pragma unroll
    for (int j = 0; j < W; ++j) sum += v[j] * v[j];
  };
#pragma unroll
  for (int n = 0; n < kKept; ++n)
    if (first + n * kStep < width) square(kept[n], added[n], first + n * kStep);
#pragma unroll 1
  for (int i = first + kKept * kStep; i < width; i += kStep) {
    Vector s = E::load(x + i), other = s;
    if (delta != nullptr) other = E::load_once(delta + i);
    square(s, other, i);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    sum += from_bits(__shfl_down_sync(kFullWarp, to_bits(sum), offset));
  if (threadIdx.x % 32 == 0) squares[warp] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < Warps; ++w) sum += squares[team + w];

  const float scale = __frsqrt_rn(__fdividef(sum, static_cast<float>(args.width)) + args.eps);
  const auto finish = [&](const Vector& s, const Vector& of_weight, int i) {
    float v[W], w[W];
    E::widen(s, v);
    E::widen(of_weight, w);
#pragma unroll
    for (int j = 0; j < W; ++j) v[j] *= scale;
    E::round(v);
#pragma unroll
    for (int j = 0; j < W; ++j) v[j] *= w[j];
    if (bias != nullptr) {
      E::widen(E::load(bias + i), w);
      E::round(v);
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] += w[j];
    }
    E::store(out + i, E::narrow(v));
  };
#pragma unroll
  for (int n = 0; n < kKept; ++n)
    if (first + n * kStep < width) finish(kept[n], scales[n], first + n * kStep);
  const auto* again = delta != nullptr ? to : x;  // each thread reads its own writes
#pragma unroll 1
  for (int i = first + kKept * kStep; i < width; i += kStep)
    finish(E::load(again + i), E::load(weight + i), i);
}

template <class T, int W>
int launch(const RmsNormArgs& args, void* stream) {
  const bool wide = args.width > kLongRow;
  const int64_t rows = wide ? 1 : kNormWarps;
  const int64_t grid = (args.count + rows - 1) / rows;
  if (wide)
    return DPARALLEL_LAUNCH_EARLY((rms_norm_kernel<T, W, kNormWarps>), grid, kNormThreads, stream,
                                  args);
  return DPARALLEL_LAUNCH_EARLY((rms_norm_kernel<T, W, 1>), grid, kNormThreads, stream, args);
}

}  // namespace

int rms_norm(const RmsNormArgs& args, void* stream) {
  if (args.count == 0) return 0;
  if (args.count > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);  // see offset_of
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const RowStrides &x = args.x_rows, &d = args.delta_rows;
    const bool vectors =
        multiples_of_16({args.x, args.delta, args.weight, args.bias, args.sum, args.out},
                        {args.width, x.outer, x.inner, d.outer, d.inner}, element_size(args.dtype));
    return vectors ? launch<T, T::kWidth>(args, stream) : launch<T, 1>(args, stream);
  });
}

}  // namespace dparallel::cuda
