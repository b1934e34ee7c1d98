// cbam_ops._core: the kernels on numpy arrays, without TensorFlow.
//
// For tests, for measuring, and for whoever has arrays and no graph. There is a function for every
// op of the table. It checks its arguments (ValueError), allocates what the kernels write and need,
// releases the GIL, runs, and returns the outputs by name.
//
// Two options serve the tests. `poison` fills outputs and workspace with NaN before the kernels run
// and puts guards around them that are looked at afterwards: what a kernel leaves out shows as NaN,
// what it writes too much is an error. `misalign` moves every output by so many elements off its
// 64-byte boundary.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/contract.h"
#include "core/cpu/kernels.h"
#include "core/cpu/work_sharing.h"
#include "ops/signature.h"
#include "python/arguments.h"
#include "python/thread_pool.h"

#if defined(CBAM_HAVE_CUDA)
#include "python/device_pointers.h"
#endif

namespace cbam_ops {
namespace python {
namespace {

constexpr size_t kGuard = 64;
constexpr unsigned char kGuardByte = 0xA5;
constexpr unsigned char kPoisonByte = 0xFF;  // all ones is a NaN in every floating type

struct Guard {
  std::string name;
  const unsigned char* begin;
};

// The memory of one call: keeps its arrays alive, remembers the guards, runs the kernel.
class NumpyArrays {
 public:
  static constexpr const char* kSuffix = "";
  static constexpr bool kOutputsAreGiven = false;
  static constexpr const char* kKeywords = "threads=1, poison=False, misalign=0";

  explicit NumpyArrays(Arguments* arguments)
      : arguments_(*arguments),
        threads_(arguments->TakeNumber("threads", 1, 1, 256)),
        misalign_(arguments->TakeNumber("misalign", 0, 0, 64)),
        poison_(arguments->Take("poison", false)) {}

  DataType MapType() { return CheckedType("x", kMapTypes); }

  const void* Input(const ops::Argument& argument, DataType map, ops::Dimensions* dimensions) {
    const py::array& array = Array(argument.name);
    CheckedType(argument.name, {ops::TypeOf(argument, map)});
    const std::vector<int64_t> shape(array.shape(), array.shape() + array.ndim());
    arguments_.Check(dimensions->Learn(argument, shape.data(), static_cast<int>(shape.size())));
    return array.data();
  }

  void* Output(const ops::Argument& argument, DataType map, const ops::Dimensions& dimensions) {
    arguments_.Take(argument.name);  // the word that asked for it, if it needs one
    const ops::Shape sizes = dimensions.ShapeOf(argument);
    const std::vector<int64_t> shape(sizes.begin(), sizes.end());
    const py::dtype type = argument.type == ops::ArgumentType::kMapType ? Array("x").dtype()
                           : ComputeType(map) == DataType::kFloat64     ? py::dtype::of<double>()
                                                                        : py::dtype::of<float>();
    if (!poison_ && misalign_ == 0) {
      py::array array(type, shape);
      outputs_[argument.name] = array;
      return array.mutable_data();
    }
    const auto element = static_cast<size_t>(type.itemsize());
    size_t bytes = element;
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    const size_t offset = kGuard + static_cast<size_t>(misalign_) * element;
    py::array_t<unsigned char> buffer(
        static_cast<py::ssize_t>(offset + bytes + kGuard + kHostAlignment));
    unsigned char* const start = buffer.mutable_data();
    const size_t to_boundary =
        (kHostAlignment - reinterpret_cast<uintptr_t>(start) % kHostAlignment) % kHostAlignment;
    unsigned char* const data = start + to_boundary + offset;
    if (poison_) {
      std::memset(start, kGuardByte, static_cast<size_t>(buffer.size()));
      std::memset(data, kPoisonByte, bytes);
      guards_.push_back({argument.name, data - kGuard});
      guards_.push_back({argument.name, data + bytes});
    }
    const auto begin = static_cast<py::ssize_t>(data - start);
    const py::slice inside(begin, begin + static_cast<py::ssize_t>(bytes), 1);
    outputs_[argument.name] = buffer[inside].attr("view")(type).attr("reshape")(py::cast(shape));
    return data;
  }

  template <typename Args>
  py::dict Run(const Problem& problem, const Args& args) {
    Status status;
    const Guard* spoilt = nullptr;
    {
      py::gil_scoped_release release;
      const int helpers = threads_ - 1;
      ThreadPool& pool = ThreadPool::Shared(helpers);
      cpu::WorkSharing sharing(
          threads_, [&pool](std::function<void()> closure) { pool.Schedule(std::move(closure)); });
      const cpu::Parallel parallel = helpers > 0 ? sharing.parallel() : cpu::Parallel{};
      const size_t bytes = cpu::WorkspaceBytes<Args>(problem, parallel);
      const size_t allocated = (bytes + kGuard + kHostAlignment - 1) / kHostAlignment *
                               kHostAlignment;  // as aligned_alloc wants it
      const std::unique_ptr<unsigned char, void (*)(void*)> workspace(
          static_cast<unsigned char*>(std::aligned_alloc(kHostAlignment, allocated)), std::free);
      if (workspace == nullptr) throw std::bad_alloc();
      if (poison_) {
        std::memset(workspace.get(), kPoisonByte, bytes);
        std::memset(workspace.get() + bytes, kGuardByte, kGuard);
        guards_.push_back({"the workspace", workspace.get() + bytes});
      }
      status = cpu::Run(problem, args, workspace.get(), parallel);
      spoilt = SpoiltGuard();
    }
    arguments_.Check(status);
    if (spoilt != nullptr) {
      throw std::runtime_error(arguments_.function() + ": the kernels wrote outside of " +
                               spoilt->name);
    }
    return outputs_;
  }

 private:
  // An input, copied when its elements do not lie densely in row-major order, each aligned to its
  // size.
  const py::array& Array(const char* name) {
    if (const auto known = arrays_.find(name); known != arrays_.end()) return known->second;
    const py::object value = arguments_.Take(name);
    if (!py::isinstance<py::array>(value)) {
      arguments_.Refuse(name, "be a numpy array",
                        value.is_none() ? "None" : Text(py::type::of(value).attr("__name__")));
    }
    auto array = py::reinterpret_borrow<py::array>(value);
    if (!py::cast<bool>(array.dtype().attr("isnative"))) {
      arguments_.Refuse(name, "have the byte order of this machine", Text(array.dtype()));
    }
    const int wanted = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if ((array.flags() & wanted) != wanted) {
      array = py::module_::import("numpy").attr("require")(array, py::none(), "CA");
    }
    return arrays_.emplace(name, array).first->second;
  }

  DataType CheckedType(const char* name, const std::vector<DataType>& allowed) {
    return arguments_.TypeFromName(name, Text(Array(name).dtype().attr("name")), allowed);
  }

  const Guard* SpoiltGuard() const {
    for (const Guard& guard : guards_) {
      for (size_t i = 0; i < kGuard; ++i) {
        if (guard.begin[i] != kGuardByte) return &guard;
      }
    }
    return nullptr;
  }

  Arguments& arguments_;
  const int threads_;
  const int misalign_;
  const bool poison_;
  std::map<std::string, py::array> arrays_;
  std::vector<Guard> guards_;
  py::dict outputs_;
};

// The table as plain data: what each function takes and gives.
py::dict Describe(const ops::Argument& argument) {
  using namespace py::literals;  // NOLINT: the _a of keyword arguments
  py::list dims;
  for (int i = 0; i < argument.dims.rank; ++i) dims.append(ops::Name(argument.dims.dims[i]));
  const char* const count = ops::CountAttribute(argument.presence);
  return py::dict("name"_a = argument.name,
                  "type"_a = argument.type == ops::ArgumentType::kMapType ? "T" : "U",
                  "dims"_a = py::tuple(dims), "is_map"_a = argument.dims.is_map,
                  "optional"_a = argument.presence != ops::Presence::kAlways,
                  "count"_a = count == nullptr ? py::object(py::none()) : py::str(count));
}

template <typename Args>
py::dict Describe(const ops::Signature<Args>& signature) {
  using namespace py::literals;  // NOLINT: the _a of keyword arguments
  py::list inputs, outputs, attributes;
  for (const auto& input : signature.inputs) {
    if (ops::Has(signature.module, input.argument.gate)) inputs.append(Describe(input.argument));
  }
  for (const auto& output : signature.outputs) {
    if (ops::Has(signature.module, output.argument.gate)) outputs.append(Describe(output.argument));
  }
  for (const ops::Choice& choice : ops::kChoices) {
    if (!choice.is_of(signature.module)) continue;
    const py::tuple words =
        py::cast(std::vector<std::string>(choice.words.begin(), choice.words.end()));
    attributes.append(py::dict("name"_a = choice.name, "words"_a = words, "default"_a = words[0]));
  }
  if (HasSpatialGate(signature.module)) {
    attributes.append(py::dict("name"_a = ops::kEpsilon, "words"_a = py::none(),
                               "default"_a = Problem().epsilon));
  }
  return py::dict("op"_a = signature.op, "inputs"_a = inputs, "outputs"_a = outputs,
                  "attributes"_a = attributes);
}

template <const auto&... kSignatures>
py::dict Signatures(ops::OpList<kSignatures...>) {
  py::dict signatures;
  ((signatures[py::str(FunctionName(kSignatures.op))] = Describe(kSignatures)), ...);
  return signatures;
}

constexpr cpu::InstructionSet kInstructionSets[] = {
    cpu::InstructionSet::kBaseline, cpu::InstructionSet::kAvx2, cpu::InstructionSet::kAvx512};

std::vector<std::string> AvailableInstructionSets() {
  std::vector<std::string> names;
  for (const cpu::InstructionSet set : kInstructionSets) {
    if (cpu::IsAvailable(set)) names.push_back(cpu::Name(set));
  }
  return names;
}

void SetInstructionSet(const std::string& name) {
  std::string available;
  for (const std::string& known : AvailableInstructionSets()) {
    available += (available.empty() ? "'" : ", '") + known + "'";
  }
  for (const cpu::InstructionSet set : kInstructionSets) {
    if (name == cpu::Name(set) && cpu::SetInstructionSet(set)) return;
  }
  throw py::value_error(
      "set_instruction_set: `name` must be an instruction set of this processor "
      "and this build (" +
      available + "), got '" + name + "'");
}

// _core.cuda; in a build without CUDA it holds only `built`.
#if defined(CBAM_HAVE_CUDA)

void DefineCudaModule(py::module_& module) {
  py::module_ submodule = module.def_submodule("cuda", "The CUDA kernels on device pointers.");
  submodule.attr("built") = true;
  submodule.attr("architectures") = cuda::BuiltArchitectures();
  submodule.attr("build_version") = cuda::BuildVersion();
  submodule.def("driver_version", &cuda::DriverVersion,
                "CUDA version of the driver as 1000 * major + 10 * minor; 0 without a driver.");
  submodule.def("device_capability", &cuda::DeviceCapability,
                "Of the current device as 10 * major + minor; 0 without a device.");
  submodule.def(
      "why_not",
      [](int capability) {
        char text[cuda::kWhyNotBytes];
        cuda::WhyNot(capability, text, sizeof(text));
        return std::string(text);
      },
      py::arg("capability") = 0,
      "Why the kernels cannot run on a device of this compute capability, 10 * major + minor (0:\n"
      "on the current device); empty where they can. No context is made on any device.");
  DefineCuda(&submodule);
  DefineMemory(&submodule);
}

#else

void DefineCudaModule(py::module_& module) {
  module.def_submodule("cuda", "This build has no CUDA kernels.").attr("built") = false;
}

#endif

}  // namespace
}  // namespace python
}  // namespace cbam_ops

PYBIND11_MODULE(_core, module) {
  namespace python = cbam_ops::python;
  namespace cpu = cbam_ops::cpu;
  module.doc() =
      "The kernels of cbam_ops on numpy arrays, without TensorFlow.\n\n"
      "Maps are float32, float16, float64 or bfloat16 (ml_dtypes.bfloat16, or its bits as "
      "uint16);\n"
      "everything else is float64 with float64 maps and float32 otherwise. Functions return a "
      "dict\n"
      "of their outputs; a gradient takes what its function returned, and d_residual=True asks "
      "for\n"
      "the one output that is optional.";
  python::DefineAll<python::NumpyArrays>(&module, cbam_ops::ops::AllOps());
  module.def(
      "signatures", [] { return python::Signatures(cbam_ops::ops::AllOps()); },
      "What the functions take and give, from the table that the ops are made from too.");
  module.def(
      "instruction_set", [] { return cpu::Name(cpu::ActiveInstructionSet()); },
      "The instruction set in use: 'baseline', 'avx2' or 'avx512'.");
  module.def("set_instruction_set", &python::SetInstructionSet, pybind11::arg("name"),
             "Chooses the instruction set for this process; ValueError where it is not available.");
  module.def("available_instruction_sets", &python::AvailableInstructionSets,
             "The instruction sets that this processor and this build have, in rising order.");
  python::DefineCudaModule(module);
}
