// Faulty kernels, to see that cuda_host catches each. Usage: faults [--races] NAME [RESIDENT], the
// blocks in flight at once (default: drawn); exits 0 if nothing was noticed.
#include <string>
#include <vector>

#include "cluster.cuh"
#include "mma.cuh"

namespace {

__global__ void race(int* out) {
  DPARALLEL_SHARED(value, int[64]);
  value[threadIdx.x] = static_cast<int>(threadIdx.x);
  cuda_host::yield();  // where __syncthreads() should be
  out[threadIdx.x] = value[63 - threadIdx.x];
  value[threadIdx.x] = -1;
}

__global__ void divergent_barrier() {
  if (threadIdx.x % 2) __syncthreads();
  else __shfl_down_sync(0xffffffffu, 0, 1);
}

__global__ void overrun(const float* data, float* out) { out[threadIdx.x] = data[threadIdx.x + 1]; }

__global__ void misaligned(const float* data, uint4* out) {
  *out = __ldcs(reinterpret_cast<const uint4*>(data + 1));
}

__global__ void partial_shuffle(int* out) {
  *out = __shfl_down_sync(0x0000ffffu, static_cast<int32_t>(threadIdx.x), 1);
}

// Copies 16 bytes a thread into shared memory and reads a neighbour's.
__global__ void copied(const uint4* data, uint4* out, bool waits) {
  DPARALLEL_SHARED(tile, uint4[32]);
  dparallel::cuda::copy_async(tile + threadIdx.x, data + threadIdx.x, true);
  if (waits) dparallel::cuda::wait_for_copies();
  __syncthreads();
  out[threadIdx.x] = tile[31 - threadIdx.x];
}

// Whether the neighbours' bytes come out.
bool copies(bool waits) {
  std::vector<uint4> data(32), out(32);
  for (uint32_t i = 0; i < 32; ++i) data[i] = {i, i, i, i};
  DPARALLEL_LAUNCH(copied, 1, 32, nullptr, data.data(), out.data(), waits);
  for (uint32_t i = 0; i < 32; ++i)
    if (out[i].x != 31 - i) return false;
  return true;
}

// Every block writes its shared memory and reads that of the next in its cluster of four.
enum Cluster { kTogether, kTooSoon, kGone, kElsewhere };

__global__ void of_peers(float* out, Cluster cluster) {
  DPARALLEL_SHARED(value, float[32]);
  const unsigned rank = blockIdx.x % 4;
  if (cluster == kTooSoon) dparallel::cuda::cluster_barrier();
  value[threadIdx.x] = static_cast<float>(100 * rank + threadIdx.x);
  if (cluster != kTooSoon) dparallel::cuda::cluster_barrier();
  const unsigned peer = cluster == kElsewhere ? 4 : (rank + 1) % 4;
  out[32 * blockIdx.x + threadIdx.x] =
      dparallel::cuda::load_of_peer(value + 31 - threadIdx.x, peer);
  if (cluster != kGone) dparallel::cuda::cluster_barrier();
}

bool reads_peers(Cluster cluster) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    cuda_host::seed(seed);
    std::vector<float> out(32 * 8);
    const dparallel::cuda::LargeShared none;
    (void)DPARALLEL_LAUNCH_CLUSTERS(of_peers, 8, 4, 32, none, false, nullptr, out.data(), cluster);
    for (int i = 0; i < 32 * 8; ++i)
      if (out[i] != static_cast<float>(100 * ((i / 32 + 1) % 4) + 31 - i % 32)) return false;
  }
  return true;
}

// An early launch that doubles a number of the kernel before, by a constant factor.
enum Early { kWaits, kReadsTooSoon, kCopiesTooSoon, kWritesTooSoon, kNeverWaits };

__global__ void doubled(const float* numbers, const uint4* rows, const float* two, float* out,
                        Early early) {
  DPARALLEL_SHARED(row, uint4[32]);
  const float by = *two;
  float x = 0.0f;
  if (early == kReadsTooSoon) x = numbers[threadIdx.x];
  if (early == kCopiesTooSoon) dparallel::cuda::copy_async(row + threadIdx.x, rows, true);
  if (early == kWritesTooSoon) out[threadIdx.x] = 0.0f;
  if (early != kNeverWaits || threadIdx.x > 0) dparallel::cuda::wait_for_earlier();
  if (early != kNeverWaits) out[threadIdx.x] = by * (x + numbers[threadIdx.x]);
}

bool doubles(Early early) {
  std::vector<float> numbers(32, 1.0f), two(1, 2.0f), out(32);
  std::vector<uint4> rows(1);
  cuda_host::watches_early = true;
  cuda_host::constant(two.data(), sizeof(float));
  return DPARALLEL_LAUNCH_EARLY(doubled, 1, 32, nullptr, numbers.data(), rows.data(), two.data(),
                                out.data(), early) == 0 &&
         out[31] == 2.0f;
}

// Two launches of a kernel, which agree about the most shared memory that it has, or not.
__global__ void roomy() {}

bool agree(size_t most) {
  for (const auto& shared : {dparallel::cuda::LargeShared{72, 80}, {80, most}})
    if (DPARALLEL_LAUNCH_CLUSTERS(roomy, 1, 1, 32, shared, false, nullptr) != 0) return false;
  return true;
}

// A block of all the shared memory that there is, or of a number more.
__global__ void crowded(bool out) {
  DPARALLEL_LARGE_SHARED(all, char[227 * 1024]);
  all[threadIdx.x] = 0;
  if (!out) return;
  DPARALLEL_SHARED(number, int);
  number = 0;
}

// Two teams reverse what is theirs, or, where they are confused, one what the other's is.
__global__ void of_team(int* out, bool confused) {
  DPARALLEL_SHARED(value, int[256]);
  value[threadIdx.x] = static_cast<int>(threadIdx.x);
  dparallel::cuda::team_barrier();
  const unsigned team = threadIdx.x / 128 ^ (confused ? 1 : 0);
  out[threadIdx.x] = value[128 * team + 127 - threadIdx.x % 128];
}

bool reverses(bool confused) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    cuda_host::seed(seed);
    std::vector<int> out(256);
    DPARALLEL_LAUNCH(of_team, 1, 256, nullptr, out.data(), confused);
    for (int i = 0; i < 256; ++i)
      if (out[i] != ((i / 128) ^ (confused ? 1 : 0)) * 128 + 127 - i % 128) return false;
  }
  return true;
}

// What every kernel that is merged by its last block does, sound, or with one fault: each thread of
// each block writes a part, and the last block to arrive adds them all up.
enum Merge {
  kSound,
  kLostUpdate,
  kNotReset,
  kNoBarrier,
  kArrivesFirst,
  kNoRelease,
  kNoAcquire,
  kMerges
};

__device__ bool arrive(int32_t* counter, int32_t expected, Merge merge) {
  DPARALLEL_SHARED(last, bool);
  if (merge != kNoBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (merge != kNoRelease) __threadfence();
    if (merge == kLostUpdate) {
      const int32_t before = *counter;
      cuda_host::yield();  // a load and a store where an atomic should be
      *counter = before + 1;
      last = before == expected - 1;
      if (last) *counter = 0;
    } else {
      last = atomicAdd(counter, 1) == expected - 1;
      if (last && merge != kNotReset) *counter = 0;
    }
    if (merge != kNoAcquire) __threadfence();
  }
  __syncthreads();
  return last;
}

__global__ void merged(int* parts, int32_t* counter, int64_t* total, int32_t blocks, Merge merge) {
  const int32_t size = 32 * blocks, mine = static_cast<int32_t>(32 * blockIdx.x + threadIdx.x);
  if (merge == kArrivesFirst) {
    const bool last = arrive(counter, blocks, merge);
    parts[mine] = mine;
    __syncthreads();
    if (!last) return;
  } else {
    parts[mine] = mine;
    if (!arrive(counter, blocks, merge)) return;
  }
  int32_t sum = 0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < size; i += 32) sum += __ldcg(parts + i);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x == 0) *total = sum;
}

// Whether two launches in a row yield what they should and leave the counter at zero.
bool merges(Merge merge) {
  constexpr int32_t kBlocks = 6;
  int32_t counter = 0;
  for (int launch = 0; launch < 2; ++launch) {
    std::vector<int> parts(32 * kBlocks, -1000000);
    int64_t total = -1;
    DPARALLEL_LAUNCH(merged, kBlocks, 32, nullptr, parts.data(), &counter, &total, kBlocks, merge);
    if (total != 32 * kBlocks * (32 * kBlocks - 1) / 2 || counter != 0) return false;
  }
  return true;
}

// As commit: every block writes its tokens, and the last to arrive counts those of all; or one
// counts at once.
__global__ void counted(int* tokens, int32_t* counter, int* total, int blocks, bool waits) {
  DPARALLEL_SHARED(sum, int);
  tokens[32 * blockIdx.x + threadIdx.x] = 1;
  if (waits ? !arrive(counter, blocks, kSound) : blockIdx.x != 0) return;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 32 * blocks; i += 32)
    atomicAdd(&sum, __ldcg(tokens + i));
  __syncthreads();
  if (threadIdx.x == 0) *total = sum;
}

bool counts(bool waits) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    cuda_host::seed(seed);
    std::vector<int> tokens(32 * 6);
    int32_t counter = 0;
    int total = -1;
    DPARALLEL_LAUNCH(counted, 6, 32, nullptr, tokens.data(), &counter, &total, 6, waits);
    if (total != 32 * 6 || counter != 0) return false;
  }
  return true;
}

// As unmask: a block for each window announces the rows that are its own, those that it is the
// first to hold, and a block for each row arrives at the window that it takes for its own: the
// first, or the last that holds it. Whoever brings the counter of a window to zero settles it.
__global__ void owned(const int* ends, int windows, int rows, int32_t* counters, int* settled,
                      bool first) {
  int w = static_cast<int>(blockIdx.x), change = 0;
  if (w < windows) {  // windows [0, ends[w])
    for (int row = 0; row < rows; ++row) {
      int owner = 0;
      while (owner < windows && row >= ends[owner]) ++owner;
      change -= owner == w;
    }
  } else {
    const int row = w - windows, lane = static_cast<int>(threadIdx.x);
    const unsigned holders = __ballot_sync(0xffffffffu, lane < windows && row < ends[lane]);
    if (holders == 0) return;
    w = first ? __ffs(holders) - 1 : 31 - __builtin_clz(holders);
    change = 1;
  }
  if (dparallel::cuda::brings_to_zero(counters + w, change) && threadIdx.x == 0) ++settled[w];
}

bool settles(bool first) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    cuda_host::seed(seed);
    const std::vector<int> ends = {2, 5, 3};
    std::vector<int32_t> counters(3);
    std::vector<int> settled(3);
    DPARALLEL_LAUNCH(owned, 3 + 6, 32, nullptr, ends.data(), 3, 6, counters.data(), settled.data(),
                     first);
    for (int w = 0; w < 3; ++w)
      if (settled[w] != 1 || counters[w] != 0) return false;
  }
  return true;
}

// As kv_move: every thread reads a slot, and when all have, writes it where another read.
__global__ void moved(int* slots, const int* source, bool waits) {
  const int held = slots[source[threadIdx.x]];
  if (waits) __syncthreads();
  slots[threadIdx.x] = held;
}

bool moves(bool waits) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    cuda_host::seed(seed);
    std::vector<int> slots(64), source(64);
    for (int i = 0; i < 64; ++i) slots[i] = 100 + i, source[i] = (i + 1) % 64;
    DPARALLEL_LAUNCH(moved, 1, 64, nullptr, slots.data(), source.data(), waits);
    for (int i = 0; i < 64; ++i)
      if (slots[i] != 100 + (i + 1) % 64) return false;
  }
  return true;
}

// As row_topk: every thread lists a key, and when all have, its place is the number of larger ones.
__global__ void ranked(const int* keys, int* best, bool waits) {
  DPARALLEL_SHARED(listed, int[64]);
  DPARALLEL_SHARED(count, int);
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  listed[atomicAdd(&count, 1)] = keys[threadIdx.x];
  if (waits) __syncthreads();
  int larger = 0;
  for (int i = 0; i < count; ++i) larger += listed[i] > keys[threadIdx.x];
  best[larger] = keys[threadIdx.x];
}

bool ranks(bool waits) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    cuda_host::seed(seed);
    std::vector<int> keys(64), best(64, -1);
    for (int i = 0; i < 64; ++i) keys[i] = i * 37 % 64;
    DPARALLEL_LAUNCH(ranked, 1, 64, nullptr, keys.data(), best.data(), waits);
    for (int i = 0; i < 64; ++i)
      if (best[i] != 63 - i) return false;
  }
  return true;
}

// As accept: every row tells its parent of itself, the lowest child stays, and one thread follows.
enum Tree { kLinked, kLastChild, kWalkedTooSoon };

__global__ void linked(const int* parent, int* visited, Tree tree) {
  DPARALLEL_SHARED(child, int32_t[64]);
  const int row = static_cast<int>(threadIdx.x);
  child[row] = INT32_MAX;
  __syncthreads();
  if (row > 0) {
    int32_t& link = child[parent[row]];
    if (tree == kLastChild) {
      const int32_t held = link;
      cuda_host::yield();  // a load and a store where an atomic should be
      link = row < held ? row : held;
    } else {
      atomicMin(&link, row);
    }
  }
  if (tree != kWalkedTooSoon) __syncthreads();
  if (row == 0)
    for (int32_t at = 0; at != INT32_MAX; at = child[at]) *visited++ = at;
}

bool follows(Tree tree) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    cuda_host::seed(seed);
    std::vector<int> parent(64), visited(64, -1);
    for (int i = 1; i < 64; ++i) parent[i] = (i - 1) / 3;  // children 3p + 1 to 3p + 3
    DPARALLEL_LAUNCH(linked, 1, 64, nullptr, parent.data(), visited.data(), tree);
    const std::vector<int> path = {0, 1, 4, 13, 40, -1};
    for (size_t i = 0; i < path.size(); ++i)
      if (visited[i] != path[i]) return false;
  }
  return true;
}

// As distillation_loss: every warp writes its largest number of two rows, and when all have, every
// thread takes the largest of all.
__global__ void peaked(const int* student, const int* teacher, int* out, bool waits) {
  DPARALLEL_SHARED(tops, int[2][2]);
  int top[2] = {student[threadIdx.x], teacher[threadIdx.x]};
  for (int row = 0; row < 2; ++row) {
    for (int offset = 16; offset > 0; offset /= 2) {
      const int other = __shfl_xor_sync(0xffffffffu, top[row], offset);
      top[row] = other > top[row] ? other : top[row];
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32][row] = top[row];
  }
  if (waits) __syncthreads();
  for (int row = 0; row < 2; ++row)
    for (int warp = 0; warp < 2; ++warp)
      if (tops[warp][row] > top[row]) top[row] = tops[warp][row];
  out[threadIdx.x] = top[0] - top[1];
}

bool peaks(bool waits) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    cuda_host::seed(seed);
    std::vector<int> student(64), teacher(64), out(64);
    for (int i = 0; i < 64; ++i) student[i] = 100 + i * 37 % 64, teacher[i] = i * 29 % 64;
    DPARALLEL_LAUNCH(peaked, 1, 64, nullptr, student.data(), teacher.data(), out.data(), waits);
    for (int i = 0; i < 64; ++i)
      if (out[i] != 100) return false;
  }
  return true;
}

// As row_stats of ids: the last of them is out of bounds.
__global__ void gathered(const float* row, const int64_t* ids, int vocab, float* out, bool looks) {
  const int64_t id = ids[threadIdx.x];
  out[threadIdx.x] = looks && (id < 0 || id >= vocab) ? 0.0f : row[id];
}

}  // namespace

int main(int count, char** argv) {
  if (std::string(argv[1]) == "--races") {
    cuda_host::looks_for_races = true;
    ++argv, --count;
  }
  const std::string name = argv[1];
  const char* const names[] = {"sound",         "lost_update", "not_reset", "no_barrier",
                               "arrives_first", "no_release",  "no_acquire"};
  std::vector<int> ints(64);
  cuda_host::resident(count > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0);
  for (int merge = kSound; merge < kMerges; ++merge)
    for (uint64_t seed = 0; name == names[merge] && seed < 100; ++seed) {
      cuda_host::seed(seed);
      if (!merges(static_cast<Merge>(merge))) return 1;
    }
  cuda_host::seed(1);
  if (name == "race") {
    DPARALLEL_LAUNCH(race, 1, 64, nullptr, ints.data());
    for (int i = 0; i < 64; ++i)
      if (ints[i] != 63 - i) return 1;
  } else if (name == "divergent_barrier") {
    cuda_host::launch(1, 64, [] { divergent_barrier(); });
  } else if (name == "copied" || name == "not_waited") {
    return copies(name == "copied") ? 0 : 1;
  } else if (name == "counted" || name == "counted_too_soon") {
    return counts(name == "counted") ? 0 : 1;
  } else if (name == "owned" || name == "owned_by_another") {
    return settles(name == "owned") ? 0 : 1;
  } else if (name == "moved" || name == "moved_too_soon") {
    return moves(name == "moved") ? 0 : 1;
  } else if (name == "ranked" || name == "ranked_too_soon") {
    return ranks(name == "ranked") ? 0 : 1;
  } else if (name == "linked" || name == "last_child" || name == "walked_too_soon") {
    return follows(name == "linked"       ? kLinked
                   : name == "last_child" ? kLastChild
                                          : kWalkedTooSoon)
               ? 0
               : 1;
  } else if (name == "peaked" || name == "peaked_too_soon") {
    return peaks(name == "peaked") ? 0 : 1;
  } else if (name == "gathered" || name == "gathered_beyond") {
    std::vector<float> row(64), out(32);
    std::vector<int64_t> ids(32, 64);
    DPARALLEL_LAUNCH(gathered, 1, 32, nullptr, row.data(), ids.data(), 64, out.data(),
                     name == "gathered");
  } else if (name == "teams" || name == "teams_confused") {
    return reverses(name == "teams_confused") ? 0 : 1;
  } else if (name == "peers") {
    return reads_peers(kTogether) ? 0 : 1;
  } else if (name == "peers_too_soon") {
    return reads_peers(kTooSoon) ? 0 : 1;
  } else if (name == "peer_gone") {
    return reads_peers(kGone) ? 0 : 1;
  } else if (name == "peer_elsewhere") {
    return reads_peers(kElsewhere) ? 0 : 1;
  } else if (name == "early" || name == "read_too_soon" || name == "copied_too_soon" ||
             name == "written_too_soon" || name == "never_waits") {
    return doubles(name == "early"              ? kWaits
                   : name == "read_too_soon"    ? kReadsTooSoon
                   : name == "copied_too_soon"  ? kCopiesTooSoon
                   : name == "written_too_soon" ? kWritesTooSoon
                                                : kNeverWaits)
               ? 0
               : 1;
  } else if (name == "roomy" || name == "room_changes") {
    return agree(name == "roomy" ? 80 : 81) ? 0 : 1;
  } else if (name == "crowded" || name == "crowded_out") {
    DPARALLEL_LAUNCH(crowded, 1, 32, nullptr, name == "crowded_out");
  } else if (name == "overrun") {
    std::vector<float> data(64), out(64);
    DPARALLEL_LAUNCH(overrun, 1, 64, nullptr, data.data(), out.data());
  } else if (name == "no_blocks") {
    DPARALLEL_LAUNCH(overrun, 0, 64, nullptr, nullptr, nullptr);
  } else if (name == "too_many_blocks") {  // of which 32 bits hold one
    DPARALLEL_LAUNCH(overrun, (int64_t{1} << 32) + 1, 64, nullptr, nullptr, nullptr);
    return cudaGetLastError() != 0 ? 0 : 1;
  } else if (name == "misaligned") {
    alignas(16) float data[8] = {};
    uint4 out;
    DPARALLEL_LAUNCH(misaligned, 1, 1, nullptr, data, &out);
  } else if (name == "partial_shuffle") {
    DPARALLEL_LAUNCH(partial_shuffle, 1, 32, nullptr, ints.data());
  }
  return 0;
}
