// The spatial gate: the k x k convolution of the two descriptor planes, its sigmoid, the
// multiplication of the map, and back.
//
//   ApplyKernel        y = act(x g_c g_s + residual); g_s = sigmoid(conv(planes) + bias) is
//                      computed here, for a tile of positions
//   ConvolutionKernel  with batch norm: z = conv(planes) and each tile's sum and squares about its
//                      mean (then StatisticsKernel)
//   NormGradKernel     backward with batch norm: dz, normalised z, and each tile's sums of dz and
//                      dz * normalised z
//   SpatialGradKernel  dz -> the transposed convolution, as the positions' sides of passes B and C;
//                      and dK, dbias per tile
//   SumKernel          the tiles' partial results, in order
//
// A tile is a range of neighbouring positions of one sample: in both layouts the piece of the map
// that goes with it is then made of long runs (NHWC: one run of positions x C; NCHW: C runs of the
// tile's length). Either rows of the plane are shorter than a tile, which then may begin and end
// inside rows, or a tile is a piece of one row. Its window, the tile with a halo of k/2 on each
// side and zeros beyond the border, lies in shared memory: for 128 positions of a 56 wide plane and
// k = 7 it is (4 + 6) x (56 + 6) x 2 values, 5 KB in float. A kernel so large that the window does
// not fit reads the planes where they are (`staged` false).
//
// Bytes of ApplyKernel per element: read x (from L2, the pools were there before) and the residual,
// write y; per position the planes once per tile that needs them, (1 + 6 W / tile) x 8 B against C
// x 8 B of x and y. A tile is split over several blocks by channels where there are many; each
// computes the tile's gates again (2 k^2 multiply-adds per position).
#ifndef CBAM_OPS_CORE_CUDA_SPATIAL_CUH_
#define CBAM_OPS_CORE_CUDA_SPATIAL_CUH_

#include "core/cuda/reduce.cuh"

namespace cbam_ops {
namespace cuda {

// How positions are cut into tiles, and the windows around them.
struct Tiling {
  int64_t height;
  int64_t width;
  int kernel_size;
  int tile;               // positions per tile, at most
  int64_t tiles_per_row;  // 0: tiles are ranges of all positions; else each row has this many
  int64_t tiles;          // per sample
  bool staged;            // windows and kernel in shared memory
  int window_values;      // capacity of one plane's window
};

struct Tile {
  int64_t begin;  // position
  int size;       // positions
  int64_t row;    // of the window's first value, may be negative
  int64_t column;
  int rows;
  int columns;
};

CBAM_DEVICE Tile TileAt(const Tiling& tiling, int64_t index) {
  const int radius = tiling.kernel_size / 2;
  Tile tile;
  int64_t first_row, last_row;
  if (tiling.tiles_per_row == 0) {
    tile.begin = index * tiling.tile;
    tile.size = static_cast<int>(Smaller(tiling.tile, tiling.height * tiling.width - tile.begin));
    first_row = Quotient(tile.begin, tiling.width);
    last_row = Quotient(tile.begin + tile.size - 1, tiling.width);
    tile.column = -radius;
    tile.columns = static_cast<int>(tiling.width) + 2 * radius;
  } else {
    first_row = last_row = Quotient(index, tiling.tiles_per_row);
    const int64_t column = Remainder(index, tiling.tiles_per_row) * tiling.tile;
    tile.begin = first_row * tiling.width + column;
    tile.size = static_cast<int>(Smaller(tiling.tile, tiling.width - column));
    tile.column = column - radius;
    tile.columns = tile.size + 2 * radius;
  }
  tile.row = first_row - radius;
  tile.rows = static_cast<int>(last_row - first_row) + 1 + 2 * radius;
  return tile;
}

// Fills a window; value(p) is the plane's value at position p. `threads` is the block's size.
template <typename A, typename Value>
CBAM_DEVICE void FillWindow(const Tiling& tiling, const Tile& tile, A* window, Value value,
                            int threads = kThreads) {
  for (int i = ThreadIndex(); i < tile.rows * tile.columns; i += threads) {
    const int64_t row = tile.row + i / tile.columns, column = tile.column + i % tile.columns;
    const bool inside = row >= 0 && row < tiling.height && column >= 0 && column < tiling.width;
    window[i] = inside ? value(row * tiling.width + column) : A(0);
  }
}

// sum over taps and both planes of kernel * plane, around position p. `windows` holds the two
// planes' windows, `weights` the kernel, both in shared memory if staged; else planes and weights
// are in global memory and windows is null.
template <typename A>
CBAM_DEVICE A Convolve(const Tiling& tiling, const Tile& tile, const A* windows, const A* planes,
                       const A* weights, int64_t p) {
  const int k = tiling.kernel_size;
  const int64_t row = Quotient(p, tiling.width), column = p - row * tiling.width;
  A sum = A(0);
  if (tiling.staged) {
    const A* const mean =
        windows + (row - k / 2 - tile.row) * tile.columns + (column - k / 2 - tile.column);
    const A* const max = mean + tiling.window_values;
    CBAM_NO_UNROLL
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < k; ++j) {
        const A* const weight = weights + (i * k + j) * 2;
        sum += mean[i * tile.columns + j] * weight[0];
        sum += max[i * tile.columns + j] * weight[1];
      }
    }
    return sum;
  }
  const int64_t positions = tiling.height * tiling.width;
  CBAM_NO_UNROLL
  for (int i = 0; i < k; ++i) {
    const int64_t r = row + i - k / 2;
    if (r < 0 || r >= tiling.height) continue;
    CBAM_NO_UNROLL
    for (int j = 0; j < k; ++j) {
      const int64_t c = column + j - k / 2;
      if (c < 0 || c >= tiling.width) continue;
      const A* const weight = weights + (static_cast<int64_t>(i) * k + j) * 2;
      sum += planes[r * tiling.width + c] * weight[0];
      sum += planes[positions + r * tiling.width + c] * weight[1];
    }
  }
  return sum;
}

// Loads both planes' windows and the kernel into shared memory (if staged); returns where the
// weights are.
template <typename A>
CBAM_DEVICE const A* StagePlanes(const Tiling& tiling, const Tile& tile, const A* planes,
                                 const A* weights, A* windows, A* shared_weights) {
  if (!tiling.staged) return weights;
  const int64_t positions = tiling.height * tiling.width;
  FillWindow(tiling, tile, windows, [planes](int64_t p) { return planes[p]; });
  FillWindow(tiling, tile, windows + tiling.window_values,
             [planes, positions](int64_t p) { return planes[positions + p]; });
  for (int i = ThreadIndex(); i < 2 * tiling.kernel_size * tiling.kernel_size; i += kThreads)
    shared_weights[i] = weights[i];
  return shared_weights;
}

// What a block sums up; every thread gets the result. `shared` holds kThreads / kWarp values.
template <typename A>
CBAM_DEVICE A BlockSum(A value, A* shared) {
  value = SumOverLanes(value, kWarp);
  Barrier();  // the last call's readers are done
  if (ThreadIndex() % kWarp == 0) shared[ThreadIndex() / kWarp] = value;
  Barrier();
  A sum = A(0);
  for (int w = 0; w < kThreads / kWarp; ++w) sum += shared[w];
  return sum;
}

template <typename A>
struct ApplyParams {
  const void* x;
  const void* residual;  // or null
  void* y;
  int64_t channels;
  const A* channel_gate;  // [n, C] or null
  bool spatial;           // whether there is a spatial gate
  bool relu;
  Tiling tiling;
  const A* planes;  // [n, 2, P]
  const A* kernel;  // [k, k, 2]
  const A* bias;    // or null
  A* spatial_gate;  // [n, P]
  // With batch norm: the convolution, done before, and its statistics.
  const A* z;  // [n, P] or null
  const A* gamma;
  const A* statistics;
  A epsilon;
  // The plan.
  int64_t splits;  // of the channels
  int64_t channels_per_split;
  int lanes;
};

// Grid: samples x tiles x splits. Shared memory: tile gates, and if staged two windows and the
// kernel.
template <typename T, int V, bool kChannelsLast>
CBAM_KERNEL(V * sizeof(Compute<T>) > 16 ? 2 : 3)
ApplyKernel(ApplyParams<Compute<T>> params) {
  using A = Compute<T>;
  constexpr int kUnroll = 4;
  WaitForPredecessors();
  AllowSuccessors();
  const Tiling& tiling = params.tiling;
  const int64_t positions = tiling.height * tiling.width;
  const int64_t split = Remainder(BlockIndex(), params.splits);
  const int64_t piece = Quotient(BlockIndex(), params.splits);
  const int64_t n = Quotient(piece, tiling.tiles);
  const Tile tile = TileAt(tiling, Remainder(piece, tiling.tiles));
  A* const gates = reinterpret_cast<A*>(SharedMemory());
  if (params.spatial) {
    A* const windows = gates + tiling.tile;
    const A* const planes = params.planes + n * 2 * positions;
    const A* weights = nullptr;
    if (params.z == nullptr) {
      weights = StagePlanes(tiling, tile, planes, params.kernel, windows,
                            windows + 2 * tiling.window_values);
      Barrier();
    }
    for (int q = ThreadIndex(); q < tile.size; q += kThreads) {
      const int64_t p = tile.begin + q;
      A z;
      if (params.z != nullptr) {
        z = (params.z[n * positions + p] - params.statistics[0]) /
            SquareRoot(params.statistics[1] + params.epsilon) * params.gamma[0];
      } else {
        z = Convolve(tiling, tile, windows, planes, weights, p);
      }
      if (params.bias != nullptr) z += params.bias[0];
      gates[q] = Sigmoid(z);
      if (split == 0) params.spatial_gate[n * positions + p] = gates[q];
    }
    Barrier();
  }
  // The tile as a matrix again: rows and columns of what this block multiplies.
  const int64_t first_channel = split * params.channels_per_split;
  const int64_t channels = Smaller(params.channels_per_split, params.channels - first_channel);
  const int64_t rows = kChannelsLast ? tile.size : channels;
  const int64_t columns = kChannelsLast ? channels : tile.size;
  const int64_t stride = kChannelsLast ? params.channels : positions;
  const int64_t base = n * positions * params.channels +
                       (kChannelsLast ? tile.begin * params.channels + first_channel
                                      : first_channel * positions + tile.begin);
  const T* const x = static_cast<const T*>(params.x) + base;
  const T* const residual =
      params.residual != nullptr ? static_cast<const T*>(params.residual) + base : nullptr;
  T* const y = static_cast<T*>(params.y) + base;
  const A* const channel_gate = params.channel_gate != nullptr
                                    ? params.channel_gate + n * params.channels + first_channel
                                    : nullptr;
  const int lane = ThreadIndex() % params.lanes;
  const int groups = kThreads / params.lanes, group = ThreadIndex() / params.lanes;
  for (int64_t column = static_cast<int64_t>(lane) * V; column < columns;
       column += static_cast<int64_t>(params.lanes) * V) {
    A column_gates[V];
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) {
      if constexpr (kChannelsLast) {
        column_gates[i] = channel_gate != nullptr ? channel_gate[column + i] : A(1);
      } else {
        column_gates[i] = params.spatial ? gates[column + i] : A(1);
      }
    }
    for (int64_t row = group; row < rows; row += static_cast<int64_t>(groups) * kUnroll) {
      Vec<T, V> xs[kUnroll], residuals[kUnroll];
      CBAM_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t at =
            Smaller(row + static_cast<int64_t>(k) * groups, rows - 1) * stride + column;
        xs[k] = Load<T, V>(x + at);
        if (residual != nullptr) residuals[k] = Load<T, V>(residual + at);
      }
      CBAM_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t this_row = row + static_cast<int64_t>(k) * groups;
        if (this_row >= rows) continue;
        A row_gate;
        if constexpr (kChannelsLast) {
          row_gate = params.spatial ? gates[this_row] : A(1);
        } else {
          row_gate = channel_gate != nullptr ? channel_gate[this_row] : A(1);
        }
        Vec<T, V> results;
        CBAM_UNROLL
        for (int i = 0; i < V; ++i) {
          const A first = kChannelsLast ? column_gates[i] : row_gate,
                  second = kChannelsLast ? row_gate : column_gates[i];
          A value = Multiply(Multiply(ToCompute(xs[k].value[i]), first), second);
          if (residual != nullptr) value += ToCompute(residuals[k].value[i]);
          if (params.relu) value = Relu(value);
          FromCompute(value, &results.value[i]);
        }
        StoreStreaming<T, V>(y + this_row * stride + column, results);
      }
    }
  }
}

template <typename A>
struct ConvolutionParams {
  Tiling tiling;
  const A* planes;  // [n, 2, P]
  const A* kernel;
  A* z;             // [n, P]
  A* tile_sums;     // [n * tiles]
  A* tile_squares;  // about the tile's mean
};

// Grid: samples x tiles. Shared memory: a warp's worth of sums, two windows, the kernel.
template <typename A>
CBAM_KERNEL(1)
ConvolutionKernel(ConvolutionParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const Tiling& tiling = params.tiling;
  const int64_t positions = tiling.height * tiling.width;
  const int64_t n = Quotient(BlockIndex(), tiling.tiles);
  const Tile tile = TileAt(tiling, Remainder(BlockIndex(), tiling.tiles));
  A* const sums = reinterpret_cast<A*>(SharedMemory());
  A* const windows = sums + kThreads / kWarp;
  const A* const planes = params.planes + n * 2 * positions;
  const A* const weights =
      StagePlanes(tiling, tile, planes, params.kernel, windows, windows + 2 * tiling.window_values);
  Barrier();
  A* const z = params.z + n * positions;
  A sum = A(0);
  for (int q = ThreadIndex(); q < tile.size; q += kThreads) {
    const A value = Convolve(tiling, tile, windows, planes, weights, tile.begin + q);
    z[tile.begin + q] = value;
    sum += value;
  }
  sum = BlockSum(sum, sums);
  const A mean = sum / static_cast<A>(tile.size);
  A squares = A(0);
  for (int q = ThreadIndex(); q < tile.size; q += kThreads) {
    const A distance = z[tile.begin + q] - mean;  // this thread's own value
    squares += distance * distance;
  }
  squares = BlockSum(squares, sums);
  if (ThreadIndex() == 0) {
    params.tile_sums[BlockIndex()] = sum;
    params.tile_squares[BlockIndex()] = squares;
  }
}

template <typename A>
struct StatisticsParams {
  Tiling tiling;
  int64_t samples;
  const A* tile_sums;
  const A* tile_squares;
  A* statistics;  // mean, biased variance
};

// One block. Shared memory: a warp's worth of sums.
template <typename A>
CBAM_KERNEL(1)
StatisticsKernel(StatisticsParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  A* const shared = reinterpret_cast<A*>(SharedMemory());
  const int64_t tiles = params.samples * params.tiling.tiles;
  const A count = static_cast<A>(params.samples * params.tiling.height * params.tiling.width);
  A sum = A(0);
  for (int64_t i = ThreadIndex(); i < tiles; i += kThreads) sum += params.tile_sums[i];
  const A mean = BlockSum(sum, shared) / count;
  A squares = A(0);
  for (int64_t i = ThreadIndex(); i < tiles; i += kThreads) {
    const A size = static_cast<A>(TileAt(params.tiling, Remainder(i, params.tiling.tiles)).size);
    const A distance = params.tile_sums[i] / size - mean;
    squares += params.tile_squares[i] + size * distance * distance;
  }
  squares = BlockSum(squares, shared);
  if (ThreadIndex() == 0) {
    // An empty batch has no statistics: 0.
    params.statistics[0] = tiles > 0 ? mean : A(0);
    params.statistics[1] = tiles > 0 ? squares / count : A(0);
  }
}

template <typename A>
struct SpatialGradParams {
  Tiling tiling;
  A channels;
  const A* planes;  // [n, 2, P], the descriptors
  const A* kernel;
  const A* spatial_gate;    // [n, P]
  const A* dot;             // [n, P], pass A: t
  const A* count;           // [n, P], pass A
  const A* d_gate_other;    // [n, P] or null
  Side<A>* positions_side;  // [n, P]
  A* partial;               // [k * k * 2 + 1, blocks]: dK, then dbias
  int64_t first_block;      // of this launch among all samples' blocks
  int64_t blocks;           // of all samples
  // Batch norm.
  bool batch_norm;
  const A* gamma;
  const A* statistics;
  A epsilon;
  A count_all;             // positions of the whole batch
  A* dz;                   // [n, P]
  A* normalised;           // [n, P]
  const A* total;          // sum of dz over the whole batch
  const A* total_product;  // sum of dz * normalised
};

template <typename A>
CBAM_DEVICE A LogitGradient(const SpatialGradParams<A>& params, int64_t at) {
  const A gate = params.spatial_gate[at];
  A t = params.dot[at];
  if (params.d_gate_other != nullptr) t += params.d_gate_other[at];
  return t * gate * (A(1) - gate);
}

// Grid: samples x tiles. partial holds [2, blocks] here: sums of dz and of dz * normalised. Shared
// memory as ConvolutionKernel.
template <typename A>
CBAM_KERNEL(1)
NormGradKernel(SpatialGradParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const Tiling& tiling = params.tiling;
  const int64_t positions = tiling.height * tiling.width;
  const int64_t n = Quotient(BlockIndex(), tiling.tiles);
  const Tile tile = TileAt(tiling, Remainder(BlockIndex(), tiling.tiles));
  A* const sums = reinterpret_cast<A*>(SharedMemory());
  A* const windows = sums + kThreads / kWarp;
  const A* const planes = params.planes + n * 2 * positions;
  const A* const weights =
      StagePlanes(tiling, tile, planes, params.kernel, windows, windows + 2 * tiling.window_values);
  Barrier();
  A sum = A(0), product = A(0);
  for (int q = ThreadIndex(); q < tile.size; q += kThreads) {
    const int64_t at = n * positions + tile.begin + q;
    const A value = Convolve(tiling, tile, windows, planes, weights, tile.begin + q);
    const A normalised =
        (value - params.statistics[0]) / SquareRoot(params.statistics[1] + params.epsilon);
    const A dz = LogitGradient(params, at);
    params.dz[at] = dz;
    params.normalised[at] = normalised;
    sum += dz;
    product += dz * normalised;
  }
  sum = BlockSum(sum, sums);
  product = BlockSum(product, sums);
  if (ThreadIndex() == 0) {
    params.partial[params.first_block + BlockIndex()] = sum;
    params.partial[params.blocks + params.first_block + BlockIndex()] = product;
  }
}

// The gradient with respect to the convolution's result at a position of the chunk.
template <typename A>
CBAM_DEVICE A ConvolutionGradient(const SpatialGradParams<A>& params, int64_t at) {
  if (!params.batch_norm) return LogitGradient(params, at);
  const A centred = params.dz[at] - params.total[0] / params.count_all -
                    params.normalised[at] * (params.total_product[0] / params.count_all);
  return centred * params.gamma[0] / SquareRoot(params.statistics[1] + params.epsilon);
}

// The transposed convolution around position p, from the window of the gradients.
template <typename A>
CBAM_DEVICE void ConvolveTransposed(const Tiling& tiling, const Tile& tile, const A* gradients,
                                    const A* weights, int64_t p, A* d_mean, A* d_max) {
  const int k = tiling.kernel_size;
  const int64_t row = Quotient(p, tiling.width), column = p - row * tiling.width;
  const A* const last =
      gradients + (row + k / 2 - tile.row) * tile.columns + (column + k / 2 - tile.column);
  *d_mean = *d_max = A(0);
  CBAM_NO_UNROLL
  for (int i = 0; i < k; ++i) {
    for (int j = 0; j < k; ++j) {
      const A value = last[-(i * tile.columns + j)];
      const A* const weight = weights + (i * k + j) * 2;
      *d_mean += value * weight[0];
      *d_max += value * weight[1];
    }
  }
}

// The tile's part of dK, and of dbias as the last tap, from the three windows: a warp per tap,
// which store(tap, sum) is called for. `corners` holds an int per position of the tile: where its
// window begins is worked out once.
template <typename A, typename Store>
CBAM_DEVICE void SumTaps(const Tiling& tiling, const Tile& tile, const A* windows,
                         const A* gradients, int* corners, int threads, Store store) {
  const int k = tiling.kernel_size, radius = k / 2;
  for (int q = ThreadIndex(); q < tile.size; q += threads) {
    const int64_t p = tile.begin + q, row = Quotient(p, tiling.width),
                  column = p - row * tiling.width;
    corners[q] = static_cast<int>((row - radius - tile.row) * tile.columns +
                                  (column - radius - tile.column));
  }
  Barrier();
  const int lane = ThreadIndex() % kWarp, taps = k * k * 2;
  const A* const centre = gradients + radius * tile.columns + radius;
  CBAM_NO_UNROLL
  for (int tap = ThreadIndex() / kWarp; tap <= taps; tap += threads / kWarp) {
    const int i = tap / 2 / k, j = tap / 2 % k;
    const A* const other = windows + (tap % 2) * tiling.window_values + i * tile.columns + j;
    A sum = A(0);
    for (int q = lane; q < tile.size; q += kWarp) {
      const A value = centre[corners[q]];
      sum += tap < taps ? value * other[corners[q]] : value;
    }
    sum = SumOverLanes(sum, kWarp);
    if (lane == 0) store(tap, sum);
  }
}

// Grid: samples x tiles. Shared memory if staged: three windows, the kernel, and an int per
// position of the tile.
template <typename A>
CBAM_KERNEL(1)
SpatialGradKernel(SpatialGradParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const Tiling& tiling = params.tiling;
  const int k = tiling.kernel_size, radius = k / 2;
  const int64_t positions = tiling.height * tiling.width;
  const int64_t n = Quotient(BlockIndex(), tiling.tiles);
  const Tile tile = TileAt(tiling, Remainder(BlockIndex(), tiling.tiles));
  A* const windows = reinterpret_cast<A*>(SharedMemory());
  A* const gradients = windows + 2 * tiling.window_values;
  const A* const planes = params.planes + n * 2 * positions;
  const A* weights =
      StagePlanes(tiling, tile, planes, params.kernel, windows, gradients + tiling.window_values);
  const auto gradient_at = [&params, n, positions](int64_t p) {
    return ConvolutionGradient(params, n * positions + p);
  };
  if (tiling.staged) {
    FillWindow(tiling, tile, gradients, gradient_at);
    Barrier();
  }
  const auto inside = [&tiling](int64_t row, int64_t column) {
    return row >= 0 && row < tiling.height && column >= 0 && column < tiling.width;
  };
  for (int q = ThreadIndex(); q < tile.size; q += kThreads) {
    const int64_t p = tile.begin + q;
    A d_mean = A(0), d_max = A(0);
    if (tiling.staged) {
      ConvolveTransposed(tiling, tile, gradients, weights, p, &d_mean, &d_max);
    } else {
      const int64_t row = Quotient(p, tiling.width), column = p - row * tiling.width;
      CBAM_NO_UNROLL
      for (int64_t tap = 0; tap < static_cast<int64_t>(k) * k; ++tap) {
        const int64_t i = Quotient(tap, k), r = row - i + radius,
                      c = column - (tap - i * k) + radius;
        if (!inside(r, c)) continue;
        const A value = gradient_at(r * tiling.width + c);
        d_mean += value * weights[tap * 2];
        d_max += value * weights[tap * 2 + 1];
      }
    }
    params.positions_side[n * positions + p] =
        MakeSide(params.spatial_gate[n * positions + p], d_mean, params.channels, true, d_max,
                 params.count[n * positions + p], planes[positions + p]);
  }
  const auto store = [&params](int64_t tap, A sum) {
    params.partial[tap * params.blocks + params.first_block + BlockIndex()] = sum;
  };
  if (tiling.staged) {
    int* const corners = reinterpret_cast<int*>(gradients + tiling.window_values + 2 * k * k);
    SumTaps(tiling, tile, windows, gradients, corners, kThreads, store);
    return;
  }
  const int64_t taps = static_cast<int64_t>(k) * k * 2;
  CBAM_NO_UNROLL
  for (int64_t tap = ThreadIndex() / kWarp; tap <= taps; tap += kThreads / kWarp) {
    const int64_t i = Quotient(tap / 2, k), j = tap / 2 - i * k;
    A sum = A(0);
    for (int q = ThreadIndex() % kWarp; q < tile.size; q += kWarp) {
      const int64_t p = tile.begin + q, row = Quotient(p, tiling.width),
                    column = p - row * tiling.width;
      const int64_t r = row + i - radius, c = column + j - radius;
      const A value = gradient_at(p);
      if (tap == taps) {
        sum += value;
      } else if (inside(r, c)) {
        sum += value * planes[(tap % 2) * positions + r * tiling.width + c];
      }
    }
    sum = SumOverLanes(sum, kWarp);
    if (ThreadIndex() % kWarp == 0) store(tap, sum);
  }
}

// out[i] = sum of partial[i, :]. Grid: one block per i. Shared memory: a warp's worth of sums.
template <typename A>
struct SumParams {
  const A* partial;  // [outputs, count]
  int64_t count;
  A* out;            // outputs but those below
  int64_t split_at;  // from here on to out_rest
  A* out_rest;       // or null
};

template <typename A>
CBAM_KERNEL(1)
SumKernel(SumParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const int64_t output = BlockIndex();
  A sum = A(0);
  for (int64_t i = ThreadIndex(); i < params.count; i += kThreads)
    sum += params.partial[output * params.count + i];
  sum = BlockSum(sum, reinterpret_cast<A*>(SharedMemory()));
  if (ThreadIndex() != 0) return;
  if (output < params.split_at) {
    if (params.out != nullptr) params.out[output] = sum;
  } else if (params.out_rest != nullptr) {
    params.out_rest[output - params.split_at] = sum;
  }
}

// The sides of a pool's own gradient, from the gradients of its two results. Element (n, i) of the
// results is at n * sample_stride + i * element_stride.
template <typename T>
struct PoolSideParams {
  int64_t count;  // sides in all
  int64_t size;   // per sample
  int64_t sample_stride;
  int64_t element_stride;
  const T* maximum;
  const T* d_mean;
  const T* d_maximum;
  const Compute<T>* counts;  // null: only the maxima, in the compute type, to `maximum_out`
  Compute<T>* maximum_out;
  Compute<T> reduced;  // elements behind each result
  Side<Compute<T>>* sides;
};

template <typename T>
CBAM_KERNEL(2)
PoolSideKernel(PoolSideParams<T> params) {
  using A = Compute<T>;
  WaitForPredecessors();
  AllowSuccessors();
  const int64_t i = BlockIndex() * kThreads + ThreadIndex();
  if (i >= params.count) return;
  const int64_t at =
      i / params.size * params.sample_stride + i % params.size * params.element_stride;
  const A maximum = ToCompute(params.maximum[at]);
  if (params.counts == nullptr) {
    params.maximum_out[i] = maximum;
  } else {
    params.sides[i] = MakeSide(A(1), ToCompute(params.d_mean[at]), params.reduced, true,
                               ToCompute(params.d_maximum[at]), params.counts[i], maximum);
  }
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_SPATIAL_CUH_
