// row_topk on the CPU: chunks of rows in parallel, as in row_stats, merged in order.
#include <atomic>
#include <cmath>
#include <limits>

#include "parallel.h"
#include "row_kernel.h"
#include "row_stats.h"

namespace dparallel::cpu {

void row_topk(const RowTopkArgs& args, Parallel parallel) {
  const RowKernel& kernel = row_kernel_in_use();
  const Logits& logits = args.logits;
  const int dtype = static_cast<int>(logits.dtype);
  const int64_t chunks = chunks_of(logits.vocab);
  const auto row_at = [&](int64_t i) { return row_pointer(logits, args.rows ? args.rows[i] : i); };

  std::vector<RowPart> parts(args.count * chunks);                  // [count, chunks]
  std::vector<TopKeys> best(args.count * chunks, TopKeys(args.k));  // [count, chunks]
  // The largest k-th logit of any chunk of the row so far. Smaller logits are not among the row's k
  // largest, so later chunks skip them: that changes what a chunk lists, but not the result.
  std::vector<std::atomic<float>> known(args.count);
  for (auto& bar : known) bar = -kInfinity;
  run_chunks(parallel, args.count, logits.vocab, [&](const Chunk& chunk) {
    const int64_t i = chunk.row;
    TopKeys top(args.k);
    top.floor = std::nextafter(known[i].load(std::memory_order_relaxed), -kInfinity);
    each_admissible(chunk.begin, chunk.end, args.exclusions, [&](int64_t from, int64_t to) {
      kernel.topk[dtype]({row_at(i), from, to}, parts[chunk.place], top);
    });
    best[chunk.place] = top;
    if (top.keys[args.k - 1] != kNoKey && top.bar() > known[i].load(std::memory_order_relaxed))
      known[i].store(top.bar(), std::memory_order_relaxed);
  });

  const int64_t mask_id = args.exclusions.mask_id;
  const bool mask_counts = counts_mask(logits, args.exclusions);
  for (int64_t i = 0; i < args.count; ++i) {
    RowPart part = merged(parts, i, chunks);
    TopKeys top(args.k);
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t n = 0; n < args.k; ++n) top.rank(best[i * chunks + c].keys[n]);
    if (mask_counts)
      part.add(load_logit(row_at(i), logits.dtype, mask_id), static_cast<int32_t>(mask_id), false);
    const RowError error = part.error();
    args.error[i] = error == kRowOk ? kNoError : encode_error(i, error);
    for (int64_t n = 0; n < args.k; ++n) {
      const bool found = error == kRowOk && top.keys[n] != kNoKey;
      args.tokens[i * args.k + n] = found ? top_id(top.keys[n]) : -1;
      args.logprobs[i * args.k + n] = found ? top_logprob(top.keys[n], part.max, part.sum)
                                      : error == kRowOk ? -kInfinity
                                                        : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

}  // namespace dparallel::cpu
