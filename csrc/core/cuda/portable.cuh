// The portable path: the passes of reduce.cuh, gate_mlp.cuh and spatial.cuh, launched one after the
// other over as many samples as L2 holds. Host code; each float type is instantiated in a source of
// its own (float32.cu, ...).
//
//   forward    channel pool | (combine) | hidden | gate | spatial pool | apply
//   backward   A | spatial grad | B | (combine) | hidden | gate grad | hidden grad |
//              descriptor grad | C
//
// per chunk of samples; backward ends with the sums over all samples: dK and dbias, dW1, dW0.
//
// Batch norm needs the whole batch before any gate is known: forward then runs up to the
// convolution chunk by chunk and applies afterwards, backward runs A for all samples first.
#ifndef CBAM_OPS_CORE_CUDA_PORTABLE_CUH_
#define CBAM_OPS_CORE_CUDA_PORTABLE_CUH_

#include <initializer_list>

#include "core/cuda/gates.h"
#include "core/cuda/kernels.h"
#include "core/cuda/launch.h"
#include "core/cuda/plan.h"
#include "core/cuda/reduce.cuh"
#include "core/cuda/spatial.cuh"

namespace cbam_ops {
namespace cuda {

constexpr size_t kWindowBytes =
    40 * 1024;                  // shared memory for windows; beyond, planes are read where they are
constexpr int kGateTile = 128;  // positions per block of the kernels that only convolve

template <typename P>
P* Offset(P* pointer, int64_t elements) {
  return pointer != nullptr ? pointer + elements : nullptr;
}
template <typename T>
const void* OffsetMap(const void* pointer, int64_t elements) {
  return Offset(static_cast<const T*>(pointer), elements);
}
template <typename T>
void* OffsetMap(void* pointer, int64_t elements) {
  return Offset(static_cast<T*>(pointer), elements);
}

inline bool Aligned16(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return true;
}

// Whether maps can be read in 16-byte vectors: rows of whole vectors, all bases aligned.
template <typename T>
bool Vectorised(const Problem& problem, std::initializer_list<const void*> maps) {
  const int64_t columns = ChannelsLast(problem) ? problem.channels : Positions(problem);
  return columns % kVector<T> == 0 && Aligned16(maps);
}

// Tiles of at most `tile` positions with windows of the convolution around them. `windows` of them,
// the kernel and `other_bytes` per position are to fit shared memory, which `shared_bytes` gets.
template <typename A>
Tiling MakeTiling(const Problem& problem, int tile, int windows, size_t other_bytes,
                  size_t* shared_bytes) {
  Tiling tiling = {};
  const int64_t radius = problem.kernel_size / 2;
  tiling.height = problem.height;
  tiling.width = problem.width;
  tiling.kernel_size = static_cast<int>(problem.kernel_size);
  tiling.tile = tile;
  int64_t rows, columns;
  if (problem.width <= tile) {
    tiling.tile = static_cast<int>(AtMost(tile, CeilDiv(AtLeast(1, Positions(problem)), 8) * 8));
    tiling.tiles = CeilDiv(Positions(problem), tiling.tile);
    rows = AtMost(problem.height, problem.width > 0 ? (tiling.tile - 1) / problem.width + 2 : 0) +
           2 * radius;
    columns = problem.width + 2 * radius;
  } else {
    tiling.tiles_per_row = CeilDiv(problem.width, tile);
    tiling.tiles = problem.height * tiling.tiles_per_row;
    rows = 1 + 2 * radius;
    columns = tile + 2 * radius;
  }
  const int64_t values = windows * rows * columns + 2 * problem.kernel_size * problem.kernel_size;
  *shared_bytes = static_cast<size_t>(tiling.tile) * other_bytes;
  if (HasSpatialGate(problem) && problem.kernel_size <= 1024 &&
      *shared_bytes + values * sizeof(A) <= kWindowBytes) {
    tiling.staged = true;
    tiling.window_values = static_cast<int>(rows * columns);
    *shared_bytes += values * sizeof(A);
  }
  return tiling;
}

template <typename A>
Tiling GateTiling(const Problem& problem, size_t* shared_bytes) {
  const Tiling tiling = MakeTiling<A>(problem, kGateTile, 3, sizeof(int), shared_bytes);
  *shared_bytes += kThreads / kWarp * sizeof(A);
  return tiling;
}

// ---- passes -------------------------------------------------------------------------------------

constexpr const char* Name(Pass pass) {
  return pass == Pass::kChannelPool   ? "ChannelPool"
         : pass == Pass::kSpatialPool ? "SpatialPool"
         : pass == Pass::kSpatialGrad ? "SpatialGradPass"
                                      : "ChannelGradPass";
}

template <typename T, int V, Pass kPass>
void RunReduceOf(Launcher* launcher, const Problem& problem, int64_t samples,
                 ReduceParams<Compute<T>> params) {
  using A = Compute<T>;
  const bool along_rows = kOverChannels<kPass> == ChannelsLast(problem);
  const int64_t columns = ChannelsLast(problem) ? problem.channels : params.positions;
  const int64_t rows = ChannelsLast(problem) ? params.positions : problem.channels;
  params.lanes = kWarp;
  if (along_rows) {
    while (params.lanes > 4 && params.lanes / 2 * V >= columns) params.lanes /= 2;
    // Long rows: the whole block on the same ones.
    if (columns >= static_cast<int64_t>(kThreads) * V) params.lanes = kThreads;
    params.tiles = CeilDiv(rows, kThreads / params.lanes * kRowsAtOnce<kPass>);
    params.splits = 1;
    launcher->Run(Name(kPass), &RowReduceKernel<T, V, kPass>, samples * params.tiles,
                  2 * kRowsAtOnce<kPass> * (kThreads / kWarp) * sizeof(A), params);
    return;
  }
  // Across the rows. Where they are not cut into slices, tiles are narrow (a line of 128 bytes) and
  // many threads share a column.
  params.rows_per_split = kOverChannels<kPass> ? AtLeast(1, rows) : RowsPerSplit(rows);
  params.splits = kOverChannels<kPass> ? 1 : ChannelSplits(problem);
  const int narrowest =
      params.splits > 1 ? kWarp
                        : static_cast<int>(AtMost(kWarp, 128 / (V * static_cast<int>(sizeof(T)))));
  params.lanes = narrowest;
  while (params.lanes > 1 && params.lanes / 2 * V >= columns) params.lanes /= 2;
  params.row_threads = kThreads / params.lanes;
  params.tiles = CeilDiv(columns, static_cast<int64_t>(params.lanes) * V);
  launcher->Run(Name(kPass), &ColumnReduceKernel<T, V, kPass>,
                samples * params.splits * params.tiles, 2 * kThreads * V * sizeof(A), params);
}

template <typename T, Pass kPass>
void RunReduce(Launcher* launcher, const Problem& problem, int64_t samples, bool vectorised,
               ReduceParams<Compute<T>> params) {
  params.positions = Positions(problem);
  params.channels = problem.channels;
  if (params.divisor == 0) params.divisor = 1;
  if (vectorised) {
    RunReduceOf<T, kVector<T>, kPass>(launcher, problem, samples, params);
  } else {
    RunReduceOf<T, 1, kPass>(launcher, problem, samples, params);
  }
}

// A reduction over positions to [n, C], by way of slices where the plan has them. `first` is
// divided by `divisor`.
template <typename T, Pass kPass>
void RunChannelReduce(Launcher* launcher, const Problem& problem, int64_t samples, bool vectorised,
                      ReduceParams<Compute<T>> params, Compute<T>* partial, Compute<T> divisor,
                      Compute<T>* first, Compute<T>* second) {
  using A = Compute<T>;
  const int64_t splits = ChannelSplits(problem), channels = problem.channels;
  params.element_stride = 1;
  if (splits == 1) {
    params.first = first;
    params.second = second;
    params.sample_stride = channels;
    params.divisor = divisor;
    RunReduce<T, kPass>(launcher, problem, samples, vectorised, params);
    return;
  }
  params.first = partial;
  params.second = partial + samples * splits * channels;
  params.sample_stride = splits * channels;
  params.split_stride = channels;
  params.divisor = 1;
  RunReduce<T, kPass>(launcher, problem, samples, vectorised, params);
  CombineParams<A> combine = {};
  combine.first = partial;
  combine.second = partial + samples * splits * channels;
  combine.channels = channels;
  combine.splits = splits;
  combine.tiles = CeilDiv(channels, kWarp);
  combine.divisor = divisor;
  combine.first_out = first;
  combine.second_out = second;
  RunCombine(launcher, samples, kIsPool<kPass>, combine);
}

template <typename T>
void RunGrad(Launcher* launcher, const Problem& problem, int64_t samples, bool vectorised,
             GradParams<Compute<T>> params) {
  params.positions = Positions(problem);
  params.channels = problem.channels;
  const int64_t columns = ChannelsLast(problem) ? params.channels : params.positions;
  const int64_t rows = ChannelsLast(problem) ? params.positions : params.channels;
  const int vector = vectorised ? kVector<T> : 1;
  params.lanes = kWarp;
  while (params.lanes > 4 && params.lanes / 2 * vector >= columns) params.lanes /= 2;
  const int rows_at_once = vector * sizeof(Compute<T>) > 16 ? 2 : 4;
  params.row_tiles = CeilDiv(rows, kThreads / params.lanes * rows_at_once);
  params.columns_per_tile = static_cast<int64_t>(params.lanes) * vector * 8;
  params.column_tiles = CeilDiv(columns, params.columns_per_tile);
  const int64_t blocks = samples * params.row_tiles * params.column_tiles;
  const auto kernel =
      vectorised ? (ChannelsLast(problem) ? &GradKernel<T, kVector<T>, true>
                                          : &GradKernel<T, kVector<T>, false>)
                 : (ChannelsLast(problem) ? &GradKernel<T, 1, true> : &GradKernel<T, 1, false>);
  launcher->Run("MapGrad", kernel, blocks, 0, params);
}

template <typename T>
void RunApply(Launcher* launcher, const Problem& problem, int64_t samples, bool vectorised,
              ApplyParams<Compute<T>> params) {
  using A = Compute<T>;
  // About 32768 elements per block, in tiles of 64 to 512 positions; what one tile has more is
  // split by channels.
  int tile = 64;
  while (tile < 512 && 2 * tile * problem.channels <= 32768) tile *= 2;
  size_t shared_bytes = 0;
  params.tiling = MakeTiling<A>(problem, tile, 2, sizeof(A), &shared_bytes);
  if (params.tiling.tiles_per_row > 0 && problem.width % kVector<T> != 0 && !ChannelsLast(problem))
    vectorised = false;
  const int64_t elements = params.tiling.tile * problem.channels;
  params.channels = problem.channels;
  params.channels_per_split =
      CeilDiv(CeilDiv(AtLeast(1, problem.channels), AtLeast(1, elements / 32768)), 64) * 64;
  params.splits = CeilDiv(problem.channels, params.channels_per_split);
  const int vector = vectorised ? kVector<T> : 1;
  const int64_t columns = ChannelsLast(problem) ? params.channels_per_split : params.tiling.tile;
  params.lanes = kWarp;
  while (params.lanes > 4 && params.lanes / 2 * vector >= columns) params.lanes /= 2;
  const auto kernel =
      vectorised ? (ChannelsLast(problem) ? &ApplyKernel<T, kVector<T>, true>
                                          : &ApplyKernel<T, kVector<T>, false>)
                 : (ChannelsLast(problem) ? &ApplyKernel<T, 1, true> : &ApplyKernel<T, 1, false>);
  launcher->Run("Apply", kernel, samples * params.tiling.tiles * params.splits, shared_bytes,
                params);
}

template <typename A>
MlpParams<A> MakeMlpParams(const Problem& problem, int64_t samples) {
  MlpParams<A> params = {};
  params.samples = samples;
  params.channels = problem.channels;
  params.hidden = problem.hidden;
  params.use_mean = UsesMean(problem.pooling);
  params.use_max = UsesMax(problem.pooling);
  params.relu = problem.mlp_activation == Activation::kRelu;
  params.descriptor_stride = problem.batch * problem.channels;
  params.positions = static_cast<A>(Positions(problem));
  return params;
}

// ---- forward ------------------------------------------------------------------------------------

template <typename A>
struct ForwardBuffers {
  A* partial;       // [2, N, splits, C]
  A* descriptors;   // [2, N, C], where one of them is not wanted
  A* hidden;        // [N, 2, hidden]
  A* z;             // [N, P], with batch norm
  A* tile_sums;     // [N * tiles], with batch norm
  A* tile_squares;  // likewise
  size_t bytes;

  ForwardBuffers(const Problem& problem, void* workspace)
      : z(nullptr), tile_sums(nullptr), tile_squares(nullptr) {
    Arena arena(workspace);
    const int64_t n = problem.batch, splits = ChannelSplits(problem);
    partial = arena.Take<A>(
        HasChannelGate(problem) && splits > 1 ? 2 * n * splits * problem.channels : 0);
    descriptors = arena.Take<A>(
        HasChannelGate(problem) && problem.pooling != Pooling::kAvgMax ? n * problem.channels : 0);
    hidden = arena.Take<A>(HasChannelGate(problem) ? n * 2 * problem.hidden : 0);
    if (problem.batch_norm) {
      size_t shared_bytes;
      const Tiling tiling = GateTiling<A>(problem, &shared_bytes);
      z = arena.Take<A>(n * Positions(problem));
      tile_sums = arena.Take<A>(n * tiling.tiles);
      tile_squares = arena.Take<A>(n * tiling.tiles);
    }
    bytes = arena.bytes();
  }
};

template <typename T>
Status PortableForward(const Problem& problem, const ForwardArgs& args, void* workspace,
                       Launcher launcher) {
  using A = Compute<T>;
  const ForwardBuffers<A> buffers(problem, workspace);
  const int64_t positions = Positions(problem), channels = problem.channels,
                map = positions * channels;
  const bool vectorised = Vectorised<T>(problem, {args.x, args.y, args.residual});
  const bool has_channel = HasChannelGate(problem), has_spatial = HasSpatialGate(problem);
  const bool parallel = problem.module == Module::kParallel;
  A* const descriptors = static_cast<A*>(args.channel_descriptors);
  A* const channel_gate = static_cast<A*>(args.channel_gate);
  A* const planes = static_cast<A*>(args.spatial_descriptors);
  A* const spatial_gate = static_cast<A*>(args.spatial_gate);

  const auto apply = [&](int64_t first, int64_t samples) {
    ApplyParams<A> params = {};
    params.x = OffsetMap<T>(args.x, first * map);
    params.residual = OffsetMap<T>(args.residual, first * map);
    params.y = OffsetMap<T>(args.y, first * map);
    params.channel_gate = has_channel ? channel_gate + first * channels : nullptr;
    params.spatial = has_spatial;
    params.relu = problem.activation == Activation::kRelu;
    if (has_spatial) {
      params.planes = planes + first * 2 * positions;
      params.kernel = static_cast<const A*>(args.kernel);
      params.bias = static_cast<const A*>(args.bias);
      params.spatial_gate = spatial_gate + first * positions;
    }
    if (problem.batch_norm) {
      params.z = buffers.z + first * positions;
      params.gamma = static_cast<const A*>(args.gamma);
      params.statistics = static_cast<const A*>(args.batch_statistics);
      params.epsilon = static_cast<A>(problem.epsilon);
    }
    RunApply<T>(&launcher, problem, samples, vectorised, params);
  };

  size_t conv_shared = 0;
  const Tiling conv_tiling = GateTiling<A>(problem, &conv_shared);
  const int64_t chunk = SamplesInFlight(problem, sizeof(T), args.residual != nullptr ? 2 : 1,
                                        launcher.device().l2_bytes);
  for (int64_t first = 0; first < problem.batch; first += chunk) {
    const int64_t samples = AtMost(chunk, problem.batch - first);
    if (has_channel) {
      // The kernel makes both; the one that is not wanted goes to the workspace.
      A* mean = descriptors + first * channels;
      A* maximum = descriptors + (problem.batch + first) * channels;
      if (problem.pooling == Pooling::kMax) {
        RunZero(&launcher, mean, samples * channels);
        mean = buffers.descriptors + first * channels;
      } else if (problem.pooling == Pooling::kAvg) {
        RunZero(&launcher, maximum, samples * channels);
        maximum = buffers.descriptors + first * channels;
      }
      ReduceParams<A> pool = {};
      pool.x = OffsetMap<T>(args.x, first * map);
      RunChannelReduce<T, Pass::kChannelPool>(&launcher, problem, samples, vectorised, pool,
                                              buffers.partial, static_cast<A>(positions), mean,
                                              maximum);
      MlpParams<A> mlp = MakeMlpParams<A>(problem, samples);
      mlp.w0 = static_cast<const A*>(args.w0);
      mlp.b0 = static_cast<const A*>(args.b0);
      mlp.w1 = static_cast<const A*>(args.w1);
      mlp.b1 = static_cast<const A*>(args.b1);
      mlp.descriptors = descriptors + first * channels;
      mlp.hidden_values = buffers.hidden + first * 2 * problem.hidden;
      mlp.gate = channel_gate + first * channels;
      RunHidden(&launcher, mlp);
      RunGate(&launcher, mlp);
    }
    if (has_spatial) {
      ReduceParams<A> pool = {};
      pool.x = OffsetMap<T>(args.x, first * map);
      pool.channel_gate = has_channel && !parallel ? channel_gate + first * channels : nullptr;
      pool.first = planes + first * 2 * positions;
      pool.second = planes + first * 2 * positions + positions;
      pool.sample_stride = 2 * positions;
      pool.element_stride = 1;
      pool.divisor = static_cast<A>(channels);
      RunReduce<T, Pass::kSpatialPool>(&launcher, problem, samples, vectorised, pool);
    }
    if (problem.batch_norm) {
      ConvolutionParams<A> conv = {};
      conv.tiling = conv_tiling;
      conv.planes = planes + first * 2 * positions;
      conv.kernel = static_cast<const A*>(args.kernel);
      conv.z = buffers.z + first * positions;
      conv.tile_sums = buffers.tile_sums + first * conv_tiling.tiles;
      conv.tile_squares = buffers.tile_squares + first * conv_tiling.tiles;
      RunConvolution(&launcher, samples, conv_shared, conv);
    } else {
      apply(first, samples);
    }
  }
  if (problem.batch_norm) {
    StatisticsParams<A> statistics = {};
    statistics.tiling = conv_tiling;
    statistics.samples = problem.batch;
    statistics.tile_sums = buffers.tile_sums;
    statistics.tile_squares = buffers.tile_squares;
    statistics.statistics = static_cast<A*>(args.batch_statistics);
    RunStatistics(&launcher, statistics);
    apply(0, problem.batch);
  }
  return launcher.status();
}

// ---- backward -----------------------------------------------------------------------------------

template <typename A>
struct BackwardBuffers {
  A* dot;                   // [N, P]: t
  A* count;                 // [N, P]
  Side<A>* positions_side;  // [N, P]
  A* taps;                  // [2 k^2 + 1, N * tiles]
  A* dz;                    // [N, P], with batch norm
  A* normalised;            // likewise
  A* totals;                // [2]
  A* partial;               // [2, N, splits, C]
  A* d_gate;                // [N, C]
  A* channel_count;         // [N, C]
  Side<A>* channels_side;   // [N, C]
  A* hidden;                // [N, 2, hidden]
  A* d_hidden;              // [N, 2, hidden]
  A* d_logits;              // [N, 2, C]
  size_t bytes;

  BackwardBuffers(const Problem& problem, void* workspace) {
    Arena arena(workspace);
    const int64_t n = problem.batch, splits = ChannelSplits(problem);
    const int64_t spatial = HasSpatialGate(problem) ? n * Positions(problem) : 0;
    const int64_t channel = HasChannelGate(problem) ? n * problem.channels : 0;
    const int64_t hidden_values = HasChannelGate(problem) ? n * 2 * problem.hidden : 0;
    size_t shared_bytes;
    const int64_t tiles = HasSpatialGate(problem) ? GateTiling<A>(problem, &shared_bytes).tiles : 0;
    dot = arena.Take<A>(spatial);
    count = arena.Take<A>(spatial);
    positions_side = arena.Take<Side<A>>(spatial);
    taps = arena.Take<A>((2 * problem.kernel_size * problem.kernel_size + 1) * n * tiles);
    dz = arena.Take<A>(problem.batch_norm ? spatial : 0);
    normalised = arena.Take<A>(problem.batch_norm ? spatial : 0);
    totals = arena.Take<A>(2);
    partial = arena.Take<A>(splits > 1 ? 2 * splits * channel : 0);
    d_gate = arena.Take<A>(channel);
    channel_count = arena.Take<A>(channel);
    channels_side = arena.Take<Side<A>>(channel);
    hidden = arena.Take<A>(hidden_values);
    d_hidden = arena.Take<A>(hidden_values);
    d_logits = arena.Take<A>(2 * channel);
    bytes = arena.bytes();
  }
};

// The gradients of the MLP's weights, from what backward left for all samples.
template <typename A>
void RunMlpWeightGradients(Launcher* launcher, const Problem& problem, const BackwardArgs& args,
                           const A* hidden, const A* d_logits, const A* d_hidden) {
  const int64_t n = problem.batch, c = problem.channels, h = problem.hidden;
  OuterParams<A> dw1 = {n,
                        hidden,
                        h,
                        2 * h,
                        h,
                        d_logits,
                        c,
                        2 * c,
                        c,
                        CeilDiv(c, kWarp),
                        static_cast<A*>(args.dw1),
                        static_cast<A*>(args.db1)};
  RunOuter(launcher, "OuterW1", dw1);
  OuterParams<A> dw0 = {n,
                        static_cast<const A*>(args.channel_descriptors),
                        c,
                        c,
                        n * c,
                        d_hidden,
                        h,
                        2 * h,
                        h,
                        CeilDiv(h, kWarp),
                        static_cast<A*>(args.dw0),
                        static_cast<A*>(args.db0)};
  RunOuter(launcher, "OuterW0", dw0);
}

template <typename T>
Status PortableBackward(const Problem& problem, const BackwardArgs& args, void* workspace,
                        Launcher launcher) {
  using A = Compute<T>;
  const BackwardBuffers<A> buffers(problem, workspace);
  const int64_t positions = Positions(problem), channels = problem.channels,
                map = positions * channels;
  const bool relu = problem.activation == Activation::kRelu;
  const void* const mask = relu ? args.y : nullptr;
  const bool vectorised =
      Vectorised<T>(problem, {args.x, args.dy, mask, args.dx, relu ? args.d_residual : nullptr});
  const bool has_channel = HasChannelGate(problem), has_spatial = HasSpatialGate(problem);
  const bool parallel = problem.module == Module::kParallel;
  const A* const gate = has_channel ? static_cast<const A*>(args.channel_gate) : nullptr;
  const A* const descriptors = static_cast<const A*>(args.channel_descriptors);
  const A* const planes = static_cast<const A*>(args.spatial_descriptors);

  size_t shared_bytes = 0;
  const Tiling tiling = GateTiling<A>(problem, &shared_bytes);
  const auto reduce_params = [&](int64_t first) {
    ReduceParams<A> params = {};
    params.x = OffsetMap<T>(args.x, first * map);
    params.dy = OffsetMap<T>(args.dy, first * map);
    params.y = OffsetMap<T>(mask, first * map);
    params.channel_gate = Offset(gate, first * channels);
    params.parallel = parallel || !has_spatial;
    return params;
  };
  const auto pass_a = [&](int64_t first, int64_t samples) {
    ReduceParams<A> params = reduce_params(first);
    params.parallel = parallel;
    params.position_maximum = planes + (2 * first + 1) * positions;
    params.position_maximum_stride = 2 * positions;
    params.first = buffers.dot + first * positions;
    params.second = buffers.count + first * positions;
    params.sample_stride = positions;
    params.element_stride = 1;
    RunReduce<T, Pass::kSpatialGrad>(&launcher, problem, samples, vectorised, params);
  };
  const auto spatial_params = [&](int64_t first) {
    SpatialGradParams<A> params = {};
    params.tiling = tiling;
    params.channels = static_cast<A>(channels);
    params.planes = planes + first * 2 * positions;
    params.kernel = static_cast<const A*>(args.kernel);
    params.spatial_gate = static_cast<const A*>(args.spatial_gate) + first * positions;
    params.dot = buffers.dot + first * positions;
    params.count = buffers.count + first * positions;
    params.d_gate_other = Offset(static_cast<const A*>(args.d_spatial_gate), first * positions);
    params.positions_side = buffers.positions_side + first * positions;
    params.partial = buffers.taps;
    params.first_block = first * tiling.tiles;
    params.blocks = problem.batch * tiling.tiles;
    params.batch_norm = problem.batch_norm;
    if (problem.batch_norm) {
      params.gamma = static_cast<const A*>(args.gamma);
      params.statistics = static_cast<const A*>(args.batch_statistics);
      params.epsilon = static_cast<A>(problem.epsilon);
      params.count_all = static_cast<A>(problem.batch * positions);
      params.dz = buffers.dz + first * positions;
      params.normalised = buffers.normalised + first * positions;
      params.total = buffers.totals;
      params.total_product = buffers.totals + 1;
    }
    return params;
  };

  const int maps = relu ? 3 : 2;
  const int64_t chunk = SamplesInFlight(problem, sizeof(T), maps, launcher.device().l2_bytes);
  if (problem.batch_norm) {
    pass_a(0, problem.batch);
    RunNormGrad(&launcher, problem.batch, shared_bytes, spatial_params(0));
    const int64_t blocks = problem.batch * tiling.tiles;
    RunSum<A>(&launcher, buffers.taps, 2, blocks, buffers.totals, 2, nullptr);
    RunSum<A>(&launcher, buffers.taps, 2, blocks, static_cast<A*>(args.dbias), 1,
              static_cast<A*>(args.dgamma));
  }
  for (int64_t first = 0; first < problem.batch; first += chunk) {
    const int64_t samples = AtMost(chunk, problem.batch - first);
    if (has_spatial) {
      if (!problem.batch_norm) pass_a(first, samples);
      RunSpatialGrad(&launcher, samples, shared_bytes, spatial_params(first));
    }
    if (has_channel) {
      ReduceParams<A> params = reduce_params(first);
      params.channel_maximum = descriptors + (problem.batch + first) * channels;
      params.positions_side = has_spatial ? buffers.positions_side + first * positions : nullptr;
      RunChannelReduce<T, Pass::kChannelGrad>(
          &launcher, problem, samples, vectorised, params, buffers.partial, A(1),
          buffers.d_gate + first * channels, buffers.channel_count + first * channels);
      MlpParams<A> mlp = MakeMlpParams<A>(problem, samples);
      mlp.w0 = static_cast<const A*>(args.w0);
      mlp.b0 = static_cast<const A*>(args.b0);
      mlp.w1 = static_cast<const A*>(args.w1);
      mlp.b1 = static_cast<const A*>(args.b1);
      mlp.descriptors = descriptors + first * channels;
      mlp.hidden_values = buffers.hidden + first * 2 * problem.hidden;
      mlp.gate = const_cast<A*>(gate) + first * channels;
      mlp.d_gate = buffers.d_gate + first * channels;
      mlp.d_gate_other = Offset(static_cast<const A*>(args.d_channel_gate), first * channels);
      mlp.d_logits = buffers.d_logits + first * 2 * channels;
      mlp.d_hidden = buffers.d_hidden + first * 2 * problem.hidden;
      mlp.count = buffers.channel_count + first * channels;
      mlp.channels_side = buffers.channels_side + first * channels;
      RunHidden(&launcher, mlp);
      RunGateGrad(&launcher, mlp);
      RunHiddenGrad(&launcher, mlp);
      RunDescriptorGrad(&launcher, mlp);
    }
    GradParams<A> grad = {};
    grad.x = OffsetMap<T>(args.x, first * map);
    grad.dy = OffsetMap<T>(args.dy, first * map);
    grad.y = OffsetMap<T>(mask, first * map);
    grad.channels_side = has_channel ? buffers.channels_side + first * channels : nullptr;
    grad.positions_side = has_spatial ? buffers.positions_side + first * positions : nullptr;
    grad.parallel = parallel;
    grad.dx = OffsetMap<T>(args.dx, first * map);
    grad.d_residual = relu ? OffsetMap<T>(args.d_residual, first * map) : nullptr;
    RunGrad<T>(&launcher, problem, samples, vectorised, grad);
  }
  if (has_spatial) {
    const int64_t taps = 2 * problem.kernel_size * problem.kernel_size;
    RunSum<A>(&launcher, buffers.taps, problem.batch_norm ? taps : taps + 1,
              problem.batch * tiling.tiles, static_cast<A*>(args.dkernel), taps,
              static_cast<A*>(args.dbias));
  }
  if (has_channel)
    RunMlpWeightGradients<A>(&launcher, problem, args, buffers.hidden, buffers.d_logits,
                             buffers.d_hidden);
  return launcher.status();
}

// ---- the pools on their own ---------------------------------------------------------------------

template <typename A>
struct PoolBuffers {
  A* partial;
  A* first;    // means, or sums that nobody wants
  A* second;   // maxima or counts
  A* maximum;  // in the compute type
  Side<A>* sides;
  size_t bytes;

  PoolBuffers(const Problem& problem, bool over_channels, void* workspace) {
    Arena arena(workspace);
    const int64_t splits = ChannelSplits(problem);
    const int64_t results = problem.batch * (over_channels ? Positions(problem) : problem.channels);
    partial = arena.Take<A>(!over_channels && splits > 1 ? 2 * splits * results : 0);
    first = arena.Take<A>(results);
    second = arena.Take<A>(results);
    maximum = arena.Take<A>(results);
    sides = arena.Take<Side<A>>(results);
    bytes = arena.bytes();
  }
};

template <typename T>
struct StoreParams {
  const Compute<T>* first;
  const Compute<T>* second;
  T* first_out;
  T* second_out;
  int64_t count;
};
template <typename T>
CBAM_KERNEL(2)
StoreKernel(StoreParams<T> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const int64_t i = BlockIndex() * kThreads + ThreadIndex();
  if (i >= params.count) return;
  FromCompute(params.first[i], params.first_out + i);
  FromCompute(params.second[i], params.second_out + i);
}

template <typename A>
size_t WorkspaceFor(const Problem& problem, const ChannelPoolArgs&) {
  return PoolBuffers<A>(problem, /*over_channels=*/false, nullptr).bytes;
}

template <typename T>
Status Launch(const Problem& problem, const ChannelPoolArgs& args, void* workspace,
              Launcher launcher, Path /*path*/) {
  using A = Compute<T>;
  const PoolBuffers<A> buffers(problem, false, workspace);
  const bool vectorised = Vectorised<T>(problem, {args.x});
  ReduceParams<A> params = {};
  params.x = args.x;
  RunChannelReduce<T, Pass::kChannelPool>(&launcher, problem, problem.batch, vectorised, params,
                                          buffers.partial, static_cast<A>(Positions(problem)),
                                          buffers.first, buffers.second);
  const StoreParams<T> store = {buffers.first, buffers.second, static_cast<T*>(args.mean),
                                static_cast<T*>(args.maximum), problem.batch * problem.channels};
  launcher.Run("Store", &StoreKernel<T>, CeilDiv(store.count, kThreads), 0, store);
  return launcher.status();
}

template <typename A>
size_t WorkspaceFor(const Problem& problem, const SpatialPoolArgs&) {
  return PoolBuffers<A>(problem, /*over_channels=*/true, nullptr).bytes;
}

template <typename T>
Status Launch(const Problem& problem, const SpatialPoolArgs& args, void* /*workspace*/,
              Launcher launcher, Path /*path*/) {
  using A = Compute<T>;
  const int64_t positions = Positions(problem);
  ReduceParams<A> params = {};
  params.x = args.x;
  params.first = args.descriptors;
  params.second = static_cast<T*>(args.descriptors) + (ChannelsLast(problem) ? 1 : positions);
  params.sample_stride = 2 * positions;
  params.element_stride = ChannelsLast(problem) ? 2 : 1;
  params.divisor = static_cast<A>(problem.channels);
  params.as_map_type = true;
  RunReduce<T, Pass::kSpatialPool>(&launcher, problem, problem.batch,
                                   Vectorised<T>(problem, {args.x}), params);
  return launcher.status();
}

// Both gradients: how many equal the maximum, then the sides, then the map. All over chunks that
// stay in L2 between the two passes.
template <typename T, bool kPerPosition>
Status PortablePoolGrad(const Problem& problem, const void* x, const PoolSideParams<T>& results,
                        void* dx, void* workspace, Launcher launcher) {
  using A = Compute<T>;
  const PoolBuffers<A> buffers(problem, kPerPosition, workspace);
  const int64_t positions = Positions(problem), channels = problem.channels;
  const bool vectorised = Vectorised<T>(problem, {x, dx});
  const int64_t chunk = SamplesInFlight(problem, sizeof(T), 1, launcher.device().l2_bytes);
  for (int64_t first = 0; first < problem.batch; first += chunk) {
    const int64_t samples = AtMost(chunk, problem.batch - first);
    PoolSideParams<T> sides = results;
    sides.size = kPerPosition ? positions : channels;
    sides.count = samples * sides.size;
    sides.maximum += first * sides.sample_stride;
    sides.d_mean += first * sides.sample_stride;
    sides.d_maximum += first * sides.sample_stride;
    sides.maximum_out = buffers.maximum + first * sides.size;
    sides.counts = nullptr;
    launcher.Run("PoolMaximum", &PoolSideKernel<T>, CeilDiv(sides.count, kThreads), 0, sides);

    ReduceParams<A> params = {};
    params.x = OffsetMap<T>(x, first * positions * channels);
    params.parallel = true;
    A* const counts = buffers.second + first * sides.size;
    if constexpr (kPerPosition) {
      params.position_maximum = sides.maximum_out;
      params.position_maximum_stride = positions;
      params.first = buffers.first + first * positions;
      params.second = counts;
      params.sample_stride = positions;
      params.element_stride = 1;
      RunReduce<T, Pass::kSpatialGrad>(&launcher, problem, samples, vectorised, params);
    } else {
      params.channel_maximum = sides.maximum_out;
      RunChannelReduce<T, Pass::kChannelGrad>(&launcher, problem, samples, vectorised, params,
                                              buffers.partial, A(1),
                                              buffers.first + first * channels, counts);
    }
    sides.counts = counts;
    sides.sides = buffers.sides + first * sides.size;
    sides.reduced = static_cast<A>(kPerPosition ? channels : positions);
    launcher.Run("PoolSides", &PoolSideKernel<T>, CeilDiv(sides.count, kThreads), 0, sides);

    GradParams<A> grad = {};
    grad.x = params.x;
    (kPerPosition ? grad.positions_side : grad.channels_side) = sides.sides;
    grad.parallel = true;
    grad.dx = OffsetMap<T>(dx, first * positions * channels);
    RunGrad<T>(&launcher, problem, samples, vectorised, grad);
  }
  return launcher.status();
}

template <typename A>
size_t WorkspaceFor(const Problem& problem, const ChannelPoolGradArgs&) {
  return PoolBuffers<A>(problem, /*over_channels=*/false, nullptr).bytes;
}

template <typename T>
Status Launch(const Problem& problem, const ChannelPoolGradArgs& args, void* workspace,
              Launcher launcher, Path /*path*/) {
  PoolSideParams<T> results = {};
  results.maximum = static_cast<const T*>(args.maximum);
  results.d_mean = static_cast<const T*>(args.d_mean);
  results.d_maximum = static_cast<const T*>(args.d_maximum);
  results.sample_stride = problem.channels;
  results.element_stride = 1;
  return PortablePoolGrad<T, false>(problem, args.x, results, args.dx, workspace, launcher);
}

template <typename A>
size_t WorkspaceFor(const Problem& problem, const SpatialPoolGradArgs&) {
  return PoolBuffers<A>(problem, /*over_channels=*/true, nullptr).bytes;
}

template <typename T>
Status Launch(const Problem& problem, const SpatialPoolGradArgs& args, void* workspace,
              Launcher launcher, Path /*path*/) {
  const int64_t second = ChannelsLast(problem) ? 1 : Positions(problem);
  PoolSideParams<T> results = {};
  results.maximum = static_cast<const T*>(args.descriptors) + second;
  results.d_mean = static_cast<const T*>(args.d_descriptors);
  results.d_maximum = static_cast<const T*>(args.d_descriptors) + second;
  results.sample_stride = 2 * Positions(problem);
  results.element_stride = ChannelsLast(problem) ? 2 : 1;
  return PortablePoolGrad<T, true>(problem, args.x, results, args.dx, workspace, launcher);
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_PORTABLE_CUH_
