// The kernels for float64 maps.
#include "core/cuda/make_table.cuh"

namespace cbam_ops {
namespace cuda {

const Table kFloat64Table = MakeTable<double>();

}  // namespace cuda
}  // namespace cbam_ops
