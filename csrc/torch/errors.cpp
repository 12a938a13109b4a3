// Errors of rows stay on the device until the host reads them: dparallel_ext/ops/errors.py.
#include "backend.h"

namespace dparallel {
namespace {

template <class Backend>
void keep_error_(Tensor word, Tensor error) {
  const int64_t count = length_of(error, "error");
  expect(error, "error", ScalarType::Long, {count}, error);
  DP_CHECK(word.scalar_type() == ScalarType::Long && word.numel() == 1,
           "word: expected one int64, got ", described(word));
  check_device(word, "word", error, "error");
  own_memory({{word, "word"}}, {{error, "error"}});
  const KeepErrorArgs args{data<int64_t>(error), count, data<int64_t>(word)};
  Backend::template launch<cpu::keep_error, cuda::keep_error>("keep_error_", args, error);
}

DPARALLEL_OP(keep_error_, "keep_error_(Tensor(a!) word, Tensor error) -> ()")

}  // namespace
}  // namespace dparallel
