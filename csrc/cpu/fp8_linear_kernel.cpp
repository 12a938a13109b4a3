// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "fp8_linear_kernel.h"

#include "product_tile.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// In the order of columns, as the weights.
template <class T>
void widen(const LinearArgs& args, int64_t first, int64_t count, float* widened) {
  const auto* x = static_cast<const typename T::Storage*>(args.x) + first * args.x_stride;
  for (int64_t n = 0; n < count; ++n, x += args.x_stride, widened += widened_width(args.in)) {
    for (int64_t k = 0; k < args.in; ++k) widened[k] = T::value(x[k]);
    for (int64_t k = args.in; k < widened_width(args.in); ++k) widened[k] = 0.0f;
  }
}

template <class T>
void rows(const LinearArgs& args, const float* x, int64_t first, int64_t count, int64_t begin,
          int64_t end) {
  const auto* weight = static_cast<const uint8_t*>(args.weight);
  const std::unique_ptr<float[]> wide(new float[kTileWeights * args.in]);
  product_rows<Float32, T>(
      args, x, first, count, begin, end,
      [&](int64_t row, int64_t place) {
        float* out = wide.get() + place * args.in;
        for (int64_t k = 0; k < args.in; ++k) out[k] = e4m3_value(weight[row * args.in + k]);
        return out;
      },
      [&](int64_t row, float sum) { return args.scale[row] * sum; });
}

template <class T>
void widened(const Fp8WidenArgs& args, int64_t begin, int64_t end) {
  auto* out = static_cast<typename T::Storage*>(args.out);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = row * args.in; i < (row + 1) * args.in; ++i)
      out[i] = T::narrowed(args.scale[row] * e4m3_value(args.weight[i]));
}

}  // namespace

const Fp8LinearKernel fp8_linear_kernel{{widened_width,
                                         {widen<Float32>, widen<BFloat16>, widen<Float16>},
                                         {rows<Float32>, rows<BFloat16>, rows<Float16>}},
                                        {widened<Float32>, widened<BFloat16>, widened<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
