// The certainty-forcing loss and its gradients.
#include <tuple>

#include "backend.h"
#include "dparallel/certainty_forcing_loss.h"

namespace dparallel {
namespace {

void launch(Cpu, const LossArgs& args, const Tensor&) {
  cpu::certainty_forcing_loss(args, parallel);
}
#ifdef DPARALLEL_HAS_CUDA
void launch(Cuda, const LossArgs& args, const Tensor& like) {
  Cuda::launch("certainty_forcing_loss", args, like, cuda::certainty_forcing_loss,
               cuda::certainty_forcing_loss_scratch);
}
#endif

// `inplace` chooses among the gradients below.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> certainty_forcing_loss(
    Tensor logits, Tensor labels, Tensor active, double temperature, double ce_temperature,
    bool inplace) {
  if (inplace) own_memory(logits, "logits");
  const Logits all = logits_of(logits, true);
  const int64_t count = row_count(logits);
  expect(labels, "labels", ScalarType::Long, {count}, logits);
  expect(active, "active", ScalarType::Bool, {count}, logits);
  for (const double t : {temperature, ce_temperature})
    DP_CHECK(t >= 1e-5 && t <= 1e5, "temperature: expected a number from 1e-5 to 1e5, got ", t);
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const ScalarType real = wide ? ScalarType::Double : ScalarType::Float;
  Tensor nll = torch::stable::new_empty(logits, {count}, real);
  Tensor entropy = torch::stable::new_empty(logits, {count}, real);
  Tensor correct = torch::stable::new_empty(logits, {count}, ScalarType::Bool);
  Tensor saved = torch::stable::new_empty(logits, {count, kLossSaved}, real);
  Tensor error = torch::stable::new_empty(logits, {count}, ScalarType::Long);
  const LossArgs args{all,
                      data<bool>(active),
                      data<int64_t>(labels),
                      count,
                      ce_temperature,
                      temperature,
                      nll.data_ptr(),
                      entropy.data_ptr(),
                      data<bool>(correct),
                      saved.data_ptr(),
                      data<int64_t>(error)};
  launch(Backend{}, args, logits);
  return {nll, entropy, correct, saved, error};
}

DPARALLEL_OP(
    certainty_forcing_loss,
    "certainty_forcing_loss(Tensor logits, Tensor labels, Tensor active, float temperature, float "
    "ce_temperature, bool inplace=False) -> (Tensor nll, Tensor entropy, Tensor correct, Tensor "
    "saved, Tensor error)")

void launch(Cpu, const LossBackwardArgs& args, const Tensor&) {
  cpu::certainty_forcing_loss_backward(args, parallel);
}
#ifdef DPARALLEL_HAS_CUDA
void launch(Cuda, const LossBackwardArgs& args, const Tensor& like) {
  Cuda::launch("certainty_forcing_loss_backward", args, like,
               cuda::certainty_forcing_loss_backward);
}
#endif

// `grad`: where it goes; null: over the logits.
template <class Backend>
void loss_backward(Tensor& logits, Tensor& labels, Tensor& active, double temperature,
                   double ce_temperature, Tensor& saved, Tensor& grad_nll, Tensor& grad_entropy,
                   void* grad) {
  const Logits all = logits_of(logits, true);
  const int64_t count = row_count(logits);
  expect(labels, "labels", ScalarType::Long, {count}, logits);
  expect(active, "active", ScalarType::Bool, {count}, logits);
  DP_CHECK(temperature > 0 && ce_temperature > 0, "temperature: expected > 0");
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const ScalarType real = wide ? ScalarType::Double : ScalarType::Float;
  expect(saved, "saved", real, {count, kLossSaved}, logits);
  expect(grad_nll, "grad_nll", real, {count}, logits);
  expect(grad_entropy, "grad_entropy", real, {count}, logits);
  const LossBackwardArgs args{all,
                              data<bool>(active),
                              data<int64_t>(labels),
                              count,
                              ce_temperature,
                              temperature,
                              saved.data_ptr(),
                              grad_nll.data_ptr(),
                              grad_entropy.data_ptr(),
                              grad};
  launch(Backend{}, args, logits);
}

template <class Backend>
Tensor certainty_forcing_loss_backward(Tensor logits, Tensor labels, Tensor active,
                                       double temperature, double ce_temperature, Tensor saved,
                                       Tensor grad_nll, Tensor grad_entropy) {
  Tensor grad = torch::stable::new_empty(logits, sizes_of(logits));
  loss_backward<Backend>(logits, labels, active, temperature, ce_temperature, saved, grad_nll,
                         grad_entropy, grad.data_ptr());
  return grad;
}

DPARALLEL_OP(
    certainty_forcing_loss_backward,
    "certainty_forcing_loss_backward(Tensor logits, Tensor labels, Tensor active, float "
    "temperature, float ce_temperature, Tensor saved, Tensor grad_nll, Tensor grad_entropy) -> "
    "Tensor")

template <class Backend>
void certainty_forcing_loss_backward_(Tensor logits, Tensor labels, Tensor active,
                                      double temperature, double ce_temperature, Tensor saved,
                                      Tensor grad_nll, Tensor grad_entropy) {
  own_memory(logits, "logits");
  Tensor rows = logits;
  loss_backward<Backend>(rows, labels, active, temperature, ce_temperature, saved, grad_nll,
                         grad_entropy, nullptr);
  write_back(logits, rows);
}

DPARALLEL_OP(
    certainty_forcing_loss_backward_,
    "certainty_forcing_loss_backward_(Tensor(a!) logits, Tensor labels, Tensor active, float "
    "temperature, float ce_temperature, Tensor saved, Tensor grad_nll, Tensor grad_entropy) -> ()")

}  // namespace
}  // namespace dparallel
