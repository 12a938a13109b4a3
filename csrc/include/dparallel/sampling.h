// How tokens are drawn from rows of logits: temperature, keys of the noise, nucleus.
#pragma once

#include "dparallel/common.h"

namespace dparallel {

// 1 / T for the temperature T that is used for a given one, or 0, which is greedy. That it is below
// 1e-5: only logits within 1e-4 of the largest would have a chance, and 1 / T would overflow in the
// end. Above 2^100 T is 2^100, beside whose noise logits below 1e23 do not differ.
// dparallel_ext/arguments.py does the same.
constexpr double kColdest = 1e-5, kHottest = 0x1p100;
inline float inverse_temperature_of(double temperature) {
  if (!(temperature >= kColdest)) return 0.0f;
  return 1.0f / static_cast<float>(temperature < kHottest ? temperature : kHottest);
}

// Gumbel-max sampling.
struct Sampling {
  float inverse_temperature;  // as inverse_temperature_of returns it; 0: no sampling
  // row_stats, accept: [count, 4] seed, sequence, position, step of each row.
  // unmask: [windows, 3] seed, sequence, step; the position is column + position_offset.
  const int64_t* keys;
  int64_t position_offset;
  double top_p = 1.0;  // see nucleus.h; 1: all
  int64_t top_k = 0;   // 0: all

  DP_HD bool samples() const { return inverse_temperature > 0.0f; }
  DP_HD bool filters() const { return samples() && (top_p < 1.0 || top_k > 0); }
};

}  // namespace dparallel
