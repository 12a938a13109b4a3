// The SIMD kernel under certainty_forcing_loss: sums of part of a row, and part of its gradient.
#pragma once

#include "dparallel/certainty_forcing_loss.h"
#include "row_kernel.h"
#include "simd_level.h"

namespace dparallel::cpu {

struct LossKernel {
  // Indexed by DType (there are no float64 kernels). Both take ids [begin, end) of the row; `out`
  // is the gradient's row, which may be the row itself.
  void (*stats[3])(const RowSpan& span, const InverseTemperatures<float>& inverse,
                   LossPart<double>& part);
  void (*gradient[3])(const RowSpan& span, const LossGradient<float>& gradient, void* out);
};

DPARALLEL_KERNEL_TABLE(LossKernel, loss_kernel)

}  // namespace dparallel::cpu
