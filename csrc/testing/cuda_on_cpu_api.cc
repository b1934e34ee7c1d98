// The emulated kernels as a C library, for tests through ctypes: structs are contract.h's, errors
// come back as text.
#include <cstdio>
#include <cstring>

#include "core/cuda/explain.h"
#include "core/cuda/kernels.h"
#if !defined(CBAM_ON_GPU)
#include "testing/cuda_on_cpu.h"
#endif

namespace {

char failure[512];

int Report(const cbam_ops::Status& status, char* message, size_t size) {
  if (failure[0] != '\0') {
    std::snprintf(message, size, "%s", failure);
    failure[0] = '\0';
    return -1;
  }
  std::snprintf(message, size, "%s: %s", status.kernel, status.message);
  return static_cast<int>(status.code);
}

}  // namespace

#define CBAM_EXPORT extern "C" __attribute__((visibility("default")))

namespace cuda = cbam_ops::cuda;
using cbam_ops::Problem;

CBAM_EXPORT size_t cbam_forward_workspace(const Problem* problem) {
  return cuda::WorkspaceBytes<cbam_ops::ForwardArgs>(*problem);
}
CBAM_EXPORT size_t cbam_backward_workspace(const Problem* problem) {
  return cuda::WorkspaceBytes<cbam_ops::BackwardArgs>(*problem);
}
CBAM_EXPORT size_t cbam_channel_pool_workspace(const Problem* problem) {
  return cuda::WorkspaceBytes<cbam_ops::ChannelPoolArgs>(*problem);
}
CBAM_EXPORT size_t cbam_spatial_pool_workspace(const Problem* problem) {
  return cuda::WorkspaceBytes<cbam_ops::SpatialPoolArgs>(*problem);
}

#define CBAM_CALL(name, Args)                                                               \
  CBAM_EXPORT int name(const Problem* problem, const cbam_ops::Args* args, void* workspace, \
                       void* stream, char* message, size_t size) {                          \
    return Report(cuda::Run(*problem, *args, workspace, stream), message, size);            \
  }
CBAM_CALL(cbam_forward, ForwardArgs)
CBAM_CALL(cbam_backward, BackwardArgs)
CBAM_CALL(cbam_channel_pool, ChannelPoolArgs)
CBAM_CALL(cbam_channel_pool_grad, ChannelPoolGradArgs)
CBAM_CALL(cbam_spatial_pool, SpatialPoolArgs)
CBAM_CALL(cbam_spatial_pool_grad, SpatialPoolGradArgs)

CBAM_EXPORT void cbam_set_path(int path) { cuda::SetPath(static_cast<cuda::Path>(path)); }
CBAM_EXPORT int cbam_forward_path(const Problem* problem) {
  return static_cast<int>(cuda::ForwardPath(*problem));
}
CBAM_EXPORT int cbam_backward_path(const Problem* problem) {
  return static_cast<int>(cuda::BackwardPath(*problem));
}
CBAM_EXPORT void cbam_explain_machine(int driver_version, int build_version, int capability,
                                      const char* architectures, char* text, size_t size) {
  cuda::ExplainMachine(driver_version, build_version, capability, architectures, text, size);
}
#if !defined(CBAM_ON_GPU)
CBAM_EXPORT void cbam_set_schedule(uint64_t seed) { cbam_ops::cuda_on_cpu::SetSchedule(seed); }
CBAM_EXPORT const char* cbam_take_launched_kernels() {
  return cbam_ops::cuda_on_cpu::TakeLaunchedKernels();
}
CBAM_EXPORT void cbam_set_device(int64_t l2_bytes, int capability, int64_t shared_bytes) {
  auto& device = cbam_ops::cuda_on_cpu::PretendedDevice();
  device.l2_bytes = l2_bytes;
  device.capability = capability;
  device.shared_bytes = shared_bytes;
}
// From now on what would hang or be undefined on a GPU comes back as an error text instead of
// ending the process.
CBAM_EXPORT void cbam_report_failures() {
  cbam_ops::cuda_on_cpu::SetFailureHandler([](const char* message) {
    if (failure[0] == '\0') std::snprintf(failure, sizeof(failure), "%s", message);
  });
}
CBAM_EXPORT float cbam_half_to_float(uint16_t bits) {
  return cbam_ops::cuda_on_cpu::HalfToFloat(bits);
}
CBAM_EXPORT uint16_t cbam_float_to_half(float value) {
  return cbam_ops::cuda_on_cpu::FloatToHalf(value);
}
CBAM_EXPORT uint16_t cbam_float_to_bfloat16(float value) {
  return cbam_ops::cuda_on_cpu::FloatToBFloat16(value);
}
#endif  // CBAM_ON_GPU
