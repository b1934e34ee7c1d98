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
// An item is a tile of about 24 KB of the maps it reads. What goes with its columns a thread holds
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
  CBAM_DEVICE A X(int i) const { return ToCompute(x.value[i]); }
  CBAM_DEVICE A Dy(int i) const {
    if constexpr (kGradient == Gradient::kNone) {
      return A(0);
    } else {
      const A value = ToCompute(dy.value[i]);
      if constexpr (kGradient == Gradient::kMasked)
        return ToCompute(y.value[i]) > A(0) ? value : A(0);
      return value;
    }
  }
};

// The channels' gate in a pass: none where the spatial descriptors are of x itself.
template <Pass kPass, typename A>
CBAM_DEVICE const A* GateOf(const Call<A>& call) {
  return kPass == Pass::kSpatialPool && !call.serial ? nullptr : call.channel_gate;
}

// What a reduction needs to know of a channel and of a position: only what the pass uses is loaded.
// As columns: V of them.
template <Pass kPass, typename M, bool kSerial>
struct ColumnSides {
  using A = typename M::A;
  static constexpr int V = M::V;
  static constexpr bool kAreChannels = M::kChannelsLast;
  A gate[V], mean_share[V], max_share[V], maximum[V];

  CBAM_DEVICE void LoadAt(const Call<A>& call, int64_t n, int64_t column) {
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) {
      gate[i] = A(1);
      mean_share[i] = max_share[i] = maximum[i] = A(0);
    }
    const int64_t at = n * call.columns + column;
    if constexpr (kAreChannels) {
      if constexpr (kPass != Pass::kChannelPool) LoadOr<V>(GateOf<kPass>(call), at, A(1), gate);
      if constexpr (kPass == Pass::kChannelGrad)
        LoadOr<V>(call.channel_maximum, at, NotANumber<A>(), maximum);
    } else if constexpr (kPass == Pass::kSpatialGrad) {
      LoadOr<V>(call.position_maximum, n * call.position_stride + column, NotANumber<A>(), maximum);
    } else if constexpr (kPass == Pass::kChannelGrad) {
      if constexpr (kSerial) {
        const A* const sides = call.position_sides.data + n * 4 * call.columns;
        LoadOr<V>(sides, column, A(1), gate);
        LoadOr<V>(sides, call.columns + column, A(0), mean_share);
        LoadOr<V>(sides, 2 * call.columns + column, A(0), max_share);
        LoadOr<V>(sides, 3 * call.columns + column, NotANumber<A>(), maximum);
      } else {
        LoadOr<V>(call.spatial_gate, at, A(1), gate);
      }
    }
  }
  CBAM_DEVICE Side<A> At(int i) const { return {gate[i], mean_share[i], max_share[i], maximum[i]}; }
};
// As a row.
template <Pass kPass, typename M, bool kSerial, typename A>
CBAM_DEVICE Side<A> RowSide(const Call<A>& call, int64_t n, int64_t row) {
  Side<A> side = NeutralSide<A>();
  const int64_t at = n * call.rows + row;
  if constexpr (!M::kChannelsLast) {
    if constexpr (kPass != Pass::kChannelPool) {
      if (GateOf<kPass>(call) != nullptr) side.gate = GateOf<kPass>(call)[at];
    }
    if constexpr (kPass == Pass::kChannelGrad) side.maximum = call.channel_maximum[at];
  } else if constexpr (kPass == Pass::kSpatialGrad) {
    side.maximum = call.position_maximum[n * call.position_stride + row];
  } else if constexpr (kPass == Pass::kChannelGrad) {
    if constexpr (kSerial) {
      side = reinterpret_cast<const Side<A>*>(call.position_sides.data)[at];
    } else if (call.spatial_gate != nullptr) {
      side.gate = call.spatial_gate[at];
    }
  }
  return side;
}

// One element into the two sums. The product that is compared with a maximum is rounded by itself,
// in forward and backward alike.
template <Pass kPass, bool kSerial, typename A>
CBAM_DEVICE void Accumulate(A x, A dy, const Side<A>& channel, const Side<A>& position, bool serial,
                            A* first, A* second) {
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
    *second += (serial ? u : x) == position.maximum ? A(1) : A(0);
  } else {
    A du = dy * position.gate;
    if constexpr (kSerial) {
      du += position.mean_share;
      if (Multiply(x, channel.gate) == position.maximum) du += position.max_share;
    }
    *first += du * x;
    *second += x == channel.maximum ? A(1) : A(0);
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
  const Reduced<A>& to = kOverChannels<kPass> ? call.spatial_pass : call.channel_pass;
  const int64_t at = n * to.sample_stride + slice * to.results + i;
  to.first[at] = first;
  to.second[at] = second;
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
  const int64_t down = Quotient(index, tiles.across), across = index - down * tiles.across;
  const int64_t first_column = across * tiles.columns + lane * V;
  const int64_t end_column = Smaller((across + 1) * tiles.columns, call.columns);
  const int64_t end_row = Smaller((down + 1) * tiles.rows, call.rows);
  const int width = lanes < kWarp ? lanes : kWarp, warps = lanes / kWarp;
  const bool serial = call.serial;
  CBAM_NO_UNROLL
  for (int64_t begin = down * tiles.rows; begin < end_row; begin += batch) {
    const int64_t row = begin + group * kRows;
    int64_t offsets[kRows];
    Side<A> row_sides[kRows];
    A first[kRows], second[kRows];
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      // Beyond the end: read the last row again, store nothing.
      const int64_t this_row = Smaller(row + k, end_row - 1);
      offsets[k] = (n * call.rows + this_row) * call.columns;
      row_sides[k] = RowSide<kPass, M, kSerial>(call, n, this_row);
      first[k] = A(0);
      second[k] = kIsPool<kPass> ? Lowest<A>() : A(0);
    }
    CBAM_NO_UNROLL
    for (int64_t column = first_column; column < end_column; column += lanes * V) {
      Elements<M, kGradient, false> elements[kRows];
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) elements[k].LoadAt(call, offsets[k] + column);
      ColumnSides<kPass, M, kSerial> sides;
      sides.LoadAt(call, n, column);
      CBAM_UNROLL
      for (int i = 0; i < V; ++i) {
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          const A x = elements[k].X(i), dy = elements[k].Dy(i);
          if constexpr (M::kChannelsLast) {
            Accumulate<kPass, kSerial>(x, dy, sides.At(i), row_sides[k], serial, &first[k],
                                       &second[k]);
          } else {
            Accumulate<kPass, kSerial>(x, dy, row_sides[k], sides.At(i), serial, &first[k],
                                       &second[k]);
          }
        }
      }
    }
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      first[k] = SumOverLanes(first[k], width);
      second[k] =
          kIsPool<kPass> ? MaximumOverLanes(second[k], width) : SumOverLanes(second[k], width);
    }
    if (warps > 1) {
      A* const shared = Shared<A>();
      const int warp = ThreadIndex() / kWarp;
      if (begin > down * tiles.rows) Barrier();  // the last batch has been read
      if (ThreadIndex() % kWarp == 0) {
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          shared[(warp * kRows + k) * 2] = first[k];
          shared[(warp * kRows + k) * 2 + 1] = second[k];
        }
      }
      Barrier();
      if (lane == 0) {
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          for (int w = 1; w < warps; ++w) {
            first[k] += shared[((warp + w) * kRows + k) * 2];
            second[k] = Join<kPass>(second[k], shared[((warp + w) * kRows + k) * 2 + 1]);
          }
        }
      }
    }
    if (lane == 0) {
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        if (row + k < end_row) StoreReduced<kPass>(call, n, across, row + k, first[k], second[k]);
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
  const int64_t down = Quotient(index, tiles.across), across = index - down * tiles.across;
  const int64_t tile_column = across * tiles.columns, column = tile_column + lane * V;
  const int64_t end = Smaller((down + 1) * tiles.rows, call.rows);
  const bool serial = call.serial;
  A first[V], second[V];
  CBAM_UNROLL
  for (int i = 0; i < V; ++i) {
    first[i] = A(0);
    second[i] = kIsPool<kPass> ? Lowest<A>() : A(0);
  }
  if (column < call.columns) {
    ColumnSides<kPass, M, kSerial> sides;
    sides.LoadAt(call, n, column);
    const int64_t base = n * call.rows * call.columns + column;
    CBAM_NO_UNROLL
    for (int64_t row = down * tiles.rows + row_thread; row < end; row += row_threads * kRows) {
      Elements<M, kGradient, false> elements[kRows];
      Side<A> row_sides[kRows];
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        const int64_t this_row = Smaller(row + k * row_threads, end - 1);
        elements[k].LoadAt(call, base + this_row * call.columns);
        row_sides[k] = RowSide<kPass, M, kSerial>(call, n, this_row);
      }
      CBAM_UNROLL
      for (int k = 0; k < kRows; ++k) {
        if (row + k * row_threads >= end) continue;
        CBAM_UNROLL
        for (int i = 0; i < V; ++i) {
          const A x = elements[k].X(i), dy = elements[k].Dy(i);
          if constexpr (M::kChannelsLast) {
            Accumulate<kPass, kSerial>(x, dy, sides.At(i), row_sides[k], serial, &first[i],
                                       &second[i]);
          } else {
            Accumulate<kPass, kSerial>(x, dy, row_sides[k], sides.At(i), serial, &first[i],
                                       &second[i]);
          }
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
    if (tile_column + c >= call.columns) continue;
    A sum = firsts[c], other = seconds[c];
    for (int w = 1; w < kWarps; ++w) {
      sum += firsts[w * width + c];
      other = Join<kPass>(other, seconds[w * width + c]);
    }
    StoreReduced<kPass>(call, n, down, tile_column + c, sum, other);
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

// A tile of a map that is written: body(offset of V elements, row of the tile's, in how many rows it
// is, column) is called for rows in turn, kRows at a time.
template <typename M, int kRows, typename RowState, typename LoadRow, typename Body>
CBAM_DEVICE void OverTile(const Call<typename M::A>& call, int64_t n, int64_t index,
                          LoadRow load_row, Body body) {
  const Tiles& tiles = call.map_tiles;
  const int lanes = tiles.lanes, lane = ThreadIndex() % lanes, group = ThreadIndex() / lanes;
  const int batch = kThreads / lanes * kRows;
  const int64_t down = Quotient(index, tiles.across), across = index - down * tiles.across;
  const int64_t end_column = Smaller((across + 1) * tiles.columns, call.columns);
  const int64_t end_row = Smaller((down + 1) * tiles.rows, call.rows);
  CBAM_NO_UNROLL
  for (int64_t row = down * tiles.rows + group * kRows; row < end_row; row += batch) {
    RowState states[kRows];
    int64_t offsets[kRows];
    CBAM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const int64_t this_row = Smaller(row + k, end_row - 1);
      states[k] = load_row(this_row);
      offsets[k] = (n * call.rows + this_row) * call.columns;
    }
    const int present = static_cast<int>(Smaller(kRows, end_row - row));
    CBAM_NO_UNROLL
    for (int64_t column = across * tiles.columns + lane * M::V; column < end_column;
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
          Vec<T, V> results;
          CBAM_UNROLL
          for (int i = 0; i < V; ++i) {
            const A first = M::kChannelsLast ? gates[i] : row_gate[k];
            const A second = M::kChannelsLast ? row_gate[k] : gates[i];
            A value = Multiply(Multiply(ToCompute(xs[k].value[i]), first), second);
            if constexpr (kResidual) value += ToCompute(residuals[k].value[i]);
            FromCompute(value <= floor ? floor : value, &results.value[i]);
          }
          StoreStreaming<T, V>(static_cast<T*>(call.result) + offsets[k] + column, results);
        }
      });
}

// Pass C at an element. `serial_gate` is the channel's gate, or 1 where spatial descriptors are of x.
template <Gradient kGradient, typename A>
CBAM_DEVICE A MapGradient(A x, A dy, const Side<A>& channel, A serial_gate,
                          const Side<A>& position) {
  A spatial = position.mean_share;
  if (Multiply(x, serial_gate) == position.maximum) spatial += position.max_share;
  A result = spatial * serial_gate;
  if constexpr (kGradient != Gradient::kNone) result += dy * position.gate * channel.gate;
  result += channel.mean_share;
  if (x == channel.maximum) result += channel.max_share;
  return result;
}

template <typename M, Gradient kGradient>
CBAM_DEVICE void MapGrad(const Call<typename M::A>& call, int64_t n, int64_t index) {
  using T = typename M::T;
  using A = typename M::A;
  constexpr int V = M::V, kRows = RowsAtOnce<T>(V, kMaps<kGradient>);
  const bool serial = call.serial;
  const Sides<A>& row_sides = M::kChannelsLast ? call.position_sides : call.channel_sides;
  const Sides<A>& column_sides = M::kChannelsLast ? call.channel_sides : call.position_sides;
  OverTile<M, kRows, Side<A>>(
      call, n, index,
      [&](int64_t row) {
        return row_sides.data != nullptr
                   ? reinterpret_cast<const Side<A>*>(row_sides.data)[n * call.rows + row]
                   : NeutralSide<A>();
      },
      [&](const int64_t(&offsets)[kRows], const Side<A>(&row_side)[kRows], int present,
          int64_t column) {
        Elements<M, kGradient, true> elements[kRows];
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) elements[k].LoadAt(call, offsets[k] + column);
        const A* const sides =
            column_sides.data != nullptr ? column_sides.data + n * 4 * call.columns : nullptr;
        A gate[V], mean_share[V], max_share[V], maximum[V];
        LoadOr<V>(sides, column, A(1), gate);
        LoadOr<V>(sides, call.columns + column, A(0), mean_share);
        LoadOr<V>(sides, 2 * call.columns + column, A(0), max_share);
        LoadOr<V>(sides, 3 * call.columns + column, NotANumber<A>(), maximum);
        CBAM_UNROLL
        for (int k = 0; k < kRows; ++k) {
          if (k >= present) continue;
          Vec<T, V> results;
          CBAM_UNROLL
          for (int i = 0; i < V; ++i) {
            const Side<A> side = {gate[i], mean_share[i], max_share[i], maximum[i]};
            const Side<A>& channel = M::kChannelsLast ? side : row_side[k];
            const Side<A>& position = M::kChannelsLast ? row_side[k] : side;
            FromCompute(MapGradient<kGradient>(elements[k].X(i), elements[k].Dy(i), channel,
                                               serial ? channel.gate : A(1), position),
                        &results.value[i]);
          }
          StoreStreaming<T, V>(static_cast<T*>(call.result) + offsets[k] + column, results);
          if constexpr (kGradient == Gradient::kMasked) {
            if (call.d_residual != nullptr) {
              Vec<T, V> masked;
              CBAM_UNROLL
              for (int i = 0; i < V; ++i) FromCompute(elements[k].Dy(i), &masked.value[i]);
              StoreStreaming<T, V>(static_cast<T*>(call.d_residual) + offsets[k] + column, masked);
            }
          }
        }
      });
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_MAPS_CUH_
