// Errors of rows stay on the device until the host reads them: dparallel_ext/ops/errors.py.
#include "backend.h"

namespace dparallel {
namespace {

void launch(Cpu, const KeepErrorArgs& args, const Tensor&) { cpu::keep_error(args, parallel); }

#ifdef DPARALLEL_HAS_CUDA
void launch(Cuda, const KeepErrorArgs& args, const Tensor& like) {
  Cuda::launch("keep_error_", args, like, cuda::keep_error);
}
#endif

template <class Backend>
void keep_error_(Tensor word, Tensor error) {
  const int64_t count = length_of(error, "error");
  expect(error, "error", ScalarType::Long, {count}, error);
  DP_CHECK(word.scalar_type() == ScalarType::Long && word.numel() == 1,
           "word: expected one int64, got ", word.numel(), " elements");
  check_device(word, "word", error, "error");
  const KeepErrorArgs args{data<int64_t>(error), count, data<int64_t>(word)};
  launch(Backend{}, args, error);
}

DPARALLEL_OP(keep_error_, "keep_error_(Tensor(a!) word, Tensor error) -> ()")

}  // namespace
}  // namespace dparallel
