// unmask: statistics, selection and commit in one launch.
//
// Blocks [0, rows * chunks) read a chunk of a row each, if the row is masked and in its sequence's
// window; the others leave at once. One more block per sequence only counts. The last of a
// sequence's blocks to arrive merges the chunks, selects and commits; the last sequence to finish
// sets the done flag. Every counter is zero again at the end.
#include "nucleus.cuh"
#include "select.cuh"

namespace dparallel::cuda {
namespace {

// counters: [batch] arrivals, then sequences finished, then sequences with masks left.
struct Sequence {
  const UnmaskArgs& args;
  int64_t b;
  int64_t first_row, end_row;  // its rows of the logits

  __device__ int64_t position(int64_t row) const {
    return args.positions ? args.positions[row] : row;
  }

  __device__ int64_t& token(int64_t column) const {
    return args.tokens[b * args.token_stride_b + column * args.token_stride_l];
  }

  // Masked and in the window.
  __device__ bool needs(int64_t column) const {
    return column >= args.start[b] && column < args.end[b] &&
           token(column) == args.exclusions.mask_id;
  }
  __device__ bool needs_row(int64_t row) const { return needs(position(row) - b * args.length); }
};

// The first of ascending positions [count] that is at least `value`.
__device__ inline int64_t lower_bound(const int64_t* positions, int64_t count, int64_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (positions[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

__device__ inline Sequence sequence_of(const UnmaskArgs& args, int64_t b) {
  if (args.positions == nullptr) return {args, b, b * args.length, (b + 1) * args.length};
  return {args, b, lower_bound(args.positions, args.count, b * args.length),
          lower_bound(args.positions, args.count, (b + 1) * args.length)};
}

__device__ inline int64_t count_masked(const Sequence& s) {
  int64_t mine = 0;
  const int64_t end = s.args.end[s.b] < s.args.length ? s.args.end[s.b] : s.args.length;
  const int64_t start = s.args.start[s.b] > 0 ? s.args.start[s.b] : 0;
  for (int64_t column = start + threadIdx.x; column < end; column += kThreads)
    mine += s.needs(column);
  return sum_block(mine);
}

// How many of its rows are needed; the same for every block that asks before the sequence commits.
__device__ inline int64_t count_needed(const Sequence& s) {
  if (s.args.positions == nullptr) return count_masked(s);
  int64_t mine = 0;
  for (int64_t row = s.first_row + threadIdx.x; row < s.end_row; row += kThreads)
    mine += s.needs_row(row);
  return sum_block(mine);
}

// By the last block of a sequence: chunks merged, policy applied, tokens committed.
__device__ void settle(const Sequence& s, const Scratch& scratch, int64_t chunks, int64_t needed,
                       int32_t* counters) {
  DPARALLEL_SHARED(worst, long long);  // the lowest error
  const UnmaskArgs& args = s.args;
  const float inverse = args.sampling.samples() ? 1.0f / args.sampling.temperature : 0.0f;
  const Policy policy = Policy::load(args.policy + s.b * kPolicyFields);
  const int64_t masked = count_masked(s);
  if (threadIdx.x == 0) worst = kNoError;
  __syncthreads();
  const auto report = [&](int64_t position, RowError code) {
    atomicMin(&worst, static_cast<long long>(encode_error(position, code)));
  };
  for (int64_t row = s.first_row + threadIdx.x; row < s.end_row; row += kThreads) {
    scratch.keys[row] = from_bits(0x7fc00000u);
    if (!s.needs_row(row)) {
      write_blank(args.output, row, args.count);
      continue;
    }
    RowResult result;
    const RowError error = finish_row(scratch, row, chunks, inverse, result);
    if (error != kRowOk) {
      write_blank(args.output, row, args.count);
      report(s.position(row), error);
      continue;
    }
    write_row(args.output, row, args.count, result);
    const float* field = result.field;
    scratch.keys[row] = policy.key(field[kConfidence], field[kMargin], field[kEntropy]);
  }
  if (masked != needed) {  // name the first masked position that is not listed
    for (int64_t column = threadIdx.x; column < args.length; column += kThreads) {
      const int64_t at = s.b * args.length + column;
      const int64_t row = lower_bound(args.positions, args.count, at);
      if (s.needs(column) && (row == args.count || args.positions[row] != at))
        report(at, kRowMissing);
    }
  }
  __syncthreads();
  int64_t committed = 0;
  if (worst == kNoError) {
    const int64_t first = s.first_row, n = s.end_row - s.first_row;
    committed = select_block(policy, scratch.keys + first, scratch.sorted + first,
                             scratch.ranks + first, n, needed);
    for (int64_t row = first + threadIdx.x; row < s.end_row; row += kThreads)
      if (scratch.keys[row] == scratch.keys[row] && scratch.ranks[row] < committed)
        s.token(s.position(row) - s.b * args.length) = args.output.tokens[args.count + row];
  }
  if (threadIdx.x != 0) return;
  args.output.error[s.b] = worst;
  args.committed[s.b] = committed;
  args.remaining[s.b] = masked - committed;
  int32_t* finished = counters + args.batch;
  int32_t* unfinished = finished + 1;
  if (masked != committed) atomicAdd(unfinished, 1);
  __threadfence();
  if (atomicAdd(finished, 1) == static_cast<int32_t>(args.batch - 1)) {
    __threadfence();
    *args.done = atomicAdd(unfinished, 0) == 0;
    *unfinished = 0;
    *finished = 0;
  }
}

// One block per row of the logits: what may be sampled of it, where it is needed.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    unmask_nucleus_kernel(UnmaskArgs args, Scratch scratch) {
  const int64_t row = blockIdx.x;
  const int64_t position = args.positions ? args.positions[row] : row;
  if (!sequence_of(args, position / args.length).needs_row(row)) return;
  const Nucleus found = find_nucleus<T>(row_pointer(args.logits, row), args.logits.vocab,
                                        args.exclusions, args.sampling);
  if (threadIdx.x == 0) scratch.nuclei[row] = found;
}

template <class T, bool kSample>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    unmask_kernel(UnmaskArgs args, Scratch scratch, int32_t* counters, int64_t chunks) {
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const bool reads = row < args.count;
  const int64_t position = !reads ? 0 : args.positions ? args.positions[row] : row;
  const int64_t b =
      reads ? position / args.length : static_cast<int64_t>(blockIdx.x) - args.count * chunks;
  const Sequence s = sequence_of(args, b);
  if (reads && !s.needs_row(row)) return;
  const int64_t needed = count_needed(s);
  if (reads) {
    Sampler sampler{};
    if (kSample) {
      const int64_t* k = args.sampling.keys + 3 * b;
      const int64_t where = position % args.length + args.sampling.position_offset;
      sampler.inverse_temperature = 1.0f / args.sampling.temperature;
      sampler.key = {static_cast<uint64_t>(k[0]), static_cast<uint32_t>(k[1]),
                     static_cast<uint32_t>(where), static_cast<uint32_t>(k[2])};
      if (scratch.nuclei != nullptr) sampler.nucleus = scratch.nuclei[row];
    }
    RowPart part;
    SamplePart sample;
    scan_chunk<T, kSample>(row_pointer(args.logits, row), args.logits.vocab, chunk, args.exclusions,
                           sampler, part, sample);
    if (threadIdx.x == 0) {
      scratch.parts[blockIdx.x] = part;
      if (kSample) scratch.samples[blockIdx.x] = sample;
    }
  }
  if (last_to_arrive(counters + b, needed * chunks + 1))
    settle(s, scratch, chunks, needed, counters);
}

__global__ void empty_batch_kernel(bool* done) { *done = true; }

}  // namespace

int64_t unmask_scratch(const UnmaskArgs& args) {
  return Scratch::bytes(args.count, chunks_of(args.logits.vocab), args.sampling);
}

int64_t unmask_counters(const UnmaskArgs& args) { return args.batch + 2; }

int unmask(const UnmaskArgs& args, const Workspace& workspace, void* stream) {
  if (args.batch == 0) {
    DPARALLEL_LAUNCH(empty_batch_kernel, 1u, 1, stream, args.done);
    return static_cast<int>(cudaGetLastError());
  }
  const int64_t chunks = chunks_of(args.logits.vocab);
  const Scratch scratch = Scratch::at(workspace.scratch, args.count, chunks, args.sampling);
  const unsigned grid = static_cast<unsigned>(args.count * chunks + args.batch);
  return dispatch(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.sampling.filters() && args.count > 0)
      DPARALLEL_LAUNCH((unmask_nucleus_kernel<T>), static_cast<unsigned>(args.count), kThreads,
                       stream, args, scratch);
    if (args.sampling.samples())
      DPARALLEL_LAUNCH((unmask_kernel<T, true>), grid, kThreads, stream, args, scratch,
                       workspace.counters, chunks);
    else
      DPARALLEL_LAUNCH((unmask_kernel<T, false>), grid, kThreads, stream, args, scratch,
                       workspace.counters, chunks);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
