// class_stats: a block of 256 threads reads 8 classes of a row: each warp one of its own, and all
// of them together each class of more than kAlone ids, which one warp would be long about.
//
// Bytes: the logits of the listed ids and 4 for each id, most of them from the L2 cache, which
// holds the list and a row; 52 written for each class. A large class is ids in ascending order, so
// that lanes read neighbours; a small one gathers. One launch, without counters: classes are many
// and small, or few and large. Not measured.
#include "row_scan.cuh"

namespace dparallel::cuda {
namespace {

constexpr int64_t kAlone = 1024;
constexpr int kLoads = 4;  // logits that a thread has in flight

// Of the ids [first, end) every step-th.
template <class T>
__device__ __forceinline__ RowPart read_ids(const typename T::Storage* logits, int64_t vocab,
                                            const int32_t* ids, int64_t first, int64_t end,
                                            int step) {
  RowPart part;
#pragma unroll 1
  for (; first < end; first += kLoads * step) {
    int32_t id[kLoads];
    float z[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) id[i] = first + i * step < end ? ids[first + i * step] : -1;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      z[i] = id[i] >= 0 && id[i] < vocab ? T::value(logits[id[i]]) : -kInfinity;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) part.add(z[i], id[i], true);
  }
  return part;
}

template <class T>
__global__ void __launch_bounds__(kThreads) class_stats_kernel(ClassStatsArgs args, int groups) {
  DPARALLEL_SHARED(parts, RowPart[kWarps]);
  const auto merge = [](RowPart& a, const RowPart& b) { a.merge(b); };
  const int row = static_cast<int>(blockIdx.x) / groups;
  const int first = static_cast<int>(blockIdx.x) % groups * kWarps;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const auto* logits = static_cast<const typename T::Storage*>(row_pointer(args.logits, row));
  const int64_t vocab = args.logits.vocab;
#pragma unroll 1
  for (int c = 0; c < kWarps && first + c < args.classes; ++c) {
    const auto [begin, end] = Run::of(args.offsets, first + c, args.listed);
    const bool together = end - begin > kAlone;  // the same for all threads
    if (!together && c != warp) continue;
    RowPart part = together ? read_ids<T>(logits, vocab, args.ids, begin + thread, end, kThreads)
                            : read_ids<T>(logits, vocab, args.ids, begin + lane, end, 32);
    if (together) part = merge_block(part, parts, merge);
    else merge_lanes(part, 32, merge);
    if (together ? thread == 0 : lane == 0) {
      const int64_t count = args.count * args.classes, at = row * args.classes + first + c;
      if (part.error() == kRowNan) write_row(args.output, at, count, blank_row());
      else write_row(args.output, at, count, finish(part));
    }
    if (together) __syncthreads();  // parts may be written again
  }
}

}  // namespace

int class_stats(const ClassStatsArgs& args, void* stream) {
  const int64_t groups = (args.classes + kWarps - 1) / kWarps;
  if (args.count == 0 || groups == 0) return 0;
  if (groups > INT32_MAX / args.count) return 1;  // an invalid value
  const int64_t grid = args.count * groups;
  return dispatch(args.logits.dtype, [&](auto type) {
    DPARALLEL_LAUNCH((class_stats_kernel<decltype(type)>), grid, kThreads, stream, args,
                     static_cast<int>(groups));
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
