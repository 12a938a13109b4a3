// Rows of x times rows of weights, summed in float32: what the kernels under linear and fp8_linear
// share. Compiled once per instruction set (see simd.h).
//
// The sums of a tile, kTileRows rows of x by kTileWeights of weights, stay in registers from the
// first column to the last: a step of kStep columns widens each weight once for all rows of x, and
// every sum has the same order whatever else is in the tile.
#pragma once

#include "dparallel/launch.h"
#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {

constexpr int kTileWeights = 4;
constexpr int kTileRows = kLanes == 16 ? 5 : 3;  // with AVX-512 there are 32 registers, else 16

inline int64_t widened_width(int64_t in) { return (in + kStep - 1) / kStep * kStep; }

// sums[n][r] = row n of x, widened, times weights[r], for the first N rows.
template <class T, int N>
void tile(const float* x, const typename T::Storage* const (&weights)[kTileWeights], int64_t in,
          float (&sums)[kTileRows][kTileWeights]) {
  const int64_t stride = widened_width(in);
  F sum[N][kTileWeights];
  for (auto& row : sum)
    for (F& s : row) s = splat(0.0f);
  const auto step = [&](int64_t k, int64_t left) {
    Pair w[kTileWeights];
    for (int r = 0; r < kTileWeights; ++r) w[r] = load_step<T>(weights[r] + k, left);
    for (int n = 0; n < N; ++n) {
      const F v = load<F>(x + n * stride + k);
      for (int r = 0; r < kTileWeights; ++r) sum[n][r] += v * w[r].first;
    }
    for (int n = 0; n < N; ++n) {
      const F v = load<F>(x + n * stride + k + kLanes);
      for (int r = 0; r < kTileWeights; ++r) sum[n][r] += v * w[r].second;
    }
  };
  int64_t k = 0;
  for (; k + kStep <= in; k += kStep) step(k, kStep);
  if (k < in) step(k, in - k);
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < kTileWeights; ++r) sums[n][r] = reduce_add(sum[n][r]);
}

// tile() of `count` rows of x, at least 1 and at most N.
template <class T, int N = kTileRows>
void tile_of(int64_t count, const float* x,
             const typename T::Storage* const (&weights)[kTileWeights], int64_t in,
             float (&sums)[kTileRows][kTileWeights]) {
  if constexpr (N > 1)
    if (count < N) return tile_of<T, N - 1>(count, x, weights, in, sums);
  tile<T, N>(x, weights, in, sums);
}

// Products of `count` widened rows of x, of which the first is row `first`, with rows [begin, end)
// of the weights, of type W; x, bias and out are of type T. find(row, r) points to row `row`, which
// is in the tile's place r, and a sum of its products is finish(row, sum) before the bias is added.
template <class W, class T, class Find, class Finish>
void product_rows(const LinearArgs& args, const float* x, int64_t first, int64_t count,
                  int64_t begin, int64_t end, Find find, Finish finish) {
  const auto* bias = static_cast<const typename T::Storage*>(args.bias);
  auto* out = static_cast<typename T::Storage*>(args.out) + first * args.out_width;
  float sums[kTileRows][kTileWeights];
  for (int64_t row = begin; row < end; row += kTileWeights) {
    const int64_t width = end - row < kTileWeights ? end - row : kTileWeights;
    const typename W::Storage* weights[kTileWeights];
    for (int64_t r = 0; r < kTileWeights; ++r)
      weights[r] = r < width ? find(row + r, r) : weights[0];  // what comes of it is left out
    for (int64_t n = 0; n < count; n += kTileRows) {
      const int64_t height = count - n < kTileRows ? count - n : kTileRows;
      tile_of<W>(height, x + n * widened_width(args.in), weights, args.in, sums);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t r = 0; r < width; ++r) {
          const float added = bias == nullptr ? 0.0f : T::value(bias[row + r]);
          out[(n + i) * args.out_width + row + r] =
              T::narrowed(finish(row + r, sums[i][r]) + added);
        }
    }
  }
}

}  // namespace dparallel::cpu::DPARALLEL_SIMD
