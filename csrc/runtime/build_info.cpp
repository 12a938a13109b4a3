#include "build_info.h"

namespace dparallel {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", DPARALLEL_COMPILER},
      {"built_with_torch", DPARALLEL_TORCH},
      {"stable_abi", "torch >= 2.10"},
      {"backends", DPARALLEL_BACKENDS},
      {"cuda_toolkit", DPARALLEL_CUDA_TOOLKIT},
      {"cuda_architectures", DPARALLEL_CUDA_ARCHITECTURES},
      {"cuda_reason", DPARALLEL_CUDA_REASON},
  };
}

}  // namespace dparallel
