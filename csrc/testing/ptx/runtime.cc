// As much of the CUDA runtime as the kernels' host code calls, over the machine: what nvcc compiled
// is linked with this instead of NVIDIA's library. A launch runs at once; its fault is the device
// error of that call, and stays to be asked for.
#include "testing/ptx/runtime.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>

namespace {

using cbam_ops::ptx::Error;

struct Function {
  int module;
  std::string name;
};

std::unordered_map<const void*, Function>& Functions() {
  static auto* const functions = new std::unordered_map<const void*, Function>();
  return *functions;
}

// Runs what may fault.
template <typename F>
cudaError_t Try(const F& body) {
  std::string& failure = cbam_ops::ptx::Failure();
  try {
    body();
    return cudaSuccess;
  } catch (const Error& error) {
    if (failure.empty()) failure = error.what();
    return cudaErrorLaunchFailure;
  }
}

cudaError_t Launch(const void* function, dim3 grid, dim3 block, size_t shared, void** arguments) {
  return Try([&] {
    const Function& its = Functions().at(function);
    cbam_ops::ptx::TheMachine().Launch(its.module, its.name, {grid.x, grid.y, grid.z},
                                       {block.x, block.y, block.z}, static_cast<int64_t>(shared),
                                       arguments);
  });
}

// What a fat binary holds, as `fatbinary` writes it.
struct Wrapper {
  int magic, version;
  const char* data;
  void* more;
};
struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct Entry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
};
constexpr uint16_t kPtx = 1;

}  // namespace

namespace cbam_ops {
namespace ptx {

Machine& TheMachine() {
  static auto* const machine = new Machine();
  return *machine;
}
std::string& Failure() {
  static auto* const failure = new std::string();
  return *failure;
}

}  // namespace ptx
}  // namespace cbam_ops

extern "C" {

// ---- what nvcc's startup code calls -------------------------------------------------------------

void** __cudaRegisterFatBinary(void* binary) {
  const auto* const wrapper = static_cast<const Wrapper*>(binary);
  Header header;
  std::memcpy(&header, wrapper->data, sizeof(header));
  const char* at = wrapper->data + header.header_bytes;
  const char* const end = at + header.bytes;
  while (at < end) {
    Entry entry;
    std::memcpy(&entry, at, sizeof(entry));
    if (entry.kind == kPtx) {
      const std::string text(at + entry.header_bytes, entry.bytes);
      const int module = cbam_ops::ptx::TheMachine().Load(text.substr(0, text.find('\0')));
      return reinterpret_cast<void**>(new int(module));
    }
    at += entry.header_bytes + entry.bytes;
  }
  return nullptr;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** module) { delete reinterpret_cast<int*>(module); }
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  Functions()[host] = {*reinterpret_cast<int*>(module), name};
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  return Launch(reinterpret_cast<const void*>(kernel), grid, block, shared, arguments);
}

// ---- the API ------------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return Launch(function, grid, block, shared, arguments);
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return Try([&] {
    cbam_ops::ptx::TheMachine().Fill(static_cast<char*>(address), value,
                                     static_cast<int64_t>(bytes));
  });
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) { return cudaGetDevice(device); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = cbam_ops::ptx::TheMachine().configuration.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 * 1024;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "a fault of a kernel"; }

}  // extern "C"
