// Selection on the CPU, shared by select and unmask.
#pragma once

#include <vector>

#include "dparallel/policy.h"

namespace dparallel::cpu {

struct Candidate {
  float key;         // larger is better
  int64_t position;  // among equal keys the lowest comes first
};

// Sorts the candidates of one window, best first, and returns how many of them commit.
int64_t select_prefix(const Policy& policy, std::vector<Candidate>& candidates);

}  // namespace dparallel::cpu
