// accept: the choice of every row, and the walk along each lane's tree, in one launch.
//
// Work: blocks [0, lanes) each count the rows of their lane. Each of the other blocks reads one
// chunk of a row (row_scan.cuh), if a lane has the row, and otherwise leaves at once. The last
// block of a row to arrive merges the row's chunks. The last block of a lane, once all of the
// lane's rows are merged, walks from the root along the choices.
//
// Bytes: each row of a lane once. Measured on an H200 from a graph, with the three small launches
// that reported bad rows then (it is one now, keep_error): 9.1 us for 1 row, 10.9 us for 16, 14.5
// us for 64, whose bytes take 3.8 us.
//
// Which lane a row belongs to: the first lane that holds it. The block of a row tests 32 lanes at
// once, as in unmask. A lane that overlaps an earlier lane, which callers should not ask for, emits
// nothing, and the remaining lanes share no row.
//
// Which block is last: counters are zero between launches, as in unmask. The counter of a lane
// gains 1 for each merged row; the lane's own block subtracts the number of rows that belong to the
// lane; the block that brings the counter back to zero walks. Both sides assign a row to the same
// lane, whatever the lanes are.
//
// Code: 19 KB for bfloat16, of which the scan takes 8.5, a row's result 3.5, the walk 3.4 and the
// search for lanes 1.4.
//
// Latency: the scan is followed by a chain of dependent steps, therefore the walk follows links in
// shared memory: all rows find out at once whether their parent chose them.
#include "nucleus.cuh"
#include "select.cuh"

// after the headers that know the device
#include "dparallel/accept.h"

namespace dparallel::cuda {
namespace {

using LaneRows = AcceptArgs::Rows<int32_t>;

// What is known of row i of a lane, and of place i of its path, while the lane is settled; in
// shared memory up to more rows than drafters draft.
struct Link {
  int32_t follows, choice;  // of the row
  int32_t row;              // of the place
};
constexpr int kSharedRows = 256;
static_assert(kSharedRows * sizeof(Link) <= kScanBytes, "");

struct AcceptScratch {
  Scratch chunks;
  LaneRows* lanes;   // [lanes], those that walk
  Link* links;       // [count], of lanes that shared memory does not hold
  int32_t* choices;  // [count]

  static int64_t bytes(const AcceptArgs& args) {
    return Scratch::bytes(args.count, scan_chunks(args.logits), args.sampling) +
           args.lanes * sizeof(LaneRows) + args.count * (sizeof(int32_t) + sizeof(Link));
  }
  static AcceptScratch at(void* memory, const AcceptArgs& args) {
    const int64_t chunks = scan_chunks(args.logits);
    AcceptScratch s;
    s.chunks = Scratch::at(memory, args.count, chunks, args.sampling);
    s.lanes = reinterpret_cast<LaneRows*>(static_cast<char*>(memory) +
                                          Scratch::bytes(args.count, chunks, args.sampling));
    s.links = reinterpret_cast<Link*>(s.lanes + args.lanes);
    s.choices = reinterpret_cast<int32_t*>(s.links + args.count);
    return s;
  }
};

// The first lane that holds a row of the logits, -1 where none does. By whole warps.
__device__ inline int lane_of(const AcceptArgs& args, int row) {
  const auto lanes = static_cast<int>(args.lanes);
#pragma unroll 1
  for (int first = 0; first < lanes; first += 32) {
    const int b = first + static_cast<int>(threadIdx.x % 32);
    const bool holds = b < lanes && args.rows_of(b).hold(row);
    const unsigned holders = __ballot_sync(kFullWarp, holds);
    if (holders != 0) return first + __ffs(holders) - 1;
  }
  return -1;
}

// By the last block of a row: its chunks merged, by each warp for itself, so that none waits apart
// from the others. Of a row that no lane has nothing is read.
template <bool kSample>
__device__ __forceinline__ void finish(const AcceptArgs& args, const AcceptScratch& scratch,
                                       int row, int chunks, bool has_lane) {
  RowResult result;
  RowError error = kRowNan;
  const float inverse = args.sampling.inverse_temperature;
  if (has_lane) error = finish_row<kSample>(scratch.chunks, row, chunks, inverse, result);
  if (threadIdx.x != 0) return;
  if (error == kRowNan) result = blank_row();
  write_row(args.output, row, static_cast<int>(args.count), result);
  scratch.choices[row] = choice_of(error, result.sample);
}

// By the last block of a lane.
__device__ __forceinline__ void settle(const AcceptArgs& args, const AcceptScratch& scratch, int b,
                                       ScanMemory& memory) {
  DPARALLEL_SHARED(emitted, int32_t);
  const LaneRows rows = read_part(scratch.lanes + b);
  const int n = rows.count, thread = static_cast<int>(threadIdx.x);
  const auto eos_count = static_cast<int>(args.eos_count);
  Link* links =
      n <= kSharedRows ? reinterpret_cast<Link*>(memory.slots) : scratch.links + rows.first;
#pragma unroll 1
  for (int next = thread; next < n; next += kScanThreads) {
    const int i = anew(next);
    const int choice = __ldcg(scratch.choices + (rows.first + i));
    links[i].choice = choice;
    links[i].follows = without_children(choice, args.eos_ids + b * eos_count, eos_count);
  }
  __syncthreads();
#pragma unroll 1
  for (int next = 1 + thread; next < n; next += kScanThreads) {
    const int i = anew(next);
    const int64_t parent = args.parent[rows.first + i];
    if (is_chosen(i, parent, args.draft[rows.first + i],
                  [&](int row) { return links[row].choice; }))
      atomicMin(&links[static_cast<int>(parent)].follows, i);
  }
  __syncthreads();
  if (thread == 0) {
    Path found{0, 0, kPathLeaf};
    int room = n;
    if (args.room != nullptr && args.room[b] < n) room = static_cast<int>(args.room[b]);
    if (n > 0)
      found = walk_path(
          room, [&](int row) { return links[row].follows; },
          [&](int place, int row) { links[place].row = row; });
    emitted = found.count;
    args.emitted[b] = found.count;
    args.ended[b] = found.ended();
    args.output.error[b] = found.follows == kPathFails
                               ? encode_error(b * kLaneRows + found.last,
                                              static_cast<RowError>(-links[found.last].choice))
                               : kNoError;
  }
  __syncthreads();
  const auto places = static_cast<int>(args.max_q_len);
#pragma unroll 1
  for (int next = thread; next < places; next += kScanThreads) {
    const int i = anew(next);
    const int row = i < emitted ? links[i].row : -1;
    args.path[b * places + i] = row;
    args.tokens[b * places + i] = row < 0 ? -1 : links[row].choice;
  }
}

// One block per row of the logits finds the ids that may be sampled, if a lane has the row.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    accept_nucleus_kernel(AcceptArgs args, Scratch scratch) {
  const int row = static_cast<int>(blockIdx.x);
  if (lane_of(args, row) < 0) return;
  const Nucleus found = find_nucleus<T>(row_pointer(args.logits, row), args.logits.vocab,
                                        args.exclusions, args.sampling);
  if (threadIdx.x == 0) scratch.nuclei[row] = found;
}

template <class T, bool kSample>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    accept_kernel(AcceptArgs args, ScanShape shape, AcceptScratch scratch, int32_t* counters) {
  DPARALLEL_SHARED(memory, ScanMemory);
  const auto lanes = static_cast<int>(args.lanes);
  const bool announces = blockIdx.x < static_cast<unsigned>(lanes);
  const unsigned unit = blockIdx.x - static_cast<unsigned>(announces ? 0 : lanes);
  const int chunks = static_cast<int>(shape.chunks.divisor);
  const int row = static_cast<int>(shape.chunks.quotient(unit));
  const int chunk = static_cast<int>(unit) - row * chunks;
  // The block of a lane looks up whose the lane's rows are, and the lane walks if all are its own.
  // Each warp looks up every fourth, which takes a microsecond or so for 64 rows (a guess), while
  // other blocks wait for their logits.
  const LaneRows rows = announces ? args.rows_of(static_cast<int>(unit)) : LaneRows{row, 1};
  int b = -1, own = 0;
#pragma unroll 1
  for (int first = 0; first < rows.count; first += kScanWarps) {
    const int i = announces ? first + static_cast<int>(threadIdx.x / 32) : 0;
    b = lane_of(args, rows.first + i);
    const bool counts = threadIdx.x % 32 == 0 && i < rows.count && b == static_cast<int>(unit);
    if (announces) own += __syncthreads_count(counts);
  }
  int arrival = chunk == 0 ? 1 - chunks : 1;
  if (announces) {
    b = static_cast<int>(unit);
    if (threadIdx.x == 0) scratch.lanes[b] = {rows.first, own == rows.count ? own : 0};
    arrival = -own;
  } else if (b >= 0) {
    Sampler sampler{};
    if constexpr (kSample) {
      const int64_t* k = args.sampling.keys + 4 * static_cast<int64_t>(row);
      sampler.inverse_temperature = args.sampling.inverse_temperature;
      sampler.key = {static_cast<uint64_t>(k[0]), static_cast<uint32_t>(k[1]),
                     static_cast<uint32_t>(k[2]), static_cast<uint32_t>(k[3])};
      if (scratch.chunks.nuclei != nullptr) sampler.nucleus = scratch.chunks.nuclei[row];
    }
    scan_chunk<T, kSample>(memory, scan_row<T>(args.logits, shape, row),
                           static_cast<int>(args.logits.vocab), chunk, args.exclusions, sampler,
                           scratch.chunks, unit);
  } else if (chunk != 0) {
    return;
  }
#pragma unroll 1
  for (int of_row = !announces;; of_row = anew(0)) {
    if (b >= 0 && !brings_to_zero(counters + (of_row ? lanes + row : b), arrival)) return;
    if (!of_row) break;
    finish<kSample>(args, scratch, row, chunks, b >= 0);
    if (b < 0) return;
    arrival = 1;
  }
  settle(args, scratch, b, memory);
}

}  // namespace

int64_t accept_scratch(const AcceptArgs& args) { return AcceptScratch::bytes(args); }

int64_t accept_counters(const AcceptArgs& args) { return args.lanes + args.count; }

int accept(const AcceptArgs& args, const Workspace& workspace, void* stream) {
  const ScanShape shape = ScanShape::of(args.logits, 1);
  const AcceptScratch scratch = AcceptScratch::at(workspace.scratch, args);
  const int64_t blocks = args.count * shape.chunks.divisor + args.lanes;
  if (blocks > INT32_MAX || args.lanes * args.max_q_len > INT32_MAX ||
      args.lanes * args.eos_count > INT32_MAX)
    return 1;  // an invalid value
  if (blocks == 0) return 0;
  return dispatch(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.sampling.filters() && args.count > 0)
      DPARALLEL_LAUNCH((accept_nucleus_kernel<T>), args.count, kThreads, stream, args,
                       scratch.chunks);
    if (args.sampling.samples())
      DPARALLEL_LAUNCH((accept_kernel<T, true>), blocks, kScanThreads, stream, args, shape, scratch,
                       workspace.counters);
    else
      DPARALLEL_LAUNCH((accept_kernel<T, false>), blocks, kScanThreads, stream, args, shape,
                       scratch, workspace.counters);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
