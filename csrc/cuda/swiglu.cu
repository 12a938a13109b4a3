// swiglu: one thread, one vector of W elements.
#include "device.cuh"
#include "dparallel/launch.h"
#include "vectors.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kSwigluThreads = 256;

// `units`: vectors in a row.
template <class T, int W>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_kernel(SwigluArgs args, int64_t units) {
  using Storage = typename T::Storage;
  using E = Elements<T, W>;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kSwigluThreads + threadIdx.x;
  const int64_t row = item / units, at = item % units * W;
  if (row >= args.count) return;
  float gate[W], up[W];
  E::load(static_cast<const Storage*>(args.gate) + args.gate_rows.offset(row) + at, gate);
  E::load(static_cast<const Storage*>(args.up) + args.up_rows.offset(row) + at, up);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const float silu = gate[i] / (1.0f + expf(-gate[i]));
    up[i] *= T::value(T::narrow(silu));
  }
  E::store(static_cast<Storage*>(args.out) + row * args.width + at, up);
}

}  // namespace

int swiglu(const SwigluArgs& args, void* stream) {
  if (args.count == 0) return 0;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int W = T::kWidth;
    const RowStrides &g = args.gate_rows, &u = args.up_rows;
    const bool vectors =
        multiples_of_16({args.gate, args.up, args.out},
                        {args.width, g.outer, g.inner, u.outer, u.inner}, element_size(args.dtype));
    const int64_t units = vectors ? args.width / W : args.width;
    const auto grid =
        static_cast<unsigned>((args.count * units + kSwigluThreads - 1) / kSwigluThreads);
    if (vectors) DPARALLEL_LAUNCH((swiglu_kernel<T, W>), grid, kSwigluThreads, stream, args, units);
    else DPARALLEL_LAUNCH((swiglu_kernel<T, 1>), grid, kSwigluThreads, stream, args, units);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
