// The 16-bit float formats from their bits, exactly, without a library's types.
#pragma once

#include <cstring>

#include "dparallel/common.h"

namespace dparallel {

DP_HD float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DP_HD float bfloat16_value(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

DP_HD float float16_value(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  if (magnitude >= (0x7c00u << 13)) return from_bits(magnitude | 0x7f800000u | sign);  // inf, NaN
  const float value = from_bits(magnitude) * 0x1p112f;  // moves the bias; right for subnormals too
  return sign ? -value : value;
}

}  // namespace dparallel
