// The functions of cbam_ops._core.cuda as a Python module of their own, over kernels that run on a
// CPU, and what steers the pretended GPU: see cuda_on_cpu.h.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "core/cuda/explain.h"
#include "core/cuda/kernels.h"
#include "python/device_pointers.h"
#include "testing/cuda_on_cpu.h"

namespace {

std::string failure;  // NOLINT: what would hang or be undefined on a GPU, in words

}  // namespace

PYBIND11_MODULE(cuda_on_cpu_kernels, module) {
  namespace cuda_on_cpu = cbam_ops::cuda_on_cpu;
  namespace py = pybind11;
  cbam_ops::python::DefineCuda(&module);
  cbam_ops::python::DefineMemory(&module);
  cuda_on_cpu::SetFailureHandler([](const char* message) {
    if (failure.empty()) failure = message;
  });
  module.def(
      "take_failure", [] { return std::exchange(failure, ""); },
      "What went wrong since the last call that is no status.");
  module.def("set_schedule", &cuda_on_cpu::SetSchedule, py::arg("seed"),
             "The order in which blocks and threads run.");
  module.def(
      "set_device",
      [](int64_t l2, int capability, int64_t shared) {
        auto& device = cuda_on_cpu::PretendedDevice();
        device.l2_bytes = l2;
        device.capability = capability;
        device.shared_bytes = shared;
      },
      py::arg("l2") = 1 << 20, py::arg("capability") = 90, py::arg("shared") = 232448,
      "The device that is pretended.");
  module.def("take_launched_kernels", &cuda_on_cpu::TakeLaunchedKernels,
             "Names of the kernels launched since the last call.");
  module.def(
      "explain_machine",
      [](int driver, int build, int capability, const std::string& architectures) {
        char text[cbam_ops::cuda::kWhyNotBytes];
        cbam_ops::cuda::ExplainMachine(driver, build, capability, architectures.c_str(), text,
                                       sizeof(text));
        return std::string(text);
      },
      "Why a build cannot run on a machine, in the words of core/cuda/explain.h.");
  module.def("half_to_float", &cuda_on_cpu::HalfToFloat);
  module.def("float_to_half", &cuda_on_cpu::FloatToHalf);
}
