// Selection on the CPU, shared by select and unmask.
#pragma once

#include <vector>

#include "dparallel/launch.h"
#include "dparallel/policy.h"

namespace dparallel::cpu {

struct Candidate {
  float key;         // larger is better
  int64_t position;  // among equal keys the lowest comes first
};

// How many candidates of one window commit; they come first, in any order.
int64_t select_prefix(const Policy& policy, std::vector<Candidate>& candidates);

// The first eligible position whose score is NaN, which has no order; -1: none.
int64_t first_unordered(const SelectArgs& args, const float* scores);

}  // namespace dparallel::cpu
