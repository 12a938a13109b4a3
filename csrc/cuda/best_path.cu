// best_path: a block of 512 threads for each window goes from cell to cell, with a barrier between
// them; thread 0 then walks back.
//
// Work: a maximum over the edges into each state, in each cell, by 8 lanes: most states have few
// edges, and those of free text some hundreds.
//
// Bytes: the automaton, 8 for each edge, once for each cell, and the cell's scores, from the L1 and
// L2 caches; 4 written for each state and cell, of which the walk back reads a few. The sums of up
// to 4096 states stay in 32 KB of shared memory; more use scratch. Not measured: a window's cells
// follow each other, so that the time is the latency of one block.
#include "row_parts.cuh"

// after the headers that know the device
#include "dparallel/launch.h"

namespace dparallel::cuda {
namespace {

constexpr int kPathThreads = 512, kPathLanes = 8, kPathGroups = kPathThreads / kPathLanes;
constexpr int kShared = 4096;  // states whose sums shared memory holds

struct Step {
  float sum = -kInfinity;
  int32_t edge = INT32_MAX;
};

// Scratch of a window: the edge taken into each state of each cell, and the sums that shared memory
// does not hold.
struct PathScratch {
  int32_t* taken;  // [cells, states]
  float* sums;     // [2, states]

  __host__ __device__ static int64_t bytes(const BestPathArgs& args) {
    const int64_t states = args.transitions.states;
    return 4 * states * (args.cells + (states > kShared ? 2 : 0));
  }
  __device__ static PathScratch at(void* scratch, const BestPathArgs& args, int64_t window) {
    char* memory = static_cast<char*>(scratch) + window * bytes(args);
    return {reinterpret_cast<int32_t*>(memory),
            reinterpret_cast<float*>(memory + 4 * args.transitions.states * args.cells)};
  }
};

// The best edge into `state`, for all lanes of its group. best [states], score [classes].
__device__ __forceinline__ Step best_step(const Transitions& automaton, int64_t state,
                                          const float* best, const float* score) {
  const auto lane = static_cast<int64_t>(threadIdx.x % kPathLanes);
  Step step;
  const Run edges =
      state < automaton.states ? Run::of(automaton.offsets, state, automaton.edges) : Run{0, 0};
#pragma unroll 2
  for (int64_t e = edges.begin + lane; e < edges.end; e += kPathLanes) {
    const int32_t origin = automaton.origin[e], token_class = automaton.token_class[e];
    const bool sound = origin >= 0 && origin < automaton.states && token_class >= 0 &&
                       token_class < automaton.classes;
    const float sum = sound ? best[origin] + score[token_class] : -kInfinity;
    if (sum > step.sum) step = {sum, static_cast<int32_t>(e)};
  }
  merge_lanes(step, kPathLanes, [](Step& a, const Step& b) {
    if (b.sum > a.sum || (b.sum == a.sum && b.edge < a.edge)) a = b;
  });
  return step;
}

__global__ void __launch_bounds__(kPathThreads) best_path_kernel(BestPathArgs args, void* memory) {
  DPARALLEL_SHARED(in_shared, float[2 * kShared]);
  DPARALLEL_SHARED(of_warps, PathEnd[kPathThreads / 32]);
  const Transitions& automaton = args.transitions;
  const int64_t window = blockIdx.x, cells = args.cells, states = automaton.states;
  const auto thread = static_cast<int64_t>(threadIdx.x);
  const PathScratch scratch = PathScratch::at(memory, args, window);
  float* best = states > kShared ? scratch.sums : in_shared;
  float* next = best + states;
  const auto within = [&](int64_t c) { return c < 0 ? int64_t{0} : c > cells ? cells : c; };
  const int64_t begin = within(args.begin[window]), end = within(args.end[window]);
  const int64_t enter = args.enter[window];
  int64_t* state = args.state + window * (cells + 1);
  int64_t* token_class = args.token_class + window * cells;
#pragma unroll 1
  for (int64_t c = thread; c <= cells; c += kPathThreads) {
    state[c] = enter;
    if (c < cells) token_class[c] = -1;
  }
#pragma unroll 1
  for (int64_t s = thread; s < states; s += kPathThreads) best[s] = s == enter ? 0.0f : -kInfinity;
  __syncthreads();

#pragma unroll 1
  for (int64_t c = begin; c < end; ++c) {
    const float* score = args.scores + (window * cells + c) * automaton.classes;
#pragma unroll 1
    for (int64_t first = 0; first < states; first += kPathGroups) {
      const int64_t s = first + thread / kPathLanes;
      const Step step = best_step(automaton, s, best, score);
      if (thread % kPathLanes != 0 || s >= states) continue;
      next[s] = step.sum;
      scratch.taken[c * states + s] = step.edge;
    }
    __syncthreads();
    float* const swapped = best;
    best = next;
    next = swapped;
  }

  PathEnd last;
#pragma unroll 1
  for (int64_t s = thread; s < states; s += kPathThreads) {
    const PathEnd here = PathEnd::of(automaton, s, best[s], args.room[window]);
    if (last.below(here)) last = here;
  }
  last = merge_block(last, of_warps, [](PathEnd& a, const PathEnd& b) {
    if (a.below(b)) a = b;
  });
  if (thread != 0 || !last.exists()) return;
  int64_t at = last.state;
#pragma unroll 1
  for (int64_t c = end; c <= cells; ++c) state[c] = at;
#pragma unroll 1
  for (int64_t c = end - 1; c >= begin; --c) {
    const int32_t edge = scratch.taken[c * states + at];
    token_class[c] = automaton.token_class[edge];
    state[c] = at = automaton.origin[edge];
  }
}

}  // namespace

int64_t best_path_scratch(const BestPathArgs& args) {
  return args.windows * PathScratch::bytes(args);
}

int best_path(const BestPathArgs& args, const Workspace& workspace, void* stream) {
  if (args.windows == 0) return 0;
  DPARALLEL_LAUNCH(best_path_kernel, args.windows, kPathThreads, stream, args, workspace.scratch);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace dparallel::cuda
