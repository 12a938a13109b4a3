// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "fp8_linear_kernel.h"

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

constexpr int64_t kGroup = 64;  // the rows of x for which a weight is read once
constexpr int64_t kDepth = 2048;

inline float narrowed(Float32, float v) { return v; }
inline uint16_t narrowed(BFloat16, float v) { return bfloat16_bits(v); }
inline uint16_t narrowed(Float16, float v) { return float16_bits(v); }

// Adds up the products of `count` rows of x; each sum has the same order, whatever `count` is.
template <class T>
void rows(const Fp8LinearArgs& args, int64_t begin, int64_t end) {
  using Storage = typename T::Storage;
  Storage exact[256], weight[kDepth];
  for (int bits = 0; bits < 256; ++bits)
    exact[bits] = narrowed(T{}, e4m3_value(static_cast<uint8_t>(bits)));
  const auto* x = static_cast<const Storage*>(args.x);
  const auto* weights = static_cast<const uint8_t*>(args.weight);
  const auto* bias = static_cast<const Storage*>(args.bias);
  auto* out = static_cast<Storage*>(args.out);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t n = 0; n < args.count; n += kGroup) {
      const int64_t group = args.count - n < kGroup ? args.count - n : kGroup;
      float sums[kGroup] = {};
      for (int64_t k = 0; k < args.in; k += kDepth) {
        const int64_t depth = args.in - k < kDepth ? args.in - k : kDepth;
        for (int64_t i = 0; i < depth; ++i) weight[i] = exact[weights[row * args.in + k + i]];
        for (int64_t j = 0; j < group; ++j) {
          const Storage* own = x + (n + j) * args.x_stride + k;
          F first = splat(0.0f), second = first;
          for (int64_t i = 0; i < depth; i += kStep) {
            const Pair w = load_step<T>(weight + i, depth - i);
            const Pair v = load_step<T>(own + i, depth - i);
            first += w.first * v.first;
            second += w.second * v.second;
          }
          sums[j] += reduce_add(first + second);
        }
      }
      const float added = bias == nullptr ? 0.0f : T::value(bias[row]);
      for (int64_t j = 0; j < group; ++j)
        out[(n + j) * args.out_width + row] = narrowed(T{}, args.scale[row] * sums[j] + added);
    }
}

template <class T>
void widened(const Fp8WidenArgs& args, int64_t begin, int64_t end) {
  float exact[256];
  for (int bits = 0; bits < 256; ++bits) exact[bits] = e4m3_value(static_cast<uint8_t>(bits));
  auto* out = static_cast<typename T::Storage*>(args.out);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = row * args.in; i < (row + 1) * args.in; ++i)
      out[i] = narrowed(T{}, args.scale[row] * exact[args.weight[i]]);
}

}  // namespace

extern const Fp8LinearKernel fp8_linear_kernel;
const Fp8LinearKernel fp8_linear_kernel{{rows<Float32>, rows<BFloat16>, rows<Float16>},
                                        {widened<Float32>, widened<BFloat16>, widened<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
