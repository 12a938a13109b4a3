// Compiled once per instruction set, as row_kernel.cpp is (see simd.h).
#include "attention_kernel.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// C [rows, columns] += A [rows, depth] B [depth, columns]; B and C are row-major. A block of C, at
// most kSums vectors, stays in registers for the whole depth. A number's sum has the order of the
// depth, whatever block it is in.
constexpr int kSums = kLanes == 16 ? 24 : 12;
constexpr int kVectors = kLanes == 16 ? 4 : 2;

struct Matrix {
  float* data;
  int64_t stride;
  int64_t step = 1;  // from a column to the next
  float* row(int64_t i) const { return data + i * stride; }
};

// Rows [i, i + Rows) of the first Vectors vectors of C.
template <int Rows, int Vectors>
inline void multiply_block(const Matrix& a, const Matrix& b, const Matrix& c, int64_t i,
                           int64_t depth) {
  const float* from = a.row(i);
  F sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < Vectors; ++j) sum[r][j] = load<F>(c.row(i + r) + j * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    F line[Vectors];
    for (int j = 0; j < Vectors; ++j) line[j] = load<F>(b.row(k) + j * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const F x = splat(from[r * a.stride + k * a.step]);
      for (int j = 0; j < Vectors; ++j) sum[r][j] += x * line[j];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < Vectors; ++j) std::memcpy(c.row(i + r) + j * kLanes, &sum[r][j], sizeof(F));
}

// Rows [i, rows) of them: blocks of Rows rows, then smaller ones, which leave no single row where
// rows are even: few sums at a time do not hide their latency.
template <int Rows, int Vectors>
inline void multiply_strip(const Matrix& a, const Matrix& b, const Matrix& c, int64_t i,
                           int64_t rows, int64_t depth) {
  for (; i + Rows <= rows; i += Rows) multiply_block<Rows, Vectors>(a, b, c, i, depth);
  if constexpr (Rows > 1)
    multiply_strip<Rows == 6 ? 4 : Rows / 2, Vectors>(a, b, c, i, rows, depth);
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

// Lanes kFrom, kFrom + 1, ... of a and b in turn.
template <int kFrom, int... i>
inline F alternate(F a, F b, std::integer_sequence<int, i...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kFrom + i / 2 + i % 2 * kLanes)...);
#else  // which GCC has from 12 on
  return __builtin_shuffle(a, b, I{(kFrom + i / 2 + i % 2 * kLanes)...});
#endif
}

inline Pair interleave(F a, F b) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  return {alternate<0>(a, b, lanes), alternate<kLanes / 2>(a, b, lanes)};
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

// The softmaxes of `lanes` rows so far, a row in each lane of a vector: the largest score, and the
// sum of exponentials relative to it. scale: what the last step multiplies earlier sums by.
struct Softmax {
  float *top, *sum, *scale;  // [lanes]
};

// Replaces scores [count, lanes] by their exponentials, relative to each row's largest score, and
// updates the rows' softmaxes. seen [count, lanes]: 1 where a row sees a slot, else 0; null: each
// sees all.
inline void soften(float* scores, int64_t count, int64_t lanes, const float* seen,
                   const Softmax& rows) {
  const F none = splat(-kInfinity), floor = splat(kExpFloor);
  for (int64_t r = 0; r < lanes; r += kLanes) {
    const auto where_seen = [&](int64_t j, F v, F otherwise) {
      if (seen == nullptr) return v;
      return load<F>(seen + j * lanes + r) != 0.0f ? v : otherwise;
    };
    const F before = load<F>(rows.top + r);
    F top = before;
    for (int64_t j = 0; j < count; ++j)
      top = maximum(where_seen(j, load<F>(scores + j * lanes + r), none), top);
    top = minimum(top, splat(kLargest));
    // NaN scores stay NaN; where all are -inf the row is uniform, as in a softmax of equals.
    const F m = top == none ? F{} : top;
    const auto exponential = [&](F v) {
      v = v - m;
      return exp_nonpositive(v < floor ? floor : v);
    };
    F part{};
    for (int64_t j = 0; j < count; ++j) {
      float* at = scores + j * lanes + r;
      const F e = where_seen(j, exponential(load<F>(at)), F{});
      std::memcpy(at, &e, sizeof e);
      part += e;
    }
    const F scale = before == none ? splat(1.0f) : exponential(before);
    const F sum = load<F>(rows.sum + r) * scale + part;
    std::memcpy(rows.top + r, &top, sizeof top);
    std::memcpy(rows.sum + r, &sum, sizeof sum);
    std::memcpy(rows.scale + r, &scale, sizeof scale);
  }
}

// Visits the runs [first, end) of slots, counted from `start`, among [start, start + count) that
// query row `row` of the tile sees, in order.
template <class Visit>
inline void each_run(const BlockAttentionArgs& args, const AttentionTile& tile, int64_t row,
                     int64_t start, int64_t count, Visit visit) {
  const int64_t below = args.causal ? tile.base + tile.offset + row + 1 : tile.base;
  const int64_t before = std::clamp<int64_t>(below - start, 0, count);
  int64_t first = 0, end = before;
  if (!args.causal) {
    const auto* words =
        reinterpret_cast<const uint64_t*>(args.ancestors) + (tile.first + row) * args.words;
    for (int64_t j = before; j < count; ++j) {
      const int64_t bit = start + j - tile.base;
      if (!(words[bit / 64] >> (bit % 64) & 1)) continue;
      if (j != end) {
        if (first < end) visit(first, end);
        first = j;
      }
      end = j + 1;
    }
  }
  if (first < end) visit(first, end);
}

template <class T>
void attend(const BlockAttentionArgs& args, const AttentionTile& tile, float* scratch) {
  using Storage = typename T::Storage;
  const int64_t dim = args.k_layout.head_dim, wide = padded(dim), rows = tile.rows;
  const int64_t lanes = padded(rows);
  const auto carve = [&](int64_t height, int64_t stride) {
    const Matrix matrix{scratch, stride};
    scratch += height * stride;
    return matrix;
  };
  // Queries and scores are transposed: a row's are a lane, so that a softmax takes no sums across
  // a vector, and keys need no transposition.
  const Matrix q = carve(wide, lanes), scores = carve(kKeys, lanes), out = carve(lanes, wide);
  const Matrix keys = carve(kKeys, wide), values = carve(kKeys, wide), seen = carve(kKeys, lanes);
  const Softmax softmax{carve(1, lanes).data, carve(1, lanes).data, carve(1, lanes).data};

  for (int64_t r = 0; r < lanes; ++r) {
    float* line = out.row(r);
    if (r < rows) {
      const int64_t head = tile.head * tile.group + r % tile.group;
      widen_row<T>(static_cast<const Storage*>(args.q) +
                       (tile.first + r / tile.group) * args.q_stride + head * dim,
                   dim, line);
      for (int64_t d = 0; d < wide; ++d) line[d] *= args.scale;
    } else {
      std::fill_n(line, wide, 0.0f);
    }
    softmax.top[r] = -kInfinity;
    softmax.sum[r] = 0.0f;
  }
  for (int64_t r = 0; r < lanes; r += kLanes)
    for (int64_t d = 0; d < wide; d += kLanes)
      transpose_square(out.row(r) + d, wide, q.row(d) + r, lanes);
  std::fill_n(out.data, lanes * wide, 0.0f);

  // Every row sees the slots below.
  const int64_t common = args.causal ? tile.base + tile.offset + 1 : tile.base;
  for (int64_t start = 0; start < tile.length; start += kKeys) {
    const int64_t count = std::min(kKeys, tile.length - start);
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
    std::fill_n(scores.data, count * lanes, 0.0f);
    multiply(keys, q, scores, count, lanes, dim);
    const bool all = start + count <= common;
    if (!all) {
      std::fill_n(seen.data, count * lanes, 0.0f);
      for (int64_t r = 0; r < rows; ++r)
        each_run(args, tile, r / tile.group, start, count, [&](int64_t first, int64_t end) {
          for (int64_t j = first; j < end; ++j) seen.row(j)[r] = 1.0f;
        });
    }
    soften(scores.data, count, lanes, all ? nullptr : seen.data, softmax);
    for (int64_t r = 0; r < rows; ++r)
      if (const float scale = softmax.scale[r]; scale != 1.0f)
        for (int64_t d = 0; d < wide; ++d) out.row(r)[d] *= scale;
    if (all) {
      multiply({scores.data, 1, lanes}, values, out, rows, wide, count);
      continue;
    }
    // Values of slots that a row does not see are not read: 0 * NaN would be NaN.
    for (int64_t r = 0; r < rows; ++r)
      each_run(args, tile, r / tile.group, start, count, [&](int64_t first, int64_t end) {
        multiply({scores.row(first) + r, 1, lanes}, {values.row(first), wide}, {out.row(r), wide},
                 1, wide, end - first);
      });
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = tile.head * tile.group + r % tile.group;
    auto* to = static_cast<Storage*>(args.out) +
               ((tile.first + r / tile.group) * args.q_heads + head) * dim;
    const float sum = softmax.sum[r], inverse = sum != 0.0f ? 1.0f / sum : 0.0f;  // 0: sees nothing
    for (int64_t d = 0; d < dim; ++d) to[d] = T::narrowed(out.row(r)[d] * inverse);
  }
}

}  // namespace

const AttentionKernel attention_kernel{{attend<Float32>, attend<BFloat16>, attend<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
