// One kernel class for every op on every device: it checks the inputs, allocates the outputs and
// hands the core its struct. The op's signature says what goes where; the device runs it.
#ifndef CBAM_OPS_TF_FUSED_OP_H_
#define CBAM_OPS_TF_FUSED_OP_H_

#include <type_traits>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "core/contract.h"
#include "ops/dimensions.h"
#include "ops/options.h"
#include "ops/signature.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tf/attributes.h"
#include "tf/kernel_registration.h"
#include "tf/status.h"

namespace cbam_ops {
namespace tf {

// `Device` has a static `Launch(context, problem, args, &status)` for each of the core's argument
// structs, which allocates the workspace and runs; it returns TensorFlow's errors and leaves the
// core's in `status`. Its static `PrepareOutput(data, bytes)` sees every new output before that;
// `kTakesOver` says whether an output may lie where an input was that nobody else needs.
template <const auto& kSignature, typename Device>
class FusedOp final : public tensorflow::OpKernel {
 public:
  explicit FusedOp(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(kSignature, context, &options_));
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    OP_REQUIRES_OK(context, Run(context));
  }

 private:
  using Args = typename std::decay_t<decltype(kSignature)>::Args;

  absl::Status Run(tensorflow::OpKernelContext* context) const {
    Args args;
    // Shape functions do not run before eager ops: everything is checked here.
    ops::Dimensions dimensions(options_.problem);
    for (const auto& input : kSignature.inputs) {
      if (!ops::IsPresent(input.argument, options_)) continue;
      const tensorflow::Tensor* tensor = nullptr;
      TF_RETURN_IF_ERROR(context->input(input.argument.name, &tensor));
      const tensorflow::TensorShape& shape = tensor->shape();
      TF_RETURN_IF_ERROR(ToAbslStatus(
          kSignature.op, dimensions.Learn(input.argument, shape.dim_sizes().data(), shape.dims())));
      if (input.pointer != nullptr) args.*input.pointer = tensor->data();
    }
    // Of the inputs that an output may take over TensorFlow gives one that nothing else refers to: x
    // is not such where the gradient reads it again.
    for (const auto& output : kSignature.outputs) {
      if (!ops::IsPresent(output.argument, options_)) continue;
      int index = 0, index_end = 0, taken = -1;
      TF_RETURN_IF_ERROR(OutputRange(output.argument.name, &index, &index_end));
      absl::InlinedVector<int, ops::kMostTakenOver> inputs;
      for (const char* name : output.takes_over) {
        if (!Device::kTakesOver || name == nullptr) continue;
        int input = 0, end = 0;
        TF_RETURN_IF_ERROR(InputRange(name, &input, &end));
        if (input < end) inputs.push_back(input);  // a list may be empty
      }
      tensorflow::Tensor* tensor = nullptr;
      TF_RETURN_IF_ERROR(context->forward_input_or_allocate_output(
          inputs, index, tensorflow::TensorShape(dimensions.ShapeOf(output.argument)), &tensor,
          &taken));
      if (taken < 0) Device::PrepareOutput(tensor->data(), tensor->TotalBytes());
      args.*output.pointer = tensor->data();
    }
    Status status;
    TF_RETURN_IF_ERROR(Device::Launch(context, dimensions.ToProblem(), args, &status));
    return ToAbslStatus(kSignature.op, status);
  }

  ops::Options options_;
};

// Registers the kernels of all ops for a device.
template <typename Device, const auto&... kSignatures>
bool RegisterKernels(const char* device_type, ops::OpList<kSignatures...>) {
  (RegisterKernel<FusedOp<kSignatures, Device>>(kSignatures.op, device_type), ...);
  return true;
}

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_FUSED_OP_H_
