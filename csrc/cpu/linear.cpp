// linear on the CPU: what the CUDA kernel is compared with. `dparallel_ext.linear` calls torch's
// own product there.
#include "loss.h"

namespace dparallel::cpu {

void linear(const LinearArgs& args, Parallel parallel) {
  if (args.count == 0) return;
  const int64_t size = element_size(args.dtype);
  const auto row_of = [size](const void* rows, int64_t stride, int64_t row) {
    return static_cast<const char*>(rows) + row * stride * size;
  };
  run_rows(parallel, args.out_width, args.count * std::max<int64_t>(1, args.in),
           [&](int64_t begin, int64_t end) {
             for (int64_t row = begin; row < end; ++row)
               for (int64_t n = 0; n < args.count; ++n) {
                 const void *x = row_of(args.x, args.x_stride, n),
                            *weight = row_of(args.weight, args.in, row);
                 float sum = 0.0f;
                 for (int64_t k = 0; k < args.in; ++k)
                   sum += load_logit(x, args.dtype, k) * load_logit(weight, args.dtype, k);
                 if (args.bias != nullptr) sum += load_logit(args.bias, args.dtype, row);
                 store(args.out, args.dtype, n * args.out_width + row, sum);
               }
           });
}

}  // namespace dparallel::cpu
