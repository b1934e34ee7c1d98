// cbam_ops._core: the kernels on numpy arrays, without TensorFlow.
//
// For tests, for measuring, and for whoever has arrays and no graph. Every function checks its
// arguments (ValueError), allocates what the kernels write and need, releases the GIL and runs.
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
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/contract.h"
#include "core/cpu/kernels.h"
#include "core/cpu/work_sharing.h"
#include "python/arguments.h"
#include "python/cuda_bindings.h"
#include "python/thread_pool.h"

namespace cbam_ops {
namespace python {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kGuard = 64;
constexpr unsigned char kGuardByte = 0xA5;
constexpr unsigned char kPoisonByte = 0xFF;  // all ones is a NaN in every floating type
constexpr int kMaxThreads = 256;

// How a call is run, as against what it computes.
struct Running {
  int threads = 1;
  bool poison = false;
  int64_t misalign = 0;
};

struct Guard {
  std::string name;
  const unsigned char* begin;
  size_t size;
};

// One call: keeps its arrays alive, remembers the guards, runs the kernel.
class Call {
 public:
  Call(const char* function, const Running& running) : function_(function), running_(running) {
    if (running.threads < 1 || running.threads > kMaxThreads) {
      Refuse(function_, "threads", "be between 1 and " + std::to_string(kMaxThreads),
             std::to_string(running.threads));
    }
    if (running.misalign < 0 || running.misalign > 64) {
      Refuse(function_, "misalign", "be between 0 and 64", std::to_string(running.misalign));
    }
  }

  const std::string& function() const { return function_; }

  // An input of any shape; its type is the caller's business. Copied when its elements do not lie
  // densely in row-major order, each aligned to its size.
  py::array Array(const char* name, const py::object& value) {
    if (!py::isinstance<py::array>(value)) {
      Refuse(function_, name, "be a numpy array",
             value.is_none() ? "None" : std::string(py::str(py::type::of(value).attr("__name__"))));
    }
    auto array = py::reinterpret_borrow<py::array>(value);
    if (!py::cast<bool>(array.dtype().attr("isnative"))) {
      Refuse(function_, name, "have the byte order of this machine", py::str(array.dtype()));
    }
    const int wanted = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if ((array.flags() & wanted) != wanted) {
      array = py::module_::import("numpy").attr("require")(array, py::none(), "CA");
    }
    kept_.push_back(array);
    return array;
  }

  Shape ShapeOf(const py::array& array) const {
    return Shape(array.shape(), array.shape() + array.ndim());
  }

  DataType MapType(const char* name, const py::array& array) const {
    const std::string type = py::str(array.dtype().attr("name"));
    const std::optional<DataType> found = TypeFromName(type);
    if (!found) Refuse(function_, name, "be of float32, float16, bfloat16 or float64", type);
    return *found;
  }

  const void* Input(const char* name, const py::object& value, DataType type,
                    const Dimensions& dimensions) {
    const py::array array = Array(name, value);
    const std::string received = py::str(array.dtype().attr("name"));
    if (TypeFromName(received) != type) {
      Refuse(function_, name, std::string("be of ") + TypeName(type), received);
    }
    CheckShape(function_, name, dimensions, ShapeOf(array));
    return array.data();
  }

  const void* OptionalInput(const char* name, const py::object& value, DataType type,
                            const Dimensions& dimensions) {
    return value.is_none() ? nullptr : Input(name, value, type, dimensions);
  }

  void* Output(const char* name, const py::dtype& type, const Dimensions& dimensions) {
    const Shape shape = ToShape(dimensions);
    size_t bytes = static_cast<size_t>(type.itemsize());
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    if (!running_.poison && running_.misalign == 0) {
      py::array array(type, shape);
      outputs_[name] = array;
      return array.mutable_data();
    }
    const size_t offset = kGuard + static_cast<size_t>(running_.misalign * type.itemsize());
    py::array_t<unsigned char> buffer(
        static_cast<py::ssize_t>(offset + bytes + kGuard + kAlignment));
    unsigned char* const start = buffer.mutable_data();
    const size_t to_boundary =
        (kAlignment - reinterpret_cast<uintptr_t>(start) % kAlignment) % kAlignment;
    unsigned char* const data = start + to_boundary + offset;
    if (running_.poison) {
      std::memset(start, kGuardByte, static_cast<size_t>(buffer.size()));
      std::memset(data, kPoisonByte, bytes);
      guards_.push_back({name, data - kGuard, kGuard});
      guards_.push_back({name, data + bytes, kGuard});
    }
    const auto begin = static_cast<py::ssize_t>(data - start);
    const py::slice inside(begin, begin + static_cast<py::ssize_t>(bytes), 1);
    outputs_[name] = buffer[inside].attr("view")(type).attr("reshape")(py::cast(shape));
    return data;
  }

  // kernel(workspace, parallel) with the GIL released.
  template <typename WorkspaceSize, typename Kernel>
  py::dict Run(const WorkspaceSize& workspace_size, const Kernel& kernel) {
    Status status;
    const char* spoilt = nullptr;
    {
      py::gil_scoped_release release;
      const int helpers = running_.threads - 1;
      ThreadPool& pool = ThreadPool::Shared(helpers);
      cpu::WorkSharing sharing(running_.threads, [&pool](std::function<void()> closure) {
        pool.Schedule(std::move(closure));
      });
      const cpu::Parallel parallel = helpers > 0 ? sharing.parallel() : cpu::Parallel{};
      const size_t bytes = workspace_size(parallel);
      const size_t allocated =
          (bytes + kGuard + kAlignment - 1) / kAlignment * kAlignment;  // as aligned_alloc wants it
      const std::unique_ptr<unsigned char, void (*)(void*)> workspace(
          static_cast<unsigned char*>(std::aligned_alloc(kAlignment, allocated)), std::free);
      if (workspace == nullptr) throw std::bad_alloc();
      if (running_.poison) {
        std::memset(workspace.get(), kPoisonByte, bytes);
        std::memset(workspace.get() + bytes, kGuardByte, kGuard);
        guards_.push_back({"the workspace", workspace.get() + bytes, kGuard});
      }
      status = kernel(workspace.get(), parallel);
      spoilt = SpoiltGuard();
    }
    if (!status.ok()) {
      const std::string message = function_ + ": " + status.message +
                                  (*status.kernel ? std::string(" (") + status.kernel + ")" : "");
      if (status.code == StatusCode::kInvalidProblem) throw py::value_error(message);
      throw std::runtime_error(message);
    }
    if (spoilt != nullptr) {
      throw std::runtime_error(function_ + ": the kernels wrote outside of " + spoilt);
    }
    return outputs_;
  }

 private:
  const char* SpoiltGuard() const {
    for (const Guard& guard : guards_) {
      for (size_t i = 0; i < guard.size; ++i) {
        if (guard.begin[i] != kGuardByte) return guard.name.c_str();
      }
    }
    return nullptr;
  }

  const std::string function_;
  const Running running_;
  std::vector<py::array> kept_;
  std::vector<Guard> guards_;
  py::dict outputs_;
};

// The weights of a call, None where there are none.
struct Weights {
  py::object w0, b0, w1, b1, kernel, gamma;
};

// Reads the map and the sizes that the weights decide, and fills in the arguments that the forward
// and the backward pass share.
template <typename Args>
void BindWeights(Call& call, const Weights& weights, Problem* problem, Args* args) {
  const std::string& function = call.function();
  const DataType compute = ComputeType(problem->dtype);
  if (HasChannelGate(*problem)) {
    SetHidden(function, call.ShapeOf(call.Array("w0", weights.w0)), problem);
    args->w0 = call.Input("w0", weights.w0, compute, W0Dimensions(*problem));
    args->b0 = call.OptionalInput("b0", weights.b0, compute, B0Dimensions(*problem));
    args->w1 = call.Input("w1", weights.w1, compute, W1Dimensions(*problem));
    args->b1 = call.OptionalInput("b1", weights.b1, compute, B1Dimensions(*problem));
  }
  if (HasSpatialGate(*problem)) {
    SetKernelSize(function, call.ShapeOf(call.Array("kernel", weights.kernel)), problem);
    args->kernel = call.Input("kernel", weights.kernel, compute, KernelDimensions(*problem));
    if (problem->batch_norm) {
      args->gamma = call.Input("gamma", weights.gamma, compute, ScalarDimensions());
    }
  }
}

py::dtype ComputeDtype(const Problem& problem) {
  return ComputeType(problem.dtype) == DataType::kFloat64 ? py::dtype::of<double>()
                                                          : py::dtype::of<float>();
}

py::dict Forward(const py::object& x, const Weights& weights, const py::object& bias,
                 const py::object& residual, const Options& options, const Running& running) {
  Call call("forward", running);
  Problem problem = ParseOptions(call.function(), options);
  const py::array map = call.Array("x", x);
  problem.dtype = call.MapType("x", map);
  SetMapSizes(call.function(), "x", call.ShapeOf(map), &problem);
  const DataType compute = ComputeType(problem.dtype);
  const py::dtype compute_dtype = ComputeDtype(problem);

  ForwardArgs args;
  args.x = map.data();
  args.residual = call.OptionalInput("residual", residual, problem.dtype, MapDimensions(problem));
  BindWeights(call, weights, &problem, &args);
  if (HasSpatialGate(problem)) {
    args.bias = call.OptionalInput("bias", bias, compute, ScalarDimensions());
  }

  args.y = call.Output("y", map.dtype(), MapDimensions(problem));
  if (HasChannelGate(problem)) {
    args.channel_descriptors =
        call.Output("channel_descriptors", compute_dtype, ChannelDescriptorDimensions(problem));
    args.channel_gate = call.Output("channel_gate", compute_dtype, ChannelGateDimensions(problem));
  }
  if (HasSpatialGate(problem)) {
    args.spatial_descriptors =
        call.Output("spatial_descriptors", compute_dtype, SpatialDescriptorDimensions(problem));
    args.spatial_gate = call.Output("spatial_gate", compute_dtype, SpatialGateDimensions(problem));
    if (problem.batch_norm) {
      args.batch_statistics = call.Output("batch_statistics", compute_dtype, PairDimensions());
    }
  }
  return call.Run(
      [&](const cpu::Parallel& parallel) {
        return cpu::WorkspaceBytes<ForwardArgs>(problem, parallel);
      },
      [&](void* workspace, const cpu::Parallel& parallel) {
        return cpu::Run(problem, args, workspace, parallel);
      });
}

// What the forward pass wrote and the backward pass reads.
struct Saved {
  py::object y, channel_descriptors, channel_gate, spatial_descriptors, spatial_gate,
      batch_statistics;
};

py::dict Backward(const py::object& x, const py::object& dy, const Weights& weights,
                  const Saved& saved, const py::object& d_channel_gate,
                  const py::object& d_spatial_gate, bool has_residual, const Options& options,
                  const Running& running) {
  Call call("backward", running);
  Problem problem = ParseOptions(call.function(), options);
  const py::array map = call.Array("x", x);
  problem.dtype = call.MapType("x", map);
  SetMapSizes(call.function(), "x", call.ShapeOf(map), &problem);
  const DataType compute = ComputeType(problem.dtype);
  const py::dtype compute_dtype = ComputeDtype(problem);

  BackwardArgs args;
  args.x = map.data();
  args.dy = call.Input("dy", dy, problem.dtype, MapDimensions(problem));
  const bool relu = problem.activation == Activation::kRelu;
  if (relu) args.y = call.Input("y", saved.y, problem.dtype, MapDimensions(problem));
  BindWeights(call, weights, &problem, &args);
  args.dx = call.Output("dx", map.dtype(), MapDimensions(problem));
  if (relu && has_residual) {
    args.d_residual = call.Output("d_residual", map.dtype(), MapDimensions(problem));
  }
  if (HasChannelGate(problem)) {
    args.channel_descriptors = call.Input("channel_descriptors", saved.channel_descriptors, compute,
                                          ChannelDescriptorDimensions(problem));
    args.channel_gate =
        call.Input("channel_gate", saved.channel_gate, compute, ChannelGateDimensions(problem));
    args.d_channel_gate = call.OptionalInput("d_channel_gate", d_channel_gate, compute,
                                             ChannelGateDimensions(problem));
    args.dw0 = call.Output("dw0", compute_dtype, W0Dimensions(problem));
    args.db0 = call.Output("db0", compute_dtype, B0Dimensions(problem));
    args.dw1 = call.Output("dw1", compute_dtype, W1Dimensions(problem));
    args.db1 = call.Output("db1", compute_dtype, B1Dimensions(problem));
  }
  if (HasSpatialGate(problem)) {
    args.spatial_descriptors = call.Input("spatial_descriptors", saved.spatial_descriptors, compute,
                                          SpatialDescriptorDimensions(problem));
    args.spatial_gate =
        call.Input("spatial_gate", saved.spatial_gate, compute, SpatialGateDimensions(problem));
    args.d_spatial_gate = call.OptionalInput("d_spatial_gate", d_spatial_gate, compute,
                                             SpatialGateDimensions(problem));
    args.dkernel = call.Output("dkernel", compute_dtype, KernelDimensions(problem));
    args.dbias = call.Output("dbias", compute_dtype, ScalarDimensions());
    if (problem.batch_norm) {
      args.batch_statistics =
          call.Input("batch_statistics", saved.batch_statistics, compute, PairDimensions());
      args.dgamma = call.Output("dgamma", compute_dtype, ScalarDimensions());
    }
  }
  return call.Run(
      [&](const cpu::Parallel& parallel) {
        return cpu::WorkspaceBytes<BackwardArgs>(problem, parallel);
      },
      [&](void* workspace, const cpu::Parallel& parallel) {
        return cpu::Run(problem, args, workspace, parallel);
      });
}

// The common beginning of the four pools.
py::array PoolInput(Call& call, const py::object& x, const std::string& layout, Problem* problem) {
  problem->layout = ParseLayout(call.function(), layout);
  const py::array map = call.Array("x", x);
  problem->dtype = call.MapType("x", map);
  SetMapSizes(call.function(), "x", call.ShapeOf(map), problem);
  return map;
}

py::dict ChannelPool(const py::object& x, const std::string& layout, const Running& running) {
  Call call("channel_pool", running);
  Problem problem;
  const py::array map = PoolInput(call, x, layout, &problem);
  ChannelPoolArgs args;
  args.x = map.data();
  args.mean = call.Output("mean", map.dtype(), ChannelGateDimensions(problem));
  args.maximum = call.Output("maximum", map.dtype(), ChannelGateDimensions(problem));
  return call.Run(
      [&](const cpu::Parallel& parallel) {
        return cpu::WorkspaceBytes<ChannelPoolArgs>(problem, parallel);
      },
      [&](void* workspace, const cpu::Parallel& parallel) {
        return cpu::Run(problem, args, workspace, parallel);
      });
}

py::dict ChannelPoolGrad(const py::object& x, const py::object& maximum, const py::object& d_mean,
                         const py::object& d_maximum, const std::string& layout,
                         const Running& running) {
  Call call("channel_pool_grad", running);
  Problem problem;
  const py::array map = PoolInput(call, x, layout, &problem);
  const Dimensions pooled = ChannelGateDimensions(problem);
  ChannelPoolGradArgs args;
  args.x = map.data();
  args.maximum = call.Input("maximum", maximum, problem.dtype, pooled);
  args.d_mean = call.Input("d_mean", d_mean, problem.dtype, pooled);
  args.d_maximum = call.Input("d_maximum", d_maximum, problem.dtype, pooled);
  args.dx = call.Output("dx", map.dtype(), MapDimensions(problem));
  return call.Run(
      [&](const cpu::Parallel& parallel) {
        return cpu::WorkspaceBytes<ChannelPoolArgs>(problem, parallel);
      },
      [&](void* workspace, const cpu::Parallel& parallel) {
        return cpu::Run(problem, args, workspace, parallel);
      });
}

py::dict SpatialPool(const py::object& x, const std::string& layout, const Running& running) {
  Call call("spatial_pool", running);
  Problem problem;
  const py::array map = PoolInput(call, x, layout, &problem);
  SpatialPoolArgs args;
  args.x = map.data();
  args.descriptors = call.Output("descriptors", map.dtype(), SpatialPoolDimensions(problem));
  return call.Run(
      [&](const cpu::Parallel& parallel) {
        return cpu::WorkspaceBytes<SpatialPoolArgs>(problem, parallel);
      },
      [&](void* workspace, const cpu::Parallel& parallel) {
        return cpu::Run(problem, args, workspace, parallel);
      });
}

py::dict SpatialPoolGrad(const py::object& x, const py::object& descriptors,
                         const py::object& d_descriptors, const std::string& layout,
                         const Running& running) {
  Call call("spatial_pool_grad", running);
  Problem problem;
  const py::array map = PoolInput(call, x, layout, &problem);
  const Dimensions pooled = SpatialPoolDimensions(problem);
  SpatialPoolGradArgs args;
  args.x = map.data();
  args.descriptors = call.Input("descriptors", descriptors, problem.dtype, pooled);
  args.d_descriptors = call.Input("d_descriptors", d_descriptors, problem.dtype, pooled);
  args.dx = call.Output("dx", map.dtype(), MapDimensions(problem));
  return call.Run(
      [&](const cpu::Parallel& parallel) {
        return cpu::WorkspaceBytes<SpatialPoolArgs>(problem, parallel);
      },
      [&](void* workspace, const cpu::Parallel& parallel) {
        return cpu::Run(problem, args, workspace, parallel);
      });
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
  for (const cpu::InstructionSet set : kInstructionSets) {
    if (name == cpu::Name(set) && cpu::SetInstructionSet(set)) return;
    if (cpu::IsAvailable(set)) {
      available += std::string(available.empty() ? "'" : ", '") + cpu::Name(set) + "'";
    }
  }
  Refuse("set_instruction_set", "name",
         "be an instruction set of this processor and this build (" + available + ")",
         "'" + name + "'");
}

}  // namespace
}  // namespace python
}  // namespace cbam_ops

PYBIND11_MODULE(_core, module) {
  namespace py = pybind11;
  using namespace py::literals;  // NOLINT: the _a of keyword arguments
  using cbam_ops::python::Options;
  using cbam_ops::python::Running;
  using cbam_ops::python::Saved;
  using cbam_ops::python::Weights;
  using OptionalString = std::optional<std::string>;
  const py::none none;

  module.doc() =
      "The kernels of cbam_ops on numpy arrays, without TensorFlow.\n\n"
      "Maps are float32, float16, float64 or bfloat16 (ml_dtypes.bfloat16, or its bits as "
      "uint16);\n"
      "everything else is float64 with float64 maps and float32 otherwise.";

  module.def(
      "forward",
      [](const py::object& x, const py::object& w0, const py::object& b0, const py::object& w1,
         const py::object& b1, const py::object& kernel, const py::object& bias,
         const py::object& gamma, const py::object& residual, const std::string& layout,
         const std::string& gates, const std::string& pooling, const OptionalString& mlp_activation,
         const OptionalString& activation, bool batch_norm, double epsilon, int threads,
         bool poison, int64_t misalign) {
        return cbam_ops::python::Forward(
            x, Weights{w0, b0, w1, b1, kernel, gamma}, bias, residual,
            Options{layout, gates, pooling, mlp_activation, activation, batch_norm, epsilon},
            Running{threads, poison, misalign});
      },
      "x"_a, "w0"_a = none, "b0"_a = none, "w1"_a = none, "b1"_a = none, "kernel"_a = none,
      "bias"_a = none, "gamma"_a = none, "residual"_a = none, py::kw_only(), "layout"_a = "NHWC",
      "gates"_a = "channel_first", "pooling"_a = "avg+max", "mlp_activation"_a = none,
      "activation"_a = none, "batch_norm"_a = false, "epsilon"_a = 1e-3, "threads"_a = 1,
      "poison"_a = false, "misalign"_a = 0,
      "The module: a dict with y and, where the problem has the gate, channel_descriptors\n"
      "[2, N, C], channel_gate [N, C], spatial_descriptors [N, 2, H, W], spatial_gate [N, H, W],\n"
      "batch_statistics [2].\n\n"
      "x [N, H, W, C] or [N, C, H, W]; w0 [C, hidden], w1 [hidden, C], kernel [k, k, 2, 1];\n"
      "gates 'channel_first', 'parallel', 'channel_only' or 'spatial_only'.");

  module.def(
      "backward",
      [](const py::object& x, const py::object& dy, const py::object& w0, const py::object& b0,
         const py::object& w1, const py::object& b1, const py::object& kernel,
         const py::object& gamma, const py::object& y, const py::object& channel_descriptors,
         const py::object& channel_gate, const py::object& spatial_descriptors,
         const py::object& spatial_gate, const py::object& batch_statistics,
         const py::object& d_channel_gate, const py::object& d_spatial_gate, bool has_residual,
         const std::string& layout, const std::string& gates, const std::string& pooling,
         const OptionalString& mlp_activation, const OptionalString& activation, bool batch_norm,
         double epsilon, int threads, bool poison, int64_t misalign) {
        return cbam_ops::python::Backward(
            x, dy, Weights{w0, b0, w1, b1, kernel, gamma},
            Saved{y, channel_descriptors, channel_gate, spatial_descriptors, spatial_gate,
                  batch_statistics},
            d_channel_gate, d_spatial_gate, has_residual,
            Options{layout, gates, pooling, mlp_activation, activation, batch_norm, epsilon},
            Running{threads, poison, misalign});
      },
      "x"_a, "dy"_a, "w0"_a = none, "b0"_a = none, "w1"_a = none, "b1"_a = none, "kernel"_a = none,
      "gamma"_a = none, py::kw_only(), "y"_a = none, "channel_descriptors"_a = none,
      "channel_gate"_a = none, "spatial_descriptors"_a = none, "spatial_gate"_a = none,
      "batch_statistics"_a = none, "d_channel_gate"_a = none, "d_spatial_gate"_a = none,
      "has_residual"_a = false, "layout"_a = "NHWC", "gates"_a = "channel_first",
      "pooling"_a = "avg+max", "mlp_activation"_a = none, "activation"_a = none,
      "batch_norm"_a = false, "epsilon"_a = 1e-3, "threads"_a = 1, "poison"_a = false,
      "misalign"_a = 0,
      "The module's gradients: a dict with dx and those of dw0, db0, dw1, db1, dkernel, dbias,\n"
      "dgamma, d_residual that the problem has. Takes what `forward` returned; y only with\n"
      "activation='relu'. d_residual is there with an activation and has_residual=True: without\n"
      "an activation it is dy.");

  module.def(
      "channel_pool",
      [](const py::object& x, const std::string& layout, int threads, bool poison,
         int64_t misalign) {
        return cbam_ops::python::ChannelPool(x, layout, Running{threads, poison, misalign});
      },
      "x"_a, py::kw_only(), "layout"_a = "NHWC", "threads"_a = 1, "poison"_a = false,
      "misalign"_a = 0, "mean and maximum over positions, each [N, C], of the type of x.");

  module.def(
      "channel_pool_grad",
      [](const py::object& x, const py::object& maximum, const py::object& d_mean,
         const py::object& d_maximum, const std::string& layout, int threads, bool poison,
         int64_t misalign) {
        return cbam_ops::python::ChannelPoolGrad(x, maximum, d_mean, d_maximum, layout,
                                                 Running{threads, poison, misalign});
      },
      "x"_a, "maximum"_a, "d_mean"_a, "d_maximum"_a, py::kw_only(), "layout"_a = "NHWC",
      "threads"_a = 1, "poison"_a = false, "misalign"_a = 0,
      "dx of channel_pool; equal maxima share the gradient evenly.");

  module.def(
      "spatial_pool",
      [](const py::object& x, const std::string& layout, int threads, bool poison,
         int64_t misalign) {
        return cbam_ops::python::SpatialPool(x, layout, Running{threads, poison, misalign});
      },
      "x"_a, py::kw_only(), "layout"_a = "NHWC", "threads"_a = 1, "poison"_a = false,
      "misalign"_a = 0,
      "descriptors: mean and maximum over channels, [N, H, W, 2] or [N, 2, H, W], of x's type.");

  module.def(
      "spatial_pool_grad",
      [](const py::object& x, const py::object& descriptors, const py::object& d_descriptors,
         const std::string& layout, int threads, bool poison, int64_t misalign) {
        return cbam_ops::python::SpatialPoolGrad(x, descriptors, d_descriptors, layout,
                                                 Running{threads, poison, misalign});
      },
      "x"_a, "descriptors"_a, "d_descriptors"_a, py::kw_only(), "layout"_a = "NHWC",
      "threads"_a = 1, "poison"_a = false, "misalign"_a = 0,
      "dx of spatial_pool; equal maxima share the gradient evenly.");

  module.def(
      "instruction_set", [] { return cbam_ops::cpu::Name(cbam_ops::cpu::ActiveInstructionSet()); },
      "The instruction set in use: 'baseline', 'avx2' or 'avx512'.");
  module.def("set_instruction_set", &cbam_ops::python::SetInstructionSet, "name"_a,
             "Chooses the instruction set for this process; ValueError where it is not available.");
  module.def("available_instruction_sets", &cbam_ops::python::AvailableInstructionSets,
             "The instruction sets that this processor and this build have, in rising order.");

  cbam_ops::python::BindCuda(module);
}
