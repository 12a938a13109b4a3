// Host-side C++ that is not a tensor op, bound with pybind11. Importing the module also registers
// the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "dparallel/launch.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "dparallel_ext's compiled half: importing it registers torch.ops.dparallel.*";
  m.def("simd_level", &dparallel::cpu::simd_level,
        "The instruction set the CPU kernels use on this machine: avx512, avx2 or portable.");
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"compiler", DPARALLEL_COMPILER},
            {"built_with_torch", DPARALLEL_TORCH},
            {"stable_abi", "torch >= 2.10"},
            {"backends", DPARALLEL_BACKENDS},
            {"cuda_toolkit", DPARALLEL_CUDA_TOOLKIT},
            {"cuda_architectures", DPARALLEL_CUDA_ARCHITECTURES},
        };
      },
      "What setup.py built, as text: compiler, torch, backends, CUDA toolkit and architectures.");
}
