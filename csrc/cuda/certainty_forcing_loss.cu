// certainty_forcing_loss: one block per chunk of a row sums, one thread per row merges; then the
// gradient, one block per chunk. Rows that are not active cost a block that leaves at once
// (forward) or writes zeros (backward).
#include "row_scan.cuh"

#include "dparallel/certainty_forcing_loss.h"

namespace dparallel::cuda {
namespace {

// e^x for x <= 0.
__device__ __forceinline__ float fast_exponential(float x) {
  return exp2_fast(max_nan(x, kExpFloor) * kLog2e);
}
__device__ __forceinline__ double fast_exponential(double x) { return exp(x); }

__device__ __forceinline__ float clamped(float z) { return min_nan(z, kLargest); }
__device__ __forceinline__ double clamped(double z) { return z; }

// What both passes need of a difference d = z - max: kept above the floor, but NaN kept.
template <class R>
__device__ __forceinline__ R difference(R z, R max, R floor) {
  const R d = clamped(z) - max;
  return d < floor ? floor : d;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    loss_sums_kernel(LossArgs args, LossPart<typename T::Real>* parts, int64_t chunks,
                     InverseTemperatures<typename T::Real> inverse) {
  using R = typename T::Real;
  constexpr int W = T::kWidth;
  DPARALLEL_SHARED(shared, LossPart<R>[kWarps]);
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  if (!args.active[row]) return;
  const int64_t vocab = args.logits.vocab;
  const auto* z =
      static_cast<const typename T::Storage*>(args.logits.data) + args.logits.offset(row);
  const bool aligned = reinterpret_cast<uintptr_t>(z) % 16 == 0;
  const int64_t begin = chunk * kChunk, end = begin + kChunk < vocab ? begin + kChunk : vocab;
  const R floor = inverse.floor();
  const bool squared = inverse.entropy == 2 * inverse.ce;
  LossPart<R> part;
  const auto add = [&](R(&v)[W], int64_t first_id) {
    R top = -kInfinity;
#pragma unroll
    for (int i = 0; i < W; ++i) top = clamped(v[i]) > top ? clamped(v[i]) : top;  // ignores NaN
    if (top > part.max) {
      part.give_way(top, inverse);
      int at = W;
#pragma unroll
      for (int i = W - 1; i >= 0; --i)
        if (clamped(v[i]) == top) at = i;
      part.token = static_cast<int32_t>(first_id + at);
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (i == at) v[i] = -kInfinity;  // its own term is not in the sums
    }
    const R m = part.token < 0 ? R(0) : part.max;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const R d = difference(v[i], m, floor);
      const R e = fast_exponential(d * inverse.ce);
      const R t = squared ? e * e : fast_exponential(d * inverse.entropy);
      part.sum += e;
      part.sum_t += t;
      part.weighted_t += t * d;
    }
  };
  const int64_t whole = begin + (end - begin) / W * W;
  int64_t id = begin + static_cast<int64_t>(threadIdx.x) * W;
  for (; id < whole; id += static_cast<int64_t>(kThreads) * W) {
    R values[W];
    widen<T>(load_stored<T>(z + id, aligned), values);
    add(values, id);
  }
  if (id == whole && whole < end) {
    R values[W];
#pragma unroll
    for (int i = 0; i < W; ++i)
      values[i] = whole + i < end ? static_cast<R>(T::value(z[whole + i])) : R(-kInfinity);
    add(values, whole);
  }
  part =
      merge_block(part, shared, [&](LossPart<R>& a, const LossPart<R>& b) { a.merge(b, inverse); });
  if (threadIdx.x == 0) parts[blockIdx.x] = part;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    loss_rows_kernel(LossArgs args, const LossPart<typename T::Real>* parts, int64_t chunks,
                     InverseTemperatures<typename T::Real> inverse) {
  using R = typename T::Real;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= args.count) return;
  LossRow<R> result{};
  RowError error = kRowOk;
  if (args.active[row]) {
    LossPart<R> part = parts[row * chunks];
    for (int64_t c = 1; c < chunks; ++c) part.merge(parts[row * chunks + c], inverse);
    const int64_t label = args.labels[row];
    const bool known = label >= 0 && label < args.logits.vocab;
    error = known ? part.error() : kRowLabel;
    if (error == kRowOk) {
      const auto* z =
          static_cast<const typename T::Storage*>(args.logits.data) + args.logits.offset(row);
      result = part.finish(clamped(static_cast<R>(T::value(z[label]))), label, inverse);
    } else {
      result.nll = result.entropy = static_cast<R>(from_bits(0x7fc00000u));  // NaN
    }
  }
  static_cast<R*>(args.nll)[row] = result.nll;
  static_cast<R*>(args.entropy)[row] = result.entropy;
  args.correct[row] = result.correct;
  for (int s = 0; s < kLossSaved; ++s)
    static_cast<R*>(args.saved)[row * kLossSaved + s] = result.saved[s];
  args.error[row] = error == kRowOk ? kNoError : encode_error(row, error);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    loss_gradient_kernel(LossBackwardArgs args, int64_t chunks,
                         InverseTemperatures<typename T::Real> inverse) {
  using R = typename T::Real;
  constexpr int W = T::kWidth;
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t vocab = args.logits.vocab, label = args.labels[row];
  const R grad_nll = static_cast<const R*>(args.grad_nll)[row];
  const R grad_entropy = static_cast<const R*>(args.grad_entropy)[row];
  const bool zero = !args.active[row] || label < 0 || label >= vocab ||
                    (grad_nll == R(0) && grad_entropy == R(0));
  const LossGradient<R> g(static_cast<const R*>(args.saved) + row * kLossSaved, grad_nll,
                          grad_entropy, inverse);
  const auto* z =
      static_cast<const typename T::Storage*>(args.logits.data) + args.logits.offset(row);
  // May be z: each element is written by the thread that has read it.
  auto* out = args.grad ? static_cast<typename T::Storage*>(args.grad) + row * vocab
                        : const_cast<typename T::Storage*>(z);
  const bool aligned = reinterpret_cast<uintptr_t>(z) % 16 == 0;
  const bool out_aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const int64_t begin = chunk * kChunk, end = begin + kChunk < vocab ? begin + kChunk : vocab;
  const R floor = inverse.floor();
  const bool squared = inverse.entropy == 2 * inverse.ce;
  const auto of = [&](R v, int64_t id) {
    if (zero) return R(0);
    const R d = difference(v, g.max, floor);
    const R e = fast_exponential(d * inverse.ce);
    const R t = squared ? e * e : fast_exponential(d * inverse.entropy);
    return g.ce * e + g.entropy * t * (d - g.mean) - (id == label ? g.label : R(0));
  };
  const int64_t whole = begin + (end - begin) / W * W;
  int64_t id = begin + static_cast<int64_t>(threadIdx.x) * W;
  for (; id < whole; id += static_cast<int64_t>(kThreads) * W) {
    R values[W] = {};
    if (!zero) widen<T>(load_stored<T>(z + id, aligned), values);
#pragma unroll
    for (int i = 0; i < W; ++i) values[i] = of(values[i], id + i);
    store_stored<T>(out + id, values, out_aligned);
  }
  if (id == whole)
    for (int64_t i = whole; i < end; ++i)
      out[i] = T::narrow(of(zero ? R(0) : static_cast<R>(T::value(z[i])), i));
}

// Calls body(T{}) with the element type of the logits.
template <class Body>
int dispatch_wide(DType dtype, Body body) {
  return dtype == DType::float64 ? body(Float64{}) : dispatch(dtype, body);
}

template <class Args, class R>
InverseTemperatures<R> inverse_of(const Args& args, R) {
  return {static_cast<R>(1 / args.ce_temperature), static_cast<R>(1 / args.temperature)};
}

}  // namespace

int64_t certainty_forcing_loss_scratch(const LossArgs& args) {
  const int64_t part =
      args.logits.dtype == DType::float64 ? sizeof(LossPart<double>) : sizeof(LossPart<float>);
  return args.count * chunks_of(args.logits.vocab) * part;
}

int certainty_forcing_loss(const LossArgs& args, const Workspace& workspace, void* stream) {
  if (args.count == 0) return 0;
  const int64_t chunks = chunks_of(args.logits.vocab);
  return dispatch_wide(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    using R = typename T::Real;
    auto* parts = static_cast<LossPart<R>*>(workspace.scratch);
    const auto inverse = inverse_of(args, R(0));
    DPARALLEL_LAUNCH(loss_sums_kernel<T>, static_cast<unsigned>(args.count * chunks), kThreads,
                     stream, args, parts, chunks, inverse);
    const auto blocks = static_cast<unsigned>((args.count + kThreads - 1) / kThreads);
    DPARALLEL_LAUNCH(loss_rows_kernel<T>, blocks, kThreads, stream, args, parts, chunks, inverse);
    return static_cast<int>(cudaGetLastError());
  });
}

int certainty_forcing_loss_backward(const LossBackwardArgs& args, void* stream) {
  if (args.count == 0) return 0;
  const int64_t chunks = chunks_of(args.logits.vocab);
  return dispatch_wide(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    DPARALLEL_LAUNCH(loss_gradient_kernel<T>, static_cast<unsigned>(args.count * chunks), kThreads,
                     stream, args, chunks, inverse_of(args, typename T::Real(0)));
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
