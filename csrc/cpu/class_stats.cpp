// class_stats on the CPU: the logits of a row, ordered by class, then the row kernel on each class.
#include <algorithm>
#include <limits>

#include "row_kernel.h"
#include "row_stats.h"

namespace dparallel::cpu {
namespace {

// Below this many ids a class is read by RowPart::add: a tile's two reads are worth more ids.
constexpr int64_t kFew = 8;

template <class Storage>
void order(const void* row, const ClassStatsArgs& args, Storage minus_infinity, Storage* to) {
  const auto* logits = static_cast<const Storage*>(row);
  for (int64_t i = 0; i < args.listed; ++i) {
    const int32_t id = args.ids[i];
    to[i] = id >= 0 && id < args.logits.vocab ? logits[id] : minus_infinity;
  }
}

void order(const void* row, const ClassStatsArgs& args, char* to) {
  switch (args.logits.dtype) {
    case DType::float32: return order(row, args, -kInfinity, reinterpret_cast<float*>(to));
    case DType::bfloat16:
      return order<uint16_t>(row, args, 0xff80u, reinterpret_cast<uint16_t*>(to));
    default: return order<uint16_t>(row, args, 0xfc00u, reinterpret_cast<uint16_t*>(to));
  }
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
  run_parallel(parallel, args.count, [&](int64_t i) {
    std::vector<char> ordered(args.listed * element_size(dtype));
    order(row_pointer(args.logits, i), args, ordered.data());
    for (int64_t k = 0; k < args.classes; ++k) {
      RowPart part = read_class(ordered.data(), dtype, args.offsets[k], args.offsets[k + 1]);
      if (part.token >= 0) part.token = args.ids[part.token];
      RowResult result;
      if (part.error() == kRowNan) {
        result.token = result.sample = -1;
        std::fill(result.field, result.field + kRowFields, std::numeric_limits<float>::quiet_NaN());
      } else {
        result = finish(part);
      }
      const int64_t at = i * args.classes + k;
      args.output.tokens[at] = result.token;
      args.output.tokens[results + at] = result.sample;
      for (int f = 0; f < kRowFields; ++f) args.output.fields[f * results + at] = result.field[f];
    }
  });
}

}  // namespace dparallel::cpu
