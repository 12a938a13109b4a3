#include "cuda_host.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "dparallel/numeric.h"
#include "fiber.h"
#include "races.h"

Index threadIdx{0}, blockIdx{0};
const char* cuda_host::own_stack = nullptr;
bool cuda_host::looks_for_races = false, cuda_host::before_wait = false;

namespace cuda_host {
namespace {

constexpr unsigned kTeam = Epoch::kTeam, kMostTeams = 1024 / kTeam;  // threads; of a block
constexpr size_t kMostShared[] = {99 * 1024, 227 * 1024};  // of a block, without and with clusters
// State of a thread; else the barrier waited at: 0 the block's, then the teams', then the warps'.
constexpr int kReady = -1, kDone = -2, kAtCluster = -3;

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned barriers = 0, team_barriers = 0, exchanges = 0, fences = 0;  // so far
  ThreadClock clock;
  std::vector<std::pair<void*, const void*>> copies;  // begun
  std::vector<size_t> groups;                         // how many of them, of each group
  bool waits = false;                                 // for the kernels before
};

struct Lane {
  alignas(16) char bytes[kLaneBytes];
};

struct SharedMemory {
  std::unique_ptr<char[]> bytes;
  size_t size = 0;
};

struct Block;

// Blocks in flight together.
struct Cluster {
  std::vector<Block*> blocks;
  unsigned arrived = 0;  // threads at its barrier

  unsigned live() const;
  bool stuck() const;
};

// A block in flight.
struct Block {
  Cluster* cluster;
  unsigned index, size, live, ready;
  unsigned period;  // it runs in one round of so many
  std::vector<Fiber> fibers;
  std::vector<int> states;        // [threads]
  std::vector<unsigned> arrived;  // at each barrier
  std::vector<Lane> lanes[2];     // [threads], of every other exchange
  std::map<const void*, SharedMemory> shared;
  Clock known, incoming;  // to every thread; from those that wait at the barrier
};

// SplitMix64: the scheduler draws more often than anything else here.
struct Random {
  uint64_t state = 0;

  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned n) { return static_cast<unsigned>(((*this)() >> 32) * n >> 32); }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i)
      std::swap(items[i - 1], items[below(static_cast<unsigned>(i))]);
  }
};

Random random_engine;
unsigned fixed_resident = 0;
bool clusters_on = true, barriers_on = true;
Shadow shadow;
std::map<const void*, Clock> handed_on;  // by the atomics on an address
bool in_atomic = false;
std::vector<std::unique_ptr<Block>> pool;
Block* current = nullptr;
Context scheduler;
std::vector<std::pair<Block*, unsigned>> turns;  // threads that run in this round, one by one
size_t next_turn = 0;
const Body* body = nullptr;
bool launch_is_early = false;

unsigned Cluster::live() const {
  unsigned live = 0;
  for (const Block* block : blocks) live += block->live;
  return live;
}

bool Cluster::stuck() const {
  for (const Block* block : blocks)
    if (block->ready > 0) return false;
  return true;
}

void set_state(Block& block, unsigned thread, int state) {
  block.ready += (state == kReady) - (block.states[thread] == kReady);
  block.states[thread] = state;
}

unsigned below(unsigned n) { return random_engine.below(n); }

// The thread whose turn is next runs, behind the last of a round the scheduler. Threads hand on to
// each other: to most of them `leave` then returns where the processor expects it.
void hand_on(Context& from) {
  if (next_turn == turns.size()) return from.switch_to(scheduler);
  const auto [block, thread] = turns[next_turn++];
  Fiber& fiber = block->fibers[thread];
  current = block;
  threadIdx.x = thread;
  blockIdx.x = block->index;
  own_stack = fiber.stack.get();
  before_wait = fiber.waits;
  from.switch_to(fiber.context);
}

void leave(int state) {
  set_state(*current, threadIdx.x, state);
  hand_on(current->fibers[threadIdx.x].context);
}

void release(int barrier) {
  current->arrived[barrier] = 0;
  if (barrier == 0) {
    current->known.learn(current->incoming);
    current->incoming.clear();
  }
  const auto number = static_cast<unsigned>(barrier);
  const unsigned width = number == 0 ? current->size : number <= kMostTeams ? kTeam : 32;
  const unsigned first =
      number == 0 ? 0 : width * (number - 1 - (number <= kMostTeams ? 0 : kMostTeams));
  for (unsigned t = first; t < std::min(first + width, current->size); ++t)
    if (current->states[t] == barrier) set_state(*current, t, kReady);
}

void wait(int barrier, unsigned expected) {
  if (++current->arrived[barrier] == expected) {
    release(barrier);
    leave(kReady);
  } else {
    leave(barrier);
  }
}

// Every thread that has not left is at the cluster's barrier: each block knows what the others did.
void release(Cluster& cluster) {
  Clock all;
  for (Block* block : cluster.blocks) {
    all.learn(block->known);
    all.learn(block->incoming);
    block->incoming.clear();
    for (unsigned t = 0; t < block->size; ++t)
      if (block->states[t] == kAtCluster)
        all.learn(Epoch{block->index, Epoch::kAny, block->fibers[t].barriers + 1, 0});
  }
  cluster.arrived = 0;
  for (Block* block : cluster.blocks) {
    block->known = all;
    for (unsigned t = 0; t < block->size; ++t)
      if (block->states[t] == kAtCluster) set_state(*block, t, kReady);
  }
}

Epoch now() {
  const Fiber& self = current->fibers[threadIdx.x];
  return {current->index, threadIdx.x, self.barriers, self.fences, self.team_barriers};
}

bool happened_before(const Epoch& access) {
  const Epoch here = now();
  if (access.block != here.block)
    return current->known.covers(access) || current->fibers[threadIdx.x].clock.known.covers(access);
  if (access.thread == here.thread || access.barriers < here.barriers) return true;
  return access.team() == here.team() && access.team_barriers < here.team_barriers;
}

void run_fiber() {
  (*body)();
  if (before_wait) fail("a thread of an early launch that does not wait");
  --current->live;
  if (current->live > 0 && current->arrived[0] == current->live)
    release(0);  // threads that have left do not hold up a barrier
  Cluster& cluster = *current->cluster;
  if (cluster.arrived > 0 && cluster.arrived == cluster.live()) release(cluster);
  leave(kDone);
}

void start(Block& block, unsigned index, unsigned threads) {
  const unsigned periods[] = {1, 1, 2, 16};
  block.index = index;
  block.live = block.size = block.ready = threads;
  block.period = periods[below(4)];
  block.arrived.assign(1 + kMostTeams + (threads + 31) / 32, 0);
  for (auto& lanes : block.lanes) lanes.resize((threads + 31) / 32 * 32);
  block.shared.clear();
  block.known.clear();
  block.incoming.clear();
  while (block.fibers.size() < threads) block.fibers.emplace_back();
  block.states.assign(threads, kReady);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    // Stacks begin at different cache lines of a page, else all compete for the same few sets.
    fiber.context.start(fiber.stack.get(), kStack - t % 64 * 64, run_fiber);
    fiber.barriers = fiber.team_barriers = fiber.exchanges = fiber.fences = 0;
    fiber.clock = {};
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.waits = launch_is_early;
  }
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::_Exit(3);
}

void seed(uint64_t value) { random_engine.state = value; }

void resident(unsigned blocks) { fixed_resident = blocks; }

void clusters(bool on) { clusters_on = on; }

bool has_clusters() { return clusters_on; }

void wait_for_earlier() { before_wait = current->fibers[threadIdx.x].waits = false; }

bool chance(unsigned of) { return below(of) == 0; }

void yield(unsigned of) {
  if (chance(of)) leave(kReady);
}

void barriers(bool on) { barriers_on = on; }

void block_barrier() {
  if (!barriers_on) return yield();
  Fiber& self = current->fibers[threadIdx.x];
  current->incoming.learn(self.clock.known);
  self.clock.known.clear();
  wait(0, current->live);
  ++self.barriers;
}

void team_barrier() {
  if (!barriers_on) return yield();
  const unsigned team = threadIdx.x / kTeam;
  if (current->size < (team + 1) * kTeam) fail("a team of too few threads");
  wait(1 + static_cast<int>(team), kTeam);
  ++current->fibers[threadIdx.x].team_barriers;
}

void cluster_barrier() {
  Fiber& self = current->fibers[threadIdx.x];
  Cluster& cluster = *current->cluster;
  current->incoming.learn(self.clock.known);
  self.clock.known.clear();
  set_state(*current, threadIdx.x, kAtCluster);
  if (++cluster.arrived == cluster.live()) release(cluster);
  leave(current->states[threadIdx.x]);
  ++self.barriers;
}

const void* peer(const void* p, unsigned rank) {
  if (rank >= current->cluster->blocks.size()) fail("no such block in the cluster");
  const Block& other = *current->cluster->blocks[rank];
  if (other.live == 0) fail("shared memory of a block that has left");
  for (const auto& [key, mine] : current->shared) {
    const auto at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(mine.bytes.get());
    if (at >= mine.size) continue;
    const auto found = other.shared.find(key);
    if (found == other.shared.end()) fail("shared memory of a block that has not begun");
    return found->second.bytes.get() + at;
  }
  fail("not an address in shared memory");
}

void look(const void* p, size_t bytes, bool writes) {
  if (current == nullptr || in_atomic) return;
  yield(64);
  if (!shadow.access(reinterpret_cast<uintptr_t>(p), bytes, writes, now(), happened_before))
    fail("a race");
}

void fence() {
  yield();
  if (!looks_for_races) return;
  Fiber& self = current->fibers[threadIdx.x];
  ++self.fences;
  self.clock.known.learn(self.clock.pending);
  self.clock.pending.clear();
  self.clock.fenced = current->known;
  self.clock.fenced.learn(self.clock.known);
  self.clock.fenced.learn(now());
}

void atomic_begins(const void* p) {
  yield();
  if (looks_for_races) {
    ThreadClock& clock = current->fibers[threadIdx.x].clock;
    clock.pending.learn(handed_on[p]);
    handed_on[p].learn(clock.fenced);
  }
  in_atomic = true;
}

void atomic_ends() {
  in_atomic = false;
  yield();
}

const char* exchange(const void* mine, size_t bytes) {
  if (bytes > kLaneBytes) fail("an exchange of too many bytes");
  const unsigned first = threadIdx.x / 32 * 32;
  // A lane that is one exchange ahead writes the other half; it cannot be two ahead.
  std::vector<Lane>& lanes = current->lanes[current->fibers[threadIdx.x].exchanges++ % 2];
  char* own = lanes[threadIdx.x].bytes;
  switch (bytes) {  // known: a few moves; else a call, which the sanitizer looks into
    case 1: std::memcpy(own, mine, 1); break;
    case 4: std::memcpy(own, mine, 4); break;
    case 8: std::memcpy(own, mine, 8); break;
    case 24: std::memcpy(own, mine, 24); break;
    default: std::memcpy(own, mine, bytes);
  }
  wait(static_cast<int>(1 + kMostTeams + first / 32), 32);
  return lanes[first].bytes;
}

void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool brain) {
  struct Fragments {
    uint16_t a[4][2], b[2][2];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b[0], &b0, sizeof b0);
  std::memcpy(mine.b[1], &b1, sizeof b1);
  const char* all = exchange(&mine, sizeof mine);
  const auto of = [all](unsigned lane) {
    Fragments f;
    std::memcpy(&f, all + kLaneBytes * lane, sizeof f);
    return f;
  };
  const auto value = brain ? dparallel::bfloat16_value : dparallel::float16_value;
  const unsigned g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (unsigned quad = 0; quad < 4; ++quad) {
    const Fragments row = of(4 * g + quad);
    const Fragments columns[] = {of(4 * (2 * q) + quad), of(4 * (2 * q + 1) + quad)};
    for (unsigned k = 0; k < 4; ++k) {
      const float above = value(row.a[k / 2 * 2][k % 2]),
                  below = value(row.a[k / 2 * 2 + 1][k % 2]);
      for (unsigned i = 0; i < 2; ++i) {
        const float by = value(columns[i].b[k / 2][k % 2]);
        c[i] += above * by;
        c[2 + i] += below * by;
      }
    }
  }
}

bool in_shared_memory(const void* p, size_t bytes) {
  for (const auto& [key, memory] : current->shared) {
    const auto at =
        reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(memory.bytes.get());
    if (at < memory.size && bytes <= memory.size - at) return true;
  }
  return false;
}

void* shared_memory(const void* key, size_t bytes) {
  SharedMemory& shared = current->shared[key];
  auto& memory = shared.bytes;
  if (memory == nullptr) {
    memory.reset(new char[bytes]);
    shared.size = bytes;
    size_t all = 0;
    for (const auto& [_, part] : current->shared) all += part.size;
    if (all > kMostShared[has_clusters()]) fail("more shared memory than a block may have");
    shadow.forget(reinterpret_cast<uintptr_t>(memory.get()), bytes);  // another block's, once
    std::memset(memory.get(), 0xff, bytes);  // NaN to whoever reads it before it is written
  }
  return memory.get();
}

void copy(void* to, const void* from) {
  touch(to, 16, true);
  if (from != nullptr) touch(from, 16, false);
  if (from == nullptr) std::memset(to, 0, 16);
  else std::memcpy(to, from, 16);
}

void copy_later(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("misaligned copy");
  if (before_wait && from != nullptr) look_early(from, 16, false);
  if (chance(2)) return copy(to, from);
  touch(to, 16, true);
  std::memset(to, 0xff, 16);
  current->fibers[threadIdx.x].copies.emplace_back(to, from);
}

void commit_copies() {
  Fiber& self = current->fibers[threadIdx.x];
  size_t older = 0;
  for (const size_t group : self.groups) older += group;
  self.groups.push_back(self.copies.size() - older);
}

void finish_copies(unsigned pending) {
  Fiber& self = current->fibers[threadIdx.x];
  for (; self.groups.size() > pending; self.groups.erase(self.groups.begin())) {
    const auto end = self.copies.begin() + static_cast<std::ptrdiff_t>(self.groups.front());
    for (auto it = self.copies.begin(); it != end; ++it) copy(it->first, it->second);
    self.copies.erase(self.copies.begin(), end);
  }
}

void launch(int64_t blocks_of_grid, unsigned threads, Body thread, unsigned cluster, bool early) {
  if (launch_fails(blocks_of_grid)) return;
  const auto grid = static_cast<unsigned>(blocks_of_grid);
  launch_frame = static_cast<const char*>(__builtin_frame_address(0));
  launch_is_early = early && watches_early;
  const unsigned limits[] = {1, 2, 3, 8};
  const unsigned blocks = fixed_resident > 0 ? fixed_resident : limits[below(4)];
  const unsigned limit = (blocks + cluster - 1) / cluster;  // clusters in flight
  const bool uneven = chance(2);  // threads fall behind others of their block
  if (grid == 0) fail("a launch of no blocks");
  if (grid % cluster != 0) fail("a grid of parts of clusters");
  body = &thread;
  shadow.clear();
  handed_on.clear();
  std::vector<unsigned> order(grid / cluster);
  std::iota(order.begin(), order.end(), 0u);
  random_engine.shuffle(order);
  while (pool.size() < limit * cluster) pool.push_back(std::make_unique<Block>());
  std::vector<Block*> idle;
  for (auto& block : pool) idle.push_back(block.get());
  std::vector<std::unique_ptr<Cluster>> flying;
  while (!order.empty() || !flying.empty()) {
    for (; flying.size() < limit && !order.empty(); order.pop_back()) {
      flying.push_back(std::make_unique<Cluster>());
      for (unsigned rank = 0; rank < cluster; ++rank) {
        start(*idle.back(), order.back() * cluster + rank, threads);
        idle.back()->cluster = flying.back().get();
        flying.back()->blocks.push_back(idle.back());
        idle.pop_back();
      }
    }
    turns.clear();
    next_turn = 0;
    for (const auto& together : flying) {
      if (together->stuck()) {
        blockIdx.x = together->blocks[0]->index;
        fail("a barrier that not every thread reaches");
      }
      for (Block* block : together->blocks) {
        if (block->ready == 0 || !chance(block->period)) continue;
        uint64_t taken = 0;  // a bit for each of 64 threads
        for (unsigned t = 0; t < threads; ++t) {
          if (t % 64 == 0) taken = uneven ? random_engine() : ~uint64_t{0};
          if (block->states[t] == kReady && (taken >> t % 64 & 1) != 0)
            turns.emplace_back(block, t);
        }
      }
    }
    random_engine.shuffle(turns);
    if (!turns.empty()) hand_on(scheduler);
    for (size_t i = flying.size(); i-- > 0;) {
      if (flying[i]->live() > 0) continue;
      idle.insert(idle.end(), flying[i]->blocks.begin(), flying[i]->blocks.end());
      flying.erase(flying.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  current = nullptr;
  own_stack = nullptr;
  before_wait = false;
}

}  // namespace cuda_host
