// row_stats on the CPU: chunks of rows in parallel, merged in order.
#include "row_stats.h"

#include <algorithm>

#include "parallel.h"
#include "row_kernel.h"

namespace dparallel::cpu {
namespace {

// Calls visit(z, id) for every admissible id whose logit is above -inf.
template <class Visit>
void each_logit(const void* row, const RowJob& job, Visit visit) {
  with_stored(job.logits.dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto* logits = static_cast<const typename T::Storage*>(row);
    each_admissible(0, job.logits.vocab, job.exclusions, [&](int64_t from, int64_t to) {
      for (int64_t id = from; id < to; ++id)
        if (const float z = clamp_logit(T::value(logits[id])); z > -kInfinity) visit(z, id);
    });
  });
}

// The nucleus of a row whose largest admissible logit, clamped, is `top`. It takes two reads of the
// row: after the first digit few ids are left.
Nucleus find_nucleus(const void* row, const RowJob& job, float top) {
  const Sampling& sampling = job.sampling;
  const bool by_mass = sampling.top_p < 1.0;
  NucleusSearch search = NucleusSearch::of(0, sampling.top_k);
  std::vector<NucleusBin> bins(kNucleusBins);
  const auto add = [&](int bin, float z) {
    ++bins[bin].count;
    if (by_mass) bins[bin].mass += nucleus_weight(z, top, sampling.inverse_temperature);
  };
  std::vector<uint64_t> left;
  for (int level = 0; level < kNucleusLevels; ++level) {
    std::fill(bins.begin(), bins.end(), NucleusBin{});
    if (level == 0)
      each_logit(row, job, [&](float z, int64_t id) {
        add(NucleusSearch::digit(0, nucleus_key(z, id), 0), z);
      });
    for (const uint64_t key : left) {
      const int bin = NucleusSearch::digit(level, key, search.prefix);
      if (bin >= 0) add(bin, nucleus_logit(static_cast<uint32_t>(key >> 32)));
    }
    if (level == 0) {
      unsigned long long total = 0;
      for (const NucleusBin& bin : bins) total += bin.mass;
      search.limit = nucleus_limit(sampling.top_p, total);
    }
    const int at = search.walk(kNucleusBins, [&](int i) { return bins[i]; });
    if (search.descend(level, at, bins[at])) break;
    if (level == 0)
      each_logit(row, job, [&](float z, int64_t id) {
        const uint64_t key = nucleus_key(z, id);
        if (NucleusSearch::digit(1, key, search.prefix) >= 0) left.push_back(key);
      });
  }
  return search.found;
}

}  // namespace

std::vector<RowAnswer> read_rows(const RowJob& job, Parallel parallel) {
  const RowKernel& kernel = row_kernel_in_use();
  const Logits& logits = job.logits;
  const int dtype = static_cast<int>(logits.dtype);
  const int64_t chunks = chunks_of(logits.vocab);
  const bool samples = job.sampling.samples(), filters = job.sampling.filters();
  const float inverse_temperature = job.sampling.inverse_temperature;
  const auto row_at = [&](int64_t i) { return row_pointer(logits, job.rows ? job.rows[i] : i); };

  std::vector<RowPart> parts(job.count * chunks);                   // [count, chunks]
  std::vector<SamplePart> drawn(samples ? job.count * chunks : 0);  // [count, chunks]
  std::vector<Nucleus> nuclei(samples ? job.count : 0, Nucleus::all());
  const auto scan = [&](bool stats, bool draws) {
    run_chunks(parallel, job.count, logits.vocab, [&](const Chunk& chunk) {
      const int64_t i = chunk.row;
      const void* row = row_at(i);
      RowPart part;
      SamplePart sample;
      each_admissible(chunk.begin, chunk.end, job.exclusions, [&](int64_t from, int64_t to) {
        const RowSpan span{row, from, to};
        if (stats) kernel.stats[dtype](span, part);
        if (draws) kernel.sample[dtype](span, inverse_temperature, job.keys[i], nuclei[i], sample);
      });
      if (stats) parts[chunk.place] = part;
      if (draws) drawn[chunk.place] = sample;
    });
  };
  scan(true, samples && !filters);

  const int64_t mask_id = job.exclusions.mask_id;
  const bool mask_counts = counts_mask(logits, job.exclusions);
  std::vector<RowPart> rows(job.count);
  for (int64_t i = 0; i < job.count; ++i) rows[i] = merged(parts, i, chunks);
  if (filters) {
    run_parallel(parallel, job.count, [&](int64_t i) {
      if (rows[i].error() == kRowOk) nuclei[i] = find_nucleus(row_at(i), job, rows[i].top1);
    });
    scan(false, true);
  }
  std::vector<RowAnswer> answers(job.count);
  for (int64_t i = 0; i < job.count; ++i) {
    RowPart& part = rows[i];
    if (mask_counts)
      part.add(load_logit(row_at(i), logits.dtype, mask_id), static_cast<int32_t>(mask_id), false);
    answers[i].error = part.error();
    if (answers[i].error == kRowNan) continue;
    if (!samples) {
      answers[i].result = finish(part);
      continue;
    }
    const SamplePart sample = merged(drawn, i, chunks, inverse_temperature);
    answers[i].result = finish(part, sample, inverse_temperature);
  }
  return answers;
}

void row_stats(const RowStatsArgs& args, Parallel parallel) {
  std::vector<SampleKey> keys;
  if (args.sampling.samples())
    for (int64_t i = 0; i < args.count; ++i) keys.push_back(sample_key(args.sampling.keys + 4 * i));
  const RowJob job{args.logits, args.rows, args.count, args.exclusions, args.sampling, keys.data()};
  const std::vector<RowAnswer> answers = read_rows(job, parallel);
  clear(args.output, args.count);
  for (int64_t i = 0; i < args.count; ++i) {
    const RowAnswer& answer = answers[i];
    args.output.error[i] = answer.error == kRowOk ? kNoError : encode_error(i, answer.error);
    if (answer.error != kRowNan) put(args.output, args.count, i, answer.result);
  }
  const Gather& gather = args.gather;
  for (int64_t i = 0; i < args.count; ++i)
    for (int64_t k = 0; k < gather.count; ++k) {
      const void* row = row_pointer(args.logits, args.rows ? args.rows[i] : i);
      const int64_t id = gather.ids[i * gather.stride + k];
      gather.logits[i * gather.count + k] = clamp_logit(load_logit(row, args.logits.dtype, id));
    }
}

}  // namespace dparallel::cpu
