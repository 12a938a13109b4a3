// Checks of the tensors that an op is given, and what the kernels ask of them. They keep memory
// safe whoever calls, under torch.compile too. Arguments of other strides than a kernel reads are
// copied.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dparallel/common.h"

namespace dparallel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In Python a ValueError.
template <class... Parts>
[[noreturn]] void bad_argument(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}
#define DP_CHECK(condition, ...)                 \
  do {                                           \
    if (!(condition)) bad_argument(__VA_ARGS__); \
  } while (false)

inline DType dtype_of(const Tensor& t, const char* name, bool wide = false) {  // wide: float64 too
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double:
      if (wide) return DType::float64;
      [[fallthrough]];
    default:
      bad_argument(name, ": expected float32, bfloat16 or float16", wide ? " or float64" : "");
  }
}

inline void check_device(const Tensor& t, const char* name, const Tensor& like, const char* of) {
  DP_CHECK(t.get_device() == like.get_device() && t.is_cpu() == like.is_cpu(), name,
           ": expected on the device of ", of);
}

// Checks a tensor that is read, and makes it contiguous.
inline void expect(Tensor& t, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes,
                   const Tensor& like) {
  DP_CHECK(t.scalar_type() == dtype, name, ": wrong dtype");
  check_device(t, name, like, "the others");
  DP_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(),
           " dimensions, got ", t.dim());
  for (size_t i = 0; i < sizes.size(); ++i)
    DP_CHECK(t.size(i) == sizes[i], name, ": expected size ", sizes[i], " in dimension ", i,
             ", got ", t.size(i));
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
}

// The last dimension becomes contiguous.
inline void make_rows(Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.stride(last) != 1 && t.size(last) != 1) t = torch::stable::contiguous(t);
}

// What is changed in place may not be an expanded view, nor another whose elements overlap: by
// ascending strides, each dimension has to step over all that the smaller ones span.
inline void own_memory(const Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1) steps.emplace_back(t.stride(d), t.size(d));
  std::sort(steps.begin(), steps.end());
  int64_t span = 0;
  for (const auto& [stride, size] : steps) {
    DP_CHECK(stride > span, name,
             ": expected memory of its own for each element, which is changed in place, got ", size,
             " elements at a stride of ", stride);
    span += stride * (size - 1);
  }
}

// `rows`: `t`, or the copy that a kernel has changed in its place.
inline void write_back(Tensor& t, const Tensor& rows) {
  if (rows.data_ptr() != t.data_ptr()) torch::stable::copy_(t, rows);
}

// Indices on the CPU, where a look costs nothing.
template <class Index>
void within(const char* name, const Index* index, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i)
    DP_CHECK(low <= index[i] && index[i] < high, name, ": expected in [", std::max<int64_t>(low, 0),
             ", ", high, "), got ", index[i], " at ", i);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// An empty tensor has no address, but an empty list of positions is not the lack of one.
inline const int64_t* listed(const Tensor& positions) {
  static const int64_t none = 0;
  return positions.numel() > 0 ? data<int64_t>(positions) : &none;
}

inline int64_t length_of(const Tensor& t, const char* name) {
  DP_CHECK(t.dim() == 1, name, ": expected 1 dimension, got ", t.dim());
  return t.size(0);
}

// (R, V) or (B, L, V); wide: float64 too.
inline Logits logits_of(Tensor& t, bool wide = false, const char* name = "logits") {
  const DType dtype = dtype_of(t, name, wide);
  DP_CHECK(t.dim() == 2 || t.dim() == 3, name, ": expected 2 or 3 dimensions, got ", t.dim());
  const int64_t last = t.dim() - 1, vocab = t.size(last);
  DP_CHECK(vocab >= 1 && vocab < INT32_MAX, name, ": vocabulary of size ", vocab);
  make_rows(t);
  const int64_t inner = t.size(last - 1);
  return {t.data_ptr(),      dtype, vocab, inner > 0 ? inner : 1, t.dim() == 3 ? t.stride(0) : 0,
          t.stride(last - 1)};
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

inline int64_t row_count(const Tensor& logits) {
  return logits.dim() == 3 ? logits.size(0) * logits.size(1) : logits.size(0);
}

}  // namespace dparallel
