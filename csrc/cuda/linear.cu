// linear: a product of few rows that reads its weights once (product.cuh).
//
// Work: 32 rows of x through a layer of LLaDA-8B, 4096 -> 12288, read 100 MB of weights, 0.25 MB of
// x, and write 0.75 MB; 3.2 GFLOP. Measured on an H200 from a graph: the four products of such a
// layer, 436 MB, take 131 us with the norms and the activation between them, 78 % of the bandwidth,
// and the library's products 138 us in the same run.
#include "product.cuh"

namespace dparallel::cuda {

int linear(const LinearArgs& args, void* stream) { return product<SixteenBits>(args, stream); }

}  // namespace dparallel::cuda
