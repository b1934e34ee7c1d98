// The cluster path (compute capability 9.0 on): one read and one write of the map.
//
// A cluster of blocks holds one sample in its blocks' shared memory: block r has the rows
// [r R/K, (r+1) R/K) of the sample's matrix (NHWC: positions, NCHW: channels), loaded once with
// bulk copies in kStages pieces, so that the first reduction starts when the first piece is there.
// Everything after reads shared memory:
//
//   a reduction along the rows (NHWC: over channels) is local to the block that has the row;
//   a reduction across them is done per block, then block r adds up the K partial results of its
//   share of the columns through distributed shared memory, in the order of the ranks.
//
// So each block ends up owning a range of channels and a range of positions. It computes the
// channel gate of its channels (the MLP's hidden sums are formed per block and added up by all),
// and the spatial gate of its positions from a window of the planes that it gathers from their
// owners. What belongs to columns is then written to every block.
//
//                                                                        bytes per element
//   forward   x in; pool | MLP | pool | convolution; y out               1 read, 1 write
//   backward  x and dy in; A | transposed convolution, dK | B |          2 reads, 1 write
//             MLP backward; dx out
//             (with a ReLU also y in and d_residual out)
//
// dK, dbias and the MLP's weights' gradients are summed over samples by SumKernel and OuterKernel,
// as on the portable path.
//
// Shared memory per block, float, NHWC 56 x 56 x 256 over 16 blocks: 196 positions x 256 channels =
// 200,704 bytes of x, 6 KB of column values, 5.5 KB of window. Smaller maps get 8, 4, 2 or 1
// blocks: as few as leave room for two blocks per multiprocessor (one loads while the other
// computes), else as few as fit. Batch norm over the batch cannot be done sample by sample:
// portable path.
#ifndef CBAM_OPS_CORE_CUDA_CLUSTER_CUH_
#define CBAM_OPS_CORE_CUDA_CLUSTER_CUH_

#include "core/cuda/reduce.cuh"
#include "core/cuda/spatial.cuh"

namespace cbam_ops {
namespace cuda {

constexpr int kStages = 4;

// Byte offsets into shared memory; what a problem does not need has size 0.
struct ClusterLayout {
  int x, dy;
  int partial;  // [2][columns]
  int column_values,
      row_values;              // gates (forward) or sides (backward): [columns], [rows per block]
  int channel_values;          // [2 or 5][channels per block]
  int hidden_partial, hidden;  // [2][hidden] each
  int d_hidden_partial, d_hidden;  // likewise, backward
  int position_values;             // [2][positions per block]
  int windows;                     // 2 or 3
  int weights;                     // the spatial kernel
  int corners;                     // [positions per block], backward
  int scratch;                     // [2][kClusterThreads]
};

template <typename A>
struct ClusterParams {
  const void* x;
  const void* residual;  // or null
  void* y;
  const void* dy;
  const void* y_in;  // the mask, or null
  void* dx;
  void* d_residual;  // or null
  int64_t batch, positions, channels, hidden;
  bool channel, spatial,
      parallel;  // which gates, and whether the spatial one is taken from x itself
  bool use_mean, use_max, mlp_relu, relu;
  const A* w0;
  const A* b0;
  const A* w1;
  const A* b1;
  const A* kernel;
  const A* bias;
  A* descriptors;   // [2, N, C]
  A* channel_gate;  // [N, C]
  A* planes;        // [N, 2, P]
  A* spatial_gate;  // [N, P]
  // Backward.
  const A* d_channel_gate;  // or null
  const A* d_spatial_gate;  // or null
  A* hidden_values;         // [N, 2, hidden]
  A* d_logits;              // [N, 2, C]
  A* d_hidden;              // [N, 2, hidden]
  A* taps;                  // [2 k^2 + 1, blocks]
  int64_t blocks;
  // The plan.
  Tiling tiling;  // a tile is a block's positions
  ClusterLayout layout;
  int rows_per_block, columns_per_block;
};

#if defined(CBAM_HAVE_CLUSTERS)

// A block's part of its sample.
template <typename T, bool kChannelsLast>
struct Part {
  using A = Compute<T>;
  int64_t n;
  int rank, ranks;
  int rows, columns;  // of the sample
  int row_begin, row_count, rows_per_block;
  int column_begin, column_count, columns_per_block;
  unsigned char* shared;
  uint64_t* barriers;
  T* x;
  T* dy;

  CBAM_DEVICE explicit Part(const ClusterParams<A>& params) {
    rank = ClusterRank();
    ranks = ClusterSize();
    n = Quotient(BlockIndex(), ranks);
    rows = static_cast<int>(kChannelsLast ? params.positions : params.channels);
    columns = static_cast<int>(kChannelsLast ? params.channels : params.positions);
    rows_per_block = params.rows_per_block;
    columns_per_block = params.columns_per_block;
    row_begin = static_cast<int>(Smaller(rank * rows_per_block, rows));
    row_count = static_cast<int>(Smaller(rows_per_block, rows - row_begin));
    column_begin = static_cast<int>(Smaller(rank * columns_per_block, columns));
    column_count = static_cast<int>(Smaller(columns_per_block, columns - column_begin));
    shared = SharedMemory();
    barriers = reinterpret_cast<uint64_t*>(shared);
    x = At<T>(params.layout.x);
    dy = At<T>(params.layout.dy);
  }
  template <typename P>
  CBAM_DEVICE P* At(int offset) const {
    return reinterpret_cast<P*>(shared + offset);
  }
  CBAM_DEVICE int64_t SampleOffset() const {
    return n * rows * columns + static_cast<int64_t>(row_begin) * columns;
  }
  CBAM_DEVICE int StageRow(int stage) const { return row_count * stage / kStages; }
  // The ranges of channels and positions that this block owns.
  CBAM_DEVICE int channel_begin() const { return kChannelsLast ? column_begin : row_begin; }
  CBAM_DEVICE int channel_count() const { return kChannelsLast ? column_count : row_count; }
  CBAM_DEVICE int channels_per_block() const {
    return kChannelsLast ? columns_per_block : rows_per_block;
  }
  CBAM_DEVICE int position_begin() const { return kChannelsLast ? row_begin : column_begin; }
  CBAM_DEVICE int position_count() const { return kChannelsLast ? row_count : column_count; }
  CBAM_DEVICE int positions_per_block() const {
    return kChannelsLast ? rows_per_block : columns_per_block;
  }

  // Starts the copies of this block's rows, of x and, where given, of dy.
  CBAM_DEVICE void StartCopies(const void* from_x, const void* from_dy) const {
    if (ThreadIndex() == 0) {
      for (int stage = 0; stage < kStages; ++stage) InitCopyBarrier(barriers + stage);
      CBAM_NO_UNROLL
      for (int stage = 0; stage < kStages; ++stage) {
        const int64_t begin = static_cast<int64_t>(StageRow(stage)) * columns;
        const int64_t count = static_cast<int64_t>(StageRow(stage + 1)) * columns - begin;
        const auto bytes = static_cast<uint32_t>(count * sizeof(T));
        ExpectBytes(barriers + stage, from_dy != nullptr ? 2 * bytes : bytes);
        if (bytes == 0) continue;
        BulkCopyToShared(x + begin, static_cast<const T*>(from_x) + SampleOffset() + begin, bytes,
                         barriers + stage);
        if (from_dy != nullptr) {
          BulkCopyToShared(dy + begin, static_cast<const T*>(from_dy) + SampleOffset() + begin,
                           bytes, barriers + stage);
        }
      }
    }
    Barrier();
  }
  CBAM_DEVICE void WaitForStage(int stage) const { WaitForCopies(barriers + stage, 0); }
};

// Along this block's rows: store(row, first, second) is called by one thread per row. row_side and
// column_side give sides by local row and by column.
template <Pass kPass, typename T, bool kChannelsLast, typename RowSide, typename ColumnSide,
          typename Store>
CBAM_DEVICE void ReduceRows(const Part<T, kChannelsLast>& part, bool parallel, RowSide row_side,
                            ColumnSide column_side, Store store) {
  using A = Compute<T>;
  constexpr int V = kVector<T>;
  const int vectors = part.columns / V;
  int lanes = kWarp;
  while (lanes > 1 && lanes / 2 >= vectors) lanes /= 2;
  const int lane = ThreadIndex() % lanes, group = ThreadIndex() / lanes,
            groups = kClusterThreads / lanes;
  CBAM_NO_UNROLL
  for (int stage = 0; stage < kStages; ++stage) {
    part.WaitForStage(stage);
    const int end = part.StageRow(stage + 1);
    for (int base = part.StageRow(stage); base < end;
         base += groups) {  // the same for all threads: shuffles below
      const bool valid = base + group < end;
      const int row = valid ? base + group : end - 1;
      const Side<A> side = row_side(row);
      A first = A(0), second = kIsPool<kPass> ? Lowest<A>() : A(0);
      for (int v = lane; v < vectors; v += lanes) {
        const Vec<T, V> xs = Load<T, V>(part.x + row * part.columns + v * V);
        Vec<T, V> dys;
        if constexpr (!kIsPool<kPass>) dys = Load<T, V>(part.dy + row * part.columns + v * V);
        CBAM_UNROLL
        for (int i = 0; i < V; ++i) {
          A dy = A(0);
          if constexpr (!kIsPool<kPass>) dy = ToCompute(dys.value[i]);
          const Side<A> other = column_side(v * V + i);
          if constexpr (kChannelsLast) {
            Accumulate<kPass>(ToCompute(xs.value[i]), dy, other, side, parallel, &first, &second);
          } else {
            Accumulate<kPass>(ToCompute(xs.value[i]), dy, side, other, parallel, &first, &second);
          }
        }
      }
      first = SumOverLanes(first, lanes);
      second = kIsPool<kPass> ? MaximumOverLanes(second, lanes) : SumOverLanes(second, lanes);
      if (valid && lane == 0) store(row, first, second);
    }
  }
}

// Across this block's rows, into partial [2][columns]. Ends with a barrier of the block.
template <Pass kPass, typename T, bool kChannelsLast, typename RowSide, typename ColumnSide>
CBAM_DEVICE void ReduceColumns(const Part<T, kChannelsLast>& part, bool parallel, RowSide row_side,
                               ColumnSide column_side, Compute<T>* partial) {
  using A = Compute<T>;
  constexpr int V = kVector<T>;
  const int vectors = part.columns / V;
  const int lanes = static_cast<int>(Smaller(vectors, kClusterThreads)),
            row_threads = kClusterThreads / lanes;
  const int lane = ThreadIndex() % lanes, row_thread = ThreadIndex() / lanes;
  CBAM_NO_UNROLL
  for (int base = 0; base < vectors; base += lanes) {
    const int column = (base + lane) * V;
    const bool active = row_thread < row_threads && column < part.columns;
    A first[V], second[V];
    Side<A> sides[V];
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) {
      first[i] = A(0);
      second[i] = kIsPool<kPass> ? Lowest<A>() : A(0);
      sides[i] = active ? column_side(column + i) : NeutralSide<A>();
    }
    CBAM_NO_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      part.WaitForStage(stage);
      if (!active) continue;
      for (int row = part.StageRow(stage) + row_thread; row < part.StageRow(stage + 1);
           row += row_threads) {
        const Vec<T, V> xs = Load<T, V>(part.x + row * part.columns + column);
        Vec<T, V> dys;
        if constexpr (!kIsPool<kPass>) dys = Load<T, V>(part.dy + row * part.columns + column);
        const Side<A> side = row_side(row);
        CBAM_UNROLL
        for (int i = 0; i < V; ++i) {
          A dy = A(0);
          if constexpr (!kIsPool<kPass>) dy = ToCompute(dys.value[i]);
          if constexpr (kChannelsLast) {
            Accumulate<kPass>(ToCompute(xs.value[i]), dy, sides[i], side, parallel, &first[i],
                              &second[i]);
          } else {
            Accumulate<kPass>(ToCompute(xs.value[i]), dy, side, sides[i], parallel, &first[i],
                              &second[i]);
          }
        }
      }
    }
    // Fold the row threads one after the other: an order, and no memory but the result's.
    CBAM_NO_UNROLL
    for (int r = 0; r < row_threads; ++r) {
      if (active && row_thread == r) {
        CBAM_UNROLL
        for (int i = 0; i < V; ++i) {
          A* const sum = partial + column + i;
          A* const other = sum + part.columns;
          *sum = r == 0 ? first[i] : *sum + first[i];
          *other = r == 0           ? second[i]
                   : kIsPool<kPass> ? Maximum(*other, second[i])
                                    : *other + second[i];
        }
      }
      Barrier();
    }
  }
}

// The ranks' partial results of this block's columns: store(local column, first, second). To follow
// a cluster barrier.
template <bool kMaximum, typename T, bool kChannelsLast, typename Store>
CBAM_DEVICE void CombineColumns(const Part<T, kChannelsLast>& part, Compute<T>* partial,
                                Store store) {
  using A = Compute<T>;
  CBAM_NO_UNROLL
  for (int i = ThreadIndex(); i < part.column_count; i += kClusterThreads) {
    const int column = part.column_begin + i;
    A first = A(0), second = kMaximum ? Lowest<A>() : A(0);
    for (int r = 0; r < part.ranks; ++r) {
      const A* const theirs = MapToRank(partial, r);
      first += theirs[column];
      const A value = theirs[part.columns + column];
      second = kMaximum ? Maximum(second, value) : second + value;
    }
    store(i, first, second);
  }
}

// store(outer, sum of first[inner] * weight(inner, outer), the same of second) for all outer.
// Threads share the inner sums, which are folded through `scratch`. Ends with a barrier of the
// block.
template <typename A, typename Weight, typename Store>
CBAM_DEVICE void SumProducts(const A* first, const A* second, int inner, int outer, A* scratch,
                             Weight weight, Store store) {
  const int lanes = static_cast<int>(Larger(1, Smaller(outer, kClusterThreads))),
            groups = kClusterThreads / lanes;
  const int lane = ThreadIndex() % lanes, group = ThreadIndex() / lanes;
  CBAM_NO_UNROLL
  for (int base = 0; base < outer; base += lanes) {
    const int o = base + lane;
    A first_sum = A(0), second_sum = A(0);
    if (group < groups && o < outer) {
      for (int i = group; i < inner; i += groups) {
        const A w = weight(i, o);
        first_sum += first[i] * w;
        second_sum += second[i] * w;
      }
    }
    scratch[ThreadIndex()] = first_sum;
    scratch[kClusterThreads + ThreadIndex()] = second_sum;
    Barrier();
    if (group == 0 && o < outer) {
      for (int g = 1; g < groups; ++g) {
        first_sum += scratch[g * lanes + lane];
        second_sum += scratch[kClusterThreads + g * lanes + lane];
      }
      store(o, first_sum, second_sum);
    }
    Barrier();
  }
}

// Adds up what each rank has in partial [2][count]: store(i, sum) for i < 2 * count. To follow a
// cluster barrier; ends with one, after which the ranks' partial results may be overwritten.
template <typename A, typename Store>
CBAM_DEVICE void Gather(A* partial, int count, int ranks, Store store) {
  CBAM_NO_UNROLL
  for (int i = ThreadIndex(); i < 2 * count; i += kClusterThreads) {
    A sum = A(0);
    for (int r = 0; r < ranks; ++r) sum += MapToRank(partial, r)[i];
    store(i, sum);
  }
  ClusterBarrier();
}

// The hidden units of both descriptors, [2][hidden], in every block: from this block's channels'
// descriptors.
template <typename T, bool kChannelsLast>
CBAM_DEVICE void ComputeHidden(const ClusterParams<Compute<T>>& params,
                               const Part<T, kChannelsLast>& part, const Compute<T>* descriptors) {
  using A = Compute<T>;
  const int hidden = static_cast<int>(params.hidden);
  A* const partial = part.template At<A>(params.layout.hidden_partial);
  A* const values = part.template At<A>(params.layout.hidden);
  const A* const w0 = params.w0 + static_cast<int64_t>(part.channel_begin()) * hidden;
  SumProducts(
      descriptors, descriptors + part.channels_per_block(), part.channel_count(), hidden,
      part.template At<A>(params.layout.scratch),
      [=](int c, int j) { return w0[static_cast<int64_t>(c) * hidden + j]; },
      [=](int j, A mean, A max) {
        partial[j] = mean;
        partial[hidden + j] = max;
      });
  ClusterBarrier();
  Gather(partial, hidden, part.ranks, [&](int i, A sum) {
    const bool used = i < hidden ? params.use_mean : params.use_max;
    if (params.b0 != nullptr) sum += params.b0[i < hidden ? i : i - hidden];
    values[i] = used ? Relu(sum) : A(0);
  });
}

// A position's or channel's value to every block, or to one's own.
template <typename P>
CBAM_DEVICE void StoreToAll(P* pointer, int ranks, const P& value) {
  for (int r = 0; r < ranks; ++r) *MapToRank(pointer, r) = value;
}

#endif  // CBAM_HAVE_CLUSTERS

template <typename T, bool kChannelsLast>
CBAM_CLUSTER_KERNEL(2)
ClusterForwardKernel(ClusterParams<Compute<T>> params) {
#if defined(CBAM_HAVE_CLUSTERS)
  using A = Compute<T>;
  constexpr int V = kVector<T>;
  WaitForPredecessors();
  AllowSuccessors();
  const Part<T, kChannelsLast> part(params);
  part.StartCopies(params.x, nullptr);
  const ClusterLayout& layout = params.layout;
  A* const partial = part.template At<A>(layout.partial);
  A* const column_gates = part.template At<A>(layout.column_values);
  A* const row_gates = part.template At<A>(layout.row_values);
  A* const scratch = part.template At<A>(layout.scratch);
  const auto neutral = [](int) { return NeutralSide<A>(); };

  if (params.channel) {
    A* const descriptors = part.template At<A>(layout.channel_values);
    const auto store = [&](int i, A sum, A maximum) {
      const A mean = params.use_mean ? sum / static_cast<A>(params.positions) : A(0);
      if (!params.use_max) maximum = A(0);
      descriptors[i] = mean;
      descriptors[part.channels_per_block() + i] = maximum;
      const int64_t at = part.n * params.channels + part.channel_begin() + i;
      params.descriptors[at] = mean;
      params.descriptors[params.batch * params.channels + at] = maximum;
    };
    if constexpr (kChannelsLast) {
      ReduceColumns<Pass::kChannelPool>(part, false, neutral, neutral, partial);
      ClusterBarrier();
      CombineColumns<true>(part, partial, store);
    } else {
      ReduceRows<Pass::kChannelPool>(part, false, neutral, neutral, store);
    }
    Barrier();
    ComputeHidden(params, part, descriptors);
    const A* const hidden = part.template At<A>(layout.hidden);
    const A* const w1 = params.w1 + part.channel_begin();
    SumProducts(
        hidden, hidden + params.hidden, static_cast<int>(params.hidden), part.channel_count(),
        scratch, [&](int j, int c) { return w1[j * params.channels + c]; },
        [&](int c, A mean, A max) {
          const A bias = params.b1 != nullptr ? params.b1[part.channel_begin() + c] : A(0);
          A sum = A(0);
          if (params.use_mean) sum += params.mlp_relu ? Relu(mean + bias) : mean + bias;
          if (params.use_max) sum += params.mlp_relu ? Relu(max + bias) : max + bias;
          const A gate = Sigmoid(sum);
          params.channel_gate[part.n * params.channels + part.channel_begin() + c] = gate;
          if constexpr (kChannelsLast) {
            StoreToAll(column_gates + part.column_begin + c, part.ranks, gate);
          } else {
            row_gates[c] = gate;
          }
        });
    if constexpr (kChannelsLast) {
      ClusterBarrier();
    } else {
      Barrier();
    }
  }

  // Where the positions' gates are: NHWC by row, NCHW by column. Where there is none, 1.
  if (params.spatial) {
    A* const planes = part.template At<A>(layout.position_values);
    const bool gated = params.channel && !params.parallel;
    const auto store = [&](int i, A sum, A maximum) {
      const A mean = sum / static_cast<A>(params.channels);
      planes[i] = mean;
      planes[part.positions_per_block() + i] = maximum;
      A* const saved = params.planes + part.n * 2 * params.positions + part.position_begin() + i;
      saved[0] = mean;
      saved[params.positions] = maximum;
    };
    const auto channel_side = [&](const A* gates, int c) {
      Side<A> side = NeutralSide<A>();
      if (gated) side.gate = gates[c];
      return side;
    };
    if constexpr (kChannelsLast) {
      ReduceRows<Pass::kSpatialPool>(
          part, false, neutral, [&](int c) { return channel_side(column_gates, c); }, store);
    } else {
      ReduceColumns<Pass::kSpatialPool>(
          part, false, [&](int c) { return channel_side(row_gates, c); }, neutral, partial);
      ClusterBarrier();
      CombineColumns<true>(part, partial, store);
    }
    ClusterBarrier();
    const bool any = part.position_count() > 0;
    const Tile tile = any ? TileAt(params.tiling, part.rank) : Tile{};
    A* const windows = part.template At<A>(layout.windows);
    A* const weights = part.template At<A>(layout.weights);
    if (any) {
      const int share = part.positions_per_block();
      CBAM_NO_UNROLL
      for (int plane = 0; plane < 2; ++plane) {
        FillWindow(
            params.tiling, tile, windows + plane * params.tiling.window_values,
            [=](int64_t p) {
              const int owner = static_cast<int>(Quotient(p, share));
              return MapToRank(planes,
                               owner)[plane * share + p - static_cast<int64_t>(owner) * share];
            },
            kClusterThreads);
      }
    }
    for (int i = ThreadIndex(); i < 2 * params.tiling.kernel_size * params.tiling.kernel_size;
         i += kClusterThreads) {
      weights[i] = params.kernel[i];
    }
    ClusterBarrier();  // the window is there, and nobody reads anybody's planes any more
    for (int q = ThreadIndex(); q < part.position_count(); q += kClusterThreads) {
      A z = Convolve<A>(params.tiling, tile, windows, nullptr, weights, part.position_begin() + q);
      if (params.bias != nullptr) z += params.bias[0];
      const A gate = Sigmoid(z);
      params.spatial_gate[part.n * params.positions + part.position_begin() + q] = gate;
      if constexpr (kChannelsLast) {
        row_gates[q] = gate;
      } else {
        StoreToAll(column_gates + part.column_begin + q, part.ranks, gate);
      }
    }
    if constexpr (kChannelsLast) {
      Barrier();
    } else {
      ClusterBarrier();
    }
  }

  // y, from the map that is still here.
  const bool has_column = kChannelsLast ? params.channel : params.spatial,
             has_row = kChannelsLast ? params.spatial : params.channel;
  const T* const residual = params.residual != nullptr
                                ? static_cast<const T*>(params.residual) + part.SampleOffset()
                                : nullptr;
  T* const y = static_cast<T*>(params.y) + part.SampleOffset();
  const int vectors = part.columns / V;
  const int lanes = static_cast<int>(Smaller(vectors, kClusterThreads)),
            row_threads = kClusterThreads / lanes;
  const int lane = ThreadIndex() % lanes, row_thread = ThreadIndex() / lanes;
  if (row_thread >= row_threads) return;
  for (int column = lane * V; column < part.columns; column += lanes * V) {
    A gates[V];
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) gates[i] = has_column ? column_gates[column + i] : A(1);
    for (int row = row_thread; row < part.row_count; row += row_threads) {
      const int64_t at = static_cast<int64_t>(row) * part.columns + column;
      const A row_gate = has_row ? row_gates[row] : A(1);
      const Vec<T, V> xs = Load<T, V>(part.x + at);
      Vec<T, V> added, results;
      if (residual != nullptr) added = Load<T, V>(residual + at);
      CBAM_UNROLL
      for (int i = 0; i < V; ++i) {
        A value = Multiply(Multiply(ToCompute(xs.value[i]), kChannelsLast ? gates[i] : row_gate),
                           kChannelsLast ? row_gate : gates[i]);
        if (residual != nullptr) value += ToCompute(added.value[i]);
        if (params.relu) value = Relu(value);
        FromCompute(value, &results.value[i]);
      }
      StoreStreaming<T, V>(y + at, results);
    }
  }
#endif
}

template <typename T, bool kChannelsLast>
CBAM_CLUSTER_KERNEL(1)
ClusterBackwardKernel(ClusterParams<Compute<T>> params) {
#if defined(CBAM_HAVE_CLUSTERS)
  using A = Compute<T>;
  constexpr int V = kVector<T>;
  WaitForPredecessors();
  AllowSuccessors();
  const Part<T, kChannelsLast> part(params);
  part.StartCopies(params.x, params.dy);
  const ClusterLayout& layout = params.layout;
  A* const partial = part.template At<A>(layout.partial);
  A* const scratch = part.template At<A>(layout.scratch);
  Side<A>* const column_sides = part.template At<Side<A>>(layout.column_values);
  Side<A>* const row_sides = part.template At<Side<A>>(layout.row_values);

  // The sides as forward left them: gates and maxima, no shares yet.
  const auto channel_side = [&](int c) {
    Side<A> side = NeutralSide<A>();
    if (params.channel) {
      const int64_t at = part.n * params.channels + c;
      side.gate = params.channel_gate[at];
      if (params.use_max) side.maximum = params.descriptors[params.batch * params.channels + at];
    }
    return side;
  };
  const auto position_side = [&](int p) {
    Side<A> side = NeutralSide<A>();
    if (params.spatial) {
      side.gate = params.spatial_gate[part.n * params.positions + p];
      side.maximum = params.planes[(part.n * 2 + 1) * params.positions + p];
    }
    return side;
  };
  for (int i = ThreadIndex(); i < part.columns; i += kClusterThreads)
    column_sides[i] = kChannelsLast ? channel_side(i) : position_side(i);
  for (int i = ThreadIndex(); i < part.row_count; i += kClusterThreads) {
    row_sides[i] =
        kChannelsLast ? position_side(part.row_begin + i) : channel_side(part.row_begin + i);
  }
  const auto row_side = [=](int row) { return row_sides[row]; };
  const auto column_side = [=](int column) { return column_sides[column]; };
  const int vectors = part.columns / V;

  if (params.y_in != nullptr) {
    // The ReLU's mask, applied to dy in place.
    const T* const y = static_cast<const T*>(params.y_in) + part.SampleOffset();
    T* const d_residual = params.d_residual != nullptr
                              ? static_cast<T*>(params.d_residual) + part.SampleOffset()
                              : nullptr;
    for (int stage = 0; stage < kStages; ++stage) part.WaitForStage(stage);
    for (int v = ThreadIndex(); v < part.row_count * vectors; v += kClusterThreads) {
      const Vec<T, V> output = Load<T, V>(y + static_cast<int64_t>(v) * V);
      Vec<T, V> masked = Load<T, V>(part.dy + v * V);
      CBAM_UNROLL
      for (int i = 0; i < V; ++i) {
        if (!(ToCompute(output.value[i]) > A(0))) FromCompute(A(0), &masked.value[i]);
      }
      *reinterpret_cast<Vec<T, V>*>(part.dy + v * V) = masked;
      if (d_residual != nullptr)
        StoreStreaming<T, V>(d_residual + static_cast<int64_t>(v) * V, masked);
    }
  }
  Barrier();

  if (params.spatial) {
    // Pass A: dz of this block's positions, and how many channels attain each maximum.
    A* const dz = part.template At<A>(layout.position_values);
    A* const counts = dz + part.positions_per_block();
    const auto store = [&](int i, A dot, A count) {
      const int64_t at = part.n * params.positions + part.position_begin() + i;
      const A gate = params.spatial_gate[at];
      if (params.d_spatial_gate != nullptr) dot += params.d_spatial_gate[at];
      dz[i] = dot * gate * (A(1) - gate);
      counts[i] = count;
    };
    if constexpr (kChannelsLast) {
      ReduceRows<Pass::kSpatialGrad>(part, params.parallel, row_side, column_side, store);
    } else {
      ReduceColumns<Pass::kSpatialGrad>(part, params.parallel, row_side, column_side, partial);
      ClusterBarrier();
      CombineColumns<false>(part, partial, store);
    }
    ClusterBarrier();
    const bool any = part.position_count() > 0;
    const Tiling& tiling = params.tiling;
    const Tile tile = any ? TileAt(tiling, part.rank) : Tile{};
    A* const windows = part.template At<A>(layout.windows);
    A* const gradients = windows + 2 * tiling.window_values;
    A* const weights = part.template At<A>(layout.weights);
    const A* const planes = params.planes + part.n * 2 * params.positions;
    if (any) {
      CBAM_NO_UNROLL
      for (int plane = 0; plane < 2; ++plane) {
        FillWindow(
            tiling, tile, windows + plane * tiling.window_values,
            [&](int64_t p) { return planes[plane * params.positions + p]; }, kClusterThreads);
      }
      const int share = part.positions_per_block();
      FillWindow(
          tiling, tile, gradients,
          [=](int64_t p) {
            const int owner = static_cast<int>(Quotient(p, share));
            return MapToRank(dz, owner)[p - static_cast<int64_t>(owner) * share];
          },
          kClusterThreads);
    }
    for (int i = ThreadIndex(); i < 2 * tiling.kernel_size * tiling.kernel_size;
         i += kClusterThreads)
      weights[i] = params.kernel[i];
    ClusterBarrier();  // the windows are there, and nobody reads anybody's dz any more
    for (int q = ThreadIndex(); q < part.position_count(); q += kClusterThreads) {
      const int64_t p = part.position_begin() + q;
      A d_mean, d_max;
      ConvolveTransposed(tiling, tile, gradients, weights, p, &d_mean, &d_max);
      const Side<A> side = MakeSide(params.spatial_gate[part.n * params.positions + p], d_mean,
                                    static_cast<A>(params.channels), true, d_max, counts[q],
                                    planes[params.positions + p]);
      if constexpr (kChannelsLast) {
        row_sides[q] = side;
      } else {
        StoreToAll(column_sides + p, part.ranks, side);
      }
    }
    SumTaps(tiling, tile, windows, gradients, part.template At<int>(layout.corners),
            kClusterThreads,
            [&](int64_t tap, A sum) { params.taps[tap * params.blocks + BlockIndex()] = sum; });
    if constexpr (kChannelsLast) {
      Barrier();
    } else {
      ClusterBarrier();
    }
  }

  if (params.channel) {
    const int share = part.channels_per_block(), begin = part.channel_begin(),
              count = part.channel_count();
    const int hidden = static_cast<int>(params.hidden);
    A* const descriptors = part.template At<A>(layout.channel_values);  // [2][share]
    A* const d_logits = descriptors + 2 * share;                        // [2][share]
    A* const counts = descriptors + 4 * share;
    const int64_t first_channel = part.n * params.channels + begin;
    // Pass B: the gradient of this block's channels' gates, and how many positions attain each
    // maximum.
    const auto store = [&](int i, A dot, A positions) {
      const A gate = params.channel_gate[first_channel + i];
      if (params.d_channel_gate != nullptr) dot += params.d_channel_gate[first_channel + i];
      const A d_logit = dot * gate * (A(1) - gate);
      d_logits[i] = params.use_mean ? d_logit : A(0);
      d_logits[share + i] = params.use_max ? d_logit : A(0);
      counts[i] = positions;
      descriptors[i] = params.descriptors[first_channel + i];
      descriptors[share + i] =
          params.descriptors[params.batch * params.channels + first_channel + i];
    };
    const bool without_spatial = params.parallel || !params.spatial;
    if constexpr (kChannelsLast) {
      ReduceColumns<Pass::kChannelGrad>(part, without_spatial, row_side, column_side, partial);
      ClusterBarrier();
      CombineColumns<false>(part, partial, store);
    } else {
      ReduceRows<Pass::kChannelGrad>(part, without_spatial, row_side, column_side, store);
    }
    Barrier();
    ComputeHidden(params, part, descriptors);
    const A* const values = part.template At<A>(layout.hidden);
    if (params.mlp_relu) {
      SumProducts(
          values, values + hidden, hidden, count, scratch,
          [&](int j, int c) {
            return params.w1[static_cast<int64_t>(j) * params.channels + begin + c];
          },
          [&](int c, A mean, A max) {
            const A bias = params.b1 != nullptr ? params.b1[begin + c] : A(0);
            if (!(mean + bias > A(0))) d_logits[c] = A(0);
            if (!(max + bias > A(0))) d_logits[share + c] = A(0);
          });
    }
    for (int c = ThreadIndex(); c < count; c += kClusterThreads) {
      A* const saved = params.d_logits + part.n * 2 * params.channels + begin + c;
      saved[0] = d_logits[c];
      saved[params.channels] = d_logits[share + c];
    }
    A* const d_hidden_partial = part.template At<A>(layout.d_hidden_partial);
    A* const d_hidden = part.template At<A>(layout.d_hidden);
    SumProducts(
        d_logits, d_logits + share, count, hidden, scratch,
        [&](int c, int j) {
          return params.w1[static_cast<int64_t>(j) * params.channels + begin + c];
        },
        [&](int j, A mean, A max) {
          d_hidden_partial[j] = mean;
          d_hidden_partial[hidden + j] = max;
        });
    ClusterBarrier();
    Gather(d_hidden_partial, hidden, part.ranks, [&](int i, A sum) {
      d_hidden[i] = values[i] > A(0) ? sum : A(0);
      if (part.rank == 0) {
        params.hidden_values[part.n * 2 * hidden + i] = values[i];
        params.d_hidden[part.n * 2 * hidden + i] = d_hidden[i];
      }
    });
    SumProducts(
        d_hidden, d_hidden + hidden, hidden, count, scratch,
        [&](int j, int c) { return params.w0[static_cast<int64_t>(begin + c) * hidden + j]; },
        [&](int c, A d_mean, A d_max) {
          const Side<A> side =
              MakeSide(params.channel_gate[first_channel + c], params.use_mean ? d_mean : A(0),
                       static_cast<A>(params.positions), params.use_max, d_max, counts[c],
                       descriptors[share + c]);
          if constexpr (kChannelsLast) {
            StoreToAll(column_sides + begin + c, part.ranks, side);
          } else {
            row_sides[c] = side;
          }
        });
    if constexpr (kChannelsLast) {
      ClusterBarrier();
    } else {
      Barrier();
    }
  }

  // Pass C.
  T* const dx = static_cast<T*>(params.dx) + part.SampleOffset();
  const int lanes = static_cast<int>(Smaller(vectors, kClusterThreads)),
            row_threads = kClusterThreads / lanes;
  const int lane = ThreadIndex() % lanes, row_thread = ThreadIndex() / lanes;
  if (row_thread >= row_threads) return;
  for (int column = lane * V; column < part.columns; column += lanes * V) {
    Side<A> sides[V];
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) sides[i] = column_sides[column + i];
    for (int row = row_thread; row < part.row_count; row += row_threads) {
      const Side<A> side = row_sides[row];
      const int64_t at = static_cast<int64_t>(row) * part.columns + column;
      const Vec<T, V> xs = Load<T, V>(part.x + at), dys = Load<T, V>(part.dy + at);
      Vec<T, V> results;
      CBAM_UNROLL
      for (int i = 0; i < V; ++i) {
        const A result = MapGradient(ToCompute(xs.value[i]), ToCompute(dys.value[i]),
                                     kChannelsLast ? sides[i] : side,
                                     kChannelsLast ? side : sides[i], params.parallel);
        FromCompute(result, &results.value[i]);
      }
      StoreStreaming<T, V>(dx + at, results);
    }
  }
#endif
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_CLUSTER_CUH_
