// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "rms_norm_kernel.h"

#include <cmath>

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

template <class T>
void rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  using Storage = typename T::Storage;
  const int64_t width = args.width;
  const auto* weight = static_cast<const Storage*>(args.weight);
  const auto* bias = static_cast<const Storage*>(args.bias);
  for (int64_t row = begin; row < end; ++row) {
    const auto* x = static_cast<const Storage*>(args.x) + args.x_rows.offset(row);
    if (args.delta != nullptr) {
      const auto* delta = static_cast<const Storage*>(args.delta) + args.delta_rows.offset(row);
      auto* sum = static_cast<Storage*>(args.sum) + row * width;
      for (int64_t i = 0; i < width; i += kStep) {
        const Pair a = load_step<T>(x + i, width - i), b = load_step<T>(delta + i, width - i);
        store_step<T>({a.first + b.first, a.second + b.second}, sum + i, width - i);
      }
      x = sum;
    }
    F first = splat(0.0f), second = first;
    for (int64_t i = 0; i < width; i += kStep) {
      const Pair v = load_step<T>(x + i, width - i);
      first += v.first * v.first;
      second += v.second * v.second;
    }
    const float mean = reduce_add(first + second) / static_cast<float>(width);
    const F scale = splat(1.0f / std::sqrt(mean + args.eps));
    auto* out = static_cast<Storage*>(args.out) + row * width;
    for (int64_t i = 0; i < width; i += kStep) {
      const int64_t left = width - i;
      const Pair v = load_step<T>(x + i, left), w = load_step<T>(weight + i, left);
      Pair y{w.first * T::round(v.first * scale), w.second * T::round(v.second * scale)};
      if (bias != nullptr) {
        const Pair b = load_step<T>(bias + i, left);
        y = {T::round(y.first) + b.first, T::round(y.second) + b.second};
      }
      store_step<T>(y, out + i, left);
    }
  }
}

}  // namespace

const RmsNormKernel rms_norm_kernel{{rows<Float32>, rows<BFloat16>, rows<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
