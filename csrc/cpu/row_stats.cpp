// row_stats on the CPU: chunks of rows in parallel, merged in order.
#include "row_stats.h"

#include <algorithm>
#include <cstring>

#include "dparallel/numeric.h"
#include "row_kernel.h"

namespace dparallel::cpu {
namespace {

// The admissible pieces of [begin, end): what is left between the excluded ids.
template <class Visit>
void each_admissible(int64_t begin, int64_t end, const Exclusions& ex, Visit visit) {
  const int64_t* next = std::lower_bound(ex.suppress, ex.suppress + ex.suppress_count, begin);
  const int64_t* last = ex.suppress + ex.suppress_count;
  while (begin < end) {
    int64_t cut = next != last ? std::min(*next, end) : end;
    if (ex.mask_id >= begin && ex.mask_id < cut) cut = ex.mask_id;
    if (begin < cut) visit(begin, cut);
    if (next != last && cut == *next) ++next;
    begin = cut + 1;
  }
}

bool suppressed(const Exclusions& ex, int64_t id) {
  return std::binary_search(ex.suppress, ex.suppress + ex.suppress_count, id);
}

float load_logit(const void* row, DType dtype, int64_t id) {
  if (dtype == DType::float32) return static_cast<const float*>(row)[id];
  const uint16_t bits = static_cast<const uint16_t*>(row)[id];
  return dtype == DType::bfloat16 ? bfloat16_value(bits) : float16_value(bits);
}

}  // namespace

std::vector<RowAnswer> read_rows(const RowJob& job, Parallel parallel) {
  const RowKernel& kernel = row_kernel_in_use();
  const Logits& logits = job.logits;
  const int dtype = static_cast<int>(logits.dtype);
  const int64_t chunks = chunks_of(logits.vocab);
  const float inverse_temperature = job.keys ? 1.0f / job.temperature : 0.0f;
  const auto row_at = [&](int64_t i) { return row_pointer(logits, job.rows ? job.rows[i] : i); };

  std::vector<RowPart> parts(job.count * chunks);                      // [count, chunks]
  std::vector<SamplePart> samples(job.keys ? job.count * chunks : 0);  // [count, chunks]
  run_parallel(parallel, job.count * chunks, [&](int64_t unit) {
    const int64_t i = unit / chunks, begin = unit % chunks * kChunk;
    const int64_t end = std::min(begin + kChunk, logits.vocab);
    const void* row = row_at(i);
    RowPart part;
    SamplePart sample;
    each_admissible(begin, end, job.exclusions, [&](int64_t from, int64_t to) {
      kernel.stats[dtype]({row, from, to}, part);
      if (job.keys) kernel.sample[dtype]({row, from, to}, inverse_temperature, job.keys[i], sample);
    });
    parts[unit] = part;
    if (job.keys) samples[unit] = sample;
  });

  const int64_t mask_id = job.exclusions.mask_id;
  const bool mask_counts =
      mask_id >= 0 && mask_id < logits.vocab && !suppressed(job.exclusions, mask_id);
  std::vector<RowAnswer> answers(job.count);
  for (int64_t i = 0; i < job.count; ++i) {
    RowPart part;
    for (int64_t c = 0; c < chunks; ++c) part.merge(parts[i * chunks + c]);
    const float mask_logit = mask_counts ? load_logit(row_at(i), logits.dtype, mask_id) : 0.0f;
    if (mask_counts) part.add(mask_logit, static_cast<int32_t>(mask_id), false);
    answers[i].error = part.error();
    if (answers[i].error != kRowOk) continue;
    if (!job.keys) {
      answers[i].result = finish(part);
      continue;
    }
    SamplePart sample;
    for (int64_t c = 0; c < chunks; ++c) sample.merge(samples[i * chunks + c], inverse_temperature);
    if (mask_counts) {
      SamplePart mask;
      mask.max = clamp_logit(mask_logit);
      mask.sum = mask_logit == -kInfinity ? 0.0f : 1.0f;
      sample.merge(mask, inverse_temperature);
    }
    answers[i].result = finish(part, sample, inverse_temperature);
  }
  return answers;
}

void row_stats(const RowStatsArgs& args, Parallel parallel) {
  std::vector<SampleKey> keys;
  if (args.sampling.temperature > 0.0f)
    for (int64_t i = 0; i < args.count; ++i) {
      const int64_t* k = args.sampling.keys + 4 * i;
      keys.push_back({static_cast<uint64_t>(k[0]), static_cast<uint32_t>(k[1]),
                      static_cast<uint32_t>(k[2]), static_cast<uint32_t>(k[3])});
    }
  const RowJob job{args.logits,
                   args.rows,
                   args.count,
                   args.exclusions,
                   args.sampling.temperature,
                   keys.empty() ? nullptr : keys.data()};
  const std::vector<RowAnswer> answers = read_rows(job, parallel);
  for (int64_t i = 0; i < args.count; ++i) {
    const RowAnswer& answer = answers[i];
    args.output.error[i] = answer.error == kRowOk ? kNoError : encode_error(i, answer.error);
    if (answer.error != kRowOk) continue;
    args.output.tokens[i] = answer.result.token;
    args.output.tokens[args.count + i] = answer.result.sample;
    for (int f = 0; f < kRowFields; ++f)
      args.output.fields[f * args.count + i] = answer.result.field[f];
  }
}

}  // namespace dparallel::cpu
