// Cases of the losses.
#include "cases.h"

namespace cases {

namespace {

template <class R>
void loss_case_of(const Rows& rows, const std::vector<int64_t>& labels, const Flag* active,
                  double ce_temperature, double temperature) {
  const int64_t count = rows.rows, vocab = rows.vocab;
  struct Outputs {
    std::vector<R> nll, entropy, saved;
    std::unique_ptr<bool[]> correct;
    std::vector<int64_t> error;
    explicit Outputs(int64_t n)
        : nll(n, -7),
          entropy(n, -7),
          saved(n * kLossSaved, -7),
          correct(new bool[n + 1]),
          error(n, -7) {}
  } cpu_out(count), cuda_out(count);
  const auto args_of = [&](Outputs& o) {
    return LossArgs{rows.flat(),     active,         labels.data(), count,
                    ce_temperature,  temperature,    o.nll.data(),  o.entropy.data(),
                    o.correct.get(), o.saved.data(), o.error.data()};
  };
  const LossArgs args = args_of(cuda_out);
  cpu::certainty_forcing_loss(args_of(cpu_out), serial);
  Memory memory(cuda::certainty_forcing_loss_scratch(args), 0);
  launched(cuda::certainty_forcing_loss(args, memory.workspace(), nullptr));
  same(cuda_out.error, cpu_out.error, "error");
  const auto near = [](const std::vector<R>& cuda, const std::vector<R>& cpu, const char* name) {
    for (size_t i = 0; i < cpu.size(); ++i) {
      const double a = cuda[i], b = cpu[i];
      REQUIRE(a == b || (a != a && b != b) || std::fabs(a - b) <= 4e-6 + 4e-6 * std::fabs(b),
              "%s[%zu]: %.9g, CPU %.9g", name, i, a, b);
    }
  };
  near(cuda_out.nll, cpu_out.nll, "nll");
  near(cuda_out.entropy, cpu_out.entropy, "entropy");
  near(cuda_out.saved, cpu_out.saved, "saved");
  for (int64_t i = 0; i < count; ++i)
    REQUIRE(cuda_out.correct[i] == cpu_out.correct[i], "correct[%lld]", (long long)i);
  std::vector<R> grad_nll(count), grad_entropy(count);
  for (int64_t i = 0; i < count; ++i) {
    grad_nll[i] = chance(0.2) ? R(0) : static_cast<R>(uniform(-1, 1));
    grad_entropy[i] = chance(0.2) ? R(0) : static_cast<R>(uniform(-1, 1));
  }
  const int64_t size = rows.element_size();
  std::unique_ptr<char[]> a(new char[count * vocab * size + 1]),
      b(new char[count * vocab * size + 1]);
  LossBackwardArgs backward{rows.flat(),         active,      labels.data(),        count,
                            ce_temperature,      temperature, cpu_out.saved.data(), grad_nll.data(),
                            grad_entropy.data(), a.get()};
  cpu::certainty_forcing_loss_backward(backward, serial);
  backward.grad = b.get();
  launched(cuda::certainty_forcing_loss_backward(backward, nullptr));
  const double step = rows.dtype == DType::bfloat16  ? 0.01
                      : rows.dtype == DType::float16 ? 2e-3
                                                     : 2e-6;
  for (int64_t i = 0; i < count * vocab; ++i) {
    if (cpu_out.error[i / vocab] != kNoError)
      continue;  // nothing is promised of a bad row's gradient
    const double x = rows.element(a.get(), i), y = rows.element(b.get(), i);
    REQUIRE(std::fabs(x - y) <= 3e-7 + step * std::fabs(x), "grad[%lld]: %.9g, CPU %.9g",
            (long long)i, y, x);
  }
  // Over the logits it is the same, to the bit.
  const auto over_the_logits = [&](const char* expected, auto launch, const char* name) {
    const int64_t bytes = count ? ((count - 1) * rows.stride + vocab) * size : 0;
    std::unique_ptr<char[]> own(new char[bytes]);
    std::memcpy(own.get(), rows.memory.get(), bytes);
    backward.logits.data = own.get();
    backward.grad = nullptr;
    launch();
    for (int64_t i = 0; i < count; ++i)
      REQUIRE(!std::memcmp(own.get() + i * rows.stride * size, expected + i * vocab * size,
                           vocab * size),
              "%s over the logits: row %lld", name, (long long)i);
  };
  over_the_logits(
      a.get(), [&] { cpu::certainty_forcing_loss_backward(backward, serial); }, "grad, CPU");
  over_the_logits(
      b.get(), [&] { launched(cuda::certainty_forcing_loss_backward(backward, nullptr)); }, "grad");
}

}  // namespace

void loss_case() {
  int64_t vocab = random_vocab();
  const int64_t count = below(6);
  Rows rows(count, vocab, chance(0.3), 0.0, chance(0.15));
  if (count > 0 && chance(0.2))  // as large as an infinite one is taken to be
    rows.put(below(count) * rows.stride + below(vocab), kLargest);
  if (count > 0 && chance(0.2)) {  // masked ids, perhaps all of a block's
    const int64_t row = below(count), first = below(vocab) / 8192 * 8192;
    const float fill = one_of({-1e9f, -3e9f, -1e10f, -1e20f, -kLargest});
    for (int64_t v = first; v < vocab; ++v) rows.put(row * rows.stride + v, fill);
  }
  std::vector<int64_t> labels(count);
  std::vector<Flag> active(count + 1);
  for (int64_t i = 0; i < count; ++i) {
    active[i] = flag(0.7);
    labels[i] = chance(0.1) ? -100 : below(vocab);
  }
  const double ce = one_of({1.0, 1.0, 0.7, 2.0}), t = one_of({0.5 * ce, ce, 0.3, 2.5});
  if (rows.dtype == DType::float64) loss_case_of<double>(rows, labels, active.data(), ce, t);
  else loss_case_of<float>(rows, labels, active.data(), ce, t);
}

namespace {

template <class R>
void distillation_case_of(const Rows& student, const Rows& teacher, const Flag* active,
                          double temperature, double kl_weight, double l1_weight) {
  const int64_t count = student.rows, vocab = student.vocab;
  struct Outputs {
    std::vector<R> divergence, saved;
    std::vector<int64_t> error;
    explicit Outputs(int64_t n) : divergence(n, -7), saved(n * kDistillationSaved, -7), error(n) {}
  } cpu_out(count), cuda_out(count);
  const auto args_of = [&](Outputs& o) {
    return DistillationArgs{student.flat(), teacher.flat(), active,    count,
                            temperature,    kl_weight,      l1_weight, o.divergence.data(),
                            o.saved.data(), o.error.data()};
  };
  const DistillationArgs args = args_of(cuda_out);
  cpu::distillation_loss(args_of(cpu_out), serial);
  Memory memory(cuda::distillation_loss_scratch(args), 0);
  launched(cuda::distillation_loss(args, memory.workspace(), nullptr));
  same(cuda_out.error, cpu_out.error, "error");
  // q and p of number i of all, and whether rounding decides between their signs.
  const auto probabilities = [&](int64_t i) {
    const int64_t row = i / vocab;
    if (!active[row]) return std::pair<R, R>(0, 0);
    const DistillationRow<R> of(cpu_out.saved.data() + row * kDistillationSaved,
                                static_cast<R>(1 / temperature));
    const auto at = [&](const Rows& rows) {
      return static_cast<R>(rows.element(rows.memory.get(), row * rows.stride + i % vocab));
    };
    return std::pair<R, R>(of.q(at(student)), of.p(at(teacher)));
  };
  const auto in_doubt = [&](R q, R p) { return l1_weight > 0 && std::fabs(q - p) <= R(1e-5) * q; };
  std::vector<double> in_doubt_of(count);  // the sum of such q
  for (int64_t i = 0; i < count * vocab; ++i) {
    if (cpu_out.error[i / vocab] != kNoError) continue;  // nothing is promised of a bad row
    const auto [q, p] = probabilities(i);
    if (in_doubt(q, p)) in_doubt_of[i / vocab] += q;
  }
  // How far numbers of a row may differ: exponents of d / T are off by d's own rounding.
  const auto require_near = [&](R cuda, R cpu, double also, const char* name, int64_t row) {
    const double a = cuda, b = cpu,
                 most = (1 + kl_weight + l1_weight) * (8e-6 + 8e-6 * std::fabs(b)) + also;
    REQUIRE(a == b || (a != a && b != b) || std::fabs(a - b) <= most,
            "%s of row %lld: %.9g, CPU %.9g", name, (long long)row, a, b);
  };
  for (int64_t row = 0; row < count; ++row) {
    require_near(cuda_out.divergence[row], cpu_out.divergence[row], 0, "divergence", row);
    for (int s = 0; s < kDistillationSaved; ++s) {
      const bool of_signs = s == kSavedAbove || s == kSavedBelow;
      const int64_t i = row * kDistillationSaved + s;
      require_near(cuda_out.saved[i], cpu_out.saved[i], of_signs ? 2 * in_doubt_of[row] : 0,
                   "saved", row);
    }
  }
  std::vector<R> grad_divergence(count);
  for (R& g : grad_divergence) g = chance(0.2) ? R(0) : static_cast<R>(uniform(-1, 1));
  const int64_t size = student.element_size();
  std::unique_ptr<char[]> a(new char[count * vocab * size + 1]),
      b(new char[count * vocab * size + 1]);
  DistillationBackwardArgs backward{student.flat(), teacher.flat(),       active,
                                    count,          temperature,          kl_weight,
                                    l1_weight,      cpu_out.saved.data(), grad_divergence.data(),
                                    a.get()};
  cpu::distillation_loss_backward(backward, serial);
  backward.grad = b.get();
  launched(cuda::distillation_loss_backward(backward, nullptr));
  const double step = student.dtype == DType::bfloat16  ? 0.01
                      : student.dtype == DType::float16 ? 2e-3
                                                        : 4e-6;
  for (int64_t i = 0; i < count * vocab; ++i) {
    if (cpu_out.error[i / vocab] != kNoError) continue;
    const auto [q, p] = probabilities(i);
    if (in_doubt(q, p)) continue;
    const double x = student.element(a.get(), i), y = student.element(b.get(), i);
    REQUIRE(std::fabs(x - y) <=
                2e-6 * (kl_weight + l1_weight) / temperature * (q + p) + 1e-7 + step * std::fabs(x),
            "grad[%lld]: %.9g, CPU %.9g", (long long)i, y, x);
  }
  // Over the student's logits it is the same, to the bit.
  const auto over_the_logits = [&](const char* expected, auto launch, const char* name) {
    const int64_t bytes = count ? ((count - 1) * student.stride + vocab) * size : 0;
    std::unique_ptr<char[]> own(new char[bytes]);
    std::memcpy(own.get(), student.memory.get(), bytes);
    backward.student.data = own.get();
    backward.grad = nullptr;
    launch();
    for (int64_t i = 0; i < count; ++i)
      REQUIRE(!std::memcmp(own.get() + i * student.stride * size, expected + i * vocab * size,
                           vocab * size),
              "%s over the logits: row %lld", name, (long long)i);
  };
  over_the_logits(a.get(), [&] { cpu::distillation_loss_backward(backward, serial); }, "grad, CPU");
  over_the_logits(
      b.get(), [&] { launched(cuda::distillation_loss_backward(backward, nullptr)); }, "grad");
}

}  // namespace

void distillation_case() {
  const int64_t vocab = random_vocab(), count = below(6);
  Rows student(count, vocab, chance(0.3), 0.0, chance(0.15));
  Rows teacher(count, vocab, chance(0.3), 0.0, student.dtype);
  if (chance(0.1)) student.exaggerate();
  if (chance(0.1)) teacher.exaggerate();
  std::vector<Flag> active(count + 1);
  for (int64_t row = 0; row < count; ++row) {
    active[row] = flag(0.7);
    const bool equal = chance(0.2), holes = chance(0.3), apart = chance(0.1);
    const float hole = one_of({-kInfinity, -kLargest});
    for (int64_t v = 0; v < vocab; ++v) {
      const int64_t z = row * student.stride + v, t = row * teacher.stride + v;
      const double of_student = student.element(student.memory.get(), z);
      if (equal) teacher.put(t, static_cast<float>(of_student));
      // Else most rows would be bad: an id that the student gives nothing is one that the teacher
      // gives nothing, and one beside which it gives the others nothing has all of the teacher's.
      else if (std::isinf(of_student) && !apart) teacher.put(t, static_cast<float>(of_student));
      else if (holes && chance(0.3)) student.put(z, hole), teacher.put(t, -kInfinity);
    }
  }
  const double t = one_of({1.0, 1.0, 0.3, 2.5});
  const double kl = one_of({1.0, 0.5, 0.0}), l1 = one_of({0.0, 1.0, 0.5});
  if (student.dtype == DType::float64)
    distillation_case_of<double>(student, teacher, active.data(), t, kl, l1);
  else distillation_case_of<float>(student, teacher, active.data(), t, kl, l1);
}

}  // namespace cases
