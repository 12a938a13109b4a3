// distillation_loss on the CPU: chunks of active rows in parallel, merged in order.
#include "dparallel/distillation_loss.h"

#include <algorithm>
#include <vector>

#include "distillation_kernel.h"
#include "dparallel/launch.h"
#include "loss.h"
#include "parallel.h"

namespace dparallel::cpu {
namespace {

PairSpan span_of(const DistillationArgs& args, int64_t row, const Chunk& chunk) {
  return {row_pointer(args.student, row), row_pointer(args.teacher, row), chunk.begin, chunk.end};
}

void add_stats(const PairSpan& span, double inverse, DistillationPart<double>& part) {
  const auto* z = static_cast<const double*>(span.student);
  const auto* t = static_cast<const double*>(span.teacher);
  for (int64_t id = span.begin; id < span.end; ++id) {
    DistillationPart<double> one;  // the part of one id
    one.student.max = z[id] > -kInfinity ? clamped(z[id]) : -kInfinity;
    one.teacher.max = t[id] > -kInfinity ? clamped(t[id]) : -kInfinity;
    one.student.sum = z[id] != z[id] ? z[id] : 0.0;
    one.teacher.sum = t[id] != t[id] ? t[id] : 0.0;
    one.cross = one.student.empty() && !one.teacher.empty() ? kInfinity : 0.0;
    part.merge(one, inverse);
  }
}

// R: float or double, the type of the results.
template <class R>
void forward(const DistillationArgs& args, Parallel parallel) {
  const auto dtype = static_cast<int>(args.student.dtype);
  const int64_t vocab = args.student.vocab, chunks = chunks_of(vocab);
  const double inverse = 1 / args.temperature;
  const std::vector<int64_t> rows = active_rows(args.active, args.count);
  std::vector<DistillationPart<double>> parts(rows.size() * chunks);
  run_chunks(parallel, rows.size(), vocab, [&](const Chunk& chunk) {
    const PairSpan span = span_of(args, rows[chunk.row], chunk);
    DistillationPart<double> part;
    if constexpr (sizeof(R) == 4)
      distillation_kernel_in_use().stats[dtype](span, static_cast<float>(inverse), part);
    else add_stats(span, inverse, part);
    parts[chunk.place] = part;
  });
  auto* divergence = static_cast<R*>(args.divergence);
  auto* saved = static_cast<R*>(args.saved);
  std::fill_n(divergence, args.count, R(0));
  std::fill_n(saved, args.count * kDistillationSaved, R(0));
  std::fill_n(args.error, args.count, kNoError);
  std::vector<int64_t> sound;
  for (size_t i = 0; i < rows.size(); ++i) {
    const DistillationPart<double> part = merged(parts, i, chunks, inverse);
    const int64_t row = rows[i];
    args.error[row] = part.error(row, args.kl_weight > 0);
    if (args.error[row] != kNoError) {
      divergence[row] = R(NAN);
      continue;
    }
    double of_row[kDistillationSaved];
    part.save(of_row);
    for (int s = 0; s < kDistillationSaved; ++s)
      saved[row * kDistillationSaved + s] = static_cast<R>(of_row[s]);
    if (args.kl_weight > 0) divergence[row] = static_cast<R>(args.kl_weight * part.kl(inverse));
    sound.push_back(row);
  }
  if (!(args.l1_weight > 0)) return;
  std::vector<DistancePart<double>> distances(sound.size() * chunks);
  run_chunks(parallel, sound.size(), vocab, [&](const Chunk& chunk) {
    const int64_t row = sound[chunk.row];
    const PairSpan span = span_of(args, row, chunk);
    const DistillationRow<R> of(saved + row * kDistillationSaved, static_cast<R>(inverse));
    DistancePart<double> part;
    if constexpr (sizeof(R) == 4) {
      distillation_kernel_in_use().distance[dtype](span, of, part);
    } else {
      for (int64_t id = span.begin; id < span.end; ++id)
        of.add_distance(static_cast<const double*>(span.student)[id],
                        static_cast<const double*>(span.teacher)[id], part);
    }
    distances[chunk.place] = part;
  });
  for (size_t i = 0; i < sound.size(); ++i) {
    const DistancePart<double> part = merged(distances, i, chunks);
    divergence[sound[i]] += static_cast<R>(args.l1_weight * part.distance);
    R* of_row = saved + sound[i] * kDistillationSaved;
    of_row[kSavedAbove] = static_cast<R>(part.above);
    of_row[kSavedBelow] = static_cast<R>(part.below);
  }
}

template <class R>
void backward(const DistillationBackwardArgs& args, Parallel parallel) {
  const DType dtype = args.student.dtype;
  const auto inverse = static_cast<R>(1 / args.temperature);
  run_gradient(args, args.student, parallel, [&](const RowSpan& student, int64_t row, void* out) {
    const R grad = static_cast<const R*>(args.grad_divergence)[row];
    if (grad == 0) return false;
    const PairSpan span{student.row, row_pointer(args.teacher, row), student.begin, student.end};
    const DistillationGradient<R> gradient(
        static_cast<const R*>(args.saved) + row * kDistillationSaved, grad, args.kl_weight,
        args.l1_weight, inverse);
    if constexpr (sizeof(R) == 4) {
      distillation_kernel_in_use().gradient[static_cast<int>(dtype)](span, gradient, out);
    } else {
      for (int64_t id = span.begin; id < span.end; ++id)
        store(out, dtype, id,
              gradient.at(static_cast<const double*>(span.student)[id],
                          static_cast<const double*>(span.teacher)[id]));
    }
    return true;
  });
}

}  // namespace

void distillation_loss(const DistillationArgs& args, Parallel parallel) {
  if (args.student.dtype == DType::float64) forward<double>(args, parallel);
  else forward<float>(args, parallel);
}

void distillation_loss_backward(const DistillationBackwardArgs& args, Parallel parallel) {
  if (args.student.dtype == DType::float64) backward<double>(args, parallel);
  else backward<float>(args, parallel);
}

}  // namespace dparallel::cpu
