// Exact conversions of the 16-bit float formats and of 8-bit e4m3, by their bits, without a
// library's types.
#pragma once

#include <cmath>
#include <cstring>

#include "dparallel/common.h"

namespace dparallel {

DP_HD float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DP_HD uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DP_HD float bfloat16_value(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

DP_HD float float16_value(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  if (magnitude >= (0x7c00u << 13)) return from_bits(magnitude | 0x7f800000u | sign);  // inf, NaN
  const float value = from_bits(magnitude) * 0x1p112f;  // corrects the bias; of subnormals too
  return sign ? -value : value;
}

// Divides finite numbers by one y from 1 to 2^100, rounded as divisions are. On a device a division
// of float32 brings a subroutine of 1.9 KB for quotients below the normal numbers. In float64,
// where they are normal, an approximate reciprocal, refined once, and one correction suffice: no
// quotient of float32 numbers is nearer than 2^-50 of itself to a tie without being one.
struct Denominator {
#if defined(__CUDA_ARCH__) || defined(DPARALLEL_CUDA_HOST)
  double y, inverse;

  DP_HD explicit Denominator(float of) : y(of) {
#if defined(__CUDA_ARCH__)
    float approximate;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(approximate) : "f"(of));
#else
    const float approximate = 1.0f / of;
#endif
    inverse = approximate;
    inverse = fma(inverse, fma(-y, inverse, 1.0), inverse);
  }
  DP_HD float under(float x) const {
    const double q = x * inverse;
    return static_cast<float>(fma(fma(-y, q, static_cast<double>(x)), inverse, q));
  }
#else
  float y;

  DP_HD explicit Denominator(float of) : y(of) {}
  DP_HD float under(float x) const { return x / y; }
#endif
};

// Both round to nearest, ties to even.
DP_HD uint16_t bfloat16_bits(float value) {
  if (value != value) return 0x7fc0u;
  const uint32_t bits = to_bits(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

DP_HD uint16_t float16_bits(float value) {
  if (value != value) return 0x7e00u;
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  const uint32_t half = magnitude < 0x38800000u  // below 2^-14 steps of 2^-24, as float32 at 1/2
                            ? to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u
                            : (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  return static_cast<uint16_t>(sign | half);
}

// Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, 0x7f and 0xff are NaN.
DP_HD float e4m3_value(uint8_t bits) {
  const uint32_t magnitude = bits & 0x7fu, sign = (bits & 0x80u) << 24;
  if (magnitude == 0x7fu) return from_bits(0x7fc00000u | sign);
  return from_bits(to_bits(from_bits(magnitude << 20) * 0x1p120f) | sign);
}

}  // namespace dparallel
