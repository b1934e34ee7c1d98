// Registers kernels without REGISTER_KERNEL_BUILDER, whose names and classes must be written out.
#ifndef CBAM_OPS_TF_KERNEL_REGISTRATION_H_
#define CBAM_OPS_TF_KERNEL_REGISTRATION_H_

#include "tensorflow/core/framework/kernel_def_builder.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace cbam_ops {
namespace tf {

template <typename Kernel>
void RegisterKernel(const char* op, const char* device_type) {
  tensorflow::kernel_factory::OpKernelRegistrar(
      tensorflow::KernelDefBuilder(op).Device(device_type).Build(), op,
      [](tensorflow::OpKernelConstruction* context) -> tensorflow::OpKernel* {
        return new Kernel(context);
      });
}

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_KERNEL_REGISTRATION_H_
