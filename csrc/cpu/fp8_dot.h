// Tiles of fp8_linear on CPUs that multiply bfloat16: two products a lane and instruction. Every
// number of e4m3 is one of bfloat16, and each product one of float32. Numbers of x and sums below
// 2^-126, which are subnormal, count as 0 there.
#pragma once

#include "product_tile.h"

#if defined(__AVX512F__)
#if !defined(__clang__)  // GCC 12 warns of its own header
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// These functions alone are compiled for such CPUs.
#define DPARALLEL_DOT __attribute__((target("avx512bf16,avx512vbmi")))

namespace dparallel::cpu::DPARALLEL_SIMD {

inline bool has_dot() {
  static const bool has =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return has;
}

constexpr int64_t kDotColumns = 64;  // of a step

// Two vectors of bfloat16: a step, in the order of columns.
struct DotStep {
  __m512bh first, second;
};

struct DotWide {
  using Storage = uint16_t;
  DPARALLEL_DOT static DotStep load(const Storage* p) {
    return {(__m512bh)_mm512_loadu_si512(p), (__m512bh)_mm512_loadu_si512(p + 32)};
  }
};

// Weights in e4m3, which are widened by two lookups, one for each byte of a bfloat16 number.
struct DotNarrow {
  using Storage = uint8_t;

  // The bytes of all magnitudes; constant, since other CPUs must not run what would compute them.
  struct Table {
    alignas(64) uint8_t low[128], high[128];

    constexpr Table() : low(), high() {
      for (int magnitude = 0; magnitude < 128; ++magnitude) {
        int exponent = magnitude >> 3, mantissa = magnitude & 7;
        if (exponent == 0 && mantissa != 0)  // a subnormal number becomes a normal one
          for (exponent = 1; mantissa < 8; mantissa *= 2) --exponent;
        const int bits = magnitude == 0     ? 0
                         : magnitude == 127 ? 0x7fc0
                                            : (exponent + 120) << 7 | (mantissa & 7) << 4;
        low[magnitude] = static_cast<uint8_t>(bits);
        high[magnitude] = static_cast<uint8_t>(bits >> 8);
      }
    }
  };
  static const Table table;

  DPARALLEL_DOT static DotStep load(const Storage* p) { return widen(_mm512_loadu_si512(p)); }
  DPARALLEL_DOT static DotStep widen(__m512i bytes) {
    const auto part = [](const uint8_t* p) { return _mm512_load_si512(p); };
    // They are interleaved within 128 bits: columns 0 to 7 with 32 to 39, 8 to 15 with 40 to 47.
    bytes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), bytes);
    const __m512i low = _mm512_permutex2var_epi8(part(table.low), bytes, part(table.low + 64));
    const __m512i high = _mm512_permutex2var_epi8(part(table.high), bytes, part(table.high + 64));
    const __m512i with_sign =
        _mm512_ternarylogic_epi64(high, bytes, _mm512_set1_epi8(-128), 0xf8);  // a | b & c
    return {(__m512bh)_mm512_unpacklo_epi8(low, with_sign),
            (__m512bh)_mm512_unpackhi_epi8(low, with_sign)};
  }
};
inline constexpr DotNarrow::Table DotNarrow::table;

// `count` weights, with zeros up to a multiple of kDotColumns.
DPARALLEL_DOT inline void widen_for_dot(const uint8_t* weights, int64_t count, uint16_t* widened) {
  for (int64_t k = 0; k < count; k += kDotColumns) {
    const __mmask64 there = count - k < kDotColumns ? ~(~0ull << (count - k)) : ~0ull;
    const DotStep w = DotNarrow::widen(_mm512_maskz_loadu_epi8(there, weights + k));
    _mm512_storeu_si512(widened + k, (__m512i)w.first);
    _mm512_storeu_si512(widened + k + 32, (__m512i)w.second);
  }
}

// As tile(), of bfloat16 rows of x, `width` numbers long, which is a multiple of kDotColumns.
template <class W, int N>
DPARALLEL_DOT void dot_tile(const uint16_t* x,
                            const typename W::Storage* const (&weights)[kTileWeights],
                            int64_t width, Sums& sums) {
  __m512 sum[N][kTileWeights];
  for (auto& row : sum)
    for (__m512& s : row) s = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += kDotColumns) {
    for (int r = 0; r < kTileWeights; ++r) {
      const DotStep w = W::load(weights[r] + k);
      for (int n = 0; n < N; ++n) {
        const DotStep v = DotWide::load(x + n * width + k);
        sum[n][r] = _mm512_dpbf16_ps(sum[n][r], w.first, v.first);
        sum[n][r] = _mm512_dpbf16_ps(sum[n][r], w.second, v.second);
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < kTileWeights; ++r) sums[n][r] = _mm512_reduce_add_ps(sum[n][r]);
}

template <class W, int N = kTileRows>
void dot_tile_of(int64_t count, const uint16_t* x,
                 const typename W::Storage* const (&weights)[kTileWeights], int64_t width,
                 Sums& sums) {
  if constexpr (N > 1)
    if (count < N) return dot_tile_of<W, N - 1>(count, x, weights, width, sums);
  dot_tile<W, N>(x, weights, width, sums);
}

}  // namespace dparallel::cpu::DPARALLEL_SIMD
#endif
