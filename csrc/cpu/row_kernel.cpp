// Compiled once per instruction set, with DPARALLEL_SIMD = portable, avx2 or avx512.
#include "row_kernel.h"

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

constexpr int64_t kTile = 2048;  // logits: 4 to 8 KB, read twice, the second time from L1

// Vectors of a tile; the last may be short and is padded with -inf, which changes nothing.
template <class T, class Visit>
inline void each_vector(const typename T::Storage* z, int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) visit(T::widen(z + i), i);
  if (i < count) {
    F last = splat(-kInfinity);
    typename T::Storage padded[kLanes] = {};
    std::memcpy(padded, z + i, (count - i) * sizeof(*z));
    const F tail = T::widen(padded);
    for (int lane = 0; lane < count - i; ++lane) last[lane] = tail[lane];
    visit(last, i);
  }
}

template <class T>
int32_t find(const typename T::Storage* z, int64_t count, float value) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    typename T::Storage piece[kLanes] = {};
    std::memcpy(piece, z + i, lanes * sizeof(*z));
    const F v = T::widen(piece);
    for (int lane = 0; lane < lanes; ++lane)
      if (clamp_logit(v[lane]) == value) return static_cast<int32_t>(i + lane);
  }
  return -1;
}

template <class T>
void tile_stats(const typename T::Storage* z, int64_t first_id, int64_t count, RowPart& part) {
  // The two largest, per lane, then over the lanes.
  F lane1 = splat(-kInfinity), lane2 = lane1;
  each_vector<T>(z, count, [&](F v, int64_t) {
    lane2 = maximum(minimum(v, lane1), lane2);
    lane1 = maximum(v, lane1);
  });
  float top1 = -kInfinity, top2 = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) {
    const float a = clamp_logit(lane1[lane]), b = clamp_logit(lane2[lane]);
    top2 = a > top1 ? (top1 > b ? top1 : b) : (a > top2 ? a : top2);
    top1 = a > top1 ? a : top1;
  }
  if (top1 > part.top1) {
    part.token = static_cast<int32_t>(first_id) + find<T>(z, count, top1);
    part.top2 = part.top1 > top2 ? part.top1 : top2;
    part.top1 = top1;
  } else if (top1 > part.top2) {
    part.top2 = top1;
  }

  // The sums, relative to the largest seen so far. A tile of -inf and NaN alone is summed relative to
  // 0, for the NaN's sake.
  if (top1 > part.max) part.rescale(top1);
  const F m = splat(part.max == -kInfinity ? 0.0f : part.max), floor = splat(kExpFloor);
  F sum{}, weighted{};
  const auto add = [&](F v, int64_t) {
    F d = v - m;
    d = floor > d ? floor : d;
    const F e = exp_nonpositive(d);
    sum += e;
    weighted += e * d;
  };
  if (part.max < kLargest) {
    each_vector<T>(z, count, add);
  } else {
    const F largest = splat(kLargest);
    each_vector<T>(z, count, [&](F v, int64_t i) { add(v > largest ? largest : v, i); });
  }
  part.sum += reduce_add(sum);
  part.weighted += reduce_add(weighted);
}

template <class T>
void stats(const RowSpan& span, RowPart& part) {
  const auto* row = static_cast<const typename T::Storage*>(span.row);
  for (int64_t id = span.begin; id < span.end; id += kTile)
    tile_stats<T>(row + id, id, span.end - id < kTile ? span.end - id : kTile, part);
}

// Exponential variates -ln(1 - v) for 16 groups of 4 ids; see philox.h, whose gumbel() this follows.
inline void exponentials(const SampleKey& key, uint32_t first_group, float* out /*[4 * kLanes]*/) {
  U c0 = {}, c1 = {}, c2 = {}, c3 = {};
  for (int lane = 0; lane < kLanes; ++lane) c0[lane] = first_group + lane;
  c1 += key.step;
  c2 += key.position;
  c3 += key.sequence;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  typedef uint64_t W __attribute__((vector_size(128)));
  for (int round = 0; round < 10; ++round) {
    const W p0 = __builtin_convertvector(c0, W) * 0xD2511F53u;
    const W p1 = __builtin_convertvector(c2, W) * 0xCD9E8D57u;
    const U n0 = __builtin_convertvector(p1 >> 32, U) ^ c1 ^ k0;
    const U n2 = __builtin_convertvector(p0 >> 32, U) ^ c3 ^ k1;
    c1 = __builtin_convertvector(p1, U);
    c3 = __builtin_convertvector(p0, U);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const U words[4] = {c0, c1, c2, c3};
  for (int j = 0; j < 4; ++j) {
    const F high = __builtin_convertvector((I)(words[j] >> 8), F);
    const F low = __builtin_convertvector((I)(words[j] & 255u), F);
    F v = (high + (low + 0.5f) * 0x1p-8f) * 0x1p-24f;
    v = minimum(v, splat(1.0f - 0x1p-24f));
    const F w = 1.0f - v;  // ln w / (w - 1) corrects for the rounding of w (Kahan)
    const F e = w == 1.0f ? v : log_positive(w) * v / (w - 1.0f);
    for (int lane = 0; lane < kLanes; ++lane) out[4 * lane + j] = e[lane];
  }
}

// -ln of the smallest exponential variate, 2^-33: no noise exceeds it.
constexpr float kLargestNoise = 22.9f;

template <class T>
void sample(const RowSpan& span, float inverse_temperature, const SampleKey& key, SamplePart& part) {
  constexpr int64_t kBlock = 4 * kLanes;
  const auto* row = static_cast<const typename T::Storage*>(span.row);
  float z[kBlock], noise[kBlock];
  for (int64_t base = span.begin / kBlock * kBlock; base < span.end; base += kBlock) {
    const int64_t first = base > span.begin ? base : span.begin;
    const int64_t last = base + kBlock < span.end ? base + kBlock : span.end;
    for (float& value : z) value = -kInfinity;
    F top = splat(-kInfinity);
    each_vector<T>(row + first, last - first, [&](F v, int64_t i) {
      const F clamped = v > kLargest ? splat(kLargest) : v;
      const int64_t room = kBlock - (first - base) - i;
      std::memcpy(z + (first - base) + i, &clamped, (room < kLanes ? room : kLanes) * sizeof(float));
      top = maximum(clamped, top);
    });
    const float largest = reduce_max(top);
    if (largest == -kInfinity) continue;
    if (largest > part.max) part.rescale(largest, inverse_temperature);
    F sum{};
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      F d = (load<F>(z + i) - part.max) * inverse_temperature;
      d = d < kExpFloor ? splat(kExpFloor) : d;
      sum += exp_nonpositive(d);
    }
    part.sum += reduce_add(sum);
    if (largest * inverse_temperature + kLargestNoise < part.score) continue;  // none of these can win
    exponentials(key, static_cast<uint32_t>(base / 4), noise);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const F score = load<F>(z + i) * inverse_temperature - log_positive(load<F>(noise + i));
      for (int lane = 0; lane < kLanes; ++lane)
        if (score[lane] > part.score) {
          part.score = score[lane];
          part.logit = z[i + lane];
          part.token = static_cast<int32_t>(base + i + lane);
        }
    }
  }
}

}  // namespace

#define DPARALLEL_STRING_(x) #x
#define DPARALLEL_STRING(x) DPARALLEL_STRING_(x)

const RowKernel kernel = {DPARALLEL_STRING(DPARALLEL_SIMD),
                          {stats<Float32>, stats<BFloat16>, stats<Float16>},
                          {sample<Float32>, sample<BFloat16>, sample<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
