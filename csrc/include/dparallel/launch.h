// Arguments of every op and the signature of its launchers, one per backend. Pointers are to memory
// of that backend; nothing here allocates. The CPU launchers are defined in csrc/cpu/<op>.cpp, the
// CUDA ones in csrc/cuda/<op>.cu.
#pragma once

#include "dparallel/common.h"
#include "dparallel/policy.h"
#include "dparallel/row_stats.h"

namespace dparallel {

// Gumbel-max sampling; temperature 0: none.
struct Sampling {
  float temperature;
  // row_stats: [count, 4] seed, sequence, position, step of each row.
  // unmask:    [batch, 3] seed, sequence, step; the position is column + position_offset.
  const int64_t* keys;
  int64_t position_offset;
};

struct RowOutput {
  int64_t* tokens;  // [2, count]: argmax, sample; -1 where the row was not read
  float* fields;    // [kRowFields, count]; NaN where the row was not read
  int64_t*
      error;  // [count] for row_stats, [batch] for unmask: kNoError, or the lowest encode_error
};

struct RowStatsArgs {
  Logits logits;
  const int64_t* rows;  // [count] row indices, or null: row i is row i of the logits
  int64_t count;
  Exclusions exclusions;
  Sampling sampling;
  RowOutput output;  // errors are numbered by the row's place in the output
};

struct SelectArgs {
  const float* confidence;  // [batch, length] each
  const float* margin;
  const float* entropy;
  const bool* eligible;  // [batch, length]
  const float* policy;   // [batch, 5]
  int64_t batch, length;
  bool* commit;  // [batch, length]
};

struct UnmaskArgs {
  int64_t* tokens;  // (batch, length) with strides, changed in place
  int64_t batch, length, token_stride_b, token_stride_l;
  Logits logits;             // [count] rows
  const int64_t* positions;  // [count] ascending b * length + l of each row, or null: count = batch
                             // * length, row r is position r
  int64_t count;
  const int64_t* start;  // [batch] active window [start, end) in columns
  const int64_t* end;    // [batch]
  const float* policy;   // [batch, 5]
  Exclusions exclusions;
  Sampling sampling;
  int64_t* committed;  // [batch]
  int64_t* remaining;  // [batch] masks left in the window
  bool* done;          // [1] no window has a mask left
  RowOutput output;    // errors are numbered by position b * length + l
};

// R below: float64 where the logits are, else float32. Rows that are not active are zero in every
// output, and their logits and labels are not read.
struct LossArgs {
  Logits logits;          // [count] rows
  const bool* active;     // [count]
  const int64_t* labels;  // [count]
  int64_t count;
  double ce_temperature, temperature;
  void* nll;       // R [count]
  void* entropy;   // R [count]
  bool* correct;   // [count]
  void* saved;     // R [count, kLossSaved]
  int64_t* error;  // [count]
};

struct LossBackwardArgs {
  Logits logits;
  const bool* active;
  const int64_t* labels;
  int64_t count;
  double ce_temperature, temperature;
  const void* saved;         // of the forward pass
  const void* grad_nll;      // R [count]
  const void* grad_entropy;  // R [count]
  void* grad;                // [count, vocab], the dtype of the logits, every element written
};

namespace cpu {
// parallel(n, body): body(begin, end) over [0, n) on torch's threads.
using Body = void (*)(int64_t begin, int64_t end, const void* context);
using Parallel = void (*)(int64_t n, Body body, const void* context);

void row_stats(const RowStatsArgs& args, Parallel parallel);
void select(const SelectArgs& args, Parallel parallel);
void unmask(const UnmaskArgs& args, Parallel parallel);
void certainty_forcing_loss(const LossArgs& args, Parallel parallel);
void certainty_forcing_loss_backward(const LossBackwardArgs& args, Parallel parallel);
const char* simd_level();  // "avx512", "avx2" or "portable"
}  // namespace cpu

namespace cuda {
// Bytes of scratch that a launch needs, and int32 counters, zero before the first launch; every
// launch leaves them zero again. A launcher neither allocates nor synchronises; it returns a
// cudaError_t.
struct Workspace {
  void* scratch;
  int32_t* counters;
};
int64_t row_stats_scratch(const RowStatsArgs& args);
int64_t unmask_scratch(const UnmaskArgs& args);
int64_t select_scratch(const SelectArgs& args);
int64_t row_stats_counters(const RowStatsArgs& args);
int64_t unmask_counters(const UnmaskArgs& args);
int row_stats(const RowStatsArgs& args, const Workspace& workspace, void* stream);
int select(const SelectArgs& args, const Workspace& workspace, void* stream);
int unmask(const UnmaskArgs& args, const Workspace& workspace, void* stream);
int64_t certainty_forcing_loss_scratch(const LossArgs& args);
int certainty_forcing_loss(const LossArgs& args, const Workspace& workspace, void* stream);
int certainty_forcing_loss_backward(const LossBackwardArgs& args, void* stream);
const char* error_string(int code);
}  // namespace cuda

}  // namespace dparallel
