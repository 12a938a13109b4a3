// unmask on the CPU: find the needed rows, read them, select per window, commit. A bad row anywhere
// leaves every token as it was.
#include <algorithm>

#include "row_stats.h"
#include "select.h"
#include "windows.h"

namespace dparallel::cpu {
namespace {

struct Needed {
  int64_t row;       // row of the logits
  int64_t position;  // b * length + l
  int64_t window;
};

}  // namespace

void unmask(const UnmaskArgs& args, Parallel parallel) {
  const TokenGrid& tokens = args.tokens;
  const auto token_at = [&](int64_t position) -> int64_t& {
    return tokens.at(position / tokens.length, position % tokens.length);
  };

  // Rows and windows both ascend by their positions.
  const std::vector<WindowSpan> spans = spans_of(args.windows, tokens);
  std::vector<Needed> needed;
  std::vector<int64_t> rows;
  std::vector<SampleKey> keys;
  auto span = spans.begin();
  for (int64_t row = 0; row < args.count; ++row) {
    const int64_t position = args.positions ? args.positions[row] : row;
    while (span != spans.end() && span->end <= position) ++span;
    if (span == spans.end()) break;
    if (position < span->begin || token_at(position) != args.exclusions.mask_id) continue;
    needed.push_back({row, position, span->window});
    rows.push_back(row);
    if (args.sampling.samples()) {
      const int64_t* k = args.sampling.keys + span->window * 3;
      const auto where = static_cast<uint32_t>(position % tokens.length) +
                         static_cast<uint32_t>(args.sampling.position_offset);
      keys.push_back({static_cast<uint64_t>(k[0]), static_cast<uint32_t>(k[1]), where,
                      static_cast<uint32_t>(k[2])});
    }
  }

  const RowJob job{args.logits,     rows.data(),   static_cast<int64_t>(rows.size()),
                   args.exclusions, args.sampling, keys.data()};
  const std::vector<RowAnswer> answers = read_rows(job, parallel);

  clear(args.output, args.count);
  std::fill(args.output.error, args.output.error + args.windows.count, kNoError);
  bool sound = true;
  const auto report = [&](int64_t window, int64_t position, RowError code) {
    int64_t& error = args.output.error[window];
    error = std::min(error, encode_error(position, code));
    sound = false;
  };
  for (size_t i = 0; i < needed.size(); ++i) {
    const RowAnswer& answer = answers[i];
    if (answer.error == kRowOk) put(args.output, args.count, needed[i].row, answer.result);
    else report(needed[i].window, needed[i].position, answer.error);
  }
  if (args.positions) {  // every masked position of a window must be among them
    size_t next = 0;
    for (const WindowSpan& in : spans)
      for (int64_t position = in.begin; position < in.end; ++position) {
        if (token_at(position) != args.exclusions.mask_id) continue;
        if (next < needed.size() && needed[next].position == position) ++next;
        else report(in.window, position, kRowMissing);
      }
  }

  std::fill(args.committed, args.committed + args.windows.count, 0);
  std::fill(args.remaining, args.remaining + args.windows.count, 0);
  *args.done = true;
  size_t i = 0;
  for (const WindowSpan& in : spans) {
    const Policy policy = Policy::load(args.policy + in.window * kPolicyFields);
    const size_t first = i;
    std::vector<Candidate> candidates;
    for (; i < needed.size() && needed[i].position < in.end; ++i) {
      const float* field = answers[i].result.field;
      candidates.push_back({policy.key(field[kConfidence], field[kMargin], field[kEntropy]),
                            static_cast<int64_t>(i)});
    }
    const int64_t n = sound ? select_prefix(policy, candidates) : 0;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = candidates[k].position;
      token_at(needed[at].position) = answers[at].result.sample;
    }
    args.committed[in.window] = n;
    args.remaining[in.window] = static_cast<int64_t>(i - first) - n;
    *args.done = *args.done && args.remaining[in.window] == 0;
  }
}

}  // namespace dparallel::cpu
