// The automaton of best_path, and which of its paths through a window is the best.
#pragma once

#include "dparallel/common.h"

namespace dparallel {

// The transitions of an automaton over classes of tokens, by the state that they lead to.
struct Transitions {
  int64_t states, classes, edges;
  const int32_t* origin;       // [edges] the state that each comes from
  const int32_t* token_class;  // [edges]
  const int64_t* offsets;      // [states + 1] where the edges into each state begin; ascending
  const int64_t* distance;     // [states] the fewest tokens from it to an accepting state
};

// The end of the best path to a state, or of the best of some; by default of none.
struct PathEnd {
  int32_t in_time = 0;  // whether the response can end in the room that is left
  float sum = -kInfinity;
  int32_t state = INT32_MAX;

  // Of a path with the sum `sum` to `state`; none where the sum is -inf.
  DP_HD static PathEnd of(const Transitions& automaton, int64_t state, float sum, int64_t room) {
    if (!(sum > -kInfinity)) return {};
    return {automaton.distance[state] <= room, sum, static_cast<int32_t>(state)};
  }

  DP_HD bool exists() const { return sum > -kInfinity; }

  DP_HD bool below(const PathEnd& other) const {
    if (in_time != other.in_time) return other.in_time > in_time;
    return other.sum > sum || (other.sum == sum && other.state < state);
  }
};

}  // namespace dparallel
