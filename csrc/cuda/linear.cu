// linear: a product of few rows that reads its weights once (product.cuh).
//
// Work: 32 rows of x through a layer of LLaDA-8B, 4096 -> 12288, read 100 MB of weights, 0.25 MB of
// x, and write 0.75 MB; 3.2 GFLOP.
#include "product.cuh"

namespace dparallel::cuda {

int linear(const LinearArgs& args, void* stream) {
  return product<SixteenBits>(args, nullptr, stream);
}

}  // namespace dparallel::cuda
