// How the kernels' dtypes store one number; simd.h does the same with vectors.
#pragma once

#include "dparallel/numeric.h"

namespace dparallel::cpu {

struct StoredFloat32 {
  using Storage = float;
  static constexpr Storage kMinusInfinity = -kInfinity;
  DP_HD static float value(Storage z) { return z; }
  DP_HD static Storage narrowed(float v) { return v; }
};

struct StoredBFloat16 {
  using Storage = uint16_t;
  static constexpr Storage kMinusInfinity = 0xff80;
  DP_HD static float value(Storage z) { return bfloat16_value(z); }
  DP_HD static Storage narrowed(float v) { return bfloat16_bits(v); }
};

struct StoredFloat16 {
  using Storage = uint16_t;
  static constexpr Storage kMinusInfinity = 0xfc00;
  DP_HD static float value(Storage z) { return float16_value(z); }
  DP_HD static Storage narrowed(float v) { return float16_bits(v); }
};

// body(T{}) with T of these as `dtype` says, which is not float64.
template <class Body>
auto with_stored(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bfloat16: return body(StoredBFloat16{});
    case DType::float16: return body(StoredFloat16{});
    default: return body(StoredFloat32{});
  }
}

}  // namespace dparallel::cpu
