// Cases of a model's layers.
#include "twins.h"

namespace twins {

namespace {

// A tensor [count, width] of rows in one or two strides, in memory of exact size.
struct StridedRows {
  RowStrides rows;
  Numbers numbers;

  StridedRows(DType dtype, int64_t count, int64_t width)
      : rows(strides(count, width)),
        numbers(dtype, count == 0 ? 0 : rows.offset(count - 1) + width) {}
  static RowStrides strides(int64_t count, int64_t width) {
    const int64_t inner = width + one_of({0, 0, 8, 3});
    const int64_t rows = chance(0.5) ? std::max<int64_t>(1, count) : 1 + below(3);
    return {rows, rows * inner + one_of({0, 8, 5}), inner};
  }
};

}  // namespace

void rms_norm_case() {
  const DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  const int64_t width = one_of({1, 5, 64, 80, 128, 1024, 1032, 4096, 5000}), count = below(20);
  const StridedRows x(dtype, count, width), delta(dtype, count, width);
  const Numbers weight(dtype, width);
  Numbers bias(dtype, width);  // small, lest it cancel a product that was rounded to its own size
  for (int64_t i = 0; i < width; ++i) bias.set(i, uniform(-0.25, 0.25));
  Numbers out(dtype, count * width), out2(out), sum(out), sum2(out);
  const bool adds = chance(0.5);
  RmsNormArgs args{dtype,
                   x.numbers.memory.get(),
                   adds ? delta.numbers.memory.get() : nullptr,
                   x.rows,
                   delta.rows,
                   count,
                   width,
                   weight.memory.get(),
                   chance(0.3) ? bias.memory.get() : nullptr,
                   one_of({1e-5f, 1e-6f, 0.1f}),
                   adds ? sum.memory.get() : nullptr,
                   out.memory.get()};
  cpu::rms_norm(args, serial);
  args.sum = adds ? sum2.memory.get() : nullptr;
  args.out = out2.memory.get();
  cuda::rms_norm(args, nullptr);
  near(out2, out, "out");
  near(sum2, sum, "sum");
}

void swiglu_case() {
  const DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  const int64_t width = one_of({1, 7, 64, 1032}), count = below(9);
  StridedRows gate(dtype, count, width), up(dtype, count, width);
  for (int64_t i = 0; i < gate.numbers.count; ++i)
    if (chance(0.1)) gate.numbers.set(i, one_of({-1e4, -90.0, -20.0, 60.0, 3e4, NAN * 1.0}));
  Numbers out(dtype, count * width), out2(out);
  SwigluArgs args{
      dtype, gate.numbers.memory.get(), up.numbers.memory.get(), gate.rows, up.rows, count,
      width, out.memory.get()};
  cpu::swiglu(args, serial);
  args.out = out2.memory.get();
  cuda::swiglu(args, nullptr);
  near(out2, out, "out");
}

// A product of few rows by `weight`: made(args of out) launched by both, and by fewer rows.
template <class Args>
void product_case(Args args, int64_t count, Numbers& out,
                  void (*on_cpu)(const Args&, cpu::Parallel), int (*on_cuda)(const Args&, void*)) {
  Numbers out2(out);
  args.out = out.memory.get();
  on_cpu(args, serial);
  const auto launch = [&](Numbers& to, int64_t rows) {
    args.count = rows;
    args.out = to.memory.get();
    on_cuda(args, nullptr);
  };
  cuda_host::clusters(chance(0.8));
  launch(out2, count);
  near(out2, out, "out");
  const int64_t fewer = count > 0 ? 1 + below(count) : 0;  // as among others, to the bit
  Numbers some(args.dtype, fewer * args.out_width);
  launch(some, fewer);
  REQUIRE(std::memcmp(some.memory.get(), out2.memory.get(), some.bytes()) == 0,
          "rows are not what they are among others");
  cuda_host::clusters(true);
}

// Of a product: the parts of a cluster's CTAs may be of no line, or of more than the ring has. On
// the stand-in's eight SMs: tiles of every height, of one to eight CTAs. A chunk has 64 rows.
struct ProductShape {
  DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  int64_t in = one_of({64, 64, 128, 64 * 17, 64 * 40, 1, 30, 200});
  int64_t out_width = in > 1000 ? one_of({1, 127, 130, 300, 391})
                                : one_of({1, 8, 15, 63, 64, 127, 128, 130, 264, 390, 1030});
  int64_t count = chance(0.1) ? 60 + below(in > 1000 ? 9 : 80) : below(34);
  int64_t stride = in + one_of({0, 0, 8, 3});
  Numbers x{dtype, count == 0 ? 0 : (count - 1) * stride + in}, bias{dtype, out_width};
  Numbers out{dtype, count * out_width};
  bool biased = chance(0.5), constant = chance(0.5);

  LinearArgs args(const void* weight) {
    return {dtype,
            x.memory.get(),
            stride,
            count,
            in,
            out_width,
            weight,
            biased ? bias.memory.get() : nullptr,
            out.memory.get(),
            constant};
  }
};

void linear_case() {
  ProductShape s;
  Numbers weight(s.dtype, s.out_width * s.in);
  for (int64_t i = 0; i < weight.count; ++i) weight.set(i, uniform(-0.5, 0.5) / std::sqrt(s.in));
  product_case<LinearArgs>(s.args(weight.memory.get()), s.count, s.out, cpu::linear, cuda::linear);
}

void fp8_linear_case() {
  ProductShape s;
  const DType dtype = s.dtype;
  const int64_t in = s.in, out_width = s.out_width;
  std::unique_ptr<uint8_t[]> weight(new uint8_t[out_width * in]);  // of exact size
  for (int64_t i = 0; i < out_width * in; ++i) {
    weight[i] = static_cast<uint8_t>(below(256));
    if (weight[i] % 128 == 127) weight[i] = 0;  // NaN
  }
  std::vector<float> scale(out_width);
  for (auto& by : scale) by = static_cast<float>(uniform(0.0005, 0.002) / std::sqrt(in));
  product_case<Fp8LinearArgs>({s.args(weight.get()), scale.data()}, s.count, s.out, cpu::fp8_linear,
                              cuda::fp8_linear);

  Numbers wide(dtype, out_width * in), wide2(wide);
  Fp8WidenArgs widen{dtype, in, out_width, weight.get(), scale.data(), wide.memory.get()};
  cpu::fp8_widen(widen, serial);
  widen.out = wide2.memory.get();
  cuda::fp8_widen(widen, nullptr);
  REQUIRE(std::memcmp(wide.memory.get(), wide2.memory.get(), wide.bytes()) == 0,
          "widened weights differ");
}

}  // namespace twins
