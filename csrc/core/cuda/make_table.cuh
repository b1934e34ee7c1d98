// Fills a map type's table (table.h).
#ifndef CBAM_OPS_CORE_CUDA_MAKE_TABLE_CUH_
#define CBAM_OPS_CORE_CUDA_MAKE_TABLE_CUH_

#include "core/cuda/cluster_launch.cuh"
#include "core/cuda/table.h"

namespace cbam_ops {
namespace cuda {

template <typename T>
constexpr Table MakeTable() {
  Table table = {};
#define CBAM_OPS_FILL(Args)                                                             \
  table.for_##Args = {                                                                  \
      [](const Problem& problem) { return WorkspaceFor<Compute<T>>(problem, Args()); }, \
      &Launch<T>};
  CBAM_OPS_FOR_EACH_ARGS(CBAM_OPS_FILL)
#undef CBAM_OPS_FILL
  table.uses_cluster = [](const Problem& problem, bool backward, const DeviceInfo& device,
                          Path path) {
    return ChooseCluster<T>(problem, backward, device, path).cluster > 0;
  };
  return table;
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_MAKE_TABLE_CUH_
