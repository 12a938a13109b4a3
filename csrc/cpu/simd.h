// Vectors as wide as the instruction set's, in the compiler's vector extension (GCC and Clang), so
// that one source serves every instruction set: each *_kernel.cpp is compiled once per level (see
// setup.py), with DPARALLEL_SIMD naming the namespace; simd_level.h picks one of them.
#pragma once

#include <cstring>

#include "dparallel/row_stats.h"
#include "stored.h"

namespace dparallel::cpu::DPARALLEL_SIMD {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint64_t W __attribute__((vector_size(8 * kLanes)));

inline F splat(float x) { return x - F{}; }
inline F maximum(F a, F b) { return a > b ? a : b; }  // b where a is NaN
inline F minimum(F a, F b) { return a < b ? a : b; }  // b where a is NaN

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

struct Pair {
  F first, second;
};

// 2 kLanes stored logits as two vectors of float32, exactly. The 16-bit types are split into even
// and odd elements, which takes a shift and a mask where keeping their order would take shuffles;
// sums and maxima do not care.
struct Float32 : StoredFloat32 {
  static Pair widen(const Storage* p) { return {load<F>(p), load<F>(p + kLanes)}; }
  static F round(F v) { return v; }
  static void narrow(Pair v, Storage* p) {
    std::memcpy(p, &v.first, sizeof v.first);
    std::memcpy(p + kLanes, &v.second, sizeof v.second);
  }
};

struct BFloat16 : StoredBFloat16 {
  static Pair widen(const Storage* p) {
    const U pairs = load<U>(p);
    return {(F)(pairs << 16), (F)(pairs & 0xffff0000u)};
  }
  static U rounded(F v) {  // bfloat16 bits in the upper half of each lane
    const U bits = (U)v, next = bits + 0x7fffu + ((bits >> 16) & 1u);
    return v == v ? next : bits | 0x400000u;
  }
  static F round(F v) { return (F)(rounded(v) & 0xffff0000u); }
  static void narrow(Pair v, Storage* p) {
    const U pairs = (rounded(v.first) >> 16) | (rounded(v.second) & 0xffff0000u);
    std::memcpy(p, &pairs, sizeof pairs);
  }
};

struct Float16 : StoredFloat16 {
  static F convert(U h) {
    const U magnitude = (h & 0x7fffu) << 13;
    F value = (F)magnitude * 0x1p112f;  // corrects the exponent's bias; of subnormals too
    value = (I)magnitude >= (0x7c00 << 13) ? (F)(magnitude | 0x7f800000u) : value;  // inf, NaN
    return (F)((U)value | (h & 0x8000u) << 16);
  }
  static Pair widen(const Storage* p) {
    const U pairs = load<U>(p);
    return {convert(pairs & 0xffffu), convert(pairs >> 16)};
  }
  static U rounded(F v) {  // see float16_bits
    const U sign = ((U)v >> 16) & 0x8000u, magnitude = (U)v & 0x7fffffffu;
    const U small = (U)((F)magnitude + 0.5f) - 0x3f000000u;
    const U normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    U half = (I)magnitude < 0x38800000 ? small : normal;
    half = (I)magnitude >= 0x477ff000 ? (U{} + 0x7c00u) : half;
    half = v == v ? half : U{} + 0x7e00u;
    return sign | half;
  }
  static F round(F v) { return convert(rounded(v)); }
  static void narrow(Pair v, Storage* p) {
    const U pairs = rounded(v.first) | rounded(v.second) << 16;
    std::memcpy(p, &pairs, sizeof pairs);
  }
};

// e^x for x in [-87, 0], as 2^n 2^r with n the nearest integer to x log2(e). The polynomial is the
// minimax one of degree 5 for 2^r on [-1/2, 1/2] with e^0 = 1 exactly, relative error 9.2e-8. Any
// NaN stays NaN, since 2^n is multiplied in, not added to the exponent's bits.
inline F exp_nonpositive(F x) {
  const F log2e = splat(1.44269504088896341f);
  const F shifter = splat(0x1.8p23f + 127.0f);  // adding it leaves n + 127 in the low bits
  const F shifted = x * log2e + shifter;
#if (defined(__FMA__) || defined(__ARM_FEATURE_FMA)) && !defined(__clang__)
  const F r = x * log2e - (shifted - shifter);  // one rounding; clang rounds the product, too
#else  // x and log2e in two parts, the product of the upper ones exact
  const F upper = (F)((U)x & 0xfffff000u);
  const F r =
      (upper * 0x1.714p0f - (shifted - shifter)) + (upper * 0x1.47652cp-12f + (x - upper) * log2e);
#endif
  F p = splat(0x1.5bba14p-10f);
  p = p * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  return p * (F)((U)shifted << 23);  // padding lanes hold any number
}

// ln x for normal x > 0: x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); relative error below
// 2e-7.
inline F log_positive(F x) {
  const I bits = (I)((U)x - 0x3f3504f3u);  // sqrt(1/2)
  const I k = bits >> 23;
  const F f = (F)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  const F e = __builtin_convertvector(k, F), f2 = f * f;
  F p = splat(7.0376836292e-2f);  // Cephes' logf
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return (p * f * f2 - 2.12194440e-4f * e - 0.5f * f2) + f + 0.693359375f * e;
}

inline bool any(I mask) {
  uint64_t words[sizeof mask / 8], found = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) found |= word;
  return found != 0;
}

inline float reduce_max(F v) {  // of a vector without NaN
  float best[kLanes];
  std::memcpy(best, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) best[i] = best[i + width] > best[i] ? best[i + width] : best[i];
  return best[0];
}

inline float reduce_add(F v) {
  float sum[kLanes];
  std::memcpy(sum, &v, sizeof sum);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

constexpr int64_t kTile = 2048;  // logits: 4 to 8 KB, read twice, the second time from L1

constexpr int64_t kStep = 2 * kLanes;

// Loads the first `count` numbers at p, up to kStep, followed by `padding`; store_step stores them.
template <class T>
inline Pair load_step(const typename T::Storage* p, int64_t count,
                      typename T::Storage padding = 0) {
  if (count >= kStep) return T::widen(p);
  typename T::Storage padded[kStep];
  for (auto& value : padded) value = padding;
  std::memcpy(padded, p, count * sizeof(*p));
  return T::widen(padded);
}

template <class T>
inline void store_step(Pair v, typename T::Storage* p, int64_t count) {
  if (count >= kStep) return T::narrow(v, p);
  typename T::Storage padded[kStep];
  T::narrow(v, padded);
  std::memcpy(p, padded, count * sizeof(*p));
}

// Visits `count` logits in pairs of vectors; the last is padded with -inf, which changes nothing.
template <class T, class Visit>
inline void each_pair(const typename T::Storage* z, int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) visit(T::widen(z + i));
  if (i < count) visit(load_step<T>(z + i, count - i, T::kMinusInfinity));
}

// The largest logit of a tile, NaN ignored, +inf as the largest finite float.
template <class T>
inline float tile_max(const typename T::Storage* z, int64_t count) {
  F first = splat(-kInfinity), second = first;  // two chains, for the latency of the maximum
  each_pair<T>(z, count, [&](Pair v) {
    first = maximum(v.first, first);
    second = maximum(v.second, second);
  });
  return clamp_logit(reduce_max(maximum(first, second)));
}

}  // namespace dparallel::cpu::DPARALLEL_SIMD
