// row_stats: one block reads one chunk of a row (row_scan.cuh), and the last block of a row merges
// the parts of its chunks.
//
// Bytes: each listed row once; 60 bytes of results are written for a row. A counter for each row,
// zero between launches, tells a block whether it is the last. Sampling from a nucleus (top-p,
// top-k) needs the whole row first: a launch ahead finds it (nucleus.cuh). The logits of asked ids
// (`gather`) are read by the blocks of their row, from the L2 cache.
#include "nucleus.cuh"

namespace dparallel::cuda {
namespace {

// One block per row finds the ids that may be sampled.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    row_nucleus_kernel(RowStatsArgs args, Scratch scratch) {
  const int64_t row = args.rows ? args.rows[blockIdx.x] : blockIdx.x;
  const Nucleus found = find_nucleus<T>(row_pointer(args.logits, row), args.logits.vocab,
                                        args.exclusions, args.sampling);
  if (threadIdx.x == 0) scratch.nuclei[blockIdx.x] = found;
}

// The blocks of a row share its ids.
template <class T>
__device__ __forceinline__ void gather_logits(const Gather& gather, const void* row, int vocab,
                                              int i, int chunk, int chunks) {
  const auto* logits = static_cast<const typename T::Storage*>(row);
  const auto count = static_cast<int>(gather.count);
  const int64_t* ids = gather.ids + i * gather.stride;
  float* to = gather.logits + static_cast<int64_t>(i) * count;
#pragma unroll 1
  for (int k = chunk * kScanThreads + static_cast<int>(threadIdx.x); k < count;
       k += chunks * kScanThreads) {
    const int64_t id = ids[k];
    to[k] = id >= 0 && id < vocab ? clamp_logit(T::value(logits[static_cast<int>(id)]))
                                  : from_bits(0x7fc00000u);  // NaN
  }
}

template <class T, bool kSample>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    row_stats_kernel(RowStatsArgs args, ScanShape shape, Scratch scratch, int32_t* counters) {
  DPARALLEL_SHARED(memory, ScanMemory);
  const int chunks = static_cast<int>(shape.chunks.divisor);
  const int i = static_cast<int>(shape.chunks.quotient(blockIdx.x));
  const int chunk = static_cast<int>(blockIdx.x) - i * chunks;
  const int64_t row = args.rows ? args.rows[i] : i;
  Sampler sampler{};
  if constexpr (kSample) {
    const int64_t* k = args.sampling.keys + 4 * i;
    sampler.inverse_temperature = args.sampling.inverse_temperature;
    sampler.key = {static_cast<uint64_t>(k[0]), static_cast<uint32_t>(k[1]),
                   static_cast<uint32_t>(k[2]), static_cast<uint32_t>(k[3])};
    if (scratch.nuclei != nullptr) sampler.nucleus = scratch.nuclei[i];
  }
  const void* logits = scan_row<T>(args.logits, shape, row);
  const auto vocab = static_cast<int>(args.logits.vocab);
  scan_chunk<T, kSample>(memory, logits, vocab, chunk, args.exclusions, sampler, scratch,
                         blockIdx.x);
  gather_logits<T>(args.gather, logits, vocab, i, chunk, chunks);
  if (!last_to_arrive(counters + i, chunks) || threadIdx.x >= 32) return;
  RowResult result;
  const RowError error =
      finish_row<kSample>(scratch, i, chunks, sampler.inverse_temperature, result);
  if (threadIdx.x != 0) return;
  args.output.error[i] = error == kRowOk ? kNoError : encode_error(i, error);
  write_row(args.output, i, static_cast<int>(args.count), error == kRowNan ? blank_row() : result);
}

}  // namespace

int64_t row_stats_scratch(const RowStatsArgs& args) {
  return Scratch::bytes(args.count, scan_chunks(args.logits), args.sampling);
}

int64_t row_stats_counters(const RowStatsArgs& args) { return args.count; }

int row_stats(const RowStatsArgs& args, const Workspace& workspace, void* stream) {
  if (args.count == 0) return 0;
  const int64_t chunks = scan_chunks(args.logits);
  const ScanShape shape = ScanShape::of(args.logits, 1);
  const Scratch scratch = Scratch::at(workspace.scratch, args.count, chunks, args.sampling);
  if (args.count * chunks > INT32_MAX || args.gather.count > INT32_MAX / 2)
    return 1;  // an invalid value
  const int64_t grid = args.count * chunks;
  return dispatch(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.sampling.filters())
      DPARALLEL_LAUNCH((row_nucleus_kernel<T>), args.count, kThreads, stream, args, scratch);
    if (args.sampling.samples())
      DPARALLEL_LAUNCH((row_stats_kernel<T, true>), grid, kScanThreads, stream, args, shape,
                       scratch, workspace.counters);
    else
      DPARALLEL_LAUNCH((row_stats_kernel<T, false>), grid, kScanThreads, stream, args, shape,
                       scratch, workspace.counters);
    return static_cast<int>(cudaGetLastError());
  });
}

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace dparallel::cuda
