// What the pipeline asks of an instruction set: passes over a tile of one sample, and the small
// dense work on gates.
//
// One picture serves both layouts. A sample is a matrix, positions x channels; NHWC makes the
// channels contiguous, NCHW the positions. A pass reduces along the contiguous axis or across it,
// so the channel pool of one layout is the spatial pool of the other with the roles swapped, and
// every pass is written once (see level.cc).
//
// No pass allocates or splits work; the pipeline does. Plain structs and pointers only: the
// implementations are compiled for processors this file's reader may not have.
#ifndef CBAM_OPS_CORE_CPU_PASSES_H_
#define CBAM_OPS_CORE_CPU_PASSES_H_

#include <cstdint>

#include "core/contract.h"

namespace cbam_ops {
namespace cpu {

// One sample. Tiles are ranges of positions [begin, end), and for the channel pool of channels.
struct Sample {
  Layout layout;
  int64_t positions;
  int64_t channels;
  bool from_memory;  // its batch is more than second-level caches hold
};

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// Values per position and per channel that the passes need. Pointers are to the first position of
// the tile and the first channel of the sample.
template <typename A>
struct PositionValues {
  const A* gate;     // g_s
  const A* d_mean;   // da_s / C: what every channel gets
  const A* maximum;  // max over channels of the spatial descriptors' source
  const A* d_max;    // dm_s / number of channels that attain it
};
template <typename A>
struct ChannelValues {
  const A* gate;     // g_c
  const A* d_mean;   // da / P
  const A* maximum;  // max over positions of x
  const A* d_max;    // dm / number of positions that attain it
};

// Passes over maps of one type, T; A is the compute type. `x`, `dy`, `y`... point at the sample's
// first element.
template <typename A>
struct MapPasses {
  // sum[c - channels.begin], divided by `divisor`, and maximum[...] over a range of positions.
  void (*channel_pool)(const Sample&, const void* x, Range positions, Range channels, A divisor,
                       A* sum, A* maximum);

  // mean[p - begin] and maximum[...] over channels of x, or of x * gate where gate is given.
  void (*spatial_pool)(const Sample&, const void* x, const A* gate, Range positions, A* mean,
                       A* maximum);

  // y = activation(x * channel_gate * position_gate + residual); each of the three may be null.
  // position_gate is the tile's. `stream` stores past the caches.
  void (*apply)(const Sample&, const void* x, const A* channel_gate, const A* position_gate,
                const void* residual, Activation activation, Range positions, bool stream, void* y);

  // Pass A. dot[p] = sum_c dy * x * gate; count[p] = how many channels attain maximum[p] (of x in
  // the parallel module, else of x * gate). With dy null only the count. gate may be null (1).
  void (*backward_positions)(const Sample&, Module, const void* x, const void* dy, const A* gate,
                             const A* maximum, Range positions, A* dot, A* count);

  // Pass B. dot[c] = sum_p (gradient that reaches x * gate) * x; count[c] = how many positions
  // attain the channel's maximum. Of the channel pool only the count.
  void (*backward_channels)(const Sample&, Module, const void* x, const void* dy,
                            const PositionValues<A>&, const ChannelValues<A>&, Range positions,
                            A* dot, A* count);

  // Pass C. dx.
  void (*backward_map)(const Sample&, Module, const void* x, const void* dy,
                       const PositionValues<A>&, const ChannelValues<A>&, Range positions,
                       bool stream, void* dx);

  // masked = dy * (y > 0), over the tile.
  void (*mask)(const Sample&, const void* dy, const void* y, Range positions, void* masked);

  // Conversions of small tensors between T and A; element i of the T side is at i * stride.
  void (*to_map_type)(const A* in, int64_t count, void* out, int64_t stride);
  void (*to_compute_type)(const void* in, int64_t stride, int64_t count, A* out);
};

// A dense product, all row-major: out[i, j] = sum_k a[i, k] * b[k mod b_rows, j].
template <typename A>
struct Product {
  int64_t rows, columns, inner;
  const A* a;
  int64_t a_row_stride, a_inner_stride;
  const A* b;
  int64_t b_rows, b_stride;
  const A* bias;  // [columns] or null, added once
  Activation activation;
  A* out;
  int64_t out_stride;
};

// The product with the transpose of b: out[i, j] = sum_k a[i, k] * b[j, k].
template <typename A>
struct DotProducts {
  int64_t rows, columns, inner;
  const A* a;
  int64_t a_stride;
  const A* b;
  int64_t b_stride;
  A* out;
  int64_t out_stride;
};

// A plane of `rows` x `width` with `pad` zeros around it; rows are `stride` elements apart.
template <typename A>
struct Plane {
  A* data;  // the element (0, 0), behind the padding
  int64_t stride;
};

// A convolution kernel [depth, height, width, 2], and how far from its middle a tap may be and
// still touch the map: those beyond meet nothing but padding and are left out. The planes of a
// volume have its slices one below the other, `slice_stride` rows apart.
template <typename A>
struct Taps {
  const A* kernel;
  int64_t depth, height, width;
  int64_t half_slices, half_rows, half_columns;
  int64_t slice_stride;

  // Of the whole kernel.
  int64_t size() const { return depth * height * width * 2; }
  // Where the weights of both planes at slice d, row i and column j from the middle are.
  int64_t IndexOf(int64_t d, int64_t i, int64_t j) const {
    return (((d + depth / 2) * height + i + height / 2) * width + j + width / 2) * 2;
  }
};

// Slices of rows whose first rows are `stride` rows of a plane apart.
struct Slices {
  int64_t count, rows, stride;
};

template <typename A>
struct DensePasses {
  // Planes are padded so that reading a whole vector from any element of a row stays inside.
  int64_t lanes;

  void (*product)(const Product<A>&);
  void (*dot_products)(const DotProducts<A>&);
  void (*sigmoid)(const A* in, int64_t count, A* out);
  // out[i] = sigmoid'(in[i]), to the last places however near to 1 the sigmoid is.
  void (*sigmoid_derivative)(const A* in, int64_t count, A* out);

  // out[r, w] = bias + sum over planes q and taps (i, j) of weight_q(i, j) *
  // plane_q[row + r + i, w + j], here as below of every slice that the kernel has.
  void (*convolve_rows)(const Plane<A>* planes, int64_t row, int64_t rows, int64_t width,
                        const Taps<A>&, A bias, A* out);
  // The transposed convolution: out_q[r, w] = sum over taps of weight_q(i, j) *
  // plane[row + r - i, w - j].
  void (*convolve_rows_transposed)(const Plane<A>& plane, int64_t row, int64_t rows, int64_t width,
                                   const Taps<A>&, A* out_mean, A* out_max);
  // dtaps[i, j, q] = sum over rows and w of dz[row, w] * plane_q[row + i, w + j], for the taps of
  // one slice from -half_rows and -half_columns on.
  void (*convolution_kernel_gradient)(const Plane<A>* planes, const Plane<A>& dz, const Slices&,
                                      int64_t width, int64_t half_rows, int64_t half_columns,
                                      A* dtaps);
};

// The tables of each instruction set that was compiled.
#define CBAM_DECLARE_LEVEL(level)                 \
  namespace level {                               \
  extern const MapPasses<float> kMapFloat32;      \
  extern const MapPasses<float> kMapFloat16;      \
  extern const MapPasses<float> kMapBFloat16;     \
  extern const MapPasses<double> kMapFloat64;     \
  extern const DensePasses<float> kDenseFloat32;  \
  extern const DensePasses<double> kDenseFloat64; \
  }
CBAM_DECLARE_LEVEL(baseline)
CBAM_DECLARE_LEVEL(avx2)
CBAM_DECLARE_LEVEL(avx512)
#undef CBAM_DECLARE_LEVEL

}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_PASSES_H_
