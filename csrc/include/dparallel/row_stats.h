// The statistics of a row of logits z, and how partial results merge. One read of the row suffices,
// with m = max z, z1 the largest admissible logit and H the entropy:
//   e = exp(z - m)   S = sum e   W = sum e (z - m)
//   confidence = exp(z1 - m) / S          H = ln S - W / S
#pragma once

#include <cmath>

#include "dparallel/numeric.h"

namespace dparallel {

// exp(-87) = 1.6e-38: a smaller term cannot change S >= 1, and float32 has no smaller normal
// numbers.
constexpr float kExpFloor = -87.0f;

// +inf counts as the largest float, so that k infinities share the probability evenly; NaN passes
// through.
DP_HD float clamp_logit(float z) { return z > kLargest ? kLargest : z; }

// At least kExpFloor, or NaN.
DP_HD float floored(float d) { return d < kExpFloor ? kExpFloor : d; }

// z - m of a z that is at most m, at least kExpFloor: the latter where m = -inf (no logit seen
// yet). Only a NaN logit gives NaN.
DP_HD float shifted(float z, float m) { return floored(z - (m > -kLargest ? m : -kLargest)); }

// The statistics of part of a row. `max`, `sum` and `weighted` include the mask token; `top1`,
// `top2` (the two largest admissible logits) and `token` (the id of top1) do not.
struct alignas(8) RowPart {
  float max = -kInfinity;
  float sum = 0.0f;       // S, relative to max
  float weighted = 0.0f;  // W, relative to max
  float top1 = -kInfinity;
  float top2 = -kInfinity;
  int32_t token = -1;

  // Adds one logit; `admissible` is false for the mask token.
  DP_HD void add(float z, int32_t id, bool admissible) {
    z = clamp_logit(z);
    const bool rises = z > max;
    float d = rises ? floored(max - z) : shifted(z, max), e = expf(d);
    if (rises) {
      rescale(z, d, e);
      d = 0.0f;
      e = 1.0f;
    }
    sum += e;
    weighted += e * d;
    if (admissible) rank(z, id);
  }

  // The logit that the next one must exceed to change top1 or top2, where ids ascend.
  DP_HD float bar() const { return top2; }

  DP_HD void rank(float z, int32_t id) {
    if (z > top1 || (z == top1 && z > -kInfinity && id < token)) {
      top2 = top1;
      top1 = z;
      token = id;
    } else if (z > top2) {
      top2 = z;
    }
  }

  // sum e (z - m') = e^(m - m') (W + S (m - m')) when the maximum moves from m up to m'.
  DP_HD void rescale(float to) {
    const float d = shifted(max, to);
    rescale(to, d, expf(d));
  }
  // d = m - m', e = exp(d). From m = -inf, where a sum is at most some exp(kExpFloor), nothing
  // remains.
  DP_HD void rescale(float to, float d, float e) {
    weighted = e * (weighted + sum * d);
    sum *= e;
    max = to;
  }

  DP_HD void merge(const RowPart& other) {
    const bool higher = max > other.max;  // then the sums of the other move, else its own
    const float to = higher ? max : other.max;
    const float kept = higher ? sum : other.sum, kept_weighted = higher ? weighted : other.weighted;
    max = higher ? other.max : max;
    sum = higher ? other.sum : sum;
    weighted = higher ? other.weighted : weighted;
    rescale(to);  // by 1 where they are equal
    sum += kept;
    weighted += kept_weighted;
    // Of equal logits the lower id; none, -1, is the largest without its sign.
    const bool lower_id = static_cast<uint32_t>(token) < static_cast<uint32_t>(other.token);
    const bool first = (top1 > other.top1) | ((top1 == other.top1) & lower_id);
    const float lower = first ? other.top1 : top1, next = first ? top2 : other.top2;
    top1 = first ? top1 : other.top1;
    top2 = lower > next ? lower : next;
    token = first ? token : other.token;
  }

  DP_HD RowError error() const {
    if (sum != sum) return kRowNan;
    return token < 0 ? kRowEmpty : kRowOk;  // empty: every admissible logit is -inf
  }
};

// Fields of the float output, in order; each is an array [rows].
enum RowField : int {
  kTop1 = 0,
  kTop2,
  kLse,
  kConfidence,
  kMargin,
  kEntropy,
  kSampleLogprob,
  kMaxLogit,
  kLogSum,
  kRowFields
};

struct RowResult {
  int64_t token;
  int64_t sample;
  float field[kRowFields];
};

// The logit that is subtracted before a score is formed, where `max` is the largest logit: 0 while
// max / T is small, which leaves the scores of ordinary rows as they are, else `max`. So the score
// of the largest logit is finite in every row, and its noise is not lost to rounding.
constexpr float kPlainScore = 1024.0f;
DP_HD float score_reference(float max, float inverse_temperature) {
  const float scaled = max * inverse_temperature;
  return scaled >= -kPlainScore && scaled <= kPlainScore ? 0.0f : max;
}

// The sample of part of a row: Gumbel-max over logits / T of the ids that may be drawn (not the
// mask token, nor ids outside the nucleus), and the sum of their softmax at T.
struct alignas(8) SamplePart {
  float score = -kInfinity;  // the largest (z - score_reference(max)) / T + Gumbel noise
  float logit = -kInfinity;  // the logit of that score's id
  int32_t token = -1;        // that id
  float max = -kInfinity;    // the largest z
  float sum = 0.0f;          // sum exp((z - max) / T)

  DP_HD void merge(const SamplePart& other, float inverse_temperature) {
    const bool higher = max > other.max;  // then the other moves, else its own
    const float to = higher ? max : other.max;
    const float kept = higher ? sum : other.sum, kept_score = higher ? score : other.score;
    const float kept_logit = higher ? logit : other.logit;
    const int32_t kept_token = higher ? token : other.token;
    max = higher ? other.max : max;
    sum = higher ? other.sum : sum;
    score = higher ? other.score : score;
    logit = higher ? other.logit : logit;
    token = higher ? other.token : token;
    if (to > max) rescale(to, inverse_temperature);
    sum += kept;
    const bool mine = score > kept_score ||
                      (score == kept_score && token >= 0 && (kept_token < 0 || token < kept_token));
    if (!mine) {
      score = kept_score;
      logit = kept_logit;
      token = kept_token;
    }
  }

  DP_HD void rescale(float to, float inverse_temperature) {
    // Subtract before multiplying: the difference of two large products would keep their rounding.
    sum *= max == -kInfinity ? 0.0f : expf(shifted((max - to) * inverse_temperature, 0.0f));
    score +=
        (score_reference(max, inverse_temperature) - score_reference(to, inverse_temperature)) *
        inverse_temperature;
    max = to;
  }
};

// Undoes clamp_logit.
DP_HD float unclamped(float z) { return z >= kLargest ? kInfinity : z; }

// The result of a row without NaN. Where it has no admissible logit above -inf, it has no token,
// but what is merged with other rows if the row is a shard of a vocabulary; without any logit above
// -inf it adds nothing to them.
DP_HD RowResult finish(const RowPart& part) {
  constexpr float kNan = __builtin_nanf("");
  const bool empty = part.token < 0;
  const bool nothing = empty && !(part.sum >= 0.5f);  // the largest logit alone adds 1
  const Denominator sum(nothing ? 1.0f : part.sum);
  const float log_sum = logf(nothing ? 1.0f : part.sum);
  const float entropy = log_sum - sum.under(nothing ? 0.0f : part.weighted);
  float p1 = 0.0f, p2 = 0.0f, top = part.top2;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int i = 0; i < 2; ++i, top = part.top1) {  // the second, then the first
    p2 = p1;
    p1 = top == -kInfinity ? 0.0f : sum.under(expf(shifted(top, part.max)));
  }
  RowResult result;
  result.token = result.sample = part.token;
  result.field[kTop1] = unclamped(part.top1);
  result.field[kTop2] = unclamped(part.top2);
  result.field[kConfidence] = empty ? kNan : p1;
  result.field[kMargin] = empty ? kNan : p1 - p2;
  result.field[kEntropy] = entropy > 0.0f ? entropy : 0.0f;
  result.field[kSampleLogprob] = empty ? kNan : (part.top1 - part.max) - log_sum;
  result.field[kMaxLogit] = nothing ? -kInfinity : unclamped(part.max);
  result.field[kLogSum] = log_sum;
  result.field[kLse] = result.field[kMaxLogit] + log_sum;
  return result;
}

// The result of a sampled row: its confidence is that of the sampled token, as published.
DP_HD RowResult finish(const RowPart& part, const SamplePart& sampled, float inverse_temperature) {
  RowResult result = finish(part);
  if (part.token < 0) return result;
  result.sample = sampled.token;
  result.field[kConfidence] = Denominator(part.sum).under(expf(shifted(sampled.logit, part.max)));
  result.field[kSampleLogprob] =
      (sampled.logit - sampled.max) * inverse_temperature - logf(sampled.sum);
  return result;
}

}  // namespace dparallel
