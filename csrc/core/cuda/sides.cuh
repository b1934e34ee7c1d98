// Small things that the items share: what a gradient gives to a row or a column, folds of
// reductions, sums over a block.
#ifndef CBAM_OPS_CORE_CUDA_SIDES_CUH_
#define CBAM_OPS_CORE_CUDA_SIDES_CUH_

#include "core/cuda/call.h"
#include "core/cuda/device.cuh"

namespace cbam_ops {
namespace cuda {

// What the gradient needs to know of a position or a channel: its gate, what an element gets, what
// each of those that equal the maximum gets instead, and that maximum.
template <typename A>
struct alignas(4 * sizeof(A)) Side {
  A gate;
  A share;
  A maximum_share;
  A maximum;
};

template <typename A>
CBAM_DEVICE A Select(bool first, A one, A other) {
  return first ? one : other;
}
template <typename A>
CBAM_DEVICE Side<A> Select(bool first, const Side<A>& one, const Side<A>& other) {
  return {Select(first, one.gate, other.gate), Select(first, one.share, other.share),
          Select(first, one.maximum_share, other.maximum_share),
          Select(first, one.maximum, other.maximum)};
}

// The neutral side: gate 1, no shares, equal to nothing.
template <typename A>
CBAM_DEVICE Side<A> NeutralSide() {
  return {A(1), A(0), A(0), NotANumber<A>()};
}

// The share of each of `count` equal maxima. Without any (the maximum is NaN) everything becomes
// NaN, as in TensorFlow: by way of the share that all get then.
template <typename A>
CBAM_DEVICE Side<A> MakeSide(A gate, A d_mean, A size, bool has_max, A d_max, A count, A maximum) {
  Side<A> side = {gate, d_mean / size, A(0), NotANumber<A>()};
  if (has_max) {
    side.maximum = maximum;
    side.maximum_share = side.share + d_max / count;
    if (!(count > A(0))) side.share = NotANumber<A>();
  }
  return side;
}

// Rows are read one at a time, columns in vectors: maps.cuh.
template <typename A>
CBAM_DEVICE void StoreSide(const Sides<A>& sides, int64_t n, int64_t i, const Side<A>& side) {
  if (sides.together) {
    reinterpret_cast<Side<A>*>(sides.data)[n * sides.size + i] = side;
  } else {
    A* const data = sides.data + n * 4 * sides.stride;
    CBAM_NO_UNROLL
    for (int64_t at = i; at < sides.stride; at += sides.size) {
      data[at] = side.gate;
      data[at + sides.stride] = side.share;
      data[at + 2 * sides.stride] = side.maximum_share;
      data[at + 3 * sides.stride] = side.maximum;
    }
  }
}

// A result from its slices, in order; kMaximum: of a pool.
template <bool kMaximum, typename A>
CBAM_DEVICE void Fold(const Reduced<A>& reduced, int64_t n, int64_t i, A* first, A* second) {
  int64_t at = n * reduced.sample_stride + i;
  A sum = reduced.first[at], other = reduced.second[at];
  CBAM_UNROLL_4
  for (int slice = 1; slice < reduced.slices; ++slice) {
    at += reduced.results;
    sum += reduced.first[at];
    const A value = reduced.second[at];
    other = kMaximum ? Maximum(other, value) : other + value;
  }
  *first = sum / reduced.divisor;
  *second = other;
}

// Stores what a slice gives for a result.
template <typename A>
CBAM_DEVICE void StoreSlice(const Reduced<A>& to, int64_t n, int64_t slice, int64_t i, A first,
                            A second) {
  const int64_t at = n * to.sample_stride + slice * to.results + i;
  to.first[at] = first;
  to.second[at] = second;
}

// What the threads of an item sum up; every one gets the result. `shared` holds kThreads / kWarp
// values.
template <typename A>
CBAM_DEVICE A BlockSum(A value, A* shared) {
  value = SumOverWarp(value);
  Barrier();  // the last call's readers are done
  if (ThreadIndex() % kWarp == 0) shared[ThreadIndex() / kWarp] = value;
  Barrier();
  A sum = A(0);
  for (int w = 0; w < kThreads / kWarp; ++w) sum += shared[w];
  return sum;
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_SIDES_CUH_
