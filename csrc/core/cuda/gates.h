// Launchers of the kernels that work on small tensors of the compute type. Apart from the maps'
// launchers, so that they are compiled for float and double only (gates_float32.cu,
// gates_float64.cu) and not again for each half type.
#ifndef CBAM_OPS_CORE_CUDA_GATES_H_
#define CBAM_OPS_CORE_CUDA_GATES_H_

#include "core/cuda/gate_mlp.cuh"
#include "core/cuda/launch.h"
#include "core/cuda/reduce.cuh"
#include "core/cuda/spatial.cuh"

namespace cbam_ops {
namespace cuda {

template <typename A>
void RunCombine(Launcher* launcher, int64_t samples, bool maximum, const CombineParams<A>& params);

template <typename A>
void RunHidden(Launcher* launcher, MlpParams<A> params);
template <typename A>
void RunGate(Launcher* launcher, MlpParams<A> params);
template <typename A>
void RunGateGrad(Launcher* launcher, MlpParams<A> params);
template <typename A>
void RunHiddenGrad(Launcher* launcher, MlpParams<A> params);
template <typename A>
void RunDescriptorGrad(Launcher* launcher, MlpParams<A> params);
template <typename A>
void RunOuter(Launcher* launcher, const char* name, const OuterParams<A>& params);

// `shared_bytes` as the tiling was planned.
template <typename A>
void RunConvolution(Launcher* launcher, int64_t samples, size_t shared_bytes,
                    const ConvolutionParams<A>& params);
template <typename A>
void RunStatistics(Launcher* launcher, const StatisticsParams<A>& params);
template <typename A>
void RunNormGrad(Launcher* launcher, int64_t samples, size_t shared_bytes,
                 const SpatialGradParams<A>& params);
template <typename A>
void RunSpatialGrad(Launcher* launcher, int64_t samples, size_t shared_bytes,
                    const SpatialGradParams<A>& params);

// out[i] = sum of partial[i, :] for i < split_at, the rest to out_rest.
template <typename A>
void RunSum(Launcher* launcher, const A* partial, int64_t outputs, int64_t count, A* out,
            int64_t split_at, A* out_rest);
// A descriptor that `pooling` leaves out is 0.
template <typename A>
void RunZero(Launcher* launcher, A* out, int64_t count);

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_GATES_H_
