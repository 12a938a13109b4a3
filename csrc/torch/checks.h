// Checks of the tensors that an op takes, and of the kernels' demands on them. They keep memory
// safe whoever calls, under torch.compile too. Arguments of other strides than a kernel reads are
// copied.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "dparallel/common.h"
#include "dparallel/memory.h"

namespace dparallel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As Python names it.
inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// A dtype and a shape in words: "int64 (2, 3)".
inline std::string described(ScalarType dtype, const std::vector<int64_t>& sizes) {
  std::string text = std::string(name_of(dtype)) + " (";
  for (const int64_t size : sizes) text += (text.back() == '(' ? "" : ", ") + std::to_string(size);
  return text + (sizes.size() == 1 ? ",)" : ")");
}
inline std::string described(const Tensor& t) { return described(t.scalar_type(), sizes_of(t)); }

inline void check_shape(const Tensor& t, const char* name, ScalarType dtype,
                        const std::vector<int64_t>& sizes) {
  bool fits = t.scalar_type() == dtype && t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = t.size(d) == sizes[d];
  DP_CHECK(fits, name, ": expected ", described(dtype, sizes), ", got ", described(t));
}

inline DType dtype_of(const Tensor& t, const char* name, bool wide = false) {  // wide: float64 too
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double:
      if (wide) return DType::float64;
      [[fallthrough]];
    default:
      bad_argument(name, ": expected float32, bfloat16 or float16", wide ? " or float64" : "",
                   ", got ", name_of(t.scalar_type()));
  }
}

inline void check_device(const Tensor& t, const char* name, const Tensor& like, const char* of) {
  DP_CHECK(t.get_device() == like.get_device() && t.is_cpu() == like.is_cpu(), name,
           ": expected on the device of ", of);
}

// Checks a tensor that is read, and makes it contiguous.
inline void expect(Tensor& t, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes,
                   const Tensor& like) {
  check_shape(t, name, dtype, sizes);
  check_device(t, name, like, "the others");
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
}

// The last dimension becomes contiguous.
inline void make_rows(Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.stride(last) != 1 && t.size(last) != 1) t = torch::stable::contiguous(t);
}

// The memory of an argument; none where it is left out.
struct TensorMemory : Memory {
  TensorMemory(const Tensor& t, const char* name)
      : Memory(name, t.data_ptr(), static_cast<int64_t>(t.element_size())) {
    for (int64_t d = 0; d < t.dim(); ++d)
      if (!add(t.stride(d), t.size(d))) return;
  }
  TensorMemory(const std::optional<Tensor>& t, const char* name) : Memory(name) {
    if (t.has_value()) *this = TensorMemory(*t, name);
  }
};

inline void own_memory(std::initializer_list<TensorMemory> changed,
                       std::initializer_list<TensorMemory> read) {
  own_memory<>(changed, read);
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

// Runs [q_start, q_end) of `rows` rows, on the CPU, of which none are in two: `what` names a run.
// Returns the runs that have rows, by ascending rows.
inline std::vector<int64_t> runs_apart(const char* what, const int64_t* q_start,
                                       const int64_t* q_end, int64_t runs, int64_t rows) {
  within("q_start", q_start, runs, 0, rows + 1);
  within("q_end", q_end, runs, 0, rows + 1);
  std::vector<int64_t> order;
  for (int64_t r = 0; r < runs; ++r) {
    DP_CHECK(q_start[r] <= q_end[r], "q_start: expected no larger than q_end, got ", q_start[r],
             " above ", q_end[r], " at ", r);
    if (q_start[r] < q_end[r]) order.push_back(r);
  }
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return q_start[a] < q_start[b]; });
  for (size_t i = 1; i < order.size(); ++i) {
    const int64_t a = std::min(order[i - 1], order[i]), b = std::max(order[i - 1], order[i]);
    DP_CHECK(q_end[order[i - 1]] <= q_start[order[i]], "q_start: expected ", what,
             "s that do not overlap, got [", q_start[a], ", ", q_end[a], ") and [", q_start[b],
             ", ", q_end[b], "), ", what, "s ", a, " and ", b);
  }
  return order;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
// Null where the argument is left out, which for the kernels is the lack of it.
template <class T>
T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

// An empty tensor has no address, but an empty list of positions is not the lack of one.
inline const int64_t* listed(const Tensor& positions) {
  static const int64_t none = 0;
  return positions.numel() > 0 ? data<int64_t>(positions) : &none;
}
inline const int64_t* listed(const std::optional<Tensor>& positions) {
  return positions.has_value() ? listed(*positions) : nullptr;
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

inline int64_t row_count(const Tensor& logits) {
  return logits.dim() == 3 ? logits.size(0) * logits.size(1) : logits.size(0);
}

}  // namespace dparallel
