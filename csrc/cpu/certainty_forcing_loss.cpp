// certainty_forcing_loss on the CPU: chunks of active rows in parallel, merged in order.
#include "dparallel/certainty_forcing_loss.h"

#include <algorithm>
#include <vector>

#include "dparallel/launch.h"
#include "loss.h"
#include "loss_kernel.h"
#include "parallel.h"

namespace dparallel::cpu {
namespace {

// R: float or double, the type of the results.
template <class R>
void forward(const LossArgs& args, Parallel parallel) {
  const DType dtype = args.logits.dtype;
  const int64_t vocab = args.logits.vocab, chunks = chunks_of(vocab);
  const InverseTemperatures<double> inverse{1 / args.ce_temperature, 1 / args.temperature};
  const InverseTemperatures<float> inverse32{static_cast<float>(inverse.ce),
                                             static_cast<float>(inverse.entropy)};
  const std::vector<int64_t> rows = active_rows(args.active, args.count);
  const auto count = static_cast<int64_t>(rows.size());
  std::vector<LossPart<double>> parts(count * chunks);
  run_chunks(parallel, count, vocab, [&](const Chunk& chunk) {
    const RowSpan span{row_pointer(args.logits, rows[chunk.row]), chunk.begin, chunk.end};
    LossPart<double> part;
    if constexpr (sizeof(R) == 4) {
      loss_kernel_in_use().stats[static_cast<int>(dtype)](span, inverse32, part);
    } else {
      for (int64_t id = span.begin; id < span.end; ++id) {
        const double z = clamped(static_cast<const double*>(span.row)[id]);
        if (z > part.max) {
          part.rebase(z, inverse);
          part.token = static_cast<int32_t>(id);
          continue;
        }
        const double d = std::max(z - (part.token < 0 ? 0.0 : part.max), inverse.floor());
        part.sum += z != z ? z : std::exp(d * inverse.ce);
        part.sum_t += std::exp(d * inverse.entropy);
        part.weighted_t += std::exp(d * inverse.entropy) * d;
      }
    }
    parts[chunk.place] = part;
  });
  auto* nll = static_cast<R*>(args.nll);
  auto* entropy = static_cast<R*>(args.entropy);
  auto* saved = static_cast<R*>(args.saved);
  std::fill_n(nll, args.count, R(0));
  std::fill_n(entropy, args.count, R(0));
  std::fill_n(saved, args.count * kLossSaved, R(0));
  std::fill_n(args.correct, args.count, false);
  std::fill_n(args.error, args.count, kNoError);
  for (int64_t i = 0; i < count; ++i) {
    const LossPart<double> part = merged(parts, i, chunks, inverse);
    const int64_t row = rows[i], label = args.labels[row];
    const bool known = label >= 0 && label < vocab;
    const RowError error = known ? part.error() : kRowLabel;
    if (error != kRowOk) {
      args.error[row] = encode_error(row, error);
      nll[row] = entropy[row] = R(NAN);
      continue;
    }
    const LossRow<double> result =
        part.finish(logit_at(row_pointer(args.logits, row), dtype, label), label, inverse);
    nll[row] = static_cast<R>(result.nll);
    entropy[row] = static_cast<R>(result.entropy);
    args.correct[row] = result.correct;
    for (int s = 0; s < kLossSaved; ++s)
      saved[row * kLossSaved + s] = static_cast<R>(result.saved[s]);
  }
}

template <class R>
void backward(const LossBackwardArgs& args, Parallel parallel) {
  const DType dtype = args.logits.dtype;
  const InverseTemperatures<R> inverse{static_cast<R>(1 / args.ce_temperature),
                                       static_cast<R>(1 / args.temperature)};
  run_gradient(args, args.logits, parallel, [&](const RowSpan& span, int64_t row, void* out) {
    const R grad_nll = static_cast<const R*>(args.grad_nll)[row];
    const R grad_entropy = static_cast<const R*>(args.grad_entropy)[row];
    const int64_t label = args.labels[row];
    if (label < 0 || label >= args.logits.vocab || (grad_nll == 0 && grad_entropy == 0))
      return false;
    const LossGradient<R> gradient(static_cast<const R*>(args.saved) + row * kLossSaved, grad_nll,
                                   grad_entropy, inverse);
    // Read the label's logit before writing `out`, which may be the logits' own memory.
    const bool here = label >= span.begin && label < span.end;
    const R label_logit = here ? static_cast<R>(logit_at(span.row, dtype, label)) : R(0);
    if constexpr (sizeof(R) == 4) {
      loss_kernel_in_use().gradient[static_cast<int>(dtype)](span, gradient, out);
    } else {
      for (int64_t id = span.begin; id < span.end; ++id)
        store(out, dtype, id, gradient.at(static_cast<const double*>(span.row)[id]));
    }
    if (here) store(out, dtype, label, gradient.at_label(label_logit));
    return true;
  });
}

}  // namespace

void certainty_forcing_loss(const LossArgs& args, Parallel parallel) {
  if (args.logits.dtype == DType::float64) forward<double>(args, parallel);
  else forward<float>(args, parallel);
}

void certainty_forcing_loss_backward(const LossBackwardArgs& args, Parallel parallel) {
  if (args.logits.dtype == DType::float64) backward<double>(args, parallel);
  else backward<float>(args, parallel);
}

}  // namespace dparallel::cpu
