// What the pools on their own add to the passes over maps: their results in the map's type, and the
// gradients of those as sides.
#ifndef CBAM_OPS_CORE_CUDA_POOLS_CUH_
#define CBAM_OPS_CORE_CUDA_POOLS_CUH_

#include "core/cuda/plan.h"
#include "core/cuda/sides.cuh"

namespace cbam_ops {
namespace cuda {

// Calls body(i, index in the results) for a chunk of a sample's results.
template <typename A, typename Body>
CBAM_DEVICE void OverResults(const Call<A>& call, int64_t n, int64_t index, Body body) {
  const int64_t results = call.pool_over_channels ? call.positions : call.channels;
  const int64_t end = Smaller((index + 1) * kChunk, results);
  for (int64_t i = index * kChunk + ThreadIndex(); i < end; i += kThreads)
    body(i, n * call.pool_stride + i * call.pool_step, n * results + i);
}

template <typename T>
CBAM_DEVICE void StorePool(const Call<Compute<T>>& call, int64_t n, int64_t index) {
  using A = Compute<T>;
  OverResults(call, n, index, [&](int64_t i, int64_t at, int64_t) {
    A mean, maximum;
    Fold<true>(call.pool_over_channels ? call.spatial_pass : call.channel_pass, n, i, &mean,
               &maximum);
    FromCompute(mean, static_cast<T*>(call.pool_first) + at);
    FromCompute(maximum, static_cast<T*>(call.pool_second) + at);
  });
}

// The maxima in the compute type.
template <typename T>
CBAM_DEVICE void PoolMaxima(const Call<Compute<T>>& call, int64_t n, int64_t index) {
  OverResults(call, n, index, [&](int64_t, int64_t at, int64_t to) {
    call.pool_maxima[to] = ToCompute(static_cast<const T*>(call.pool_maximum)[at]);
  });
}

template <typename T>
CBAM_DEVICE void PoolSides(const Call<Compute<T>>& call, int64_t n, int64_t index) {
  using A = Compute<T>;
  const bool over_channels = call.pool_over_channels;
  OverResults(call, n, index, [&](int64_t i, int64_t at, int64_t to) {
    A sum, count;
    Fold<false>(over_channels ? call.spatial_pass : call.channel_pass, n, i, &sum, &count);
    StoreSide(over_channels ? call.position_sides : call.channel_sides, n, i,
              MakeSide(A(1), ToCompute(static_cast<const T*>(call.d_pool_first)[at]),
                       static_cast<A>(over_channels ? call.channels : call.positions), true,
                       ToCompute(static_cast<const T*>(call.d_pool_second)[at]), count,
                       call.pool_maxima[to]));
  });
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_POOLS_CUH_
