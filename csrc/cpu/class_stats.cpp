// class_stats on the CPU: the logits of a row, ordered by class, then the row kernel on each class.
#include <vector>

#include "parallel.h"
#include "row_kernel.h"
#include "row_stats.h"
#include "stored.h"

namespace dparallel::cpu {
namespace {

// Below this many ids a class is read by RowPart::add: a tile's two reads are worth more ids.
constexpr int64_t kFew = 8;

// The logits of the listed ids, in the dtype of the logits; -inf for ids outside the vocabulary.
void order(const void* row, const ClassStatsArgs& args, void* to) {
  with_stored(args.logits.dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto* logits = static_cast<const typename T::Storage*>(row);
    for (int64_t i = 0; i < args.listed; ++i) {
      const int32_t id = args.ids[i];
      static_cast<typename T::Storage*>(to)[i] =
          id >= 0 && id < args.logits.vocab ? logits[id] : T::kMinusInfinity;
    }
  });
}

RowPart read_class(const void* ordered, DType dtype, int64_t begin, int64_t end) {
  RowPart part;
  if (end - begin >= kFew)
    row_kernel_in_use().stats[static_cast<int>(dtype)]({ordered, begin, end}, part);
  else
    for (int64_t i = begin; i < end; ++i)
      part.add(load_logit(ordered, dtype, i), static_cast<int32_t>(i), true);
  return part;
}

}  // namespace

void class_stats(const ClassStatsArgs& args, Parallel parallel) {
  const DType dtype = args.logits.dtype;
  const int64_t results = args.count * args.classes;
  clear(args.output, results);
  run_parallel(parallel, args.count, [&](int64_t i) {
    std::vector<char> ordered(args.listed * element_size(dtype));
    order(row_pointer(args.logits, i), args, ordered.data());
    for (int64_t k = 0; k < args.classes; ++k) {
      RowPart part = read_class(ordered.data(), dtype, args.offsets[k], args.offsets[k + 1]);
      if (part.token >= 0) part.token = args.ids[part.token];
      if (part.error() != kRowNan) put(args.output, results, i * args.classes + k, finish(part));
    }
  });
}

}  // namespace dparallel::cpu
