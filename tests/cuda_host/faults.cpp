// Faulty kernels, to see that cuda_host catches each. Usage: faults NAME; exits 0 if nothing was
// noticed.
#include <string>
#include <vector>

#include "cuda_host.h"

namespace {

__global__ void race(int* out) {
  __shared__ int value[64];
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

}  // namespace

int main(int, char** argv) {
  const std::string name = argv[1];
  std::vector<int> ints(64);
  cuda_host::seed(1);
  if (name == "race") {
    DPARALLEL_LAUNCH(race, 1, 64, nullptr, ints.data());
    for (int i = 0; i < 64; ++i)
      if (ints[i] != 63 - i) return 1;
  } else if (name == "divergent_barrier") {
    cuda_host::launch(1, 64, [] { divergent_barrier(); });
  } else if (name == "overrun") {
    std::vector<float> data(64), out(64);
    DPARALLEL_LAUNCH(overrun, 1, 64, nullptr, data.data(), out.data());
  } else if (name == "misaligned") {
    alignas(16) float data[8] = {};
    uint4 out;
    DPARALLEL_LAUNCH(misaligned, 1, 1, nullptr, data, &out);
  } else if (name == "partial_shuffle") {
    DPARALLEL_LAUNCH(partial_shuffle, 1, 32, nullptr, ints.data());
  }
  return 0;
}
