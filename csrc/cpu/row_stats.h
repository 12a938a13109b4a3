// How row_stats, row_topk and unmask read rows on the CPU.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "dparallel/launch.h"
#include "dparallel/philox.h"
#include "stored.h"

namespace dparallel::cpu {

// Rows to read: answer i is of logits row rows[i], i in [0, count).
struct RowJob {
  const Logits& logits;
  const int64_t* rows;  // [count], or null: row i is row i of the logits
  int64_t count;
  const Exclusions& exclusions;
  const Sampling& sampling;
  const SampleKey* keys;  // [count], read only where `sampling` samples
};

struct RowAnswer {
  RowResult result;
  RowError error;
};

std::vector<RowAnswer> read_rows(const RowJob& job, Parallel parallel);

// key [4]
inline SampleKey sample_key(const int64_t* key) {
  return {static_cast<uint64_t>(key[0]), static_cast<uint32_t>(key[1]),
          static_cast<uint32_t>(key[2]), static_cast<uint32_t>(key[3])};
}

// Gives all `count` rows of an output the values of rows that are not read.
inline void clear(const RowOutput& output, int64_t count) {
  std::fill_n(output.tokens, 2 * count, -1);
  std::fill_n(output.fields, kRowFields * count, std::numeric_limits<float>::quiet_NaN());
}

// Writes the result of row `row` of `count`.
inline void put(const RowOutput& output, int64_t count, int64_t row, const RowResult& result) {
  output.tokens[row] = result.token;
  output.tokens[count + row] = result.sample;
  for (int f = 0; f < kRowFields; ++f) output.fields[f * count + row] = result.field[f];
}

inline const void* row_pointer(const Logits& logits, int64_t row) {
  return static_cast<const char*>(logits.data) + logits.offset(row) * element_size(logits.dtype);
}

// Visits the admissible pieces of [begin, end): the runs of ids between excluded ones.
template <class Visit>
void each_admissible(int64_t begin, int64_t end, const Exclusions& ex, Visit visit) {
  const int64_t* next = std::lower_bound(ex.suppress, ex.suppress + ex.suppress_count, begin);
  const int64_t* last = ex.suppress + ex.suppress_count;
  while (begin < end) {
    int64_t cut = next != last ? std::min(*next, end) : end;
    if (ex.mask_id >= begin && ex.mask_id < cut) cut = ex.mask_id;
    if (begin < cut) visit(begin, cut);
    if (next != last && cut == *next) ++next;
    begin = cut + 1;
  }
}

// Whether the mask token has a share of the softmax.
inline bool counts_mask(const Logits& logits, const Exclusions& ex) {
  return ex.mask_id >= 0 && ex.mask_id < logits.vocab &&
         !std::binary_search(ex.suppress, ex.suppress + ex.suppress_count, ex.mask_id);
}

inline float load_logit(const void* row, DType dtype, int64_t id) {
  return with_stored(dtype, [&](auto stored) {
    using T = decltype(stored);
    return T::value(static_cast<const typename T::Storage*>(row)[id]);
  });
}

}  // namespace dparallel::cpu
