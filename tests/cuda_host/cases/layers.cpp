// Cases of a model's layers.
#include "cases.h"

namespace cases {

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
  launched(cuda::rms_norm(args, nullptr));
  near(out2, out, "out");
  near(sum2, sum, "sum");
  args.count = int64_t{1} << 32;
  REQUIRE(cuda::rms_norm(args, nullptr) == cudaErrorInvalidValue, "more rows than have numbers");
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
  launched(cuda::swiglu(args, nullptr));
  near(out2, out, "out");
}

// A product of few rows by `weight`: made(args of out) launched by both, and by fewer rows.
void product_case(LinearArgs args, int64_t count, Numbers& out,
                  void (*on_cpu)(const LinearArgs&, cpu::Parallel),
                  int (*on_cuda)(const LinearArgs&, void*)) {
  Numbers out2(out);
  args.out = out.memory.get();
  on_cpu(args, serial);
  const auto launch = [&](Numbers& to, int64_t rows) {
    args.count = rows;
    args.out = to.memory.get();
    launched(on_cuda(args, nullptr));
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
// the emulation's eight SMs: tiles of every height, of one to eight CTAs. A chunk has 64 rows.
struct ProductWeights;
struct ProductShape {
  ProductShape() {}
  explicit ProductShape(int64_t out_width) : out_width(out_width) {}

  DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  int64_t in = one_of({64, 64, 128, 64 * 17, 64 * 40, 1, 30, 200});
  int64_t out_width = in > 1000 ? one_of({1, 127, 130, 300, 391})
                                : one_of({1, 8, 15, 63, 64, 127, 128, 130, 264, 390, 1030});
  int64_t count = chance(0.1) ? 60 + below(in > 1000 ? 9 : 80) : below(34);
  int64_t stride = in + one_of({0, 0, 8, 3});
  Numbers x{dtype, count == 0 ? 0 : (count - 1) * stride + in}, bias{dtype, out_width};
  Numbers out{dtype, count * out_width};
  bool biased = chance(0.5), constant = chance(0.5);

  LinearArgs args(const ProductWeights& weights);
};

constexpr uint8_t kWholeE4m3[] = {0xc0, 0xb8, 0x00, 0x38, 0x40};  // -2, -1, 0, 1 and 2

// Random ones, in 8 bits or in the dtype.
struct ProductWeights {
  Numbers numbers;
  std::unique_ptr<uint8_t[]> bytes;  // of exact size
  std::vector<float> scale;

  // whole: from -2 to 2, so that sums are exact in every order.
  ProductWeights(const ProductShape& s, bool bytewise, bool whole = false)
      : numbers(s.dtype, bytewise ? 0 : s.out_width * s.in),
        bytes(new uint8_t[bytewise ? s.out_width * s.in : 0]),
        scale(bytewise ? s.out_width : 0) {
    for (int64_t i = 0; i < numbers.count; ++i)
      numbers.set(i, whole ? below(5) - 2.0 : uniform(-0.5, 0.5) / std::sqrt(s.in));
    for (int64_t i = 0; bytewise && i < s.out_width * s.in; ++i) {
      bytes[i] = whole ? kWholeE4m3[below(5)] : static_cast<uint8_t>(below(256));
      if (bytes[i] % 128 == 127) bytes[i] = 0;  // NaN
    }
    for (auto& by : scale) by = static_cast<float>(uniform(0.0005, 0.002) / std::sqrt(s.in));
  }
};

LinearArgs ProductShape::args(const ProductWeights& weights) {
  const bool bytewise = !weights.scale.empty();
  if (bytewise) cuda_host::constant(weights.bytes.get(), constant ? out_width * in : 0);
  else cuda_host::constant(weights.numbers.memory.get(), constant ? weights.numbers.bytes() : 0);
  return {dtype,
          x.memory.get(),
          stride,
          count,
          in,
          out_width,
          bytewise ? static_cast<void*>(weights.bytes.get()) : weights.numbers.memory.get(),
          bytewise ? weights.scale.data() : nullptr,
          biased ? bias.memory.get() : nullptr,
          out.memory.get(),
          constant};
}

void linear_case() {
  ProductShape s;
  const ProductWeights weights(s, false);
  product_case(s.args(weights), s.count, s.out, cpu::linear, cuda::linear);
}

void fp8_linear_case() {
  ProductShape s;
  const ProductWeights weights(s, true);
  product_case(s.args(weights), s.count, s.out, cpu::fp8_linear, cuda::fp8_linear);

  Numbers wide(s.dtype, s.out_width * s.in), wide2(wide);
  Fp8WidenArgs widen{s.dtype,          s.in, s.out_width, weights.bytes.get(), weights.scale.data(),
                     wide.memory.get()};
  cpu::fp8_widen(widen, serial);
  widen.out = wide2.memory.get();
  launched(cuda::fp8_widen(widen, nullptr));
  REQUIRE(std::memcmp(wide.memory.get(), wide2.memory.get(), wide.bytes()) == 0,
          "widened weights differ");
}

// Products that end in more have the bits of their steps, but with norms, where the product may add
// in another order: there sums are exact.
void linear_swiglu_case() {
  const int64_t width = one_of<int64_t>({1, 24, 32, 64, 96, 130, 160, 512});
  ProductShape s(2 * width);
  const ProductWeights weights(s, chance(0.5));
  LinearArgs args = s.args(weights);
  cuda_host::clusters(chance(0.8));
  launched((args.scale != nullptr ? cuda::fp8_linear : cuda::linear)(args, nullptr));
  Numbers out(s.dtype, s.count * width), out2(out);
  const RowStrides rows{std::max<int64_t>(1, s.count), 0, 2 * width};
  const char* up = s.out.memory.get() + width * element_size(s.dtype);
  const SwigluArgs swiglu{s.dtype, s.out.memory.get(), up, rows, rows, s.count,
                          width,   out.memory.get()};
  launched(cuda::swiglu(swiglu, nullptr));
  args.out = out2.memory.get();
  const std::unique_ptr<char[]> scratch(new char[cuda::linear_swiglu_scratch(args)]);
  launched(cuda::linear_swiglu(args, {scratch.get(), nullptr}, nullptr));
  REQUIRE(std::memcmp(out.memory.get(), out2.memory.get(), out.bytes()) == 0, "out differs");
  cuda_host::clusters(true);
}

void linear_kv_write_case() {
  const int64_t dim = one_of<int64_t>({6, 32, 64, 64, 128, 128, 192}), heads = 1 + below(3);
  const int64_t q_heads = heads * (1 + below(3)), page_size = one_of<int64_t>({1, 5, 16});
  ProductShape s((q_heads + 2 * heads) * dim);
  const bool norms = chance(0.5);
  const ProductWeights weights(s, chance(0.5), norms);
  for (int64_t i = 0; norms && i < s.x.count; ++i) s.x.set(i, below(5) - 2.0);
  const int64_t pages = (s.count + page_size) / page_size + below(3), table = 1 + below(9);
  const CacheLayout layout = random_layout(pages, page_size, heads, dim);
  const int64_t rotary = chance(0.8) ? dim : 2 * below(dim / 2 + 1);
  std::vector<float> cos(table * rotary / 2), sin(table * rotary / 2);
  for (auto* of : {&cos, &sin})
    for (auto& x : *of) x = static_cast<float>(uniform(-1, 1));
  std::vector<int64_t> slots(pages * page_size), positions(s.count);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), engine);
  slots.resize(s.count);
  for (auto& slot : slots)
    if (chance(0.2)) slot = -1;
  for (auto& position : positions) position = below(table);
  Numbers keys(s.dtype, pages * page_size * heads * dim), values(keys), keys2(keys), values2(keys);
  LinearKvWriteArgs args{s.args(weights), {}};
  KvWriteArgs& write = args.write;
  write.dtype = s.dtype;
  write.count = s.count;
  write.q_heads = q_heads;
  write.positions = positions.data();
  write.slot_mapping = slots.data();
  write.cos = cos.data();
  write.sin = sin.data();
  write.table = table;
  write.rotary_dim = rotary;
  write.k_cache = keys2.memory.get();
  write.v_cache = values2.memory.get();
  write.k_layout = write.v_layout = layout;
  Numbers q_norm(s.dtype, dim), k_norm(s.dtype, dim);
  if (norms) {
    write.q_norm = q_norm.memory.get();
    write.k_norm = k_norm.memory.get();
    write.eps = 1e-5f;
  }

  cuda_host::clusters(chance(0.8));
  Numbers q(s.dtype, s.count * q_heads * dim);
  args.product.out = q.memory.get();
  const int64_t scratch_bytes = cuda::linear_kv_write_scratch(args);
  const std::unique_ptr<char[]> scratch(new char[scratch_bytes]);
  launched(cuda::linear_kv_write(args, {scratch.get(), nullptr}, nullptr));

  LinearArgs product = s.args(weights);
  const bool bytewise = product.scale != nullptr;
  const bool in_steps = scratch_bytes > 0;  // two products, of other cuts than one
  const int64_t size = element_size(s.dtype), width = s.out_width;
  if (in_steps && s.count > 0) {
    Numbers some(s.dtype, s.count * q_heads * dim), more(s.dtype, s.count * 2 * heads * dim);
    const auto by = bytewise ? cuda::fp8_linear : cuda::linear;
    launched(by(columns_of(product, 0, q_heads * dim, some.memory.get()), nullptr));
    launched(by(columns_of(product, q_heads * dim, 2 * heads * dim, more.memory.get()), nullptr));
    for (int64_t n = 0; n < s.count; ++n) {
      std::memcpy(s.out.memory.get() + n * width * size,
                  some.memory.get() + n * q_heads * dim * size, q_heads * dim * size);
      std::memcpy(s.out.memory.get() + (n * width + q_heads * dim) * size,
                  more.memory.get() + n * 2 * heads * dim * size, 2 * heads * dim * size);
    }
  } else {
    launched((bytewise ? cuda::fp8_linear : cuda::linear)(product, nullptr));
  }
  write.q = s.out.memory.get();
  write.k = s.out.memory.get() + q_heads * dim * size;
  write.v = s.out.memory.get() + (q_heads + heads) * dim * size;
  write.q_stride = write.k_stride = write.v_stride = width;
  write.k_cache = keys.memory.get();
  write.v_cache = values.memory.get();
  launched(cuda::kv_write(write, nullptr));
  const auto bits = [](const Numbers& found, const Numbers& expected, const char* name) {
    REQUIRE(std::memcmp(found.memory.get(), expected.memory.get(), expected.bytes()) == 0,
            "%s differs", name);
  };
  for (int64_t n = 0; n < s.count; ++n)
    REQUIRE(std::memcmp(q.memory.get() + n * q_heads * dim * size,
                        s.out.memory.get() + n * width * size, q_heads * dim * size) == 0,
            "q differs");
  bits(keys2, keys, "k_cache");
  bits(values2, values, "v_cache");
  cuda_host::clusters(true);
}

}  // namespace cases
