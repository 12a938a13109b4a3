// commit on the CPU: write the tokens, then count masks and changes in every window.
#include "commit.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace dparallel::cpu {

int64_t first_unwritable(const CommitArgs& args) {
  bool any = false;  // first all at once, without a branch
  for (int64_t row = 0; row < args.count; ++row)
    any |= (args.commit[row] != 0) & ((args.token[row] < 0) | (args.token[row] == args.mask_id));
  for (int64_t row = 0; any && row < args.count; ++row)
    if (args.commit[row] && (args.token[row] < 0 || args.token[row] == args.mask_id)) return row;
  return -1;
}

void commit(const CommitArgs& args, Parallel parallel) {
  const TokenGrid& tokens = args.tokens;
  std::vector<int64_t> chosen(args.count);  // rows, gathered without a branch, as few are chosen
  size_t count = 0;
  for (int64_t row = 0; row < args.count; ++row) {
    chosen[count] = row;
    count += args.commit[row] != 0;
  }
  chosen.resize(count);
  std::vector<int64_t> changed;  // positions, ascending
  int64_t b = 0;
  for (const int64_t row : chosen) {
    const int64_t position = args.positions ? args.positions[row] : row;
    while (position >= (b + 1) * tokens.length) ++b;  // faster than to divide
    int64_t& token = tokens.at(b, position - b * tokens.length);
    if (token != args.token[row]) changed.push_back(position);
    token = args.token[row];
  }
  *args.error = kNoError;
  run_parallel(parallel, args.windows.count, [&](int64_t w) {
    const int64_t b = args.windows.sequence(w);
    const int64_t start = std::clamp<int64_t>(args.windows.start[w], 0, tokens.length);
    const int64_t end = std::clamp(args.windows.end[w], start, tokens.length);
    int64_t masks = 0, first = end;
    for (int64_t column = end - 1; column >= start; --column) {
      const bool masked = tokens.at(b, column) == args.mask_id;
      masks += masked;
      first = masked ? column : first;
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
