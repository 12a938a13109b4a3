// Shared by the C++ and CUDA sources; knows neither torch nor the CUDA headers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(DPARALLEL_CUDA_HOST)
#define DP_HD __host__ __device__ __forceinline__
#else
// Always inlined: else the linker might keep the copy of another instruction set.
#define DP_HD inline __attribute__((always_inline))
#endif

namespace dparallel {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLargest = 3.4028234663852886e38f;  // the largest finite float32

// float64 is for the losses alone, whose gradients are checked in it.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// In bytes.
DP_HD int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Rows of logits with any strides (in elements); the vocabulary is contiguous.
// Row r = outer * inner_rows + inner lies at data + outer * outer_stride + inner * inner_stride.
struct Logits {
  const void* data;
  DType dtype;
  int64_t vocab;
  int64_t inner_rows;
  int64_t outer_stride;
  int64_t inner_stride;

  DP_HD int64_t offset(int64_t row) const {
    return (row / inner_rows) * outer_stride + (row % inner_rows) * inner_stride;
  }
};

// Ids that a row may not choose. The mask token keeps its share of the softmax but is never the
// argmax; suppressed ids are left out of the softmax too.
struct Exclusions {
  int64_t mask_id;          // -1: none
  const int64_t* suppress;  // [suppress_count] ascending, unique
  int64_t suppress_count;
};

// Why a row has no result. An error is stored as row * 4 + code, so that the lowest bad row is the
// minimum.
enum RowError : int32_t {
  kRowOk = 0,
  kRowNan = 1,         // the row holds NaN
  kRowEmpty = 2,       // no id that may be chosen has a logit above -inf
  kRowMissing = 3,     // a masked position of the window that `positions` does not list
  kRowLabel = 3,       // certainty_forcing_loss: a label outside the vocabulary
  kRowImpossible = 3,  // distillation_loss: the student rules out an id that the teacher does not
  kRowMask = 1         // commit: a token to write that is the mask token, or negative
};
constexpr int64_t kNoError = INT64_MAX;
DP_HD int64_t encode_error(int64_t row, RowError code) { return row * 4 + code; }

}  // namespace dparallel
