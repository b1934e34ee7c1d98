// The functions of cbam_ops._core.cuda as a Python module of their own, over kernels that run on a
// CPU, and what steers the pretended GPU: see cuda_on_cpu.h.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "core/cuda/explain.h"
#include "core/cuda/kernels.h"
#include "core/cuda/schedule.h"
#include "ops/signature.h"
#include "python/device_pointers.h"
#include "testing/cuda_on_cpu.h"

namespace py = pybind11;

namespace {

std::string failure;  // NOLINT: what would hang or be undefined on a GPU, in words

// For every op a function that lists the items of a call in their order, as core/cuda/schedule.h
// has it: its stages, and for each ticket the stage, the group and the index in the group.
class Order : public cbam_ops::python::DevicePointers<cbam_ops::python::Question::kWorkspace> {
 public:
  static constexpr const char* kSuffix = "_order";
  static constexpr const char* kKeywords =
      "shape, dtype='float32', hidden=1, kernel_size=7, blocks=264";

  explicit Order(cbam_ops::python::Arguments* arguments)
      : DevicePointers(arguments), blocks_(arguments->Take("blocks", int64_t{264})) {}

  template <typename Args>
  py::object Run(cbam_ops::Problem problem, const Args& /*args*/) {
    Complete(&problem);
    const cbam_ops::cuda::Schedule schedule = cbam_ops::cuda::Order<Args>(problem, blocks_);
    py::list stages, items;
    for (int s = 0; s < schedule.stage_count; ++s) {
      const cbam_ops::cuda::Stage& stage = schedule.stages[s];
      stages.append(py::make_tuple(stage.items, stage.groups, stage.after, stage.after_all));
    }
    int section = 0;
    for (uint64_t ticket = 0; ticket < schedule.tickets; ++ticket) {
      const cbam_ops::cuda::Item item = schedule.At(ticket, &section);
      items.append(py::make_tuple(item.stage, item.group, item.index));
    }
    return py::make_tuple(stages, items);
  }

 private:
  const int64_t blocks_;
};

}  // namespace

PYBIND11_MODULE(cuda_on_cpu_kernels, module) {
  namespace cuda_on_cpu = cbam_ops::cuda_on_cpu;
  cbam_ops::python::DefineCuda(&module);
  cbam_ops::python::DefineMemory(&module);
  cbam_ops::python::DefineAll<Order>(&module, cbam_ops::ops::AllOps());
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
      [](int capability, int64_t multiprocessors, int64_t resident_blocks) {
        auto& device = cuda_on_cpu::PretendedDevice();
        device.capability = capability;
        device.multiprocessors = multiprocessors;
        device.resident_blocks = resident_blocks;
      },
      py::arg("capability") = 90, py::arg("multiprocessors") = 2, py::arg("resident_blocks") = 0,
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
