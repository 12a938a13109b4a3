// Schemas, checks and dispatch: the only file that knows torch, through its stable ABI, so that one
// build serves later releases. Python (dparallel_ext/ops.py) turns user input into these arguments
// and reports errors by name; the checks here keep memory safe whoever calls.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <tuple>
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

DType dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double: return DType::float64;
    default: STD_TORCH_CHECK(false, "logits: expected float32, bfloat16, float16 or float64");
  }
  return DType::float32;
}

const Tensor& contiguous(const Tensor& t, const char* name, ScalarType dtype,
                         std::vector<int64_t> sizes, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": wrong dtype");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(t.get_device() == like.get_device() && t.is_cpu() == like.is_cpu(), name,
                  ": expected the device of the logits");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(),
                  " dimensions, got ", t.dim());
  for (size_t i = 0; i < sizes.size(); ++i)
    STD_TORCH_CHECK(t.size(i) == sizes[i], name, ": expected size ", sizes[i], " in dimension ", i,
                    ", got ", t.size(i));
  return t;
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

Logits logits_of(const Tensor& t, bool wide = false) {  // (R, V) or (B, L, V); wide: float64 too
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 3, "logits: expected 2 or 3 dimensions, got ",
                  t.dim());
  const int64_t last = t.dim() - 1, vocab = t.size(last);
  STD_TORCH_CHECK(vocab >= 1 && vocab < INT32_MAX, "logits: vocabulary of size ", vocab);
  STD_TORCH_CHECK(t.stride(last) == 1 || vocab == 1, "logits: the vocabulary must be contiguous");
  STD_TORCH_CHECK(wide || t.scalar_type() != ScalarType::Double,
                  "logits: expected float32, bfloat16 or float16");
  const int64_t inner = t.dim() == 3 ? t.size(1) : (t.size(0) > 0 ? t.size(0) : 1);
  return {
      t.data_ptr(),      dtype_of(t), vocab, inner > 0 ? inner : 1, t.dim() == 3 ? t.stride(0) : 0,
      t.stride(last - 1)};
}

int64_t row_count(const Tensor& logits) {
  return logits.dim() == 3 ? logits.size(0) * logits.size(1) : logits.size(0);
}

Exclusions exclusions_of(int64_t mask_id, const std::optional<Tensor>& suppress,
                         const Tensor& like) {
  if (!suppress.has_value()) return {mask_id, nullptr, 0};
  contiguous(*suppress, "suppress", ScalarType::Long, {suppress->size(0)}, like);
  return {mask_id, data<int64_t>(*suppress), suppress->size(0)};
}

Sampling sampling_of(double temperature, double top_p, int64_t top_k,
                     const std::optional<Tensor>& keys, std::vector<int64_t> sizes,
                     int64_t position_offset, const Tensor& like) {
  STD_TORCH_CHECK(temperature >= 0 && temperature < kInfinity,
                  "temperature: expected a finite number >= 0, got ", temperature);
  const float in_force = temperature_in_force(temperature);
  if (in_force == 0.0f) return {0.0f, nullptr, 0};
  STD_TORCH_CHECK(top_p >= 0 && top_p <= 1, "top_p: expected a number from 0 to 1, got ", top_p);
  STD_TORCH_CHECK(top_k >= 0, "top_k: expected a whole number >= 0, got ", top_k);
  STD_TORCH_CHECK(keys.has_value(), "keys: needed at a temperature of ", kColdest, " and above");
  contiguous(*keys, "keys", ScalarType::Long, sizes, like);
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
    STD_TORCH_CHECK(false, kNames[field], ": expected a ", bounds.whole ? "whole " : "",
                    "number from ", bounds.low, " to ", bounds.high, ", got ", row[field],
                    " for sequence ", b);
  }
}

// How a backend allocates scratch and launches.
struct Cpu {
  static void parallel(int64_t n, cpu::Body body, const void* context) {
    torch::stable::parallel_for(0, n, 1,
                                [&](int64_t begin, int64_t end) { body(begin, end, context); });
  }
  static void row_stats(const RowStatsArgs& args, const Tensor&, const std::optional<Tensor>&) {
    cpu::row_stats(args, parallel);
  }
  static void select(const SelectArgs& args, const Tensor&) {
    check_policy(args.policy, args.batch);
    cpu::select(args, parallel);
  }
  static void unmask(const UnmaskArgs& args, const Tensor&, const std::optional<Tensor>&) {
    check_policy(args.policy, args.batch);
    cpu::unmask(args, parallel);
  }
  static void loss(const LossArgs& args, const Tensor&) {
    cpu::certainty_forcing_loss(args, parallel);
  }
  static void loss_backward(const LossBackwardArgs& args, const Tensor&) {
    cpu::certainty_forcing_loss_backward(args, parallel);
  }
  // On a GPU the indices are not looked at, which would wait for it.
  static void kv_write(const KvWriteArgs& args, const Tensor&) {
    const int64_t slots = args.k_layout.pages * args.k_layout.page_size;
    for (int64_t i = 0; i < args.count; ++i) {
      STD_TORCH_CHECK(args.positions[i] >= 0 && args.positions[i] < args.table,
                      "positions: ", args.positions[i], " of row ", i, ", but cos and sin have ",
                      args.table, " rows");
      STD_TORCH_CHECK(args.slots[i] < slots, "slots: ", args.slots[i], " of row ", i,
                      ", but the cache has ", slots);
    }
    cpu::kv_write(args, parallel);
  }
  static void block_attention(const BlockAttentionArgs& args, const Tensor&) {
    const int64_t page_size = args.k_layout.page_size;
    for (int64_t s = 0; s < args.segments; ++s) {
      const int64_t begin = args.begin[s], end = args.end[s], length = args.length[s];
      STD_TORCH_CHECK(0 <= begin && begin <= end && end <= args.count, "begin: segment ", s,
                      " is of rows [", begin, ", ", end, "), but q has ", args.count);
      STD_TORCH_CHECK(0 <= length && length <= args.table_width * page_size, "length: ", length,
                      " of segment ", s, ", but its pages hold ", args.table_width * page_size);
      for (int64_t i = 0; i < (length + page_size - 1) / page_size; ++i) {
        const int64_t page = args.pages[s * args.table_width + i];
        STD_TORCH_CHECK(0 <= page && page < args.k_layout.pages, "pages: ", page, " of segment ", s,
                        ", but the cache has ", args.k_layout.pages);
      }
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
    STD_TORCH_CHECK(t.has_value() && t->scalar_type() == ScalarType::Int && t->is_contiguous() &&
                        t->get_device() == like.get_device() && t->numel() >= needed,
                    "counters: expected at least ", needed,
                    " contiguous int32 zeros on the device");
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
  int64_t count = row_count(logits);
  if (rows.has_value()) {
    count = rows->size(0);
    contiguous(*rows, "rows", ScalarType::Long, {count}, logits);
  }
  const RowTensors out(logits, count, count);
  const RowStatsArgs args{logits_of(logits),
                          rows.has_value() ? data<int64_t>(*rows) : nullptr,
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
  STD_TORCH_CHECK(confidence.dim() == 2, "confidence: expected (B, L)");
  const int64_t batch = confidence.size(0), length = confidence.size(1);
  for (const auto& [tensor, name] :
       {std::pair<const Tensor&, const char*>{confidence, "confidence"},
        {margin, "margin"},
        {entropy, "entropy"}})
    contiguous(tensor, name, ScalarType::Float, {batch, length}, confidence);
  contiguous(eligible, "eligible", ScalarType::Bool, {batch, length}, confidence);
  contiguous(policy, "policy", ScalarType::Float, {batch, kPolicyFields}, confidence);
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
  STD_TORCH_CHECK(tokens.dim() == 2 && tokens.scalar_type() == ScalarType::Long,
                  "tokens: expected int64 (B, L)");
  const int64_t batch = tokens.size(0), length = tokens.size(1), count = row_count(logits);
  if (positions.has_value()) {
    STD_TORCH_CHECK(logits.dim() == 2, "logits: expected (N, V) with positions");
    contiguous(*positions, "positions", ScalarType::Long, {count}, logits);
  } else {
    STD_TORCH_CHECK(logits.dim() == 3 && logits.size(0) == batch && logits.size(1) == length,
                    "logits: expected (B, L, V) matching tokens");
  }
  contiguous(start, "start", ScalarType::Long, {batch}, logits);
  contiguous(end, "end", ScalarType::Long, {batch}, logits);
  contiguous(policy, "policy", ScalarType::Float, {batch, kPolicyFields}, logits);
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
      logits_of(logits),
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
    bool /*inplace*/) {
  const int64_t count = row_count(logits);
  contiguous(labels, "labels", ScalarType::Long, {count}, logits);
  contiguous(active, "active", ScalarType::Bool, {count}, logits);
  for (const double t : {temperature, ce_temperature})
    STD_TORCH_CHECK(t >= 1e-5 && t <= 1e5, "temperature: expected a number from 1e-5 to 1e5, got ",
                    t);
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const ScalarType real = wide ? ScalarType::Double : ScalarType::Float;
  Tensor nll = torch::stable::new_empty(logits, {count}, real);
  Tensor entropy = torch::stable::new_empty(logits, {count}, real);
  Tensor correct = torch::stable::new_empty(logits, {count}, ScalarType::Bool);
  Tensor saved = torch::stable::new_empty(logits, {count, kLossSaved}, real);
  Tensor error = torch::stable::new_empty(logits, {count}, ScalarType::Long);
  const LossArgs args{
      logits_of(logits, true), data<bool>(active), data<int64_t>(labels), count,
      ce_temperature,          temperature,        nll.data_ptr(),        entropy.data_ptr(),
      data<bool>(correct),     saved.data_ptr(),   data<int64_t>(error)};
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
void loss_backward(const Tensor& logits, const Tensor& labels, const Tensor& active,
                   double temperature, double ce_temperature, const Tensor& saved,
                   const Tensor& grad_nll, const Tensor& grad_entropy, void* grad) {
  const int64_t count = row_count(logits);
  contiguous(labels, "labels", ScalarType::Long, {count}, logits);
  contiguous(active, "active", ScalarType::Bool, {count}, logits);
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const ScalarType real = wide ? ScalarType::Double : ScalarType::Float;
  contiguous(saved, "saved", real, {count, kLossSaved}, logits);
  contiguous(grad_nll, "grad_nll", real, {count}, logits);
  contiguous(grad_entropy, "grad_entropy", real, {count}, logits);
  const LossBackwardArgs args{logits_of(logits, true), data<bool>(active),
                              data<int64_t>(labels),   count,
                              ce_temperature,          temperature,
                              saved.data_ptr(),        grad_nll.data_ptr(),
                              grad_entropy.data_ptr(), grad};
  Backend::loss_backward(args, logits);
}

template <class Backend>
Tensor certainty_forcing_loss_backward(Tensor logits, Tensor labels, Tensor active,
                                       double temperature, double ce_temperature, Tensor saved,
                                       Tensor grad_nll, Tensor grad_entropy) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < logits.dim(); ++d) sizes.push_back(logits.size(d));
  Tensor grad = torch::stable::new_empty(logits, sizes);
  loss_backward<Backend>(logits, labels, active, temperature, ce_temperature, saved, grad_nll,
                         grad_entropy, grad.data_ptr());
  return grad;
}

template <class Backend>
void certainty_forcing_loss_backward_(Tensor logits, Tensor labels, Tensor active,
                                      double temperature, double ce_temperature, Tensor saved,
                                      Tensor grad_nll, Tensor grad_entropy) {
  loss_backward<Backend>(logits, labels, active, temperature, ce_temperature, saved, grad_nll,
                         grad_entropy, nullptr);
}

// [count, heads, head_dim] with contiguous heads.
void check_heads(const Tensor& t, const char* name, int64_t count, int64_t heads, int64_t dim,
                 const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == count && t.size(1) == heads && t.size(2) == dim,
                  name, ": expected (", count, ", ", heads, ", ", dim, ")");
  STD_TORCH_CHECK((t.stride(2) == 1 || dim == 1) && (t.stride(1) == dim || heads == 1), name,
                  ": expected each row contiguous");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of q");
  STD_TORCH_CHECK(t.get_device() == like.get_device() && t.is_cpu() == like.is_cpu(), name,
                  ": expected the device of q");
}

// (pages, heads, page_size, head_dim)
CacheLayout layout_of(const Tensor& cache, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(cache.dim() == 4 && (cache.stride(3) == 1 || cache.size(3) == 1), name,
                  ": expected (pages, heads, page_size, head_dim), the last contiguous");
  STD_TORCH_CHECK(cache.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  STD_TORCH_CHECK(cache.get_device() == q.get_device() && cache.is_cpu() == q.is_cpu(), name,
                  ": expected the device of q");
  STD_TORCH_CHECK(q.dim() == 3 && cache.size(3) == q.size(2) && cache.size(1) > 0 &&
                      q.size(1) % cache.size(1) == 0 && q.size(1) <= 64 * cache.size(1) &&
                      cache.size(2) > 0,
                  name, ": its heads do not fit those of q");
  return {cache.size(0),   cache.size(2),   cache.size(1),  cache.size(3),
          cache.stride(0), cache.stride(1), cache.stride(2)};
}

void check_same(const CacheLayout& k, const CacheLayout& v) {
  STD_TORCH_CHECK(k.pages == v.pages && k.page_size == v.page_size && k.heads == v.heads,
                  "v_cache: expected the shape of k_cache");
}

constexpr const char* kKvWriteSchema =
    "kv_write(Tensor(a!) q, Tensor k, Tensor v, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor "
    "positions, Tensor slots, Tensor cos, Tensor sin, bool interleaved) -> ()";

template <class Backend>
void kv_write(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor positions,
              Tensor slots, Tensor cos, Tensor sin, bool interleaved) {
  const CacheLayout keys = layout_of(k_cache, "k_cache", q);
  const CacheLayout values = layout_of(v_cache, "v_cache", q);
  check_same(keys, values);
  const int64_t count = q.size(0), dim = q.size(2);
  STD_TORCH_CHECK(dim % 2 == 0, "q: expected an even head_dim, got ", dim);
  check_heads(q, "q", count, q.size(1), dim, q);
  check_heads(k, "k", count, keys.heads, dim, q);
  check_heads(v, "v", count, keys.heads, dim, q);
  contiguous(positions, "positions", ScalarType::Long, {count}, q);
  contiguous(slots, "slots", ScalarType::Long, {count}, q);
  contiguous(cos, "cos", ScalarType::Float, {cos.size(0), dim / 2}, q);
  contiguous(sin, "sin", ScalarType::Float, {cos.size(0), dim / 2}, q);
  const KvWriteArgs args{dtype_of(q),
                         q.data_ptr(),
                         k.data_ptr(),
                         v.data_ptr(),
                         q.stride(0),
                         k.stride(0),
                         v.stride(0),
                         count,
                         q.size(1),
                         data<int64_t>(positions),
                         data<int64_t>(slots),
                         data<float>(cos),
                         data<float>(sin),
                         cos.size(0),
                         interleaved,
                         k_cache.data_ptr(),
                         v_cache.data_ptr(),
                         keys,
                         values};
  Backend::kv_write(args, q);
}

constexpr const char* kBlockAttentionSchema =
    "block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor begin, Tensor end, Tensor "
    "length, Tensor pages, int longest_query, int longest_length, float scale) -> Tensor";

template <class Backend>
Tensor block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor begin, Tensor end,
                       Tensor length, Tensor pages, int64_t longest_query, int64_t longest_length,
                       double scale) {
  const CacheLayout keys = layout_of(k_cache, "k_cache", q);
  const CacheLayout values = layout_of(v_cache, "v_cache", q);
  check_same(keys, values);
  const int64_t count = q.size(0), segments = begin.numel();
  check_heads(q, "q", count, q.size(1), q.size(2), q);
  contiguous(begin, "begin", ScalarType::Long, {segments}, q);
  contiguous(end, "end", ScalarType::Long, {segments}, q);
  contiguous(length, "length", ScalarType::Long, {segments}, q);
  STD_TORCH_CHECK(pages.dim() == 2, "pages: expected 2 dimensions, got ", pages.dim());
  contiguous(pages, "pages", ScalarType::Long, {segments, pages.size(1)}, q);
  Tensor out = torch::stable::new_empty(q, {count, q.size(1), q.size(2)});
  const BlockAttentionArgs args{dtype_of(q),
                                q.data_ptr(),
                                q.stride(0),
                                count,
                                q.size(1),
                                k_cache.data_ptr(),
                                v_cache.data_ptr(),
                                keys,
                                values,
                                segments,
                                data<int64_t>(begin),
                                data<int64_t>(end),
                                data<int64_t>(length),
                                data<int64_t>(pages),
                                pages.size(1),
                                longest_query,
                                longest_length,
                                static_cast<float>(scale),
                                out.data_ptr()};
  if (count > 0) Backend::block_attention(args, q);
  return out;
}

// (R, width) or (B, L, width) in rows of contiguous numbers, like `like`.
RowStrides rows_of(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == like.dim() && (t.dim() == 2 || t.dim() == 3), name,
                  ": expected 2 or 3 dimensions, got ", t.dim());
  const int64_t last = t.dim() - 1;
  for (int64_t d = 0; d <= last; ++d)
    STD_TORCH_CHECK(t.size(d) == like.size(d), name, ": expected size ", like.size(d),
                    " in dimension ", d, ", got ", t.size(d));
  STD_TORCH_CHECK(t.size(last) >= 1, name, ": expected rows of at least 1 number");
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) == 1, name, ": expected contiguous rows");
  STD_TORCH_CHECK(t.scalar_type() != ScalarType::Double, name,
                  ": expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": wrong dtype");
  STD_TORCH_CHECK(t.get_device() == like.get_device() && t.is_cpu() == like.is_cpu(), name,
                  ": wrong device");
  const int64_t inner = t.dim() == 3 ? t.size(1) : t.size(0);
  return {inner > 0 ? inner : 1, t.dim() == 3 ? t.stride(0) : 0, t.stride(last - 1)};
}

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

constexpr const char* kRmsNormSchema =
    "rms_norm(Tensor x, Tensor? delta, Tensor weight, Tensor? bias, float eps) -> (Tensor out, "
    "Tensor sum)";

template <class Backend>
std::tuple<Tensor, Tensor> rms_norm(Tensor x, std::optional<Tensor> delta, Tensor weight,
                                    std::optional<Tensor> bias, double eps) {
  const RowStrides rows = rows_of(x, "x", x);
  const int64_t width = x.size(x.dim() - 1);
  contiguous(weight, "weight", x.scalar_type(), {width}, x);
  if (bias.has_value()) contiguous(*bias, "bias", x.scalar_type(), {width}, x);
  Tensor out = torch::stable::new_empty(x, sizes_of(x));
  Tensor sum =
      torch::stable::new_empty(x, delta.has_value() ? sizes_of(x) : std::vector<int64_t>{0});
  const RmsNormArgs args{dtype_of(x),
                         x.data_ptr(),
                         delta.has_value() ? delta->data_ptr() : nullptr,
                         rows,
                         delta.has_value() ? rows_of(*delta, "delta", x) : RowStrides{1, 0, 0},
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
  const RowStrides gate_rows = rows_of(gate, "gate", gate), up_rows = rows_of(up, "up", gate);
  Tensor out = torch::stable::new_empty(gate, sizes_of(gate));
  const SwigluArgs args{
      dtype_of(gate),  gate.data_ptr(),           up.data_ptr(), gate_rows, up_rows,
      row_count(gate), gate.size(gate.dim() - 1), out.data_ptr()};
  Backend::swiglu(args, gate);
  return out;
}

constexpr const char* kFp8LinearSchema =
    "fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor";

template <class Backend>
Tensor fp8_linear(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x: expected (N, in), weight (out, in)");
  const int64_t count = x.size(0), in = x.size(1), out_width = weight.size(0);
  STD_TORCH_CHECK(x.stride(1) == 1 || in == 1, "x: expected contiguous rows");
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double,
                  "x: expected float32, bfloat16 or float16");
  contiguous(weight, "weight", ScalarType::Float8_e4m3fn, {out_width, in}, x);
  contiguous(scale, "scale", ScalarType::Float, {out_width}, x);
  if (bias.has_value()) contiguous(*bias, "bias", x.scalar_type(), {out_width}, x);
  Tensor out = torch::stable::new_empty(x, {count, out_width});
  const Fp8LinearArgs args{dtype_of(x),
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
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected (out, in)");
  STD_TORCH_CHECK(like.scalar_type() != ScalarType::Double,
                  "like: expected float32, bfloat16 or float16");
  const int64_t out_width = weight.size(0), in = weight.size(1);
  contiguous(weight, "weight", ScalarType::Float8_e4m3fn, {out_width, in}, like);
  contiguous(scale, "scale", ScalarType::Float, {out_width}, like);
  Tensor out = torch::stable::new_empty(like, {out_width, in});
  const Fp8WidenArgs args{dtype_of(like),     in,
                          out_width,          static_cast<const uint8_t*>(weight.data_ptr()),
                          data<float>(scale), out.data_ptr()};
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
