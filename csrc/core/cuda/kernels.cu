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

Status CheckSizes(const Problem& problem) {
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
  return {};
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

template <typename Args>
size_t WorkspaceBytes(const Problem& problem) {
  if (!CheckProblem(problem).ok()) return 0;
  return TableFor(problem.dtype).For(Args()).workspace_bytes(problem);
}

template <typename Args>
Status Run(const Problem& problem, const Args& args, void* workspace, void* stream) {
  const Status checked = CheckSizes(problem);
  if (!checked.ok()) return checked;
  DeviceInfo device;
  const Status queried = QueryDevice(&device);
  if (!queried.ok()) return queried;
  return TableFor(problem.dtype)
      .For(args)
      .run(problem, args, workspace, Launcher(device, stream), ActivePath());
}

#define CBAM_OPS_INSTANTIATE(Args)                      \
  template size_t WorkspaceBytes<Args>(const Problem&); \
  template Status Run(const Problem&, const Args&, void*, void*);
CBAM_OPS_FOR_EACH_ARGS(CBAM_OPS_INSTANTIATE)
#undef CBAM_OPS_INSTANTIATE

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
