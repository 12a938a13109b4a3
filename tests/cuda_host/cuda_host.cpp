#include "cuda_host.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

Index threadIdx{0}, blockIdx{0};

namespace cuda_host {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kReady = -1, kDone = -2;  // else the barrier waited at: 0 the block's, 1 + w warp w's

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  int state = kReady;
};

std::mt19937_64 random_engine;
std::vector<Fiber> fibers;
std::vector<unsigned> arrived;     // at each barrier
std::vector<uint32_t> lane_slots;  // [threads]
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
unsigned live = 0, size = 0;

void leave(int state) {
  Fiber& self = fibers[threadIdx.x];
  self.state = state;
  swapcontext(&self.context, &scheduler);
}

void release(int barrier) {
  arrived[barrier] = 0;
  for (unsigned t = 0; t < size; ++t)
    if (fibers[t].state == barrier) fibers[t].state = kReady;
}

void wait(int barrier, unsigned expected) {
  if (++arrived[barrier] == expected) {
    release(barrier);
    leave(kReady);
  } else {
    leave(barrier);
  }
}

void run_fiber() {
  (*body)();
  --live;
  if (live > 0 && arrived[0] == live)
    release(0);  // threads that have left do not hold up a barrier
  leave(kDone);
}

void run_block(unsigned block) {
  live = size = block;
  arrived.assign(1 + (block + 31) / 32, 0);
  lane_slots.assign((block + 31) / 32 * 32, 0);
  while (fibers.size() < block) fibers.emplace_back();
  for (unsigned t = 0; t < block; ++t) {
    getcontext(&fibers[t].context);
    fibers[t].context.uc_stack.ss_sp = fibers[t].stack.get();
    fibers[t].context.uc_stack.ss_size = kStack;
    fibers[t].context.uc_link = nullptr;
    fibers[t].state = kReady;
    makecontext(&fibers[t].context, run_fiber, 0);
  }
  std::vector<unsigned> order(block);
  std::iota(order.begin(), order.end(), 0u);
  while (live > 0) {
    std::shuffle(order.begin(), order.end(), random_engine);
    bool ran = false;
    for (const unsigned t : order) {
      if (fibers[t].state != kReady) continue;
      ran = true;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
    }
    if (!ran) fail("a barrier that not every thread reaches");
  }
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::_Exit(3);
}

void seed(uint64_t value) { random_engine.seed(value); }

void yield() {
  if (random_engine() % 2) leave(kReady);
}

void block_barrier() { wait(0, live); }

void warp_barrier() {
  const int warp = static_cast<int>(threadIdx.x / 32);
  wait(1 + warp, 32);
}

uint32_t& lane_slot(unsigned lane) { return lane_slots[threadIdx.x / 32 * 32 + lane]; }

void launch(unsigned grid, unsigned block, const std::function<void()>& thread) {
  body = &thread;
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_engine);
  for (const unsigned b : order) {
    blockIdx.x = b;
    run_block(block);
  }
}

}  // namespace cuda_host
