// The machine as a Python module: of its own, for programs given as text, or with the kernels that
// nvcc compiled (CBAM_PTX_KERNELS), which then run on numpy's memory as on a GPU's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "testing/ptx/machine.h"
#if defined(CBAM_PTX_KERNELS)
#include "core/cuda/kernels.h"
#include "python/device_pointers.h"
#include "testing/ptx/runtime.h"
#endif

namespace {

namespace ptx = cbam_ops::ptx;
namespace py = pybind11;

#if defined(CBAM_PTX_KERNELS)
ptx::Machine& TheMachine() { return ptx::TheMachine(); }
#else
ptx::Machine& TheMachine() {
  static auto* const machine = new ptx::Machine();
  return *machine;
}
#endif

// The lines that an instruction belongs to, from the innermost: (function, file, line).
py::list Lines(const ptx::Kernel& kernel, int at) {
  py::list lines;
  for (; at >= 0; at = kernel.program->locations[static_cast<size_t>(at)].parent) {
    const ptx::Location& location = kernel.program->locations[static_cast<size_t>(at)];
    lines.append(py::make_tuple(location.function, location.file, location.line));
  }
  return lines;
}

py::list Instructions(const ptx::Kernel& kernel) {
  py::list rows;
  for (const ptx::Step& step : kernel.steps) {
    const ptx::Tally& tally = step.tally;
    if (tally.issued == 0 || step.family == "none") continue;
    py::dict row;
    row["opcode"] = step.source->opcode;
    row["family"] = step.family;
    row["lines"] = Lines(kernel, step.source->location);
    row["issued"] = tally.issued;
    row["sectors"] = tally.sectors;
    row["from_l2"] = tally.from_l2;
    row["from_dram"] = tally.from_dram;
    row["wavefronts"] = tally.wavefronts;
    row["least_wavefronts"] = tally.least;
    row["spins"] = tally.spins;
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(CBAM_PTX_MODULE, module) {
  py::register_exception<ptx::Error>(module, "Error", PyExc_RuntimeError);
  module.def(
      "load", [](const std::string& text) { return TheMachine().Load(text); }, py::arg("ptx"),
      "A handle for kernels given as PTX.");
  module.def(
      "launch",
      [](int handle, const std::string& kernel, ptx::Dimensions grid, ptx::Dimensions block,
         int64_t shared_bytes, const std::vector<std::string>& parameters) {
        std::vector<const void*> addresses;
        for (const std::string& parameter : parameters) addresses.push_back(parameter.data());
        TheMachine().Launch(handle, kernel, grid, block, shared_bytes, addresses.data());
      },
      "Runs a kernel; its parameters as bytes.");
  module.def(
      "add_buffer",
      [](const std::string& name, uintptr_t address, int64_t bytes, bool written, bool writable) {
        TheMachine().AddBuffer(name, reinterpret_cast<char*>(address), bytes, written, writable);
      },
      "Memory that kernels may touch.");
  module.def("remove_buffers", [] { TheMachine().RemoveBuffers(); });
  module.def(
      "configure",
      [](int multiprocessors, int blocks, int64_t l1, int64_t l2, uint64_t seed, bool races) {
        TheMachine().configuration = {multiprocessors, blocks, l1, l2, seed, races};
        TheMachine().ResetCounts();
      },
      py::kw_only(), py::arg("multiprocessors") = 4, py::arg("blocks") = 2,
      py::arg("l1") = 64 << 10, py::arg("l2") = 1 << 20, py::arg("seed") = 0,
      py::arg("races") = true, "The machine that is pretended. Forgets all counts.");
  module.def(
      "counts",
      [] {
        py::list kernels;
        for (const ptx::Kernel* kernel : TheMachine().Kernels()) {
          py::dict row;
          row["kernel"] = kernel->name;
          row["instructions"] = Instructions(*kernel);
          kernels.append(row);
        }
        return kernels;
      },
      "What was counted since the machine was configured, of each kernel launched.");
  module.def("sectors_written", [] { return TheMachine().SectorsWritten(); });
#if defined(CBAM_PTX_KERNELS)
  cbam_ops::python::DefineCuda(&module);
  module.def(
      "take_failure", [] { return std::exchange(ptx::Failure(), ""); },
      "The first fault since the last call, in words.");
#endif
}
