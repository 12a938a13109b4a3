// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC'11). A sample depends on its own
// key alone (seed, sequence, position, step and token id), never on the batch around it.
#pragma once

#include <cmath>

#include "dparallel/common.h"

namespace dparallel {

struct SampleKey {
  uint64_t seed;
  uint32_t sequence;
  uint32_t position;
  uint32_t step;
};

struct Random4 {
  uint32_t word[4];
};

// Four words for the token ids 4 * group ... 4 * group + 3.
DP_HD Random4 philox(const SampleKey& key, uint32_t group) {
  uint32_t c0 = group, c1 = key.step, c2 = key.position, c3 = key.sequence;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Gumbel noise -ln(E), where E = -ln(1 - v) is exponential and v uniform in (0, 1). Large noise,
// which decides the maximum, comes from small v, where float32 resolves 2^-33.
DP_HD float gumbel(uint32_t word) {
  const float v =
      (static_cast<float>(word >> 8) + (static_cast<float>(word & 255u) + 0.5f) * 0x1p-8f) *
      0x1p-24f;
  const float clipped = v < 1.0f ? v : 1.0f - 0x1p-24f;
  return -logf(-log1pf(-clipped));
}

}  // namespace dparallel
