// The launchers of each map type, one table per source file: float32.cu and its sisters fill them,
// kernels.cu picks one.
#ifndef CBAM_OPS_CORE_CUDA_TABLE_H_
#define CBAM_OPS_CORE_CUDA_TABLE_H_

#include <cstddef>

#include "core/contract.h"
#include "core/cuda/launch.h"
#include "core/cuda/schedule.h"

namespace cbam_ops {
namespace cuda {

template <typename Args>
struct EntryPoints {
  size_t (*workspace_bytes)(const Problem&);
  Status (*run)(const Problem&, const Args&, void* workspace, const Launcher&);
  // The order of the items of a call with maps in vectors, for tests.
  Schedule (*order)(const Problem&, int64_t blocks);
};

struct Table {
#define CBAM_OPS_ENTRY_POINTS(Args) \
  EntryPoints<Args> for_##Args;     \
  const EntryPoints<Args>& For(const Args&) const { return for_##Args; }
  CBAM_OPS_FOR_EACH_ARGS(CBAM_OPS_ENTRY_POINTS)
#undef CBAM_OPS_ENTRY_POINTS
  // Loads all kernels of the type onto the current device.
  Status (*load)();
};

extern const Table kFloat32Table;
extern const Table kFloat16Table;
extern const Table kBFloat16Table;
extern const Table kFloat64Table;

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_TABLE_H_
