// best_path on the CPU: windows in parallel, cell by cell, state by state.
#include <algorithm>
#include <vector>

#include "dparallel/launch.h"
#include "parallel.h"

namespace dparallel::cpu {
namespace {

void of_window(const BestPathArgs& args, int64_t w) {
  const Transitions& automaton = args.transitions;
  const int64_t begin = args.begin[w], end = args.end[w], states = automaton.states;
  int64_t* state = args.state + w * (args.cells + 1);
  int64_t* token_class = args.token_class + w * args.cells;
  std::fill(state, state + args.cells + 1, args.enter[w]);
  std::fill(token_class, token_class + args.cells, -1);

  std::vector<float> best(states, -kInfinity), next(states);
  best[args.enter[w]] = 0.0f;
  std::vector<int32_t> taken(std::max<int64_t>(0, end - begin) * states);  // edges [cells, states]
  for (int64_t c = begin; c < end; ++c) {
    const float* score = args.scores + (w * args.cells + c) * automaton.classes;
    for (int64_t s = 0; s < states; ++s) {
      float sum = -kInfinity;
      int64_t edge = 0;
      for (int64_t e = automaton.offsets[s]; e < automaton.offsets[s + 1]; ++e) {
        const float through = best[automaton.origin[e]] + score[automaton.token_class[e]];
        if (through > sum) {
          sum = through;
          edge = e;
        }
      }
      next[s] = sum;
      taken[(c - begin) * states + s] = static_cast<int32_t>(edge);
    }
    best.swap(next);
  }

  PathEnd last;
  for (int64_t s = 0; s < states; ++s) {
    const PathEnd here = PathEnd::of(automaton, s, best[s], args.room[w]);
    if (last.below(here)) last = here;
  }
  if (!last.exists()) return;
  int64_t at = last.state;
  std::fill(state + std::max(begin, end), state + args.cells + 1, at);
  for (int64_t c = end - 1; c >= begin; --c) {
    const int32_t edge = taken[(c - begin) * states + at];
    token_class[c] = automaton.token_class[edge];
    state[c] = at = automaton.origin[edge];
  }
}

}  // namespace

void best_path(const BestPathArgs& args, Parallel parallel) {
  run_parallel(parallel, args.windows, [&](int64_t w) { of_window(args, w); });
}

}  // namespace dparallel::cpu
