// The arguments of every op and the signatures of its launchers, one per backend. Pointers point to
// memory of that backend; launchers write to the caller's memory. The CPU launchers are defined in
// csrc/cpu/<op>.cpp, the CUDA ones in csrc/cuda/<op>.cu.
#pragma once

#include "dparallel/best_path.h"
#include "dparallel/common.h"
#include "dparallel/policy.h"
#include "dparallel/row_stats.h"
#include "dparallel/sampling.h"

namespace dparallel {

// A truth value: true unless 0. Bools that are a view of bytes may hold any; a C++ bool may not.
using Flag = uint8_t;

struct RowOutput {
  int64_t* tokens;  // [2, count]: argmax, sample; -1 where the row was not read
  float* fields;    // [kRowFields, count]; NaN where the row was not read
  // [count] for row_stats, [windows] for unmask, [lanes] for accept: kNoError, or the lowest
  // encode_error
  int64_t* error;
};

// Logits to return, of any ids, excluded ones too; +inf as the largest finite number, NaN for an id
// out of bounds.
struct Gather {
  const int64_t* ids;  // [rows, count], rows `stride` apart; stride 0: the same for every row
  int64_t count, stride;
  float* logits;  // [rows, count]
};

struct RowStatsArgs {
  Logits logits;
  const int64_t* rows;  // [count] row indices, or null: row i is row i of the logits
  int64_t count;
  Exclusions exclusions;
  Sampling sampling;
  Gather gather;
  RowOutput output;  // errors are numbered by i, the row's place in the output
};

// The k largest admissible logits of each row, in descending order, ties to the lowest id; where
// fewer are above -inf, -1 and -inf follow. A bad row gives -1 and NaN.
struct RowTopkArgs {
  Logits logits;
  const int64_t* rows;  // [count] row indices, or null: row i is row i of the logits
  int64_t count, k;     // k: 1 to kMostTop
  Exclusions exclusions;
  int64_t* tokens;  // [count, k]
  float* logprobs;  // [count, k] in the softmax of all ids but the suppressed
  int64_t* error;   // [count] kNoError, or encode_error of the place in the output
};

// The statistics of classes of ids, each as a row_stats of its ids alone. A class is a run of
// `ids`; ids outside the vocabulary are passed over.
struct ClassStatsArgs {
  Logits logits;
  int64_t count;       // rows
  const int32_t* ids;  // [listed], ascending within each class
  int64_t listed;
  const int64_t* offsets;  // [classes + 1] where each class begins in `ids`; ascending
  int64_t classes;
  // Of count * classes rows, without errors: NaN for a class that holds NaN, as finish() for one
  // that leaves no token to choose.
  RowOutput output;
};

// The best path through the cells [begin, end) of each window: the largest sum of scores on the way
// from state `enter`, behind which at most `room` tokens lead to an accepting state; where no path
// has that, the largest sum alone. Of equal sums into a state the first edge counts, of equal last
// states the lowest. A score of NaN is no way.
struct BestPathArgs {
  const float* scores;  // [windows, cells, classes]; -inf: no way
  int64_t windows, cells;
  const int64_t* begin;
  const int64_t* end;    // [windows]
  const int64_t* enter;  // [windows]
  const int64_t* room;   // [windows]
  Transitions transitions;
  int64_t* state;        // [windows, cells + 1] in front of each cell, and behind the last
  int64_t* token_class;  // [windows, cells]; -1 outside [begin, end), and where there is no path
};

// The errors of a launch, kept until the host reads them: where `word` holds kNoError, it becomes
// the least of `error`.
struct KeepErrorArgs {
  const int64_t* error;  // [count] kNoError, or encode_error of a row
  int64_t count;
  int64_t* word;  // [1]
};

struct SelectArgs {
  const float* confidence;  // [batch, length] each
  const float* margin;
  const float* entropy;
  const Flag* eligible;  // [batch, length]
  const float* policy;   // [batch, 5]
  int64_t batch, length;
  bool* commit;  // [batch, length]
};

// Sequences of tokens, with strides.
struct TokenGrid {
  int64_t* data;
  int64_t batch, length, stride_b, stride_l;

  DP_HD int64_t& at(int64_t b, int64_t column) const {
    return data[b * stride_b + column * stride_l];
  }
};

// Windows, in any order: each is columns [start, end) of a sequence. Columns beyond the sequence
// are ignored.
struct Windows {
  int64_t count;
  const int64_t* lane;   // [count] the sequence, or null: window w is of sequence w
  const int64_t* start;  // [count]
  const int64_t* end;    // [count]

  DP_HD int64_t sequence(int64_t w) const { return lane != nullptr ? lane[w] : w; }
};

struct UnmaskArgs {
  TokenGrid tokens;          // changed in place
  Logits logits;             // [count] rows
  const int64_t* positions;  // [count] ascending b * length + l of each row, or null: count = batch
                             // * length, row r is position r
  int64_t count;
  // The positions that may be filled. Windows of a sequence do not overlap; on a GPU, which does
  // not check, a position of several windows belongs to the first of them.
  Windows windows;
  const float* policy;  // [windows.count, 5]
  Exclusions exclusions;
  Sampling sampling;
  int64_t* committed;  // [windows.count]
  int64_t* remaining;  // [windows.count] masks left in the window
  bool* done;          // [1] no window has a mask left
  RowOutput output;    // errors are numbered by position b * length + l
};

// Tokens are written, then masks counted in windows, which may overlap and be of other sequences.
struct CommitArgs {
  TokenGrid tokens;          // changed in place
  const int64_t* positions;  // [count] b * length + l of each row, or null: row r is position r
  const Flag* commit;        // [count] whether the row is written
  const int64_t* token;      // [count]
  int64_t count;
  int64_t mask_id;
  Windows windows;
  int64_t* remaining;  // [windows.count] masks left in the window
  int64_t* first;      // [windows.count] the column of the first mask, or the window's end
  int64_t* changed;    // [windows.count] tokens of the window that changed
  int64_t* error;      // [1] kNoError, or the lowest encode_error of a position, kRowMask
};

// A lane has rows [q_start, q_end) of a verify pass: a tree of drafted tokens, the root first, a
// parent before its children. Lanes may be in any order and share no row; rows of no lane are not
// read.
struct AcceptArgs {
  Logits logits;          // [count] rows
  const int64_t* draft;   // [count] the token at each row; a root's is not read
  const int64_t* parent;  // [count] the parent's row within the lane; a root's is not read
  int64_t count;
  int64_t lanes;
  const int64_t* q_start;  // [lanes]
  const int64_t* q_end;    // [lanes]
  const int64_t* room;     // [lanes] the most tokens that a lane may emit, or null
  const int64_t* eos_ids;  // [lanes, eos_count]; negative: none
  int64_t eos_count;
  // At least the largest q_end - q_start, so that outputs have a size without reading these. On a
  // GPU, rows of a lane beyond it are ignored.
  int64_t max_q_len;
  Exclusions exclusions;
  Sampling sampling;
  int64_t* emitted;  // [lanes] tokens
  int64_t* path;     // [lanes, max_q_len] the accepted rows within the lane, then -1
  int64_t* tokens;   // [lanes, max_q_len] the emitted tokens, then -1
  bool* ended;       // [lanes] whether an end-of-text id ended the path
  RowOutput output;  // errors are numbered by lane * kLaneRows + row within it, see accept.h

  // The rows of a lane that are read: [first, first + count). A lane that is out of bounds, which
  // only a GPU's unchecked arguments can contain, has none. Int holds any number of rows.
  template <class Int>
  struct alignas(2 * sizeof(Int)) Rows {
    Int first, count;

    DP_HD bool hold(Int row) const { return row >= first && row < first + count; }
  };
  template <class Int>
  DP_HD Rows<Int> rows_of(Int lane) const {
    const auto first = static_cast<uint64_t>(q_start[lane]);
    const auto last = static_cast<uint64_t>(q_end[lane]);
    if (last > static_cast<uint64_t>(count) || first >= last) return {0, 0};
    if (room != nullptr && room[lane] <= 0) return {0, 0};
    const auto rows = static_cast<Int>(last - first), most = static_cast<Int>(max_q_len);
    return {static_cast<Int>(first), rows < most ? rows : most};
  }
};

// R below: float64 where the logits are float64, else float32. Rows that are not active are zero in
// every output, and their logits and labels are not read.
struct LossArgs {
  Logits logits;          // [count] rows
  const Flag* active;     // [count]
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
  const Flag* active;
  const int64_t* labels;
  int64_t count;
  double ce_temperature, temperature;
  const void* saved;         // of the forward pass
  const void* grad_nll;      // R [count]
  const void* grad_entropy;  // R [count]
  // [count, vocab], of the logits' dtype, every element written; null: written over the logits
  void* grad;
};

// R as above. Rows that are not active are zero in every output, and no logit of them is read.
struct DistillationArgs {
  Logits student, teacher;  // [count] rows each, of the same vocabulary and dtype
  const Flag* active;       // [count]
  int64_t count;
  double temperature, kl_weight, l1_weight;
  void* divergence;  // R [count]
  void* saved;       // R [count, kDistillationSaved]
  int64_t* error;    // [count] numbered 2 i for the student's row, 2 i + 1 for the teacher's
};

struct DistillationBackwardArgs {
  Logits student, teacher;
  const Flag* active;
  int64_t count;
  double temperature, kl_weight, l1_weight;
  const void* saved;            // of the forward pass
  const void* grad_divergence;  // R [count]
  // [count, vocab], of the logits' dtype, every element written; null: written over the student's
  void* grad;
};

// The keys or the values of one layer: pages of `page_size` slots, head_dim contiguous, strides in
// elements. A contiguous cache is one page per sequence.
struct CacheLayout {
  int64_t pages, page_size, heads, head_dim;
  int64_t page_stride, head_stride, slot_stride;

  DP_HD int64_t offset(int64_t page, int64_t slot, int64_t head) const {
    return page * page_stride + head * head_stride + slot * slot_stride;
  }
};

// Queries, keys and values of `count` tokens, rows their stride apart (in elements), heads
// contiguous. No two rows have the same slot.
struct KvWriteArgs {
  DType dtype;  // of all but the tables: float32, bfloat16 or float16
  void* q;      // [count, q_heads, head_dim] rotated in place
  const void* k;
  const void* v;  // [count, heads, head_dim]
  int64_t q_stride, k_stride, v_stride;
  int64_t count, q_heads;
  const int64_t* positions;     // [count] for the rotary embedding: rows of the tables
  const int64_t* slot_mapping;  // [count] page * page_size + slot; negative: not written
  const float* cos;
  const float* sin;  // [table, rotary_dim / 2]
  int64_t table;
  // Even, up to head_dim: pairs (i, i + rotary_dim / 2) turn, the rest is copied.
  int64_t rotary_dim;
  void* k_cache;
  void* v_cache;
  CacheLayout k_layout, v_layout;
  // [head_dim] in the dtype, both or neither: each head of q and of k has its RMS norm first, whose
  // roundings are those of rms_norm.
  const void* q_norm = nullptr;
  const void* k_norm = nullptr;
  float eps = 0.0f;
};

// Copies, in every layer and head, the keys and values of slot source[lane, i] to slot
// target[lane, i]. All entries of a lane are read before any is written. Lanes share no slots, and
// the targets of a lane differ.
struct KvMoveArgs {
  void* kv_cache;        // [layers, 2, pages, heads, page_size, head_dim]
  int64_t element_size;  // bytes: 2, 4 or 8
  int64_t layers, layer_stride, kv_stride;
  CacheLayout layout;     // of keys or values of a layer
  int64_t lanes, count;   // at most kMostMoves
  const int64_t* source;  // [lanes, count] page * page_size + slot
  const int64_t* target;  // [lanes, count]; negative in either: the entry is skipped
};
constexpr int64_t kMostMoves = 2048;

// Attention of segments: query rows [q_start, q_end), which see slots [0, kv_len) of the pages that
// the segment's row of the block table lists. Rows that see nothing, or are in no segment, come out
// zero.
struct BlockAttentionArgs {
  DType dtype;    // float32, bfloat16 or float16
  const void* q;  // [count, q_heads, head_dim], rows q_stride elements apart
  int64_t q_stride, count, q_heads;
  const void* k_cache;
  const void* v_cache;
  CacheLayout k_layout, v_layout;
  int64_t segments;
  const int64_t* q_start;
  const int64_t* q_end;
  const int64_t* kv_lens;      // [segments]
  const int64_t* block_table;  // [segments, table_width]
  int64_t table_width;
  // At least the largest q_end - q_start and the largest of kv_lens, so that a launch has a size
  // without reading these. On a GPU, rows and slots beyond them are ignored.
  int64_t max_q_len, max_kv_len;
  float scale;
  void* out;  // [count, q_heads, head_dim] contiguous, every element written
  // With `causal` or `ancestors`, a segment's rows are its last slots: row i is slot base + i, base
  // = kv_len - rows. All rows see the slots below base. Of the others row i sees, if causal, those
  // up to its own; else slot base + b where bit b % 64 of word b / 64 of its ancestors is set.
  bool causal;
  const int64_t* ancestors;  // [count, words]; null: none
  int64_t words;

  DP_HD bool restricted() const { return causal || ancestors != nullptr; }
};

// The strides of rows of contiguous numbers, as in Logits: row r = outer * inner_rows + inner.
struct RowStrides {
  int64_t inner_rows, outer, inner;

  DP_HD int64_t offset(int64_t row) const {
    return (row / inner_rows) * outer + (row % inner_rows) * inner;
  }
};

// out = weight * round(s / sqrt(mean(s^2) + eps)) + bias, s = x + delta. Each operation is computed
// in float32 and rounded to the dtype, as in the torch modules that this op replaces.
struct RmsNormArgs {
  DType dtype;        // of all: float32, bfloat16 or float16
  const void* x;      // [count, width]
  const void* delta;  // [count, width], or null
  RowStrides x_rows, delta_rows;
  int64_t count, width;
  const void* weight;  // [width]
  const void* bias;    // [width], or null
  float eps;
  void* sum;  // [count, width] contiguous, where there is a delta: s
  void* out;  // [count, width] contiguous
};

// out = round(gate / (1 + exp(-gate))) * up, where round is to the dtype.
struct SwigluArgs {
  DType dtype;  // float32, bfloat16 or float16
  const void* gate;
  const void* up;  // [count, width]
  RowStrides gate_rows, up_rows;
  int64_t count, width;
  void* out;  // [count, width] contiguous
};

// out = round(scale * (x weight^T) + bias). Products are summed in float32 and rounded once.
struct LinearArgs {
  DType dtype;    // of x, bias and out: float32, bfloat16 or float16
  const void* x;  // [count, in], rows x_stride elements apart
  int64_t x_stride;
  int64_t count, in, out_width;
  const void* weight;  // [out_width, in] contiguous, of dtype or, with scales, e4m3
  const float* scale;  // [out_width], or null: 1
  const void* bias;    // [out_width], or null
  void* out;           // [count, out_width] contiguous
  bool constant;       // the weights are older than the last kernel that waited for all before it
};

// The columns of a product are queries, keys and values [heads, head_dim], side by side; then as
// kv_write, with its norms. The queries are product.out [count, q_heads, head_dim].
struct LinearKvWriteArgs {
  LinearArgs product;
  KvWriteArgs write;  // of its q, k and v nothing is given but q_heads
};

// out = round(scale * weight), with weights as above, for a product by the matrix library.
struct Fp8WidenArgs {
  DType dtype;  // of out: float32, bfloat16 or float16
  int64_t in, out_width;
  const uint8_t* weight;  // [out_width, in] contiguous
  const float* scale;     // [out_width]
  void* out;              // [out_width, in] contiguous
};

namespace cpu {
// parallel(n, body, context) calls body(begin, end, context) on torch's threads, over all of [0,
// n).
using Body = void (*)(int64_t begin, int64_t end, const void* context);
using Parallel = void (*)(int64_t n, Body body, const void* context);

void row_stats(const RowStatsArgs& args, Parallel parallel);
void row_topk(const RowTopkArgs& args, Parallel parallel);
void class_stats(const ClassStatsArgs& args, Parallel parallel);
void best_path(const BestPathArgs& args, Parallel parallel);
void select(const SelectArgs& args, Parallel parallel);
void keep_error(const KeepErrorArgs& args, Parallel parallel);
void unmask(const UnmaskArgs& args, Parallel parallel);
void commit(const CommitArgs& args, Parallel parallel);
void accept(const AcceptArgs& args, Parallel parallel);
void certainty_forcing_loss(const LossArgs& args, Parallel parallel);
void certainty_forcing_loss_backward(const LossBackwardArgs& args, Parallel parallel);
void distillation_loss(const DistillationArgs& args, Parallel parallel);
void distillation_loss_backward(const DistillationBackwardArgs& args, Parallel parallel);
void kv_write(const KvWriteArgs& args, Parallel parallel);
void kv_move(const KvMoveArgs& args, Parallel parallel);
void block_attention(const BlockAttentionArgs& args, Parallel parallel);
void rms_norm(const RmsNormArgs& args, Parallel parallel);
void swiglu(const SwigluArgs& args, Parallel parallel);
void linear(const LinearArgs& args, Parallel parallel);
void fp8_linear(const LinearArgs& args, Parallel parallel);
void linear_swiglu(const LinearArgs& args, Parallel parallel);
void linear_kv_write(const LinearKvWriteArgs& args, Parallel parallel);
void fp8_widen(const Fp8WidenArgs& args, Parallel parallel);
const char* simd_level();  // "avx512", "avx2" or "portable"
bool is_simd_level(const char* name);
// Makes the kernels use the level of that name, or the machine's best where that is lower.
void use_simd_level(const char* name);
}  // namespace cpu

namespace cuda {
// A launch needs <op>_scratch bytes of scratch and <op>_counters int32 counters, zero before the
// first launch; every launch leaves them zero. A launcher neither allocates nor synchronises; it
// returns a cudaError_t.
struct Workspace {
  void* scratch;
  int32_t* counters;
};
int64_t row_stats_scratch(const RowStatsArgs& args);
int64_t unmask_scratch(const UnmaskArgs& args);
int64_t best_path_scratch(const BestPathArgs& args);
int64_t select_scratch(const SelectArgs& args);
int64_t accept_scratch(const AcceptArgs& args);
int64_t row_stats_counters(const RowStatsArgs& args);
int64_t row_topk_scratch(const RowTopkArgs& args);
int64_t row_topk_counters(const RowTopkArgs& args);
int64_t unmask_counters(const UnmaskArgs& args);
int64_t commit_counters(const CommitArgs& args);
int64_t accept_counters(const AcceptArgs& args);
int row_stats(const RowStatsArgs& args, const Workspace& workspace, void* stream);
int row_topk(const RowTopkArgs& args, const Workspace& workspace, void* stream);
int class_stats(const ClassStatsArgs& args, void* stream);
int best_path(const BestPathArgs& args, const Workspace& workspace, void* stream);
int select(const SelectArgs& args, const Workspace& workspace, void* stream);
int unmask(const UnmaskArgs& args, const Workspace& workspace, void* stream);
int commit(const CommitArgs& args, const Workspace& workspace, void* stream);
int keep_error(const KeepErrorArgs& args, void* stream);
int accept(const AcceptArgs& args, const Workspace& workspace, void* stream);
int64_t certainty_forcing_loss_scratch(const LossArgs& args);
int certainty_forcing_loss(const LossArgs& args, const Workspace& workspace, void* stream);
int certainty_forcing_loss_backward(const LossBackwardArgs& args, void* stream);
int64_t distillation_loss_scratch(const DistillationArgs& args);
int distillation_loss(const DistillationArgs& args, const Workspace& workspace, void* stream);
int distillation_loss_backward(const DistillationBackwardArgs& args, void* stream);
int kv_write(const KvWriteArgs& args, void* stream);
int kv_move(const KvMoveArgs& args, void* stream);
int64_t block_attention_scratch(const BlockAttentionArgs& args);
int block_attention(const BlockAttentionArgs& args, const Workspace& workspace, void* stream);
int rms_norm(const RmsNormArgs& args, void* stream);
int swiglu(const SwigluArgs& args, void* stream);
int linear(const LinearArgs& args, void* stream);
int fp8_linear(const LinearArgs& args, void* stream);
int64_t linear_swiglu_scratch(const LinearArgs& args);
int linear_swiglu(const LinearArgs& args, const Workspace& workspace, void* stream);
int64_t linear_kv_write_scratch(const LinearKvWriteArgs& args);
int linear_kv_write(const LinearKvWriteArgs& args, const Workspace& workspace, void* stream);
int fp8_widen(const Fp8WidenArgs& args, void* stream);
const char* error_string(int code);
}  // namespace cuda

}  // namespace dparallel
