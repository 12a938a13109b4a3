// The losses and their gradients.
#include <tuple>

#include "backend.h"
#include "dparallel/certainty_forcing_loss.h"
#include "dparallel/distillation_loss.h"

namespace dparallel {
namespace {

void check_temperature(const char* name, double temperature) {
  DP_CHECK(temperature >= 1e-5 && temperature <= 1e5, name,
           ": expected a number from 1e-5 to 1e5, got ", temperature);
}

void check_weight(const char* name, double weight) {
  DP_CHECK(weight >= 0 && weight <= kLargest, name, ": expected a finite number >= 0, got ",
           weight);
}

// The dtype of the numbers of each row.
ScalarType real_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks the arguments that both passes take.
Logits check_loss(Tensor& logits, Tensor& labels, Tensor& active, double temperature,
                  double ce_temperature) {
  const Logits all = logits_of(logits, true);
  expect(labels, "labels", ScalarType::Long, {row_count(logits)}, logits);
  expect(active, "active", ScalarType::Bool, {row_count(logits)}, logits);
  check_temperature("temperature", temperature);
  check_temperature("ce_temperature", ce_temperature);
  return all;
}

// `inplace` chooses among the gradients below.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> certainty_forcing_loss(
    Tensor logits, Tensor labels, Tensor active, double temperature, double ce_temperature,
    bool inplace) {
  if (inplace) own_memory({{logits, "logits"}}, {});
  const Logits all = check_loss(logits, labels, active, temperature, ce_temperature);
  const int64_t count = row_count(logits);
  const ScalarType real = real_of(logits);
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
  Backend::template launch<cpu::certainty_forcing_loss, cuda::certainty_forcing_loss,
                           cuda::certainty_forcing_loss_scratch>("certainty_forcing_loss", args,
                                                                 logits);
  return {nll, entropy, correct, saved, error};
}

DPARALLEL_OP(
    certainty_forcing_loss,
    "certainty_forcing_loss(Tensor logits, Tensor labels, Tensor active, float temperature, float "
    "ce_temperature, bool inplace=False) -> (Tensor nll, Tensor entropy, Tensor correct, Tensor "
    "saved, Tensor error)")

// `grad`: where it goes; null: over the logits.
template <class Backend>
void loss_backward(Tensor& logits, Tensor& labels, Tensor& active, double temperature,
                   double ce_temperature, Tensor& saved, Tensor& grad_nll, Tensor& grad_entropy,
                   void* grad) {
  const Tensor original = logits;  // not a copy that the kernel changes in its place
  const Logits all = check_loss(logits, labels, active, temperature, ce_temperature);
  const int64_t count = row_count(logits);
  const ScalarType real = real_of(logits);
  expect(saved, "saved", real, {count, kLossSaved}, logits);
  expect(grad_nll, "grad_nll", real, {count}, logits);
  expect(grad_entropy, "grad_entropy", real, {count}, logits);
  if (grad == nullptr)
    own_memory({{original, "logits"}}, {{labels, "labels"},
                                        {active, "active"},
                                        {saved, "saved"},
                                        {grad_nll, "grad_nll"},
                                        {grad_entropy, "grad_entropy"}});
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
  Backend::template launch<cpu::certainty_forcing_loss_backward,
                           cuda::certainty_forcing_loss_backward>("certainty_forcing_loss_backward",
                                                                  args, logits);
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
  Tensor rows = logits;
  loss_backward<Backend>(rows, labels, active, temperature, ce_temperature, saved, grad_nll,
                         grad_entropy, nullptr);
  write_back(logits, rows);
}

DPARALLEL_OP(
    certainty_forcing_loss_backward_,
    "certainty_forcing_loss_backward_(Tensor(a!) logits, Tensor labels, Tensor active, float "
    "temperature, float ce_temperature, Tensor saved, Tensor grad_nll, Tensor grad_entropy) -> ()")

// The rows of logits that both passes take.
struct Rows {
  Logits student, teacher;
  int64_t count;
  ScalarType real;
};

Rows rows_of(Tensor& student, Tensor& teacher, Tensor& active, double temperature, double kl_weight,
             double l1_weight, bool inplace) {
  const Tensor original = student;  // not a copy that the kernel changes in its place
  const Logits student_rows = logits_of(student, true, "student");
  check_shape(teacher, "teacher", student.scalar_type(), sizes_of(student));
  check_device(teacher, "teacher", student, "student");
  const Logits teacher_rows = logits_of(teacher, true, "teacher");
  const int64_t count = row_count(student);
  expect(active, "active", ScalarType::Bool, {count}, student);
  if (inplace) own_memory({{original, "student"}}, {{teacher, "teacher"}, {active, "active"}});
  check_temperature("temperature", temperature);
  check_weight("kl_weight", kl_weight);
  check_weight("l1_weight", l1_weight);
  return {student_rows, teacher_rows, count, real_of(student)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> distillation_loss(Tensor student, Tensor teacher, Tensor active,
                                                     double temperature, double kl_weight,
                                                     double l1_weight, bool inplace) {
  const Rows rows = rows_of(student, teacher, active, temperature, kl_weight, l1_weight, inplace);
  Tensor divergence = torch::stable::new_empty(student, {rows.count}, rows.real);
  Tensor saved = torch::stable::new_empty(student, {rows.count, kDistillationSaved}, rows.real);
  Tensor error = torch::stable::new_empty(student, {rows.count}, ScalarType::Long);
  const DistillationArgs args{
      rows.student, rows.teacher, data<Flag>(active),    rows.count,       temperature,
      kl_weight,    l1_weight,    divergence.data_ptr(), saved.data_ptr(), data<int64_t>(error)};
  Backend::template launch<cpu::distillation_loss, cuda::distillation_loss,
                           cuda::distillation_loss_scratch>("distillation_loss", args, student);
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
  const Tensor original = student;  // not a copy that the kernel changes in its place
  const Rows rows =
      rows_of(student, teacher, active, temperature, kl_weight, l1_weight, grad == nullptr);
  expect(saved, "saved", rows.real, {rows.count, kDistillationSaved}, student);
  expect(grad_divergence, "grad_divergence", rows.real, {rows.count}, student);
  if (grad == nullptr)
    own_memory({{original, "student"}}, {{saved, "saved"}, {grad_divergence, "grad_divergence"}});
  const DistillationBackwardArgs args{rows.student, rows.teacher,     data<Flag>(active),
                                      rows.count,   temperature,      kl_weight,
                                      l1_weight,    saved.data_ptr(), grad_divergence.data_ptr(),
                                      grad};
  Backend::template launch<cpu::distillation_loss_backward, cuda::distillation_loss_backward>(
      "distillation_loss_backward", args, student);
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
