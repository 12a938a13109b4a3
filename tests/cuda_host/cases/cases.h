// What the cases of every op share: random inputs, memory of exact size, and comparisons.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_host.h"
#include "dparallel/certainty_forcing_loss.h"
#include "dparallel/distillation_loss.h"
#include "dparallel/launch.h"
#include "dparallel/linear_steps.h"
#include "dparallel/numeric.h"
#include "dparallel/row_topk.h"

namespace cases {

using namespace dparallel;

inline std::mt19937_64 engine;
inline int64_t below(int64_t n) {
  return static_cast<int64_t>(engine() % static_cast<uint64_t>(n));
}
inline bool chance(double p) { return std::uniform_real_distribution<>()(engine) < p; }
inline Flag flag(double p) { return chance(p) ? static_cast<Flag>(1 + below(255)) : Flag{0}; }
inline double uniform(double a, double b) { return std::uniform_real_distribution<>(a, b)(engine); }
template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[below(static_cast<int64_t>(values.size()))];
}

inline void serial(int64_t n, cpu::Body body, const void* context) {
  if (n > 0) body(0, n, context);
}

inline std::string now;  // the case being run

struct LaunchFailed {};  // ends a case

#define REQUIRE(condition, ...)                         \
  do {                                                  \
    if (!(condition)) {                                 \
      std::fprintf(stderr, "cases: %s: ", now.c_str()); \
      std::fprintf(stderr, __VA_ARGS__);                \
      std::fprintf(stderr, " (%s)\n", #condition);      \
      std::exit(1);                                     \
    }                                                   \
  } while (0)

// A launcher's answer: what CUDA said of its launches, once.
inline void launched(int code) {
  const bool failed = cuda_host::launch_failed();
  REQUIRE((code != 0) == failed, "a launch %s, and the launcher said %d",
          failed ? "failed" : "succeeded", code);
  REQUIRE(cudaGetLastError() == 0, "an error is left behind");
  if (failed) throw LaunchFailed{};
}

template <class T>
void same(const std::vector<T>& cuda, const std::vector<T>& cpu, const char* name) {
  for (size_t i = 0; i < cpu.size(); ++i)
    REQUIRE(cuda[i] == cpu[i], "%s[%zu]: %lld, CPU %lld", name, i, (long long)cuda[i],
            (long long)cpu[i]);
}

// Each is within 2e-6 + 1e-6 |x| of the truth.
inline void close(const std::vector<float>& cuda, const std::vector<float>& cpu, const char* name) {
  for (size_t i = 0; i < cpu.size(); ++i) {
    const float a = cuda[i], b = cpu[i];
    const bool equal = a == b || (a != a && b != b);
    REQUIRE(equal || std::fabs(a - b) <= 4e-6f + 2e-6f * std::fabs(b), "%s[%zu]: %.9g, CPU %.9g",
            name, i, a, b);
  }
}

// Logits [rows] of `vocab` with a random stride, in their dtype, in memory that ends with them.
struct Rows {
  DType dtype;
  int64_t vocab, stride, rows;
  std::unique_ptr<char[]> memory;

  Rows(int64_t rows, int64_t vocab, bool bad, double repeat, bool wide = false)
      : Rows(rows, vocab, bad, repeat,
             wide ? DType::float64 : one_of({DType::float32, DType::bfloat16, DType::float16})) {}
  Rows(int64_t rows, int64_t vocab, bool bad, double repeat, DType dtype)
      : dtype(dtype), vocab(vocab), stride(vocab + (chance(0.5) ? below(9) : 0)), rows(rows) {
    const int64_t size = element_size();
    const int64_t elements = rows == 0 ? 0 : (rows - 1) * stride + vocab;
    memory.reset(new char[std::max<int64_t>(1, elements * size)]);
    std::normal_distribution<float> normal(0.0f, static_cast<float>(uniform(0.1, 6.0)));
    // At -200 what pads a vector, a 0, lies beyond the range of exp above the row.
    const float shift = chance(0.3) ? one_of({-60.0f, -200.0f}) : 0.0f;
    const bool coarse = chance(0.2);  // many equal logits
    for (int64_t i = 0; i < elements; ++i) {
      float z = normal(engine) + shift;
      if (coarse && repeat == 0) z = std::round(z);
      put(i, z);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (r > 0 && chance(repeat)) {
        memcpy(memory.get() + r * stride * size, memory.get() + below(r) * stride * size,
               vocab * size);
        continue;
      }
      if (chance(0.3)) put(r * stride + below(vocab), 30.0f);  // a sure row
      if (chance(0.1)) put(r * stride + below(vocab), kInfinity);
      if (chance(0.3)) put(r * stride + below(vocab), -kInfinity);
      if (bad && chance(0.1)) put(r * stride + below(vocab), NAN);
      if (bad && chance(0.1))
        for (int64_t v = 0; v < vocab; ++v) put(r * stride + v, -kInfinity);
    }
  }

  int64_t element_size() const {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  }

  // Element i of memory like this.
  double element(const char* from, int64_t i) const {
    if (dtype == DType::float64) return reinterpret_cast<const double*>(from)[i];
    if (dtype == DType::float32) return reinterpret_cast<const float*>(from)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(from)[i];
    return dtype == DType::bfloat16 ? bfloat16_value(bits) : float16_value(bits);
  }

  void put(int64_t i, float z) {
    if (dtype == DType::float64) {
      const double wide = z;
      memcpy(memory.get() + 8 * i, &wide, 8);
    } else if (dtype == DType::float32) {
      memcpy(memory.get() + 4 * i, &z, 4);
    } else {
      const uint16_t bits = dtype == DType::bfloat16 ? bfloat16_bits(z) : float16_bits(z);
      memcpy(memory.get() + 2 * i, &bits, 2);
    }
  }

  // Some rows become what no model gives: of the largest numbers of the dtype, or near them.
  void exaggerate() {
    const float most = dtype == DType::float16    ? 65504.0f
                       : dtype == DType::bfloat16 ? bfloat16_value(0x7f7f)
                                                  : kLargest;
    for (int64_t r = 0; r < rows; ++r) {
      const int kind = chance(0.7) ? -1 : static_cast<int>(below(3));
      for (int64_t v = 0; v < vocab && kind >= 0; ++v)
        put(r * stride + v, kind == 0   ? -most
                            : kind == 1 ? one_of({-most, most, 0.0f, 1.0f})
                                        : most * static_cast<float>(uniform(-1.0, 1.0)));
    }
  }

  // Behind an element of a row, which becomes as large, some become infinite: not many, so that a
  // thread meets the element first.
  void append_infinities() {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = below(std::min<int64_t>(vocab, 3000));
      put(r * stride + first, kLargest);
      for (int64_t v = first + 1; v < vocab; ++v)
        if (chance(0.03)) put(r * stride + v, kInfinity);
    }
  }

  Logits flat() const {
    return {memory.get(), dtype, vocab, std::max<int64_t>(1, rows), 0, stride};
  }
};

inline int64_t random_vocab() {
  return chance(0.04)
             ? one_of<int64_t>({126464, 50257})
             : one_of<int64_t>({1, 2, 3, 7, 8, 9, 31, 255, 1000, 4099, 16384, 16385, 40001});
}

inline std::vector<int64_t> random_suppress(int64_t vocab) {
  std::vector<int64_t> ids;
  if (chance(0.4))
    for (int64_t i = 0; i < 3; ++i) ids.push_back(below(vocab));
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

// Of half of the calls at temperature 0.
inline Sampling random_sampling(const std::vector<int64_t>& keys, int64_t position_offset) {
  const double given = chance(0.5)   ? 0.0
                       : chance(0.8) ? uniform(0.3, 2.0)
                                     : one_of({1e-38, 1e-5, 1e-3, 1e4, 1e30, 1e38, 1e300});
  Sampling sampling{inverse_temperature_of(given), keys.data(), position_offset};
  if (chance(0.4)) sampling.top_p = chance(0.1) ? 0.0 : uniform(0.0, 1.0);
  if (chance(0.4)) sampling.top_k = one_of<int64_t>({1, 2, 17, 3000});
  return sampling;
}

struct Result {
  std::vector<int64_t> tokens, error;
  std::vector<float> fields;
  Result(int64_t count, int64_t errors)
      : tokens(2 * count, -7), error(errors, -7), fields(kRowFields * count, -7.0f) {}
  RowOutput output() { return {tokens.data(), fields.data(), error.data()}; }
};

struct Memory {
  std::vector<char> scratch;
  std::vector<int32_t> counters;
  Memory(int64_t bytes, int64_t count)
      : scratch(std::max<int64_t>(1, bytes), '\x5a'), counters(count) {}
  cuda::Workspace workspace() { return {scratch.data(), counters.data()}; }
  void check() const {
    for (const int32_t c : counters) REQUIRE(c == 0, "a counter is left at %d", c);
  }
};

// Numbers of a 16-bit or 32-bit type, in memory of exact size.
struct Numbers {
  DType dtype;
  int64_t count;
  std::unique_ptr<char[]> memory;

  Numbers(DType dtype, int64_t count) : dtype(dtype), count(count), memory(new char[bytes()]) {
    for (int64_t i = 0; i < count; ++i) set(i, uniform(-2, 2));
  }
  Numbers(const Numbers& other)
      : dtype(other.dtype), count(other.count), memory(new char[bytes()]) {
    std::memcpy(memory.get(), other.memory.get(), bytes());
  }
  int64_t bytes() const { return count * (dtype == DType::float32 ? 4 : 2); }
  void set(int64_t i, double value) {
    const auto x = static_cast<float>(value);
    if (dtype == DType::float32) reinterpret_cast<float*>(memory.get())[i] = x;
    else
      reinterpret_cast<uint16_t*>(memory.get())[i] =
          dtype == DType::bfloat16 ? bfloat16_bits(x) : float16_bits(x);
  }
  double get(int64_t i) const {
    if (dtype == DType::float32) return reinterpret_cast<const float*>(memory.get())[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(memory.get())[i];
    return dtype == DType::bfloat16 ? bfloat16_value(bits) : float16_value(bits);
  }
};

inline CacheLayout random_layout(int64_t pages, int64_t page_size, int64_t heads, int64_t dim) {
  if (chance(0.5))
    return {pages, page_size, heads, dim, page_size * heads * dim, page_size * dim, dim};
  return {pages, page_size, heads, dim, page_size * heads * dim, dim, heads * dim};
}

inline void near(const Numbers& cuda, const Numbers& cpu, const char* name) {
  const double step = cpu.dtype == DType::bfloat16  ? 0.01
                      : cpu.dtype == DType::float16 ? 2e-3
                                                    : 4e-6;
  for (int64_t i = 0; i < cpu.count; ++i) {
    const double a = cuda.get(i), b = cpu.get(i);
    REQUIRE((a != a && b != b) || std::fabs(a - b) <= step * (1 + std::fabs(b)),
            "%s[%lld]: %.9g, CPU %.9g", name, (long long)i, a, b);
  }
}

// A random case of an op, whose CUDA kernel and CPU kernel are run on it.
void row_stats_case();
void row_topk_case();
void class_stats_case();
void best_path_case();
void select_case();
void unmask_case();
void loss_case();
void distillation_case();
void kv_write_case();
void kv_move_case();
void block_attention_case();
void rms_norm_case();
void swiglu_case();
void linear_case();
void fp8_linear_case();
void linear_swiglu_case();
void linear_kv_write_case();
void commit_case();
void accept_case();
void keep_error_case();

}  // namespace cases
