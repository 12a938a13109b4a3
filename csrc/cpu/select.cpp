#include "select.h"

#include <algorithm>

#include "dparallel/launch.h"
#include "row_stats.h"

namespace dparallel::cpu {

int64_t select_prefix(const Policy& policy, std::vector<Candidate>& candidates) {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.key > b.key || (a.key == b.key && a.position < b.position);
  });
  return policy.count(static_cast<int64_t>(candidates.size()),
                      [&](int64_t i) { return candidates[i].key; });
}

void select(const SelectArgs& args, Parallel parallel) {
  run_parallel(parallel, args.batch, [&](int64_t b) {
    const Policy policy = Policy::load(args.policy + b * kPolicyFields);
    std::vector<Candidate> candidates;
    for (int64_t i = b * args.length; i < (b + 1) * args.length; ++i) {
      args.commit[i] = false;
      if (!args.eligible[i]) continue;
      const float key = policy.key(args.confidence[i], args.margin[i], args.entropy[i]);
      if (key == key) candidates.push_back({key, i});  // not NaN, which cannot be sorted
    }
    const int64_t n = select_prefix(policy, candidates);
    for (int64_t k = 0; k < n; ++k) args.commit[candidates[k].position] = true;
  });
}

}  // namespace dparallel::cpu
