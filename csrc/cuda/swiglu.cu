// swiglu: a thread takes one vector of a row's gate and the same of its up, a block 256 of them.
//
// Bytes: 3 of the dtype for each element. Instructions: about 12 an element of 16 bits, where
// memory leaves time for 30 (H200). One vector a thread and 8 blocks on an SM, with 64 KB in flight
// there, are a guess, not measured against others.
#include "cluster.cuh"
#include "layer_math.cuh"
#include "vectors.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kSwigluThreads = 256;

// `tiles`: of kSwigluThreads vectors, in a row.
template <class T, int W>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_kernel(SwigluArgs args, uint32_t tiles) {
  using Storage = typename T::Storage;
  using E = Elements<T, W>;
  wait_for_earlier();
  const uint32_t row = blockIdx.x / tiles, tile = blockIdx.x - row * tiles;
  const int64_t at = static_cast<int64_t>(tile * kSwigluThreads + threadIdx.x) * W;
  if (at >= args.width) return;
  const auto* from = static_cast<const Storage*>(args.gate) + offset_of(args.gate_rows, row) + at;
  const auto* other = static_cast<const Storage*>(args.up) + offset_of(args.up_rows, row) + at;
  const auto stored_gate = E::load_once(from), stored_up = E::load_once(other);
  float gate[W], up[W];
  E::widen(stored_gate, gate);
  E::widen(stored_up, up);
#pragma unroll
  for (int i = 0; i < W; ++i) gate[i] = silu<T>(gate[i]);
  E::round(gate);
#pragma unroll
  for (int i = 0; i < W; ++i) up[i] *= gate[i];
  E::store(static_cast<Storage*>(args.out) + row * args.width + at, E::narrow(up));
}

template <class T, int W>
int launch(const SwigluArgs& args, void* stream) {
  const int64_t tiles = (args.width / W + kSwigluThreads - 1) / kSwigluThreads;
  return DPARALLEL_LAUNCH_EARLY((swiglu_kernel<T, W>), args.count * tiles, kSwigluThreads, stream,
                                args, static_cast<uint32_t>(tiles));
}

}  // namespace

int swiglu(const SwigluArgs& args, void* stream) {
  if (args.count == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const RowStrides &g = args.gate_rows, &u = args.up_rows;
    const bool vectors =
        multiples_of_16({args.gate, args.up, args.out},
                        {args.width, g.outer, g.inner, u.outer, u.inner}, element_size(args.dtype));
    return vectors ? launch<T, T::kWidth>(args, stream) : launch<T, 1>(args, stream);
  });
}

}  // namespace dparallel::cuda
