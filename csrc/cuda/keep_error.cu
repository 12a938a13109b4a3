// keep_error: one block finds the least of a launch's errors, and keeps it where none is kept yet.
//
// Bytes: 8 for each row. A thread has up to 8 loads in flight, so that 4096 rows cost one trip to
// memory. One block is enough, and none other writes the word, so that no atomic operation is
// needed: the word is read only where a row is bad. The launch is early, so that it hides behind
// the end of the op whose errors it reads.
#include "cluster.cuh"
#include "row_parts.cuh"

// after the headers that know the device
#include "dparallel/launch.h"

namespace dparallel::cuda {
namespace {

constexpr int kKeepThreads = 512;

__global__ void __launch_bounds__(kKeepThreads) keep_error_kernel(KeepErrorArgs args) {
  DPARALLEL_SHARED(of_warps, int64_t[kKeepThreads / 32]);
  wait_for_earlier();
  const auto keep_less = [](int64_t& a, int64_t b) { a = b < a ? b : a; };
  int64_t least = kNoError;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < args.count; i += kKeepThreads) keep_less(least, args.error[i]);
  least = merge_block(least, of_warps, keep_less);
  if (threadIdx.x == 0 && least != kNoError && *args.word == kNoError) *args.word = least;
}

}  // namespace

int keep_error(const KeepErrorArgs& args, void* stream) {
  if (args.count == 0) return 0;
  return DPARALLEL_LAUNCH_EARLY(keep_error_kernel, 1, kKeepThreads, stream, args);
}

}  // namespace dparallel::cuda
