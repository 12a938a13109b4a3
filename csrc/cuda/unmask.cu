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
// Which block is last: counters are zero between launches. A needed row has as many blocks as
// chunks. The counter of a window gains 1 for each merged row; the block that lists the window's
// rows subtracts their number; the block that brings the counter back to zero is last. Only the
// listing block has to count, and it counts while other blocks wait for their logits. The counter
// returns to zero whatever the arguments are, because the same test chooses the rows that are
// listed and the rows that are read, in any order and with repetitions. One more counter counts the
// windows that have arrived, and another says where the next list begins, since all lists share a
// buffer.
//
// Latency: the scan is followed by a chain of dependent steps: two arrivals, the parts (one lane
// for each chunk, merged by shuffles), the list, keys and ranks in shared memory. The chain, not
// the bytes, decides the time of few rows.
#include "nucleus.cuh"
#include "select.cuh"

namespace dparallel::cuda {
namespace {

// The rows that a window needs: rows[before], ..., ascending.
struct Listed {
  int32_t before, needed;
  int32_t masked;   // positions of the window, listed or not
  int32_t missing;  // the first column of them that is not listed, or INT32_MAX
};

// The message of a merged row to its window.
struct Verdict {
  float key;       // NaN: an error
  int32_t choice;  // the token to commit, or the RowError
};

// The needed rows of a window while they are settled, in shared memory if they fit.
struct Candidates {
  Ranking ranking;
  int32_t* columns;  // [n]
  int32_t* choices;  // [n]

  static constexpr int kBytes = Ranking::kBytes + 8;
  static __device__ Candidates at(char* memory, int n) {
    auto* columns = reinterpret_cast<int32_t*>(memory + n * Ranking::kBytes);
    return {Ranking::at(memory, n), columns, columns + n};
  }
};

struct UnmaskScratch {
  Scratch chunks;
  Listed* listed;     // [windows]
  Verdict* verdicts;  // [count]
  int32_t* rows;      // [count]
  int32_t* columns;   // [count]
  char* candidates;   // [count * Candidates::kBytes], of windows that shared memory does not hold

  static int64_t bytes(const UnmaskArgs& args) {
    return Scratch::bytes(args.count, scan_chunks(args.logits), args.sampling) +
           args.windows.count * sizeof(Listed) +
           args.count * (sizeof(Verdict) + 8 + Candidates::kBytes);
  }
  static UnmaskScratch at(void* memory, const UnmaskArgs& args) {
    const int64_t chunks = scan_chunks(args.logits);
    UnmaskScratch s;
    s.chunks = Scratch::at(memory, args.count, chunks, args.sampling);
    s.listed = reinterpret_cast<Listed*>(static_cast<char*>(memory) +
                                         Scratch::bytes(args.count, chunks, args.sampling));
    s.verdicts = reinterpret_cast<Verdict*>(s.listed + args.windows.count);
    s.rows = reinterpret_cast<int32_t*>(s.verdicts + args.count);
    s.columns = s.rows + args.count;
    s.candidates = reinterpret_cast<char*>(s.columns + args.count);
    return s;
  }
};

// A window within its sequence; of none, where its lane is out of bounds.
struct Window {
  int b, start, end;
  bool contested;  // an earlier window may hold some of its columns

  __device__ bool holds(int64_t column) const { return (column >= start) & (column < end); }
};

__device__ inline Window window_at(const UnmaskArgs& args, int w) {
  const int64_t b = args.windows.sequence(w), length = args.tokens.length;
  const int64_t start = args.windows.start[w], end = args.windows.end[w];
  if (b < 0 || b >= args.tokens.batch) return {0, 0, 0, false};
  return {static_cast<int>(b), start > 0 ? static_cast<int>(start < length ? start : length) : 0,
          end > 0 ? static_cast<int>(end < length ? end : length) : 0, false};
}

// By a block: the window, and whether one before it overlaps.
__device__ inline Window own_window(const UnmaskArgs& args, int w) {
  Window window = window_at(args, w);
  if (args.windows.lane == nullptr) return window;
  int overlapping = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < w; i += kScanThreads) {
    const Window other = window_at(args, i);
    overlapping += (other.b == window.b) & (other.start < window.end) & (window.start < other.end);
  }
  window.contested = sum_block(overlapping) > 0;
  return window;
}

// Masked, in window w and in none before it; any column. Of another's column the token is not
// looked at, since its window may be writing it.
__device__ inline bool needs(const UnmaskArgs& args, int w, const Window& window, int64_t column) {
  if (!window.holds(column)) return false;
  if (window.contested) {
#pragma unroll 1
    for (int i = 0; i < w; ++i)
      if (const Window other = window_at(args, i); other.b == window.b && other.holds(column))
        return false;
  }
  return args.tokens.at(window.b, column) == args.exclusions.mask_id;
}

// Where a row of the logits belongs.
struct Place {
  int window, column;
  bool needed;
};

// By whole warps.
__device__ inline Place place_of(const UnmaskArgs& args, const ScanShape& shape, int row) {
  const int64_t position = args.positions ? args.positions[row] : row;
  const bool valid = position >= 0 && position < args.tokens.batch * args.tokens.length;
  const auto at = static_cast<uint32_t>(valid ? position : 0);
  const auto b = static_cast<int>(shape.length.quotient(at));
  const int column = static_cast<int>(at) - b * static_cast<int>(shape.length.divisor);
  if (args.windows.lane == nullptr) {
    if (!valid) return {0, 0, false};
    const int64_t start = args.windows.start[b], end = args.windows.end[b];  // three loads at once
    const int64_t token = args.tokens.at(b, column);
    const bool held = (column >= start) & (column < end);
    return {b, column, held && token == args.exclusions.mask_id};
  }
  const int64_t token = valid ? args.tokens.at(b, column) : 0;
  const auto count = static_cast<int>(args.windows.count);
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const int w = first + static_cast<int>(threadIdx.x) % 32;
    const bool there = w < count;
    const int64_t lane = there ? args.windows.lane[w] : -1;
    const int64_t start = there ? args.windows.start[w] : 0, end = there ? args.windows.end[w] : 0;
    const unsigned holders =
        __ballot_sync(kFullWarp, valid & (lane == b) & (start <= column) & (column < end));
    if (holders != 0) return {first + __ffs(holders) - 1, column, token == args.exclusions.mask_id};
  }
  return {0, 0, false};
}

// By the block of a window. Up to four passes over rows or columns, by the same code: rows are
// counted, where windows share the buffer, then listed; columns are counted, where rows might not
// stand for all of them, and the first that none stands for is looked for, if there is one.
__device__ int list_rows(const UnmaskArgs& args, const UnmaskScratch& scratch, int w,
                         int32_t* next_list) {
  enum Pass { kCount, kList, kCountColumns, kFindMissing };
  DPARALLEL_SHARED(counts, int32_t[kScanWarps]);
  DPARALLEL_SHARED(place, int32_t);
  DPARALLEL_SHARED(missing, int32_t);
  if (threadIdx.x == 0) missing = INT32_MAX;
  const Window window = own_window(args, w);
  const int64_t begin = static_cast<int64_t>(window.b) * args.tokens.length;
  const int width = window.end > window.start ? window.end - window.start : 0;
  int before = 0, needed = 0, masked = 0;
#pragma unroll 1
  for (int pass = args.windows.count > 1 ? kCount : kList; pass <= kFindMissing; ++pass) {
    if (pass == kCountColumns && args.positions == nullptr) break;
    if (pass == kFindMissing && masked == needed) break;
    const bool by_row = pass < kCountColumns && args.positions != nullptr;
    const int count = by_row ? static_cast<int>(args.count) : width;
    int found = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += kScanThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      int64_t column = -1;
      if (i < count) column = by_row ? args.positions[i] - begin : int64_t{window.start} + i;
      const bool mine = needs(args, w, window, column);
      const unsigned lanes = __ballot_sync(kFullWarp, mine), lane = threadIdx.x % 32;
      if (lane == 0) counts[threadIdx.x / 32] = __popc(lanes);
      __syncthreads();
      int at = before + found + __popc(lanes & ((1u << lane) - 1));
#pragma unroll
      for (unsigned warp = 0; warp < kScanWarps; ++warp) {
        if (warp < threadIdx.x / 32) at += counts[warp];
        found += counts[warp];
      }
      if (mine && pass == kList) {
        scratch.rows[at] = static_cast<int32_t>(by_row ? i : begin + column);
        scratch.columns[at] = static_cast<int32_t>(column);
      }
      if (mine && pass == kFindMissing) {
        int listed = before;
#pragma unroll 1
        while (listed < before + needed && scratch.columns[listed] != column) ++listed;
        if (listed == before + needed) atomicMin(&missing, static_cast<int32_t>(column));
      }
      __syncthreads();
    }
    if (pass == kCount) {
      if (threadIdx.x == 0) place = atomicAdd(next_list, found);
      __syncthreads();
      before = place;
    }
    if (pass == kList) needed = found;
    masked = pass < kFindMissing ? found : masked;
  }
  if (threadIdx.x == 0) scratch.listed[w] = {before, needed, masked, missing};
  return needed;
}

// By the last block of a row: its chunks merged, by each warp for itself, so that none waits apart
// from the others.
template <bool kSample>
__device__ __forceinline__ void finish(const UnmaskArgs& args, const UnmaskScratch& scratch,
                                       const Policy& policy, int row, int chunks) {
  RowResult result;
  const float inverse = kSample ? 1.0f / args.sampling.temperature : 0.0f;
  const RowError error = finish_row<kSample>(scratch.chunks, row, chunks, inverse, result);
  if (threadIdx.x != 0) return;
  if (error != kRowOk) {
    write_blank(args.output, row, args.count);
    scratch.verdicts[row] = {from_bits(0x7fc00000u), static_cast<int32_t>(error)};
    return;
  }
  write_row(args.output, row, args.count, result);
  const float* field = result.field;
  scratch.verdicts[row] = {policy.key(field[kConfidence], field[kMargin], field[kEntropy]),
                           static_cast<int32_t>(result.sample)};
}

// By the last block of a window: policy applied, tokens committed.
__device__ __forceinline__ void settle(const UnmaskArgs& args, const UnmaskScratch& scratch,
                                       const Policy& policy, int w, int32_t* counters,
                                       ScanMemory& memory) {
  DPARALLEL_SHARED(worst, int32_t);  // the lowest error, as if the sequence were the first
  const Listed listed = read_part(scratch.listed + w);
  const int n = listed.needed;
  const Candidates candidates = Candidates::at(
      n <= kScanBytes / Candidates::kBytes
          ? reinterpret_cast<char*>(memory.slots)
          : scratch.candidates + static_cast<int64_t>(listed.before) * Candidates::kBytes,
      n);
  const Ranking& ranking = candidates.ranking;
  const auto b = static_cast<int>(args.windows.sequence(w));  // within bounds where n > 0
  if (threadIdx.x == 0) worst = INT32_MAX;
  __syncthreads();
  const auto report = [&](int column, RowError code) {
    atomicMin(&worst, static_cast<int32_t>(encode_error(column, code)));
  };
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
    const int row = __ldcg(scratch.rows + listed.before + i);
    const int column = __ldcg(scratch.columns + listed.before + i);
    const Verdict verdict = read_part(scratch.verdicts + row);
    ranking.keys[i] = verdict.key;
    candidates.columns[i] = column;
    candidates.choices[i] = verdict.choice;
    if (verdict.key != verdict.key) report(column, static_cast<RowError>(verdict.choice));
  }
  if (threadIdx.x == 0 && listed.missing != INT32_MAX) report(listed.missing, kRowMissing);
  __syncthreads();
  int committed = 0;
  if (worst == INT32_MAX) {
    committed = select_block(policy, ranking, n, n);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
      if (ranking.ranks[i] < committed)
        args.tokens.at(b, candidates.columns[i]) = candidates.choices[i];
    }
  }
  const int remaining = listed.masked - committed;
  if (threadIdx.x == 0) {
    args.output.error[w] = worst == INT32_MAX ? kNoError : 4 * b * args.tokens.length + worst;
    args.committed[w] = committed;
    args.remaining[w] = remaining;
  }
  const auto windows = static_cast<int>(args.windows.count);
  bool done = remaining == 0;
  if (windows > 1) {
    if (!last_to_arrive(counters + windows, windows)) return;
    int left = 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < windows; i += kScanThreads)
      left += __ldcg(args.remaining + i) != 0;
    done = sum_block(left) == 0;
    if (threadIdx.x == 0) counters[windows + 1] = 0;  // where lists begin
  }
  if (threadIdx.x == 0) *args.done = done;
}

// One block per row of the logits finds the ids that may be sampled, if the row is needed.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    unmask_nucleus_kernel(UnmaskArgs args, ScanShape shape, Scratch scratch) {
  const int row = static_cast<int>(blockIdx.x);
  if (!place_of(args, shape, row).needed) return;
  const Nucleus found = find_nucleus<T>(row_pointer(args.logits, row), args.logits.vocab,
                                        args.exclusions, args.sampling);
  if (threadIdx.x == 0) scratch.nuclei[row] = found;
}

template <class T, bool kSample>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    unmask_kernel(UnmaskArgs args, ScanShape shape, UnmaskScratch scratch, int32_t* counters) {
  DPARALLEL_SHARED(memory, ScanMemory);
  const int chunks = static_cast<int>(shape.chunks.divisor);
  const auto windows = static_cast<int>(args.windows.count);
  int w = static_cast<int>(blockIdx.x), arrival = 1, row = 0;
  if (w < windows) {
    arrival = -list_rows(args, scratch, w, counters + windows + 1);
  } else {
    const unsigned unit = blockIdx.x - static_cast<unsigned>(windows);
    row = static_cast<int>(shape.chunks.quotient(unit));
    const int chunk = static_cast<int>(unit) - row * chunks;
    const Place place = place_of(args, shape, row);
    if (!place.needed) {
      if (chunk == 0 && threadIdx.x == 0) write_blank(args.output, row, args.count);
      return;
    }
    w = place.window;
    Sampler sampler{};
    if constexpr (kSample) {
      const int64_t* k = args.sampling.keys + 3 * w;
      const int64_t where = place.column + args.sampling.position_offset;
      sampler.inverse_temperature = 1.0f / args.sampling.temperature;
      sampler.key = {static_cast<uint64_t>(k[0]), static_cast<uint32_t>(k[1]),
                     static_cast<uint32_t>(where), static_cast<uint32_t>(k[2])};
      if (scratch.chunks.nuclei != nullptr) sampler.nucleus = scratch.chunks.nuclei[row];
    }
    scan_chunk<T, kSample>(memory, scan_row<T>(args.logits, shape, row), args.logits.vocab, chunk,
                           args.exclusions, sampler, scratch.chunks, unit);
    if (!last_to_arrive(counters + windows + 2 + row, chunks)) return;
  }
  const Policy policy = Policy::load(args.policy + w * kPolicyFields);
  if (blockIdx.x >= static_cast<unsigned>(windows))
    finish<kSample>(args, scratch, policy, row, chunks);
  if (brings_to_zero(counters + w, arrival)) settle(args, scratch, policy, w, counters, memory);
}

__global__ void no_windows_kernel(bool* done) { *done = true; }

}  // namespace

int64_t unmask_scratch(const UnmaskArgs& args) { return UnmaskScratch::bytes(args); }

int64_t unmask_counters(const UnmaskArgs& args) { return args.windows.count + 2 + args.count; }

int unmask(const UnmaskArgs& args, const Workspace& workspace, void* stream) {
  if (args.windows.count == 0) DPARALLEL_LAUNCH(no_windows_kernel, 1u, 1, stream, args.done);
  const ScanShape shape = ScanShape::of(args.logits, args.tokens.length);
  const UnmaskScratch scratch = UnmaskScratch::at(workspace.scratch, args);
  const int64_t blocks = args.count * shape.chunks.divisor + args.windows.count;
  if (blocks > INT32_MAX || args.tokens.batch * args.tokens.length > INT32_MAX)
    return 1;  // an invalid value
  if (blocks == 0) return static_cast<int>(cudaGetLastError());
  const auto grid = static_cast<unsigned>(blocks);
  return dispatch(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.sampling.filters() && args.count > 0)
      DPARALLEL_LAUNCH((unmask_nucleus_kernel<T>), static_cast<unsigned>(args.count), kThreads,
                       stream, args, shape, scratch.chunks);
    if (args.sampling.samples())
      DPARALLEL_LAUNCH((unmask_kernel<T, true>), grid, kScanThreads, stream, args, shape, scratch,
                       workspace.counters);
    else
      DPARALLEL_LAUNCH((unmask_kernel<T, false>), grid, kScanThreads, stream, args, shape, scratch,
                       workspace.counters);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
