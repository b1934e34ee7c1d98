// The launchers of each map type, one table per source file: float32.cu and its sisters fill them,
// kernels.cu picks one.
#ifndef CBAM_OPS_CORE_CUDA_TABLE_H_
#define CBAM_OPS_CORE_CUDA_TABLE_H_

#include <cstddef>

#include "core/contract.h"
#include "core/cuda/kernels.h"
#include "core/cuda/launch.h"

namespace cbam_ops {
namespace cuda {

struct Table {
  size_t (*forward_workspace)(const Problem&);
  size_t (*backward_workspace)(const Problem&);
  size_t (*pool_workspace)(const Problem&, bool over_channels);
  Status (*forward)(const Problem&, const ForwardArgs&, void* workspace, Launcher, Path);
  Status (*backward)(const Problem&, const BackwardArgs&, void* workspace, Launcher, Path);
  // Whether the cluster path would be taken.
  bool (*uses_cluster)(const Problem&, bool backward, const DeviceInfo&, Path);
  Status (*channel_pool)(const Problem&, const ChannelPoolArgs&, void* workspace, Launcher);
  Status (*channel_pool_grad)(const Problem&, const ChannelPoolGradArgs&, void* workspace,
                              Launcher);
  Status (*spatial_pool)(const Problem&, const SpatialPoolArgs&, Launcher);
  Status (*spatial_pool_grad)(const Problem&, const SpatialPoolGradArgs&, void* workspace,
                              Launcher);
};

extern const Table kFloat32Table;
extern const Table kFloat16Table;
extern const Table kBFloat16Table;
extern const Table kFloat64Table;

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_TABLE_H_
