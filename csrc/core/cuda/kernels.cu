// Entry points: checks, the choice by map type, and questions about the device.
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
      problem.channels > kMost || problem.hidden > kMost || problem.kernel_depth > 0x7fff ||
      problem.kernel_height > 0x7fff || problem.kernel_width > 0x7fff) {
    return {
        StatusCode::kUnsupported,
        "depth * height * width, channels and hidden must be below 2^31 on a GPU, kernel_depth, "
        "kernel_height and kernel_width below 2^15",
        ""};
  }
  return {};
}

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
  return TableFor(problem.dtype).For(args).run(problem, args, workspace, Launcher(device, stream));
}

Status LoadKernels(DataType dtype) { return TableFor(dtype).load(); }

template <typename Args>
Schedule Order(const Problem& problem, int64_t blocks) {
  return TableFor(problem.dtype).For(Args()).order(problem, blocks);
}

#define CBAM_OPS_INSTANTIATE(Args)                                \
  template size_t WorkspaceBytes<Args>(const Problem&);           \
  template Status Run(const Problem&, const Args&, void*, void*); \
  template Schedule Order<Args>(const Problem&, int64_t);
CBAM_OPS_FOR_EACH_ARGS(CBAM_OPS_INSTANTIATE)
#undef CBAM_OPS_INSTANTIATE

StreamDevice::StreamDevice([[maybe_unused]] void* stream) {
#if CUDART_VERSION >= 12080
  int wanted = 0, current = 0;
  if (cudaStreamGetDevice(static_cast<cudaStream_t>(stream), &wanted) != cudaSuccess ||
      cudaGetDevice(&current) != cudaSuccess || wanted == current) {
    return;
  }
  if (cudaSetDevice(wanted) == cudaSuccess) before_ = current;
#endif
}
StreamDevice::~StreamDevice() {
#if defined(__CUDACC__)
  if (before_ >= 0) cudaSetDevice(before_);
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

}  // namespace cuda
}  // namespace cbam_ops
