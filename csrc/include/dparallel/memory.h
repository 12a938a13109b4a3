// Which bytes belong to the elements of tensors of any strides. What an op changes in place has
// memory of its own: indices that change after they were checked would lead anywhere.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace dparallel {

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

// The bytes from a tensor's first element to its last, with other tensors' between them.
struct Memory {
  static constexpr size_t kDims = 6;

  struct Dim {
    int64_t stride, size;  // stride in bytes; size above 1
  };

  const char* name;  // of the argument
  int64_t element_size = 1;
  const char *begin = nullptr, *end = nullptr;  // equal of an empty tensor, and of none
  std::array<Dim, kDims> dims{};
  size_t dim_count = 0;

  explicit Memory(const char* name) : name(name) {}
  Memory(const char* name, const void* address, int64_t element_size)
      : name(name),
        element_size(element_size),
        begin(static_cast<const char*>(address)),
        end(begin + element_size) {}

  // Adds a dimension, whose stride is in elements. Returns false if the tensor is empty.
  bool add(int64_t stride, int64_t size) {
    if (size == 0) end = begin;
    if (size <= 1) return size == 1;
    DP_CHECK(dim_count < kDims, name, ": expected at most ", kDims, " dimensions");
    dims[dim_count++] = {stride * element_size, size};
    end += stride * element_size * (size - 1);
    return true;
  }
};

// The steps of one tensor's strides less those of another's, by descending strides: the two have an
// element in common if the distance of their first ones is a sum of such steps.
class StepsBetween {
 public:
  StepsBetween(const Memory& a, const Memory& b) {
    add(a, 1);
    add(b, -1);
    std::sort(steps_.begin(), steps_.begin() + count_,
              [](const Steps& x, const Steps& y) { return x.stride > y.stride; });
    // In bytes: elements of one size may lie askew.
    steps_[count_++] = {1, 1 - b.element_size, a.element_size - 1};
  }

  // With strides that both have, as rows of one buffer, it tries two numbers of steps of each.
  bool make(int64_t distance, size_t from = 0) const {
    if (from == count_) return distance == 0;
    int64_t below = 0, above = 0;  // what the smaller strides reach
    for (size_t i = from + 1; i < count_; ++i) {
      below += steps_[i].least * steps_[i].stride;
      above += steps_[i].most * steps_[i].stride;
    }
    const auto& [stride, least, most] = steps_[from];
    // Division rounds towards 0: none is left out, and those that are too many fail below.
    const int64_t first = std::max(least, (distance - above) / stride);
    const int64_t last = std::min(most, (distance - below) / stride);
    for (int64_t n = first; n <= last; ++n) {
      const int64_t left = distance - n * stride;
      if (below <= left && left <= above && make(left, from + 1)) return true;
    }
    return false;
  }

 private:
  struct Steps {
    int64_t stride, least, most;
  };

  void add(const Memory& memory, int64_t sign) {
    for (size_t d = 0; d < memory.dim_count; ++d) {
      const int64_t stride = memory.dims[d].stride, count = memory.dims[d].size - 1;
      if (stride == 0) continue;
      size_t at = 0;
      while (at < count_ && steps_[at].stride != stride) ++at;
      if (at == count_) steps_[count_++] = {stride, 0, 0};
      (sign > 0 ? steps_[at].most : steps_[at].least) += sign * count;
    }
  }

  std::array<Steps, 2 * Memory::kDims + 1> steps_{};
  size_t count_ = 0;
};

// No two elements of a tensor share memory, as those of an expanded view do: by ascending strides,
// each dimension has to step over all that the smaller ones span.
inline void check_elements_apart(Memory changed) {
  if (changed.begin == changed.end) return;
  const auto last = changed.dims.begin() + changed.dim_count;
  std::sort(changed.dims.begin(), last, [](const Memory::Dim& a, const Memory::Dim& b) {
    return std::pair(a.stride, a.size) < std::pair(b.stride, b.size);
  });
  int64_t span = 0;
  for (auto dim = changed.dims.begin(); dim != last; ++dim) {
    DP_CHECK(dim->stride > span, changed.name,
             ": expected memory of its own for each element, which is changed in place, got ",
             dim->size, " elements at a stride of ", dim->stride / changed.element_size);
    span += dim->stride * (dim->size - 1);
  }
}

// Two tensors, of any dtypes, share no element.
inline void check_apart(const Memory& changed, const Memory& other) {
  if (changed.end <= other.begin || other.end <= changed.begin) return;
  DP_CHECK(!StepsBetween(changed, other).make(other.begin - changed.begin), changed.name,
           ": expected memory of its own, which is changed in place, got some of ", other.name);
}

// Each element that is changed in place has memory of its own. changed, read: of Memory.
template <class Changed, class Read>
void own_memory(const Changed& changed, const Read& read) {
  for (auto at = changed.begin(); at != changed.end(); ++at) {
    check_elements_apart(*at);
    for (auto other = at + 1; other != changed.end(); ++other) check_apart(*at, *other);
    for (const Memory& other : read) check_apart(*at, other);
  }
}

}  // namespace dparallel
