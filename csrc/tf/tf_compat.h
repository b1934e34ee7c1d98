// Where the TensorFlows that this compiles against (2.18 to 2.21) and their wheels differ, by what
// their headers have. To be included before XLA's headers. That 2.18 and 2.19 lack those of XLA's
// custom calls is FindPipTensorFlow.cmake's business.
#ifndef CBAM_OPS_TF_TF_COMPAT_H_
#define CBAM_OPS_TF_TF_COMPAT_H_

#include <memory>

#if __has_include("xla/stream_executor/gpu/tma_metadata.h") && !__has_include("xla/ffi/api/ffi.h")
// 2.19: that header needs LLVM's, which no wheel has. Its one user is a virtual function that
// nobody here calls.
#define XLA_STREAM_EXECUTOR_GPU_TMA_METADATA_H_
namespace stream_executor::gpu {
class TmaDescriptor {};
}  // namespace stream_executor::gpu
#endif

#if __has_include("xla/stream_executor/activate_context.h")
#include "xla/stream_executor/activate_context.h"
#else
#include "xla/stream_executor/gpu/scoped_activate_context.h"  // 2.18
#endif

// What XLA_FFI_GetApi returns; the wheels for aarch64 export this one only. Its header brings half
// of XLA.
struct XLA_FFI_Api;
namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace cbam_ops {
namespace tf {

// Makes a StreamExecutor's device the current one of the thread, as long as it lives.
class ActiveDevice {
 public:
#if __has_include("xla/stream_executor/activate_context.h")
  template <typename Executor>
  explicit ActiveDevice(Executor* executor) : activation_(executor->Activate()) {}

 private:
  std::unique_ptr<stream_executor::ActivateContext> activation_;
#else
  template <typename Executor>
  explicit ActiveDevice(Executor* executor) : activation_(executor) {}

 private:
  stream_executor::gpu::ScopedActivateContext activation_;
#endif
};

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_TF_COMPAT_H_
