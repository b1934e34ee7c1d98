// The kernels on NVIDIA GPUs: entry points and the questions a caller may ask about the device.
//
// Plain C++: no CUDA header is needed to include this. Pointers are device pointers of the stream's
// device, which must be current; `stream` is a cudaStream_t (CUstream). All work is enqueued there,
// nothing waits for it. Semantics, types and what is saved for the gradient are contract.h's, the
// same as on CPUs: forward on one and backward on the other agree.
#ifndef CBAM_OPS_CORE_CUDA_KERNELS_H_
#define CBAM_OPS_CORE_CUDA_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "core/contract.h"

// What follows is exported from the shared library of the core (csrc/cmake/exports_core.map).
#pragma GCC visibility push(default)

namespace cbam_ops {
namespace cuda {

// Both for each of contract.h's argument structs. The pragma does not reach function templates.
//
// Bytes of device memory that a call needs, aligned to kCudaAlignment. The same on every device.
template <typename Args>
__attribute__((visibility("default"))) size_t WorkspaceBytes(const Problem& problem);
template <typename Args>
__attribute__((visibility("default"))) Status Run(const Problem& problem, const Args& args,
                                                  void* workspace, void* stream);

// The items of such a call in their order (schedule.h), as they would be for so many blocks: for
// tests.
struct Schedule;
template <typename Args>
Schedule Order(const Problem& problem, int64_t blocks);

// Loads the kernels for maps of a type onto the current device and says whether this build can run
// there: ok, or kUnsupported, or kDeviceError. Makes the device's context, which not every moment
// of a stream's life allows: meant for a first use.
Status LoadKernels(DataType dtype);
// Makes a stream's device the current one for as long as it lives: for callers that others call
// with a stream and nothing else.
class StreamDevice {
 public:
  explicit StreamDevice(void* stream);
  ~StreamDevice();
  StreamDevice(const StreamDevice&) = delete;
  StreamDevice& operator=(const StreamDevice&) = delete;

 private:
  int before_ = -1;  // none: nothing was changed
};
// Why this build cannot run on a device of the given compute capability (10 * major + minor; 0: on
// the current device): no driver, one older than the CUDA of the build, no device, or an
// architecture that was not built, as one sentence with the versions. Empty where it can. Asks the
// driver only: no context is made on any device.
void WhyNot(int capability, char* text, size_t size);
inline constexpr size_t kWhyNotBytes = 512;

// CUDA versions as 1000 * major + 10 * minor: of the driver (0 without one) and of the toolkit of
// the build.
int DriverVersion();
int BuildVersion();
// Compute capability of the current device as 10 * major + minor; 0 without a device.
int DeviceCapability();
// The architectures in this build, like "75 80 90 121-virtual"; empty where the build did not say.
const char* BuiltArchitectures();

}  // namespace cuda
}  // namespace cbam_ops

#pragma GCC visibility pop

#endif  // CBAM_OPS_CORE_CUDA_KERNELS_H_
