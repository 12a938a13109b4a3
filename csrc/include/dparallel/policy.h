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

  // How many of `masked` positions commit. sorted(i): the i-th best key, i in [0, masked).
  template <class Sorted>
  DP_HD int64_t count(int64_t masked, Sorted sorted) const {
    int64_t n = 0;
    switch (selector) {
      case kSelectConfidence:
      case kSelectMargin:
        while (n < masked && sorted(n) >= threshold) ++n;
        break;
      case kSelectEntropy:
        while (n < masked && -sorted(n) <= threshold) ++n;
        break;
      case kSelectQuota:
        n = threshold < static_cast<float>(masked) ? static_cast<int64_t>(threshold) : masked;
        break;
      case kSelectFactor:  // the largest n with p_(n) >= 1 - f / (n + 1)
        for (int64_t i = 0; i < masked; ++i)
          if (sorted(i) >= 1.0f - threshold / static_cast<float>(i + 2)) n = i + 1;
        break;
      case kSelectEntropyBound: {  // preceding cumulative entropy <= gamma
        float preceding = 0.0f;
        while (n < masked && preceding <= threshold) preceding += -sorted(n++);
        break;
      }
      default: break;
    }
    if (n < min_commit) n = min_commit;
    if (n > max_commit) n = max_commit;
    if (n < 1) n = 1;
    return n < masked ? n : masked;
  }
};

}  // namespace dparallel
