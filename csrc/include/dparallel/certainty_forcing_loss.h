// The certainty-forcing loss of a row (dParallel, arXiv 2509.26488): the cross entropy of its label
// at temperature Tc, and the entropy H of softmax(z / T). One read gives, with d = z - max z,
//   S = sum e^(d/Tc)   S' = sum e^(d/T)   W' = sum e^(d/T) d
//   nll = ln S - d_label / Tc             H = ln S' - W' / (T S')
// A second read gives the gradient of a nll + b H, where a and b are the gradients of nll and H:
//   dz_j = a / Tc (e^(d_j/Tc) / S - [j = label]) - b / T^2 e^(d_j/T) / S' (d_j - W'/S')
#pragma once

#include <cmath>

#include "dparallel/row_stats.h"

namespace dparallel {

DP_HD float exponential(float x) { return expf(x); }
DP_HD double exponential(double x) { return exp(x); }
DP_HD float logarithm_of_one_and(float x) { return log1pf(x); }
DP_HD double logarithm_of_one_and(double x) { return log1p(x); }

// 1/Tc and 1/T.
template <class R>
struct InverseTemperatures {
  R ce, entropy;

  // The least d of which an exponent, d / Tc or d / T, is above kExpFloor.
  DP_HD R floor() const { return R(kExpFloor) / (ce < entropy ? ce : entropy); }
};

template <class R>
DP_HD R floored_exponential(R x) {
  return exponential(x < R(kExpFloor) ? R(kExpFloor) : x);
}

enum LossSaved : int { kSavedMax = 0, kSavedSum, kSavedSumT, kSavedMean, kLossSaved };

template <class R>
struct LossRow {
  R nll, entropy;
  bool correct;
  R saved[kLossSaved];  // max, 1/S, 1/S', W'/S'
};

// The sums over part of a row, of d = z - max, without the term of `token`, the lowest id of the
// largest logit. That term is 1. In a confident row the others are tiny and are all of its entropy:
// added to 1, they would be lost to rounding. log1p adds it at the end.
template <class R>
struct LossPart {
  R max = -kInfinity;
  R sum = 0;         // S - 1
  R sum_t = 0;       // S' - 1
  R weighted_t = 0;  // W'
  int32_t token = -1;

  // Makes the sums relative to `to`, a maximum not below the old one, whose id is not in this part:
  // `token`, no longer the maximum, gets its term in the sums.
  DP_HD void rebase(R to, const InverseTemperatures<R>& inverse) {
    if (max > -kInfinity) {
      const R floor = inverse.floor();
      const R d = max - to < floor ? floor : max - to;  // finite: 0 * inf is NaN
      const R e = exponential(d * inverse.entropy);
      weighted_t = e * (weighted_t + (R(1) + sum_t) * d);
      sum_t = e * (R(1) + sum_t);
      sum = exponential(d * inverse.ce) * (R(1) + sum);
    } else {  // no logit above -inf yet: the sums are 0, or NaN, which stays
      sum = sum == sum ? R(0) : sum;
      sum_t = weighted_t = 0;
    }
    max = to;
    token = -1;
  }

  DP_HD void merge(LossPart other, const InverseTemperatures<R>& inverse) {
    const bool theirs = other.token >= 0 &&
                        (token < 0 || other.max > max || (other.max == max && other.token < token));
    if (theirs) {
      rebase(other.max, inverse);
      token = other.token;
    } else {
      other.rebase(max, inverse);
    }
    sum += other.sum;
    sum_t += other.sum_t;
    weighted_t += other.weighted_t;
  }

  DP_HD RowError error() const {
    if (sum != sum) return kRowNan;
    return token < 0 ? kRowEmpty : kRowOk;
  }

  DP_HD LossRow<R> finish(R label_logit, int64_t label,
                          const InverseTemperatures<R>& inverse) const {
    LossRow<R> row;
    const R mean = weighted_t / (R(1) + sum_t);
    const R entropy = logarithm_of_one_and(sum_t) - mean * inverse.entropy;
    row.nll = logarithm_of_one_and(sum) - (label_logit - max) * inverse.ce;
    row.entropy = entropy > R(0) ? entropy : R(0);
    row.correct = token == label;
    row.saved[kSavedMax] = max;
    row.saved[kSavedSum] = R(1) / (R(1) + sum);
    row.saved[kSavedSumT] = R(1) / (R(1) + sum_t);
    row.saved[kSavedMean] = mean;
    return row;
  }
};

// The gradient with respect to a row's logits: at(z) of an id that is not the label, at_label(z) of
// the label.
template <class R>
struct LossGradient {
  R max, share, ce, entropy, mean, label;
  InverseTemperatures<R> inverse;

  DP_HD LossGradient(const R* saved, R grad_nll, R grad_entropy, InverseTemperatures<R> inverse)
      : max(saved[kSavedMax]),
        share(saved[kSavedSum]),
        ce(grad_nll * inverse.ce * saved[kSavedSum]),
        entropy(-grad_entropy * inverse.entropy * inverse.entropy * saved[kSavedSumT]),
        mean(saved[kSavedMean]),
        label(grad_nll * inverse.ce),
        inverse(inverse) {}

  DP_HD R depth(R z) const {
    const R floor = inverse.floor(), d = (z > R(kLargest) ? R(kLargest) : z) - max;
    return d < floor ? floor : d;
  }

  DP_HD R of_entropy(R d) const {
    return entropy * floored_exponential(d * inverse.entropy) * (d - mean);
  }

  DP_HD R at(R z) const {
    const R d = depth(z);
    return ce * floored_exponential(d * inverse.ce) + of_entropy(d);
  }

  // 1 is subtracted from the probability itself, before products are rounded: in a confident row
  // the difference is tiny.
  DP_HD R at_label(R z) const {
    const R d = depth(z);
    return label * (share * floored_exponential(d * inverse.ce) - R(1)) + of_entropy(d);
  }
};

}  // namespace dparallel
