// Compiled once per instruction set, with DPARALLEL_SIMD = portable, avx2 or avx512.
#include "row_kernel.h"

#include "simd.h"

namespace dparallel::cpu::DPARALLEL_SIMD {
namespace {

// Ranks a tile's logits among the best so far (the top two, or the top k). Only vectors with a
// logit above `bar` are visited one by one, which are few. Ids ascend, so that ties go to the
// lowest id.
template <class T, class Best>
void rank_tile(const typename T::Storage* z, int64_t first_id, int64_t count, Best& best) {
  int64_t i = 0;
  float bar = best.bar();
  const auto rank = [&](int64_t end) {
    for (; i < end; ++i) {
      const float value = clamp_logit(T::value(z[i]));
      if (!(value > bar)) continue;
      best.rank(value, static_cast<int32_t>(first_id + i));
      bar = best.bar();
    }
  };
  while (i + kStep <= count) {
    const Pair v = T::widen(z + i);
    if (any((v.first > bar) | (v.second > bar))) rank(i + kStep);
    else i += kStep;
  }
  rank(count);
}

template <class T>
void tile_stats(const typename T::Storage* z, int64_t first_id, int64_t count, float top,
                RowPart& part) {
  if (top > part.top2) rank_tile<T>(z, first_id, count, part);

  // Add to the sums, relative to the largest logit so far. A tile that holds only -inf and NaN is
  // summed relative to 0, so that a NaN is noticed. The term of a new maximum, 1, is added last:
  // added first, it would make float32 lose the small terms one by one.
  const bool risen = top > part.max;
  if (risen) part.rescale(top);
  const F m = splat(part.max == -kInfinity ? 0.0f : part.max), floor = splat(kExpFloor);
  const auto add = [&](F v, F& sum, F& weighted) {
    const F d = maximum(floor, v - m);
    const F e = exp_nonpositive(d);
    sum += e;
    weighted += e * d;
  };
  const auto sum_up = [&](const typename T::Storage* from, int64_t n) {
    F sum1{}, weighted1{}, sum2{}, weighted2{};
    if (part.max < kLargest) {
      each_pair<T>(from, n, [&](Pair v) {
        add(v.first, sum1, weighted1);
        add(v.second, sum2, weighted2);
      });
    } else {
      const F largest = splat(kLargest);
      each_pair<T>(from, n, [&](Pair v) {
        add(minimum(largest, v.first), sum1, weighted1);
        add(minimum(largest, v.second), sum2, weighted2);
      });
    }
    part.sum += reduce_add(sum1 + sum2);
    part.weighted += reduce_add(weighted1 + weighted2);
  };
  if (!risen) return sum_up(z, count);
  const int64_t at = part.token - first_id;
  sum_up(z, at);
  sum_up(z + at + 1, count - at - 1);
  part.sum += 1.0f;
}

// Calls visit(logits, first id, count, the largest of them) for each tile.
template <class T, class Visit>
void each_tile(const RowSpan& span, Visit visit) {
  const auto* row = static_cast<const typename T::Storage*>(span.row);
  for (int64_t id = span.begin; id < span.end; id += kTile) {
    const int64_t count = span.end - id < kTile ? span.end - id : kTile;
    visit(row + id, id, count, tile_max<T>(row + id, count));
  }
}

template <class T>
void stats(const RowSpan& span, RowPart& part) {
  each_tile<T>(span, [&](const typename T::Storage* z, int64_t id, int64_t count, float top) {
    tile_stats<T>(z, id, count, top, part);
  });
}

template <class T>
void topk(const RowSpan& span, RowPart& part, TopKeys& best) {
  each_tile<T>(span, [&](const typename T::Storage* z, int64_t id, int64_t count, float top) {
    if (top > best.bar()) rank_tile<T>(z, id, count, best);
    tile_stats<T>(z, id, count, top, part);
  });
}

// Exponential variates -ln(1 - v) for kLanes groups of 4 ids, with the v of gumbel() in philox.h.
inline void exponentials(const SampleKey& key, uint32_t first_group, float* out /*[4 * kLanes]*/) {
  U c0 = {}, c1 = {}, c2 = {}, c3 = {};
  for (int lane = 0; lane < kLanes; ++lane) c0[lane] = first_group + lane;
  c1 += key.step;
  c2 += key.position;
  c3 += key.sequence;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
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
void sample(const RowSpan& span, float inverse_temperature, const SampleKey& key,
            const Nucleus& nucleus, SamplePart& part) {
  constexpr int64_t kBlock = 4 * kLanes;
  const auto* row = static_cast<const typename T::Storage*>(span.row);
  float z[kBlock], noise[kBlock];
  double total = part.sum;  // float32 would lose many small terms, added to 1 one by one
  for (int64_t base = span.begin / kBlock * kBlock; base < span.end; base += kBlock) {
    const int64_t first = base > span.begin ? base : span.begin;
    const int64_t last = base + kBlock < span.end ? base + kBlock : span.end;
    float largest = -kInfinity;
    for (int64_t i = 0; i < kBlock; ++i) {
      const int64_t id = base + i;
      z[i] = id >= first && id < last ? clamp_logit(T::value(row[id])) : -kInfinity;
      if (!nucleus.keeps(z[i], id)) z[i] = -kInfinity;
      largest = z[i] > largest ? z[i] : largest;
    }
    if (largest == -kInfinity) continue;
    if (largest > part.max) {
      part.sum = static_cast<float>(total);
      part.rescale(largest, inverse_temperature);
      total = part.sum;
    }
    F sum{};
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      F d = (load<F>(z + i) - part.max) * inverse_temperature;
      d = d < kExpFloor ? splat(kExpFloor) : d;
      sum += exp_nonpositive(d);
    }
    total += reduce_add(sum);
    const float reference = score_reference(part.max, inverse_temperature);
    if ((largest - reference) * inverse_temperature + kLargestNoise < part.score)
      continue;  // none of these can win
    exponentials(key, static_cast<uint32_t>(base / 4), noise);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const F score =
          (load<F>(z + i) - reference) * inverse_temperature - log_positive(load<F>(noise + i));
      for (int lane = 0; lane < kLanes; ++lane)
        if (score[lane] > part.score) {
          part.score = score[lane];
          part.logit = z[i + lane];
          part.token = static_cast<int32_t>(base + i + lane);
        }
    }
  }
  part.sum = static_cast<float>(total);
}

}  // namespace

const RowKernel row_kernel = {{stats<Float32>, stats<BFloat16>, stats<Float16>},
                              {topk<Float32>, topk<BFloat16>, topk<Float16>},
                              {sample<Float32>, sample<BFloat16>, sample<Float16>}};

}  // namespace dparallel::cpu::DPARALLEL_SIMD
