// The ops inside XLA on NVIDIA GPUs: the core's kernels, on XLA's stream.
#include "tf/xla/custom_call.h"

#if defined(CBAM_HAVE_CUDA)

#include "absl/status/status.h"
#include "core/contract.h"
#include "core/cuda/kernels.h"
#include "ops/signature.h"
#include "tf/gpu_status.h"
#include "tf/xla/handler.h"

namespace cbam_ops {
namespace tf {
namespace {

// Before anything is enqueued or recorded: says what a launch would say later, and loads the type's
// kernels, which a stream that is being recorded might not allow.
template <const auto& kSignature>
ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary dictionary) {
  AttributeReader attributes(kSignature.op, dictionary);
  ops::Options options;
  const absl::Status status = ReadAttributes(kSignature, &attributes, &options);
  if (!status.ok()) return ToFfiError(status);
  return ToFfiError(gpu::ToAbslStatus(kSignature.op, cuda::LoadKernels(options.problem.dtype)));
}

template <const auto& kSignature>
absl::Status Run(void* stream, const ffi::RemainingArgs& operands,
                 const ffi::RemainingRets& results, const ffi::Dictionary& dictionary) {
  AttributeReader attributes(kSignature.op, dictionary);
  using Args = typename CustomCall<kSignature>::Args;
  CustomCall<kSignature> call;
  absl::Status status = call.Unpack(operands, results, &attributes);
  if (!status.ok()) return status;
  status = attributes.CheckAllRead();
  if (!status.ok()) return status;
  const cuda::StreamDevice device(stream);
  void* workspace = nullptr;
  status = call.Workspace(cuda::WorkspaceBytes<Args>(call.problem), kCudaAlignment, &workspace);
  if (!status.ok()) return status;
  return gpu::ToAbslStatus(kSignature.op, cuda::Run(call.problem, call.args, workspace, stream));
}

template <const auto& kSignature>
ffi::Error Execute(void* stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   ffi::Dictionary attributes) {
  return ToFfiError(Run<kSignature>(stream, operands, results, attributes));
}

template <const auto& kSignature>
bool Register() {
  XLA_FFI_DEFINE_HANDLER(
      initialize, Initialize<kSignature>,
      ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().RemainingArgs().RemainingRets().Attrs());
  // The kernels only enqueue launches: nothing is allocated, waited for or asked of the
  // stream (core/contract.h), which is what recording into a command buffer allows.
  XLA_FFI_DEFINE_HANDLER(
      execute, Execute<kSignature>,
      ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().RemainingArgs().RemainingRets().Attrs(),
      {ffi::Traits::kCmdBufferCompatible});
  return RegisterHandler(kSignature.op, "CUDA", {nullptr, nullptr, initialize, execute});
}

template <const auto&... kSignatures>
bool RegisterAll(ops::OpList<kSignatures...>) {
  return (Register<kSignatures>() && ...);
}

}  // namespace

bool RegisterCudaHandlers() { return RegisterAll(ops::AllOps()); }

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_HAVE_CUDA
