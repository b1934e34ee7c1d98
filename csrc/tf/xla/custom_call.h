// What the two ends of a custom call agree on: the lowering that emits it (lowering.cc) and the
// handlers that run it (host_handlers.cc, cuda_handlers.cc).
//
// A custom call is named like its op. Its operands are the op's inputs, its results the op's
// outputs and then scratch memory, all in the order of ops/signature.h and with row-major layouts;
// lists are flattened. The scratch memory is longer than the workspace by the alignment less one
// byte, and the workspace starts at the first multiple: XLA's own buffers are aligned well enough
// (xla::cpu::Align, gpu::kXlaAllocatedBufferAlignBytes), but its interface does not promise it. Its
// attributes are those that ReadAttributes reads, T and U as the numbers of tensorflow::DataType,
// and on the host kThreads.
#ifndef CBAM_OPS_TF_XLA_CUSTOM_CALL_H_
#define CBAM_OPS_TF_XLA_CUSTOM_CALL_H_

namespace cbam_ops {
namespace tf {

// How many threads the scratch memory was sized for, which is fixed when the call is compiled: the
// handler plans with as many, whatever pool it then gets.
inline constexpr char kThreads[] = "threads";

// Register the handlers of all ops; false where XLA refused one.
bool RegisterHostHandlers();
#if defined(CBAM_HAVE_CUDA)
bool RegisterCudaHandlers();
#endif

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_XLA_CUSTOM_CALL_H_
