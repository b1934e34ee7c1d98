// Fills a map type's table (table.h).
#ifndef CBAM_OPS_CORE_CUDA_MAKE_TABLE_CUH_
#define CBAM_OPS_CORE_CUDA_MAKE_TABLE_CUH_

#include "core/cuda/cluster_launch.cuh"
#include "core/cuda/table.h"

namespace cbam_ops {
namespace cuda {

template <typename T>
constexpr Table MakeTable() {
  using A = Compute<T>;
  Table table = {};
  table.forward_workspace = [](const Problem& problem) {
    return ForwardBuffers<A>(problem, nullptr).bytes;
  };
  table.backward_workspace = [](const Problem& problem) {
    return AnyBackwardWorkspace<A>(problem);
  };
  table.pool_workspace = [](const Problem& problem, bool over_channels) {
    return PoolBuffers<A>(problem, over_channels, nullptr).bytes;
  };
  table.forward = &AnyForward<T>;
  table.backward = &AnyBackward<T>;
  table.uses_cluster = [](const Problem& problem, bool backward, const DeviceInfo& device,
                          Path path) {
    return ChooseCluster<T>(problem, backward, device, path).cluster > 0;
  };
  table.channel_pool = &PortableChannelPool<T>;
  table.channel_pool_grad = &PortableChannelPoolGrad<T>;
  table.spatial_pool = &PortableSpatialPool<T>;
  table.spatial_pool_grad = &PortableSpatialPoolGrad<T>;
  return table;
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_MAKE_TABLE_CUH_
