// How launchers start kernels: on a GPU through the CUDA runtime, on a CPU through
// testing/cuda_on_cpu.h.
#ifndef CBAM_OPS_CORE_CUDA_LAUNCH_H_
#define CBAM_OPS_CORE_CUDA_LAUNCH_H_

#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "core/cuda/device.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace cbam_ops {
namespace cuda {

struct DeviceInfo {
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 1;
  int64_t l2_bytes = 0;
  int64_t shared_bytes = 0;  // per block, at most
};

// A CUDA error as a status. `kernel` names what was launched.
#if defined(__CUDACC__)
inline Status FromCudaError(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // ours to report: later calls of others shall not find it
  switch (error) {
    case cudaErrorInsufficientDriver:
      return {StatusCode::kUnsupported,
              "there is no NVIDIA driver, or it is older than the CUDA of the build", kernel};
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return {StatusCode::kUnsupported,
              "the kernels were not built for the architecture of this GPU", kernel};
    default:
      return {StatusCode::kDeviceError, cudaGetErrorString(error), kernel};
  }
}
#endif

// The current device; not ok where there is none.
inline Status QueryDevice(DeviceInfo* info) {
#if defined(__CUDACC__)
  int device = 0, major = 0, minor = 0, l2 = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&minor, cudaDevAttrComputeCapabilityMinor);
  get(&l2, cudaDevAttrL2CacheSize);
  get(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&info->multiprocessors, cudaDevAttrMultiProcessorCount);
  info->capability = 10 * major + minor;
  info->l2_bytes = l2;
  info->shared_bytes = shared;
  return FromCudaError(error, "device query");
#else
  const cuda_on_cpu::Device& device = cuda_on_cpu::PretendedDevice();
  info->capability = device.capability;
  info->multiprocessors = device.multiprocessors;
  info->l2_bytes = device.l2_bytes;
  info->shared_bytes = device.shared_bytes;
  return {};
#endif
}

// Starts kernels on a stream, one after the other, until one fails.
class Launcher {
 public:
  Launcher(const DeviceInfo& device, void* stream) : device_(device), stream_(stream) {}

  const DeviceInfo& device() const { return device_; }
  const Status& status() const { return status_; }

  // An empty grid is no launch.
  template <typename Params>
  void Run(const char* name, void (*kernel)(Params), int64_t blocks, size_t shared_bytes,
           const Params& params, int threads = kThreads, int cluster = 1) {
    if (!status_.ok() || blocks == 0) return;
    if (blocks > 0x7fffffff) {
      status_ = {StatusCode::kInvalidProblem, "more blocks than a grid can have", name};
      return;
    }
#if defined(__CUDACC__)
    const void* const function = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 * 1024) {
      error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess && cluster > 8)
      error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) {
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(static_cast<unsigned>(blocks));
      config.blockDim = dim3(static_cast<unsigned>(threads));
      config.dynamicSmemBytes = shared_bytes;
      config.stream = static_cast<cudaStream_t>(stream_);
      cudaLaunchAttribute attributes[2];
      config.attrs = attributes;
      if (device_.capability >= 90) {
        // Every kernel waits for its predecessors itself (WaitForPredecessors).
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
      }
      if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(cluster);
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
      }
      void* arguments[] = {const_cast<Params*>(&params)};
      error = cudaLaunchKernelExC(&config, function, arguments);
    }
    status_ = FromCudaError(error, name);
#else
    cuda_on_cpu::Launch({name, blocks, threads, cluster, shared_bytes}, kernel, params);
#endif
  }

 private:
  DeviceInfo device_;
  void* stream_;
  Status status_;
};

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_LAUNCH_H_
