// How the ops on the CPU split their work: it runs on torch's threads, by the `Parallel` of an op.
#pragma once

#include <algorithm>
#include <vector>

#include "dparallel/launch.h"

namespace dparallel::cpu {

// Calls body(i) for every i in [0, n), in parallel.
template <class F>
void run_parallel(Parallel parallel, int64_t n, const F& body) {
  parallel(
      n,
      [](int64_t begin, int64_t end, const void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
      },
      &body);
}

// Calls body(begin, end) on runs of the rows [0, count), in parallel, each of some 2^15 numbers:
// fewer are not worth another thread.
template <class F>
void run_rows(Parallel parallel, int64_t count, int64_t width, const F& body) {
  const int64_t rows = std::max<int64_t>(1, 32768 / width);
  run_parallel(parallel, (count + rows - 1) / rows,
               [&](int64_t i) { body(i * rows, std::min(count, (i + 1) * rows)); });
}

// Rows of logits are read in chunks of a fixed size, so that neither the batch nor the number of
// threads changes a bit of a result.
constexpr int64_t kChunk = 16384;  // ids

inline int64_t chunks_of(int64_t vocab) { return (vocab + kChunk - 1) / kChunk; }

// Ids [begin, end) of row `row`; `place`: among the chunks of all rows, [rows, chunks of a row].
struct Chunk {
  int64_t place, row, begin, end;
};

// Calls body(chunk) for every chunk of `rows` rows of `vocab` ids, in parallel.
template <class F>
void run_chunks(Parallel parallel, int64_t rows, int64_t vocab, const F& body) {
  const int64_t chunks = chunks_of(vocab);
  run_parallel(parallel, rows * chunks, [&](int64_t place) {
    const int64_t begin = place % chunks * kChunk;
    body(Chunk{place, place / chunks, begin, std::min(begin + kChunk, vocab)});
  });
}

// The chunks' parts of row `row`, merged in order. parts [rows, chunks]; how: of Part::merge.
template <class Part, class... How>
Part merged(const std::vector<Part>& parts, int64_t row, int64_t chunks, const How&... how) {
  Part whole;
  for (int64_t c = 0; c < chunks; ++c) whole.merge(parts[row * chunks + c], how...);
  return whole;
}

}  // namespace dparallel::cpu
