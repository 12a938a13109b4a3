// row_topk: one block reads one chunk of a row, as in row_stats; the last block of a row merges the
// best of its chunks.
//
// Work: the scan leaves a chunk in shared memory, and each of the 128 threads knows the largest of
// its own logits. The k-th largest of these 128 is a bar that at least k logits of the chunk reach,
// and of random logits few more: 17 for a k of 16. The threads that hold such logits list them as
// keys, which order logit and id at once, and the place of a key is the number of larger keys. If
// more reach the bar than the list takes, because many are equal or few threads hold all large
// ones, the k-th best of those that are listed is the next bar.
//
// Bytes: the row, once. After the scan, whose cost is that of row_stats: 128 comparisons a thread
// for the bar, a second look at its logits by each thread that reaches the bar, and a comparison of
// each pair of listed keys. Measured on an H200 from a graph, with the three small launches that
// reported bad rows then (it is one now, keep_error): the 8 best of 32 rows take 23 us, where
// row_stats takes 14. The sizes of list and pool are guesses, not measured against others.
//
// Code: 16 KB for bfloat16, of which the scan takes 8.5, the best of a chunk 2.4, their order 1.0,
// the merge 1.7 and the logarithm of the probabilities 0.6.
#include "row_scan.cuh"

// after the header that knows the device
#include "dparallel/row_topk.h"

namespace dparallel::cuda {
namespace {

constexpr int kMostListed = 256;  // keys that reach the bar of a chunk
constexpr int kPool = 512;        // keys that the last block looks at together
constexpr int kAtOnce = 4;        // keys that another is compared with at once
static_assert(kMostTop <= kScanThreads && (kPool + kAtOnce) * 8 <= kScanBytes, "");
static_assert(kPool > kMostTop && kMostListed % kScanThreads == 0, "");

struct TopMemory {
  uint32_t largest[kScanThreads];  // of each thread's logits, as in a key
  uint64_t listed[kMostListed];
  uint64_t best[kMostTop + 1];  // in descending order, then kNoKey; the last is a bar, see find_top
  float max, sum;               // of the row
  RowError error;
  int32_t count;  // of them, listed or not
};

// By a block: each of n keys that is among the k largest goes to its place among the best. Behind
// the keys are kNoKeys, up to a multiple of kAtOnce.
__device__ __attribute__((noinline)) void rank_keys(const uint64_t* keys, int n, int k,
                                                    uint64_t* best) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
    const uint64_t key = keys[i];
    int larger = key == kNoKey ? k : 0;
#pragma unroll 1
    for (int j = 0; j < n; j += kAtOnce) {
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) larger += keys[j + c] > key;
    }
    if (larger < k) best[larger] = key;
  }
}

// The thread's keys that reach the bar, in no particular order. Few do: a vector is looked at by
// elements only where its largest does.
template <class T>
__device__ __forceinline__ void list_own(const Chunk<T>& chunk, uint64_t bar, TopMemory& top) {
  const float lowest = top_logit(bar);
  const int n = chunk.groups() * kGroup;
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    float z[T::kWidth];
    TopTwo<T> of_vector;
    chunk.read(k, z, of_vector);
    if (!(of_vector.largest() >= lowest)) continue;
    const int vector = (k * kScanThreads + static_cast<int>(threadIdx.x)) * T::kWidth;
#pragma unroll 1
    for (int i = vector; i < vector + T::kWidth; ++i) {
      const float one = clamp_logit(T::value(chunk.elements()[i]));
      const uint64_t key = top_key(one, chunk.first + i);
      if (!(one >= lowest) || key < bar) continue;  // NaN is passed over
      const int at = atomicAdd(&top.count, 1);
      if (at < kMostListed) top.listed[at] = key;
    }
  }
}

__device__ __forceinline__ uint32_t logit_of_key(uint64_t key) {
  return static_cast<uint32_t>(key >> 32);
}

// By a block: the best k of the chunk, of whose logits the thread's largest is `own`. All threads
// may read them after the next barrier.
template <class T>
__device__ __forceinline__ void find_top(const Chunk<T>& chunk, float own, int k, TopMemory& top) {
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t mine = logit_of_key(top_key(own, 0)), lowest = logit_of_key(top_key(-kLargest, 0));
  top.largest[thread] = mine;
  if (thread < kMostTop) top.best[thread] = kNoKey;
  __syncthreads();
  int before = 0;
#pragma unroll 4
  for (int other = 0; other < kScanThreads; ++other) {
    const uint32_t z = top.largest[other];
    before += z > mine || (z == mine && other < thread);
  }
  if (before == k - 1)  // no bar is as low as -inf
    top.best[kMostTop] = static_cast<uint64_t>(mine > lowest ? mine : lowest) << 32;
#pragma unroll 1
  for (int at = kMostTop;; at = k - 1) {  // the last of those that are listed
#pragma unroll
    for (int i = 0; i < kMostListed; i += kScanThreads) top.listed[i + thread] = kNoKey;
    if (thread == 0) top.count = 0;
    __syncthreads();
    const uint64_t bar = top.best[at];
    if (mine >= logit_of_key(bar)) list_own(chunk, bar, top);
    __syncthreads();
    const int count = top.count;
    rank_keys(top.listed, count < kMostListed ? count : kMostListed, k, top.best);
    if (count <= kMostListed) return;
    __syncthreads();
  }
}

// By the last block of a row: the best k of its chunks' keys [total], at least one.
__device__ __forceinline__ void merge_top(const uint64_t* keys, int total, int k,
                                          ScanMemory& memory, TopMemory& top) {
  auto* pool = reinterpret_cast<uint64_t*>(memory.slots);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kMostTop) top.best[thread] = kNoKey;
  int from = 0;
#pragma unroll 1
  do {
    const int left = total - from, n = left < kPool - kMostTop ? left : kPool - kMostTop;
    __syncthreads();
    if (thread < kMostTop) pool[thread] = top.best[thread];
#pragma unroll 1
    for (int next = thread; next < n + kAtOnce - 1; next += kScanThreads) {
      const int i = anew(next);
      pool[kMostTop + i] = i < n ? read_part(keys + (from + i)) : kNoKey;
    }
    __syncthreads();
    rank_keys(pool, kMostTop + n, k, top.best);
    from += n;
  } while (from < total);
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    row_topk_kernel(RowTopkArgs args, ScanShape shape, RowPart* parts, uint64_t* keys,
                    int32_t* counters) {
  DPARALLEL_SHARED(memory, ScanMemory);
  DPARALLEL_SHARED(top, TopMemory);
  const int chunks = static_cast<int>(shape.chunks.divisor), k = static_cast<int>(args.k);
  const auto keys_of = [=](unsigned chunk) {
    return keys + static_cast<uint64_t>(chunk) * static_cast<uint32_t>(k);
  };
  const int i = static_cast<int>(shape.chunks.quotient(blockIdx.x)), first = i * chunks;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = args.rows ? args.rows[i] : i;
  const Chunk<T> ids(memory, static_cast<int>(args.logits.vocab),
                     static_cast<int>(blockIdx.x) - first);
  ids.copy(scan_row<T>(args.logits, shape, row), args.exclusions);
  float own;
  ids.scan(args.exclusions, parts + blockIdx.x, &own);
  find_top<T>(ids, own, k, top);
  __syncthreads();
  if (thread < k) keys_of(blockIdx.x)[thread] = top.best[thread];
  if (!last_to_arrive(counters + i, chunks)) return;
  const RowPart whole =  // by each warp for itself, so that none waits apart from the others
      merge_chunks(parts, first, chunks, [](RowPart& a, const RowPart& b) { a.merge(b); });
  if (thread == 0) {
    const RowError error = whole.error();
    args.error[i] = error == kRowOk ? kNoError : encode_error(i, error);
    top.error = error;
    top.max = whole.max;
    top.sum = whole.sum;
  }
  merge_top(keys_of(first), chunks * k, k, memory, top);
  if (thread >= k) return;
  const bool sound = top.error == kRowOk;
  const uint64_t key = sound ? top.best[thread] : kNoKey;
  const int64_t to = static_cast<int64_t>(i) * k + thread;
  args.tokens[to] = key == kNoKey ? -1 : top_id(key);
  args.logprobs[to] = key != kNoKey ? top_logprob(key, top.max, top.sum)
                      : sound       ? -kInfinity
                                    : from_bits(0x7fc00000u);  // NaN
}

}  // namespace

int64_t row_topk_scratch(const RowTopkArgs& args) {
  const int64_t of_chunk = static_cast<int64_t>(sizeof(RowPart)) + args.k * 8;
  return args.count * scan_chunks(args.logits) * of_chunk;
}

int64_t row_topk_counters(const RowTopkArgs& args) { return args.count; }

int row_topk(const RowTopkArgs& args, const Workspace& workspace, void* stream) {
  static_assert(sizeof(RowPart) % sizeof(uint64_t) == 0, "the keys come after the parts");
  if (args.count == 0) return 0;
  const int64_t blocks = args.count * scan_chunks(args.logits);
  if (blocks > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  const ScanShape shape = ScanShape::of(args.logits, 1);
  auto* parts = static_cast<RowPart*>(workspace.scratch);
  auto* keys = reinterpret_cast<uint64_t*>(parts + blocks);
  return dispatch(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    DPARALLEL_LAUNCH((row_topk_kernel<T>), blocks, kScanThreads, stream, args, shape, parts, keys,
                     workspace.counters);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
