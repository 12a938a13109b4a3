// select: one block per sequence.
#include "select.cuh"

namespace dparallel::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    select_kernel(SelectArgs args, Scratch scratch) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.length;
  const Policy policy =
      Policy::load(args.policy + static_cast<int64_t>(blockIdx.x) * kPolicyFields);
  float* keys = scratch.keys + first;
  int32_t* ranks = scratch.ranks + first;
  int64_t mine = 0;
  for (int64_t l = threadIdx.x; l < args.length; l += kThreads) {
    const int64_t at = first + l;
    const bool eligible = args.eligible[at];
    mine += eligible;
    keys[l] = eligible ? policy.key(args.confidence[at], args.margin[at], args.entropy[at])
                       : from_bits(0x7fc00000u);
  }
  const int64_t eligible = sum_block(mine);  // and a barrier: the keys are there
  const int64_t n =
      select_block(policy, keys, scratch.sorted + first, ranks, args.length, eligible);
  for (int64_t l = threadIdx.x; l < args.length; l += kThreads)
    args.commit[first + l] = keys[l] == keys[l] && ranks[l] < n;
}

}  // namespace

int64_t select_scratch(const SelectArgs& args) {
  return Scratch::bytes(args.batch * args.length, 0, Sampling{});
}

int select(const SelectArgs& args, const Workspace& workspace, void* stream) {
  if (args.batch == 0 || args.length == 0) return 0;
  const Scratch scratch = Scratch::at(workspace.scratch, args.batch * args.length, 0, Sampling{});
  DPARALLEL_LAUNCH(select_kernel, static_cast<unsigned>(args.batch), kThreads, stream, args,
                   scratch);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace dparallel::cuda
