// Host-side C++ that is not a tensor op, bound with pybind11. Importing the module also registers
// the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"
#include "dparallel/launch.h"
#include "dparallel/memory.h"
#include "draft_trees.h"
#include "scheduler.h"

namespace {

// A tensor's argument name, address, element size, and (stride in elements, size) of each
// dimension.
using Layout =
    std::tuple<std::string, uintptr_t, int64_t, std::vector<std::pair<int64_t, int64_t>>>;

std::vector<dparallel::Memory> memories(const std::vector<Layout>& layouts) {
  std::vector<dparallel::Memory> all;
  for (const auto& [name, address, element_size, dims] : layouts) {
    all.emplace_back(name.c_str(), reinterpret_cast<const void*>(address), element_size);
    for (const auto& [stride, size] : dims)
      if (!all.back().add(stride, size)) break;
  }
  return all;
}

void own_memory(const std::vector<Layout>& changed, const std::vector<Layout>& read) {
  dparallel::own_memory(memories(changed), memories(read));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dparallel_ext's compiled half: importing it registers torch.ops.dparallel.*";
  const auto check_level = [](const std::string& name, const std::string& level) {
    if (!dparallel::cpu::is_simd_level(level.c_str()))
      throw pybind11::value_error(name + ": expected portable, avx2 or avx512, got '" + level +
                                  "'");
  };
  const char* wanted = std::getenv("DPARALLEL_SIMD");
  if (wanted != nullptr && *wanted != '\0') check_level("DPARALLEL_SIMD", wanted);
  m.def("simd_level", &dparallel::cpu::simd_level,
        "The instruction set that the CPU kernels use: avx512, avx2 or portable.");
  m.def(
      "use_simd_level",
      [check_level](const std::string& level) {
        check_level("level", level);
        dparallel::cpu::use_simd_level(level.c_str());
      },
      "For tests: the CPU kernels use this instruction set from now on, or the machine's best "
      "where it is "
      "lower.");
  m.def("build_info", &dparallel::build_info,
        "What setup.py built, as text: compiler, torch, backends, CUDA toolkit and architectures, "
        "and why there are CUDA kernels or none.");

  m.def("own_memory", &own_memory, pybind11::arg("changed"), pybind11::arg("read"),
        "Raises ValueError unless each element of the changed tensors has memory of its own. A "
        "tensor is (argument, address, element size, [(stride, size), ...]).");

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
  py::class_<DraftTree>(m, "DraftTree", "Guesses behind a root; the lists have one entry a node.")
      .def_readonly("parents", &DraftTree::parents)
      .def_readonly("cells", &DraftTree::cells)
      .def_readonly("chances", &DraftTree::chances);
  m.def("draft_trees", &draft_trees, py::arg("scores"), py::arg("width"), py::arg("depths"),
        py::arg("sizes"), "The trees of the likeliest paths.");
}
