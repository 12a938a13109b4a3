#include "draft_trees.h"

#include <cmath>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>

namespace dparallel {
namespace {

// The `most` likeliest nodes of a tree, the likeliest first. A node of depth d is one of the
// guesses in row d, in front of it one of those in each row before.
//
// scores: [rows, width] log-probabilities; each row descends. A guess of -inf or NaN, and those
//         behind it in its row, are none.
// first:  index of scores[0] among the cells.
//
// A node's score is the sum of those on its path. It is never above its parent's, nor above that of
// the guess in front of its own behind the same parent, so both are found before it: a heap that
// holds the next guess behind each parent holds the best node that is left. Of equal nodes the one
// nearer the root goes first, then the one behind the earlier parent, then the earlier guess.
DraftTree best_nodes(const double* scores, int64_t rows, int64_t width, int64_t most,
                     int64_t first) {
  struct Candidate {
    double score, above;  // of the path to it, and of the path to its parent
    int64_t depth, parent, rank;
  };
  const auto later = [](const Candidate& a, const Candidate& b) {
    if (a.score != b.score) return a.score < b.score;
    if (a.depth != b.depth) return a.depth > b.depth;
    if (a.parent != b.parent) return a.parent > b.parent;
    return a.rank > b.rank;
  };
  std::priority_queue<Candidate, std::vector<Candidate>, decltype(later)> heap(later);
  const auto push = [&](int64_t parent, int64_t depth, int64_t rank, double above) {
    if (depth >= rows || rank >= width) return;
    const double score = above + scores[depth * width + rank];
    if (score > -std::numeric_limits<double>::infinity())
      heap.push({score, above, depth, parent, rank});
  };
  DraftTree tree;
  push(0, 0, 0, 0.0);
  while (!heap.empty() && static_cast<int64_t>(tree.parents.size()) < most) {
    const Candidate best = heap.top();
    heap.pop();
    tree.parents.push_back(best.parent);
    tree.cells.push_back(first + best.depth * width + best.rank);
    tree.chances.push_back(std::exp(best.score));
    push(best.parent, best.depth, best.rank + 1, best.above);
    push(static_cast<int64_t>(tree.parents.size()), best.depth + 1, 0, best.score);
  }
  return tree;
}

}  // namespace

std::vector<DraftTree> draft_trees(const std::vector<double>& scores, int64_t width,
                                   const std::vector<int64_t>& depths,
                                   const std::vector<int64_t>& sizes) {
  if (width < 1) throw std::invalid_argument("width: expected >= 1, got " + std::to_string(width));
  if (depths.size() != sizes.size())
    throw std::invalid_argument("sizes: expected " + std::to_string(depths.size()) +
                                ", one for each of depths, got " + std::to_string(sizes.size()));
  std::vector<DraftTree> trees;
  int64_t rows = static_cast<int64_t>(scores.size()) / width, row = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (depths[i] < 0 || depths[i] > rows - row)
      throw std::invalid_argument("depths: expected from 0 to the " + std::to_string(rows - row) +
                                  " rows that are left, got " + std::to_string(depths[i]));
    trees.push_back(
        best_nodes(scores.data() + row * width, depths[i], width, sizes[i], row * width));
    row += depths[i];
  }
  return trees;
}

}  // namespace dparallel
