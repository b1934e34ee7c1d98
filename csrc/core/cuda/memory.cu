// Devices and their memory: on a CPU (testing/cuda_on_cpu.h) one device, whose memory is the heap.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/cuda/launch.h"
#include "core/cuda/memory.h"

namespace cbam_ops {
namespace cuda {

#if defined(__CUDACC__)

int DeviceCount() {
  int count = 0;
  return FromCudaError(cudaGetDeviceCount(&count), "device query").ok() ? count : 0;
}

Status DescribeDevice(int device, char* name, size_t size, int* capability) {
  cudaDeviceProp properties;
  const Status status = FromCudaError(cudaGetDeviceProperties(&properties, device), "device query");
  if (!status.ok()) return status;
  std::snprintf(name, size, "%s", properties.name);
  *capability = 10 * properties.major + properties.minor;
  return {};
}

Status UseDevice(int device) { return FromCudaError(cudaSetDevice(device), "device choice"); }

Status Allocate(size_t bytes, void** memory) {
  *memory = nullptr;
  const cudaError_t error = cudaMalloc(memory, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return {};
  }
  return FromCudaError(error, "allocation");
}

Status Free(void* memory) { return FromCudaError(cudaFree(memory), "deallocation"); }

Status CopyToDevice(void* to, const void* from, size_t bytes) {
  return FromCudaError(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}

Status CopyToHost(void* to, const void* from, size_t bytes) {
  return FromCudaError(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
}

#else

int DeviceCount() { return 1; }

Status DescribeDevice(int device, char* name, size_t size, int* capability) {
  if (device != 0) return {StatusCode::kDeviceError, "invalid device ordinal", "device query"};
  std::snprintf(name, size, "a CPU that runs the CUDA sources");
  *capability = cuda_on_cpu::PretendedDevice().capability;
  return {};
}

Status UseDevice(int device) {
  if (device != 0) return {StatusCode::kDeviceError, "invalid device ordinal", "device choice"};
  return {};
}

Status Allocate(size_t bytes, void** memory) {
  if (posix_memalign(memory, kCudaAlignment, bytes) != 0) *memory = nullptr;
  return {};
}

Status Free(void* memory) {
  std::free(memory);
  return {};
}

Status CopyToDevice(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return {};
}

Status CopyToHost(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return {};
}

#endif

}  // namespace cuda
}  // namespace cbam_ops
