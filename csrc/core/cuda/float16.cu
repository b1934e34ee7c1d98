// The kernels for float16 maps.
#include "core/cuda/make_table.cuh"

namespace cbam_ops {
namespace cuda {

const Table kFloat16Table = MakeTable<Half>();

}  // namespace cuda
}  // namespace cbam_ops
