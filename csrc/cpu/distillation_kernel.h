// The SIMD kernel under distillation_loss: sums of part of two rows, and part of the gradient.
#pragma once

#include "dparallel/distillation_loss.h"
#include "simd_level.h"

namespace dparallel::cpu {

// Ids [begin, end) of the student's row and of the teacher's.
struct PairSpan {
  const void* student;
  const void* teacher;
  int64_t begin, end;
};

struct DistillationKernel {
  // Indexed by DType (there are no float64 kernels). `out` is the gradient's row, which may be the
  // student's row itself.
  void (*stats[3])(const PairSpan& span, float inverse, DistillationPart<double>& part);
  void (*distance[3])(const PairSpan& span, const DistillationRow<float>& row,
                      DistancePart<double>& part);
  void (*gradient[3])(const PairSpan& span, const DistillationGradient<float>& gradient, void* out);
};

DPARALLEL_KERNEL_TABLE(DistillationKernel, distillation_kernel)

}  // namespace dparallel::cpu
