// The ops' kernels for NVIDIA GPUs: the core's, on TensorFlow's own stream. Compiled where the core
// has CUDA kernels.
#include "ops/signature.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tf/fused_op.h"
#include "tf/gpu_device.h"
#include "tf/tf_compat.h"
#include "xla/stream_executor/stream.h"
#include "xla/stream_executor/stream_executor.h"

namespace cbam_ops {
namespace tf {
namespace {

// The stream on which TensorFlow runs this device's ops, in the order it enqueues them. Nothing
// else will do: it does not wait for the default stream, nor the default stream for it.
//
// Its device is made current for the launch. TensorFlow does that too before it calls Compute, but
// says so nowhere; what is current already costs a comparison to activate. The CUDA runtime linked
// into the core takes over the driver's current context, whoever made it.
class TensorFlowStream {
 public:
  explicit TensorFlowStream(tensorflow::OpKernelContext* context)
      : stream_(context->op_device_context()->stream()), device_(stream_->parent()) {}

  void* handle() const { return stream_->platform_specific_handle().stream; }

 private:
  stream_executor::Stream* stream_;
  ActiveDevice device_;
};

[[maybe_unused]] const bool registered_on_gpus =
    RegisterKernels<GpuDevice<TensorFlowStream>>(tensorflow::DEVICE_GPU, ops::AllOps());

}  // namespace
}  // namespace tf
}  // namespace cbam_ops
