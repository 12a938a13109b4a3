// commit on the CPU: write the tokens, then count masks and changes in every window.
#include <algorithm>
#include <vector>

#include "row_stats.h"

namespace dparallel::cpu {

void commit(const CommitArgs& args, Parallel parallel) {
  const TokenGrid& tokens = args.tokens;
  std::vector<int64_t> changed;  // positions, ascending
  for (int64_t row = 0; row < args.count; ++row) {
    if (!args.commit[row]) continue;
    const int64_t position = args.positions ? args.positions[row] : row;
    int64_t& token = tokens.at(position / tokens.length, position % tokens.length);
    if (token != args.token[row]) changed.push_back(position);
    token = args.token[row];
  }
  *args.error = kNoError;
  run_parallel(parallel, args.windows.count, [&](int64_t w) {
    const int64_t b = args.windows.sequence(w);
    const int64_t start = std::clamp<int64_t>(args.windows.start[w], 0, tokens.length);
    const int64_t end = std::clamp(args.windows.end[w], start, tokens.length);
    int64_t masks = 0, first = end;
    for (int64_t column = end - 1; column >= start; --column)
      if (tokens.at(b, column) == args.mask_id) {
        ++masks;
        first = column;
      }
    const auto below = [&](int64_t column) {
      return std::lower_bound(changed.begin(), changed.end(), b * tokens.length + column);
    };
    args.remaining[w] = masks;
    args.first[w] = first;
    args.changed[w] = below(end) - below(start);
  });
}

}  // namespace dparallel::cpu
