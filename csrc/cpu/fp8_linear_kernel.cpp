// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
//
// A tile of few rows of x widens its weights in registers; for many rows of x they are widened into
// memory once, and stay in a cache.
#include "fp8_linear_kernel.h"

#include "fp8_dot.h"
#include "product_tile.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// A step of e4m3 weights is a vector of 32-bit words; each of its four vectors has one byte of each
// word. NaN is widened as 480: see holds_nan.
struct E4m3 {
  using Storage = uint8_t;
  static constexpr int kVectors = 4;
  static constexpr int64_t kColumns = kVectors * kLanes;

  static F value(U upper) {  // of the upper byte of each lane; as e4m3_value
    return (F)((U)((I)upper >> 4) & 0x87f00000u) * 0x1p120f;
  }
  static U words(const Storage* p, int64_t count) {
    if (count >= kColumns) return load<U>(p);
    U padded{};
    std::memcpy(&padded, p, count);
    return padded;
  }
  static void widen(const Storage* p, int64_t count, F (&w)[kVectors]) {
    const U four = words(p, count);
    for (int i = 0; i < kVectors; ++i) w[i] = value(four << (24 - 8 * i));
  }
  // Where the vectors of a step have column k.
  static int64_t place(int64_t k) {
    const int64_t within = k % kColumns;
    return k - within + within % kVectors * kLanes + within / kVectors;
  }
  static bool holds_nan(const Storage* p, int64_t count) {
    U found{};
    for (int64_t k = 0; k < count; k += kColumns)
      found |= (words(p + k, count - k) & 0x7f7f7f7fu) + 0x01010101u;
    return any((I)(found & 0x80808080u));
  }
};

constexpr int64_t kFewRows = 2 * kTileRows;

const uint8_t* weights_of(const LinearArgs& args, int64_t row) {
  return static_cast<const uint8_t*>(args.weight) + row * args.in;
}

struct Few {
  using Storage = uint8_t;

  const LinearArgs& args;
  const float* x;
  float scale[kTileWeights];

  const Storage* weights(int64_t row, int64_t r) {
    scale[r] = E4m3::holds_nan(weights_of(args, row), args.in) ? NAN : args.scale[row];
    return weights_of(args, row);
  }
  void tile(int64_t n, int64_t height, const Storage* const (&weights)[kTileWeights],
            Sums& sums) const {
    tile_of<E4m3>(height, x + n * widened_width<E4m3>(args.in), weights, args.in, sums);
  }
  float finished(int64_t, int64_t r, float sum) const { return scale[r] * sum; }
};

struct Many {
  using Storage = float;

  Few few;
  const int64_t width = widened_width<E4m3>(few.args.in);
  const std::unique_ptr<float[]> widened{new float[kTileWeights * width]};

  const Storage* weights(int64_t row, int64_t r) {
    const uint8_t* narrow = few.weights(row, r);
    float* wide = widened.get() + r * width;
    for (int64_t k = 0; k < width; k += E4m3::kColumns) {
      F w[E4m3::kVectors];
      E4m3::widen(narrow + k, few.args.in - k, w);
      std::memcpy(wide + k, w, sizeof w);
    }
    return wide;
  }
  void tile(int64_t n, int64_t height, const Storage* const (&weights)[kTileWeights],
            Sums& sums) const {
    tile_of<Weights<Float32>>(height, few.x + n * width, weights, width, sums);
  }
  float finished(int64_t row, int64_t r, float sum) const { return few.finished(row, r, sum); }
};

template <class T>
void widen(const LinearArgs& args, int64_t first, int64_t count, float* widened) {
  const auto* x = static_cast<const typename T::Storage*>(args.x) + first * args.x_stride;
  const int64_t width = widened_width<E4m3>(args.in);
  std::memset(widened, 0, count * width * sizeof(*widened));
  for (int64_t n = 0; n < count; ++n, x += args.x_stride, widened += width)
    for (int64_t k = 0; k < args.in; ++k) widened[E4m3::place(k)] = T::value(x[k]);
}

template <class T>
void rows(const LinearArgs& args, const float* x, int64_t first, int64_t count, int64_t begin,
          int64_t end) {
  const Few few{args, x, {}};
  if (count <= kFewRows) product_rows<T>(args, first, count, begin, end, few);
  else product_rows<T>(args, first, count, begin, end, Many{few});
}

#if defined(DPARALLEL_DOT)
// The same for x in bfloat16, whose rows are copied, on CPUs that multiply it.
struct FewDots {
  using Storage = uint8_t;

  const LinearArgs& args;
  const uint16_t* x;
  const int64_t width = widened_width<E4m3>(args.in);

  const Storage* weights(int64_t row, int64_t) const { return weights_of(args, row); }
  void tile(int64_t n, int64_t height, const Storage* const (&weights)[kTileWeights],
            Sums& sums) const {
    dot_tile_of<DotNarrow>(height, x + n * width, weights, width, sums);
  }
  float finished(int64_t row, int64_t, float sum) const { return args.scale[row] * sum; }
};

struct ManyDots {
  using Storage = uint16_t;

  const FewDots few;
  const std::unique_ptr<uint16_t[]> widened{new uint16_t[kTileWeights * few.width]};

  const Storage* weights(int64_t row, int64_t r) const {
    uint16_t* wide = widened.get() + r * few.width;
    widen_for_dot(few.weights(row, r), few.args.in, wide);
    return wide;
  }
  void tile(int64_t n, int64_t height, const Storage* const (&weights)[kTileWeights],
            Sums& sums) const {
    dot_tile_of<DotWide>(height, few.x + n * few.width, weights, few.width, sums);
  }
  float finished(int64_t row, int64_t r, float sum) const { return few.finished(row, r, sum); }
};

void copy_or_widen(const LinearArgs& args, int64_t first, int64_t count, float* widened) {
  if (!has_dot()) return widen<BFloat16>(args, first, count, widened);
  const int64_t width = widened_width<E4m3>(args.in);
  const auto* x = static_cast<const uint16_t*>(args.x) + first * args.x_stride;
  auto* copy = reinterpret_cast<uint16_t*>(widened);
  std::memset(copy, 0, count * width * sizeof(*copy));
  for (int64_t n = 0; n < count; ++n, x += args.x_stride, copy += width)
    std::memcpy(copy, x, args.in * sizeof(*x));
}

void dots_or_rows(const LinearArgs& args, const float* x, int64_t first, int64_t count,
                  int64_t begin, int64_t end) {
  if (!has_dot()) return rows<BFloat16>(args, x, first, count, begin, end);
  const FewDots few{args, reinterpret_cast<const uint16_t*>(x)};
  const bool narrow = count <= kFewRows && args.in % kDotColumns == 0;  // no step beyond a row
  if (narrow) product_rows<BFloat16>(args, first, count, begin, end, few);
  else product_rows<BFloat16>(args, first, count, begin, end, ManyDots{few});
}
#else
constexpr auto copy_or_widen = widen<BFloat16>;
constexpr auto dots_or_rows = rows<BFloat16>;
#endif

template <class T>
void widened(const Fp8WidenArgs& args, int64_t begin, int64_t end) {
  auto* out = static_cast<typename T::Storage*>(args.out);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = row * args.in; i < (row + 1) * args.in; ++i)
      out[i] = T::narrowed(args.scale[row] * e4m3_value(args.weight[i]));
}

}  // namespace

const Fp8LinearKernel fp8_linear_kernel{{widened_width<E4m3>,
                                         {widen<Float32>, copy_or_widen, widen<Float16>},
                                         {rows<Float32>, dots_or_rows, rows<Float16>}},
                                        {widened<Float32>, widened<BFloat16>, widened<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
