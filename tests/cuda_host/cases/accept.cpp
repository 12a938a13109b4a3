// Cases of accept.
#include "cases.h"

// after the header that knows the device
#include "dparallel/accept.h"

namespace cases {
namespace {

struct Lanes {
  std::vector<int64_t> start, end;
  int64_t size() const { return static_cast<int64_t>(start.size()); }
};

struct Output {
  Result rows;
  std::vector<int64_t> emitted, path, tokens;
  std::unique_ptr<bool[]> ended;
  Output(int64_t count, int64_t lanes, int64_t width)
      : rows(count, lanes),
        emitted(lanes, -7),
        path(lanes * width, -7),
        tokens(lanes * width, -7),
        ended(new bool[lanes + 1]()) {}

  AcceptArgs into(AcceptArgs args) {
    args.emitted = emitted.data();
    args.path = path.data();
    args.tokens = tokens.data();
    args.ended = ended.get();
    args.output = rows.output();
    return args;
  }
};

void same_walk(const Output& on_cuda, const Output& on_cpu, int64_t lanes) {
  same(on_cuda.rows.error, on_cpu.rows.error, "error");
  same(on_cuda.emitted, on_cpu.emitted, "count");
  same(on_cuda.path, on_cpu.path, "path");
  same(on_cuda.tokens, on_cpu.tokens, "tokens");
  for (int64_t b = 0; b < lanes; ++b)
    REQUIRE(on_cuda.ended[b] == on_cpu.ended[b], "ended[%lld]: %d, CPU %d", (long long)b,
            on_cuda.ended[b], on_cpu.ended[b]);
}

// On a device nobody has looked at parents and lanes. What is wrong emits nothing, and spoils
// neither memory nor a later call.
void wrong_case(AcceptArgs args, Memory& memory, const std::vector<int64_t>& parent_before) {
  std::vector<int64_t> parent = parent_before;
  for (auto& p : parent)
    if (chance(0.2)) p = one_of<int64_t>({-1, 0, 5, args.count, INT64_MAX, INT64_MIN});
  Lanes lanes, sound;
  for (int64_t b = 0; b < args.lanes; ++b) {
    const int64_t start = below(args.count + 1), end = start + below(9);
    lanes.start.push_back(chance(0.1) ? one_of<int64_t>({-1, INT64_MIN, INT64_MAX}) : start);
    lanes.end.push_back(chance(0.1) ? one_of<int64_t>({INT64_MIN, INT64_MAX}) : end);
  }
  args.parent = parent.data();
  args.q_start = lanes.start.data(), args.q_end = lanes.end.data();
  args.max_q_len = below(args.max_q_len + 1);
  sound = lanes;
  for (int64_t b = 0; b < args.lanes; ++b)
    for (int64_t other = 0; other < b; ++other)
      for (int64_t row = 0; row < args.count; ++row)
        if (args.rows_of(other).hold(row) && args.rows_of(b).hold(row)) sound.end[b] = -1;
  Output found(args.count, args.lanes, args.max_q_len),
      expected(args.count, args.lanes, args.max_q_len);
  launched(cuda::accept(found.into(args), memory.workspace(), nullptr));
  memory.check();
  args.q_end = sound.end.data();
  cpu::accept(expected.into(args), serial);
  same_walk(found, expected, args.lanes);
}

}  // namespace

void accept_case() {
  const bool many = chance(0.04);  // a lane of more rows than link in shared memory
  const int64_t lane_count = many ? 1 : chance(0.05) ? 30 + below(10) : below(5);
  Lanes lanes;
  int64_t count = 0, longest = 0;
  for (int64_t b = 0; b < lane_count; ++b) {
    count += chance(0.2) ? below(3) : 0;
    lanes.start.push_back(count);
    count += many ? 257 + below(20) : chance(0.2) ? 0 : below(lane_count > 5 ? 3 : 9);
    lanes.end.push_back(count);
    longest = std::max(longest, lanes.end[b] - lanes.start[b]);
  }
  count += below(2);
  for (int64_t b = lane_count; b-- > 1;) {  // in any order
    const int64_t other = below(b + 1);
    std::swap(lanes.start[b], lanes.start[other]);
    std::swap(lanes.end[b], lanes.end[other]);
  }
  int64_t vocab = many ? 1 + below(30) : random_vocab();
  if (count * vocab > 1000000) vocab = 1 + below(3000);
  Rows logits(count, vocab, chance(0.3), 0.1);
  if (chance(0.2)) logits.exaggerate();
  const std::vector<int64_t> suppress = random_suppress(vocab);
  std::vector<int64_t> keys(4 * count), draft(count), parent(count, -9), room, eos_ids;
  for (auto& k : keys) k = below(1 << 20);
  const int64_t eos_count = below(3);
  for (int64_t b = 0; b < lane_count; ++b) {
    room.push_back(chance(0.1) ? 0 : 1 + below(longest + 2));
    for (int64_t e = 0; e < eos_count; ++e) eos_ids.push_back(chance(0.3) ? -1 : below(vocab));
  }
  AcceptArgs args{};
  args.logits = logits.flat();
  args.draft = draft.data(), args.parent = parent.data(), args.count = count;
  args.lanes = lane_count, args.q_start = lanes.start.data(), args.q_end = lanes.end.data();
  args.room = chance(0.5) ? room.data() : nullptr;
  args.eos_ids = eos_ids.data(), args.eos_count = eos_count;
  args.max_q_len = longest + below(3);
  args.exclusions = {chance(0.5) ? below(vocab) : -1, suppress.data(),
                     static_cast<int64_t>(suppress.size())};
  args.sampling = random_sampling(keys, 0);

  // Most drafted tokens are what their parents choose.
  Result choices(count, count);
  cpu::row_stats(
      {args.logits, nullptr, count, args.exclusions, args.sampling, {}, choices.output()}, serial);
  const bool chain = chance(0.3);
  for (int64_t b = 0; b < lane_count; ++b)
    for (int64_t i = 0, row = lanes.start[b]; row < lanes.end[b]; ++i, ++row) {
      parent[row] = i == 0 ? -1 : chain ? i - 1 : i - 1 - below(std::min<int64_t>(i, 4));
      const int64_t choice = i == 0 ? -1 : choices.tokens[count + lanes.start[b] + parent[row]];
      draft[row] = chance(many ? 0.99 : 0.8) ? choice : below(vocab + 2) - 1;
    }
  Output on_cpu(count, lane_count, args.max_q_len), on_cuda(count, lane_count, args.max_q_len);
  cpu::accept(on_cpu.into(args), serial);
  Memory memory(cuda::accept_scratch(args), cuda::accept_counters(args));
  if (chance(0.3) && !many) wrong_case(args, memory, parent);
  launched(cuda::accept(on_cuda.into(args), memory.workspace(), nullptr));
  memory.check();
  same_walk(on_cuda, on_cpu, lane_count);
  same(on_cuda.rows.tokens, on_cpu.rows.tokens, "row tokens");
  close(on_cuda.rows.fields, on_cpu.rows.fields, "fields");
}

}  // namespace cases
