// The passes over maps: four reductions, and two that give a map. One picture for both layouts.
//
// A sample is a row-major matrix: NHWC has positions as rows and channels as columns, NCHW the
// other way round. A pass reduces over channels (a value per position) or over positions (a value
// per channel), that is along the rows or across them:
//
//   pass              reads        gives
//   kChannelPool      x            per channel: sum and maximum of x over positions
//   kSpatialPool      x            per position: sum and maximum of s over channels,
//                                  s = x g_c (x in the parallel order)
//   kSpatialGrad (A)  x, dy (, y)  per position: t = sum dy x g_c, and how many channels attain
//                                  the maximum of s
//   kChannelGrad (B)  x, dy (, y)  per channel: sum du x, and how many positions attain the maximum
//                                  of x
//   Apply             x            y = act(x g_c g_s + residual)
//   MapGrad (C)       x, dy (, y)  dx (and d_residual)
//
// with dy masked by y > 0 where the module ends in a ReLU, and
//
//   du = dy g_s + da_s / C + (s == max s) dm_s / count    (not serial: dy g_s)
//   dx = du g_c + da / P + (x == max x) dm / count        (not serial: du g_c + the spatial terms +
//                                                          the channel terms)
//
// An item is a tile of about 32 KB of the maps it reads. What goes with its columns a thread holds
// in registers as vectors, what goes with a row is one load for all of the row that it has; options
// are template arguments or values, never branches in the inner loop.
//
// Along the rows, `lanes` threads share a row, kRows rows at a time; their sums are folded by
// shuffles, beyond a warp through shared memory. Across the rows a thread has V columns and every
// (threads / lanes)-th row of the tile; lanes are 128 to 512 bytes, and the fold is the same. What
// several tiles give for one result is folded by who reads it (Fold), in the order of the tiles: no
// sum depends on who came first.
//
// Where channels of NCHW are not of whole vectors, as with 7 x 7 positions, some make a row (`folded`):
// what goes with a row is then that of one channel or of two for each vector.
#ifndef CBAM_OPS_CORE_CUDA_MAPS_CUH_
#define CBAM_OPS_CORE_CUDA_MAPS_CUH_

#include "core/cuda/sides.cuh"

namespace cbam_ops {
namespace cuda {

enum class Pass { kChannelPool, kSpatialPool, kSpatialGrad, kChannelGrad };
template <Pass kPass>
constexpr bool kOverChannels = kPass == Pass::kSpatialPool || kPass == Pass::kSpatialGrad;
template <Pass kPass>
constexpr bool kIsPool = kPass == Pass::kChannelPool || kPass == Pass::kSpatialPool;

// How a kernel reads maps.
template <typename T_, int V_, bool kChannelsLast_, bool kFolded_ = false>
struct MapTraits {
  using T = T_;
  using A = Compute<T>;
  static constexpr int V = V_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr bool kFolded = kFolded_;  // a row is several channels
};

// What reaches a map's gradient: nothing, dy, or dy masked by y > 0.
enum class Gradient { kNone, kPlain, kMasked };
// Maps that are read or written then.
template <Gradient kGradient>
constexpr int kMaps = kGradient == Gradient::kMasked ? 3 : 2;

// Calls pass(gradient, as a type) with what reaches the maps' gradients in a reduction.
template <Pass kPass, typename A, typename RunPass>
CBAM_DEVICE void WithGradient(const Call<A>& call, RunPass pass) {
  if constexpr (kIsPool<kPass>) {
    pass(std::integral_constant<Gradient, Gradient::kNone>());
  } else if (call.mask != nullptr) {
    pass(std::integral_constant<Gradient, Gradient::kMasked>());
  } else {
    pass(std::integral_constant<Gradient, Gradient::kPlain>());
  }
}

// V values in the compute type, from wherever they are.
template <int V, typename A>
CBAM_DEVICE void LoadOr(const A* values, int64_t at, A otherwise, A (&result)[V]) {
  if (values != nullptr) {
    const Vec<A, V> loaded = Load<A, V>(values + at);
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) result[i] = loaded.value[i];
  } else {
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) result[i] = otherwise;
  }
}

// Where V columns lie: in a row that is several channels, in which of these, at which position;
// elements from `left` on are the next channel's.
struct Segment {
  uint32_t channel = 0;  // of the row's
  uint32_t next = 0;
  uint32_t position = 0;
  uint32_t left = 0;
};
template <typename M>
CBAM_DEVICE Segment SegmentAt(const Call<typename M::A>& call, uint32_t column) {
  if constexpr (!M::kFolded) return {0, 0, column, M::V};
  const auto positions = static_cast<uint32_t>(call.positions);
  const uint32_t channel = column / positions;
  const uint32_t position = column - channel * positions, left = positions - position;
  return {channel, channel + (left < M::V ? 1 : 0), position, left};
}

// What goes with V elements of a row: with its channel, or with two.
template <typename M, typename State>
struct OfRow {
  State state[M::kFolded ? 2 : 1];

  CBAM_DEVICE State At(uint32_t i, uint32_t left) const {
    if constexpr (M::kFolded) return Select(i < left, state[0], state[1]);
    return state[0];
  }
};
// load(row), or of a row that is several channels load(channel).
template <typename M, typename State, typename Load>
CBAM_DEVICE OfRow<M, State> LoadOfRow(const Call<typename M::A>& call, uint32_t row,
                                      const Segment& segment, Load load) {
  if constexpr (M::kFolded) {
    const int64_t first = int64_t{row} * call.fold;
    return {{load(first + segment.channel), load(first + segment.next)}};
  } else {
    return {{load(row)}};
  }
}

// What goes with V columns: an array's values of sample n, at `stride` from sample to sample.
template <typename M, typename A>
CBAM_DEVICE void LoadColumns(const Call<A>& call, const A* values, int64_t n, int64_t stride,
                             const Segment& segment, A otherwise, A (&result)[M::V]) {
  const int64_t start = n * stride;
  if constexpr (M::kFolded) {
    const auto positions = static_cast<uint32_t>(call.positions);
    uint32_t position = segment.position;
    CBAM_UNROLL
    for (int i = 0; i < M::V; ++i) {
      result[i] = values != nullptr ? values[start + position] : otherwise;
      position = position + 1 == positions ? 0 : position + 1;
    }
  } else {
    LoadOr<M::V>(values, start + segment.position, otherwise, result);
  }
}

// x and what reaches the result at V elements: as loaded, and then in the compute type.
template <typename M, Gradient kGradient, bool kLast>
struct Elements {
  using T = typename M::T;
  using A = typename M::A;
  static constexpr int V = M::V;
  Vec<T, V> x, dy, y;

  CBAM_DEVICE void LoadAt(const Call<A>& call, int64_t at) {
    const auto load = [at](const void* map) {
      const T* const pointer = static_cast<const T*>(map) + at;
      return kLast ? LoadLast<T, V>(pointer) : Load<T, V>(pointer);
    };
    x = load(call.x);
    if constexpr (kGradient != Gradient::kNone) dy = load(call.dy);
    if constexpr (kGradient == Gradient::kMasked) y = load(call.mask);
  }
  CBAM_DEVICE A X(int i) const { return At(x, i); }
  CBAM_DEVICE A Dy(int i) const {
    if constexpr (kGradient == Gradient::kNone) {
      return A(0);
    } else {
      const A value = At(dy, i);
      if constexpr (kGradient == Gradient::kMasked) return At(y, i) > A(0) ? value : A(0);
      return value;
    }
  }
};

// The channels' gate in a pass: none where the spatial descriptors are of x itself.
template <Pass kPass, typename A>
CBAM_DEVICE const A* GateOf(const Call<A>& call) {
  return kPass == Pass::kSpatialPool && !call.serial ? nullptr : call.channel_gate;
}

// The sides of V columns.
template <typename M>
struct ColumnSides {
  using A = typename M::A;
  static constexpr int V = M::V;
  A gate[V], share[V], maximum_share[V], maximum[V];

  // All that the gradient needs; neutral where there are none.
  CBAM_DEVICE void LoadAll(const A* data, int64_t stride, int64_t column) {
    LoadOr<V>(data, column, A(1), gate);
    LoadOr<V>(data, stride + column, A(0), share);
    LoadOr<V>(data, 2 * stride + column, A(0), maximum_share);
    LoadOr<V>(data, 3 * stride + column, NotANumber<A>(), maximum);
  }
  CBAM_DEVICE Side<A> At(int i) const { return {gate[i], share[i], maximum_share[i], maximum[i]}; }
};
// Those of a sample, or null.
template <typename A>
CBAM_DEVICE const A* DataOf(const Sides<A>& sides, int64_t n) {
  return sides.data != nullptr ? sides.data + n * 4 * sides.stride : nullptr;
}
// The side of a row.
template <typename A>
CBAM_DEVICE Side<A> RowSideOf(const A* sides, int64_t at) {
  return reinterpret_cast<const Side<A>*>(sides)[at];
}

// What a reduction needs to know of a channel and of a position: only what the pass uses is loaded.
// As columns.
template <Pass kPass, typename M, typename A>
CBAM_DEVICE ColumnSides<M> ColumnSidesFor(const Call<A>& call, int64_t n, uint32_t column) {
  ColumnSides<M> sides = {};
  const Segment segment = SegmentAt<M>(call, column);
  const auto load = [&](const A* values, int64_t stride, A otherwise, A(&result)[M::V]) {
    LoadColumns<M>(call, values, n, stride, segment, otherwise, result);
  };
  if constexpr (M::kChannelsLast) {
    if constexpr (kPass != Pass::kChannelPool)
      load(GateOf<kPass>(call), call.channels, A(1), sides.gate);
    if constexpr (kPass == Pass::kChannelGrad)
      load(call.channel_maximum, call.channels, NotANumber<A>(), sides.maximum);
  } else if constexpr (kPass == Pass::kSpatialGrad) {
    load(call.position_maximum, call.position_stride, NotANumber<A>(), sides.maximum);
  } else if constexpr (kPass == Pass::kChannelGrad) {
    const Sides<A>& positions = call.position_sides;
    if (call.serial) {
      sides.LoadAll(DataOf(positions, n), positions.stride, column);
    } else {
      load(call.spatial_gate, call.positions, A(1), sides.gate);
    }
  }
  return sides;
}
// As a row.
template <Pass kPass, typename M, typename A>
CBAM_DEVICE Side<A> RowSideFor(const Call<A>& call, int64_t n, int64_t row) {
  Side<A> side = NeutralSide<A>();
  const int64_t at = n * (M::kChannelsLast ? call.positions : call.channels) + row;
  if constexpr (!M::kChannelsLast) {
    if constexpr (kPass != Pass::kChannelPool) {
      if (GateOf<kPass>(call) != nullptr) side.gate = GateOf<kPass>(call)[at];
    }
    if constexpr (kPass == Pass::kChannelGrad) side.maximum = call.channel_maximum[at];
  } else if constexpr (kPass == Pass::kSpatialGrad) {
    side.maximum = call.position_maximum[n * call.position_stride + row];
  } else if constexpr (kPass == Pass::kChannelGrad) {
    if (call.serial) {
      side = RowSideOf(call.position_sides.data, at);
    } else if (call.spatial_gate != nullptr) {
      side.gate = call.spatial_gate[at];
    }
  }
  return side;
}

// Which of a row's and a column's side is the channel's, and which the position's.
template <typename M, typename A>
CBAM_DEVICE const Side<A>& ChannelOf(const Side<A>& row, const Side<A>& column) {
  return M::kChannelsLast ? column : row;
}
template <typename M, typename A>
CBAM_DEVICE const Side<A>& PositionOf(const Side<A>& row, const Side<A>& column) {
  return M::kChannelsLast ? row : column;
}

// One element into the two sums. The product that is compared with a maximum is rounded by itself,
// in forward and backward alike.
template <typename M, Pass kPass, typename A>
CBAM_DEVICE void Accumulate(A x, A dy, const Side<A>& row, const Side<A>& column, bool serial,
                            A* first, A* second) {
  const Side<A>& channel = ChannelOf<M>(row, column);
  const Side<A>& position = PositionOf<M>(row, column);
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
    *second = CountEqual(serial ? u : x, position.maximum, *second);
  } else {
    // Of which the shares are 0 where the order is not serial.
    A du = dy * position.gate;
    du += Multiply(x, channel.gate) == position.maximum ? position.maximum_share : position.share;
    *first += du * x;
    *second = CountEqual(x, channel.maximum, *second);
  }
}

template <Pass kPass, typename A>
CBAM_DEVICE A Join(A one, A other) {
  if constexpr (kIsPool<kPass>) return Maximum(one, other);
  return one + other;
}

template <Pass kPass, typename A>
CBAM_DEVICE void StoreReduced(const Call<A>& call, int64_t n, int64_t slice, int64_t i, A first,
                              A second) {
  StoreSlice(kOverChannels<kPass> ? call.spatial_pass : call.channel_pass, n, slice, i, first,
             second);
}

// A tile of a sample.
struct Tile {
  uint32_t down;
  uint32_t across;
  uint32_t row;
  uint32_t end_row;
  uint32_t column;
  uint32_t end_column;
};
CBAM_DEVICE Tile TileAt(uint32_t rows, uint32_t columns, const Tiles& tiles, uint32_t index) {
  Tile tile;
  tile.down = index / tiles.across;
  tile.across = index - tile.down * tiles.across;
  tile.row = tile.down * tiles.rows;
  tile.end_row = Smaller(tile.row + tiles.rows, rows);
  tile.column = tile.across * tiles.columns;
  tile.end_column = Smaller(tile.column + tiles.columns, columns);
  return tile;
}

// Along the rows: a slice is a tile of columns. Where channels are not of whole vectors the first and
// the last of each are partly another's, and the channels that a thread has at once are kFold apart,
// so that their vectors lie alike: columns count from the first of kFold channels.
template <typename M, Pass kPass, Gradient kGradient>
CBAM_DEVICE void ReduceRows(const Call<typename M::A>& call, int64_t n, int64_t index) {
  using T = typename M::T;
  using A = typename M::A;
  constexpr int V = M::V, kRows = RowsAtOnce<T>(V, kIsPool<kPass> ? 1 : kMaps<kGradient>);
  const Tiles& tiles = kOverChannels<kPass> ? call.spatial_tiles : call.channel_tiles;
  const int lanes = tiles.lanes(), lane = ThreadIndex() & (lanes - 1);
  const int group = ThreadIndex() >> tiles.lane_bits, batch = (kThreads >> tiles.lane_bits) * kRows;
  constexpr bool kFolded = M::kFolded;
  constexpr int kFold = kFolded ? V : 1;  // channels after which vectors lie alike
  const int part = group % kFold;
  const int warp_group = ThreadIndex() / kWarp * kWarp >> tiles.lane_bits;
  const int64_t base = n * call.rows * call.columns;
  const auto row_count = static_cast<uint32_t>(M::kChannelsLast ? call.positions : call.channels);
  const auto column_count =
      static_cast<uint32_t>(M::kChannelsLast ? call.channels : call.positions);
  const Tile tile = TileAt(row_count, column_count, tiles, index);
  const uint32_t begin_column = part * column_count + tile.column;
  const uint32_t end_column = part * column_count + tile.end_column;
  const uint32_t first_column = kFolded ? begin_column / V * V : begin_column;
  const uint32_t size = end_column - begin_column;
  const bool serial = call.serial;
  CBAM_NO_UNROLL
  for (uint32_t begin = tile.row; begin < tile.end_row; begin += batch) {
    if (begin + warp_group / kFold * kFold * kRows >= tile.end_row) break;  // all of the warp
    const uint32_t row = begin + group / kFold * kFold * kRows + part;
    int64_t offsets[kRows];
    Side<A> row_sides[kRows];
    A first[kRows], second[kRows];
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      // Beyond the end: read the last row again, store nothing.
      const uint32_t this_row = Smaller(row + k * kFold, tile.end_row - kFold + part);
      offsets[k] = base + int64_t{this_row - part} * column_count;
      row_sides[k] = RowSideFor<kPass, M>(call, n, this_row);
      first[k] = A(0);
      second[k] = kIsPool<kPass> ? Lowest<A>() : A(0);
    }
    CBAM_NO_UNROLL
    for (uint32_t column = first_column + lane * V; column < end_column; column += lanes * V) {
      Elements<M, kGradient, false> elements[kRows];
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) elements[k].LoadAt(call, offsets[k] + column);
      const ColumnSides<M> sides = ColumnSidesFor<kPass, M>(call, n, column);
      CBAM_UNROLL
      for (int i = 0; i < V; ++i) {
        if (kFolded && column - begin_column + i >= size) continue;
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          Accumulate<M, kPass>(elements[k].X(i), elements[k].Dy(i), row_sides[k], sides.At(i),
                               serial, &first[k], &second[k]);
        }
      }
    }
    CBAM_NO_UNROLL
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        first[k] += ShuffleXor(first[k], mask);
        second[k] = Join<kPass>(second[k], ShuffleXor(second[k], mask));
      }
    }
    if (lane == 0) {
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        if (row + k * kFold < tile.end_row)
          StoreReduced<kPass>(call, n, tile.across, row + k * kFold, first[k], second[k]);
      }
    }
  }
}

// What a thread sums in a tile's rows from `row` on, every row_threads-th of them, of V columns.
template <typename M, Pass kPass, Gradient kGradient, typename A>
CBAM_DEVICE void SumColumns(const Call<A>& call, int64_t n, const Tile& tile, uint32_t row,
                            uint32_t column, int row_threads, A (&first)[M::V], A (&second)[M::V]) {
  constexpr int V = M::V,
                kRows = RowsAtOnce<typename M::T>(V, kIsPool<kPass> ? 1 : kMaps<kGradient>);
  const bool serial = call.serial;
  const ColumnSides<M> sides = ColumnSidesFor<kPass, M>(call, n, column);
  const Segment segment = SegmentAt<M>(call, column);
  const int64_t base = n * call.rows * call.columns + column;
  CBAM_NO_UNROLL
  for (; row < tile.end_row; row += row_threads * kRows) {
    Elements<M, kGradient, false> elements[kRows];
    OfRow<M, Side<A>> row_sides[kRows];
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const uint32_t this_row = Smaller(row + k * row_threads, tile.end_row - 1);
      elements[k].LoadAt(call, base + int64_t{this_row} * call.columns);
      row_sides[k] = LoadOfRow<M, Side<A>>(
          call, this_row, segment,
          [&](int64_t i) CBAM_INLINE_LAMBDA { return RowSideFor<kPass, M>(call, n, i); });
    }
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      if (row + k * row_threads >= tile.end_row) continue;
      CBAM_UNROLL
      for (int i = 0; i < V; ++i) {
        Accumulate<M, kPass>(elements[k].X(i), elements[k].Dy(i), row_sides[k].At(i, segment.left),
                             sides.At(i), serial, &first[i], &second[i]);
      }
    }
  }
}

// Across the rows: a slice is a tile of rows, or where a row is several channels a tile.
template <typename M, Pass kPass>
CBAM_DEVICE void ReduceColumns(const Call<typename M::A>& call, int64_t n, int64_t index) {
  using A = typename M::A;
  constexpr int V = M::V, kWarps = kThreads / kWarp;
  const Tiles& tiles = kOverChannels<kPass> ? call.spatial_tiles : call.channel_tiles;
  const int lanes = tiles.lanes(), lane = ThreadIndex() & (lanes - 1);
  const Tile tile = TileAt(call.rows, call.columns, tiles, index);
  const uint32_t column = tile.column + lane * V;
  A first[V], second[V];
  CBAM_UNROLL
  for (int i = 0; i < V; ++i) {
    first[i] = A(0);
    second[i] = kIsPool<kPass> ? Lowest<A>() : A(0);
  }
  if (column < call.columns) {
    WithGradient<kPass>(call, [&](auto gradient) CBAM_INLINE_LAMBDA {
      SumColumns<M, kPass, decltype(gradient)::value>(
          call, n, tile, tile.row + (ThreadIndex() >> tiles.lane_bits), column,
          kThreads >> tiles.lane_bits, first, second);
    });
  }
  // Lanes of a warp that have the same columns, then warps.
  CBAM_NO_UNROLL
  for (int mask = lanes; mask < kWarp; mask *= 2) {
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) {
      first[i] += ShuffleXor(first[i], mask);
      second[i] = Join<kPass>(second[i], ShuffleXor(second[i], mask));
    }
  }
  const int width = lanes * V;
  A* const firsts = Shared<A>();
  A* const seconds = firsts + kWarps * width;
  if (ThreadIndex() % kWarp < lanes) {
    Vec<A, V> values, others;
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) {
      values.value[i] = first[i];
      others.value[i] = second[i];
    }
    const int at = ThreadIndex() / kWarp * width + lane * V;
    *reinterpret_cast<Vec<A, V>*>(firsts + at) = values;
    *reinterpret_cast<Vec<A, V>*>(seconds + at) = others;
  }
  Barrier();
  if constexpr (M::kFolded) {
    // What a tile has of each position: of those it does not have, nothing.
    const auto positions = static_cast<uint32_t>(call.positions);
    const uint32_t last = tile.end_column - tile.column, before = tile.column % positions;
    CBAM_NO_UNROLL
    for (uint32_t position = ThreadIndex(); position < positions; position += kThreads) {
      A sum = A(0), other = kIsPool<kPass> ? Lowest<A>() : A(0);
      CBAM_NO_UNROLL
      for (uint32_t c = position - before + (position < before ? positions : 0); c < last;
           c += positions) {
        for (int w = 0; w < kWarps; ++w) {
          sum += firsts[w * width + c];
          other = Join<kPass>(other, seconds[w * width + c]);
        }
      }
      StoreReduced<kPass>(call, n, index, position, sum, other);
    }
  } else {
    CBAM_NO_UNROLL
    for (int c = ThreadIndex(); c < width; c += kThreads) {
      if (tile.column + c >= call.columns) continue;
      A sum = firsts[c], other = seconds[c];
      for (int w = 1; w < kWarps; ++w) {
        sum += firsts[w * width + c];
        other = Join<kPass>(other, seconds[w * width + c]);
      }
      StoreReduced<kPass>(call, n, tile.down, tile.column + c, sum, other);
    }
  }
}

template <typename M, Pass kPass>
CBAM_DEVICE void Reduce(const Call<typename M::A>& call, int64_t n, int64_t index) {
  if constexpr (kOverChannels<kPass> == M::kChannelsLast) {
    WithGradient<kPass>(call, [&](auto gradient) CBAM_INLINE_LAMBDA {
      ReduceRows<M, kPass, decltype(gradient)::value>(call, n, index);
    });
  } else {
    ReduceColumns<M, kPass>(call, n, index);
  }
}

// Rows that a thread has at once.
template <typename M, int kRows, typename State>
struct Rows {
  OfRow<M, State> state[kRows];
  int64_t offset[kRows];
  uint32_t left;  // rows until the tile's end
  uint32_t step;  // from one of these to the next

  CBAM_DEVICE bool Has(int k) const { return k * step < left; }
};

// A tile of a map that is written. body(rows with what load_row(row) gave for each, column, what
// load_column(segment) gave, the segment) is called for V columns of kRows rows at a time: along the
// rows, or of rows that are several channels across them, where what goes with the columns is the same
// for all rows. Along rows that begin within a sector of memory a tile's columns begin so much earlier,
// and the rows that a thread has at once begin alike.
template <typename M, int kRows, typename State, typename LoadRow, typename LoadColumn,
          typename Body>
CBAM_DEVICE void OverTile(const Call<typename M::A>& call, int64_t n, int64_t index,
                          LoadRow load_row, LoadColumn load_column, Body body) {
  constexpr int V = M::V, kVectors = kSector / (V * static_cast<int>(sizeof(typename M::T)));
  constexpr int kApart = M::kChannelsLast || V == 1 ? 1 : kVectors;
  const Tiles& tiles = call.map_tiles;
  const int lanes = tiles.lanes(), lane = ThreadIndex() & (lanes - 1);
  const int group = ThreadIndex() >> tiles.lane_bits, groups = kThreads >> tiles.lane_bits;
  const Tile tile = TileAt(call.rows, call.columns, tiles, index);
  const int64_t base = n * call.rows * call.columns;
  const auto load_rows = [&](uint32_t row, const Segment& segment) CBAM_INLINE_LAMBDA {
    Rows<M, kRows, State> rows;
    rows.left = tile.end_row - row;
    rows.step = M::kFolded ? groups : kApart;
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const uint32_t this_row = Smaller(row + k * rows.step, tile.end_row - 1);
      rows.state[k] = LoadOfRow<M, State>(call, this_row, segment, load_row);
      rows.offset[k] = base + int64_t{this_row} * call.columns;
    }
    return rows;
  };
  const uint32_t first = tile.column + lane * V;
  if constexpr (M::kFolded) {
    if (first >= tile.end_column) return;
    const Segment segment = SegmentAt<M>(call, first);
    const auto column_state = load_column(segment);
    CBAM_NO_UNROLL
    for (uint32_t row = tile.row + group; row < tile.end_row; row += groups * kRows)
      body(load_rows(row, segment), first, column_state, segment);
  } else {
    const uint32_t begin = tile.row + group / kApart * kApart * kRows + group % kApart;
    CBAM_NO_UNROLL
    for (uint32_t row = begin; row < tile.end_row; row += groups * kRows) {
      const auto rows = load_rows(row, {});
      const uint32_t early = kApart > 1 ? static_cast<uint32_t>(rows.offset[0]) % (kApart * V) : 0;
      const uint32_t end = tile.across + 1 == tiles.across ? call.columns + early : tile.end_column;
      CBAM_NO_UNROLL
      for (uint32_t at = first; at < end; at += lanes * V) {
        const uint32_t column = at - early;
        if (column > at) continue;  // before the row
        const Segment segment = SegmentAt<M>(call, column);
        body(rows, column, load_column(segment), segment);
      }
    }
  }
}

// y = act(x g_c g_s + residual).
template <typename M, bool kResidual>
CBAM_DEVICE void Apply(const Call<typename M::A>& call, int64_t n, int64_t index) {
  using T = typename M::T;
  using A = typename M::A;
  constexpr int V = M::V, kRows = RowsAtOnce<T>(V, kResidual ? 2 : 1);
  const A* const row_gates = M::kChannelsLast ? call.spatial_gate : call.channel_gate;
  const A* const column_gates = M::kChannelsLast ? call.channel_gate : call.spatial_gate;
  const int64_t row_count = M::kChannelsLast ? call.positions : call.channels;
  const int64_t column_count = M::kChannelsLast ? call.channels : call.positions;
  const T* const residual = static_cast<const T*>(call.residual);
  const A floor = call.floor;
  struct Gates {
    A value[V];
  };
  OverTile<M, kRows, A>(
      call, n, index,
      [&](int64_t row) { return row_gates != nullptr ? row_gates[n * row_count + row] : A(1); },
      [&](const Segment& segment) {
        Gates gates;
        LoadColumns<M>(call, column_gates, n, column_count, segment, A(1), gates.value);
        return gates;
      },
      [&](const Rows<M, kRows, A>& rows, uint32_t column, const Gates& gates,
          const Segment& segment) {
        Vec<T, V> xs[kRows], residuals[kRows];
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          xs[k] = LoadLast<T, V>(static_cast<const T*>(call.x) + rows.offset[k] + column);
          if constexpr (kResidual)
            residuals[k] = LoadLast<T, V>(residual + rows.offset[k] + column);
        }
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          if (!rows.Has(k)) continue;
          A values[V];
          CBAM_UNROLL
          for (int i = 0; i < V; ++i) {
            const A row = rows.state[k].At(i, segment.left);
            const A first = M::kChannelsLast ? gates.value[i] : row;
            const A second = M::kChannelsLast ? row : gates.value[i];
            A value = Multiply(Multiply(At(xs[k], i), first), second);
            if constexpr (kResidual) value += At(residuals[k], i);
            values[i] = value <= floor ? floor : value;
          }
          StoreStreaming<T, V>(static_cast<T*>(call.result) + rows.offset[k] + column,
                               FromValues<T, V>(values));
        }
      });
}

// Pass C at an element. `serial_gate` is the channel's gate, or 1 where spatial descriptors are of
// x.
template <Gradient kGradient, typename A>
CBAM_DEVICE A MapGradient(A x, A dy, const Side<A>& channel, A serial_gate,
                          const Side<A>& position) {
  const bool largest = Multiply(x, serial_gate) == position.maximum;
  A result = x == channel.maximum ? channel.maximum_share : channel.share;
  result += (largest ? position.maximum_share : position.share) * serial_gate;
  if constexpr (kGradient != Gradient::kNone) result += dy * position.gate * channel.gate;
  return result;
}

template <typename M, Gradient kGradient>
CBAM_DEVICE void MapGrad(const Call<typename M::A>& call, int64_t n, int64_t index) {
  using T = typename M::T;
  using A = typename M::A;
  constexpr int V = M::V, kRows = RowsAtOnce<T>(V, kMaps<kGradient>);
  const bool serial = call.serial;
  const A* const row_sides = M::kChannelsLast ? call.position_sides.data : call.channel_sides.data;
  const Sides<A>& column_sides = M::kChannelsLast ? call.channel_sides : call.position_sides;
  const A* const column_data = DataOf(column_sides, n);
  const int64_t stride = column_sides.stride;
  const int64_t row_count = M::kChannelsLast ? call.positions : call.channels;
  OverTile<M, kRows, Side<A>>(
      call, n, index,
      [&](int64_t row) {
        return row_sides != nullptr ? RowSideOf(row_sides, n * row_count + row) : NeutralSide<A>();
      },
      [&](const Segment& segment) {
        const int64_t part = M::kFolded ? segment.channel % V * call.positions : 0;
        ColumnSides<M> sides;
        sides.LoadAll(column_data, stride, part + segment.position);
        return sides;
      },
      [&](const Rows<M, kRows, Side<A>>& rows, uint32_t column, const ColumnSides<M>& sides,
          const Segment& segment) {
        Elements<M, kGradient, true> elements[kRows];
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) elements[k].LoadAt(call, rows.offset[k] + column);
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          if (!rows.Has(k)) continue;
          A values[V];
          CBAM_UNROLL
          for (int i = 0; i < V; ++i) {
            const Side<A> row_side = rows.state[k].At(i, segment.left);
            const Side<A> column_side = sides.At(i);
            const Side<A>& channel = ChannelOf<M>(row_side, column_side);
            const Side<A>& position = PositionOf<M>(row_side, column_side);
            values[i] = MapGradient<kGradient>(elements[k].X(i), elements[k].Dy(i), channel,
                                               serial ? channel.gate : A(1), position);
          }
          StoreStreaming<T, V>(static_cast<T*>(call.result) + rows.offset[k] + column,
                               FromValues<T, V>(values));
          if constexpr (kGradient == Gradient::kMasked) {
            if (call.d_residual != nullptr) {
              CBAM_UNROLL
              for (int i = 0; i < V; ++i) values[i] = elements[k].Dy(i);
              StoreStreaming<T, V>(static_cast<T*>(call.d_residual) + rows.offset[k] + column,
                                   FromValues<T, V>(values));
            }
          }
        }
      });
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_MAPS_CUH_
