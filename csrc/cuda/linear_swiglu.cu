// linear_swiglu: a product (product.cuh) of which each thread makes gates and ups into outputs.
//
// Bytes: those of the product, and half of its output. In a layer it stands for two launches; what
// it saves is the second's latency, some 2 us a layer where the product takes 50: a guess, not
// measured.
#include "product.cuh"

#include "dparallel/linear_steps.h"
#include "layer_math.cuh"

namespace dparallel::cuda {
namespace {

struct Gated {
  static constexpr bool kPaired = true;
  static constexpr int kSlabs = 1;
  struct Ahead {};
  Pairs pairs;

  __device__ __forceinline__ void keep(int64_t, int) const {}
  __device__ __forceinline__ Ahead ahead(int, int64_t) const { return {}; }
  // sum: two gates, and their ups.
  template <class T>
  __device__ __forceinline__ void put(const LinearArgs& args, int64_t first_n, int n, int64_t row,
                                      int, const float (&sum)[4], Ahead) const {
    float gate[2], up[2];
    T::values(T::narrow(sum[0], sum[1]), gate[0], gate[1]);
    T::values(T::narrow(sum[2], sum[3]), up[0], up[1]);
    T::values(T::narrow(silu<T>(gate[0]), silu<T>(gate[1])), gate[0], gate[1]);
    auto* to = static_cast<typename T::Storage*>(args.out) + (first_n + n) * pairs.half + row;
    *reinterpret_cast<uint32_t*>(to) = T::narrow(up[0] * gate[0], up[1] * gate[1]);
  }
};

ProductCut cut_for(const LinearArgs& args) { return cut_of_pairs<Gated>(args, args.out_width / 2); }

}  // namespace

int64_t linear_swiglu_scratch(const LinearArgs& args) {
  return cut_for(args).height > 0 ? 0 : LinearSwigluSteps::scratch(args);
}

int linear_swiglu(const LinearArgs& args, const Workspace& workspace, void* stream) {
  if (const ProductCut cut = cut_for(args); cut.height > 0)
    return product_of_pairs(args, Gated{{static_cast<int32_t>(args.out_width / 2)}}, cut, stream);
  const LinearSwigluSteps steps(args, workspace.scratch);
  const int code = (args.scale != nullptr ? fp8_linear : linear)(steps.product, stream);
  return code != 0 ? code : swiglu(steps.swiglu, stream);
}

}  // namespace dparallel::cuda
