// The CUDA kernels' real host code, as nvcc compiled it, over a recorder in the place of the CUDA
// runtime: what a call asks of a GPU, without one. To be linked with --wrap for each function here
// (tests/test_cuda_host.py). Registering kernels needs no driver.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "core/cuda/kernels.h"
#include "python/device_pointers.h"

namespace {

namespace py = pybind11;

std::mutex mutex;                // NOLINT: of all that follows
std::string records;             // NOLINT: what was asked, separated by spaces
std::set<const void*> loaded;    // NOLINT: kernels
std::set<const void*> launched;  // NOLINT
int current_device = 0;          // NOLINT
int stream_device = 0;           // NOLINT: of every stream
std::string failing;             // NOLINT: the function that fails

cudaError_t Record(const std::string& function, const std::string& details = "") {
  const std::lock_guard<std::mutex> lock(mutex);
  records += (records.empty() ? "" : " ") + function + details;
  return function == failing ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t __wrap_cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t __wrap_cudaSetDevice(int device) {
  current_device = device;
  return Record("device", ":" + std::to_string(device));
}
cudaError_t __wrap_cudaStreamGetDevice(cudaStream_t, int* device) {
  *device = stream_device;
  return cudaSuccess;
}
cudaError_t __wrap_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor             ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor           ? 0
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 * 1024
                                                                      : 132;
  return Record("query");
}
cudaError_t __wrap_cudaGetLastError() { return cudaSuccess; }
cudaError_t __wrap_cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  return Record("attribute", ":" + std::to_string(attribute) + ":" + std::to_string(value));
}
cudaError_t __wrap_cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  const cudaError_t error = Record("load");
  const std::lock_guard<std::mutex> lock(mutex);
  loaded.insert(kernel);
  return error;
}
cudaError_t __wrap_cudaMemsetAsync(void*, int, size_t bytes, cudaStream_t) {
  return Record("memset", ":" + std::to_string(bytes));
}
cudaError_t __wrap_cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** /*arguments*/,
                                    size_t shared, cudaStream_t) {
  const cudaError_t error =
      Record("launch", ":" + std::to_string(grid.x) + ":" + std::to_string(block.x) + ":" +
                           std::to_string(shared));
  const std::lock_guard<std::mutex> lock(mutex);
  launched.insert(kernel);
  return error;
}
cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return Record("launch-with-attributes");
}

}  // extern "C"

PYBIND11_MODULE(cuda_recorder, module) {
  cbam_ops::python::DefineCuda(&module);
  module.def("take_records", [] {
    const std::lock_guard<std::mutex> lock(mutex);
    return std::exchange(records, "");
  });
  module.def("set_devices", [](int current, int of_streams) {
    current_device = current;
    stream_device = of_streams;
  });
  module.def("fail", [](const std::string& function) { failing = function; });
  module.def("load_float32",
             [] { return cbam_ops::cuda::LoadKernels(cbam_ops::DataType::kFloat32).ok(); });
  module.def("loaded", [] { return loaded.size(); });
  module.def("launched_but_not_loaded", [] {
    size_t count = 0;
    for (const void* kernel : launched) count += 1 - loaded.count(kernel);
    return count;
  });
  // Whether the current device is the stream's while a StreamDevice lives, and what it was after.
  module.def("stream_device", [](uintptr_t stream) {
    int inside = -1;
    {
      const cbam_ops::cuda::StreamDevice device(reinterpret_cast<void*>(stream));
      inside = current_device;
    }
    return std::make_pair(inside, current_device);
  });
}
