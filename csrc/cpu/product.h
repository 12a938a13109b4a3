// linear and fp8_linear on the CPU: runs of the weights' rows in parallel, for some rows of x at a
// time, widened to float32 (for dots of bfloat16 copied) once for all of them.
#pragma once

#include <algorithm>
#include <memory>

#include "dparallel/launch.h"
#include "parallel.h"

namespace dparallel::cpu {

// The SIMD kernels under a product. Those in arrays are indexed by DType.
struct ProductKernel {
  int64_t (*widened_width)(int64_t in);  // floats of a widened row
  // Rows [first, first + count) of x.
  void (*widen[3])(const LinearArgs& args, int64_t first, int64_t count, float* widened);
  // Their products with rows [begin, end) of the weights.
  void (*rows[3])(const LinearArgs& args, const float* widened, int64_t first, int64_t count,
                  int64_t begin, int64_t end);
};

inline void product(const ProductKernel& kernel, const LinearArgs& args, Parallel parallel) {
  constexpr int64_t kGroup = 64;       // rows of x: 1 MB for 4096 columns, which stays in a cache
  constexpr int64_t kMostWork = 2048;  // of a row, as told to run_rows: a run has 16 rows or more
  const int dtype = static_cast<int>(args.dtype);
  const int64_t most = std::min(args.count, kGroup);
  const std::unique_ptr<float[]> x(new float[most * kernel.widened_width(args.in)]);
  for (int64_t first = 0; first < args.count; first += kGroup) {
    const int64_t count = std::min(args.count - first, kGroup);
    const int64_t work = std::max<int64_t>(1, count * args.in);
    kernel.widen[dtype](args, first, count, x.get());
    run_rows(parallel, args.out_width, std::min(work, kMostWork), [&](int64_t begin, int64_t end) {
      kernel.rows[dtype](args, x.get(), first, count, begin, end);
    });
  }
}

}  // namespace dparallel::cpu
