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

// Whether this build can run on the current device: ok, or kUnsupported, or kDeviceError. Makes the
// device's context and loads the code, which not every moment of a stream's life allows: meant for
// a first use.
Status CheckDevice();
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

// Which kernels run. kAuto: the cluster kernels where the device has clusters and a sample fits its
// shared memory, else the portable ones. The environment variable CBAM_OPS_CUDA_PATH (auto,
// portable or cluster), read once, is the initial choice. With kCluster a problem that does not fit
// is kUnsupported: for tests and measurements.
enum class Path : int32_t { kAuto = 0, kPortable = 1, kCluster = 2 };
void SetPath(Path path);
Path ActivePath();
// The path that Run would take for a problem on the current device, with pointers aligned to 16
// bytes.
Path ForwardPath(const Problem& problem);
Path BackwardPath(const Problem& problem);

}  // namespace cuda
}  // namespace cbam_ops

#pragma GCC visibility pop

#endif  // CBAM_OPS_CORE_CUDA_KERNELS_H_
