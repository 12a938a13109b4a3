// accept on the CPU: read the rows of all lanes, then walk each lane's tree.
#include "dparallel/accept.h"

#include <algorithm>
#include <vector>

#include "row_stats.h"

namespace dparallel::cpu {
namespace {

// Walks one lane's tree and writes its results. first: the lane's first row. choices [rows of the
// lane].
void accept_lane(const AcceptArgs& args, int64_t lane, int64_t first,
                 const std::vector<int32_t>& choices) {
  const auto count = static_cast<int32_t>(choices.size());
  int64_t* path = args.path + lane * args.max_q_len;
  int64_t* tokens = args.tokens + lane * args.max_q_len;
  std::vector<int32_t> follows(count);
  for (int32_t i = 0; i < count; ++i)
    follows[i] = without_children(choices[i], args.eos_ids + lane * args.eos_count, args.eos_count);
  for (int32_t i = 1; i < count; ++i) {
    const int64_t parent = args.parent[first + i];
    if (is_chosen(i, parent, args.draft[first + i], [&](int32_t row) { return choices[row]; }))
      follows[parent] = std::min(follows[parent], i);
  }
  Path walk{0, 0, kPathLeaf};
  if (count > 0)
    walk = walk_path(
        args.room ? args.room[lane] : count, [&](int32_t row) { return follows[row]; },
        [&](int32_t place, int32_t row) {
          path[place] = row;
          tokens[place] = choices[row];
        });
  std::fill(path + walk.count, path + args.max_q_len, -1);
  std::fill(tokens + walk.count, tokens + args.max_q_len, -1);
  args.emitted[lane] = walk.count;
  args.ended[lane] = walk.ended();
  args.output.error[lane] = kNoError;
  if (walk.follows == kPathFails)
    args.output.error[lane] =
        encode_error(lane * kLaneRows + walk.last, static_cast<RowError>(-choices[walk.last]));
}

}  // namespace

void accept(const AcceptArgs& args, Parallel parallel) {
  std::vector<int64_t> rows;
  std::vector<SampleKey> keys;
  for (int64_t lane = 0; lane < args.lanes; ++lane) {
    const auto span = args.rows_of(lane);
    for (int64_t row = span.first; row < span.first + span.count; ++row) {
      rows.push_back(row);
      if (args.sampling.samples()) keys.push_back(sample_key(args.sampling.keys + 4 * row));
    }
  }
  const RowJob job{args.logits,     rows.data(),   static_cast<int64_t>(rows.size()),
                   args.exclusions, args.sampling, keys.data()};
  const std::vector<RowAnswer> answers = read_rows(job, parallel);

  clear(args.output, args.count);
  for (size_t i = 0; i < rows.size(); ++i)
    if (answers[i].error != kRowNan) put(args.output, args.count, rows[i], answers[i].result);
  const RowAnswer* answer = answers.data();
  for (int64_t lane = 0; lane < args.lanes; ++lane) {
    const auto span = args.rows_of(lane);
    std::vector<int32_t> choices;
    for (int64_t i = 0; i < span.count; ++i, ++answer)
      choices.push_back(choice_of(answer->error, answer->result.sample));
    accept_lane(args, lane, span.first, choices);
  }
}

}  // namespace dparallel::cpu
