// How launchers start kernels: on a GPU through the CUDA runtime, on a CPU through
// testing/cuda_on_cpu.h.
#ifndef CBAM_OPS_CORE_CUDA_LAUNCH_H_
#define CBAM_OPS_CORE_CUDA_LAUNCH_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/contract.h"
#include "core/cuda/device.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace cbam_ops {
namespace cuda {

struct DeviceInfo {
  int index = 0;
  int capability = 0;  // 10 * major + minor
  int64_t multiprocessors = 1;
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

// The current device; not ok where there is none. Asked once for each.
inline Status QueryDevice(DeviceInfo* info) {
#if defined(__CUDACC__)
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return FromCudaError(error, "device query");
  // Both numbers in one, so that no thread sees half of an answer; 0 is none yet.
  static std::atomic<uint32_t> answers[64];
  std::atomic<uint32_t>* const known = device < 64 ? &answers[device] : nullptr;
  uint32_t answer = known != nullptr ? known->load() : 0;
  if (answer == 0) {
    int major = 0, minor = 0, multiprocessors = 0;
    const auto get = [&](int* value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
    };
    get(&major, cudaDevAttrComputeCapabilityMajor);
    get(&minor, cudaDevAttrComputeCapabilityMinor);
    get(&multiprocessors, cudaDevAttrMultiProcessorCount);
    if (error != cudaSuccess) return FromCudaError(error, "device query");
    answer =
        static_cast<uint32_t>(10 * major + minor) << 16 | static_cast<uint32_t>(multiprocessors);
    if (known != nullptr) known->store(answer);
  }
  info->index = device;
  info->capability = static_cast<int>(answer >> 16);
  info->multiprocessors = answer & 0xffff;
#else
  const cuda_on_cpu::Device& device = cuda_on_cpu::PretendedDevice();
  info->capability = device.capability;
  info->multiprocessors = device.multiprocessors;
#endif
  return {};
}

// Enqueues on a stream: a kernel with counters set to 0 before it, or zeros.
class Launcher {
 public:
  Launcher(const DeviceInfo& device, void* stream) : device_(device), stream_(stream) {}

  const DeviceInfo& device() const { return device_; }

  // `call` begins its counters at next_ticket. A multiprocessor shall hold `at_once` of the blocks.
  template <auto kernel, int at_once, typename Call>
  Status Run(int64_t blocks, const Call& call, int64_t counter_bytes) const {
    if (call.schedule.tickets == 0) return {};
    if (static_cast<uint64_t>(blocks) > call.schedule.tickets)
      blocks = static_cast<int64_t>(call.schedule.tickets);
    const Status zeroed = ZeroBytes(call.next_ticket, counter_bytes);
    if (!zeroed.ok()) return zeroed;
#if defined(__CUDACC__)
    MakeRoom<kernel, at_once>();
    void* arguments[] = {const_cast<Call*>(&call)};
    return FromCudaError(
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(kBlock), arguments, kSharedBytes, static_cast<cudaStream_t>(stream_)),
        "launch");
#else
    cuda_on_cpu::Launch({"Kernel", blocks, kBlock, kSharedBytes}, kernel, call);
    return {};
#endif
  }

  // `values` zeros of the compute type of a map type.
  Status Zero(DataType map, void* data, int64_t values) const {
    const size_t bytes =
        cbam_ops::ComputeType(map) == DataType::kFloat64 ? sizeof(double) : sizeof(float);
    return ZeroBytes(data, values * static_cast<int64_t>(bytes));
  }

  // Loads a kernel onto the current device, which the first launch would do otherwise.
  template <typename Call>
  static Status Load([[maybe_unused]] void (*kernel)(Call)) {
#if defined(__CUDACC__)
    cudaFuncAttributes attributes;
    return FromCudaError(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
                         "load");
#else
    return {};
#endif
  }

 private:
#if defined(__CUDACC__)
  // Asks, once for a kernel and a device, for shared memory for `at_once` blocks: of what it has in
  // common with the first-level cache the driver may otherwise leave it less, and fewer would run.
  // This is a hint, whose failure is none of the call's.
  template <auto kernel, int at_once>
  void MakeRoom() const {
    static std::atomic<uint64_t> devices;  // that have been asked, a bit each
    const uint64_t device = device_.index < 64 ? uint64_t{1} << device_.index : 0;
    if ((devices.load() & device) != 0) return;
    devices |= device;
    constexpr int kReserved = 1024;  // of a block, for the driver, on the machines that have most
    constexpr int kWanted = at_once * (kSharedBytes + kReserved);
    int most = 0;
    cudaError_t error =
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device_.index);
    if (error == cudaSuccess && most > 0) {
      const int percent = kWanted < most ? (100 * kWanted + most - 1) / most : 100;
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributePreferredSharedMemoryCarveout, percent);
    }
    if (error != cudaSuccess) cudaGetLastError();
  }
#endif

  Status ZeroBytes(void* data, int64_t bytes) const {
    if (data == nullptr || bytes == 0) return {};
#if defined(__CUDACC__)
    return FromCudaError(
        cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream_)),
        "memset");
#else
    std::memset(data, 0, static_cast<size_t>(bytes));
    return {};
#endif
  }

  DeviceInfo device_;
  void* stream_;
};

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_LAUNCH_H_
