// row_topk: one block reads one chunk of a row, as in row_stats; the last block of a row merges the
// best of its chunks.
//
// Work: the scan leaves a chunk in shared memory, and each of the 128 threads knows the largest of
// its own logits. The k-th largest of these 128 is a bar that at least k logits of the chunk reach,
// and of random logits few more: 17 for a k of 16. The threads that hold such logits list them as
// keys, which order logit and id at once, and the place of a key is the number of larger keys. If
// more logits reach the bar than the list takes, because many are equal or few threads hold all
// large ones, the keys are found one after the other, each the largest below the previous key.
//
// Bytes: the row, once. After the scan, whose cost is that of row_stats: 128 comparisons a thread
// for the bar, a second look at its logits by each thread that reaches the bar, and a comparison of
// each pair of listed keys. Measured on an H200 from a graph, with the three small launches that
// reported bad rows then (it is one now, keep_error): the 8 best of 32 rows take 23 us, where
// row_stats takes 14. The sizes of list and pool are guesses, not measured against others.
//
// Code: 20 KB for bfloat16, of which the scan takes 9.5, the best of a chunk 3.2, their order 1.5,
// the merge 2.5 and the logarithm of the probabilities 0.6.
#include "row_scan.cuh"

// after the header that knows the device
#include "dparallel/row_topk.h"

namespace dparallel::cuda {
namespace {

constexpr int kMostListed = 256;  // keys that reach the bar of a chunk
constexpr int kPool = 512;        // keys that the last block looks at together
static_assert(kMostTop <= kScanThreads && kPool * 8 <= kScanBytes && kPool > kMostTop, "");

struct TopMemory {
  float largest[kScanThreads];  // of each thread's logits
  uint64_t listed[kMostListed];
  uint64_t best[kMostTop];            // in descending order, then kNoKey
  uint32_t row[sizeof(RowPart) / 4];  // its bits: shared memory begins with no values
  float bar;
  int32_t count;
};

// visit(z, id) for the thread's logits above -inf that reach the bar, in no particular order. Few
// do: a vector is looked at by elements only where its largest does.
template <class T, class Visit>
__device__ __forceinline__ void each_own(const Chunk<T>& chunk, float bar, Visit visit) {
  const int n = chunk.groups() * kGroup;
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    float z[T::kWidth];
    TopTwo<T> of_vector;
    chunk.read(k, z, of_vector);
    if (!(of_vector.largest() >= bar)) continue;
    const int vector = (k * kScanThreads + static_cast<int>(threadIdx.x)) * T::kWidth;
#pragma unroll 1
    for (int i = 0; i < T::kWidth; ++i) {
      const float one = T::value(chunk.elements()[vector + i]);
      if (one >= bar && one > -kInfinity) visit(clamp_logit(one), chunk.first + vector + i);
    }
  }
}

// By a block: each of n keys that is among the k largest goes to its place among the best.
__device__ __attribute__((noinline)) void rank_keys(const uint64_t* keys, int n, int k,
                                                    uint64_t* best) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kScanThreads) {
    const uint64_t key = keys[i];
    int larger = key == kNoKey ? k : 0;
#pragma unroll 4
    for (int j = 0; j < n; ++j) larger += keys[j] > key;
    if (larger < k) best[larger] = key;
  }
}

// By a block: the best k of the chunk, of whose logits the thread's largest is `own`. All threads
// may read them after the next barrier.
template <class T>
__device__ __forceinline__ void find_top(const Chunk<T>& chunk, float own, int k, TopMemory& top) {
  const int thread = static_cast<int>(threadIdx.x);
  top.largest[thread] = own;
  if (thread < kMostTop) top.best[thread] = kNoKey;
  if (thread == 0) top.count = 0;
  __syncthreads();
  int before = 0;
#pragma unroll 4
  for (int other = 0; other < kScanThreads; ++other) {
    const float z = top.largest[other];
    before += z > own || (z == own && other < thread);
  }
  if (before == k - 1) top.bar = own;
  __syncthreads();
  const float bar = top.bar;
  uint64_t last = ~uint64_t{0};
#pragma unroll 1
  for (int n = -1; n < k && last != kNoKey; ++n) {  // the list, or one after the other
    uint64_t next = kNoKey;
    if (own >= bar)
      each_own<T>(chunk, bar, [&](float z, int id) {
        const uint64_t key = top_key(z, id);
        if (n >= 0) {
          if (key < last && key > next) next = key;
        } else if (const int at = atomicAdd(&top.count, 1); at < kMostListed) {
          top.listed[at] = key;
        }
      });
    __syncthreads();  // the keys of the last round are read
    if (n < 0) {
      const int count = top.count;
      if (count <= kMostListed) return rank_keys(top.listed, count, k, top.best);
      continue;
    }
    merge_lanes(next, 32, [](uint64_t& a, uint64_t b) { a = a > b ? a : b; });
    if (thread % 32 == 0) top.listed[thread / 32] = next;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kScanWarps; ++warp)
      if (top.listed[warp] > next) next = top.listed[warp];
    if (thread == 0) top.best[n] = next;
    last = next;
  }
}

// By the last block of a row: the best k of its chunks' keys [total].
__device__ __forceinline__ void merge_top(const uint64_t* keys, int total, int k,
                                          ScanMemory& memory, TopMemory& top) {
  auto* pool = reinterpret_cast<uint64_t*>(memory.slots);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kMostTop) top.best[thread] = kNoKey;
#pragma unroll 1
  for (int from = 0; from < total; from += kPool - kMostTop) {
    const int left = total - from, n = left < kPool - kMostTop ? left : kPool - kMostTop;
    __syncthreads();
    if (thread < kMostTop) pool[thread] = top.best[thread];
#pragma unroll 1
    for (int i = thread; i < n; i += kScanThreads) pool[kMostTop + i] = read_part(keys + from + i);
    __syncthreads();
    rank_keys(pool, kMostTop + n, k, top.best);
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    row_topk_kernel(RowTopkArgs args, ScanShape shape, RowPart* parts, uint64_t* keys,
                    int32_t* counters) {
  DPARALLEL_SHARED(memory, ScanMemory);
  DPARALLEL_SHARED(top, TopMemory);
  const int chunks = static_cast<int>(shape.chunks.divisor), k = static_cast<int>(args.k);
  const int i = static_cast<int>(shape.chunks.quotient(blockIdx.x));
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = args.rows ? args.rows[i] : i;
  const Chunk<T> ids(memory, static_cast<int>(args.logits.vocab),
                     static_cast<int>(blockIdx.x) - i * chunks);
  ids.copy(scan_row<T>(args.logits, shape, row), args.exclusions);
  float own;
  const RowPart part = ids.scan(args.exclusions, &own);
  if (thread == 0) parts[blockIdx.x] = part;
  find_top<T>(ids, own, k, top);
  __syncthreads();
  if (thread < k) keys[static_cast<int64_t>(blockIdx.x) * k + thread] = top.best[thread];
  if (!last_to_arrive(counters + i, chunks)) return;
  const int64_t first = static_cast<int64_t>(i) * chunks;
  const RowPart merged =  // by each warp for itself, so that none waits apart from the others
      merge_chunks(parts + first, chunks, [](RowPart& a, const RowPart& b) { a.merge(b); });
  if (thread == 0) memcpy(top.row, &merged, sizeof merged);
  merge_top(keys + first * k, chunks * k, k, memory, top);
  RowPart whole;
  memcpy(&whole, top.row, sizeof whole);
  const RowError error = whole.error();
  if (thread == 0) args.error[i] = error == kRowOk ? kNoError : encode_error(i, error);
  if (thread >= k) return;
  const uint64_t key = error == kRowOk ? top.best[thread] : kNoKey;
  const int64_t to = static_cast<int64_t>(i) * k + thread;
  args.tokens[to] = key == kNoKey ? -1 : top_id(key);
  args.logprobs[to] = key != kNoKey     ? top_logprob(key, whole)
                      : error == kRowOk ? -kInfinity
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
    DPARALLEL_LAUNCH((row_topk_kernel<T>), static_cast<unsigned>(blocks), kScanThreads, stream,
                     args, shape, parts, keys, workspace.counters);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace dparallel::cuda
