// Host-side C++ that is not a tensor op, bound with pybind11. Importing the module also registers
// the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "dparallel/launch.h"
#include "scheduler.h"

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

  namespace py = pybind11;
  using namespace dparallel;
  py::class_<Admission>(m, "Admission",
                        "A request that may run: its lane, its pages, what is there already.")
      .def_readonly("id", &Admission::id)
      .def_readonly("lane", &Admission::lane)
      .def_readonly("pages", &Admission::pages)
      .def_readonly("reused", &Admission::reused);
  py::class_<SchedulerStats>(m, "SchedulerStats", "Pages and prompt tokens of a Scheduler.")
      .def_readonly("pages", &SchedulerStats::pages)
      .def_readonly("used", &SchedulerStats::used)
      .def_readonly("kept", &SchedulerStats::kept)
      .def_readonly("evicted", &SchedulerStats::evicted)
      .def_readonly("prompt_tokens", &SchedulerStats::prompt_tokens)
      .def_readonly("reused_tokens", &SchedulerStats::reused_tokens);
  py::class_<Scheduler>(m, "Scheduler",
                        "Which request runs in which lane, on which pages. Not thread-safe.")
      .def(py::init<int64_t, int64_t, int64_t, bool>(), py::kw_only(), py::arg("lanes"),
           py::arg("pages"), py::arg("page_size"), py::arg("share"))
      .def("submit", &Scheduler::submit, py::arg("id"), py::arg("prompt"), py::arg("length"))
      .def("admit", &Scheduler::admit)
      .def("store", &Scheduler::store, py::arg("id"), py::arg("tokens"))
      .def("release", &Scheduler::release, py::arg("id"))
      .def_property_readonly("waiting", &Scheduler::waiting)
      .def_property_readonly("page_size", &Scheduler::page_size)
      .def_property_readonly("stats", &Scheduler::stats);
}
