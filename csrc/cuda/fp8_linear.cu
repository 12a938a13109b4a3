// fp8_linear: a product that reads its weights once, as bytes (product.cuh). And fp8_widen: the
// same weights in 16 or 32 bits, for products of so many rows that reading weights is no longer
// their limit.
//
// Work: 32 rows of x through a layer of LLaDA-8B, 4096 -> 12288, read 50 MB of weights, 0.25 MB of
// x, and write 0.75 MB; 3.2 GFLOP. A byte becomes 16 bits, exactly, by two instructions a byte.
// Measured on an H200 from a graph: 20.5 us, where the bytes take 11.8 us and the library's product
// with weights in bfloat16 takes 29.1 us.
#include "product.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kThreads = kProductThreads;

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

int fp8_linear(const LinearArgs& args, void* stream) { return product<EightBits>(args, stream); }

int fp8_widen(const Fp8WidenArgs& args, void* stream) {
  if (args.out_width == 0 || args.in == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto kernel, int each) {
      const int64_t per_row = (args.in + 2 * each * kThreads - 1) / (2 * each * kThreads);
      DPARALLEL_LAUNCH(kernel, args.out_width * per_row, kThreads, stream, args,
                       static_cast<unsigned>(per_row));
      return static_cast<int>(cudaGetLastError());
    };
    if constexpr (sizeof(typename T::Storage) == 2)
      if (multiples_of_16({args.weight, args.out}, {args.in}, 1))
        return launch(fp8_widen_kernel<T, 8>, 8);
    return launch(fp8_widen_kernel<T, 1>, 1);
  });
}

}  // namespace dparallel::cuda
