// The kernels for float32 maps.
#include "core/cuda/make_table.cuh"

namespace cbam_ops {
namespace cuda {

const Table kFloat32Table = MakeTable<float>();

}  // namespace cuda
}  // namespace cbam_ops
