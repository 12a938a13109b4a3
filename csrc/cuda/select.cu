// select: one block of 128 threads for each sequence.
//
// Work: a key for each eligible position, n keys; ranks by counting the larger keys, n^2 / 128
// comparisons a thread, unless all keys beyond a threshold commit (select.cuh).
//
// Bytes: 13 read and 1 written for each position. Keys and ranks of up to 2048 positions stay in 24
// KB of shared memory; longer sequences use scratch. One block for each sequence is a
// guess, not measured against several: sequences have few positions, and batches many sequences.
#include "select.cuh"

namespace dparallel::cuda {
namespace {

constexpr int kShared = 2048;  // keys of a sequence that shared memory holds

__global__ void __launch_bounds__(kScanThreads)
    select_kernel(SelectArgs args, Ranked* scratch, bool in_shared) {
  DPARALLEL_SHARED(memory, Ranked[kShared]);
  const int length = static_cast<int>(args.length);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * length;
  const Policy policy =
      Policy::load(args.policy + static_cast<int64_t>(blockIdx.x) * kPolicyFields);
  Ranked* items = in_shared ? memory : scratch + first;
  const float* of = policy.score == kScoreConfidence ? args.confidence
                    : policy.score == kScoreMargin   ? args.margin
                                                     : args.entropy;
  int mine = 0;
#pragma unroll 2
  for (int l = static_cast<int>(threadIdx.x); l < length; l += kScanThreads) {
    const int64_t at = first + l;
    const float score = of[at];  // the one that the rule looks at
    const float key = args.eligible[at] ? policy.key(score, score, score) : from_bits(0x7fc00000u);
    mine += key == key;
    items[l].key = key;
  }
  const int n = select_block(policy, items, length, sum_block(mine));
#pragma unroll 1
  for (int l = static_cast<int>(threadIdx.x); l < length; l += kScanThreads)
    args.commit[first + l] = items[l].key == items[l].key && items[l].rank < n;
}

}  // namespace

int64_t select_scratch(const SelectArgs& args) {
  return args.length <= kShared ? 0
                                : args.batch * args.length * static_cast<int64_t>(sizeof(Ranked));
}

int select(const SelectArgs& args, const Workspace& workspace, void* stream) {
  if (args.batch == 0 || args.length == 0) return 0;
  DPARALLEL_LAUNCH(select_kernel, args.batch, kScanThreads, stream, args,
                   static_cast<Ranked*>(workspace.scratch), args.length <= kShared);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace dparallel::cuda
