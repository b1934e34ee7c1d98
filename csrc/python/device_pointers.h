// The CUDA kernels on memory that the caller has, given as integers (PyTorch's data_ptr(), CuPy's
// data.ptr), on a stream of the caller's (a cudaStream_t as an integer; 0 is the default stream).
// Nothing is allocated, nothing is waited for. What a pointer points to cannot be checked: sizes
// follow from `shape`, `hidden` and `kernel_size`, types from `dtype`.
#ifndef CBAM_OPS_PYTHON_DEVICE_POINTERS_H_
#define CBAM_OPS_PYTHON_DEVICE_POINTERS_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "core/contract.h"
#include "core/cuda/kernels.h"
#include "core/cuda/memory.h"
#include "ops/dimensions.h"
#include "ops/signature.h"
#include "python/arguments.h"

namespace cbam_ops {
namespace python {

// For every op there are functions that run it and say how much workspace it needs. They take the
// same arguments.
enum class Question { kNone, kWorkspace };

template <Question kQuestion>
class DevicePointers {
 public:
  static constexpr const char* kSuffix = kQuestion == Question::kNone ? "" : "_workspace";
  static constexpr bool kOutputsAreGiven = true;
  static constexpr const char* kKeywords =
      "shape, dtype='float32', hidden=1, kernel_size=7, workspace=0, stream=0";

  explicit DevicePointers(Arguments* arguments)
      : arguments_(*arguments),
        shape_(arguments->Take("shape", std::vector<int64_t>())),
        type_(arguments->Take("dtype", std::string(ops::Name(Problem().dtype)))),
        hidden_(arguments->Take("hidden", Problem().hidden)),
        kernel_size_(arguments->Take("kernel_size", KernelSize(Problem().kernel_height))),
        workspace_(TakeAddress("workspace")),
        stream_(TakeAddress("stream")) {}

  DataType MapType() const { return arguments_.TypeFromName("dtype", type_, kMapTypes); }

  const void* Input(const ops::Argument& argument, DataType /*map*/, ops::Dimensions* dimensions) {
    // The first of all is x.
    if (dimensions->ShapeOf(argument).sizes[0] == ops::kUnknown && argument.dims.is_map) {
      arguments_.Check(dimensions->Learn(argument, shape_.data(), static_cast<int>(shape_.size())));
    }
    return Address(argument, *dimensions);
  }

  void* Output(const ops::Argument& argument, DataType /*map*/, const ops::Dimensions& dimensions) {
    return Address(argument, dimensions);
  }

  // Adds what no pointer says.
  void Complete(Problem* problem) {
    problem->hidden = hidden_;
    Sides sides(shape_.size() - 2, 0);
    if (const int64_t* const side = std::get_if<int64_t>(&kernel_size_)) {
      std::fill(sides.begin(), sides.end(), *side);
    } else if (const Sides& given = std::get<Sides>(kernel_size_); given.size() == sides.size()) {
      sides = given;
    } else {
      arguments_.Refuse("kernel_size",
                        "be a number or " + std::to_string(sides.size()) + " of them",
                        std::to_string(given.size()));
    }
    problem->kernel_width = sides.back();
    problem->kernel_height = sides[sides.size() - 2];
    if (sides.size() > 2) problem->kernel_depth = sides[0];
    arguments_.Check(CheckProblem(*problem));
  }

  template <typename Args>
  py::object Run(Problem problem, const Args& args) {
    Complete(&problem);
    if constexpr (kQuestion == Question::kWorkspace) {
      return py::int_(cuda::WorkspaceBytes<Args>(problem));
    } else {
      Status status;
      {
        py::gil_scoped_release release;
        status = cuda::Run(problem, args, workspace_, stream_);
      }
      arguments_.Check(status);
      return py::none();
    }
  }

 private:
  // One for each side of the map, or a number for all.
  using Sides = std::vector<int64_t>;
  using KernelSize = std::variant<int64_t, Sides>;

  void* TakeAddress(const char* name) {
    return reinterpret_cast<void*>(arguments_.Take(name, uintptr_t{0}));
  }

  void* Address(const ops::Argument& argument, const ops::Dimensions& dimensions) {
    void* const address = TakeAddress(argument.name);
    const ops::Shape shape = dimensions.ShapeOf(argument);
    const bool is_empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
    if (kQuestion == Question::kNone && address == nullptr && !is_empty) {
      arguments_.Refuse(argument.name, "be an address", "none");
    }
    return address;
  }

  Arguments& arguments_;
  const std::vector<int64_t> shape_;
  const std::string type_;
  const int64_t hidden_;
  const KernelSize kernel_size_;
  void* const workspace_;
  void* const stream_;
};

// Adds device memory, for who has no framework to get it from.
inline void DefineMemory(py::module_* module) {
  using Bytes = py::array_t<uint8_t, py::array::c_style>;
  static constexpr auto check = [](const Status& status) {
    if (status.ok()) return;
    throw std::runtime_error(std::string(status.message) + " (" + status.kernel + ")");
  };
  static constexpr auto address = [](uintptr_t value) { return reinterpret_cast<void*>(value); };
  module->def(
      "devices",
      [] {
        py::list devices;
        for (int device = 0; device < cuda::DeviceCount(); ++device) {
          char name[256];
          int capability = 0;
          check(cuda::DescribeDevice(device, name, sizeof(name), &capability));
          devices.append(py::make_tuple(name, capability));
        }
        return devices;
      },
      "Names and compute capabilities, 10 * major + minor, of the devices that CUDA sees, in its\n"
      "order. No context is made on any device.");
  module->def(
      "use_device", [](int device) { check(cuda::UseDevice(device)); }, py::arg("device"),
      "Makes it this thread's current device, which all else here is about.");
  module->def(
      "allocate",
      [](size_t bytes) {
        void* memory = nullptr;
        check(cuda::Allocate(bytes, &memory));
        if (memory == nullptr) throw std::bad_alloc();
        return reinterpret_cast<uintptr_t>(memory);
      },
      py::arg("bytes"), "Device memory, as an address; MemoryError where there is not enough.");
  module->def(
      "free", [](uintptr_t memory) { check(cuda::Free(address(memory))); }, py::arg("memory"));
  module->def(
      "copy_to_device",
      [](uintptr_t memory, const Bytes& bytes) {
        const auto size = static_cast<size_t>(bytes.size());
        check(cuda::CopyToDevice(address(memory), bytes.data(), size));
      },
      py::arg("memory"), py::arg("bytes").noconvert(),
      "Fills device memory from an array of uint8, after what the default stream has to do.");
  module->def(
      "copy_to_host",
      [](Bytes bytes, uintptr_t memory) {
        const auto size = static_cast<size_t>(bytes.size());
        void* const to = bytes.mutable_data();
        py::gil_scoped_release release;
        check(cuda::CopyToHost(to, address(memory), size));
      },
      py::arg("bytes").noconvert(), py::arg("memory"),
      "Fills an array of uint8 from device memory, after what the default stream has to do. What\n"
      "went wrong there is a RuntimeError here.");
}

// Adds all that a module of CUDA kernels has in every build.
inline void DefineCuda(py::module_* module) {
  DefineAll<DevicePointers<Question::kNone>>(module, ops::AllOps());
  DefineAll<DevicePointers<Question::kWorkspace>>(module, ops::AllOps());
}

}  // namespace python
}  // namespace cbam_ops

#endif  // CBAM_OPS_PYTHON_DEVICE_POINTERS_H_
