// The core's entry points under one name each, told apart by their arguments, for adapters that are
// written once for all ops.
#ifndef CBAM_OPS_TF_ENTRY_POINTS_H_
#define CBAM_OPS_TF_ENTRY_POINTS_H_

#include <cstddef>

#include "core/contract.h"
#include "core/cpu/kernels.h"

#if defined(CBAM_HAVE_CUDA)
#include "core/cuda/kernels.h"
#endif

namespace cbam_ops {
namespace tf {

#define CBAM_OPS_FOR_ENTRY_POINTS(ENTRY_POINT)                            \
  ENTRY_POINT(ForwardArgs, Forward, ForwardWorkspace)                     \
  ENTRY_POINT(BackwardArgs, Backward, BackwardWorkspace)                  \
  ENTRY_POINT(ChannelPoolArgs, ChannelPool, ChannelPoolWorkspace)         \
  ENTRY_POINT(ChannelPoolGradArgs, ChannelPoolGrad, ChannelPoolWorkspace) \
  ENTRY_POINT(SpatialPoolArgs, SpatialPool, SpatialPoolWorkspace)         \
  ENTRY_POINT(SpatialPoolGradArgs, SpatialPoolGrad, SpatialPoolWorkspace)

#define CBAM_OPS_ENTRY_POINT(Args, Function, WorkspaceFunction)                                 \
  inline size_t Workspace(const Problem& problem, const Args&, const cpu::Parallel& parallel) { \
    return cpu::WorkspaceFunction(problem, parallel);                                           \
  }                                                                                             \
  inline Status Call(const Problem& problem, const Args& args, void* workspace,                 \
                     const cpu::Parallel& parallel) {                                           \
    return cpu::Function(problem, args, workspace, parallel);                                   \
  }
CBAM_OPS_FOR_ENTRY_POINTS(CBAM_OPS_ENTRY_POINT)
#undef CBAM_OPS_ENTRY_POINT

#if defined(CBAM_HAVE_CUDA)
namespace gpu {

#define CBAM_OPS_ENTRY_POINT(Args, Function, WorkspaceFunction)                                 \
  inline size_t Workspace(const Problem& problem, const Args&) {                                \
    return cuda::WorkspaceFunction(problem);                                                    \
  }                                                                                             \
  inline Status Call(const Problem& problem, const Args& args, void* workspace, void* stream) { \
    return cuda::Function(problem, args, workspace, stream);                                    \
  }
CBAM_OPS_FOR_ENTRY_POINTS(CBAM_OPS_ENTRY_POINT)
#undef CBAM_OPS_ENTRY_POINT

}  // namespace gpu
#endif

#undef CBAM_OPS_FOR_ENTRY_POINTS

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_ENTRY_POINTS_H_
