// The ops' kernels for CPUs: the core's, on TensorFlow's intra-op thread pool.
#include <cstddef>
#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "core/contract.h"
#include "core/cpu/kernels.h"
#include "core/cpu/pages.h"
#include "core/cpu/work_sharing.h"
#include "ops/signature.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tf/fused_op.h"

namespace cbam_ops {
namespace tf {
namespace {

struct CpuDevice {
  static constexpr bool kTakesOver = true;
  static void PrepareOutput(void* data, size_t bytes) { cpu::PreferLargePages(data, bytes); }

  template <typename Args>
  static absl::Status Launch(tensorflow::OpKernelContext* context, const Problem& problem,
                             const Args& args, Status* status) {
    const auto* workers = context->device()->tensorflow_cpu_worker_threads();
    tensorflow::thread::ThreadPool* pool = workers->workers;
    cpu::WorkSharing sharing(workers->num_threads, [pool](std::function<void()> work) {
      pool->Schedule(std::move(work));
    });
    const cpu::Parallel parallel = sharing.parallel();
    // TensorFlow's CPU allocator aligns to 64 bytes.
    static_assert(kHostAlignment <= 64);
    tensorflow::Tensor workspace;
    const size_t bytes = cpu::WorkspaceBytes<Args>(problem, parallel);
    if (bytes > 0) {
      TF_RETURN_IF_ERROR(context->allocate_temp(
          tensorflow::DT_UINT8, tensorflow::TensorShape({static_cast<int64_t>(bytes)}),
          &workspace));
    }
    *status = cpu::Run(problem, args, bytes > 0 ? workspace.data() : nullptr, parallel);
    return absl::OkStatus();
  }
};

[[maybe_unused]] const bool registered =
    RegisterKernels<CpuDevice>(tensorflow::DEVICE_CPU, ops::AllOps());

}  // namespace
}  // namespace tf
}  // namespace cbam_ops
