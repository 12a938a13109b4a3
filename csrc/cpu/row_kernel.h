// The SIMD kernel under row_stats and unmask: part of one row in one read, tile by tile.
#pragma once

#include "dparallel/philox.h"
#include "dparallel/row_stats.h"

namespace dparallel::cpu {

// Ids [begin, end) of the row at `row`, all of them admissible. Adds to `part`, and with a key also
// to `sample`. No memory beyond a tile's vectors.
struct RowSpan {
  const void* row;
  int64_t begin, end;
};

struct RowKernel {
  const char* level;
  // Indexed by DType.
  void (*stats[3])(const RowSpan& span, RowPart& part);
  void (*sample[3])(const RowSpan& span, float inverse_temperature, const SampleKey& key,
                    SamplePart& sample);
};

const RowKernel& row_kernel();  // of the best level

// The best level this machine runs; DPARALLEL_SIMD=portable|avx2|avx512 lowers it.
enum class SimdLevel { portable, avx2, avx512 };
SimdLevel best_simd_level();

namespace portable {
extern const RowKernel kernel;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RowKernel kernel;
}
namespace avx512 {
extern const RowKernel kernel;
}
#endif

}  // namespace dparallel::cpu
