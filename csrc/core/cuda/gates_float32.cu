// The kernels on small tensors of type float.
#include "core/cuda/make_gates.cuh"

namespace cbam_ops {
namespace cuda {

CBAM_INSTANTIATE_GATES(float)

}  // namespace cuda
}  // namespace cbam_ops
