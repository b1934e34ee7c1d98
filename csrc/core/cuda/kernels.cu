// Entry points: checks, the choice by map type, and questions about the device.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core/cuda/explain.h"
#include "core/cuda/kernels.h"
#include "core/cuda/plan.h"
#include "core/cuda/table.h"

// The build says which architectures it compiles for, as a string.
#ifndef CBAM_OPS_CUDA_ARCHITECTURES
#define CBAM_OPS_CUDA_ARCHITECTURES ""
#endif

namespace cbam_ops {
namespace cuda {
namespace {

const Table& TableFor(DataType dtype) {
  switch (dtype) {
#if !defined(CBAM_OPS_CUDA_FLOAT32_ONLY)  // set by tests that compile the float32 sources alone
    case DataType::kFloat16:
      return kFloat16Table;
    case DataType::kBFloat16:
      return kBFloat16Table;
    case DataType::kFloat64:
      return kFloat64Table;
#endif
    default:
      return kFloat32Table;
  }
}

// The pools read only the sizes: the rest of their problem is made harmless.
Problem PoolProblem(const Problem& problem) {
  Problem pool;
  pool.dtype = problem.dtype;
  pool.layout = problem.layout;
  pool.batch = problem.batch;
  pool.height = problem.height;
  pool.width = problem.width;
  pool.channels = problem.channels;
  return pool;
}

template <typename Call>
Status WithLauncher(const Problem& problem, void* stream, Call call) {
  const Status checked = CheckProblem(problem);
  if (!checked.ok()) return checked;
  // Indices within a sample's rows and columns, and of blocks, have 31 bits; offsets into maps
  // have 64.
  constexpr int64_t kMost = 0x7fffffff;
  if (problem.height > kMost || problem.width > kMost || Positions(problem) > kMost ||
      problem.channels > kMost || problem.hidden > kMost || problem.kernel_size > 0x7fff) {
    return {
        StatusCode::kUnsupported,
        "height * width, channels and hidden must be below 2^31 on a GPU, kernel_size below 2^15",
        ""};
  }
  DeviceInfo device;
  const Status queried = QueryDevice(&device);
  if (!queried.ok()) return queried;
  return call(TableFor(problem.dtype), Launcher(device, stream));
}

std::atomic<int32_t>& ChosenPath() {
  static std::atomic<int32_t> path([] {
    const char* const name = std::getenv("CBAM_OPS_CUDA_PATH");
    if (name != nullptr && std::strcmp(name, "portable") == 0)
      return static_cast<int32_t>(Path::kPortable);
    if (name != nullptr && std::strcmp(name, "cluster") == 0)
      return static_cast<int32_t>(Path::kCluster);
    return static_cast<int32_t>(Path::kAuto);
  }());
  return path;
}

#if defined(__CUDACC__)
// Asked for its attributes only: whether this build has code for the device.
__global__ void ProbeKernel() {}
#endif

}  // namespace

size_t ForwardWorkspace(const Problem& problem) {
  return CheckProblem(problem).ok() ? TableFor(problem.dtype).forward_workspace(problem) : 0;
}
size_t BackwardWorkspace(const Problem& problem) {
  return CheckProblem(problem).ok() ? TableFor(problem.dtype).backward_workspace(problem) : 0;
}
size_t ChannelPoolWorkspace(const Problem& problem) {
  const Problem pool = PoolProblem(problem);
  return CheckProblem(pool).ok() ? TableFor(pool.dtype).pool_workspace(pool, false) : 0;
}
size_t SpatialPoolWorkspace(const Problem& problem) {
  const Problem pool = PoolProblem(problem);
  return CheckProblem(pool).ok() ? TableFor(pool.dtype).pool_workspace(pool, true) : 0;
}

Status Forward(const Problem& problem, const ForwardArgs& args, void* workspace, void* stream) {
  return WithLauncher(problem, stream, [&](const Table& table, Launcher launcher) {
    return table.forward(problem, args, workspace, launcher, ActivePath());
  });
}
Status Backward(const Problem& problem, const BackwardArgs& args, void* workspace, void* stream) {
  return WithLauncher(problem, stream, [&](const Table& table, Launcher launcher) {
    return table.backward(problem, args, workspace, launcher, ActivePath());
  });
}
Status ChannelPool(const Problem& problem, const ChannelPoolArgs& args, void* workspace,
                   void* stream) {
  const Problem pool = PoolProblem(problem);
  return WithLauncher(pool, stream, [&](const Table& table, Launcher launcher) {
    return table.channel_pool(pool, args, workspace, launcher);
  });
}
Status ChannelPoolGrad(const Problem& problem, const ChannelPoolGradArgs& args, void* workspace,
                       void* stream) {
  const Problem pool = PoolProblem(problem);
  return WithLauncher(pool, stream, [&](const Table& table, Launcher launcher) {
    return table.channel_pool_grad(pool, args, workspace, launcher);
  });
}
Status SpatialPool(const Problem& problem, const SpatialPoolArgs& args, void* /*workspace*/,
                   void* stream) {
  const Problem pool = PoolProblem(problem);
  return WithLauncher(pool, stream, [&](const Table& table, Launcher launcher) {
    return table.spatial_pool(pool, args, launcher);
  });
}
Status SpatialPoolGrad(const Problem& problem, const SpatialPoolGradArgs& args, void* workspace,
                       void* stream) {
  const Problem pool = PoolProblem(problem);
  return WithLauncher(pool, stream, [&](const Table& table, Launcher launcher) {
    return table.spatial_pool_grad(pool, args, workspace, launcher);
  });
}

Status CheckDevice() {
  DeviceInfo device;
  const Status queried = QueryDevice(&device);
  if (!queried.ok()) return queried;
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  return FromCudaError(
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&ProbeKernel)), "probe");
#else
  return {};
#endif
}

int DriverVersion() {
  int version = 0;
#if defined(__CUDACC__)
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
#endif
  return version;
}
int BuildVersion() {
#if defined(__CUDACC__)
  return CUDART_VERSION;
#else
  return 0;
#endif
}
int DeviceCapability() {
  DeviceInfo device;
  return QueryDevice(&device).ok() ? device.capability : 0;
}
void WhyNot(int capability, char* text, size_t size) {
  ExplainMachine(DriverVersion(), BuildVersion(), capability > 0 ? capability : DeviceCapability(),
                 BuiltArchitectures(), text, size);
}
const char* BuiltArchitectures() { return CBAM_OPS_CUDA_ARCHITECTURES; }

void SetPath(Path path) { ChosenPath().store(static_cast<int32_t>(path)); }
Path ActivePath() { return static_cast<Path>(ChosenPath().load()); }

namespace {
Path PathOf(const Problem& problem, bool backward) {
  DeviceInfo device;
  if (!CheckProblem(problem).ok() || !QueryDevice(&device).ok()) return Path::kPortable;
  const bool cluster =
      TableFor(problem.dtype).uses_cluster(problem, backward, device, ActivePath());
  return cluster ? Path::kCluster : Path::kPortable;
}
}  // namespace

Path ForwardPath(const Problem& problem) { return PathOf(problem, false); }
Path BackwardPath(const Problem& problem) { return PathOf(problem, true); }

}  // namespace cuda
}  // namespace cbam_ops
