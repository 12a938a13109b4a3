// Policies are data: a row of five floats for each window. Every rule commits a prefix of the
// masked positions sorted by the rule's score, best first, ties to the lowest position.
#pragma once

#include <cmath>

#include "dparallel/numeric.h"

namespace dparallel {

enum Selector : int {
  kSelectConfidence = 0,
  kSelectEntropy,
  kSelectMargin,
  kSelectQuota,
  kSelectFactor,
  kSelectEntropyBound,
  kSelectFrechet,
  kSelectors
};

// In the order of the selectors that compare a score with their threshold.
enum Score : int { kScoreConfidence = 0, kScoreEntropy, kScoreMargin, kScores };

constexpr int kPolicyFields = 5;
constexpr int kMostCommits = 1 << 24;  // float32 holds every whole number up to it

// A field of a policy row as a whole number, clamped to its bounds, NaN to `least`. Rows on a
// device are read unchecked, and converting a float that no int can hold is undefined.
DP_HD int whole_number(float x, int least, int most) {
  const auto low = static_cast<float>(least), high = static_cast<float>(most);
  return static_cast<int>(x > low ? (x < high ? x : high) : low);
}

struct Policy {
  int selector;
  float threshold;
  int min_commit;
  int max_commit;
  int score;

  // row [5]: selector, threshold, min_commit, max_commit (inf: no limit), score. Any floats have a
  // meaning: with a threshold of NaN no key passes, and as many commit as `limit` demands.
  DP_HD static Policy load(const float* row) {
    Policy policy;
    policy.selector = whole_number(row[0], 0, kSelectors - 1);
    policy.threshold = row[1];
    policy.min_commit = whole_number(row[2], 0, kMostCommits);
    policy.max_commit = row[3] >= static_cast<float>(kMostCommits)
                            ? INT32_MAX
                            : whole_number(row[3], 1, kMostCommits);
    const int own = whole_number(row[4], 0, kScores - 1);
    policy.score = policy.by_threshold()                    ? policy.selector
                   : policy.selector == kSelectQuota        ? own
                   : policy.selector == kSelectEntropyBound ? kScoreEntropy
                                                            : kScoreConfidence;
    return policy;
  }

  // The rule's score of a position; larger is better.
  DP_HD float key(float confidence, float margin, float entropy) const {
    return score == kScoreConfidence ? confidence : score == kScoreMargin ? margin : -entropy;
  }

  // Whether a position passes the rule by its own key alone, whatever the other keys are.
  DP_HD bool by_threshold() const { return selector < kSelectQuota; }

  // Whether a position passes by the sum of the keys that are better than its own.
  DP_HD bool cumulative() const { return selector >= kSelectEntropyBound; }

  // Whether the rule lets the i + 1 best positions commit, given the key of the last of them; not
  // for cumulative rules.
  DP_HD bool reaches(int32_t i, float key) const {
    float least = threshold;
    if (selector == kSelectEntropy) least = -threshold;
    if (selector == kSelectQuota)
      least = static_cast<float>(i + 1) <= threshold ? -kInfinity : __builtin_nanf("");
    if (selector == kSelectFactor)  // the largest n with p_(n) >= 1 - f / (n + 1)
      least =
          1.0f -
          Denominator(static_cast<float>(i + 2)).under(threshold > kLargest ? kLargest : threshold);
    return key >= least;
  }

  // How many of `masked` positions commit, where the rule alone would commit n.
  template <class Int>
  DP_HD Int limit(Int n, Int masked) const {
    if (n < min_commit) n = min_commit;
    if (n > max_commit) n = max_commit;
    return n < masked ? n : masked;
  }

  // How many of `masked` positions a cumulative rule alone lets commit. sorted(i): the i-th best
  // key, i in [0, masked).
  template <class Int, class Sorted>
  DP_HD Int reached(Int masked, Sorted sorted) const {
    const bool by_entropy = selector == kSelectEntropyBound;
    Int n = 0;
    // By entropy: that of the better ones. Else: at worst the n best are right together with the
    // probability 1 - sum of (1 - p_(j)) over j <= n, and another token of the last is right with
    // 1 - p_(n). The gap between the two, p_(n) - sum, falls with n.
    float sum = 0.0f;
    for (; n < masked; ++n) {
      const float key = sorted(n);
      if (by_entropy && !(sum <= threshold)) break;
      sum += by_entropy ? -key : 1.0f - key;
      if (!by_entropy && !(key - sum > threshold)) break;
    }
    return n;
  }

  // How many of `masked` positions commit.
  template <class Sorted>
  DP_HD int64_t count(int64_t masked, Sorted sorted) const {
    int64_t n = 0;
    if (cumulative()) {
      n = reached(masked, sorted);
    } else {
      for (int64_t i = 0; i < masked; ++i)
        if (reaches(static_cast<int32_t>(i), sorted(i))) n = i + 1;
    }
    return limit(n, masked);
  }
};

struct PolicyBounds {
  float low, high;
  bool whole;
};

// The bounds of a field of a row, as in the table of dparallel_ext/policies.py. A threshold may
// also be the next float beyond its bounds, by which published decoders exclude the bound itself.
inline PolicyBounds policy_bounds(int field, const float* row) {
  constexpr PolicyBounds kThreshold[kSelectors] = {
      {0.0f, 1.0f, false},     {0.0f, kInfinity, false}, {0.0f, 1.0f, false},
      {1.0f, kInfinity, true}, {0.0f, kInfinity, false}, {0.0f, kInfinity, false},
      {0.0f, 1.0f, false}};
  const PolicyBounds fields[kPolicyFields] = {{0.0f, kSelectors - 1, true},
                                              kThreshold[whole_number(row[0], 0, kSelectors - 1)],
                                              {0.0f, kMostCommits, true},
                                              {row[2] > 1.0f ? row[2] : 1.0f, kInfinity, true},
                                              {0.0f, kScores - 1, true}};
  return fields[field];
}

// The first field of a row that is out of its bounds; kPolicyFields: none.
inline int policy_misfit(const float* row) {
  for (int field = 0; field < kPolicyFields; ++field) {
    PolicyBounds bounds = policy_bounds(field, row);
    if (field == 1) {
      bounds.low = std::nextafter(bounds.low, -kInfinity);
      bounds.high = std::nextafter(bounds.high, kInfinity);
    }
    const float x = row[field];
    if (!(x >= bounds.low && x <= bounds.high) || (bounds.whole && std::trunc(x) != x))
      return field;
  }
  return kPolicyFields;
}

}  // namespace dparallel
