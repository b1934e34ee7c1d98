// The ops on NVIDIA GPUs: the core's CUDA kernels on a stream, with workspace from TensorFlow.
//
// Plain C++: no CUDA header is seen here, and no TensorFlow header by nvcc. How the stream is got
// is a parameter, so that a test runs the same code over kernels on a CPU
// (testing/cuda_on_cpu_ops.cc).
#ifndef CBAM_OPS_TF_GPU_DEVICE_H_
#define CBAM_OPS_TF_GPU_DEVICE_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "core/contract.h"
#include "core/cuda/kernels.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tf/gpu_status.h"

namespace cbam_ops {
namespace tf {
// `Stream` is made from the op's context, lives as long as the launch, and has a `handle()`: the
// stream of the device that is current meanwhile.
template <typename Stream>
struct GpuDevice {
  // A block may read what another has written by then.
  static constexpr bool kTakesOver = false;

  static void PrepareOutput(void* /*data*/, size_t /*bytes*/) {}

  template <typename Args>
  static absl::Status Launch(tensorflow::OpKernelContext* context, const Problem& problem,
                             const Args& args, Status* status) {
    // The workspace may be freed and given to the next op as soon as this returns: its kernels come
    // later on the same stream. What TensorFlow promises of its alignment is less than the core
    // asks for.
    tensorflow::Tensor tensor;
    void* workspace = nullptr;
    const size_t bytes = cuda::WorkspaceBytes<Args>(problem);
    if (bytes > 0) {
      TF_RETURN_IF_ERROR(context->allocate_temp(
          tensorflow::DT_UINT8,
          tensorflow::TensorShape({static_cast<int64_t>(bytes + kCudaAlignment - 1)}), &tensor));
      const auto address = reinterpret_cast<uintptr_t>(tensor.data());
      workspace =
          reinterpret_cast<void*>((address + kCudaAlignment - 1) / kCudaAlignment * kCudaAlignment);
    }
    const Stream stream(context);
    *status = cuda::Run(problem, args, workspace, stream.handle());
    return gpu::ToAbslStatus(context->op_kernel().type_string().c_str(), *status);
  }
};

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_GPU_DEVICE_H_
