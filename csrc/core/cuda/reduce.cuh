// The four reductions over a map, and the gradient that is spread over it: one picture for both
// layouts.
//
// A sample is a row-major matrix: NHWC has positions as rows and channels as columns, NCHW the
// other way round. Every pass reduces over channels (a value per position) or over positions (a
// value per channel), that is along the rows or across them:
//
//   pass              reads        gives
//   kChannelPool      x            per channel: sum and maximum of x over positions
//   kSpatialPool      x            per position: sum and maximum of s over channels,
//                                  s = x g_c (x in the parallel order)
//   kSpatialGrad (A)  x, dy (, y)  per position: t = sum dy x g_c, and how many channels attain
//                                  the maximum of s
//   kChannelGrad (B)  x, dy (, y)  per channel: sum du x, and how many positions attain the maximum
//                                  of x
//   GradKernel   (C)  x, dy (, y)  dx (and d_residual), nothing reduced
//
// with dy masked by y > 0 where the module ends in a ReLU, and
//
//   du = dy g_s + da_s / C + (s == max s) dm_s / count    (parallel: dy g_s)
//   dx = du g_c + da / P + (x == max x) dm / count        (parallel: du g_c + the spatial terms +
//                                                          the channel terms)
//
// Bytes: each pass reads every element of the maps it names once, in 16-byte vectors, and writes 2
// values per row or column: 2/C or 2/P of a map. A (A, B) pass reads the two or four values per row
// or column that go with it, and keeps those of its own side in registers. What a pass reads again
// after another pass comes from L2: the launcher has few samples in flight.
//
// Row kernels: `lanes` threads share kRows rows, so that one load of the columns' values serves
// kRows rows and kRows loads of x are in flight per thread; the lanes' sums are folded by shuffles,
// beyond a warp through shared memory. Column kernels: each thread owns V columns and every
// `row_threads`-th row of its slice; slices are folded through shared memory (256 threads x V
// columns x 2 values = 8 KB in float, vectors of 4), and where a map is cut into several slices by
// CombineKernel, in order. Every order of summation depends on the problem alone: results repeat
// bitwise. The `lanes` of a row of 32 are 512 bytes in float: 4 whole lines.
#ifndef CBAM_OPS_CORE_CUDA_REDUCE_CUH_
#define CBAM_OPS_CORE_CUDA_REDUCE_CUH_

#include "core/cuda/device.cuh"

namespace cbam_ops {
namespace cuda {

enum class Pass { kChannelPool, kSpatialPool, kSpatialGrad, kChannelGrad };
template <Pass kPass>
constexpr bool kOverChannels = kPass == Pass::kSpatialPool || kPass == Pass::kSpatialGrad;
template <Pass kPass>
constexpr bool kIsPool = kPass == Pass::kChannelPool || kPass == Pass::kSpatialPool;

// What the gradient needs to know of a position or a channel: its gate, what every element gets,
// what each of the elements that equal the maximum gets besides, and that maximum. One 16-byte load
// in float.
template <typename A>
struct alignas(4 * sizeof(A)) Side {
  A gate;
  A mean_share;
  A max_share;
  A maximum;
};

// The neutral side: gate 1, no shares, equal to nothing.
template <typename A>
CBAM_DEVICE Side<A> NeutralSide() {
  return {A(1), A(0), A(0), NotANumber<A>()};
}

// The share of each of `count` equal maxima. Without any (the maximum is NaN) everything becomes
// NaN, as in TensorFlow: by way of the mean's share, which every element gets.
template <typename A>
CBAM_DEVICE Side<A> MakeSide(A gate, A d_mean, A size, bool has_max, A d_max, A count, A maximum) {
  Side<A> side = {gate, d_mean / size, A(0), NotANumber<A>()};
  if (has_max) {
    side.maximum = maximum;
    side.max_share = d_max / count;
    if (!(count > A(0))) side.mean_share = NotANumber<A>();
  }
  return side;
}

template <typename A>
struct ReduceParams {
  const void* x;
  const void* dy;  // null: count only
  const void* y;   // null: no mask
  int64_t positions;
  int64_t channels;
  const A* channel_gate;      // [n, C]; null is 1
  const A* channel_maximum;   // [n, C], pass B
  const A* position_maximum;  // pass A, at n * position_maximum_stride + p
  int64_t position_maximum_stride;
  const Side<A>* positions_side;  // [n, P], pass B; null is neutral
  bool parallel;                  // s = x, and du without the spatial terms

  // Where the results go: first[n * sample_stride + split * split_stride + i * element_stride],
  // likewise second.
  void* first;
  void* second;
  int64_t sample_stride;
  int64_t split_stride;
  int64_t element_stride;
  A divisor;         // of the first
  bool as_map_type;  // results have the map's type

  // The plan.
  int lanes;
  int row_threads;         // column kernels: kThreads / lanes
  int64_t tiles;           // row kernels: of rows; column kernels: of columns
  int64_t splits;          // column kernels
  int64_t rows_per_split;  // column kernels
};

template <typename T, typename A>
CBAM_DEVICE void StoreResult(const ReduceParams<A>& params, int64_t n, int64_t split, int64_t i,
                             A first, A second) {
  const int64_t at =
      n * params.sample_stride + split * params.split_stride + i * params.element_stride;
  first = first / params.divisor;
  if (params.as_map_type) {
    FromCompute(first, static_cast<T*>(params.first) + at);
    FromCompute(second, static_cast<T*>(params.second) + at);
  } else {
    static_cast<A*>(params.first)[at] = first;
    static_cast<A*>(params.second)[at] = second;
  }
}

// What goes with channel c of sample n, and with position p: only what the pass uses is loaded.
template <Pass kPass, typename A>
CBAM_DEVICE Side<A> ChannelSide(const ReduceParams<A>& params, int64_t n, int64_t c) {
  Side<A> side = NeutralSide<A>();
  if constexpr (kPass != Pass::kChannelPool) {
    if (params.channel_gate != nullptr) side.gate = params.channel_gate[n * params.channels + c];
  }
  if constexpr (kPass == Pass::kChannelGrad)
    side.maximum = params.channel_maximum[n * params.channels + c];
  return side;
}
template <Pass kPass, typename A>
CBAM_DEVICE Side<A> PositionSide(const ReduceParams<A>& params, int64_t n, int64_t p) {
  Side<A> side = NeutralSide<A>();
  if constexpr (kPass == Pass::kSpatialGrad) {
    side.maximum = params.position_maximum[n * params.position_maximum_stride + p];
  } else if constexpr (kPass == Pass::kChannelGrad) {
    if (params.positions_side != nullptr) side = params.positions_side[n * params.positions + p];
  }
  return side;
}

// One element into the two sums. The product that is compared with a maximum is rounded by itself,
// in forward and backward alike.
template <Pass kPass, typename A>
CBAM_DEVICE void Accumulate(A x, A dy, const Side<A>& channel, const Side<A>& position,
                            bool parallel, A* first, A* second) {
  if constexpr (kPass == Pass::kChannelPool) {
    *first += x;
    *second = Maximum(*second, x);
  } else if constexpr (kPass == Pass::kSpatialPool) {
    const A u = Multiply(x, channel.gate);
    *first += u;
    *second = Maximum(*second, u);
  } else if constexpr (kPass == Pass::kSpatialGrad) {
    const A u = Multiply(x, channel.gate);
    *first += dy * u;
    *second += (parallel ? x : u) == position.maximum ? A(1) : A(0);
  } else {
    A du = dy * position.gate;
    if (!parallel) {
      du += position.mean_share;
      if (Multiply(x, channel.gate) == position.maximum) du += position.max_share;
    }
    *first += du * x;
    *second += x == channel.maximum ? A(1) : A(0);
  }
}

// dy at an element: 0 where there is none, masked where the module ended in a ReLU.
template <typename T, int V, typename A>
CBAM_DEVICE void LoadGradient(const T* dy, const T* y, int64_t at, A (&result)[V]) {
  if (dy == nullptr) {
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) result[i] = A(0);
    return;
  }
  const Vec<T, V> loaded = Load<T, V>(dy + at);
  CBAM_UNROLL
  for (int i = 0; i < V; ++i) result[i] = ToCompute(loaded.value[i]);
  if (y != nullptr) {
    const Vec<T, V> output = Load<T, V>(y + at);
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) result[i] = ToCompute(output.value[i]) > A(0) ? result[i] : A(0);
  }
}

// Rows per group of lanes: four loads of x in flight per thread, or two each of x and dy.
template <Pass kPass>
constexpr int kRowsAtOnce = kIsPool<kPass> ? 4 : 2;

// Along the rows. Grid: samples x tiles; a tile is (kThreads / lanes) * kRowsAtOnce rows.
// Shared memory: where lanes > kWarp, 2 * kRowsAtOnce values per warp.
template <typename T, int V, Pass kPass>
CBAM_KERNEL(V * sizeof(Compute<T>) > 16 || sizeof(T) == 8 ? 2 : 3)
RowReduceKernel(ReduceParams<Compute<T>> params) {
  using A = Compute<T>;
  constexpr int kRows = kRowsAtOnce<kPass>;
  constexpr bool kRowsArePositions = kOverChannels<kPass>;
  WaitForPredecessors();
  AllowSuccessors();
  const int64_t rows = kRowsArePositions ? params.positions : params.channels;
  const int64_t columns = kRowsArePositions ? params.channels : params.positions;
  const int lane = ThreadIndex() % params.lanes, group = ThreadIndex() / params.lanes;
  const int64_t n = Quotient(BlockIndex(), params.tiles),
                tile = Remainder(BlockIndex(), params.tiles);
  const int64_t first_row = (tile * (kThreads / params.lanes) + group) * kRows;
  const int64_t sample = n * rows * columns;
  const T* const x = static_cast<const T*>(params.x);
  const T* const dy = static_cast<const T*>(params.dy);
  const T* const y = static_cast<const T*>(params.y);

  int64_t offsets[kRows];
  Side<A> row_sides[kRows];
  A first[kRows], second[kRows];
  CBAM_UNROLL
  for (int k = 0; k < kRows; ++k) {
    const int64_t row =
        Smaller(first_row + k, rows - 1);  // beyond the end: read the last row again, store nothing
    offsets[k] = sample + row * columns;
    row_sides[k] = kRowsArePositions ? PositionSide<kPass>(params, n, row)
                                     : ChannelSide<kPass>(params, n, row);
    first[k] = A(0);
    second[k] = kIsPool<kPass> ? Lowest<A>() : A(0);
  }
  for (int64_t column = static_cast<int64_t>(lane) * V; column < columns;
       column += static_cast<int64_t>(params.lanes) * V) {
    Vec<T, V> xs[kRows];
    A dys[kRows][V];
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      xs[k] = Load<T, V>(x + offsets[k] + column);
      if constexpr (!kIsPool<kPass>) LoadGradient<T, V>(dy, y, offsets[k] + column, dys[k]);
    }
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) {
      const Side<A> side = kRowsArePositions ? ChannelSide<kPass>(params, n, column + i)
                                             : PositionSide<kPass>(params, n, column + i);
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        const A value = ToCompute(xs[k].value[i]);
        const A gradient = kIsPool<kPass> ? A(0) : dys[k][i];
        if constexpr (kRowsArePositions) {
          Accumulate<kPass>(value, gradient, side, row_sides[k], params.parallel, &first[k],
                            &second[k]);
        } else {
          Accumulate<kPass>(value, gradient, row_sides[k], side, params.parallel, &first[k],
                            &second[k]);
        }
      }
    }
  }
  const int width = params.lanes < kWarp ? params.lanes : kWarp;
  CBAM_UNROLL
  for (int k = 0; k < kRows; ++k) {
    first[k] = SumOverLanes(first[k], width);
    second[k] =
        kIsPool<kPass> ? MaximumOverLanes(second[k], width) : SumOverLanes(second[k], width);
  }
  if (params.lanes > kWarp) {
    // All threads share these rows: one group.
    A* const shared = reinterpret_cast<A*>(SharedMemory());
    const int warp = ThreadIndex() / kWarp;
    if (ThreadIndex() % kWarp == 0) {
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        shared[(warp * kRows + k) * 2] = first[k];
        shared[(warp * kRows + k) * 2 + 1] = second[k];
      }
    }
    Barrier();
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      first[k] = shared[k * 2];
      second[k] = shared[k * 2 + 1];
      for (int w = 1; w < kThreads / kWarp; ++w) {
        first[k] += shared[(w * kRows + k) * 2];
        const A other = shared[(w * kRows + k) * 2 + 1];
        second[k] = kIsPool<kPass> ? Maximum(second[k], other) : second[k] + other;
      }
    }
  }
  if (lane == 0) {
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      if (first_row + k < rows) StoreResult<T>(params, n, 0, first_row + k, first[k], second[k]);
    }
  }
}

// Across the rows. Grid: samples x splits x tiles; a tile is lanes * V columns.
// Shared memory: 2 * kThreads * V values.
template <typename T, int V, Pass kPass>
CBAM_KERNEL(V * sizeof(Compute<T>) > 16 ? 2 : 3)
ColumnReduceKernel(ReduceParams<Compute<T>> params) {
  using A = Compute<T>;
  constexpr bool kColumnsArePositions = kOverChannels<kPass>;
  constexpr int kUnroll = kIsPool<kPass> ? 4 : 2;  // rows in flight per thread
  WaitForPredecessors();
  AllowSuccessors();
  const int64_t rows = kColumnsArePositions ? params.channels : params.positions;
  const int64_t columns = kColumnsArePositions ? params.positions : params.channels;
  const int lane = ThreadIndex() % params.lanes, row_thread = ThreadIndex() / params.lanes;
  const int64_t tile = Remainder(BlockIndex(), params.tiles);
  const int64_t slice = Quotient(BlockIndex(), params.tiles);
  const int64_t split = Remainder(slice, params.splits);
  const int64_t n = Quotient(slice, params.splits);
  const int64_t tile_column = tile * params.lanes * V;
  const int64_t column = tile_column + static_cast<int64_t>(lane) * V;
  const int64_t begin = split * params.rows_per_split,
                end = Smaller(begin + params.rows_per_split, rows);
  const T* const x = static_cast<const T*>(params.x);
  const T* const dy = static_cast<const T*>(params.dy);
  const T* const y = static_cast<const T*>(params.y);

  A first[V], second[V];
  CBAM_UNROLL
  for (int i = 0; i < V; ++i) {
    first[i] = A(0);
    second[i] = kIsPool<kPass> ? Lowest<A>() : A(0);
  }
  if (column < columns) {
    Side<A> sides[V];
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) {
      sides[i] = kColumnsArePositions ? PositionSide<kPass>(params, n, column + i)
                                      : ChannelSide<kPass>(params, n, column + i);
    }
    const int64_t base = n * rows * columns + column;
    for (int64_t row = begin + row_thread; row < end;
         row += static_cast<int64_t>(params.row_threads) * kUnroll) {
      Vec<T, V> xs[kUnroll];
      A dys[kUnroll][V];
      CBAM_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t at =
            base + Smaller(row + static_cast<int64_t>(k) * params.row_threads, end - 1) * columns;
        xs[k] = Load<T, V>(x + at);
        if constexpr (!kIsPool<kPass>) LoadGradient<T, V>(dy, y, at, dys[k]);
      }
      CBAM_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t this_row = row + static_cast<int64_t>(k) * params.row_threads;
        if (this_row >= end) continue;
        const Side<A> side = kColumnsArePositions ? ChannelSide<kPass>(params, n, this_row)
                                                  : PositionSide<kPass>(params, n, this_row);
        CBAM_UNROLL
        for (int i = 0; i < V; ++i) {
          const A value = ToCompute(xs[k].value[i]);
          const A gradient = kIsPool<kPass> ? A(0) : dys[k][i];
          if constexpr (kColumnsArePositions) {
            Accumulate<kPass>(value, gradient, side, sides[i], params.parallel, &first[i],
                              &second[i]);
          } else {
            Accumulate<kPass>(value, gradient, sides[i], side, params.parallel, &first[i],
                              &second[i]);
          }
        }
      }
    }
  }
  const int width = params.lanes * V;  // columns of the tile
  A* const firsts = reinterpret_cast<A*>(SharedMemory());
  A* const seconds = firsts + kThreads * V;
  CBAM_UNROLL
  for (int i = 0; i < V; ++i) {
    firsts[row_thread * width + lane * V + i] = first[i];
    seconds[row_thread * width + lane * V + i] = second[i];
  }
  Barrier();
  for (int c = ThreadIndex(); c < width; c += kThreads) {
    if (tile_column + c >= columns) continue;
    A sum = firsts[c], other = seconds[c];
    for (int r = 1; r < params.row_threads; ++r) {
      sum += firsts[r * width + c];
      const A value = seconds[r * width + c];
      other = kIsPool<kPass> ? Maximum(other, value) : other + value;
    }
    StoreResult<T>(params, n, split, tile_column + c, sum, other);
  }
}

// The slices of a column reduction, in order. Grid: samples x tiles of kWarp channels; each of 8
// warps takes every 8th slice. Shared memory: 2 * kThreads values.
template <typename A>
struct CombineParams {
  const A* first;  // [n, splits, C]
  const A* second;
  int64_t channels;
  int64_t splits;
  int64_t tiles;
  A divisor;
  A* first_out;  // [n, C]
  A* second_out;
};

template <typename A, bool kMaximum>
CBAM_KERNEL(1)
CombineKernel(CombineParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const int lane = ThreadIndex() % kWarp, warp = ThreadIndex() / kWarp;
  const int64_t n = Quotient(BlockIndex(), params.tiles),
                c = Remainder(BlockIndex(), params.tiles) * kWarp + lane;
  A sum = A(0), other = kMaximum ? Lowest<A>() : A(0);
  if (c < params.channels) {
    for (int64_t split = warp; split < params.splits; split += kThreads / kWarp) {
      const int64_t at = (n * params.splits + split) * params.channels + c;
      sum += params.first[at];
      other = kMaximum ? Maximum(other, params.second[at]) : other + params.second[at];
    }
  }
  A* const sums = reinterpret_cast<A*>(SharedMemory());
  A* const others = sums + kThreads;
  sums[ThreadIndex()] = sum;
  others[ThreadIndex()] = other;
  Barrier();
  if (warp == 0 && c < params.channels) {
    for (int w = 1; w < kThreads / kWarp; ++w) {
      sum += sums[w * kWarp + lane];
      const A value = others[w * kWarp + lane];
      other = kMaximum ? Maximum(other, value) : other + value;
    }
    params.first_out[n * params.channels + c] = sum / params.divisor;
    params.second_out[n * params.channels + c] = other;
  }
}

// Pass C at an element.
template <typename A>
CBAM_DEVICE A MapGradient(A x, A dy, const Side<A>& channel, const Side<A>& position,
                          bool parallel) {
  const A source = parallel ? x : Multiply(x, channel.gate);
  const A du = dy * position.gate;
  A spatial = position.mean_share;
  if (source == position.maximum) spatial += position.max_share;
  A result = parallel ? du * channel.gate + spatial : (du + spatial) * channel.gate;
  result += channel.mean_share;
  if (x == channel.maximum) result += channel.max_share;
  return result;
}

template <typename A>
struct GradParams {
  const void* x;
  const void* dy;  // null in the gradients of the pools
  const void* y;   // null: no mask
  int64_t positions;
  int64_t channels;
  const Side<A>* channels_side;   // [n, C]; null is neutral
  const Side<A>* positions_side;  // [n, P]; null is neutral
  bool parallel;
  void* dx;
  void* d_residual;  // null where not wanted

  int lanes;
  int64_t row_tiles;
  int64_t column_tiles;
  int64_t columns_per_tile;  // a multiple of lanes * V
};

// Pass C. Grid: samples x row tiles x column tiles; a row tile is (kThreads / lanes) * 4 rows.
template <typename T, int V, bool kRowsArePositions>
CBAM_KERNEL(2)
GradKernel(GradParams<Compute<T>> params) {
  using A = Compute<T>;
  constexpr int kRows =
      V * sizeof(A) > 16 ? 2 : 4;  // 8 half-type elements are twice the registers of 4 floats
  WaitForPredecessors();
  AllowSuccessors();
  const int64_t rows = kRowsArePositions ? params.positions : params.channels;
  const int64_t columns = kRowsArePositions ? params.channels : params.positions;
  const int lane = ThreadIndex() % params.lanes, group = ThreadIndex() / params.lanes;
  const int64_t column_tile = Remainder(BlockIndex(), params.column_tiles);
  const int64_t rest = Quotient(BlockIndex(), params.column_tiles);
  const int64_t row_tile = Remainder(rest, params.row_tiles);
  const int64_t n = Quotient(rest, params.row_tiles);
  const int64_t first_row = (row_tile * (kThreads / params.lanes) + group) * kRows;
  const int64_t first_column = column_tile * params.columns_per_tile;
  const int64_t last_column = Smaller(first_column + params.columns_per_tile, columns);
  const int64_t sample = n * rows * columns;
  const Side<A>* const row_sides_at =
      kRowsArePositions ? params.positions_side : params.channels_side;
  const Side<A>* const column_sides_at =
      kRowsArePositions ? params.channels_side : params.positions_side;
  const T* const x = static_cast<const T*>(params.x);
  const T* const dy = static_cast<const T*>(params.dy);
  const T* const y = static_cast<const T*>(params.y);

  Side<A> row_sides[kRows];
  CBAM_UNROLL
  for (int k = 0; k < kRows; ++k) {
    row_sides[k] = NeutralSide<A>();
    if (row_sides_at != nullptr && first_row + k < rows)
      row_sides[k] = row_sides_at[n * rows + first_row + k];
  }
  for (int64_t column = first_column + static_cast<int64_t>(lane) * V; column < last_column;
       column += static_cast<int64_t>(params.lanes) * V) {
    Vec<T, V> xs[kRows];
    A dys[kRows][V];
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const int64_t at = sample + Smaller(first_row + k, rows - 1) * columns + column;
      xs[k] = Load<T, V>(x + at);
      LoadGradient<T, V>(dy, y, at, dys[k]);
    }
    Vec<T, V> results[kRows];
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) {
      const Side<A> side =
          column_sides_at != nullptr ? column_sides_at[n * columns + column + i] : NeutralSide<A>();
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        const Side<A>& channel = kRowsArePositions ? side : row_sides[k];
        const Side<A>& position = kRowsArePositions ? row_sides[k] : side;
        const A value = ToCompute(xs[k].value[i]);
        const A result = MapGradient(value, dys[k][i], channel, position, params.parallel);
        FromCompute(result, &results[k].value[i]);
      }
    }
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      if (first_row + k >= rows) continue;
      const int64_t at = sample + (first_row + k) * columns + column;
      StoreStreaming<T, V>(static_cast<T*>(params.dx) + at, results[k]);
      if (params.d_residual != nullptr) {
        Vec<T, V> masked;
        CBAM_UNROLL
        for (int i = 0; i < V; ++i) FromCompute(dys[k][i], &masked.value[i]);
        StoreStreaming<T, V>(static_cast<T*>(params.d_residual) + at, masked);
      }
    }
  }
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_REDUCE_CUH_
