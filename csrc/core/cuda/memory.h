// Devices and their memory, for callers that have no framework to get it from: what compares the
// kernels with the CPU's on a GPU (cbam_ops/_cli/gpu_kernels.py).
//
// Plain C++, like kernels.h. Copies wait for what the default stream has been given before, and
// report what went wrong there.
#ifndef CBAM_OPS_CORE_CUDA_MEMORY_H_
#define CBAM_OPS_CORE_CUDA_MEMORY_H_

#include <cstddef>

#include "core/contract.h"

// What follows is exported from the shared library of the core (csrc/cmake/exports_core.map).
#pragma GCC visibility push(default)

namespace cbam_ops {
namespace cuda {

// Devices in the order in which CUDA numbers them; 0 without a driver. Neither this nor
// DescribeDevice makes a context on any of them.
int DeviceCount();
// Writes the name and the compute capability, 10 * major + minor, of one of them.
Status DescribeDevice(int device, char* name, size_t size, int* capability);
// Makes it the current device of this thread.
Status UseDevice(int device);

// Of the current device; `*memory` is null where there is not enough. Aligned to kCudaAlignment.
Status Allocate(size_t bytes, void** memory);
Status Free(void* memory);
Status CopyToDevice(void* to, const void* from, size_t bytes);
Status CopyToHost(void* to, const void* from, size_t bytes);

}  // namespace cuda
}  // namespace cbam_ops

#pragma GCC visibility pop

#endif  // CBAM_OPS_CORE_CUDA_MEMORY_H_
