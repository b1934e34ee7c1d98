// The ops as gpu_kernels.cc registers them for GPUs, but for CPUs and over kernels that run on a
// CPU (cuda_on_cpu.h): the glue between TensorFlow and the CUDA kernels, executed without a GPU.
// Linked with tf/ops.cc and csrc/ops into an op library that takes the place of the real one.
#include <mutex>

#include "core/contract.h"
#include "ops/signature.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "testing/cuda_on_cpu.h"
#include "tf/fused_op.h"
#include "tf/gpu_device.h"

namespace cbam_ops {
namespace tf {
namespace {

std::mutex& OneAtATime() {
  static std::mutex mutex;
  return mutex;
}

// The runtime of the kernels knows one thread; TensorFlow runs ops on several.
class PretendedStream {
 public:
  explicit PretendedStream(tensorflow::OpKernelContext* /*context*/) : lock_(OneAtATime()) {}
  void* handle() const { return nullptr; }

 private:
  std::lock_guard<std::mutex> lock_;
};

[[maybe_unused]] const bool registered =
    RegisterKernels<GpuDevice<PretendedStream>>(tensorflow::DEVICE_CPU, ops::AllOps());

}  // namespace
}  // namespace tf
}  // namespace cbam_ops

extern "C" __attribute__((visibility("default"))) const char* cbam_take_launched_kernels() {
  const std::lock_guard<std::mutex> lock(cbam_ops::tf::OneAtATime());
  return cbam_ops::cuda_on_cpu::TakeLaunchedKernels();
}
