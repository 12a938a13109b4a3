// Schemas, checks and dispatch: the only file that knows torch, through its stable ABI, so that one
// build serves later releases. Python (dparallel_ext/ops) turns user input into these arguments;
// the checks here keep memory safe whoever calls, under torch.compile too. Arguments of other
// strides than a kernel reads are copied.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "dparallel/certainty_forcing_loss.h"
#include "dparallel/launch.h"

#ifdef DPARALLEL_WITH_CUDA_HOST
// tests/cuda_host executes the CUDA kernels on the CPU's tensors, in place of the CPU's kernels.
static int aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#else
using torch::stable::accelerator::DeviceGuard;
#ifdef DPARALLEL_WITH_CUDA
// Weak: absent from a CPU-only torch, where this library must still import.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif
#endif

namespace {

using namespace dparallel;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In Python a ValueError.
template <class... Parts>
[[noreturn]] void bad_argument(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}
#define DP_CHECK(condition, ...)                 \
  do {                                           \
    if (!(condition)) bad_argument(__VA_ARGS__); \
  } while (false)

DType dtype_of(const Tensor& t, const char* name, bool wide = false) {  // wide: float64 too
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double:
      if (wide) return DType::float64;
      [[fallthrough]];
    default:
      bad_argument(name, ": expected float32, bfloat16 or float16", wide ? " or float64" : "");
  }
}

void check_device(const Tensor& t, const char* name, const Tensor& like, const char* of) {
  DP_CHECK(t.get_device() == like.get_device() && t.is_cpu() == like.is_cpu(), name,
           ": expected on the device of ", of);
}

// Checks a tensor that is read, and makes it contiguous.
void expect(Tensor& t, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes,
            const Tensor& like) {
  DP_CHECK(t.scalar_type() == dtype, name, ": wrong dtype");
  check_device(t, name, like, "the others");
  DP_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(),
           " dimensions, got ", t.dim());
  for (size_t i = 0; i < sizes.size(); ++i)
    DP_CHECK(t.size(i) == sizes[i], name, ": expected size ", sizes[i], " in dimension ", i,
             ", got ", t.size(i));
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
}

// The last dimension becomes contiguous.
void make_rows(Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.stride(last) != 1 && t.size(last) != 1) t = torch::stable::contiguous(t);
}

// What is changed in place may not be an expanded view, nor another whose elements overlap: by
// ascending strides, each dimension has to step over all that the smaller ones span.
void own_memory(const Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1) steps.emplace_back(t.stride(d), t.size(d));
  std::sort(steps.begin(), steps.end());
  int64_t span = 0;
  for (const auto& [stride, size] : steps) {
    DP_CHECK(stride > span, name,
             ": expected memory of its own for each element, which is changed in place, got ", size,
             " elements at a stride of ", stride);
    span += stride * (size - 1);
  }
}

// `rows`: `t`, or the copy that a kernel has changed in its place.
void write_back(Tensor& t, const Tensor& rows) {
  if (rows.data_ptr() != t.data_ptr()) torch::stable::copy_(t, rows);
}

// Indices on the CPU, where a look costs nothing.
void within(const char* name, const int64_t* index, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i)
    DP_CHECK(low <= index[i] && index[i] < high, name, ": expected in [", std::max<int64_t>(low, 0),
             ", ", high, "), got ", index[i], " at ", i);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// An empty tensor has no address, but an empty list of positions is not the lack of one.
const int64_t* listed(const Tensor& positions) {
  static const int64_t none = 0;
  return positions.numel() > 0 ? data<int64_t>(positions) : &none;
}

int64_t length_of(const Tensor& t, const char* name) {
  DP_CHECK(t.dim() == 1, name, ": expected 1 dimension, got ", t.dim());
  return t.size(0);
}

Logits logits_of(Tensor& t, bool wide = false) {  // (R, V) or (B, L, V); wide: float64 too
  const DType dtype = dtype_of(t, "logits", wide);
  DP_CHECK(t.dim() == 2 || t.dim() == 3, "logits: expected 2 or 3 dimensions, got ", t.dim());
  const int64_t last = t.dim() - 1, vocab = t.size(last);
  DP_CHECK(vocab >= 1 && vocab < INT32_MAX, "logits: vocabulary of size ", vocab);
  make_rows(t);
  const int64_t inner = t.size(last - 1);
  return {t.data_ptr(),      dtype, vocab, inner > 0 ? inner : 1, t.dim() == 3 ? t.stride(0) : 0,
          t.stride(last - 1)};
}

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

int64_t row_count(const Tensor& logits) {
  return logits.dim() == 3 ? logits.size(0) * logits.size(1) : logits.size(0);
}

Exclusions exclusions_of(int64_t mask_id, std::optional<Tensor>& suppress, const Tensor& like) {
  if (!suppress.has_value()) return {mask_id, nullptr, 0};
  const int64_t count = length_of(*suppress, "suppress");
  expect(*suppress, "suppress", ScalarType::Long, {count}, like);
  return {mask_id, data<int64_t>(*suppress), count};
}

Sampling sampling_of(double temperature, double top_p, int64_t top_k, std::optional<Tensor>& keys,
                     const std::vector<int64_t>& sizes, int64_t position_offset,
                     const Tensor& like) {
  DP_CHECK(temperature >= 0 && temperature < kInfinity,
           "temperature: expected a finite number >= 0, got ", temperature);
  const float in_force = temperature_in_force(temperature);
  if (in_force == 0.0f) return {0.0f, nullptr, 0};
  DP_CHECK(top_p >= 0 && top_p <= 1, "top_p: expected a number from 0 to 1, got ", top_p);
  DP_CHECK(top_k >= 0, "top_k: expected a whole number >= 0, got ", top_k);
  DP_CHECK(keys.has_value(), "keys: needed at a temperature of ", kColdest, " and above");
  expect(*keys, "keys", ScalarType::Long, sizes, like);
  return {in_force, data<int64_t>(*keys), position_offset, top_p, top_k};
}

struct RowTensors {
  Tensor tokens, fields, error;

  RowTensors(const Tensor& like, int64_t count, int64_t errors)
      : tokens(torch::stable::new_empty(like, {2, count}, ScalarType::Long)),
        fields(torch::stable::new_empty(like, {kRowFields, count}, ScalarType::Float)),
        error(torch::stable::new_empty(like, {errors}, ScalarType::Long)) {}

  RowOutput output() const {
    return {data<int64_t>(tokens), data<float>(fields), data<int64_t>(error)};
  }
};

// Of rows whose numbers the host has; on a GPU the kernels bring them within their bounds.
void check_policy(const float* rows, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    const float* row = rows + b * kPolicyFields;
    const int field = policy_misfit(row);
    if (field == kPolicyFields) continue;
    constexpr const char* kNames[] = {"selector", "threshold", "min_commit", "max_commit", "score"};
    const PolicyBounds bounds = policy_bounds(field, row);
    bad_argument(kNames[field], ": expected a ", bounds.whole ? "whole " : "", "number from ",
                 bounds.low, " to ", bounds.high, ", got ", row[field], " for sequence ", b);
  }
}

// How a backend allocates scratch and launches.
struct Cpu {
  static void parallel(int64_t n, cpu::Body body, const void* context) {
    torch::stable::parallel_for(0, n, 1,
                                [&](int64_t begin, int64_t end) { body(begin, end, context); });
  }
  // On a GPU no index is looked at, which would wait for it; the kernels pass over those that are
  // out of bounds, or report them.
  static void check_suppress(const Exclusions& ex, int64_t vocab) {
    within("suppress", ex.suppress, ex.suppress_count, 0, vocab);
    DP_CHECK(std::is_sorted(ex.suppress, ex.suppress + ex.suppress_count),
             "suppress: expected ascending ids");
  }
  static void row_stats(const RowStatsArgs& args, const Tensor& logits,
                        const std::optional<Tensor>&) {
    if (args.rows) within("rows", args.rows, args.count, 0, row_count(logits));
    check_suppress(args.exclusions, args.logits.vocab);
    cpu::row_stats(args, parallel);
  }
  static void select(const SelectArgs& args, const Tensor&) {
    check_policy(args.policy, args.batch);
    // Scores that have no order cannot be sorted.
    for (const auto& [scores, name] : {std::pair{args.confidence, "confidence"},
                                       {args.margin, "margin"},
                                       {args.entropy, "entropy"}})
      for (int64_t i = 0; i < args.batch * args.length; ++i)
        DP_CHECK(scores[i] == scores[i] || !args.eligible[i], name, ": NaN at eligible position ",
                 i % args.length, " of sequence ", i / args.length);
    cpu::select(args, parallel);
  }
  static void unmask(const UnmaskArgs& args, const Tensor&, const std::optional<Tensor>&) {
    check_policy(args.policy, args.batch);
    if (args.positions) {
      const int64_t* end = args.positions + args.count;
      within("positions", args.positions, args.count, 0, args.batch * args.length);
      DP_CHECK(std::adjacent_find(args.positions, end, std::greater_equal<>()) == end,
               "positions: expected strictly ascending positions");
    }
    check_suppress(args.exclusions, args.logits.vocab);
    cpu::unmask(args, parallel);
  }
  static void loss(const LossArgs& args, const Tensor&) {
    cpu::certainty_forcing_loss(args, parallel);
  }
  static void loss_backward(const LossBackwardArgs& args, const Tensor&) {
    cpu::certainty_forcing_loss_backward(args, parallel);
  }
  static void kv_write(const KvWriteArgs& args, const Tensor&) {
    within("positions", args.positions, args.count, 0, args.table);
    within("slots", args.slots, args.count, std::numeric_limits<int64_t>::min(),
           args.k_layout.pages * args.k_layout.page_size);
    cpu::kv_write(args, parallel);
  }
  static void block_attention(const BlockAttentionArgs& args, const Tensor&) {
    const int64_t size = args.k_layout.page_size, capacity = args.table_width * size;
    within("begin", args.begin, args.segments, 0, args.count + 1);
    within("end", args.end, args.segments, 0, args.count + 1);
    within("lengths", args.length, args.segments, 0, capacity + 1);
    for (int64_t s = 0; s < args.segments; ++s) {
      DP_CHECK(args.begin[s] <= args.end[s], "begin: expected no larger than end, got ",
               args.begin[s], " above ", args.end[s], " at ", s);
      within("pages", args.pages + s * args.table_width, (args.length[s] + size - 1) / size, 0,
             args.k_layout.pages);
    }
    cpu::block_attention(args, parallel);
  }
  static void rms_norm(const RmsNormArgs& args, const Tensor&) { cpu::rms_norm(args, parallel); }
  static void swiglu(const SwigluArgs& args, const Tensor&) { cpu::swiglu(args, parallel); }
  static void fp8_linear(const Fp8LinearArgs& args, const Tensor&) {
    cpu::fp8_linear(args, parallel);
  }
  static void fp8_widen(const Fp8WidenArgs& args, const Tensor&) { cpu::fp8_widen(args, parallel); }
};

#if defined(DPARALLEL_WITH_CUDA) || defined(DPARALLEL_WITH_CUDA_HOST)
struct Cuda {
  static void check(int code, const char* op) {
    constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice
    STD_TORCH_CHECK(
        code == 0, op, ": CUDA launch failed: ", cuda::error_string(code),
        code == kNoKernelImage
            ? ": dparallel_ext was built for other GPUs (see `dparallel info`); build it "
              "with DPARALLEL_CUDA naming this one's compute capability, such as 90a"
            : "");
  }
  static void* stream(const Tensor& like) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device(), &stream) == 0,
                    "could not get the current CUDA stream");
    return stream;
  }
  static int32_t* counters(const std::optional<Tensor>& t, int64_t needed, const Tensor& like) {
    DP_CHECK(t.has_value() && t->scalar_type() == ScalarType::Int && t->is_contiguous() &&
                 t->get_device() == like.get_device() && t->numel() >= needed,
             "counters: expected at least ", needed, " contiguous int32 zeros on the device");
    return data<int32_t>(*t);
  }
  template <class Args>
  static void launch(const char* op, const Args& args, int64_t scratch_bytes, int64_t counter_count,
                     int (*launcher)(const Args&, const cuda::Workspace&, void*),
                     const Tensor& like, const std::optional<Tensor>& counter_tensor) {
    const DeviceGuard guard(like.get_device());
    const Tensor scratch = torch::stable::new_empty(like, {scratch_bytes}, ScalarType::Byte);
    const cuda::Workspace workspace{scratch.data_ptr(),
                                    counters(counter_tensor, counter_count, like)};
    check(launcher(args, workspace, stream(like)), op);
  }
  static void row_stats(const RowStatsArgs& args, const Tensor& like,
                        const std::optional<Tensor>& c) {
    launch("row_stats", args, cuda::row_stats_scratch(args), cuda::row_stats_counters(args),
           cuda::row_stats, like, c);
  }
  static void select(const SelectArgs& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device());
    const Tensor scratch =
        torch::stable::new_empty(like, {cuda::select_scratch(args)}, ScalarType::Byte);
    check(cuda::select(args, {scratch.data_ptr(), nullptr}, stream(like)), "select");
  }
  static void unmask(const UnmaskArgs& args, const Tensor& like, const std::optional<Tensor>& c) {
    launch("unmask_", args, cuda::unmask_scratch(args), cuda::unmask_counters(args), cuda::unmask,
           like, c);
  }
  static void loss(const LossArgs& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device());
    const Tensor scratch = torch::stable::new_empty(
        like, {cuda::certainty_forcing_loss_scratch(args)}, ScalarType::Byte);
    check(cuda::certainty_forcing_loss(args, {scratch.data_ptr(), nullptr}, stream(like)),
          "certainty_forcing_loss");
  }
  static void loss_backward(const LossBackwardArgs& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device());
    check(cuda::certainty_forcing_loss_backward(args, stream(like)),
          "certainty_forcing_loss_backward");
  }
  static void kv_write(const KvWriteArgs& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device());
    check(cuda::kv_write(args, stream(like)), "kv_write");
  }
  static void block_attention(const BlockAttentionArgs& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device());
    const Tensor scratch =
        torch::stable::new_empty(like, {cuda::block_attention_scratch(args)}, ScalarType::Byte);
    check(cuda::block_attention(args, {scratch.data_ptr(), nullptr}, stream(like)),
          "block_attention");
  }
  static void rms_norm(const RmsNormArgs& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device());
    check(cuda::rms_norm(args, stream(like)), "rms_norm");
  }
  static void swiglu(const SwigluArgs& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device());
    check(cuda::swiglu(args, stream(like)), "swiglu");
  }
  static void fp8_linear(const Fp8LinearArgs& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device());
    check(cuda::fp8_linear(args, stream(like)), "fp8_linear");
  }
  static void fp8_widen(const Fp8WidenArgs& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device());
    check(cuda::fp8_widen(args, stream(like)), "fp8_widen");
  }
};
#endif

constexpr const char* kRowStatsSchema =
    "row_stats(Tensor logits, Tensor? rows, int mask_id, Tensor? suppress, float temperature, "
    "float top_p, int top_k, Tensor? keys, Tensor(a!)? counters) -> (Tensor tokens, Tensor fields, "
    "Tensor error)";

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> row_stats(Tensor logits, std::optional<Tensor> rows,
                                             int64_t mask_id, std::optional<Tensor> suppress,
                                             double temperature, double top_p, int64_t top_k,
                                             std::optional<Tensor> keys,
                                             std::optional<Tensor> counters) {
  const Logits all = logits_of(logits);
  int64_t count = row_count(logits);
  if (rows.has_value()) {
    count = length_of(*rows, "rows");
    expect(*rows, "rows", ScalarType::Long, {count}, logits);
  }
  const RowTensors out(logits, count, count);
  const RowStatsArgs args{all,
                          rows.has_value() ? listed(*rows) : nullptr,
                          count,
                          exclusions_of(mask_id, suppress, logits),
                          sampling_of(temperature, top_p, top_k, keys, {count, 4}, 0, logits),
                          out.output()};
  Backend::row_stats(args, logits, counters);
  return {out.tokens, out.fields, out.error};
}

constexpr const char* kSelectSchema =
    "select(Tensor confidence, Tensor margin, Tensor entropy, Tensor eligible, Tensor policy) "
    "-> Tensor";

template <class Backend>
Tensor select(Tensor confidence, Tensor margin, Tensor entropy, Tensor eligible, Tensor policy) {
  DP_CHECK(confidence.dim() == 2, "confidence: expected 2 dimensions, got ", confidence.dim());
  const int64_t batch = confidence.size(0), length = confidence.size(1);
  expect(confidence, "confidence", ScalarType::Float, {batch, length}, confidence);
  expect(margin, "margin", ScalarType::Float, {batch, length}, confidence);
  expect(entropy, "entropy", ScalarType::Float, {batch, length}, confidence);
  expect(eligible, "eligible", ScalarType::Bool, {batch, length}, confidence);
  expect(policy, "policy", ScalarType::Float, {batch, kPolicyFields}, confidence);
  Tensor commit = torch::stable::new_empty(confidence, {batch, length}, ScalarType::Bool);
  const SelectArgs args{data<float>(confidence),
                        data<float>(margin),
                        data<float>(entropy),
                        data<bool>(eligible),
                        data<float>(policy),
                        batch,
                        length,
                        data<bool>(commit)};
  Backend::select(args, confidence);
  return commit;
}

constexpr const char* kUnmaskSchema =
    "unmask_(Tensor(a!) tokens, Tensor logits, Tensor? positions, Tensor start, Tensor end, "
    "Tensor policy, int mask_id, Tensor? suppress, float temperature, float top_p, int top_k, "
    "Tensor? keys, int position_offset, Tensor(b!)? counters) -> (Tensor committed, Tensor "
    "remaining, Tensor done, Tensor row_tokens, Tensor fields, Tensor error)";

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> unmask_(
    Tensor tokens, Tensor logits, std::optional<Tensor> positions, Tensor start, Tensor end,
    Tensor policy, int64_t mask_id, std::optional<Tensor> suppress, double temperature,
    double top_p, int64_t top_k, std::optional<Tensor> keys, int64_t position_offset,
    std::optional<Tensor> counters) {
  DP_CHECK(tokens.dim() == 2 && tokens.scalar_type() == ScalarType::Long,
           "tokens: expected int64 (B, L)");
  check_device(tokens, "tokens", logits, "the logits");
  own_memory(tokens, "tokens");
  const Logits all = logits_of(logits);
  const int64_t batch = tokens.size(0), length = tokens.size(1), count = row_count(logits);
  if (positions.has_value()) {
    DP_CHECK(logits.dim() == 2, "logits: expected (N, V) with positions");
    expect(*positions, "positions", ScalarType::Long, {count}, logits);
  } else {
    DP_CHECK(logits.dim() == 3 && logits.size(0) == batch && logits.size(1) == length,
             "logits: expected (B, L, V) matching tokens");
  }
  expect(start, "start", ScalarType::Long, {batch}, logits);
  expect(end, "end", ScalarType::Long, {batch}, logits);
  expect(policy, "policy", ScalarType::Float, {batch, kPolicyFields}, logits);
  const RowTensors out(logits, count, batch);
  Tensor committed = torch::stable::new_empty(logits, {batch}, ScalarType::Long);
  Tensor remaining = torch::stable::new_empty(logits, {batch}, ScalarType::Long);
  Tensor done = torch::stable::new_empty(logits, {}, ScalarType::Bool);
  const UnmaskArgs args{
      data<int64_t>(tokens),
      batch,
      length,
      tokens.stride(0),
      tokens.stride(1),
      all,
      positions.has_value() ? listed(*positions) : nullptr,
      count,
      data<int64_t>(start),
      data<int64_t>(end),
      data<float>(policy),
      exclusions_of(mask_id, suppress, logits),
      sampling_of(temperature, top_p, top_k, keys, {batch, 3}, position_offset, logits),
      data<int64_t>(committed),
      data<int64_t>(remaining),
      data<bool>(done),
      out.output()};
  Backend::unmask(args, logits, counters);
  return {committed, remaining, done, out.tokens, out.fields, out.error};
}

constexpr const char* kLossSchema =
    "certainty_forcing_loss(Tensor logits, Tensor labels, Tensor active, float temperature, float "
    "ce_temperature, bool inplace=False) -> (Tensor nll, Tensor entropy, Tensor correct, Tensor "
    "saved, Tensor error)";

// `inplace` chooses among the gradients below.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> certainty_forcing_loss(
    Tensor logits, Tensor labels, Tensor active, double temperature, double ce_temperature,
    bool inplace) {
  if (inplace) own_memory(logits, "logits");
  const Logits all = logits_of(logits, true);
  const int64_t count = row_count(logits);
  expect(labels, "labels", ScalarType::Long, {count}, logits);
  expect(active, "active", ScalarType::Bool, {count}, logits);
  for (const double t : {temperature, ce_temperature})
    DP_CHECK(t >= 1e-5 && t <= 1e5, "temperature: expected a number from 1e-5 to 1e5, got ", t);
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const ScalarType real = wide ? ScalarType::Double : ScalarType::Float;
  Tensor nll = torch::stable::new_empty(logits, {count}, real);
  Tensor entropy = torch::stable::new_empty(logits, {count}, real);
  Tensor correct = torch::stable::new_empty(logits, {count}, ScalarType::Bool);
  Tensor saved = torch::stable::new_empty(logits, {count, kLossSaved}, real);
  Tensor error = torch::stable::new_empty(logits, {count}, ScalarType::Long);
  const LossArgs args{all,
                      data<bool>(active),
                      data<int64_t>(labels),
                      count,
                      ce_temperature,
                      temperature,
                      nll.data_ptr(),
                      entropy.data_ptr(),
                      data<bool>(correct),
                      saved.data_ptr(),
                      data<int64_t>(error)};
  Backend::loss(args, logits);
  return {nll, entropy, correct, saved, error};
}

constexpr const char* kLossBackwardSchema =
    "certainty_forcing_loss_backward(Tensor logits, Tensor labels, Tensor active, float "
    "temperature, float ce_temperature, Tensor saved, Tensor grad_nll, Tensor grad_entropy) -> "
    "Tensor";

constexpr const char* kLossBackwardInplaceSchema =
    "certainty_forcing_loss_backward_(Tensor(a!) logits, Tensor labels, Tensor active, float "
    "temperature, float ce_temperature, Tensor saved, Tensor grad_nll, Tensor grad_entropy) -> ()";

// `grad`: where it goes; null: over the logits.
template <class Backend>
void loss_backward(Tensor& logits, Tensor& labels, Tensor& active, double temperature,
                   double ce_temperature, Tensor& saved, Tensor& grad_nll, Tensor& grad_entropy,
                   void* grad) {
  const Logits all = logits_of(logits, true);
  const int64_t count = row_count(logits);
  expect(labels, "labels", ScalarType::Long, {count}, logits);
  expect(active, "active", ScalarType::Bool, {count}, logits);
  DP_CHECK(temperature > 0 && ce_temperature > 0, "temperature: expected > 0");
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const ScalarType real = wide ? ScalarType::Double : ScalarType::Float;
  expect(saved, "saved", real, {count, kLossSaved}, logits);
  expect(grad_nll, "grad_nll", real, {count}, logits);
  expect(grad_entropy, "grad_entropy", real, {count}, logits);
  const LossBackwardArgs args{all,
                              data<bool>(active),
                              data<int64_t>(labels),
                              count,
                              ce_temperature,
                              temperature,
                              saved.data_ptr(),
                              grad_nll.data_ptr(),
                              grad_entropy.data_ptr(),
                              grad};
  Backend::loss_backward(args, logits);
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

template <class Backend>
void certainty_forcing_loss_backward_(Tensor logits, Tensor labels, Tensor active,
                                      double temperature, double ce_temperature, Tensor saved,
                                      Tensor grad_nll, Tensor grad_entropy) {
  own_memory(logits, "logits");
  Tensor rows = logits;
  loss_backward<Backend>(rows, labels, active, temperature, ce_temperature, saved, grad_nll,
                         grad_entropy, nullptr);
  write_back(logits, rows);
}

// [count, heads, head_dim]; rows become contiguous.
void expect_heads(Tensor& t, const char* name, int64_t count, int64_t heads, int64_t dim,
                  const Tensor& like) {
  DP_CHECK(t.dim() == 3 && t.size(0) == count && t.size(1) == heads && t.size(2) == dim, name,
           ": expected (", count, ", ", heads, ", ", dim, ")");
  DP_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of q");
  check_device(t, name, like, "q");
  if ((t.stride(2) != 1 && dim != 1) || (t.stride(1) != dim && heads != 1))
    t = torch::stable::contiguous(t);
}

// (pages, heads, page_size, head_dim); the last becomes contiguous.
CacheLayout layout_of(Tensor& cache, const char* name, const Tensor& q) {
  DP_CHECK(cache.dim() == 4, name, ": expected (pages, heads, page_size, head_dim), got ",
           cache.dim(), " dimensions");
  DP_CHECK(cache.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  check_device(cache, name, q, "q");
  DP_CHECK(q.dim() == 3, "q: expected 3 dimensions, got ", q.dim());
  DP_CHECK(cache.size(3) == q.size(2) && cache.size(1) > 0 && q.size(1) % cache.size(1) == 0 &&
               q.size(1) <= 64 * cache.size(1) && cache.size(2) > 0,
           name, ": its heads do not fit those of q");
  make_rows(cache);
  return {cache.size(0),   cache.size(2),   cache.size(1),  cache.size(3),
          cache.stride(0), cache.stride(1), cache.stride(2)};
}

void check_same(const CacheLayout& k, const CacheLayout& v) {
  DP_CHECK(k.pages == v.pages && k.page_size == v.page_size && k.heads == v.heads,
           "v_cache: expected the shape of k_cache");
}

constexpr const char* kKvWriteSchema =
    "kv_write(Tensor(a!) q, Tensor k, Tensor v, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor "
    "positions, Tensor slots, Tensor cos, Tensor sin, bool interleaved) -> ()";

template <class Backend>
void kv_write(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor positions,
              Tensor slots, Tensor cos, Tensor sin, bool interleaved) {
  Tensor q_rows = q, k_rows = k_cache, v_rows = v_cache;
  const DType dtype = dtype_of(q, "q");
  const CacheLayout keys = layout_of(k_rows, "k_cache", q);
  const CacheLayout values = layout_of(v_rows, "v_cache", q);
  check_same(keys, values);
  own_memory(q, "q");
  own_memory(k_cache, "k_cache");
  own_memory(v_cache, "v_cache");
  DP_CHECK(k_cache.numel() == 0 || k_cache.data_ptr() != v_cache.data_ptr(),
           "v_cache: expected memory of its own, got that of k_cache");
  const int64_t count = q.size(0), heads = q.size(1), dim = q.size(2);
  DP_CHECK(dim % 2 == 0, "q: expected an even head_dim, got ", dim);
  expect_heads(q_rows, "q", count, heads, dim, q);
  expect_heads(k, "k", count, keys.heads, dim, q);
  expect_heads(v, "v", count, keys.heads, dim, q);
  DP_CHECK(q.numel() == 0 || (k.data_ptr() != q.data_ptr() && v.data_ptr() != q.data_ptr()),
           "q: expected memory of its own, which is rotated in place, got that of k or v");
  expect(positions, "positions", ScalarType::Long, {count}, q);
  expect(slots, "slots", ScalarType::Long, {count}, q);
  DP_CHECK(cos.dim() == 2, "cos: expected 2 dimensions, got ", cos.dim());
  const int64_t table = cos.size(0);
  expect(cos, "cos", ScalarType::Float, {table, dim / 2}, q);
  expect(sin, "sin", ScalarType::Float, {table, dim / 2}, q);
  const KvWriteArgs args{dtype,
                         q_rows.data_ptr(),
                         k.data_ptr(),
                         v.data_ptr(),
                         q_rows.stride(0),
                         k.stride(0),
                         v.stride(0),
                         count,
                         heads,
                         data<int64_t>(positions),
                         data<int64_t>(slots),
                         data<float>(cos),
                         data<float>(sin),
                         table,
                         interleaved,
                         k_rows.data_ptr(),
                         v_rows.data_ptr(),
                         keys,
                         values};
  Backend::kv_write(args, q);
  write_back(q, q_rows);
  write_back(k_cache, k_rows);
  write_back(v_cache, v_rows);
}

constexpr const char* kBlockAttentionSchema =
    "block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor begin, Tensor end, Tensor "
    "lengths, Tensor pages, int longest_query, int longest_length, float scale) -> Tensor";

template <class Backend>
Tensor block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor begin, Tensor end,
                       Tensor lengths, Tensor pages, int64_t longest_query, int64_t longest_length,
                       double scale) {
  const DType dtype = dtype_of(q, "q");
  const CacheLayout keys = layout_of(k_cache, "k_cache", q);
  const CacheLayout values = layout_of(v_cache, "v_cache", q);
  check_same(keys, values);
  const int64_t count = q.size(0), heads = q.size(1), dim = q.size(2);
  const int64_t segments = length_of(begin, "begin");
  expect_heads(q, "q", count, heads, dim, q);
  expect(begin, "begin", ScalarType::Long, {segments}, q);
  expect(end, "end", ScalarType::Long, {segments}, q);
  expect(lengths, "lengths", ScalarType::Long, {segments}, q);
  DP_CHECK(pages.dim() == 2, "pages: expected 2 dimensions, got ", pages.dim());
  const int64_t table_width = pages.size(1);
  expect(pages, "pages", ScalarType::Long, {segments, table_width}, q);
  DP_CHECK(longest_query >= 0, "longest_query: expected >= 0, got ", longest_query);
  DP_CHECK(longest_length >= 0, "longest_length: expected >= 0, got ", longest_length);
  Tensor out = torch::stable::new_empty(q, {count, heads, dim});
  const BlockAttentionArgs args{dtype,
                                q.data_ptr(),
                                q.stride(0),
                                count,
                                heads,
                                k_cache.data_ptr(),
                                v_cache.data_ptr(),
                                keys,
                                values,
                                segments,
                                data<int64_t>(begin),
                                data<int64_t>(end),
                                data<int64_t>(lengths),
                                data<int64_t>(pages),
                                table_width,
                                longest_query,
                                longest_length,
                                static_cast<float>(scale),
                                out.data_ptr()};
  if (out.numel() > 0) Backend::block_attention(args, q);
  return out;
}

// (R, width) or (B, L, width) like `like`; rows become contiguous.
RowStrides rows_of(Tensor& t, const char* name, const Tensor& like) {
  DP_CHECK(t.dim() == like.dim() && (t.dim() == 2 || t.dim() == 3), name,
           ": expected 2 or 3 dimensions, got ", t.dim());
  const int64_t last = t.dim() - 1;
  for (int64_t d = 0; d <= last; ++d)
    DP_CHECK(t.size(d) == like.size(d), name, ": expected size ", like.size(d), " in dimension ", d,
             ", got ", t.size(d));
  DP_CHECK(t.size(last) >= 1, name, ": expected rows of at least 1 number");
  DP_CHECK(t.scalar_type() == like.scalar_type(), name, ": wrong dtype");
  check_device(t, name, like, "the others");
  make_rows(t);
  const int64_t inner = t.size(last - 1);
  return {inner > 0 ? inner : 1, t.dim() == 3 ? t.stride(0) : 0, t.stride(last - 1)};
}

constexpr const char* kRmsNormSchema =
    "rms_norm(Tensor x, Tensor? delta, Tensor weight, Tensor? bias, float eps) -> (Tensor out, "
    "Tensor sum)";

template <class Backend>
std::tuple<Tensor, Tensor> rms_norm(Tensor x, std::optional<Tensor> delta, Tensor weight,
                                    std::optional<Tensor> bias, double eps) {
  const DType dtype = dtype_of(x, "x");
  const RowStrides x_rows = rows_of(x, "x", x);
  const RowStrides delta_rows =
      delta.has_value() ? rows_of(*delta, "delta", x) : RowStrides{1, 0, 0};
  const int64_t width = x.size(x.dim() - 1);
  expect(weight, "weight", x.scalar_type(), {width}, x);
  if (bias.has_value()) expect(*bias, "bias", x.scalar_type(), {width}, x);
  Tensor out = torch::stable::new_empty(x, sizes_of(x));
  Tensor sum =
      torch::stable::new_empty(x, delta.has_value() ? sizes_of(x) : std::vector<int64_t>{0});
  const RmsNormArgs args{dtype,
                         x.data_ptr(),
                         delta.has_value() ? delta->data_ptr() : nullptr,
                         x_rows,
                         delta_rows,
                         row_count(x),
                         width,
                         weight.data_ptr(),
                         bias.has_value() ? bias->data_ptr() : nullptr,
                         static_cast<float>(eps),
                         sum.data_ptr(),
                         out.data_ptr()};
  Backend::rms_norm(args, x);
  return {out, sum};
}

constexpr const char* kSwigluSchema = "swiglu(Tensor gate, Tensor up) -> Tensor";

template <class Backend>
Tensor swiglu(Tensor gate, Tensor up) {
  const DType dtype = dtype_of(gate, "gate");
  const RowStrides gate_rows = rows_of(gate, "gate", gate), up_rows = rows_of(up, "up", gate);
  Tensor out = torch::stable::new_empty(gate, sizes_of(gate));
  const SwigluArgs args{
      dtype,           gate.data_ptr(),           up.data_ptr(), gate_rows, up_rows,
      row_count(gate), gate.size(gate.dim() - 1), out.data_ptr()};
  Backend::swiglu(args, gate);
  return out;
}

constexpr const char* kFp8LinearSchema =
    "fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor";

template <class Backend>
Tensor fp8_linear(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias) {
  const DType dtype = dtype_of(x, "x");
  DP_CHECK(x.dim() == 2 && weight.dim() == 2, "x: expected (N, in), weight (out, in)");
  const int64_t count = x.size(0), in = x.size(1), out_width = weight.size(0);
  expect(weight, "weight", ScalarType::Float8_e4m3fn, {out_width, in}, x);
  expect(scale, "scale", ScalarType::Float, {out_width}, x);
  if (bias.has_value()) expect(*bias, "bias", x.scalar_type(), {out_width}, x);
  make_rows(x);
  Tensor out = torch::stable::new_empty(x, {count, out_width});
  const Fp8LinearArgs args{dtype,
                           x.data_ptr(),
                           x.stride(0),
                           count,
                           in,
                           out_width,
                           static_cast<const uint8_t*>(weight.data_ptr()),
                           data<float>(scale),
                           bias.has_value() ? bias->data_ptr() : nullptr,
                           out.data_ptr()};
  Backend::fp8_linear(args, x);
  return out;
}

constexpr const char* kFp8WidenSchema =
    "fp8_widen(Tensor weight, Tensor scale, Tensor like) -> Tensor";

// Of the dtype of `like`.
template <class Backend>
Tensor fp8_widen(Tensor weight, Tensor scale, Tensor like) {
  const DType dtype = dtype_of(like, "like");
  DP_CHECK(weight.dim() == 2, "weight: expected (out, in)");
  const int64_t out_width = weight.size(0), in = weight.size(1);
  expect(weight, "weight", ScalarType::Float8_e4m3fn, {out_width, in}, like);
  expect(scale, "scale", ScalarType::Float, {out_width}, like);
  Tensor out = torch::stable::new_empty(like, {out_width, in});
  const Fp8WidenArgs args{dtype,
                          in,
                          out_width,
                          static_cast<const uint8_t*>(weight.data_ptr()),
                          data<float>(scale),
                          out.data_ptr()};
  Backend::fp8_widen(args, like);
  return out;
}

#ifndef DPARALLEL_WITH_CUDA_HOST
// Where an op has no kernel, its error is a sentence instead of the dispatcher's forty lines.
template <class Why, class Result, class... Arguments>
Result refuse(Arguments...) {
  throw std::runtime_error(Why::text);
}
template <class Why, class Result, class... Arguments>
constexpr auto refusal(Result (*)(Arguments...)) {
  return &refuse<Why, Result, Arguments...>;
}
struct NoDevice {
  static constexpr const char* text =
      "dparallel_ext has kernels for the CPU and for CUDA alone: move the tensors to one of them";
};
#ifndef DPARALLEL_WITH_CUDA
struct NoCuda {
  static constexpr const char* text =
      "dparallel_ext has no CUDA kernels in this build and refuses tensors on a "
      "GPU: " DPARALLEL_CUDA_REASON
      ". Build them with nvcc on PATH or CUDA_HOME set: DPARALLEL_CUDA=1 pip install "
      "--force-reinstall --no-cache-dir --no-deps . (see `dparallel info`)";
};
#endif
#endif

}  // namespace

STABLE_TORCH_LIBRARY(dparallel, m) {
  m.def(kRowStatsSchema);
  m.def(kSelectSchema);
  m.def(kUnmaskSchema);
  m.def(kLossSchema);
  m.def(kLossBackwardSchema);
  m.def(kLossBackwardInplaceSchema);
  m.def(kKvWriteSchema);
  m.def(kBlockAttentionSchema);
  m.def(kRmsNormSchema);
  m.def(kSwigluSchema);
  m.def(kFp8LinearSchema);
  m.def(kFp8WidenSchema);
}

#define DPARALLEL_OPS(DO)              \
  DO(row_stats)                        \
  DO(select)                           \
  DO(unmask_)                          \
  DO(certainty_forcing_loss)           \
  DO(certainty_forcing_loss_backward)  \
  DO(certainty_forcing_loss_backward_) \
  DO(kv_write)                         \
  DO(block_attention)                  \
  DO(rms_norm)                         \
  DO(swiglu)                           \
  DO(fp8_linear)                       \
  DO(fp8_widen)

#define DPARALLEL_CPU(op) m.impl(#op, TORCH_BOX(&op<Cpu>));
#define DPARALLEL_CUDA(op) m.impl(#op, TORCH_BOX(&op<Cuda>));
#define DPARALLEL_NO_CUDA(op) m.impl(#op, TORCH_BOX(refusal<NoCuda>(&op<Cpu>)));
#define DPARALLEL_NO_DEVICE(op) m.impl(#op, TORCH_BOX(refusal<NoDevice>(&op<Cpu>)));

#define DPARALLEL_IMPL(KEY, DO) \
  STABLE_TORCH_LIBRARY_IMPL(dparallel, KEY, m) { DPARALLEL_OPS(DO) }

#ifdef DPARALLEL_WITH_CUDA_HOST
DPARALLEL_IMPL(CPU, DPARALLEL_CUDA)
#else
DPARALLEL_IMPL(CPU, DPARALLEL_CPU)
#ifdef DPARALLEL_WITH_CUDA
DPARALLEL_IMPL(CUDA, DPARALLEL_CUDA)
#else
DPARALLEL_IMPL(CUDA, DPARALLEL_NO_CUDA)
#endif
DPARALLEL_IMPL(MPS, DPARALLEL_NO_DEVICE)
DPARALLEL_IMPL(XPU, DPARALLEL_NO_DEVICE)
#endif
