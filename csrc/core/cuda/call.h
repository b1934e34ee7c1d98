// What a kernel is told: the one parameter of every launch. Filled by plan.h.
#ifndef CBAM_OPS_CORE_CUDA_CALL_H_
#define CBAM_OPS_CORE_CUDA_CALL_H_

#include <cstdint>

#include "core/cuda/schedule.h"

namespace cbam_ops {
namespace cuda {

// How a pass cuts a sample, a matrix of rows and columns, into tiles: whole ones but at the ends.
struct Tiles {
  int lane_bits;
  uint32_t rows;
  uint32_t columns;
  uint32_t across;  // tiles side by side
  uint32_t down;    // tiles one above the other

  // Neighbouring threads along the columns: a power of 2, so that nothing is divided by it.
  CBAM_HOST_DEVICE int lanes() const { return 1 << lane_bits; }
  int64_t count() const { return int64_t{across} * down; }
};

// How the positions of a sample are cut into patches for the convolution.
struct Patches {
  int rows;
  int columns;
  uint32_t across;
  uint32_t down;  // in a slice
  int64_t count;  // in all slices
  bool staged;    // windows and kernel fit shared memory
};

// Two reductions per sample and result: a sum beside a maximum, or two sums. What is in slices is
// yet to be folded.
template <typename A>
struct Reduced {
  A* first;
  A* second;
  int64_t results;  // per sample
  int slices;
  int64_t sample_stride;
  A divisor;  // of the first, when folded
};

// The shares of a gradient that go with the rows or the columns of a sample: see Side in sides.cuh.
template <typename A>
struct Sides {
  A* data;  // null: neutral
  int64_t size;
  bool together;   // rows: the four values of one side lie together; columns: each in an array
  int64_t stride;  // of those: of one or more copies, where vectors lie differently in channels
};

template <typename A>
struct Call {
  Schedule schedule;
  uint64_t* next_ticket;
  uint32_t* counters;

  int64_t batch;
  uint32_t depth;  // as rows and columns below 2^31, which kernels.cu has checked
  uint32_t height;
  uint32_t width;
  int64_t positions;
  int64_t channels;
  uint32_t rows;     // NHWC: positions; NCHW: channels
  uint32_t columns;  // the other
  int fold;          // channels of a row of NCHW: several where one is not of whole vectors
  bool channels_last;
  int vector;  // elements that are read at once
  int64_t hidden;
  uint16_t kernel_depth;  // below 2^15
  uint16_t kernel_height;
  uint16_t kernel_width;
  bool batch_norm;
  bool use_mean;
  bool use_max;
  bool mlp_relu;       // the MLP ends in a ReLU
  bool by_branch;      // each branch has logits of its own
  bool sum_of_gates;   // ... and a gate, which are added
  bool sum_of_logits;  // the one logit is the sum of both branches'
  bool serial;         // spatial descriptors of x g_c (channel first), not of x
  A floor;             // of the results: 0 for a ReLU, else -infinity
  A epsilon;

  const void* x;
  const void* residual;
  const void* dy;    // in gradients of pools x, for the passes that count maxima
  const void* mask;  // y, where a ReLU ended the module
  void* result;      // y or dx
  void* d_residual;
  const A* w0;
  const A* b0;
  const A* w1;
  const A* b1;
  const A* kernel;
  const A* bias;
  const A* gamma;
  A* channel_descriptors;  // written in forward
  A* channel_gate;         // null without a channel gate
  A* spatial_descriptors;
  A* spatial_gate;  // null without a spatial gate
  A* batch_statistics;
  const A* d_channel_gate;
  const A* d_spatial_gate;
  A* dw0;
  A* db0;
  A* dw1;
  A* db1;
  A* dkernel;
  A* dbias;
  A* dgamma;

  // What the passes over maps reduce to, and where descriptors are read: in forward the same.
  Reduced<A> channel_pass;
  Reduced<A> spatial_pass;
  Reduced<A> channel_source;
  Reduced<A> spatial_source;
  const A* channel_maximum;   // [N, C]
  const A* position_maximum;  // of sample n at n * position_stride
  int64_t position_stride;
  Sides<A> channel_sides;
  Sides<A> position_sides;

  int64_t mlp_slice;         // channels of an item that sums over them
  Reduced<A> hidden_slices;  // what these give, where there are several
  A* hidden_values;          // [N, 2, hidden]
  A* logits;                 // [N, 2, C], or where not by branch [N, C]; if gradients need them
  A* d_logits;               // of the shape of logits
  A* d_hidden;               // [N, 2, hidden]
  A* z;                      // [N, P]: the convolution; in backward it normalised
  A* dz;                     // [N, P]
  A* patch_sums;             // [2, N patches]
  A* totals;                 // [2]
  A* taps;                   // [taps of the kernel and one, N patches]

  // The pools on their own: element i of sample n at n * pool_stride + i * pool_step.
  void* pool_first;
  void* pool_second;
  const void* pool_maximum;
  const void* d_pool_first;
  const void* d_pool_second;
  A* pool_maxima;  // in the compute type
  bool pool_over_channels;
  int64_t pool_stride;
  int64_t pool_step;

  Tiles channel_tiles;  // of the pass that gives values per channel
  Tiles spatial_tiles;  // per position
  Tiles map_tiles;
  Patches patches;
};

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_CALL_H_
