// unmask: statistics, selection and commit in one launch.
//
// Work: blocks [0, windows) each list the rows that their window needs: the rows of its masked
// positions. Each of the other blocks reads one chunk of a row (row_scan.cuh), if the row is
// needed, and otherwise leaves at once. The last block of a row to arrive merges the row's chunks.
// The last block of a window, once all of the window's rows are merged, selects and commits.
//
// Bytes: each needed row once; 32 rows of 126464 bfloat16 numbers are 8 MB, 1.9 us at the 4.3 TB/s
// of an H200. Measured there from a graph: 12.2 us for 32 rows and 58 us for 512, both with the
// three small launches that reported bad rows then (it is one now, keep_error).
//
// Which window a position belongs to: the first window that holds it. The block of a row tests 32
// windows at once, one in each lane of a warp, while it waits for the row's position. The block of
// a window looks once whether an earlier window overlaps its own, which callers should not ask for.
//
// Which block is last: counters are zero between launches, and the block that brings a counter back
// to zero is last. To the counter of a row each block of a chunk adds 1, and that of the first
// chunk takes their number away. The counter of a window gains 1 for each merged row; the block
// that lists the window's rows subtracts their number. Only the listing block has to count, and it
// counts while other blocks wait for their logits. The counter returns to zero whatever the
// arguments are, because the same test chooses the rows that are listed and the rows that are read,
// in any order and with repetitions. Three counters are of all windows (Counters).
//
// Code: 24 KB for bfloat16, of which the scan takes 8.7, the settling of a window 4.3, the
// list 4.2, a row's result 3.2 and the search for its window 1.5. One loop serves the arrivals at a
// row and at a window, one the keys that pass before and after they are ranked, and one the windows
// before a window or before a row's.
//
// Latency: the scan is followed by a chain of dependent steps: two arrivals, the parts (one lane
// for each chunk, merged by shuffles), the list, keys and ranks in shared memory. The chain, not
// the bytes, decides the time of few rows.
#include "nucleus.cuh"
#include "select.cuh"

namespace dparallel::cuda {
namespace {

// A row that its window needs, and its column there.
struct alignas(8) Needed {
  int32_t row, column;
};

// The rows that a window needs: needed[before], ..., ascending.
struct alignas(8) Listed {
  int32_t before, needed;
  int32_t masked;   // positions of the window, listed or not
  int32_t missing;  // the first column of them that is not listed, or INT32_MAX
};

// The message of a merged row to its window.
struct alignas(8) Verdict {
  float key;       // NaN: an error
  int32_t choice;  // the token to commit, or the RowError
};

// A needed row of a window while the window is settled, in shared memory if all of them fit.
struct Candidate : Ranked {
  int32_t column, choice;
};

// Counters of all windows; behind them, one for each window, then one for each row.
struct Counters {
  int32_t arrived;
  int32_t unfinished;  // windows with masks left
  int32_t next_list;   // where the next window's list begins

  static constexpr int kCount = 3;
};

struct UnmaskScratch {
  Scratch chunks;
  Listed* listed;         // [windows]
  Verdict* verdicts;      // [count]
  Needed* needed;         // [count]
  Candidate* candidates;  // [count], of windows that shared memory does not hold

  static int64_t bytes(const UnmaskArgs& args) {
    return Scratch::bytes(args.count, scan_chunks(args.logits), args.sampling) +
           args.windows.count * sizeof(Listed) +
           args.count * (sizeof(Verdict) + sizeof(Needed) + sizeof(Candidate));
  }
  static UnmaskScratch at(void* memory, const UnmaskArgs& args) {
    const int64_t chunks = scan_chunks(args.logits);
    UnmaskScratch s;
    s.chunks = Scratch::at(memory, args.count, chunks, args.sampling);
    s.listed = reinterpret_cast<Listed*>(static_cast<char*>(memory) +
                                         Scratch::bytes(args.count, chunks, args.sampling));
    s.verdicts = reinterpret_cast<Verdict*>(s.listed + args.windows.count);
    s.needed = reinterpret_cast<Needed*>(s.verdicts + args.count);
    s.candidates = reinterpret_cast<Candidate*>(s.needed + args.count);
    return s;
  }
};

// A window as it is given; it may be out of bounds.
struct Window {
  int64_t b, start, end;

  __device__ static Window at(const UnmaskArgs& args, int w) {
    return {args.windows.sequence(w), args.windows.start[w], args.windows.end[w]};
  }
  // Whether it may hold one of columns [from, to) of a sequence; it holds the column if to = from +
  // 1.
  __device__ bool meets(int sequence, int from, int to) const {
    return (b == sequence) & (start < to) & (from < end);
  }
};

// The tokens, which span fewer than 2^31 elements, and the numbers of the grid in 32 bits.
struct UnmaskShape : ScanShape {
  int64_t* tokens;
  int32_t stride_b, stride_l;

  static UnmaskShape of(const UnmaskArgs& args) {
    const TokenGrid& grid = args.tokens;
    return {ScanShape::of(args.logits, grid.length), grid.data,
            static_cast<int32_t>(grid.batch > 1 ? grid.stride_b : 0),
            static_cast<int32_t>(grid.length > 1 ? grid.stride_l : 0)};
  }
  __device__ int64_t& token(int b, int column) const {
    return tokens[b * stride_b + column * stride_l];
  }
};

// Where a row of the logits belongs.
struct Place {
  int window, column;
  bool needed;
};

// By whole warps.
__device__ inline Place place_of(const UnmaskArgs& args, const UnmaskShape& shape, int row) {
  const int64_t position = args.positions ? args.positions[row] : row;
  const auto positions = static_cast<uint64_t>(args.tokens.batch * args.tokens.length);
  const bool valid = static_cast<uint64_t>(position) < positions;
  const auto at = static_cast<uint32_t>(valid ? position : 0);
  const auto b = static_cast<int>(shape.length.quotient(at));
  const int column = static_cast<int>(at) - b * static_cast<int>(shape.length.divisor);
  const int64_t token = valid ? shape.token(b, column) : 0;
  const bool listed = args.windows.lane != nullptr;  // or only window b may hold the position
  const int count = listed ? static_cast<int>(args.windows.count) : b + 1;
#pragma unroll 1
  for (int first = listed ? 0 : b; first < count; first += 32) {
    const int w = first + static_cast<int>(threadIdx.x % 32);
    const bool holds = valid && w < count && Window::at(args, w).meets(b, column, column + 1);
    const unsigned holders = __ballot_sync(kFullWarp, holds);
    if (holders != 0) return {first + __ffs(holders) - 1, column, token == args.exclusions.mask_id};
  }
  return {0, 0, false};
}

// By the block of a window: the rows that it needs, those of the masked positions that are in no
// window before it. Up to five passes by the same code: earlier windows that overlap are counted;
// rows are counted, where windows share the buffer, then listed; columns are counted, where rows
// might not stand for all of them, and the first that none stands for is looked for, if there is
// one: listed rows and columns both ascend. The token of another window's column is not looked at,
// since that window may be writing it.
__device__ int list_rows(const UnmaskArgs& args, const UnmaskShape& shape,
                         const UnmaskScratch& scratch, int w, int32_t& next_list) {
  enum Pass { kOverlaps, kCount, kList, kCountColumns, kFindMissing };
  DPARALLEL_SHARED(counts, int32_t[kScanWarps]);
  DPARALLEL_SHARED(place, int32_t);
  DPARALLEL_SHARED(missing, int32_t);
  if (threadIdx.x == 0) missing = INT32_MAX;
  const Window window = Window::at(args, w);
  const bool valid = static_cast<uint64_t>(window.b) < static_cast<uint64_t>(args.tokens.batch);
  const int b = valid ? static_cast<int>(window.b) : 0;
  const auto length = static_cast<int>(args.tokens.length);
  const auto within = [&](int64_t column) {
    return column < 0 ? 0 : column < length ? static_cast<int>(column) : length;
  };
  const int start = within(window.start), end = valid ? within(window.end) : 0;
  const int width = end > start ? end - start : 0, begin = b * length + start;
  const bool alone = args.windows.count == 1, may_overlap = args.windows.lane != nullptr;
  int before = 0, needed = 0, masked = 0, overlapping = 0;
#pragma unroll 1
  for (int pass = alone ? kList : may_overlap ? kOverlaps : kCount; pass <= kFindMissing; ++pass) {
    if (pass == kCountColumns && args.positions == nullptr) break;
    if (pass == kFindMissing && masked <= needed) break;
    const bool by_row = pass < kCountColumns && args.positions != nullptr;
    const int count = pass == kOverlaps ? w : by_row ? static_cast<int>(args.count) : width;
    int found = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += kScanThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      // Columns [from, to), and windows below `above` that may hold them, down to `last`.
      int from = start, to = end, above = i + 1, last = i;
      bool mine = i < count;
      if (mine && pass != kOverlaps) {
        const int64_t beyond = by_row ? args.positions[i] - begin : i;
        mine = static_cast<uint64_t>(beyond) < static_cast<uint64_t>(width);
        from = start + (mine ? static_cast<int>(beyond) : 0);
        to = from + 1;
        above = overlapping > 0 ? w : 0;
        last = 0;
      }
      bool met = false;
#pragma unroll 1
      while (mine && !met && above > last) met = Window::at(args, --above).meets(b, from, to);
      if (pass == kOverlaps) mine = met;
      else mine = mine && !met && shape.token(b, from) == args.exclusions.mask_id;
      const unsigned lanes = __ballot_sync(kFullWarp, mine), lane = threadIdx.x % 32;
      if (lane == 0) counts[threadIdx.x / 32] = __popc(lanes);
      __syncthreads();
      int at = before + found + __popc(lanes & ((1u << lane) - 1));
#pragma unroll
      for (unsigned warp = 0; warp < kScanWarps; ++warp) {
        if (warp < threadIdx.x / 32) at += counts[warp];
        found += counts[warp];
      }
      if (mine && pass == kList) scratch.needed[at] = {by_row ? i : begin + i, from};
      if (mine && pass == kFindMissing &&
          (at >= before + needed || scratch.needed[at].column != from))
        atomicMin(&missing, from);
      __syncthreads();
    }
    if (pass == kOverlaps) overlapping = found;
    if (pass == kCount) {
      if (threadIdx.x == 0) place = atomicAdd(&next_list, found);
      __syncthreads();
      before = place;
    }
    if (pass == kList) needed = found;
    if (pass < kFindMissing) masked = found;
  }
  if (threadIdx.x == 0) scratch.listed[w] = {before, needed, masked, missing};
  return needed;
}

// By the last block of a row: its chunks merged, by each warp for itself, so that none waits apart
// from the others. Of a row that no window needs nothing is read.
template <bool kSample>
__device__ __forceinline__ void finish(const UnmaskArgs& args, const UnmaskScratch& scratch,
                                       const Policy& policy, int row, int chunks, bool needed) {
  RowResult result;
  RowError error = kRowMissing;
  const float inverse = args.sampling.inverse_temperature;
  if (needed) error = finish_row<kSample>(scratch.chunks, row, chunks, inverse, result);
  if (threadIdx.x != 0) return;
  if (error != kRowOk) result = blank_row();
  write_row(args.output, row, static_cast<int>(args.count), result);
  const float* field = result.field;
  scratch.verdicts[row] = {policy.key(field[kConfidence], field[kMargin], field[kEntropy]),
                           static_cast<int32_t>(error == kRowOk ? result.sample : error)};
}

// By the last block of a window: policy applied, tokens committed.
__device__ __forceinline__ void settle(const UnmaskArgs& args, const UnmaskShape& shape,
                                       const UnmaskScratch& scratch, const Policy& policy, int w,
                                       Counters& counters, ScanMemory& memory) {
  DPARALLEL_SHARED(worst, int32_t);  // the lowest error, as if the sequence were the first
  const Listed listed = read_part(scratch.listed + w);
  const int n = listed.needed;
  constexpr int kShared = kScanBytes / sizeof(Candidate);
  Candidate* candidates = n <= kShared ? reinterpret_cast<Candidate*>(memory.slots)
                                       : scratch.candidates + listed.before;
  const auto b = static_cast<int>(args.windows.sequence(w));  // within bounds where n > 0
  const auto error_at = [](int column, RowError code) {
    return static_cast<int32_t>(encode_error(column, code));
  };
  if (threadIdx.x == 0)
    worst = listed.missing == INT32_MAX ? INT32_MAX : error_at(listed.missing, kRowMissing);
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
    const Needed needed = read_part(scratch.needed + (listed.before + i));
    const Verdict verdict = read_part(scratch.verdicts + needed.row);
    Candidate& candidate = candidates[i];
    candidate.key = verdict.key;
    candidate.column = needed.column;
    candidate.choice = verdict.choice;
    if (verdict.key != verdict.key)
      atomicMin(&worst, error_at(needed.column, static_cast<RowError>(verdict.choice)));
  }
  __syncthreads();
  int committed = 0;
  if (worst == INT32_MAX) {
    committed = select_block(policy, candidates, n, n);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
      const Candidate& candidate = candidates[i];
      if (candidate.rank < committed) shape.token(b, candidate.column) = candidate.choice;
    }
  }
  if (!is_thread_0()) return;
  const int remaining = listed.masked - committed;
  const int64_t begin = b * static_cast<int>(args.tokens.length);
  args.output.error[w] = worst == INT32_MAX ? kNoError : 4 * begin + worst;
  args.committed[w] = committed;
  args.remaining[w] = remaining;
  const auto windows = static_cast<int>(args.windows.count);
  bool done = remaining == 0;
  if (windows > 1) {
    if (!done) atomicAdd(&counters.unfinished, 1);
    const int arrival = w == 0 ? 1 - windows : 1;
    if (add_acquire_release(&counters.arrived, arrival) + arrival != 0) return;
    done = __ldcg(&counters.unfinished) == 0;
    counters.unfinished = counters.next_list = 0;
  }
  *args.done = done;
}

// One block per row of the logits finds the ids that may be sampled, if the row is needed.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    unmask_nucleus_kernel(UnmaskArgs args, UnmaskShape shape, Scratch scratch) {
  const int row = static_cast<int>(blockIdx.x);
  if (!place_of(args, shape, row).needed) return;
  const Nucleus found = find_nucleus<T>(row_pointer(args.logits, row), args.logits.vocab,
                                        args.exclusions, args.sampling);
  if (threadIdx.x == 0) scratch.nuclei[row] = found;
}

template <class T, bool kSample>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    unmask_kernel(UnmaskArgs args, UnmaskShape shape, UnmaskScratch scratch, int32_t* counters) {
  DPARALLEL_SHARED(memory, ScanMemory);
  const int chunks = static_cast<int>(shape.chunks.divisor);
  const auto windows = static_cast<int>(args.windows.count);
  Counters& common = *reinterpret_cast<Counters*>(counters);
  counters += Counters::kCount;
  int w = static_cast<int>(blockIdx.x), arrival, row = 0;
  const bool lists = w < windows;
  bool needed = true;
  if (lists) {
    arrival = -list_rows(args, shape, scratch, w, common.next_list);
  } else {
    const unsigned unit = blockIdx.x - static_cast<unsigned>(windows);
    row = static_cast<int>(shape.chunks.quotient(unit));
    const int chunk = static_cast<int>(unit) - row * chunks;
    const Place place = place_of(args, shape, row);
    w = place.window;
    needed = place.needed;
    arrival = chunk == 0 ? 1 - chunks : 1;
    if (needed) {
      Sampler sampler{};
      if constexpr (kSample) {
        const int64_t* k = args.sampling.keys + 3 * w;
        const int64_t where = place.column + args.sampling.position_offset;
        sampler.inverse_temperature = args.sampling.inverse_temperature;
        sampler.key = {static_cast<uint64_t>(k[0]), static_cast<uint32_t>(k[1]),
                       static_cast<uint32_t>(where), static_cast<uint32_t>(k[2])};
        if (scratch.chunks.nuclei != nullptr) sampler.nucleus = scratch.chunks.nuclei[row];
      }
      scan_chunk<T, kSample>(memory, scan_row<T>(args.logits, shape, row),
                             static_cast<int>(args.logits.vocab), chunk, args.exclusions, sampler,
                             scratch.chunks, unit);
    } else if (chunk != 0) {
      return;
    }
  }
#pragma unroll 1
  for (int of_row = !lists;; of_row = anew(0)) {
    if (needed && !brings_to_zero(counters + (of_row ? windows + row : w), arrival)) return;
    Policy policy{};  // there may be no window
    if (needed) policy = Policy::load(args.policy + w * kPolicyFields);
    if (!of_row) return settle(args, shape, scratch, policy, w, common, memory);
    finish<kSample>(args, scratch, policy, row, chunks, needed);
    if (!needed) return;
    arrival = 1;
  }
}

__global__ void no_windows_kernel(bool* done) { *done = true; }

}  // namespace

int64_t unmask_scratch(const UnmaskArgs& args) { return UnmaskScratch::bytes(args); }

int64_t unmask_counters(const UnmaskArgs& args) {
  return Counters::kCount + args.windows.count + args.count;
}

int unmask(const UnmaskArgs& args, const Workspace& workspace, void* stream) {
  if (args.windows.count == 0) DPARALLEL_LAUNCH(no_windows_kernel, 1, 1, stream, args.done);
  const UnmaskShape shape = UnmaskShape::of(args);
  const UnmaskScratch scratch = UnmaskScratch::at(workspace.scratch, args);
  const int64_t blocks = args.count * shape.chunks.divisor + args.windows.count;
  const TokenGrid& tokens = args.tokens;
  const int64_t last = (tokens.batch - 1) * tokens.stride_b + (tokens.length - 1) * tokens.stride_l;
  if (blocks > INT32_MAX || tokens.batch * tokens.length > INT32_MAX || last > INT32_MAX)
    return 1;  // an invalid value
  if (blocks == 0) return static_cast<int>(cudaGetLastError());
  return dispatch(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.sampling.filters() && args.count > 0)
      DPARALLEL_LAUNCH((unmask_nucleus_kernel<T>), args.count, kThreads, stream, args, shape,
                       scratch.chunks);
    if (args.sampling.samples())
      DPARALLEL_LAUNCH((unmask_kernel<T, true>), blocks, kScanThreads, stream, args, shape, scratch,
                       workspace.counters);
    else
      DPARALLEL_LAUNCH((unmask_kernel<T, false>), blocks, kScanThreads, stream, args, shape,
                       scratch, workspace.counters);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
