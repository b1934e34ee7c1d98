// The launchers of gates.h, to be instantiated for a compute type.
#ifndef CBAM_OPS_CORE_CUDA_MAKE_GATES_CUH_
#define CBAM_OPS_CORE_CUDA_MAKE_GATES_CUH_

#include "core/cuda/gates.h"
#include "core/cuda/plan.h"

namespace cbam_ops {
namespace cuda {

template <typename A>
void RunCombine(Launcher* launcher, int64_t samples, bool maximum, const CombineParams<A>& params) {
  launcher->Run("Combine", maximum ? &CombineKernel<A, true> : &CombineKernel<A, false>,
                samples * params.tiles, 2 * kThreads * sizeof(A), params);
}

template <typename A>
void RunMlp(Launcher* launcher, const char* name, void (*kernel)(MlpParams<A>),
            MlpParams<A>* params, bool over_units) {
  params->tiles = over_units ? CeilDiv(params->hidden, kUnits) : CeilDiv(params->channels, kWarp);
  launcher->Run(name, kernel, CeilDiv(params->samples, kSamples) * params->tiles,
                kMlpSharedValues * sizeof(A), *params);
}
template <typename A>
void RunHidden(Launcher* launcher, MlpParams<A> params) {
  RunMlp(launcher, "Hidden", &HiddenKernel<A>, &params, true);
}
template <typename A>
void RunGate(Launcher* launcher, MlpParams<A> params) {
  RunMlp(launcher, "Gate", &GateKernel<A, false>, &params, false);
}
template <typename A>
void RunGateGrad(Launcher* launcher, MlpParams<A> params) {
  RunMlp(launcher, "GateGrad", &GateKernel<A, true>, &params, false);
}
template <typename A>
void RunHiddenGrad(Launcher* launcher, MlpParams<A> params) {
  RunMlp(launcher, "HiddenGrad", &HiddenGradKernel<A>, &params, true);
}
template <typename A>
void RunDescriptorGrad(Launcher* launcher, MlpParams<A> params) {
  RunMlp(launcher, "DescriptorGrad", &DescriptorGradKernel<A>, &params, false);
}
template <typename A>
void RunOuter(Launcher* launcher, const char* name, const OuterParams<A>& params) {
  launcher->Run(name, &OuterKernel<A>, CeilDiv(params.left_size, kUnits) * params.right_tiles,
                (kUnits + 1) * kThreads * sizeof(A), params);
}

template <typename A>
void RunConvolution(Launcher* launcher, int64_t samples, size_t shared_bytes,
                    const ConvolutionParams<A>& params) {
  launcher->Run("Convolution", &ConvolutionKernel<A>, samples * params.tiling.tiles, shared_bytes,
                params);
}
template <typename A>
void RunStatistics(Launcher* launcher, const StatisticsParams<A>& params) {
  launcher->Run("Statistics", &StatisticsKernel<A>, 1, kThreads / kWarp * sizeof(A), params);
}
template <typename A>
void RunNormGrad(Launcher* launcher, int64_t samples, size_t shared_bytes,
                 const SpatialGradParams<A>& params) {
  launcher->Run("NormGrad", &NormGradKernel<A>, samples * params.tiling.tiles, shared_bytes,
                params);
}
template <typename A>
void RunSpatialGrad(Launcher* launcher, int64_t samples, size_t shared_bytes,
                    const SpatialGradParams<A>& params) {
  launcher->Run("SpatialGrad", &SpatialGradKernel<A>, samples * params.tiling.tiles, shared_bytes,
                params);
}

template <typename A>
void RunSum(Launcher* launcher, const A* partial, int64_t outputs, int64_t count, A* out,
            int64_t split_at, A* out_rest) {
  const SumParams<A> params = {partial, count, out, split_at, out_rest};
  launcher->Run("Sum", &SumKernel<A>, outputs, kThreads / kWarp * sizeof(A), params);
}

template <typename A>
struct ZeroParams {
  A* out;
  int64_t count;
};
template <typename A>
CBAM_KERNEL(2)
ZeroKernel(ZeroParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const int64_t i = BlockIndex() * kThreads + ThreadIndex();
  if (i < params.count) params.out[i] = A(0);
}
template <typename A>
void RunZero(Launcher* launcher, A* out, int64_t count) {
  const ZeroParams<A> params = {out, count};
  launcher->Run("Zero", &ZeroKernel<A>, CeilDiv(count, kThreads), 0, params);
}

#define CBAM_INSTANTIATE_GATES(A)                                                           \
  template void RunCombine<A>(Launcher*, int64_t, bool, const CombineParams<A>&);           \
  template void RunHidden<A>(Launcher*, MlpParams<A>);                                      \
  template void RunGate<A>(Launcher*, MlpParams<A>);                                        \
  template void RunGateGrad<A>(Launcher*, MlpParams<A>);                                    \
  template void RunHiddenGrad<A>(Launcher*, MlpParams<A>);                                  \
  template void RunDescriptorGrad<A>(Launcher*, MlpParams<A>);                              \
  template void RunOuter<A>(Launcher*, const char*, const OuterParams<A>&);                 \
  template void RunConvolution<A>(Launcher*, int64_t, size_t, const ConvolutionParams<A>&); \
  template void RunStatistics<A>(Launcher*, const StatisticsParams<A>&);                    \
  template void RunNormGrad<A>(Launcher*, int64_t, size_t, const SpatialGradParams<A>&);    \
  template void RunSpatialGrad<A>(Launcher*, int64_t, size_t, const SpatialGradParams<A>&); \
  template void RunSum<A>(Launcher*, const A*, int64_t, int64_t, A*, int64_t, A*);          \
  template void RunZero<A>(Launcher*, A*, int64_t);

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_MAKE_GATES_CUH_
