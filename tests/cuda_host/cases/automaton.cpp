// Cases of the ops of constrained decoding.
#include "cases.h"

namespace cases {
namespace {

// Where each of `runs` runs of a list of `listed` begins, and the end of the last.
std::vector<int64_t> random_offsets(int64_t runs, int64_t listed) {
  std::vector<int64_t> offsets(runs + 1, 0);
  for (int64_t r = 1; r < runs; ++r) offsets[r] = below(listed + 1);
  offsets[runs] = listed;
  if (runs == 0) offsets[0] = 0;
  std::sort(offsets.begin(), offsets.end());
  return offsets;
}

}  // namespace

void class_stats_case() {
  const int64_t vocab = random_vocab(), count = below(4), classes = below(20);
  Rows logits(count, vocab, true, 0.0);
  if (chance(0.3)) logits.exaggerate();
  std::vector<int32_t> ids;
  for (int64_t id = 0; classes > 0 && id < vocab; ++id)
    if (chance(0.9)) ids.push_back(static_cast<int32_t>(id));
  const auto listed = static_cast<int64_t>(ids.size());
  const std::vector<int64_t> offsets = random_offsets(classes, listed);
  for (auto& id : ids)
    if (chance(0.001))
      id = one_of<int32_t>({-1, INT32_MIN, INT32_MAX, static_cast<int32_t>(vocab)});
  Result on_cuda(count * classes, 0), on_cpu(count * classes, 0);
  ClassStatsArgs args{logits.flat(),  count,   ids.data(),     listed,
                      offsets.data(), classes, on_cpu.output()};
  cpu::class_stats(args, serial);
  args.output = on_cuda.output();
  launched(cuda::class_stats(args, nullptr));
  same(on_cuda.tokens, on_cpu.tokens, "tokens");
  close(on_cuda.fields, on_cpu.fields, "fields");
}

void best_path_case() {
  const bool many = chance(0.05);  // more states than shared memory holds
  const int64_t windows = below(4), cells = below(many ? 3 : 12);
  const int64_t states = many ? 4097 : 1 + below(90), classes = 1 + below(30);
  const int64_t edges = many ? 300 : below(3 * states);
  std::vector<int32_t> origin(edges), token_class(edges);
  for (auto& s : origin) s = static_cast<int32_t>(below(states));
  for (auto& k : token_class) k = static_cast<int32_t>(below(classes));
  const std::vector<int64_t> offsets = random_offsets(states, edges);
  std::vector<int64_t> distance(states), begin(windows), end(windows), enter(windows),
      room(windows);
  for (auto& d : distance) d = below(6);
  for (int64_t w = 0; w < windows; ++w) {
    begin[w] = below(cells + 1);
    end[w] = begin[w] + below(cells + 1 - begin[w]);
    enter[w] = below(states);
    room[w] = below(6);
  }
  std::vector<float> scores(windows * cells * classes);
  for (auto& z : scores)  // whole numbers, with ties
    z = chance(0.1) ? one_of({-kInfinity, NAN}) : -static_cast<float>(below(4));
  struct Output {
    std::vector<int64_t> state, chosen;
    Output(int64_t windows, int64_t cells)
        : state(windows * (cells + 1), -7), chosen(windows * cells, -7) {}
  } on_cpu(windows, cells), on_cuda(windows, cells);
  const auto args_of = [&](Output& o) {
    return BestPathArgs{scores.data(),
                        windows,
                        cells,
                        begin.data(),
                        end.data(),
                        enter.data(),
                        room.data(),
                        {states, classes, edges, origin.data(), token_class.data(), offsets.data(),
                         distance.data()},
                        o.state.data(),
                        o.chosen.data()};
  };
  cpu::best_path(args_of(on_cpu), serial);
  const BestPathArgs args = args_of(on_cuda);
  Memory memory(cuda::best_path_scratch(args), 0);
  launched(cuda::best_path(args, memory.workspace(), nullptr));
  same(on_cuda.state, on_cpu.state, "state");
  same(on_cuda.chosen, on_cpu.chosen, "token_class");
}

}  // namespace cases
