// How a backend allocates scratch and launches, and how an op is registered: DPARALLEL_OP beside
// the code of the op is all that names it to torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <type_traits>

#include "checks.h"
#include "dparallel/launch.h"

#if defined(DPARALLEL_WITH_CUDA) || defined(DPARALLEL_WITH_CUDA_HOST)
#define DPARALLEL_HAS_CUDA
#endif

#ifdef DPARALLEL_WITH_CUDA_HOST
// tests/cuda_host executes the CUDA kernels on the CPU's tensors, in place of the CPU's kernels.
inline int aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
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

namespace dparallel {

inline void parallel(int64_t n, cpu::Body body, const void* context) {
  torch::stable::parallel_for(0, n, 1,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

// Ops are templates over the backend. Each calls
//   Backend::launch<cpu::op, cuda::op, cuda::op_scratch, cuda::op_counters>(name, arguments, like)
// without the last two, or with nullptr, where the CUDA kernels need no such memory. Before that
// it looks at the indices and other contents of tensors where kHostReads says that this costs
// nothing: on the CPU. On a GPU the host would have to wait for them; there some kernels pass over
// indices that are out of bounds, or report them, and others trust the caller, as an op's docstring
// says.
struct Cpu {
  static constexpr bool kHostReads = true;

  template <auto kOnCpu, auto..., class Args>
  static void launch(const char*, const Args& args, const Tensor&,
                     const std::optional<Tensor>& = std::nullopt) {
    kOnCpu(args, parallel);
  }
};

#ifdef DPARALLEL_HAS_CUDA
struct Cuda {
  static constexpr bool kHostReads = false;

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
  template <auto, auto kOnCuda, auto kScratch = nullptr, auto kCounters = nullptr, class Args>
  static void launch(const char* op, const Args& args, const Tensor& like,
                     const std::optional<Tensor>& counters_given = std::nullopt) {
    constexpr bool scratches = !std::is_null_pointer_v<decltype(kScratch)>;
    constexpr bool counts = !std::is_null_pointer_v<decltype(kCounters)>;
    const DeviceGuard guard(like.get_device());
    if constexpr (!scratches && !counts) {
      check(kOnCuda(args, stream(like)), op);
    } else {
      cuda::Workspace workspace{nullptr, nullptr};
      std::optional<Tensor> scratch;
      if constexpr (counts) workspace.counters = counters(counters_given, kCounters(args), like);
      if constexpr (scratches) {
        scratch = torch::stable::new_empty(like, {kScratch(args)}, ScalarType::Byte);
        workspace.scratch = scratch->data_ptr();
      }
      check(kOnCuda(args, workspace, stream(like)), op);
    }
  }
};
#endif

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

}  // namespace dparallel

#define DPARALLEL_KERNEL(KEY, op, kernel) \
  STABLE_TORCH_LIBRARY_IMPL(dparallel, KEY, m) { m.impl(#op, TORCH_BOX(kernel)); }

#ifdef DPARALLEL_WITH_CUDA_HOST
#define DPARALLEL_KERNELS(op) DPARALLEL_KERNEL(CPU, op, &op<Cuda>)
#else
#ifdef DPARALLEL_WITH_CUDA
#define DPARALLEL_ON_CUDA(op) &op<Cuda>
#else
#define DPARALLEL_ON_CUDA(op) refusal<NoCuda>(&op<Cpu>)
#endif
#define DPARALLEL_KERNELS(op)                            \
  DPARALLEL_KERNEL(CPU, op, &op<Cpu>)                    \
  DPARALLEL_KERNEL(CUDA, op, DPARALLEL_ON_CUDA(op))      \
  DPARALLEL_KERNEL(MPS, op, refusal<NoDevice>(&op<Cpu>)) \
  DPARALLEL_KERNEL(XPU, op, refusal<NoDevice>(&op<Cpu>))
#endif

// Tells torch of the op `op<Backend>`, a template of this file, and of its schema.
#define DPARALLEL_OP(op, schema)                                 \
  STABLE_TORCH_LIBRARY_FRAGMENT(dparallel, m) { m.def(schema); } \
  DPARALLEL_KERNELS(op)
