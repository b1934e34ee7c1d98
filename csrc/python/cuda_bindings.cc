// cbam_ops._core.cuda: the CUDA kernels on memory that the caller has, given as integers (PyTorch's
// data_ptr(), CuPy's data.ptr), on a stream of the caller's (a cudaStream_t as an integer; 0 is the
// default stream). Nothing is allocated, nothing is waited for. What a pointer points to cannot be
// checked: sizes follow from `shape`, `hidden` and `kernel_size`, types from `dtype`, names from
// core/contract.h.
#include "python/cuda_bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/contract.h"
#include "python/arguments.h"

#if defined(CBAM_HAVE_CUDA)
#include "core/cuda/kernels.h"
#endif

namespace cbam_ops {
namespace python {

#if defined(CBAM_HAVE_CUDA)
namespace {

using Pointers = std::map<std::string, uintptr_t>;

template <typename Args>
struct Field {
  const char* name;
  const void* Args::* input;
  void* Args::* output;
};
template <typename Args>
constexpr Field<Args> In(const char* name, const void* Args::* member) {
  return {name, member, nullptr};
}
template <typename Args>
constexpr Field<Args> Out(const char* name, void* Args::* member) {
  return {name, nullptr, member};
}

#define CBAM_IN(name) In<Args>(#name, &Args::name)
#define CBAM_OUT(name) Out<Args>(#name, &Args::name)

std::vector<Field<ForwardArgs>> Fields(const ForwardArgs*) {
  using Args = ForwardArgs;
  return {CBAM_IN(x),
          CBAM_IN(residual),
          CBAM_IN(w0),
          CBAM_IN(b0),
          CBAM_IN(w1),
          CBAM_IN(b1),
          CBAM_IN(kernel),
          CBAM_IN(bias),
          CBAM_IN(gamma),
          CBAM_OUT(y),
          CBAM_OUT(channel_descriptors),
          CBAM_OUT(channel_gate),
          CBAM_OUT(spatial_descriptors),
          CBAM_OUT(spatial_gate),
          CBAM_OUT(batch_statistics)};
}
std::vector<Field<BackwardArgs>> Fields(const BackwardArgs*) {
  using Args = BackwardArgs;
  return {CBAM_IN(x),
          CBAM_IN(dy),
          CBAM_IN(y),
          CBAM_IN(w0),
          CBAM_IN(b0),
          CBAM_IN(w1),
          CBAM_IN(b1),
          CBAM_IN(kernel),
          CBAM_IN(gamma),
          CBAM_IN(channel_descriptors),
          CBAM_IN(channel_gate),
          CBAM_IN(spatial_descriptors),
          CBAM_IN(spatial_gate),
          CBAM_IN(batch_statistics),
          CBAM_IN(d_channel_gate),
          CBAM_IN(d_spatial_gate),
          CBAM_OUT(dx),
          CBAM_OUT(d_residual),
          CBAM_OUT(dw0),
          CBAM_OUT(db0),
          CBAM_OUT(dw1),
          CBAM_OUT(db1),
          CBAM_OUT(dkernel),
          CBAM_OUT(dbias),
          CBAM_OUT(dgamma)};
}
std::vector<Field<ChannelPoolArgs>> Fields(const ChannelPoolArgs*) {
  using Args = ChannelPoolArgs;
  return {CBAM_IN(x), CBAM_OUT(mean), CBAM_OUT(maximum)};
}
std::vector<Field<ChannelPoolGradArgs>> Fields(const ChannelPoolGradArgs*) {
  using Args = ChannelPoolGradArgs;
  return {CBAM_IN(x), CBAM_IN(maximum), CBAM_IN(d_mean), CBAM_IN(d_maximum), CBAM_OUT(dx)};
}
std::vector<Field<SpatialPoolArgs>> Fields(const SpatialPoolArgs*) {
  using Args = SpatialPoolArgs;
  return {CBAM_IN(x), CBAM_OUT(descriptors)};
}
std::vector<Field<SpatialPoolGradArgs>> Fields(const SpatialPoolGradArgs*) {
  using Args = SpatialPoolGradArgs;
  return {CBAM_IN(x), CBAM_IN(descriptors), CBAM_IN(d_descriptors), CBAM_OUT(dx)};
}

#undef CBAM_IN
#undef CBAM_OUT

// What must be given for a problem.
std::vector<std::string> Required(const Problem& problem, const ForwardArgs*) {
  std::vector<std::string> names = {"x", "y"};
  if (HasChannelGate(problem)) {
    names.insert(names.end(), {"w0", "w1", "channel_descriptors", "channel_gate"});
  }
  if (HasSpatialGate(problem)) {
    names.insert(names.end(), {"kernel", "spatial_descriptors", "spatial_gate"});
  }
  if (problem.batch_norm) names.insert(names.end(), {"gamma", "batch_statistics"});
  return names;
}
std::vector<std::string> Required(const Problem& problem, const BackwardArgs*) {
  std::vector<std::string> names = {"x", "dy", "dx"};
  if (problem.activation == Activation::kRelu) names.push_back("y");
  if (HasChannelGate(problem)) {
    names.insert(names.end(), {"w0", "w1", "channel_descriptors", "channel_gate", "dw0", "dw1"});
  }
  if (HasSpatialGate(problem)) {
    names.insert(names.end(), {"kernel", "spatial_descriptors", "spatial_gate", "dkernel"});
  }
  if (problem.batch_norm) names.insert(names.end(), {"gamma", "batch_statistics", "dgamma"});
  return names;
}
template <typename Args>
std::vector<std::string> Required(const Problem&, const Args* args) {
  std::vector<std::string> names;
  for (const auto& field : Fields(args)) names.push_back(field.name);
  return names;
}

template <typename Args>
Args Bind(const char* function, const Problem& problem, const Pointers& pointers) {
  Args args;
  const auto fields = Fields(&args);
  for (const auto& given : pointers) {
    bool found = false;
    for (const auto& field : fields) {
      if (given.first != field.name) continue;
      found = true;
      if (field.input != nullptr) {
        args.*field.input = reinterpret_cast<const void*>(given.second);
      } else {
        args.*field.output = reinterpret_cast<void*>(given.second);
      }
    }
    if (!found) {
      std::string names;
      for (const auto& field : fields) names += std::string(names.empty() ? "" : ", ") + field.name;
      Refuse(function, "pointers", "have names of " + names, "'" + given.first + "'");
    }
  }
  for (const std::string& name : Required(problem, &args)) {
    const auto given = pointers.find(name);
    if (problem.batch > 0 && (given == pointers.end() || given->second == 0)) {
      Refuse(function, "pointers", "have '" + name + "' for this problem", "none");
    }
  }
  return args;
}

void Raise(const char* function, const Status& status) {
  if (status.ok()) return;
  const std::string message = std::string(function) + ": " + status.message +
                              (*status.kernel ? std::string(" (") + status.kernel + ")" : "");
  if (status.code == StatusCode::kInvalidProblem) throw py::value_error(message);
  throw std::runtime_error(message);
}

Problem MakeProblem(const char* function, const Shape& shape, const std::string& dtype,
                    const Options& options, int64_t hidden, int64_t kernel_size) {
  Problem problem = ParseOptions(function, options);
  const std::optional<DataType> type = TypeFromName(dtype);
  if (!type) Refuse(function, "dtype", "be float32, float16, bfloat16 or float64", dtype);
  problem.dtype = *type;
  SetMapSizes(function, "shape", shape, &problem);
  problem.hidden = hidden;
  problem.kernel_size = kernel_size;
  Raise(function, CheckProblem(problem));
  return problem;
}

using OptionalString = std::optional<std::string>;

// Defines `name` and `name`_workspace for the kernels that take these arguments.
template <typename Args>
void Define(py::module_& module, const char* name) {
  using namespace py::literals;  // NOLINT: the _a of keyword arguments
  const py::none none;
  const std::string workspace_name = std::string(name) + "_workspace";
  module.def(
      name,
      [name](const Shape& shape, const std::string& dtype, const Pointers& pointers,
             uintptr_t workspace_pointer, uintptr_t stream, int64_t hidden, int64_t kernel_size,
             const std::string& layout, const std::string& gates, const std::string& pooling,
             const OptionalString& mlp_activation, const OptionalString& activation,
             bool batch_norm, double epsilon) {
        const Options options{layout,     gates,      pooling, mlp_activation,
                              activation, batch_norm, epsilon};
        const Problem problem = MakeProblem(name, shape, dtype, options, hidden, kernel_size);
        const Args args = Bind<Args>(name, problem, pointers);
        Status status;
        {
          py::gil_scoped_release release;
          status = cuda::Run(problem, args, reinterpret_cast<void*>(workspace_pointer),
                             reinterpret_cast<void*>(stream));
        }
        Raise(name, status);
      },
      "shape"_a, "dtype"_a, "pointers"_a, py::kw_only(), "workspace"_a, "stream"_a = 0,
      "hidden"_a = 1, "kernel_size"_a = 7, "layout"_a = "NHWC", "gates"_a = "channel_first",
      "pooling"_a = "avg+max", "mlp_activation"_a = none, "activation"_a = none,
      "batch_norm"_a = false, "epsilon"_a = 1e-3,
      "Enqueues the kernels on `stream`. `pointers`: names of core/contract.h to addresses.");
  module.def(
      workspace_name.c_str(),
      [name](const Shape& shape, const std::string& dtype, int64_t hidden, int64_t kernel_size,
             const std::string& layout, const std::string& gates, const std::string& pooling,
             bool batch_norm) {
        const Options options{layout, gates, pooling, std::nullopt, std::nullopt, batch_norm, 1e-3};
        return cuda::WorkspaceBytes<Args>(
            MakeProblem(name, shape, dtype, options, hidden, kernel_size));
      },
      "shape"_a, "dtype"_a, py::kw_only(), "hidden"_a = 1, "kernel_size"_a = 7, "layout"_a = "NHWC",
      "gates"_a = "channel_first", "pooling"_a = "avg+max", "batch_norm"_a = false,
      "Bytes of device memory, aligned to 256, that the call of this name needs.");
}

}  // namespace

void BindCuda(py::module_& module) {
  using namespace py::literals;  // NOLINT: the _a of keyword arguments
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
      "capability"_a = 0,
      "Why the kernels cannot run on a device of this compute capability, 10 * major + minor (0:\n"
      "on the current device); empty where they can. No context is made on any device.");
  submodule.def(
      "set_path",
      [](const std::string& path) {
        cuda::SetPath(ParseChoice<cuda::Path>("set_path", "path", path,
                                              {{"auto", cuda::Path::kAuto},
                                               {"portable", cuda::Path::kPortable},
                                               {"cluster", cuda::Path::kCluster}}));
      },
      "Which kernels run: 'auto', 'portable' or 'cluster'.");
  Define<ForwardArgs>(submodule, "forward");
  Define<BackwardArgs>(submodule, "backward");
  Define<ChannelPoolArgs>(submodule, "channel_pool");
  Define<ChannelPoolGradArgs>(submodule, "channel_pool_grad");
  Define<SpatialPoolArgs>(submodule, "spatial_pool");
  Define<SpatialPoolGradArgs>(submodule, "spatial_pool_grad");
}

#else

void BindCuda(py::module_& module) {
  py::module_ submodule = module.def_submodule("cuda", "This build has no CUDA kernels.");
  submodule.attr("built") = false;
}

#endif

}  // namespace python
}  // namespace cbam_ops
