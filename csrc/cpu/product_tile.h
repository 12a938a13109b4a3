// Rows of x times rows of weights, summed in float32, for the kernels of linear and fp8_linear.
// Compiled once per instruction set (see simd.h).
//
// The sums of a tile, kTileRows rows of x by kTileWeights of weights, stay in registers from the
// first column to the last: a step of columns widens each weight once for all rows of x, and every
// sum has the same order whatever else is in the tile.
#pragma once

#include "dparallel/launch.h"
#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {

constexpr int kTileWeights = 4;
constexpr int kTileRows = kLanes == 16 ? 5 : 3;  // with AVX-512 there are 32 registers, else 16
using Sums = float[kTileRows][kTileWeights];

// Weights of type T. A step of them is widened as kVectors vectors, in an order in which x is
// widened, too.
template <class T>
struct Weights {
  using Storage = typename T::Storage;
  static constexpr int kVectors = 2;
  static void widen(const Storage* p, int64_t count, F (&w)[kVectors]) {
    const Pair pair = load_step<T>(p, count);
    w[0] = pair.first;
    w[1] = pair.second;
  }
};

template <class W>
int64_t widened_width(int64_t in) {
  constexpr int64_t kColumns = W::kVectors * kLanes;
  return (in + kColumns - 1) / kColumns * kColumns;
}

// sums[n][r] = row n of x, widened, times weights[r], for the first N rows.
template <class W, int N>
void tile(const float* x, const typename W::Storage* const (&weights)[kTileWeights], int64_t in,
          Sums& sums) {
  constexpr int64_t kColumns = W::kVectors * kLanes;
  const int64_t stride = widened_width<W>(in);
  F sum[N][kTileWeights];
  for (auto& row : sum) {
    for (F& s : row) s = splat(0.0f);
  }
  const auto step = [&](int64_t k, int64_t left) {
    F w[kTileWeights][W::kVectors];
    for (int r = 0; r < kTileWeights; ++r) W::widen(weights[r] + k, left, w[r]);
    for (int i = 0; i < W::kVectors; ++i) {
      for (int n = 0; n < N; ++n) {
        const F v = load<F>(x + n * stride + k + i * kLanes);
        for (int r = 0; r < kTileWeights; ++r) sum[n][r] += v * w[r][i];
      }
    }
  };
  int64_t k = 0;
  for (; k + kColumns <= in; k += kColumns) step(k, kColumns);
  if (k < in) step(k, in - k);
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < kTileWeights; ++r) sums[n][r] = reduce_add(sum[n][r]);
  }
}

// tile() of `count` rows of x, at least 1 and at most N.
template <class W, int N = kTileRows>
void tile_of(int64_t count, const float* x,
             const typename W::Storage* const (&weights)[kTileWeights], int64_t in, Sums& sums) {
  if constexpr (N > 1)
    if (count < N) return tile_of<W, N - 1>(count, x, weights, in, sums);
  tile<W, N>(x, weights, in, sums);
}

// Products of `count` rows of x, of which the first is row `first`, with rows [begin, end) of the
// weights; bias and out are of type T. The factors are prepared by an object with
//   Storage* weights(row, r)              row `row` of the weights, for the tile's place r,
//   void tile(n, height, weights, sums)   its sums with rows [n, n + height) of the `count`,
//   float finished(row, r, sum)           a sum, before the bias is added.
template <class T, class Factors>
void product_rows(const LinearArgs& args, int64_t first, int64_t count, int64_t begin, int64_t end,
                  Factors factors) {
  const auto* bias = static_cast<const typename T::Storage*>(args.bias);
  auto* out = static_cast<typename T::Storage*>(args.out) + first * args.out_width;
  Sums sums;
  for (int64_t row = begin; row < end; row += kTileWeights) {
    const int64_t width = end - row < kTileWeights ? end - row : kTileWeights;
    const typename Factors::Storage* weights[kTileWeights];
    for (int64_t r = 0; r < kTileWeights; ++r)
      weights[r] = r < width ? factors.weights(row + r, r) : weights[0];  // its sums are left out
    for (int64_t n = 0; n < count; n += kTileRows) {
      const int64_t height = count - n < kTileRows ? count - n : kTileRows;
      factors.tile(n, height, weights, sums);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t r = 0; r < width; ++r) {
          const float added = bias == nullptr ? 0.0f : T::value(bias[row + r]);
          out[(n + i) * args.out_width + row + r] =
              T::narrowed(factors.finished(row + r, r, sums[i][r]) + added);
        }
    }
  }
}

}  // namespace dparallel::cpu::DPARALLEL_SIMD
