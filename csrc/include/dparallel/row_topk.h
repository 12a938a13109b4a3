// The k largest logits of a row, as keys that order logits and ids at once.
#pragma once

#include "dparallel/nucleus.h"

namespace dparallel {

constexpr int kMostTop = 32;
constexpr uint64_t kNoKey = 0;  // below the key of any logit

// The key of a logit above -inf, clamped, and its id: larger for a larger logit, and for a lower id
// among equal logits. No two keys are equal, so that the k largest do not depend on their order.
DP_HD uint64_t top_key(float z, int64_t id) { return nucleus_key(z, id); }
DP_HD float top_logit(uint64_t key) { return nucleus_logit(static_cast<uint32_t>(key >> 32)); }
DP_HD int64_t top_id(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// The log-probability of a key's id in a row, see RowPart.
DP_HD float top_logprob(uint64_t key, float max, float sum) {
  return (top_logit(key) - max) - logf(sum);
}

}  // namespace dparallel
