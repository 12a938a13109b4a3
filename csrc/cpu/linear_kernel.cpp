// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "linear_kernel.h"

#include "product_tile.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

template <class T>
struct Factors {
  using Storage = typename T::Storage;

  const LinearArgs& args;
  const float* x;

  const Storage* weights(int64_t row, int64_t) const {
    return static_cast<const Storage*>(args.weight) + row * args.in;
  }
  void tile(int64_t n, int64_t height, const Storage* const (&weights)[kTileWeights],
            Sums& sums) const {
    const float* widened = x + n * widened_width<Weights<T>>(args.in);
    tile_of<Weights<T>>(height, widened, weights, args.in, sums);
  }
  float finished(int64_t, int64_t, float sum) const { return sum; }
};

// Each step of a row is a pair of vectors as T::widen gives them, with zeros at the end.
template <class T>
void widen(const LinearArgs& args, int64_t first, int64_t count, float* widened) {
  const auto* x = static_cast<const typename T::Storage*>(args.x) + first * args.x_stride;
  for (int64_t n = 0; n < count; ++n, x += args.x_stride)
    for (int64_t k = 0; k < args.in; k += kStep, widened += kStep)
      Float32::narrow(load_step<T>(x + k, args.in - k), widened);
}

template <class T>
void rows(const LinearArgs& args, const float* x, int64_t first, int64_t count, int64_t begin,
          int64_t end) {
  product_rows<T>(args, first, count, begin, end, Factors<T>{args, x});
}

}  // namespace

const ProductKernel linear_kernel{widened_width<Weights<Float32>>,
                                  {widen<Float32>, widen<BFloat16>, widen<Float16>},
                                  {rows<Float32>, rows<BFloat16>, rows<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
