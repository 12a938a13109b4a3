// The walk of accept through a lane's tree: from the root to the child whose token is the model's
// own choice at the root, from there likewise to a child of that child, and so on. Rows are
// numbered within their lane, a child after its parent.
#pragma once

#include "dparallel/common.h"

namespace dparallel {

// What follows a row on the path: the number of the next row, or one of these. Of several children
// that hold the choice the lowest follows; the codes that end the path are below every row, and
// kPathLeaf above. So the minimum of all candidates, in any order, is what follows.
constexpr int32_t kPathFails = -2;        // the row has no choice
constexpr int32_t kPathEnds = -1;         // its choice is an end-of-text id
constexpr int32_t kPathLeaf = INT32_MAX;  // no child holds its choice, which is the bonus token

// Errors are numbered by lane * kLaneRows + row within the lane.
constexpr int64_t kLaneRows = int64_t{1} << 31;

// A row's choice: its token, or minus the RowError for which it has none.
DP_HD int32_t choice_of(RowError error, int64_t token) {
  return error == kRowOk ? static_cast<int32_t>(token) : -static_cast<int32_t>(error);
}

// What follows a row that has no children. eos_ids [eos_count]; negative: none.
template <class Int>
DP_HD int32_t without_children(int32_t choice, const int64_t* eos_ids, Int eos_count) {
  if (choice < 0) return kPathFails;
  for (Int e = 0; e < eos_count; ++e)
    if (eos_ids[e] == choice) return kPathEnds;
  return kPathLeaf;
}

// Whether row i > 0 holds its parent's choice, and so follows it unless a lower row does too.
// choice_at(row): of rows before i. A parent that is not before its child chooses nothing.
template <class Choice>
DP_HD bool is_chosen(int32_t i, int64_t parent, int64_t draft, Choice choice_at) {
  return static_cast<uint64_t>(parent) < static_cast<uint64_t>(i) &&
         choice_at(static_cast<int32_t>(parent)) == draft;
}

struct Path {
  int32_t count;    // the number of rows on the path, and of the tokens that it emits
  int32_t last;     // the last row
  int32_t follows;  // what follows the last row; kPathFails: nothing is emitted

  DP_HD bool ended() const { return follows == kPathEnds; }
};

// Walks from row 0, which there is, for at most `room` > 0 rows. Calls emit(place, row) for each
// row of the path. follows(row): what follows it.
template <class Int, class Follows, class Emit>
DP_HD Path walk_path(Int room, Follows follows, Emit emit) {
  int32_t row = 0;
  for (int32_t count = 0;;) {
    const int32_t next = follows(row);
    if (next == kPathFails) return {0, row, next};
    emit(count++, row);
    if (next < 0 || next == kPathLeaf || count == room) return {count, row, next};
    row = next;
  }
}

}  // namespace dparallel
