// How the ops on the CPU split their work: it runs on torch's threads, by the `Parallel` of an op.
#pragma once

#include <algorithm>

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

}  // namespace dparallel::cpu
