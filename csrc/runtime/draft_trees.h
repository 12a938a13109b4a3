// Draft trees of the likeliest paths (DDTree, arXiv 2604.12989). Host code.
#pragma once

#include <cstdint>
#include <vector>

namespace dparallel {

// Guesses behind a root, which is node 0. Node n = 1, 2, ... is at index n - 1, behind its parent.
struct DraftTree {
  std::vector<int64_t> parents;
  std::vector<int64_t> cells;   // of each node's guess, an index into the scores
  std::vector<double> chances;  // that a node is accepted: the product of the guesses on its path
};

// A tree of at most sizes[i] nodes for each i, made of the next depths[i] rows of the scores
// [sum of depths, width].
std::vector<DraftTree> draft_trees(const std::vector<double>& scores, int64_t width,
                                   const std::vector<int64_t>& depths,
                                   const std::vector<int64_t>& sizes);

}  // namespace dparallel
