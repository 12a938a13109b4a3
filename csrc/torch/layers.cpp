// The ops of a layer beside attention: rms_norm, swiglu, linear, fp8_linear, linear_swiglu,
// fp8_widen.
#include <optional>
#include <tuple>
#include <vector>

#include "backend.h"
#include "linear_args.h"

namespace dparallel {
namespace {

// (R, width) or (B, L, width) like `like`; rows become contiguous.
RowStrides rows_of(Tensor& t, const char* name, const Tensor& like) {
  check_shape(t, name, like.scalar_type(), sizes_of(like));
  const int64_t last = t.dim() - 1;
  DP_CHECK((last == 1 || last == 2) && t.size(last) >= 1, name,
           ": expected 2 or 3 dimensions, and rows of at least 1 number, got ", described(t));
  check_device(t, name, like, "the others");
  make_rows(t);
  const int64_t inner = t.size(last - 1);
  return {inner > 0 ? inner : 1, t.dim() == 3 ? t.stride(0) : 0, t.stride(last - 1)};
}

template <class Backend>
std::tuple<Tensor, Tensor> rms_norm(Tensor x, std::optional<Tensor> delta, Tensor weight,
                                    std::optional<Tensor> bias, double eps) {
  const DType dtype = dtype_of(x, "x");
  const RowStrides x_rows = rows_of(x, "x", x);
  const RowStrides delta_rows =
      delta.has_value() ? rows_of(*delta, "delta", x) : RowStrides{1, 0, 0};
  const int64_t width = x.size(x.dim() - 1);
  expect(weight, "weight", x.scalar_type(), {width}, x);
  if (bias.has_value()) expect(*bias, "bias", x.scalar_type(), {width}, x);
  Tensor out = torch::stable::new_empty(x, sizes_of(x));
  Tensor sum =
      torch::stable::new_empty(x, delta.has_value() ? sizes_of(x) : std::vector<int64_t>{0});
  const RmsNormArgs args{dtype,
                         x.data_ptr(),
                         data_or_null<void>(delta),
                         x_rows,
                         delta_rows,
                         row_count(x),
                         width,
                         weight.data_ptr(),
                         data_or_null<void>(bias),
                         static_cast<float>(eps),
                         sum.data_ptr(),
                         out.data_ptr()};
  Backend::template launch<cpu::rms_norm, cuda::rms_norm>("rms_norm", args, x);
  return {out, sum};
}

DPARALLEL_OP(
    rms_norm,
    "rms_norm(Tensor x, Tensor? delta, Tensor weight, Tensor? bias, float eps) -> (Tensor out, "
    "Tensor sum)")

template <class Backend>
Tensor swiglu(Tensor gate, Tensor up) {
  const DType dtype = dtype_of(gate, "gate");
  const RowStrides gate_rows = rows_of(gate, "gate", gate), up_rows = rows_of(up, "up", gate);
  Tensor out = torch::stable::new_empty(gate, sizes_of(gate));
  const SwigluArgs args{
      dtype,           gate.data_ptr(),           up.data_ptr(), gate_rows, up_rows,
      row_count(gate), gate.size(gate.dim() - 1), out.data_ptr()};
  Backend::template launch<cpu::swiglu, cuda::swiglu>("swiglu", args, gate);
  return out;
}

DPARALLEL_OP(swiglu, "swiglu(Tensor gate, Tensor up) -> Tensor")

template <class Backend>
Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, bool constant) {
  std::optional<Tensor> scale;
  LinearArgs args = linear_args(x, weight, scale, bias, constant);
  Tensor out = torch::stable::new_empty(x, {args.count, args.out_width});
  args.out = out.data_ptr();
  Backend::template launch<cpu::linear, cuda::linear>("linear", args, x);
  return out;
}

DPARALLEL_OP(linear, "linear(Tensor x, Tensor weight, Tensor? bias, bool constant=False) -> Tensor")

template <class Backend>
Tensor fp8_linear(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias,
                  bool constant) {
  std::optional<Tensor> scales = scale;
  LinearArgs args = linear_args(x, weight, scales, bias, constant);
  Tensor out = torch::stable::new_empty(x, {args.count, args.out_width});
  args.out = out.data_ptr();
  Backend::template launch<cpu::fp8_linear, cuda::fp8_linear>("fp8_linear", args, x);
  return out;
}

DPARALLEL_OP(fp8_linear,
             "fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, "
             "bool constant=False) -> Tensor")

template <class Backend>
Tensor linear_swiglu(Tensor x, Tensor weight, std::optional<Tensor> scale,
                     std::optional<Tensor> bias, bool constant) {
  LinearArgs args = linear_args(x, weight, scale, bias, constant);
  DP_CHECK(args.out_width > 0 && args.out_width % 2 == 0,
           "weight: expected gates and as many ups, got ", args.out_width, " rows");
  Tensor out = torch::stable::new_empty(x, {args.count, args.out_width / 2});
  args.out = out.data_ptr();
  Backend::template launch<cpu::linear_swiglu, cuda::linear_swiglu, cuda::linear_swiglu_scratch>(
      "linear_swiglu", args, x);
  return out;
}

DPARALLEL_OP(linear_swiglu,
             "linear_swiglu(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, "
             "bool constant=False) -> Tensor")

// Of the dtype of `like`.
template <class Backend>
Tensor fp8_widen(Tensor weight, Tensor scale, Tensor like) {
  const DType dtype = dtype_of(like, "like");
  DP_CHECK(weight.dim() == 2, "weight: expected (out, in), got ", described(weight));
  const int64_t out_width = weight.size(0), in = weight.size(1);
  expect(weight, "weight", ScalarType::Float8_e4m3fn, {out_width, in}, like);
  expect(scale, "scale", ScalarType::Float, {out_width}, like);
  Tensor out = torch::stable::new_empty(like, {out_width, in});
  const Fp8WidenArgs args{dtype,
                          in,
                          out_width,
                          static_cast<const uint8_t*>(weight.data_ptr()),
                          data<float>(scale),
                          out.data_ptr()};
  Backend::template launch<cpu::fp8_widen, cuda::fp8_widen>("fp8_widen", args, like);
  return out;
}

DPARALLEL_OP(fp8_widen, "fp8_widen(Tensor weight, Tensor scale, Tensor like) -> Tensor")

}  // namespace
}  // namespace dparallel
