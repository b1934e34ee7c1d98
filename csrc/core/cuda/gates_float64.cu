// The kernels on small tensors of type double.
#include "core/cuda/make_gates.cuh"

namespace cbam_ops {
namespace cuda {

CBAM_INSTANTIATE_GATES(double)

}  // namespace cuda
}  // namespace cbam_ops
