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
template <typename T_, int V_, bool kChannelsLast_>
struct MapTraits {
  using T = T_;
  using A = Compute<T>;
  static constexpr int V = V_;
  static constexpr bool kChannelsLast = kChannelsLast_;
};

// What reaches a map's gradient: nothing, dy, or dy masked by y > 0.
enum class Gradient { kNone, kPlain, kMasked };
// Maps that are read or written then.
template <Gradient kGradient>
constexpr int kMaps = kGradient == Gradient::kMasked ? 3 : 2;

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
  CBAM_DEVICE void LoadAll(const A* sides, int64_t columns, int64_t n, int64_t column) {
    const A* const data = sides != nullptr ? sides + n * 4 * columns : nullptr;
    LoadOr<V>(data, column, A(1), gate);
    LoadOr<V>(data, columns + column, A(0), share);
    LoadOr<V>(data, 2 * columns + column, A(0), maximum_share);
    LoadOr<V>(data, 3 * columns + column, NotANumber<A>(), maximum);
  }
  CBAM_DEVICE Side<A> At(int i) const { return {gate[i], share[i], maximum_share[i], maximum[i]}; }
};
// The side of a row.
template <typename A>
CBAM_DEVICE Side<A> RowSideOf(const A* sides, int64_t at) {
  return reinterpret_cast<const Side<A>*>(sides)[at];
}

// What a reduction needs to know of a channel and of a position: only what the pass uses is loaded.
// As columns.
template <Pass kPass, typename M, bool kSerial, typename A>
CBAM_DEVICE ColumnSides<M> ColumnSidesFor(const Call<A>& call, int64_t n, int64_t column) {
  constexpr int V = M::V;
  ColumnSides<M> sides = {};
  const int64_t at = n * call.columns + column;
  if constexpr (M::kChannelsLast) {
    if constexpr (kPass != Pass::kChannelPool) LoadOr<V>(GateOf<kPass>(call), at, A(1), sides.gate);
    if constexpr (kPass == Pass::kChannelGrad)
      LoadOr<V>(call.channel_maximum, at, NotANumber<A>(), sides.maximum);
  } else if constexpr (kPass == Pass::kSpatialGrad) {
    LoadOr<V>(call.position_maximum, n * call.position_stride + column, NotANumber<A>(),
              sides.maximum);
  } else if constexpr (kPass == Pass::kChannelGrad && kSerial) {
    sides.LoadAll(call.position_sides.data, call.columns, n, column);
  } else if constexpr (kPass == Pass::kChannelGrad) {
    LoadOr<V>(call.spatial_gate, at, A(1), sides.gate);
  }
  return sides;
}
// As a row.
template <Pass kPass, typename M, bool kSerial, typename A>
CBAM_DEVICE Side<A> RowSideFor(const Call<A>& call, int64_t n, int64_t row) {
  Side<A> side = NeutralSide<A>();
  const int64_t at = n * call.rows + row;
  if constexpr (!M::kChannelsLast) {
    if constexpr (kPass != Pass::kChannelPool) {
      if (GateOf<kPass>(call) != nullptr) side.gate = GateOf<kPass>(call)[at];
    }
    if constexpr (kPass == Pass::kChannelGrad) side.maximum = call.channel_maximum[at];
  } else if constexpr (kPass == Pass::kSpatialGrad) {
    side.maximum = call.position_maximum[n * call.position_stride + row];
  } else if constexpr (kPass == Pass::kChannelGrad && kSerial) {
    side = RowSideOf(call.position_sides.data, at);
  } else if constexpr (kPass == Pass::kChannelGrad) {
    if (call.spatial_gate != nullptr) side.gate = call.spatial_gate[at];
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
template <typename M, Pass kPass, bool kSerial, typename A>
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
    A du = dy * position.gate;
    if constexpr (kSerial) {
      du += Multiply(x, channel.gate) == position.maximum ? position.maximum_share : position.share;
    }
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
  int64_t down;
  int64_t across;
  int64_t row;
  int64_t end_row;
  int64_t column;
  int64_t end_column;
};
template <typename A>
CBAM_DEVICE Tile TileAt(const Call<A>& call, const Tiles& tiles, int64_t index) {
  Tile tile;
  tile.down = Quotient(index, tiles.across);
  tile.across = index - tile.down * tiles.across;
  tile.row = tile.down * tiles.rows;
  tile.end_row = Smaller(tile.row + tiles.rows, call.rows);
  tile.column = tile.across * tiles.columns;
  tile.end_column = Smaller(tile.column + tiles.columns, call.columns);
  return tile;
}

// Along the rows: a slice is a tile of columns.
template <typename M, Pass kPass, Gradient kGradient, bool kSerial>
CBAM_DEVICE void ReduceRows(const Call<typename M::A>& call, int64_t n, int64_t index) {
  using T = typename M::T;
  using A = typename M::A;
  constexpr int V = M::V, kRows = RowsAtOnce<T>(V, kIsPool<kPass> ? 1 : kMaps<kGradient>);
  const Tiles& tiles = kOverChannels<kPass> ? call.spatial_tiles : call.channel_tiles;
  const int lanes = tiles.lanes, lane = ThreadIndex() % lanes, group = ThreadIndex() / lanes;
  const int batch = kThreads / lanes * kRows;
  const Tile tile = TileAt(call, tiles, index);
  const bool serial = call.serial;
  CBAM_NO_UNROLL
  for (int64_t begin = tile.row; begin < tile.end_row; begin += batch) {
    const int64_t row = begin + group * kRows;
    if (row - ThreadIndex() % kWarp / lanes * kRows >= tile.end_row) break;  // all of the warp
    int64_t offsets[kRows];
    Side<A> row_sides[kRows];
    A first[kRows], second[kRows];
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      // Beyond the end: read the last row again, store nothing.
      const int64_t this_row = Smaller(row + k, tile.end_row - 1);
      offsets[k] = (n * call.rows + this_row) * call.columns;
      row_sides[k] = RowSideFor<kPass, M, kSerial>(call, n, this_row);
      first[k] = A(0);
      second[k] = kIsPool<kPass> ? Lowest<A>() : A(0);
    }
    CBAM_NO_UNROLL
    for (int64_t column = tile.column + lane * V; column < tile.end_column; column += lanes * V) {
      Elements<M, kGradient, false> elements[kRows];
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) elements[k].LoadAt(call, offsets[k] + column);
      const ColumnSides<M> sides = ColumnSidesFor<kPass, M, kSerial>(call, n, column);
      CBAM_UNROLL
      for (int i = 0; i < V; ++i) {
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          Accumulate<M, kPass, kSerial>(elements[k].X(i), elements[k].Dy(i), row_sides[k],
                                        sides.At(i), serial, &first[k], &second[k]);
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
        if (row + k < tile.end_row)
          StoreReduced<kPass>(call, n, tile.across, row + k, first[k], second[k]);
      }
    }
  }
}

// Across the rows: a slice is a tile of rows.
template <typename M, Pass kPass, Gradient kGradient, bool kSerial>
CBAM_DEVICE void ReduceColumns(const Call<typename M::A>& call, int64_t n, int64_t index) {
  using T = typename M::T;
  using A = typename M::A;
  constexpr int V = M::V, kRows = RowsAtOnce<T>(V, kIsPool<kPass> ? 1 : kMaps<kGradient>);
  constexpr int kWarps = kThreads / kWarp;
  const Tiles& tiles = kOverChannels<kPass> ? call.spatial_tiles : call.channel_tiles;
  const int lanes = tiles.lanes, lane = ThreadIndex() % lanes, row_thread = ThreadIndex() / lanes;
  const int row_threads = kThreads / lanes;
  const Tile tile = TileAt(call, tiles, index);
  const int64_t column = tile.column + lane * V;
  const bool serial = call.serial;
  A first[V], second[V];
  CBAM_UNROLL
  for (int i = 0; i < V; ++i) {
    first[i] = A(0);
    second[i] = kIsPool<kPass> ? Lowest<A>() : A(0);
  }
  if (column < call.columns) {
    const ColumnSides<M> sides = ColumnSidesFor<kPass, M, kSerial>(call, n, column);
    const int64_t base = n * call.rows * call.columns + column;
    CBAM_NO_UNROLL
    for (int64_t row = tile.row + row_thread; row < tile.end_row; row += row_threads * kRows) {
      Elements<M, kGradient, false> elements[kRows];
      Side<A> row_sides[kRows];
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        const int64_t this_row = Smaller(row + k * row_threads, tile.end_row - 1);
        elements[k].LoadAt(call, base + this_row * call.columns);
        row_sides[k] = RowSideFor<kPass, M, kSerial>(call, n, this_row);
      }
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        if (row + k * row_threads >= tile.end_row) continue;
        CBAM_UNROLL
        for (int i = 0; i < V; ++i) {
          Accumulate<M, kPass, kSerial>(elements[k].X(i), elements[k].Dy(i), row_sides[k],
                                        sides.At(i), serial, &first[i], &second[i]);
        }
      }
    }
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

template <typename M, Pass kPass, Gradient kGradient, bool kSerial>
CBAM_DEVICE void Reduce(const Call<typename M::A>& call, int64_t n, int64_t index) {
  if constexpr (kOverChannels<kPass> == M::kChannelsLast) {
    ReduceRows<M, kPass, kGradient, kSerial>(call, n, index);
  } else {
    ReduceColumns<M, kPass, kGradient, kSerial>(call, n, index);
  }
}

// A tile of a map that is written. body(offsets of the rows, what load_row(row) gave for each, how
// many of them are there, column) is called for V columns of kRows rows at a time.
template <typename M, int kRows, typename RowState, typename LoadRow, typename Body>
CBAM_DEVICE void OverTile(const Call<typename M::A>& call, int64_t n, int64_t index,
                          LoadRow load_row, Body body) {
  const Tiles& tiles = call.map_tiles;
  const int lanes = tiles.lanes, lane = ThreadIndex() % lanes, group = ThreadIndex() / lanes;
  const int batch = kThreads / lanes * kRows;
  const Tile tile = TileAt(call, tiles, index);
  CBAM_NO_UNROLL
  for (int64_t row = tile.row + group * kRows; row < tile.end_row; row += batch) {
    RowState states[kRows];
    int64_t offsets[kRows];
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const int64_t this_row = Smaller(row + k, tile.end_row - 1);
      states[k] = load_row(this_row);
      offsets[k] = (n * call.rows + this_row) * call.columns;
    }
    const int present = static_cast<int>(Smaller(kRows, tile.end_row - row));
    CBAM_NO_UNROLL
    for (int64_t column = tile.column + lane * M::V; column < tile.end_column;
         column += lanes * M::V) {
      body(offsets, states, present, column);
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
  const T* const residual = static_cast<const T*>(call.residual);
  const A floor = call.floor;
  OverTile<M, kRows, A>(
      call, n, index,
      [&](int64_t row) { return row_gates != nullptr ? row_gates[n * call.rows + row] : A(1); },
      [&](const int64_t(&offsets)[kRows], const A(&row_gate)[kRows], int present, int64_t column) {
        Vec<T, V> xs[kRows], residuals[kRows];
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          xs[k] = LoadLast<T, V>(static_cast<const T*>(call.x) + offsets[k] + column);
          if constexpr (kResidual) residuals[k] = LoadLast<T, V>(residual + offsets[k] + column);
        }
        A gates[V];
        LoadOr<V>(column_gates, n * call.columns + column, A(1), gates);
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          if (k >= present) continue;
          A values[V];
          CBAM_UNROLL
          for (int i = 0; i < V; ++i) {
            const A first = M::kChannelsLast ? gates[i] : row_gate[k];
            const A second = M::kChannelsLast ? row_gate[k] : gates[i];
            A value = Multiply(Multiply(At(xs[k], i), first), second);
            if constexpr (kResidual) value += At(residuals[k], i);
            values[i] = value <= floor ? floor : value;
          }
          StoreStreaming<T, V>(static_cast<T*>(call.result) + offsets[k] + column,
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
  const A* const channels = call.channel_sides.data;
  const A* const positions = call.position_sides.data;
  const A* const row_sides = M::kChannelsLast ? positions : channels;
  const A* const column_sides = M::kChannelsLast ? channels : positions;
  OverTile<M, kRows, Side<A>>(
      call, n, index,
      [&](int64_t row) {
        return row_sides != nullptr ? RowSideOf(row_sides, n * call.rows + row) : NeutralSide<A>();
      },
      [&](const int64_t(&offsets)[kRows], const Side<A>(&row_side)[kRows], int present,
          int64_t column) {
        Elements<M, kGradient, true> elements[kRows];
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) elements[k].LoadAt(call, offsets[k] + column);
        ColumnSides<M> sides;
        sides.LoadAll(column_sides, call.columns, n, column);
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          if (k >= present) continue;
          A values[V];
          CBAM_UNROLL
          for (int i = 0; i < V; ++i) {
            const Side<A> column_side = sides.At(i);
            const Side<A>& channel = ChannelOf<M>(row_side[k], column_side);
            const Side<A>& position = PositionOf<M>(row_side[k], column_side);
            values[i] = MapGradient<kGradient>(elements[k].X(i), elements[k].Dy(i), channel,
                                               serial ? channel.gate : A(1), position);
          }
          StoreStreaming<T, V>(static_cast<T*>(call.result) + offsets[k] + column,
                               FromValues<T, V>(values));
          if constexpr (kGradient == Gradient::kMasked) {
            if (call.d_residual != nullptr) {
              CBAM_UNROLL
              for (int i = 0; i < V; ++i) values[i] = elements[k].Dy(i);
              StoreStreaming<T, V>(static_cast<T*>(call.d_residual) + offsets[k] + column,
                                   FromValues<T, V>(values));
            }
          }
        }
      });
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_MAPS_CUH_
