// One kernel class for every op on every device: it checks the inputs, allocates the outputs and
// hands the core its struct. The op's signature says what goes where; the device runs it.
#ifndef CBAM_OPS_TF_FUSED_OP_H_
#define CBAM_OPS_TF_FUSED_OP_H_

#include <type_traits>

#include "absl/status/status.h"
#include "core/contract.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tf/checks.h"
#include "tf/signature.h"
#include "tf/status.h"

namespace cbam_ops {
namespace tf {

// `Device` has a static `Launch(context, problem, args, &status)` for each of the core's argument
// structs, which allocates the workspace and runs; it returns TensorFlow's errors and leaves the
// core's in `status`. Its static `PrepareOutput(data, bytes)` sees every output before that.
template <const auto& kSignature, typename Device>
class FusedOp final : public tensorflow::OpKernel {
 public:
  explicit FusedOp(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadOptions(kSignature, context, &options_));
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    OP_REQUIRES_OK(context, Run(context));
  }

 private:
  using Args = typename std::decay_t<decltype(kSignature)>::Args;

  absl::Status Run(tensorflow::OpKernelContext* context) const {
    Args args;
    // Shape functions do not run before eager ops: everything is checked here.
    Dimensions dimensions(kSignature.op, options_);
    for (const auto& input : kSignature.inputs) {
      if (!Has(kSignature.kind, input.argument.part)) continue;
      tensorflow::OpInputList tensors;
      TF_RETURN_IF_ERROR(context->input_list(input.argument.name, &tensors));
      if (tensors.size() == 0) continue;
      const tensorflow::TensorShape& shape = tensors[0].shape();
      const auto sizes = shape.dim_sizes();
      TF_RETURN_IF_ERROR(dimensions.Learn(input.argument, sizes.data(), shape.dims()));
      if (input.pointer != nullptr) args.*input.pointer = tensors[0].data();
    }
    // An output never takes over an input's buffer: kernels read x after they began to write y, and
    // the gradient reads x again.
    for (const auto& output : kSignature.outputs) {
      if (!Has(kSignature.kind, output.argument.part)) continue;
      tensorflow::OpOutputList tensors;
      TF_RETURN_IF_ERROR(context->output_list(output.argument.name, &tensors));
      if (tensors.size() == 0) continue;
      tensorflow::Tensor* tensor = nullptr;
      TF_RETURN_IF_ERROR(
          tensors.allocate(0, tensorflow::TensorShape(dimensions.Shape(output.argument)), &tensor));
      Device::PrepareOutput(tensor->data(), tensor->TotalBytes());
      args.*output.pointer = tensor->data();
    }
    Status status;
    TF_RETURN_IF_ERROR(Device::Launch(context, dimensions.ToProblem(), args, &status));
    return ToAbslStatus(kSignature.op, status);
  }

  Problem options_;
};

}  // namespace tf
}  // namespace cbam_ops

// Registers the kernels of all ops for a device.
#define CBAM_OPS_REGISTER_KERNELS(device_type, Device)                 \
  CBAM_OPS_REGISTER_KERNEL(Cbam, device_type, Device);                 \
  CBAM_OPS_REGISTER_KERNEL(CbamGrad, device_type, Device);             \
  CBAM_OPS_REGISTER_KERNEL(ChannelAttention, device_type, Device);     \
  CBAM_OPS_REGISTER_KERNEL(ChannelAttentionGrad, device_type, Device); \
  CBAM_OPS_REGISTER_KERNEL(SpatialAttention, device_type, Device);     \
  CBAM_OPS_REGISTER_KERNEL(SpatialAttentionGrad, device_type, Device); \
  CBAM_OPS_REGISTER_KERNEL(ChannelPool, device_type, Device);          \
  CBAM_OPS_REGISTER_KERNEL(ChannelPoolGrad, device_type, Device);      \
  CBAM_OPS_REGISTER_KERNEL(SpatialPool, device_type, Device);          \
  CBAM_OPS_REGISTER_KERNEL(SpatialPoolGrad, device_type, Device)

#define CBAM_OPS_REGISTER_KERNEL(name, device_type, DeviceClass)      \
  REGISTER_KERNEL_BUILDER(Name("CbamOps>" #name).Device(device_type), \
                          ::cbam_ops::tf::FusedOp<::cbam_ops::tf::k##name, DeviceClass>)

#endif  // CBAM_OPS_TF_FUSED_OP_H_
