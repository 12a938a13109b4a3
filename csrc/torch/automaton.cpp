// From the logits of a pass to the tokens that have a form: class_stats and best_path.
#include <algorithm>
#include <tuple>
#include <vector>

#include "backend.h"

namespace dparallel {
namespace {

// Where each of the runs of a list begins, and its end: [runs + 1].
void check_offsets(const char* name, const int64_t* offsets, int64_t runs, int64_t listed) {
  within(name, offsets, runs + 1, 0, listed + 1);
  DP_CHECK(std::is_sorted(offsets, offsets + runs + 1), name, ": expected ascending numbers");
}

template <class Backend>
std::tuple<Tensor, Tensor> class_stats(Tensor logits, Tensor ids, Tensor offsets) {
  const Logits all = logits_of(logits);
  const int64_t count = row_count(logits), listed = length_of(ids, "ids");
  const int64_t classes = length_of(offsets, "offsets") - 1;
  DP_CHECK(classes >= 0, "offsets: expected at least 1 number, got 0");
  expect(ids, "ids", ScalarType::Int, {listed}, logits);
  expect(offsets, "offsets", ScalarType::Long, {classes + 1}, logits);
  const auto rows = [&](int64_t fields, ScalarType dtype) {
    return torch::stable::new_empty(logits, {fields, count, classes}, dtype);
  };
  const Tensor tokens = rows(2, ScalarType::Long), fields = rows(kRowFields, ScalarType::Float);
  const ClassStatsArgs args{all,
                            count,
                            data<int32_t>(ids),
                            listed,
                            data<int64_t>(offsets),
                            classes,
                            {data<int64_t>(tokens), data<float>(fields), nullptr}};
  if constexpr (Backend::kHostReads) check_offsets("offsets", args.offsets, classes, listed);
  Backend::template launch<cpu::class_stats, cuda::class_stats>("class_stats", args, logits);
  return {tokens, fields};
}

DPARALLEL_OP(class_stats,
             "class_stats(Tensor logits, Tensor ids, Tensor offsets) -> (Tensor tokens, Tensor "
             "fields)")

void check_contents(const BestPathArgs& args) {
  const Transitions& automaton = args.transitions;
  within("origin", automaton.origin, automaton.edges, 0, automaton.states);
  within("edge_class", automaton.token_class, automaton.edges, 0, automaton.classes);
  check_offsets("edge_offsets", automaton.offsets, automaton.states, automaton.edges);
  within("begin", args.begin, args.windows, 0, args.cells + 1);
  within("end", args.end, args.windows, 0, args.cells + 1);
  within("enter", args.enter, args.windows, 0, automaton.states);
}

template <class Backend>
std::tuple<Tensor, Tensor> best_path(Tensor scores, Tensor begin, Tensor end, Tensor enter,
                                     Tensor room, Tensor origin, Tensor edge_class,
                                     Tensor edge_offsets, Tensor distance) {
  DP_CHECK(scores.dim() == 3, "scores: expected 3 dimensions, got ", scores.dim());
  const int64_t windows = scores.size(0), cells = scores.size(1), classes = scores.size(2);
  const int64_t states = length_of(distance, "distance"), edges = length_of(origin, "origin");
  DP_CHECK(edges < INT32_MAX && states < INT32_MAX, "origin: expected fewer than ", INT32_MAX,
           " states and edges, got ", states, " and ", edges);
  expect(scores, "scores", ScalarType::Float, {windows, cells, classes}, scores);
  expect(begin, "begin", ScalarType::Long, {windows}, scores);
  expect(end, "end", ScalarType::Long, {windows}, scores);
  expect(enter, "enter", ScalarType::Long, {windows}, scores);
  expect(room, "room", ScalarType::Long, {windows}, scores);
  expect(origin, "origin", ScalarType::Int, {edges}, scores);
  expect(edge_class, "edge_class", ScalarType::Int, {edges}, scores);
  expect(edge_offsets, "edge_offsets", ScalarType::Long, {states + 1}, scores);
  expect(distance, "distance", ScalarType::Long, {states}, scores);
  const Tensor state = torch::stable::new_empty(scores, {windows, cells + 1}, ScalarType::Long);
  const Tensor chosen = torch::stable::new_empty(scores, {windows, cells}, ScalarType::Long);
  const Transitions transitions{states,
                                classes,
                                edges,
                                data<int32_t>(origin),
                                data<int32_t>(edge_class),
                                data<int64_t>(edge_offsets),
                                data<int64_t>(distance)};
  const BestPathArgs args{data<float>(scores),
                          windows,
                          cells,
                          data<int64_t>(begin),
                          data<int64_t>(end),
                          data<int64_t>(enter),
                          data<int64_t>(room),
                          transitions,
                          data<int64_t>(state),
                          data<int64_t>(chosen)};
  if constexpr (Backend::kHostReads) check_contents(args);
  Backend::template launch<cpu::best_path, cuda::best_path, cuda::best_path_scratch>("best_path",
                                                                                     args, scores);
  return {state, chosen};
}

DPARALLEL_OP(best_path,
             "best_path(Tensor scores, Tensor begin, Tensor end, Tensor enter, Tensor room, Tensor "
             "origin, Tensor edge_class, Tensor edge_offsets, Tensor distance) -> (Tensor state, "
             "Tensor chosen)")

}  // namespace
}  // namespace dparallel
