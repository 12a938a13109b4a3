// From logits to tokens: row_stats, row_topk, select, commit_, and unmask_, which is three of them;
// and accept.
#include <algorithm>
#include <functional>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "backend.h"
#include "commit.h"
#include "dparallel/accept.h"
#include "dparallel/policy.h"
#include "dparallel/row_topk.h"
#include "select.h"
#include "windows.h"

namespace dparallel {
namespace {

Exclusions exclusions_of(int64_t mask_id, std::optional<Tensor>& suppress, const Tensor& like) {
  if (!suppress.has_value()) return {mask_id, nullptr, 0};
  const int64_t count = length_of(*suppress, "suppress");
  expect(*suppress, "suppress", ScalarType::Long, {count}, like);
  return {mask_id, data<int64_t>(*suppress), count};
}

Sampling sampling_of(double temperature, double top_p, int64_t top_k, std::optional<Tensor>& keys,
                     const std::vector<int64_t>& sizes, int64_t position_offset,
                     const Tensor& like) {
  DP_CHECK(temperature >= 0 && temperature < kInfinity,
           "temperature: expected a finite number >= 0, got ", temperature);
  const float inverse_temperature = inverse_temperature_of(temperature);
  if (inverse_temperature == 0.0f) return {0.0f, nullptr, 0};
  DP_CHECK(top_p >= 0 && top_p <= 1, "top_p: expected a number from 0 to 1, got ", top_p);
  DP_CHECK(top_k >= 0, "top_k: expected a whole number >= 0, got ", top_k);
  DP_CHECK(keys.has_value(), "keys: needed at a temperature of ", kColdest, " and above");
  expect(*keys, "keys", ScalarType::Long, sizes, like);
  return {inverse_temperature, data<int64_t>(*keys), position_offset, top_p, top_k};
}

// The number of rows that an op reads: of `rows`, or of all of the logits where they are left out.
int64_t read_count(std::optional<Tensor>& rows, const Tensor& logits) {
  if (!rows.has_value()) return row_count(logits);
  const int64_t count = length_of(*rows, "rows");
  expect(*rows, "rows", ScalarType::Long, {count}, logits);
  return count;
}

struct RowTensors {
  Tensor tokens, fields, error;

  RowTensors(const Tensor& like, int64_t count, int64_t errors)
      : tokens(torch::stable::new_empty(like, {2, count}, ScalarType::Long)),
        fields(torch::stable::new_empty(like, {kRowFields, count}, ScalarType::Float)),
        error(torch::stable::new_empty(like, {errors}, ScalarType::Long)) {}

  RowOutput output() const {
    return {data<int64_t>(tokens), data<float>(fields), data<int64_t>(error)};
  }
};

// Of rows whose numbers the host has; on a GPU the kernels bring them within their bounds.
void check_policy(const float* rows, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    const float* row = rows + b * kPolicyFields;
    const int field = policy_misfit(row);
    if (field == kPolicyFields) continue;
    constexpr const char* kNames[] = {"selector", "threshold", "min_commit", "max_commit", "score"};
    const PolicyBounds bounds = policy_bounds(field, row);
    bad_argument(kNames[field], ": expected a ", bounds.whole ? "whole " : "", "number from ",
                 bounds.low, " to ", bounds.high, ", got ", row[field], " in policy row ", b);
  }
}

void check_suppress(const Exclusions& ex, int64_t vocab) {
  within("suppress", ex.suppress, ex.suppress_count, 0, vocab);
  DP_CHECK(std::is_sorted(ex.suppress, ex.suppress + ex.suppress_count),
           "suppress: expected ascending ids");
}

void check_contents(const RowStatsArgs& args, int64_t rows) {
  if (args.rows) within("rows", args.rows, args.count, 0, rows);
  check_suppress(args.exclusions, args.logits.vocab);
  const Gather& gather = args.gather;
  within("ids", gather.ids, gather.count * (gather.stride > 0 ? args.count : 1), 0,
         args.logits.vocab);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats(
    Tensor logits, std::optional<Tensor> rows, int64_t mask_id, std::optional<Tensor> suppress,
    std::optional<Tensor> ids, double temperature, double top_p, int64_t top_k,
    std::optional<Tensor> keys, std::optional<Tensor> counters) {
  const Logits all = logits_of(logits);
  const int64_t count = read_count(rows, logits);
  const RowTensors out(logits, count, count);
  Gather gather{};
  if (ids.has_value()) {
    DP_CHECK(ids->dim() == 1 || ids->dim() == 2, "ids: expected 1 or 2 dimensions, got ",
             ids->dim());
    const bool each = ids->dim() == 2;
    gather.count = ids->size(each ? 1 : 0);
    gather.stride = each ? gather.count : 0;
    expect(*ids, "ids", ScalarType::Long,
           each ? std::vector<int64_t>{count, gather.count} : std::vector<int64_t>{gather.count},
           logits);
    gather.ids = data<int64_t>(*ids);
  }
  Tensor gathered = torch::stable::new_empty(logits, {count, gather.count}, ScalarType::Float);
  gather.logits = data<float>(gathered);
  const RowStatsArgs args{all,
                          listed(rows),
                          count,
                          exclusions_of(mask_id, suppress, logits),
                          sampling_of(temperature, top_p, top_k, keys, {count, 4}, 0, logits),
                          gather,
                          out.output()};
  if constexpr (Backend::kHostReads) check_contents(args, row_count(logits));
  Backend::template launch<cpu::row_stats, cuda::row_stats, cuda::row_stats_scratch,
                           cuda::row_stats_counters>("row_stats", args, logits, counters);
  return {out.tokens, out.fields, out.error, gathered};
}

DPARALLEL_OP(
    row_stats,
    "row_stats(Tensor logits, Tensor? rows, int mask_id, Tensor? suppress, Tensor? ids, float "
    "temperature, float top_p, int top_k, Tensor? keys, Tensor(a!)? counters) -> (Tensor tokens, "
    "Tensor fields, Tensor error, Tensor gathered)")

void check_contents(const RowTopkArgs& args, int64_t rows) {
  if (args.rows) within("rows", args.rows, args.count, 0, rows);
  check_suppress(args.exclusions, args.logits.vocab);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> row_topk(Tensor logits, int64_t k, std::optional<Tensor> rows,
                                            int64_t mask_id, std::optional<Tensor> suppress,
                                            std::optional<Tensor> counters) {
  const Logits all = logits_of(logits);
  DP_CHECK(k >= 1 && k <= kMostTop, "k: expected 1 to ", kMostTop, ", got ", k);
  const int64_t count = read_count(rows, logits);
  Tensor tokens = torch::stable::new_empty(logits, {count, k}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(logits, {count, k}, ScalarType::Float);
  Tensor error = torch::stable::new_empty(logits, {count}, ScalarType::Long);
  const RowTopkArgs args{all,
                         listed(rows),
                         count,
                         k,
                         exclusions_of(mask_id, suppress, logits),
                         data<int64_t>(tokens),
                         data<float>(logprobs),
                         data<int64_t>(error)};
  if constexpr (Backend::kHostReads) check_contents(args, row_count(logits));
  Backend::template launch<cpu::row_topk, cuda::row_topk, cuda::row_topk_scratch,
                           cuda::row_topk_counters>("row_topk", args, logits, counters);
  return {tokens, logprobs, error};
}

DPARALLEL_OP(
    row_topk,
    "row_topk(Tensor logits, int k, Tensor? rows, int mask_id, Tensor? suppress, Tensor(a!)? "
    "counters) -> (Tensor tokens, Tensor logprobs, Tensor error)")

void check_contents(const SelectArgs& args) {
  check_policy(args.policy, args.batch);
  for (const auto& [scores, name] : {std::pair{args.confidence, "confidence"},
                                     {args.margin, "margin"},
                                     {args.entropy, "entropy"}}) {
    const int64_t i = cpu::first_unordered(args, scores);
    DP_CHECK(i < 0, name, ": NaN at eligible position ", i % args.length, " of sequence ",
             i / args.length);
  }
}

template <class Backend>
Tensor select(Tensor confidence, Tensor margin, Tensor entropy, Tensor eligible, Tensor policy) {
  DP_CHECK(confidence.dim() == 2, "confidence: expected 2 dimensions, got ", confidence.dim());
  const int64_t batch = confidence.size(0), length = confidence.size(1);
  expect(confidence, "confidence", ScalarType::Float, {batch, length}, confidence);
  expect(margin, "margin", ScalarType::Float, {batch, length}, confidence);
  expect(entropy, "entropy", ScalarType::Float, {batch, length}, confidence);
  expect(eligible, "eligible", ScalarType::Bool, {batch, length}, confidence);
  expect(policy, "policy", ScalarType::Float, {batch, kPolicyFields}, confidence);
  Tensor commit = torch::stable::new_empty(confidence, {batch, length}, ScalarType::Bool);
  const SelectArgs args{data<float>(confidence),
                        data<float>(margin),
                        data<float>(entropy),
                        data<Flag>(eligible),
                        data<float>(policy),
                        batch,
                        length,
                        data<bool>(commit)};
  if constexpr (Backend::kHostReads) check_contents(args);
  Backend::template launch<cpu::select, cuda::select, cuda::select_scratch>("select", args,
                                                                            confidence);
  return commit;
}

DPARALLEL_OP(
    select,
    "select(Tensor confidence, Tensor margin, Tensor entropy, Tensor eligible, Tensor policy) "
    "-> Tensor")

TokenGrid tokens_of(const Tensor& tokens) {
  DP_CHECK(tokens.dim() == 2 && tokens.scalar_type() == ScalarType::Long,
           "tokens: expected int64 (B, L), got ", described(tokens));
  return {data<int64_t>(tokens), tokens.size(0), tokens.size(1), tokens.stride(0),
          tokens.stride(1)};
}

Windows windows_of(std::optional<Tensor>& lane, Tensor& start, Tensor& end, int64_t batch,
                   const Tensor& like) {
  const int64_t count = lane.has_value() ? length_of(*lane, "lane") : batch;
  if (lane.has_value()) expect(*lane, "lane", ScalarType::Long, {count}, like);
  expect(start, "start", ScalarType::Long, {count}, like);
  expect(end, "end", ScalarType::Long, {count}, like);
  return {count, listed(lane), data<int64_t>(start), data<int64_t>(end)};
}

void check_positions(const int64_t* positions, int64_t count, const TokenGrid& tokens) {
  if (positions == nullptr) return;
  within("positions", positions, count, 0, tokens.batch * tokens.length);
  DP_CHECK(
      std::adjacent_find(positions, positions + count, std::greater_equal<>()) == positions + count,
      "positions: expected strictly ascending positions");
}

void check_lanes(const Windows& windows, const TokenGrid& tokens) {
  if (windows.lane != nullptr) within("lane", windows.lane, windows.count, 0, tokens.batch);
}

void check_contents(const CommitArgs& args) {
  check_positions(args.positions, args.count, args.tokens);
  check_lanes(args.windows, args.tokens);
  if (const int64_t row = cpu::first_unwritable(args); row >= 0) {
    const int64_t position = args.positions ? args.positions[row] : row;
    bad_argument("token: expected ids >= 0, and not the mask token ", args.mask_id, ", got ",
                 args.token[row], " for sequence ", position / args.tokens.length, " at position ",
                 position % args.tokens.length);
  }
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> commit_(Tensor tokens, std::optional<Tensor> positions,
                                                   std::optional<Tensor> commit,
                                                   std::optional<Tensor> token, int64_t mask_id,
                                                   std::optional<Tensor> lane, Tensor start,
                                                   Tensor end, std::optional<Tensor> counters) {
  const TokenGrid all = tokens_of(tokens);
  DP_CHECK(commit.has_value() == token.has_value(), "token: expected together with commit");
  int64_t count = 0;
  if (commit.has_value()) {
    count = positions.has_value() ? length_of(*positions, "positions") : all.batch * all.length;
    expect(*commit, "commit", ScalarType::Bool, {count}, tokens);
    expect(*token, "token", ScalarType::Long, {count}, tokens);
  }
  if (positions.has_value()) expect(*positions, "positions", ScalarType::Long, {count}, tokens);
  const Windows windows = windows_of(lane, start, end, all.batch, tokens);
  own_memory({{tokens, "tokens"}}, {{positions, "positions"},
                                    {commit, "commit"},
                                    {token, "token"},
                                    {lane, "lane"},
                                    {start, "start"},
                                    {end, "end"}});
  const auto of_windows = [&] {
    return torch::stable::new_empty(tokens, {windows.count}, ScalarType::Long);
  };
  Tensor remaining = of_windows(), first = of_windows(), changed = of_windows();
  Tensor error = torch::stable::new_empty(tokens, {1}, ScalarType::Long);
  const CommitArgs args{all,
                        listed(positions),
                        data_or_null<Flag>(commit),
                        data_or_null<int64_t>(token),
                        count,
                        mask_id,
                        windows,
                        data<int64_t>(remaining),
                        data<int64_t>(first),
                        data<int64_t>(changed),
                        data<int64_t>(error)};
  if constexpr (Backend::kHostReads) check_contents(args);
  Backend::template launch<cpu::commit, cuda::commit, nullptr, cuda::commit_counters>(
      "commit_", args, tokens, counters);
  return {remaining, first, changed, error};
}

DPARALLEL_OP(
    commit_,
    "commit_(Tensor(a!) tokens, Tensor? positions, Tensor? commit, Tensor? token, int mask_id, "
    "Tensor? lane, Tensor start, Tensor end, Tensor(b!)? counters) -> (Tensor remaining, Tensor "
    "first, Tensor changed, Tensor error)")

// Names two that share a position.
void check_disjoint(const Windows& windows, const TokenGrid& tokens) {
  if (windows.lane == nullptr) return;
  const std::vector<cpu::WindowSpan> spans = cpu::spans_of(windows, tokens);
  for (size_t i = 1; i < spans.size(); ++i) {
    const int64_t a = spans[i - 1].window, b = spans[i].window;
    DP_CHECK(spans[i - 1].end <= spans[i].begin,
             "start: expected windows of a sequence that do not overlap, got [", windows.start[a],
             ", ", windows.end[a], ") and [", windows.start[b], ", ", windows.end[b], "), windows ",
             a, " and ", b, " of sequence ", windows.lane[a]);
  }
}

void check_contents(const UnmaskArgs& args) {
  check_policy(args.policy, args.windows.count);
  check_positions(args.positions, args.count, args.tokens);
  check_lanes(args.windows, args.tokens);
  check_disjoint(args.windows, args.tokens);
  check_suppress(args.exclusions, args.logits.vocab);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> unmask_(
    Tensor tokens, Tensor logits, std::optional<Tensor> positions, std::optional<Tensor> lane,
    Tensor start, Tensor end, Tensor policy, int64_t mask_id, std::optional<Tensor> suppress,
    double temperature, double top_p, int64_t top_k, std::optional<Tensor> keys,
    int64_t position_offset, std::optional<Tensor> counters) {
  const TokenGrid grid = tokens_of(tokens);
  check_device(tokens, "tokens", logits, "the logits");
  const Logits all = logits_of(logits);
  const int64_t count = row_count(logits);
  if (positions.has_value()) {
    DP_CHECK(logits.dim() == 2, "logits: expected (N, V) with positions, got ", described(logits));
    expect(*positions, "positions", ScalarType::Long, {count}, logits);
  } else {
    DP_CHECK(logits.dim() == 3 && logits.size(0) == grid.batch && logits.size(1) == grid.length,
             "logits: expected (", grid.batch, ", ", grid.length, ", V) matching tokens, got ",
             described(logits));
  }
  const Windows windows = windows_of(lane, start, end, grid.batch, logits);
  expect(policy, "policy", ScalarType::Float, {windows.count, kPolicyFields}, logits);
  const RowTensors out(logits, count, windows.count);
  Tensor committed = torch::stable::new_empty(logits, {windows.count}, ScalarType::Long);
  Tensor remaining = torch::stable::new_empty(logits, {windows.count}, ScalarType::Long);
  Tensor done = torch::stable::new_empty(logits, {}, ScalarType::Bool);
  const UnmaskArgs args{
      grid,
      all,
      listed(positions),
      count,
      windows,
      data<float>(policy),
      exclusions_of(mask_id, suppress, logits),
      sampling_of(temperature, top_p, top_k, keys, {windows.count, 3}, position_offset, logits),
      data<int64_t>(committed),
      data<int64_t>(remaining),
      data<bool>(done),
      out.output()};
  own_memory({{tokens, "tokens"}}, {{logits, "logits"},
                                    {positions, "positions"},
                                    {lane, "lane"},
                                    {start, "start"},
                                    {end, "end"},
                                    {policy, "policy"},
                                    {suppress, "suppress"},
                                    {keys, "keys"}});
  if constexpr (Backend::kHostReads) check_contents(args);
  Backend::template launch<cpu::unmask, cuda::unmask, cuda::unmask_scratch, cuda::unmask_counters>(
      "unmask_", args, logits, counters);
  return {committed, remaining, done, out.tokens, out.fields, out.error};
}

DPARALLEL_OP(
    unmask_,
    "unmask_(Tensor(a!) tokens, Tensor logits, Tensor? positions, Tensor? lane, Tensor start, "
    "Tensor end, Tensor policy, int mask_id, Tensor? suppress, float temperature, float top_p, int "
    "top_k, Tensor? keys, int position_offset, Tensor(b!)? counters) -> (Tensor committed, Tensor "
    "remaining, Tensor done, Tensor row_tokens, Tensor fields, Tensor error)")

// Lanes within bounds, that share no row and fit, and trees: a parent before its children.
void check_lanes(const AcceptArgs& args) {
  const auto order = runs_apart("lane", args.q_start, args.q_end, args.lanes, args.count);
  for (int64_t b = 0; b < args.lanes; ++b) {
    const int64_t rows = args.q_end[b] - args.q_start[b];
    DP_CHECK(rows <= args.max_q_len, "max_q_len: expected at least ", rows, ", the rows of lane ",
             b, ", got ", args.max_q_len);
    DP_CHECK(args.room == nullptr || args.room[b] >= 0, "room: expected >= 0, got ", args.room[b],
             " at ", b);
  }
  for (const int64_t b : order) {
    const int64_t start = args.q_start[b];
    DP_CHECK(args.parent[start] == -1, "parent: expected -1, of a root, got ", args.parent[start],
             " at row 0 of lane ", b);
    for (int64_t row = start + 1; row < args.q_end[b]; ++row)
      DP_CHECK(args.parent[row] >= 0 && args.parent[row] < row - start, "parent: expected in [0, ",
               row - start, "), got ", args.parent[row], " at row ", row - start, " of lane ", b);
  }
}

void check_contents(const AcceptArgs& args) {
  check_lanes(args);
  check_suppress(args.exclusions, args.logits.vocab);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> accept(
    Tensor logits, Tensor draft, Tensor parent, Tensor q_start, Tensor q_end,
    std::optional<Tensor> room, std::optional<Tensor> eos_ids, int64_t mask_id,
    std::optional<Tensor> suppress, double temperature, double top_p, int64_t top_k,
    std::optional<Tensor> keys, int64_t max_q_len, std::optional<Tensor> counters) {
  const Logits all = logits_of(logits);
  DP_CHECK(logits.dim() == 2, "logits: expected (N, V), got ", logits.dim(), " dimensions");
  const int64_t count = row_count(logits), lanes = length_of(q_start, "q_start");
  DP_CHECK(count < kLaneRows, "logits: expected fewer than ", kLaneRows, " rows, got ", count);
  DP_CHECK(max_q_len >= 0 && max_q_len < kLaneRows, "max_q_len: expected in [0, ", kLaneRows,
           "), got ", max_q_len);  // outputs have this size
  expect(draft, "draft", ScalarType::Long, {count}, logits);
  expect(parent, "parent", ScalarType::Long, {count}, logits);
  expect(q_start, "q_start", ScalarType::Long, {lanes}, logits);
  expect(q_end, "q_end", ScalarType::Long, {lanes}, logits);
  if (room.has_value()) expect(*room, "room", ScalarType::Long, {lanes}, logits);
  int64_t eos_count = 0;
  if (eos_ids.has_value()) {
    DP_CHECK(eos_ids->dim() == 2, "eos_ids: expected 2 dimensions, got ", eos_ids->dim());
    eos_count = eos_ids->size(1);
    expect(*eos_ids, "eos_ids", ScalarType::Long, {lanes, eos_count}, logits);
  }
  const RowTensors out(logits, count, lanes);
  const auto of_lanes = [&](const std::vector<int64_t>& sizes, ScalarType dtype) {
    return torch::stable::new_empty(logits, sizes, dtype);
  };
  Tensor emitted = of_lanes({lanes}, ScalarType::Long), ended = of_lanes({lanes}, ScalarType::Bool);
  Tensor path = of_lanes({lanes, max_q_len}, ScalarType::Long);
  Tensor tokens = of_lanes({lanes, max_q_len}, ScalarType::Long);
  const AcceptArgs args{all,
                        data<int64_t>(draft),
                        data<int64_t>(parent),
                        count,
                        lanes,
                        data<int64_t>(q_start),
                        data<int64_t>(q_end),
                        data_or_null<int64_t>(room),
                        data_or_null<int64_t>(eos_ids),
                        eos_count,
                        max_q_len,
                        exclusions_of(mask_id, suppress, logits),
                        sampling_of(temperature, top_p, top_k, keys, {count, 4}, 0, logits),
                        data<int64_t>(emitted),
                        data<int64_t>(path),
                        data<int64_t>(tokens),
                        data<bool>(ended),
                        out.output()};
  if constexpr (Backend::kHostReads) check_contents(args);
  Backend::template launch<cpu::accept, cuda::accept, cuda::accept_scratch, cuda::accept_counters>(
      "accept", args, logits, counters);
  return {emitted, path, tokens, ended, out.tokens, out.fields, out.error};
}

DPARALLEL_OP(
    accept,
    "accept(Tensor logits, Tensor draft, Tensor parent, Tensor q_start, Tensor q_end, Tensor? "
    "room, Tensor? eos_ids, int mask_id, Tensor? suppress, float temperature, float top_p, int "
    "top_k, Tensor? keys, int max_q_len, Tensor(a!)? counters) -> (Tensor count, Tensor path, "
    "Tensor tokens, Tensor ended, Tensor row_tokens, Tensor fields, Tensor error)")

}  // namespace
}  // namespace dparallel
