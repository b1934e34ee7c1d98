// The kernels for bfloat16 maps.
#include "core/cuda/make_table.cuh"

namespace cbam_ops {
namespace cuda {

const Table kBFloat16Table = MakeTable<BFloat16>();

}  // namespace cuda
}  // namespace cbam_ops
