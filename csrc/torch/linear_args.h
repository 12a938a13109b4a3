// The arguments of a product, as linear and the ops that end in more take them.
#pragma once

#include <optional>

#include "checks.h"
#include "dparallel/launch.h"

namespace dparallel {

// Of x (N, in) by weights (out, in), in 8 bits where there are scales (out,). No output yet.
inline LinearArgs linear_args(Tensor& x, Tensor& weight, std::optional<Tensor>& scale,
                              std::optional<Tensor>& bias, bool constant) {
  const DType dtype = dtype_of(x, "x");
  DP_CHECK(x.dim() == 2, "x: expected (N, in), got ", described(x));
  DP_CHECK(weight.dim() == 2, "weight: expected (out, in), got ", described(weight));
  const int64_t count = x.size(0), in = x.size(1), out_width = weight.size(0);
  const void* original = weight.data_ptr();
  expect(weight, "weight", scale.has_value() ? ScalarType::Float8_e4m3fn : x.scalar_type(),
         {out_width, in}, x);
  if (scale.has_value()) expect(*scale, "scale", ScalarType::Float, {out_width}, x);
  if (bias.has_value()) expect(*bias, "bias", x.scalar_type(), {out_width}, x);
  make_rows(x);
  return {dtype,
          x.data_ptr(),
          x.stride(0),
          count,
          in,
          out_width,
          weight.data_ptr(),
          data_or_null<float>(scale),
          data_or_null<void>(bias),
          nullptr,
          constant && weight.data_ptr() == original};  // a copy was just written
}

}  // namespace dparallel
