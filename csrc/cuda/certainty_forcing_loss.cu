// certainty_forcing_loss: forward, a block sums a chunk of a row, then a warp merges the chunks of
// a row; backward, a block writes the gradient of a chunk. Rows that are not active cost a block
// that leaves at once (forward) or writes zeros (backward).
//
// Bytes: each logit is read once forward; read once and its gradient written once backward. That is
// 3.1 GB for 4096 rows of 126464 bfloat16 numbers: 0.7 ms at the 4.3 TB/s of an H200.
//
// Forward, a thread requests its 8 vectors of a chunk at once and keeps them, as stored, in 32
// registers. The block finds the chunk's maximum m, and only then are the exponentials summed: no
// sum is ever rescaled. Left for each number are its widening, one multiplication and addition, the
// floor that keeps -inf from 0 * inf, the exponential, its square and three additions. With all
// else, a bfloat16 number costs 12 instructions, 7.9 of them for the sums, where an H200's memory
// leaves time for 14 to 15. The own term of the maximum is left out of the sums (see LossPart), by
// the one thread that holds it.
//
// Exponents are in units of the device's exponential, log2 for float32: x = c z - r in one
// instruction, with c = log2(e) / Tc. The reference r is c m rounded, so that the own term is not 1
// but 2^(c m - r); thread 0 mends that at the end. Where m is so large that r is off by more than
// 1, as in a chunk of ids that are masked by -1e9 or so, x = c (z - m), in a loop of its own.
//
// Backward, 4 vectors are in flight, and a thread's chunk takes 4 rounds, at 13 instructions a
// number, 11.7 of them in the loop, where memory leaves time for 27. The label's number is written
// like the others, and once more, with the label's share, after the rounds.
//
// Measured on an H200, with the host's part of the launches: forward and backward of 4096 rows take
// 1.07 ms, and in another run 1.19 ms, 69 and 61 % of the bandwidth. Guesses, not measured against
// others: 8 vectors and 4 blocks on an SM forward; 16 vectors, 4 of them in flight, and 4 blocks
// backward; 256 threads.
#include "loss.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kVectors = 8;  // of a chunk, for each thread, all at once
constexpr int kBackwardVectors = 16;
constexpr int kInFlight = 4;       // of them at once
constexpr int kForwardBlocks = 4;  // on an SM, at least
constexpr int kBackwardBlocks = 4;

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

template <class R>
struct Exponents {
  InverseTemperatures<R> inverse;
  R scale;       // c: x = c d is the exponent of the cross entropy's term
  R ratio;       // Tc / T: ratio x is that of the entropy's
  R floor;       // of x: both exponentials are 0 there
  R depth;       // of d
  R apart;       // the most that r may be off
  bool squared;  // the entropy's term is the square of the other's: Tc = 2 T

  static Exponents of(double ce_temperature, double temperature) {
    Exponents e;
    e.inverse = {static_cast<R>(1 / ce_temperature), static_cast<R>(1 / temperature)};
    e.scale = units(e.inverse.ce);
    e.ratio = static_cast<R>(ce_temperature / temperature);
    e.floor = R(-1000) * (e.ratio < R(1) ? R(1) / e.ratio : R(1));
    e.depth = e.floor / e.scale;
    e.apart = R(1) / (e.ratio > R(1) ? e.ratio : R(1));
    e.squared = e.inverse.entropy == 2 * e.inverse.ce;
    return e;
  }
  // The entropy's term, of e = the other and x, its exponent.
  template <bool kSquared>
  __device__ __forceinline__ R entropy_term(R e, R x) const {
    return kSquared ? e * e : in_units(ratio * x);
  }
};

template <class R>
struct LossSums {
  R s, t, w;  // of e^(d/Tc), e^(d/T), and e^(d/T) times the exponent of e^(d/Tc)

  template <bool kSquared, int W>
  __device__ __forceinline__ void add(const R (&z)[W], R reference, const Exponents<R>& exponents) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const R x = floored(multiply_add(z[i], exponents.scale, -reference), exponents.floor);
      const R e = in_units(x), own = exponents.template entropy_term<kSquared>(e, x);
      s += e;
      t += own;
      w = multiply_add(own, x, w);
    }
  }
};

template <class T, int kAtOnce>
__global__ void __launch_bounds__(kThreads, T::kWidth > 2 ? kForwardBlocks : 1)
    loss_sums_kernel(LossArgs args, LossPart<typename T::Real>* parts, uint32_t chunks,
                     Exponents<typename T::Real> exponents) {
  using R = typename T::Real;
  constexpr int W = T::kWidth;
  DPARALLEL_SHARED(tops, R[kWarps]);
  DPARALLEL_SHARED(sums, LossSums<R>[kWarps]);
  DPARALLEL_SHARED(owners, int32_t);  // threads that hold the chunk's maximum
  DPARALLEL_SHARED(token, int32_t);   // its lowest id
  using Own = Chunk<T, kVectors>;
  const Own chunk(chunks, args.logits.vocab);
  if (!args.active[chunk.row]) return;
  const auto* z = chunk.logits(args.logits);
  constexpr int kStep = Own::kStep;
  const int first = chunk.first(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    owners = 0;
    token = INT32_MAX;
  }

  const uint4 nothing = all_of<T>(T::kMinusInfinity);
  uint4 stored[kVectors];
  chunk.template load<kAtOnce>(z, stored);

  const R own_top = largest<T, kVectors>(stored);
  R top = own_top;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    top = larger(top, __shfl_xor_sync(kFullWarp, top, offset));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = larger(top, tops[w]);

  const bool empty = top == R(-kInfinity);  // but for NaN
  const R reference = empty ? R(0) : top * exponents.scale;
  R apart = empty ? R(0) : multiply_add(top, exponents.scale, -reference);  // the own exponent
  const bool near = -exponents.apart <= apart && apart <= exponents.apart;
  bool owner = own_top == top && !empty;
  LossSums<R> sum{};
  int32_t own_token = 0;
  if (near) {
    int own = kVectors;
    uint4 held = nothing;
    if (owner) {  // the maximum's vector comes last, without its first
#pragma unroll
      for (int k = kVectors - 1; k >= 0; --k)
        if (largest<T, 1>(stored + k) == top) own = k;
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        if (k == own) {
          held = stored[k];
          stored[k] = nothing;
        }
    }
    const auto add = [&](auto squared) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        R values[W];
        widen<T>(stored[k], values);
        sum.template add<decltype(squared)::value>(values, reference, exponents);
      }
      if (owner) {
        R values[W];
        widen<T>(held, values);
        int at = W;
#pragma unroll
        for (int i = W - 1; i >= 0; --i)
          if (values[i] == top) at = i;
#pragma unroll
        for (int i = 0; i < W; ++i)
          if (i == at) values[i] = -kInfinity;
        own_token = static_cast<int32_t>(chunk.begin) + first + own * kStep + at;
        sum.template add<decltype(squared)::value>(values, reference, exponents);
      }
    };
    if (exponents.squared) add(std::true_type{});
    else add(std::false_type{});
  } else {
    top = clamped(top);
    apart = R(0);
    own_token = -1;
#pragma unroll 1
    for (int i = first; i < chunk.count; i += (i + 1) % W ? 1 : kStep - W + 1) {
      const R value = clamped(static_cast<R>(T::value(z[i])));
      const R below[1] = {value - top};
      if (value == top && own_token < 0) own_token = static_cast<int32_t>(chunk.begin) + i;
      else sum.template add<false>(below, R(0), exponents);
    }
    owner = own_token >= 0;
  }
  if (owner) {
    atomicAdd(&owners, 1);
    atomicMin(&token, own_token);
  }

  const auto add_all = [&](int most) {  // of lanes 0 ... 2 most - 1
    for (int offset = most; offset > 0; offset /= 2) {
      sum.s += __shfl_xor_sync(kFullWarp, sum.s, offset);
      sum.t += __shfl_xor_sync(kFullWarp, sum.t, offset);
      sum.w += __shfl_xor_sync(kFullWarp, sum.w, offset);
    }
  };
  add_all(16);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (warp != 0) return;
  sum = sums[lane % kWarps];
  add_all(kWarps / 2);
  if (lane != 0) return;
  LossPart<R> part;
  part.sum = sum.s;
  if (!empty) {
    const R mend = in_units(-apart * exponents.ratio), others = static_cast<R>(owners - 1);
    part.max = clamped(top);
    part.token = token;
    part.sum = others + sum.s * in_units(-apart);
    part.sum_t = others + sum.t * mend;
    part.weighted_t = (sum.w - apart * sum.t) * mend / exponents.scale;
  }
  parts[blockIdx.x] = part;
}

// A warp merges the parts of a row, in the order of the chunks.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    loss_rows_kernel(LossArgs args, const LossPart<typename T::Real>* parts, uint32_t chunks,
                     InverseTemperatures<typename T::Real> inverse) {
  using R = typename T::Real;
  const uint32_t row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= args.count) return;
  LossRow<R> result{};
  RowError error = kRowOk;
  if (args.active[row]) {
    const int64_t label = args.labels[row];
    const bool known = label >= 0 && label < args.logits.vocab;
    const RowStrides rows{args.logits.inner_rows, args.logits.outer_stride,
                          args.logits.inner_stride};
    const auto* z =
        static_cast<const typename T::Storage*>(args.logits.data) + offset_of(rows, row);
    const R of_label = known ? clamped(static_cast<R>(T::value(z[label]))) : R(0);
    const auto part = merge_row(parts, row, chunks,
                                [&](auto& all, const auto& other) { all.merge(other, inverse); });
    error = known ? part.error() : kRowLabel;
    if (error == kRowOk) result = part.finish(of_label, label, inverse);
    else result.nll = result.entropy = static_cast<R>(from_bits(0x7fc00000u));  // NaN
  }
  if (lane != 0) return;
  static_cast<R*>(args.nll)[row] = result.nll;
  static_cast<R*>(args.entropy)[row] = result.entropy;
  args.correct[row] = result.correct;
  for (int s = 0; s < kLossSaved; ++s)
    static_cast<R*>(args.saved)[static_cast<int64_t>(row) * kLossSaved + s] = result.saved[s];
  args.error[row] = error == kRowOk ? kNoError : encode_error(row, error);
}

template <class T, int kAtOnce>
__global__ void __launch_bounds__(kThreads, T::kWidth > 2 ? kBackwardBlocks : 1)
    loss_gradient_kernel(LossBackwardArgs args, uint32_t chunks,
                         Exponents<typename T::Real> exponents) {
  using R = typename T::Real;
  using Storage = typename T::Storage;
  using Own = Chunk<T, kBackwardVectors>;
  constexpr int W = T::kWidth, kStep = Own::kStep;
  const Own chunk(chunks, args.logits.vocab);
  const uint32_t row = chunk.row;
  const int64_t label = args.labels[row];
  const R grad_nll = static_cast<const R*>(args.grad_nll)[row];
  const R grad_entropy = static_cast<const R*>(args.grad_entropy)[row];
  const bool zero = !args.active[row] || label < 0 || label >= args.logits.vocab ||
                    (grad_nll == R(0) && grad_entropy == R(0));
  const auto* z = chunk.logits(args.logits);
  // May be z: each number is written by the thread that has read it.
  auto* out = args.grad ? static_cast<Storage*>(args.grad) + row * args.logits.vocab + chunk.begin
                        : const_cast<Storage*>(z);
  const int whole = chunk.count / W * W;
  if (zero) {
    const uint4 zeros = all_of<T>(Storage(0));
#pragma unroll 1
    for (int i = chunk.first(); i < whole; i += kStep) store_once<T, kAtOnce>(out + i, zeros);
    if (chunk.has(whole))
#pragma unroll 1
      for (int i = whole; i < chunk.count; ++i) out[i] = Storage(0);
    return;
  }
  const LossGradient<R> g(
      static_cast<const R*>(args.saved) + static_cast<int64_t>(row) * kLossSaved, grad_nll,
      grad_entropy, exponents.inverse);
  const auto write = [&](auto squared) {
    constexpr bool kSquared = decltype(squared)::value;
    const auto of = [&](R value) {
      const R d = floored(clamped(value) - g.max, exponents.depth), x = d * exponents.scale,
              e = in_units(x);
      if (kSquared) return e * multiply_add(g.entropy * e, d - g.mean, g.ce);
      return multiply_add(g.entropy * exponents.template entropy_term<false>(e, x), d - g.mean,
                          g.ce * e);
    };
    // Read before `out` is written.
    const int64_t own = label - chunk.begin;
    const bool here = own >= 0 && own < chunk.count && chunk.has(static_cast<int>(own));
    const R of_label = here ? static_cast<R>(T::value(z[own])) : R(0);
#pragma unroll 1
    for (int at = chunk.first(); at < whole; at += kInFlight * kStep) {
      uint4 stored[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k)
        if (at + k * kStep < whole) stored[k] = load_stored<T>(z + at + k * kStep, kAtOnce > 1);
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (at + k * kStep >= whole) break;
        R values[W];
        widen<T>(stored[k], values);
#pragma unroll
        for (int i = 0; i < W; ++i) values[i] = of(values[i]);
        store_once<T, kAtOnce>(out + at + k * kStep, narrow<T>(values));
      }
    }
    if (chunk.has(whole))
#pragma unroll 1
      for (int i = whole; i < chunk.count; ++i)
        out[i] = T::narrow(of(static_cast<R>(T::value(z[i]))));
    if (here) out[own] = T::narrow(g.at_label(of_label));
  };
  if (exponents.squared) write(std::true_type{});
  else write(std::false_type{});
}

}  // namespace

int64_t certainty_forcing_loss_scratch(const LossArgs& args) {
  int64_t bytes = 0;
  dispatch_wide(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    bytes = args.count * Chunk<T, kVectors>::in(args.logits.vocab) *
            static_cast<int64_t>(sizeof(LossPart<typename T::Real>));
    return 0;
  });
  return bytes;
}

int certainty_forcing_loss(const LossArgs& args, const Workspace& workspace, void* stream) {
  if (args.count == 0) return 0;
  return dispatch_wide(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    using R = typename T::Real;
    const uint32_t chunks = Chunk<T, kVectors>::in(args.logits.vocab);
    auto* parts = static_cast<LossPart<R>*>(workspace.scratch);
    const auto exponents = Exponents<R>::of(args.ce_temperature, args.temperature);
    const int64_t grid = args.count * chunks;
    if (aligned<T>(args.logits, nullptr))
      DPARALLEL_LAUNCH((loss_sums_kernel<T, kVector<T>>), grid, kThreads, stream, args, parts,
                       chunks, exponents);
    else
      DPARALLEL_LAUNCH((loss_sums_kernel<T, 1>), grid, kThreads, stream, args, parts, chunks,
                       exponents);
    const int64_t blocks = (args.count + kWarps - 1) / kWarps;
    DPARALLEL_LAUNCH(loss_rows_kernel<T>, blocks, kThreads, stream, args, parts, chunks,
                     exponents.inverse);
    return static_cast<int>(cudaGetLastError());
  });
}

int certainty_forcing_loss_backward(const LossBackwardArgs& args, void* stream) {
  if (args.count == 0) return 0;
  return dispatch_wide(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    const uint32_t chunks = Chunk<T, kBackwardVectors>::in(args.logits.vocab);
    const auto exponents = Exponents<typename T::Real>::of(args.ce_temperature, args.temperature);
    const int64_t grid = args.count * chunks;
    if (aligned<T>(args.logits, args.grad))
      DPARALLEL_LAUNCH((loss_gradient_kernel<T, kVector<T>>), grid, kThreads, stream, args, chunks,
                       exponents);
    else
      DPARALLEL_LAUNCH((loss_gradient_kernel<T, 1>), grid, kThreads, stream, args, chunks,
                       exponents);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
