// Shared by the losses on the CPU: active rows, single logits, memory for a gradient.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <vector>

#include "dparallel/launch.h"
#include "parallel.h"
#include "row_kernel.h"
#include "row_stats.h"

namespace dparallel::cpu {

inline std::vector<int64_t> active_rows(const Flag* active, int64_t count) {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < count; ++row)
    if (active[row]) rows.push_back(row);
  return rows;
}

// clamp_logit of a float64: +inf and numbers beyond float32 count as the largest float32.
inline double clamped(double z) { return z > kLargest ? double{kLargest} : z; }

inline double logit_at(const void* row, DType dtype, int64_t id) {
  if (dtype == DType::float64) return clamped(static_cast<const double*>(row)[id]);
  return clamp_logit(load_logit(row, dtype, id));
}

inline void store(void* row, DType dtype, int64_t id, double value) {
  if (dtype == DType::float64) {
    static_cast<double*>(row)[id] = value;
    return;
  }
  with_stored(dtype, [&](auto stored) {
    using T = decltype(stored);
    static_cast<typename T::Storage*>(row)[id] = T::narrowed(static_cast<float>(value));
  });
}

// Asks for pages of 2 MB. A gradient is tens of megabytes of untouched memory: in pages of 4 KB,
// the operating system would take longer to provide it than we take to write it.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  // A hint, whose failure changes nothing.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Writes the gradient of `logits`, in parallel: to args.grad [count, vocab] or, where that is null,
// over the logits. write(span, row, out) writes that of a chunk of a row into the row `out`, or
// returns false, and then the chunk is zero, as all rows are that are not active.
template <class Args, class F>
void run_gradient(const Args& args, const Logits& logits, Parallel parallel, const F& write) {
  const int64_t size = element_size(logits.dtype), bytes = logits.vocab * size;
  auto* grad = static_cast<char*>(args.grad);
  if (grad != nullptr) prefer_huge_pages(grad, args.count * bytes);
  run_chunks(parallel, args.count, logits.vocab, [&](const Chunk& chunk) {
    const RowSpan span{row_pointer(logits, chunk.row), chunk.begin, chunk.end};
    char* out = grad != nullptr ? grad + chunk.row * bytes
                                : static_cast<char*>(const_cast<void*>(span.row));
    if (!args.active[chunk.row] || !write(span, chunk.row, out))
      std::memset(out + span.begin * size, 0, (span.end - span.begin) * size);
  });
}

}  // namespace dparallel::cpu
