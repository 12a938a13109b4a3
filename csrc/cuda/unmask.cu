// unmask: statistics, selection and commit in one launch.
//
// Blocks [0, batch): one for each sequence lists the rows that it needs (masked, in its window).
// The others read a chunk of a row each, if the row is needed, else they leave at once. The last
// block of a row to arrive merges its chunks, and the last of a sequence, once all of its rows are
// merged, selects and commits.
//
// Who is last: counters are zero between launches. A needed row has as many blocks as chunks. The
// counter of a sequence gains 1 for each merged row, the block that lists takes away as many as
// there must be, and whoever brings it back to zero is last. So only one block has to count, it
// does so while the others wait for their logits, and the counter is zero again whatever the
// arguments are: the rows that are listed and the rows that are read are chosen by the same test,
// in any order and with repetitions.
//
// What follows the scan is a chain of latencies: two arrivals, the parts (a lane for each chunk,
// merged by shuffles), the list, keys and ranks in shared memory.
#include "nucleus.cuh"
#include "select.cuh"

namespace dparallel::cuda {
namespace {

// The rows that a sequence needs: rows[before], ..., ascending.
struct Listed {
  int32_t before, needed;
  int32_t masked;  // positions of its window, listed or not
};

// What a merged row says to its sequence.
struct Verdict {
  float key;       // NaN: an error
  int32_t choice;  // the token to commit, or the RowError
};

// The needed rows of a sequence while they are settled, in shared memory if they fit.
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
  Listed* listed;     // [batch]
  Verdict* verdicts;  // [count]
  int32_t* rows;      // [count]
  int32_t* columns;   // [count]
  char* candidates;   // [count * Candidates::kBytes], of sequences that shared memory does not hold

  static int64_t bytes(const UnmaskArgs& args) {
    return Scratch::bytes(args.count, scan_chunks(args.logits), args.sampling) +
           args.batch * sizeof(Listed) + args.count * (sizeof(Verdict) + 8 + Candidates::kBytes);
  }
  static UnmaskScratch at(void* memory, const UnmaskArgs& args) {
    const int64_t chunks = scan_chunks(args.logits);
    UnmaskScratch s;
    s.chunks = Scratch::at(memory, args.count, chunks, args.sampling);
    s.listed = reinterpret_cast<Listed*>(static_cast<char*>(memory) +
                                         Scratch::bytes(args.count, chunks, args.sampling));
    s.verdicts = reinterpret_cast<Verdict*>(s.listed + args.batch);
    s.rows = reinterpret_cast<int32_t*>(s.verdicts + args.count);
    s.columns = s.rows + args.count;
    s.candidates = reinterpret_cast<char*>(s.columns + args.count);
    return s;
  }
};

__device__ inline int64_t& token_at(const UnmaskArgs& args, int b, int column) {
  return args.tokens[b * args.token_stride_b + column * args.token_stride_l];
}

// Masked and in the window; any column.
__device__ inline bool needs(const UnmaskArgs& args, int b, int64_t column) {
  if (column < 0 || column >= args.length) return false;
  const int64_t start = args.start[b], end = args.end[b];  // three loads at once
  const int64_t token = token_at(args, b, static_cast<int>(column));
  return (column >= start) & (column < end) & (token == args.exclusions.mask_id);
}

// Where a row of the logits belongs.
struct Place {
  int b, column;
  bool needed;
};

__device__ inline Place place_of(const UnmaskArgs& args, const ScanShape& shape, int row) {
  const int64_t position = args.positions ? args.positions[row] : row;
  if (position < 0 || position >= args.batch * args.length) return {0, 0, false};
  const auto at = static_cast<uint32_t>(position);
  const auto b = static_cast<int>(shape.length.quotient(at));
  const int column = static_cast<int>(at) - b * static_cast<int>(shape.length.divisor);
  return {b, column, needs(args, b, column)};
}

// By the block of a sequence.
__device__ int list_rows(const UnmaskArgs& args, const UnmaskScratch& scratch, int b) {
  DPARALLEL_SHARED(counts, int32_t[kScanWarps]);
  const int64_t begin = b * args.length;
  const int count = static_cast<int>(args.positions ? args.count : args.length);
  int before = 0;
  if (args.positions != nullptr && b > 0) {
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x); row < count; row += kScanThreads)
      before += args.positions[row] >= 0 && args.positions[row] < begin;
    before = sum_block(before);
  } else {
    before = static_cast<int>(begin);
  }
  int needed = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kScanThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int64_t column = i >= count ? -1 : args.positions ? args.positions[i] - begin : i;
    const bool mine = needs(args, b, column);
    const unsigned lanes = __ballot_sync(kFullWarp, mine), lane = threadIdx.x % 32;
    if (lane == 0) counts[threadIdx.x / 32] = __popc(lanes);
    __syncthreads();
    int at = before + needed + __popc(lanes & ((1u << lane) - 1));
#pragma unroll
    for (unsigned warp = 0; warp < kScanWarps; ++warp) {
      if (warp < threadIdx.x / 32) at += counts[warp];
      needed += counts[warp];
    }
    if (mine) {
      scratch.rows[at] = static_cast<int32_t>(args.positions ? i : begin + i);
      scratch.columns[at] = static_cast<int32_t>(column);
    }
    __syncthreads();
  }
  int masked = needed;
  if (args.positions != nullptr) {
    int mine = 0;
    const int64_t start = args.start[b] > 0 ? args.start[b] : 0;
    const int64_t end = args.end[b] < args.length ? args.end[b] : args.length;
#pragma unroll 1
    for (int64_t column = start + threadIdx.x; column < end; column += kScanThreads)
      mine += token_at(args, b, static_cast<int>(column)) == args.exclusions.mask_id;
    masked = sum_block(mine);
  }
  if (threadIdx.x == 0) scratch.listed[b] = {before, needed, masked};
  return needed;
}

// By the last block of a row: its chunks merged.
template <bool kSample>
__device__ __forceinline__ void finish(const UnmaskArgs& args, const UnmaskScratch& scratch, int b,
                                       int row, int chunks) {
  if (threadIdx.x >= 32) return;
  RowResult result;
  const float inverse = kSample ? 1.0f / args.sampling.temperature : 0.0f;
  const Policy policy = Policy::load(args.policy + b * kPolicyFields);
  const RowError error = finish_row<kSample>(scratch.chunks, row, chunks, inverse, result);
  if (threadIdx.x != 0) return;
  write_row(args.output, row, args.count, result);
  const float* field = result.field;
  if (error == kRowOk)
    scratch.verdicts[row] = {policy.key(field[kConfidence], field[kMargin], field[kEntropy]),
                             static_cast<int32_t>(result.sample)};
  else scratch.verdicts[row] = {field[kConfidence], static_cast<int32_t>(error)};
}

// By the last block of a sequence: policy applied, tokens committed.
__device__ __forceinline__ void settle(const UnmaskArgs& args, const UnmaskScratch& scratch, int b,
                                       int32_t* counters, ScanMemory& memory) {
  DPARALLEL_SHARED(worst, int32_t);  // the lowest error, as if the sequence were the first
  const Listed listed = read_part(scratch.listed + b);
  const int n = listed.needed;
  const Policy policy = Policy::load(args.policy + b * kPolicyFields);
  const Candidates candidates = Candidates::at(
      n <= kScanBytes / Candidates::kBytes
          ? reinterpret_cast<char*>(memory.slots)
          : scratch.candidates + static_cast<int64_t>(listed.before) * Candidates::kBytes,
      n);
  const Ranking& ranking = candidates.ranking;
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
  if (listed.masked != n) {  // name the first masked position that no row stands for
#pragma unroll 1
    for (int column = static_cast<int>(threadIdx.x); column < args.length; column += kScanThreads) {
      if (!needs(args, b, column)) continue;
      int i = 0;
#pragma unroll 1
      while (i < n && __ldcg(scratch.columns + listed.before + i) != column) ++i;
      if (i == n) report(column, kRowMissing);
    }
  }
  __syncthreads();
  int committed = 0;
  if (worst == INT32_MAX) {
    committed = select_block(policy, ranking, n, n);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
      if (ranking.ranks[i] < committed)
        token_at(args, b, candidates.columns[i]) = candidates.choices[i];
    }
  }
  const int remaining = listed.masked - committed;
  if (threadIdx.x == 0) {
    args.output.error[b] = worst == INT32_MAX ? kNoError : 4 * b * args.length + worst;
    args.committed[b] = committed;
    args.remaining[b] = remaining;
  }
  bool done = remaining == 0;
  if (args.batch > 1) {
    if (!last_to_arrive(counters + args.batch, args.batch)) return;
    int left = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < args.batch; i += kScanThreads)
      left += __ldcg(args.remaining + i) != 0;
    done = sum_block(left) == 0;
  }
  if (threadIdx.x == 0) *args.done = done;
}

// One block per row of the logits: what may be sampled of it, where it is needed.
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
  int b = static_cast<int>(blockIdx.x), arrival;
  if (b < args.batch) {
    arrival = -list_rows(args, scratch, b);
  } else {
    const unsigned unit = blockIdx.x - static_cast<unsigned>(args.batch);
    const int row = static_cast<int>(shape.chunks.quotient(unit));
    const int chunk = static_cast<int>(unit) - row * chunks;
    const Place place = place_of(args, shape, row);
    if (!place.needed) {
      if (chunk == 0 && threadIdx.x == 0) write_row(args.output, row, args.count, blank_row());
      return;
    }
    b = place.b;
    Sampler sampler{};
    if constexpr (kSample) {
      const int64_t* k = args.sampling.keys + 3 * b;
      const int64_t where = place.column + args.sampling.position_offset;
      sampler.inverse_temperature = 1.0f / args.sampling.temperature;
      sampler.key = {static_cast<uint64_t>(k[0]), static_cast<uint32_t>(k[1]),
                     static_cast<uint32_t>(where), static_cast<uint32_t>(k[2])};
      if (scratch.chunks.nuclei != nullptr) sampler.nucleus = scratch.chunks.nuclei[row];
    }
    scan_chunk<T, kSample>(memory, scan_row<T>(args.logits, shape, row), args.logits.vocab, chunk,
                           args.exclusions, sampler, scratch.chunks, unit);
    if (!last_to_arrive(counters + args.batch + 1 + row, chunks)) return;
    finish<kSample>(args, scratch, b, row, chunks);
    arrival = 1;
  }
  if (brings_to_zero(counters + b, arrival)) settle(args, scratch, b, counters, memory);
}

__global__ void empty_batch_kernel(bool* done) { *done = true; }

}  // namespace

int64_t unmask_scratch(const UnmaskArgs& args) { return UnmaskScratch::bytes(args); }

int64_t unmask_counters(const UnmaskArgs& args) { return args.batch + 1 + args.count; }

int unmask(const UnmaskArgs& args, const Workspace& workspace, void* stream) {
  if (args.batch == 0) {
    DPARALLEL_LAUNCH(empty_batch_kernel, 1u, 1, stream, args.done);
    return static_cast<int>(cudaGetLastError());
  }
  const ScanShape shape = ScanShape::of(args.logits, args.length);
  const UnmaskScratch scratch = UnmaskScratch::at(workspace.scratch, args);
  const int64_t blocks = args.count * shape.chunks.divisor + args.batch;
  if (blocks > INT32_MAX || args.batch * args.length > INT32_MAX) return 1;  // an invalid value
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
