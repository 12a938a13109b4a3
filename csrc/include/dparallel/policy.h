// Policies are data: a row of five floats per sequence. Whatever the rule, what it commits is a
// prefix of the masked positions sorted by the rule's score, best first, ties to the lowest
// position.
#pragma once

#include "dparallel/common.h"

namespace dparallel {

enum Selector : int {
  kSelectConfidence = 0,
  kSelectEntropy,
  kSelectMargin,
  kSelectQuota,
  kSelectFactor,
  kSelectEntropyBound,
  kSelectors
};

enum Score : int { kScoreConfidence = 0, kScoreEntropy, kScoreMargin, kScores };

constexpr int kPolicyFields = 5;

struct Policy {
  int selector;
  float threshold;
  int64_t min_commit;
  int64_t max_commit;
  int score;

  // row [5]: selector, threshold, min_commit, max_commit (inf: no limit), score
  DP_HD static Policy load(const float* row) {
    Policy policy;
    policy.selector = static_cast<int>(row[0]);
    policy.threshold = row[1];
    policy.min_commit = row[2] > 1.0f ? static_cast<int64_t>(row[2]) : 1;
    policy.max_commit = row[3] < 0x1p24f ? static_cast<int64_t>(row[3]) : INT64_MAX;
    policy.score = static_cast<int>(row[4]);
    switch (policy.selector) {
      case kSelectConfidence:
      case kSelectFactor: policy.score = kScoreConfidence; break;
      case kSelectEntropy:
      case kSelectEntropyBound: policy.score = kScoreEntropy; break;
      case kSelectMargin: policy.score = kScoreMargin; break;
      default: break;
    }
    return policy;
  }

  // Larger is better.
  DP_HD float key(float confidence, float margin, float entropy) const {
    return score == kScoreConfidence ? confidence : score == kScoreMargin ? margin : -entropy;
  }

  // Whether the rule alone lets those commit whose own key passes, whatever the others are.
  DP_HD bool by_threshold() const {
    return selector == kSelectConfidence || selector == kSelectMargin || selector == kSelectEntropy;
  }

  // Whether the i + 1 best may commit, by the key of the last of them. Not for the entropy bound,
  // which needs the keys before it.
  DP_HD bool reaches(int32_t i, float key) const {
    switch (selector) {
      case kSelectConfidence:
      case kSelectMargin: return key >= threshold;
      case kSelectEntropy: return -key <= threshold;
      case kSelectQuota: return static_cast<float>(i + 1) <= threshold;
      case kSelectFactor:  // the largest n with p_(n) >= 1 - f / (n + 1)
        return key >= 1.0f - threshold / static_cast<float>(i + 2);
      default: return false;
    }
  }

  // How many commit of `masked`, where the rule alone would commit n.
  DP_HD int64_t limit(int64_t n, int64_t masked) const {
    if (n < min_commit) n = min_commit;
    if (n > max_commit) n = max_commit;
    if (n < 1) n = 1;
    return n < masked ? n : masked;
  }

  // How many of `masked` positions commit. sorted(i): the i-th best key, i in [0, masked).
  template <class Sorted>
  DP_HD int64_t count(int64_t masked, Sorted sorted) const {
    int64_t n = 0;
    if (selector == kSelectEntropyBound) {  // preceding cumulative entropy <= gamma
      float preceding = 0.0f;
      while (n < masked && preceding <= threshold) preceding += -sorted(n++);
    } else {
      for (int64_t i = 0; i < masked; ++i)
        if (reaches(static_cast<int32_t>(i), sorted(i))) n = i + 1;
    }
    return limit(n, masked);
  }
};

}  // namespace dparallel
