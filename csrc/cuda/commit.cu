// commit: tokens are written, then the masks of each window are counted, in one launch.
//
// Work: a thread writes the token of one row. The last block to arrive counts the masks of all
// windows, a warp for each window. If there is nothing to write, no block waits, and the windows
// are distributed over all blocks.
//
// Few tokens change, so the thread that changes a token adds it to the counter of every window that
// holds it. Counters are zero between launches: arrivals, the row of an error, and one counter for
// each window.
//
// Bytes: 1 for each row, 16 more for each written token, and 8 for each token of a window. Blocks
// of 512 threads, so that most launches have one block, are a guess, not measured against others.
#include "device.cuh"

// after the header that knows the device
#include "dparallel/launch.h"

namespace dparallel::cuda {
namespace {

constexpr int kCommitThreads = 512;
constexpr int kCommitWarps = kCommitThreads / 32;
constexpr int kArrivals = 0, kWorst = 1, kChanges = 2;  // places of the counters

__device__ inline void write_token(const CommitArgs& args, int64_t row, int32_t* counters) {
  const TokenGrid& tokens = args.tokens;
  const int64_t position = args.positions != nullptr ? args.positions[row] : row;
  if (position < 0 || position >= tokens.batch * tokens.length) return;
  const int64_t token = args.token[row];
  if (token < 0 || token == args.mask_id) {  // the lowest row is the largest number below INT32_MAX
    atomicMax(counters + kWorst, INT32_MAX - static_cast<int32_t>(row));
    return;
  }
  const int at = static_cast<int>(position), length = static_cast<int>(tokens.length);
  const int b = at / length, column = at % length;
  int64_t& held = tokens.at(b, column);
  if (held == token) return;
  held = token;
#pragma unroll 1
  for (int64_t w = 0; w < args.windows.count; ++w)
    if (args.windows.sequence(w) == b && args.windows.start[w] <= column &&
        column < args.windows.end[w])
      atomicAdd(counters + kChanges + w, 1);
}

// By a warp.
__device__ inline void look(const CommitArgs& args, int64_t w, int32_t* counters) {
  const TokenGrid& tokens = args.tokens;
  const int64_t b = args.windows.sequence(w);
  const auto clamp = [&](int64_t column, int64_t least) {
    return column < least ? least : column > tokens.length ? tokens.length : column;
  };
  const auto start = static_cast<int>(clamp(args.windows.start[w], 0));
  const auto end = static_cast<int>(clamp(args.windows.end[w], start));
  int masks = 0, first = end;
  if (b >= 0 && b < tokens.batch) {
#pragma unroll 4
    for (int column = start + static_cast<int>(threadIdx.x) % 32; column < end; column += 32) {
      if (__ldcg(&tokens.at(b, column)) != args.mask_id) continue;
      ++masks;
      first = column < first ? column : first;
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    masks += __shfl_xor_sync(kFullWarp, masks, offset);
    const int other = __shfl_xor_sync(kFullWarp, first, offset);
    first = other < first ? other : first;
  }
  if (threadIdx.x % 32 != 0) return;
  args.remaining[w] = masks;
  args.first[w] = first;
  args.changed[w] = __ldcg(counters + kChanges + w);
  counters[kChanges + w] = 0;
}

__global__ void __launch_bounds__(kCommitThreads)
    commit_kernel(CommitArgs args, int blocks, int32_t* counters) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kCommitThreads + threadIdx.x;
  const bool writes = args.count > 0;
  if (writes) {
    if (thread < args.count && args.commit[thread]) write_token(args, thread, counters);
    if (!last_to_arrive(counters + kArrivals, blocks)) return;
  }
  const int step = kCommitWarps * (writes ? 1 : blocks);
#pragma unroll 1
  for (int64_t w = (writes ? threadIdx.x : thread) / 32; w < args.windows.count; w += step)
    look(args, w, counters);
  if (writes ? threadIdx.x == 0 : thread == 0) {
    const int32_t worst = __ldcg(counters + kWorst);
    const int64_t row = INT32_MAX - worst;
    *args.error =
        worst == 0 ? kNoError : encode_error(args.positions ? args.positions[row] : row, kRowMask);
    counters[kWorst] = 0;
  }
}

}  // namespace

int64_t commit_counters(const CommitArgs& args) { return kChanges + args.windows.count; }

int commit(const CommitArgs& args, const Workspace& workspace, void* stream) {
  const int64_t most = INT32_MAX;
  if (args.count >= most || args.tokens.batch * args.tokens.length >= most ||
      args.windows.count >= most)
    return 1;  // an invalid value
  const int64_t units = args.count > 0 ? args.count : 32 * args.windows.count;
  const int64_t blocks = units > 0 ? (units + kCommitThreads - 1) / kCommitThreads : 1;
  DPARALLEL_LAUNCH(commit_kernel, blocks, kCommitThreads, stream, args, static_cast<int>(blocks),
                   workspace.counters);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace dparallel::cuda
