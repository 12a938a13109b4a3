// The nucleus: the ids that top-p and top-k leave to be sampled. Order the admissible ids of a row
// by logit, the largest first, ties by id; an id is kept while the probability of those before it
// is at most top_p and fewer than top_k come before it. So the first is always kept.
//
// The last kept id is found digit by digit (a radix selection) from histograms of counts and of
// probability. Probabilities are summed as whole numbers, so that the order of summation does not
// change the sums.
#pragma once

#include <cmath>

#include "dparallel/numeric.h"
#include "dparallel/row_stats.h"

namespace dparallel {

// The kept ids: those with a logit above `cut`, and of those with that very logit the ids up to
// `last`.
struct alignas(8) Nucleus {
  float cut;
  int32_t last;

  static DP_HD Nucleus all() { return {-kInfinity, INT32_MAX}; }
  DP_HD bool keeps(float z, int64_t id) const { return z > cut || (z == cut && id <= last); }
};

// A key that is larger for a larger logit, and for a lower id among equal logits. z: not NaN.
DP_HD uint64_t nucleus_key(float z, int64_t id) {
  const uint32_t bits = to_bits(z + 0.0f);  // -0 is 0
  const uint32_t high = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(high) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

DP_HD float nucleus_logit(uint32_t high) {
  return from_bits(high >> 31 ? high & 0x7fffffffu : ~high);
}

// exp((z - top) / T) in units of 2^-36: rows of 2^28 equal logits do not overflow.
DP_HD uint64_t nucleus_weight(float z, float top, float inverse_temperature) {
  const float d = (z - top) * inverse_temperature;
  return static_cast<uint64_t>(expf(d < kExpFloor ? kExpFloor : d) * 0x1p36f + 0.5f);
}

struct NucleusBin {
  uint32_t count;
  unsigned long long mass;
};

// A key has digits of 11, 11 and 10 bits of the logit, then as many of the id.
constexpr int kNucleusLevels = 6;
constexpr int kNucleusBins = 2048;

struct NucleusSearch {
  unsigned long long limit;  // an id is kept while the mass before it is at most this ...
  unsigned long long most;   // ... and fewer than so many ids come before it
  unsigned long long mass;   // mass and number of the ids before those that begin with `prefix`
  unsigned long long count;
  uint64_t prefix;  // the digits, so far, of the last kept id's key
  Nucleus found;

  static DP_HD int shift(int level) {
    return (level < 3 ? 32 : 0) + (level % 3 == 0 ? 21 : level % 3 == 1 ? 10 : 0);
  }
  static DP_HD int width(int level) { return level % 3 == 2 ? 10 : 11; }

  // The digit at `level` of a key that begins with `prefix`; -1 for other keys.
  static DP_HD int digit(int level, uint64_t key, uint64_t prefix) {
    if (level > 0 && key >> shift(level - 1) != prefix) return -1;
    return static_cast<int>(key >> shift(level) & ((1u << width(level)) - 1));
  }

  static DP_HD NucleusSearch of(unsigned long long limit, int64_t top_k) {
    return {limit,         top_k > 0 ? static_cast<unsigned long long>(top_k) : ~0ull, 0, 0, 0,
            Nucleus::all()};
  }

  // Returns which of n bins, taken from the highest down, holds the last kept id. Afterwards `mass`
  // and `count` are those of the ids before that bin. bin(i) -> NucleusBin.
  template <class Bin>
  DP_HD int walk(int n, Bin bin) {
    int last = -1;
    unsigned long long mass_before = mass, count_before = count;
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // ptxas would make 80 KB of 256 bins
#endif
    for (int i = n - 1; i >= 0; --i) {
      const NucleusBin here = bin(i);
      if (here.count == 0) continue;
      if (last >= 0 && (mass_before > limit || count_before >= most)) break;
      last = i;
      mass = mass_before;
      count = count_before;
      mass_before += here.mass;
      count_before += here.count;
    }
    return last;
  }

  // Appends digit `value`, whose bin is `here`, to `prefix`; true when `found` is the nucleus.
  DP_HD bool descend(int level, int value, const NucleusBin& here) {
    prefix = prefix << width(level) | static_cast<uint64_t>(value);
    if (level == 2) {  // equal logits: perhaps all of them are kept
      found.cut = nucleus_logit(static_cast<uint32_t>(prefix));
      const unsigned long long each = here.mass / here.count;
      return mass + each * (here.count - 1) <= limit && count + here.count <= most;
    }
    if (level == kNucleusLevels - 1)
      found.last = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(prefix));
    return level == kNucleusLevels - 1;
  }
};

// NucleusSearch::limit, given the mass of the whole row, `total`, which is 0 where top-p keeps all.
DP_HD unsigned long long nucleus_limit(double top_p, unsigned long long total) {
  return top_p < 1.0 ? static_cast<unsigned long long>(top_p * static_cast<double>(total)) : ~0ull;
}

}  // namespace dparallel
