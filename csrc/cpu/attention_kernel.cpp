// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "attention_kernel.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// C [rows, columns] += A [rows, depth] B [depth, columns], all row-major. A block of C, at most
// kSums vectors, stays in registers for the whole depth. A number's sum has the order of the depth,
// whatever block it is in.
constexpr int kSums = kLanes == 16 ? 24 : 12;
constexpr int kVectors = kLanes == 16 ? 4 : 2;

struct Matrix {
  float* data;
  int64_t stride;
  float* row(int64_t i) const { return data + i * stride; }
};

template <int Rows, int Vectors>
inline void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                           float* c, int64_t c_stride, int64_t depth) {
  F sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) sum[i][j] = load<F>(c + i * c_stride + j * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    F line[Vectors];
    for (int j = 0; j < Vectors; ++j) line[j] = load<F>(b + k * b_stride + j * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const F x = splat(a[i * a_stride + k]);
      for (int j = 0; j < Vectors; ++j) sum[i][j] += x * line[j];
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j)
      std::memcpy(c + i * c_stride + j * kLanes, &sum[i][j], sizeof(F));
}

// Rows [i, rows) of the first Vectors vectors of C: blocks of Rows rows, then of half as many, ...
template <int Rows, int Vectors>
inline void multiply_strip(const Matrix& a, const Matrix& b, const Matrix& c, int64_t i,
                           int64_t rows, int64_t depth) {
  for (; i + Rows <= rows; i += Rows)
    multiply_block<Rows, Vectors>(a.row(i), a.stride, b.data, b.stride, c.row(i), c.stride, depth);
  if constexpr (Rows > 1) multiply_strip<Rows / 2, Vectors>(a, b, c, i, rows, depth);
}

// `columns` is a multiple of kLanes.
template <int Vectors = kVectors>
void multiply(const Matrix& a, Matrix b, Matrix c, int64_t rows, int64_t columns, int64_t depth) {
  constexpr int64_t kWidth = Vectors * kLanes;
  for (; columns >= kWidth; columns -= kWidth, b.data += kWidth, c.data += kWidth)
    multiply_strip<std::min(kSums / Vectors, 12), Vectors>(a, b, c, 0, rows, depth);
  if constexpr (Vectors > 1) multiply<Vectors / 2>(a, b, c, rows, columns, depth);
}

typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

template <class T>
inline F widen_in_order(const typename T::Storage* p) {
  if constexpr (sizeof(typename T::Storage) == 4) {
    return load<F>(p);
  } else {
    const U bits = __builtin_convertvector(load<H>(p), U);
    if constexpr (std::is_same_v<T, BFloat16>) return (F)(bits << 16);
    else return Float16::convert(bits);
  }
}

// Converts `count` stored numbers to float32, followed by zeros up to a whole vector.
template <class T>
inline void widen_row(const typename T::Storage* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F v = widen_in_order<T>(in + i);
    std::memcpy(out + i, &v, sizeof v);
  }
  for (; i < count; ++i) out[i] = T::value(in[i]);
  for (; i % kLanes != 0; ++i) out[i] = 0.0f;
}

#define DP_SHUFFLE_4(a, b) \
  __builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define DP_SHUFFLE_8(a, b)                                 \
  __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11), \
      __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define DP_SHUFFLE_16(a, b)                                                              \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), \
      __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

inline Pair interleave(F a, F b) {
#if defined(__AVX512F__)
  return {DP_SHUFFLE_16(a, b)};
#elif defined(__AVX__)
  return {DP_SHUFFLE_8(a, b)};
#else
  return {DP_SHUFFLE_4(a, b)};
#endif
}

// Transposes kLanes rows of kLanes floats: log2(kLanes) times, the two halves are interleaved.
inline void transpose_square(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  F v[kLanes], w[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = load<F>(in + i * in_stride);
  for (int stage = 1; stage < kLanes; stage *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      const Pair pair = interleave(v[i], v[i + kLanes / 2]);
      w[2 * i] = pair.first;
      w[2 * i + 1] = pair.second;
    }
    std::memcpy(v, w, sizeof v);
  }
  for (int i = 0; i < kLanes; ++i) std::memcpy(out + i * out_stride, &v[i], sizeof(F));
}

constexpr int64_t kKeys = 64;  // slots of a step: scores, keys and values stay in the L2 cache

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A row's softmax so far: its largest score, the sum of exponentials relative to it, and the sum of
// values [wide] that they weight.
struct Softmax {
  float &top, &sum;
  float* out;
};

// Replaces `count` scores (with room up to a whole vector) by their exponentials, relative to the
// row's largest score, and updates the row's softmax.
inline void soften(float* s, int64_t count, int64_t wide, const Softmax& row) {
  // What a vector has beyond `count` is no score: -inf for the maximum, 0 in the sum.
  const auto within = [&](int64_t j, F v, float beyond) {
    const auto left = static_cast<int32_t>(count - j);
    return left >= kLanes ? v : lane_numbers() < left ? v : splat(beyond);
  };
  F largest = splat(-kInfinity);
  for (int64_t j = 0; j < count; j += kLanes)
    largest = maximum(within(j, load<F>(s + j), -kInfinity), largest);
  const float before = row.top;
  const float now = std::max(before, clamp_logit(reduce_max(largest)));
  // NaN scores stay NaN; where all are -inf the row is uniform, as in a softmax of equals.
  const F m = splat(now == -kInfinity ? 0.0f : now), floor = splat(kExpFloor);
  F part = splat(0.0f);
  for (int64_t j = 0; j < count; j += kLanes) {
    F e = load<F>(s + j) - m;
    e = within(j, exp_nonpositive(e < floor ? floor : e), 0.0f);
    std::memcpy(s + j, &e, sizeof e);
    part += e;
  }
  if (now > before && before > -kInfinity) {
    const float scale = __builtin_expf(before - now);
    row.sum *= scale;
    for (int64_t d = 0; d < wide; ++d) row.out[d] *= scale;
  }
  row.top = now;
  row.sum += reduce_add(part);
}

// A run of slots, counted from the first slot of the step.
struct Run {
  int64_t first, count;
};

// Writes the runs of slots among [start, start + count) that query row `row` of the tile sees, in
// order; returns their number.
inline int64_t runs_of(const BlockAttentionArgs& args, const AttentionTile& tile, int64_t row,
                       int64_t start, int64_t count, Run* runs) {
  const int64_t before = std::clamp<int64_t>(tile.base - start, 0, count);
  if (args.causal) {
    runs[0] = {0, std::clamp<int64_t>(tile.base + tile.offset + row + 1 - start, 0, count)};
    return 1;
  }
  const auto* words =
      reinterpret_cast<const uint64_t*>(args.ancestors) + (tile.first + row) * args.words;
  int64_t number = 0;
  if (before > 0) runs[number++] = {0, before};
  for (int64_t j = before; j < count; ++j) {
    const int64_t bit = start + j - tile.base;
    if (!(words[bit / 64] >> (bit % 64) & 1)) continue;
    Run* last = number > 0 ? &runs[number - 1] : nullptr;
    if (last != nullptr && last->first + last->count == j) ++last->count;
    else runs[number++] = {j, 1};
  }
  return number;
}

template <class T>
void attend(const BlockAttentionArgs& args, const AttentionTile& tile, float* scratch) {
  using Storage = typename T::Storage;
  const int64_t dim = args.k_layout.head_dim, wide = padded(dim), rows = tile.rows;
  const auto carve = [&](int64_t height, int64_t stride) {
    const Matrix matrix{scratch, stride};
    scratch += height * stride;
    return matrix;
  };
  const Matrix q = carve(kTileRows, wide), out = carve(kTileRows, wide);
  const Matrix scores = carve(kTileRows, kKeys);
  const Matrix keys = carve(kKeys, wide), keys_t = carve(wide, kKeys), values = carve(kKeys, wide);
  float* top = carve(1, kTileRows).data;
  float* sum = carve(1, kTileRows).data;

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = tile.head * tile.group + r % tile.group;
    widen_row<T>(static_cast<const Storage*>(args.q) +
                     (tile.first + r / tile.group) * args.q_stride + head * dim,
                 dim, q.row(r));
    for (int64_t d = 0; d < wide; ++d) q.row(r)[d] *= args.scale;
    std::fill_n(out.row(r), wide, 0.0f);
    top[r] = -kInfinity;
    sum[r] = 0.0f;
  }
  for (int64_t start = 0; start < tile.length; start += kKeys) {
    const int64_t count = std::min(kKeys, tile.length - start), lanes = padded(count);
    int64_t number = start / args.k_layout.page_size, at = start % args.k_layout.page_size;
    for (int64_t j = 0; j < count; ++j, ++at) {
      if (at == args.k_layout.page_size) {
        at = 0;
        ++number;
      }
      const int64_t page = tile.pages[number];
      widen_row<T>(
          static_cast<const Storage*>(args.k_cache) + args.k_layout.offset(page, at, tile.head),
          dim, keys.row(j));
      widen_row<T>(
          static_cast<const Storage*>(args.v_cache) + args.v_layout.offset(page, at, tile.head),
          dim, values.row(j));
    }
    for (int64_t j = count; j < lanes; ++j) std::fill_n(keys.row(j), wide, 0.0f);
    for (int64_t j = 0; j < lanes; j += kLanes)
      for (int64_t d = 0; d < wide; d += kLanes)
        transpose_square(keys.row(j) + d, wide, keys_t.row(d) + j, kKeys);
    for (int64_t r = 0; r < rows; ++r) std::fill_n(scores.row(r), lanes, 0.0f);
    multiply(q, keys_t, scores, rows, lanes, wide);
    if (start + count <= tile.base) {  // every row sees all of them
      for (int64_t r = 0; r < rows; ++r)
        soften(scores.row(r), count, wide, {top[r], sum[r], out.row(r)});
      multiply(scores, values, out, rows, wide, count);
      continue;
    }
    // Slots that a row does not see are skipped: the scores of the others are moved together, and
    // values of skipped slots are not read (0 * NaN would be NaN).
    for (int64_t r = 0; r < rows; ++r) {
      float* s = scores.row(r);
      Run runs[kKeys];
      const int64_t number = runs_of(args, tile, r / tile.group, start, count, runs);
      int64_t seen = 0;
      for (int64_t i = 0; i < number; ++i) {
        std::memmove(s + seen, s + runs[i].first, runs[i].count * sizeof(float));
        seen += runs[i].count;
      }
      if (seen == 0) continue;
      soften(s, seen, wide, {top[r], sum[r], out.row(r)});
      for (int64_t i = 0, at = 0; i < number; at += runs[i++].count)
        multiply({s + at, kKeys}, {values.row(runs[i].first), wide}, {out.row(r), wide}, 1, wide,
                 runs[i].count);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = tile.head * tile.group + r % tile.group;
    auto* to = static_cast<Storage*>(args.out) +
               ((tile.first + r / tile.group) * args.q_heads + head) * dim;
    const float inverse = sum[r] != 0.0f ? 1.0f / sum[r] : 0.0f;  // sum 0: the row sees nothing
    for (int64_t d = 0; d < dim; ++d) {
      const float value = out.row(r)[d] * inverse;
      if constexpr (std::is_same_v<T, Float32>) to[d] = value;
      else if constexpr (std::is_same_v<T, BFloat16>) to[d] = bfloat16_bits(value);
      else to[d] = float16_bits(value);
    }
  }
}

}  // namespace

extern const AttentionKernel attention_kernel;
const AttentionKernel attention_kernel{{attend<Float32>, attend<BFloat16>, attend<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
