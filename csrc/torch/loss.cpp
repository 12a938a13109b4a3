// The losses and their gradients.
#include <tuple>

#include "backend.h"
#include "dparallel/certainty_forcing_loss.h"
#include "dparallel/distillation_loss.h"

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
                      data<Flag>(active),
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
                              data<Flag>(active),
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

void launch(Cpu, const DistillationArgs& args, const Tensor&) {
  cpu::distillation_loss(args, parallel);
}
void launch(Cpu, const DistillationBackwardArgs& args, const Tensor&) {
  cpu::distillation_loss_backward(args, parallel);
}
#ifdef DPARALLEL_HAS_CUDA
void launch(Cuda, const DistillationArgs& args, const Tensor& like) {
  Cuda::launch("distillation_loss", args, like, cuda::distillation_loss,
               cuda::distillation_loss_scratch);
}
void launch(Cuda, const DistillationBackwardArgs& args, const Tensor& like) {
  Cuda::launch("distillation_loss_backward", args, like, cuda::distillation_loss_backward);
}
#endif

// What both passes are given.
struct Rows {
  Logits student, teacher;
  int64_t count;
  ScalarType real;
};

Rows rows_of(Tensor& student, Tensor& teacher, Tensor& active, double temperature, double kl_weight,
             double l1_weight) {
  const Logits own = logits_of(student, true, "student");
  DP_CHECK(teacher.scalar_type() == student.scalar_type() && sizes_of(teacher) == sizes_of(student),
           "teacher: expected the dtype and the shape of student");
  check_device(teacher, "teacher", student, "student");
  const Logits other = logits_of(teacher, true, "teacher");
  const int64_t count = row_count(student);
  expect(active, "active", ScalarType::Bool, {count}, student);
  DP_CHECK(temperature >= 1e-5 && temperature <= 1e5,
           "temperature: expected a number from 1e-5 to 1e5, got ", temperature);
  for (const double weight : {kl_weight, l1_weight})
    DP_CHECK(weight >= 0 && weight <= kLargest,
             "kl_weight, l1_weight: expected finite numbers >= 0, got ", weight);
  const bool wide = student.scalar_type() == ScalarType::Double;
  return {own, other, count, wide ? ScalarType::Double : ScalarType::Float};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> distillation_loss(Tensor student, Tensor teacher, Tensor active,
                                                     double temperature, double kl_weight,
                                                     double l1_weight, bool inplace) {
  if (inplace) own_memory(student, "student");
  const Rows rows = rows_of(student, teacher, active, temperature, kl_weight, l1_weight);
  Tensor divergence = torch::stable::new_empty(student, {rows.count}, rows.real);
  Tensor saved = torch::stable::new_empty(student, {rows.count, kDistillationSaved}, rows.real);
  Tensor error = torch::stable::new_empty(student, {rows.count}, ScalarType::Long);
  const DistillationArgs args{
      rows.student, rows.teacher, data<Flag>(active),    rows.count,       temperature,
      kl_weight,    l1_weight,    divergence.data_ptr(), saved.data_ptr(), data<int64_t>(error)};
  launch(Backend{}, args, student);
  return {divergence, saved, error};
}

DPARALLEL_OP(distillation_loss,
             "distillation_loss(Tensor student, Tensor teacher, Tensor active, float temperature, "
             "float kl_weight, float l1_weight, bool inplace=False) -> (Tensor divergence, Tensor "
             "saved, Tensor error)")

// `grad`: where it goes; null: over the student's logits.
template <class Backend>
void gradient_of(Tensor& student, Tensor& teacher, Tensor& active, double temperature,
                 double kl_weight, double l1_weight, Tensor& saved, Tensor& grad_divergence,
                 void* grad) {
  const Rows rows = rows_of(student, teacher, active, temperature, kl_weight, l1_weight);
  expect(saved, "saved", rows.real, {rows.count, kDistillationSaved}, student);
  expect(grad_divergence, "grad_divergence", rows.real, {rows.count}, student);
  const DistillationBackwardArgs args{rows.student, rows.teacher,     data<Flag>(active),
                                      rows.count,   temperature,      kl_weight,
                                      l1_weight,    saved.data_ptr(), grad_divergence.data_ptr(),
                                      grad};
  launch(Backend{}, args, student);
}

template <class Backend>
Tensor distillation_loss_backward(Tensor student, Tensor teacher, Tensor active, double temperature,
                                  double kl_weight, double l1_weight, Tensor saved,
                                  Tensor grad_divergence) {
  Tensor grad = torch::stable::new_empty(student, sizes_of(student));
  gradient_of<Backend>(student, teacher, active, temperature, kl_weight, l1_weight, saved,
                       grad_divergence, grad.data_ptr());
  return grad;
}

DPARALLEL_OP(distillation_loss_backward,
             "distillation_loss_backward(Tensor student, Tensor teacher, Tensor active, float "
             "temperature, float kl_weight, float l1_weight, Tensor saved, Tensor "
             "grad_divergence) -> Tensor")

template <class Backend>
void distillation_loss_backward_(Tensor student, Tensor teacher, Tensor active, double temperature,
                                 double kl_weight, double l1_weight, Tensor saved,
                                 Tensor grad_divergence) {
  own_memory(student, "student");
  Tensor rows = student;
  gradient_of<Backend>(rows, teacher, active, temperature, kl_weight, l1_weight, saved,
                       grad_divergence, nullptr);
  write_back(student, rows);
}

DPARALLEL_OP(distillation_loss_backward_,
             "distillation_loss_backward_(Tensor(a!) student, Tensor teacher, Tensor active, float "
             "temperature, float kl_weight, float l1_weight, Tensor saved, Tensor "
             "grad_divergence) -> ()")

}  // namespace
}  // namespace dparallel
