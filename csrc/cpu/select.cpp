#include "select.h"

#include <algorithm>

#include "dparallel/launch.h"
#include "parallel.h"

namespace dparallel::cpu {

int64_t select_prefix(const Policy& policy, std::vector<Candidate>& candidates) {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.key > b.key || (a.key == b.key && a.position < b.position);
  };
  const auto begin = candidates.begin(), end = candidates.end();
  const int64_t masked = end - begin;
  if (!policy.by_threshold()) {
    std::sort(begin, end, better);
    return policy.count(masked, [&](int64_t i) { return begin[i].key; });
  }
  const auto passed = std::partition(
      begin, end, [&](const Candidate& candidate) { return policy.reaches(0, candidate.key); });
  const int64_t n = policy.limit(passed - begin, masked);
  if (begin + n != passed) std::nth_element(begin, begin + n, end, better);
  return n;
}

int64_t first_unordered(const SelectArgs& args, const float* scores) {
  const int64_t count = args.batch * args.length;
  int any = 0;  // first all at once: whole numbers, of which the compiler makes vectors
  for (int64_t i = 0; i < count; ++i)
    any |= int{args.eligible[i] != 0} & int{scores[i] != scores[i]};
  for (int64_t i = 0; any && i < count; ++i)
    if (args.eligible[i] && scores[i] != scores[i]) return i;
  return -1;
}

void select(const SelectArgs& args, Parallel parallel) {
  run_parallel(parallel, args.batch, [&](int64_t b) {
    const Policy policy = Policy::load(args.policy + b * kPolicyFields);
    std::vector<Candidate> candidates(args.length);
    size_t count = 0;
    for (int64_t i = b * args.length; i < (b + 1) * args.length; ++i) {
      args.commit[i] = false;
      const float key = policy.key(args.confidence[i], args.margin[i], args.entropy[i]);
      candidates[count] = {key, i};
      count += args.eligible[i] && key == key;  // not NaN, which has no order
    }
    candidates.resize(count);
    const int64_t n = select_prefix(policy, candidates);
    for (int64_t k = 0; k < n; ++k) args.commit[candidates[k].position] = true;
  });
}

}  // namespace dparallel::cpu
