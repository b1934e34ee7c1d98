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
#include "absl/strings/str_cat.h"
#include "core/contract.h"
#include "core/cuda/kernels.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace cbam_ops {
namespace tf {
namespace gpu {

// The core's entry points under one name, told apart by their arguments.
#define CBAM_OPS_ENTRY_POINT(Args, Function, WorkspaceFunction)                                 \
  inline size_t Workspace(const Problem& problem, const Args&) {                                \
    return cuda::WorkspaceFunction(problem);                                                    \
  }                                                                                             \
  inline Status Call(const Problem& problem, const Args& args, void* workspace, void* stream) { \
    return cuda::Function(problem, args, workspace, stream);                                    \
  }
CBAM_OPS_ENTRY_POINT(ForwardArgs, Forward, ForwardWorkspace)
CBAM_OPS_ENTRY_POINT(BackwardArgs, Backward, BackwardWorkspace)
CBAM_OPS_ENTRY_POINT(ChannelPoolArgs, ChannelPool, ChannelPoolWorkspace)
CBAM_OPS_ENTRY_POINT(ChannelPoolGradArgs, ChannelPoolGrad, ChannelPoolWorkspace)
CBAM_OPS_ENTRY_POINT(SpatialPoolArgs, SpatialPool, SpatialPoolWorkspace)
CBAM_OPS_ENTRY_POINT(SpatialPoolGradArgs, SpatialPoolGrad, SpatialPoolWorkspace)
#undef CBAM_OPS_ENTRY_POINT

}  // namespace gpu

// `Stream` is made from the op's context, lives as long as the launch, and has a `handle()`: the
// stream of the device that is current meanwhile.
template <typename Stream>
struct GpuDevice {
  static void PrepareOutput(void* /*data*/, size_t /*bytes*/) {}

  template <typename Args>
  static absl::Status Launch(tensorflow::OpKernelContext* context, const Problem& problem,
                             const Args& args, Status* status) {
    // The workspace may be freed and given to the next op as soon as this returns: its kernels come
    // later on the same stream. What TensorFlow promises of its alignment is less than the core
    // asks for.
    constexpr size_t kAlignment = 256;
    tensorflow::Tensor tensor;
    void* workspace = nullptr;
    const size_t bytes = gpu::Workspace(problem, args);
    if (bytes > 0) {
      TF_RETURN_IF_ERROR(context->allocate_temp(
          tensorflow::DT_UINT8,
          tensorflow::TensorShape({static_cast<int64_t>(bytes + kAlignment - 1)}), &tensor));
      const auto address = reinterpret_cast<uintptr_t>(tensor.data());
      workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    }
    const Stream stream(context);
    *status = gpu::Call(problem, args, workspace, stream.handle());
    if (status->code == StatusCode::kUnsupported) {
      char reason[cuda::kWhyNotBytes];
      cuda::WhyNot(/*capability=*/0, reason, sizeof(reason));
      if (*reason != '\0') {
        return absl::UnimplementedError(
            absl::StrCat(context->op_kernel().type_string(), ": ", reason));
      }
    }
    return absl::OkStatus();
  }
};

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_GPU_DEVICE_H_
