// The passes over maps, for one instruction set. Included by level.cc only.
//
// A tile is a matrix of rows and contiguous columns: positions x channels (NHWC) or channels x
// positions (NCHW). A *body* says what one vector of elements adds to two accumulators; two drivers
// run it: `Along` reduces each row, `Across` reduces each column. Values that belong to a channel
// or a position are operands that a body reads once per row or once per column, as the layout has
// it.
//
// Bytes: every pass reads each map it is given once, in the order of memory but for NCHW tiles
// (runs of a tile's positions), and backward_map and apply write one map. What makes passes cheap
// is that the pipeline gives them tiles that are still in a cache.
#ifndef CBAM_OPS_CORE_CPU_MAP_PASSES_H_
#define CBAM_OPS_CORE_CPU_MAP_PASSES_H_

#include "core/cpu/passes.h"
#include "core/cpu/simd.h"

namespace cbam_ops {
namespace cpu {
namespace CBAM_LEVEL {
namespace {

// A tile of a map: `rows` rows of `columns` contiguous elements, `stride` elements apart. What the
// caches are told of lies `ahead` elements after what is read, if that is not 0.
template <typename T>
struct Tile {
  const T* data;
  int64_t rows, columns, stride, ahead;
};

// How far ahead of what is read from memory the caches are told: from 2 to 6 KB are within the noise
// of each other (benchmarks/NOTES.md).
constexpr int64_t kAheadBytes = 2048;

// The same in elements; of rows that are shorter and do not follow each other, the next row; or 0.
template <typename T>
CBAM_INLINE int64_t Ahead(const Sample& sample, int64_t columns, int64_t stride) {
  if (!sample.from_memory) return 0;
  constexpr int64_t kAhead = kAheadBytes / int64_t{sizeof(T)};
  const bool is_run = columns == stride || columns > kAhead || sample.layout == Layout::kNHWC;
  if (is_run) return kTellsOfRuns ? kAhead : 0;
  return stride;
}

template <typename T>
CBAM_INLINE Tile<T> MakeTile(const Sample& sample, const void* map, Range positions,
                             Range channels) {
  const T* data = static_cast<const T*>(map);
  if (sample.layout == Layout::kNHWC) {
    return {data + positions.begin * sample.channels + channels.begin, positions.size(),
            channels.size(), sample.channels, Ahead<T>(sample, channels.size(), sample.channels)};
  }
  return {data + channels.begin * sample.positions + positions.begin, channels.size(),
          positions.size(), sample.positions, Ahead<T>(sample, positions.size(), sample.positions)};
}
template <typename T>
CBAM_INLINE Tile<T> MakeTile(const Sample& sample, const void* map, Range positions) {
  return MakeTile<T>(sample, map, positions, Range{0, sample.channels});
}

template <bool kTail, typename T>
CBAM_INLINE auto LoadSome(const T* p, int64_t n) -> decltype(Load(p)) {
  if constexpr (kTail) {
    return LoadFirst(p, n);
  } else {
    return Load(p);
  }
}

// Of a map, telling the caches ahead where that is not 0.
template <bool kTail, typename T>
CBAM_INLINE auto LoadMap(const T* p, int64_t ahead, int64_t n) -> decltype(Load(p)) {
  if constexpr (!kTail) {
    if (ahead > 0) FetchAhead(p, ahead);
  }
  return LoadSome<kTail>(p, n);
}

// A value per column (read with the vector) or per row (splat once).
template <bool kPerColumn, typename A>
struct Operand {
  using V = typename Simd<A>::V;
  const A* values;
  CBAM_INLINE V Row(int64_t row) const {
    if constexpr (kPerColumn) {
      return V{};
    } else {
      return Splat<A>(values[row]);
    }
  }
  template <bool kTail>
  CBAM_INLINE V At(V row_value, int64_t column, int64_t n) const {
    if constexpr (kPerColumn) {
      return LoadSome<kTail>(values + column, n);
    } else {
      return row_value;
    }
  }
};

// --- Drivers ---

// A lane adds up at most this many values before its float sum moves to double.
constexpr int64_t kVectorsPerPartialSum = 64;

template <typename Body>
constexpr auto kSecondStart =
    Body::kSecondIsMax ? -kInfinity<typename Body::A> : typename Body::A{0};

// Rows that go together are not neighbours but a part of the tile apart: each is then the next of a
// run of its own, in the order of memory, which is what processors prefetch. Neighbours of 1 or 2
// KB make a pattern within a page that is read from memory at half the speed (benchmarks/NOTES.md).
template <int kRows, typename Body>
CBAM_INLINE void RowsApart(const Body& body, int64_t row, int64_t apart, typename Body::Row* rows) {
  for (int i = 0; i < kRows; ++i) rows[i] = body.At(row + i * apart);
}

// first[i] = sum over row + i * apart, second[i] = maximum or sum, for kRows rows at a time so that
// per-column operands are loaded once for all of them.
template <int kRows, typename Body>
CBAM_INLINE void AlongRows(const Body& body, int64_t row, int64_t apart, int64_t columns,
                           double* first, double* second) {
  using A = typename Body::A;
  using V = typename Simd<A>::V;
  constexpr int64_t kLanes = Simd<A>::kLanes;
  typename Body::Row rows[kRows];
  RowsApart<kRows>(body, row, apart, rows);
  for (int i = 0; i < kRows; ++i) {
    first[i] = 0;
    second[i] = kSecondStart<Body>;
  }
  for (int64_t begin = 0; begin < columns; begin += kVectorsPerPartialSum * kLanes) {
    const int64_t left = columns - begin;
    const int64_t end =
        left > kVectorsPerPartialSum * kLanes ? begin + kVectorsPerPartialSum * kLanes : columns;
    V a[kRows], b[kRows];
    for (int i = 0; i < kRows; ++i) {
      a[i] = V{};
      b[i] = Splat<A>(kSecondStart<Body>);
    }
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      for (int i = 0; i < kRows; ++i)
        body.template Accumulate<false>(rows[i], j, kLanes, &a[i], &b[i]);
    }
    if (j < end) {
      for (int i = 0; i < kRows; ++i)
        body.template Accumulate<true>(rows[i], j, end - j, &a[i], &b[i]);
    }
    for (int i = 0; i < kRows; ++i) {
      first[i] += SumLanes(a[i]);
      if constexpr (Body::kSecondIsMax) {
        const double greatest = MaxLanes(b[i]);
        second[i] = greatest > second[i] ? greatest : second[i];
      } else {
        second[i] += SumLanes(b[i]);
      }
    }
  }
}

// Calls finish(row, first, second) for each row.
template <typename Body, typename Finish>
CBAM_INLINE void Along(const Body& body, int64_t rows, int64_t columns, const Finish& finish) {
  constexpr int kRows = Body::kRowsAlong;
  double first[kRows], second[kRows];
  const int64_t apart = rows / kRows;
  for (int64_t row = 0; row < apart; ++row) {
    AlongRows<kRows>(body, row, apart, columns, first, second);
    for (int i = 0; i < kRows; ++i) finish(row + i * apart, first[i], second[i]);
  }
  for (int64_t row = kRows * apart; row < rows; ++row) {
    AlongRows<1>(body, row, 1, columns, first, second);
    finish(row, first[0], second[0]);
  }
}

template <int kRows, bool kTail, typename Body>
CBAM_INLINE void AcrossVector(const Body& body, const typename Body::Row* rows, int64_t column,
                              int64_t n, bool start, typename Body::A* first,
                              typename Body::A* second) {
  using A = typename Body::A;
  using V = typename Simd<A>::V;
  V a{}, b = Splat<A>(kSecondStart<Body>);
  for (int i = 0; i < kRows; ++i) body.template Accumulate<kTail>(rows[i], column, n, &a, &b);
  if (!start) {
    a += LoadSome<kTail>(first, n);
    const V before = LoadSome<kTail>(second, n);
    b = Body::kSecondIsMax ? Max(b, before) : b + before;
  }
  if constexpr (kTail) {
    StoreFirst(first, a, n);
    StoreFirst(second, b, n);
  } else {
    Store(first, a);
    Store(second, b);
  }
}

// Columns [begin, end); the accumulators are those of column `begin`.
template <int kRows, typename Body>
CBAM_INLINE void AcrossRows(const Body& body, int64_t row, int64_t apart, int64_t begin,
                            int64_t end, bool start, typename Body::A* first,
                            typename Body::A* second) {
  constexpr int64_t kLanes = Simd<typename Body::A>::kLanes;
  typename Body::Row rows[kRows];
  RowsApart<kRows>(body, row, apart, rows);
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) {
    AcrossVector<kRows, false>(body, rows, j, kLanes, start, first + (j - begin),
                               second + (j - begin));
  }
  if (j < end) {
    AcrossVector<kRows, true>(body, rows, j, end - j, start, first + (j - begin),
                              second + (j - begin));
  }
}

template <typename Body>
CBAM_INLINE void AcrossBlock(const Body& body, Range rows, int64_t begin, int64_t end,
                             typename Body::A* first, typename Body::A* second) {
  constexpr int kRows = Body::kRowsAcross;
  const int64_t apart = rows.size() / kRows;
  for (int64_t row = rows.begin; row < rows.begin + apart; ++row)
    AcrossRows<kRows>(body, row, apart, begin, end, row == rows.begin, first, second);
  for (int64_t row = rows.begin + kRows * apart; row < rows.end; ++row)
    AcrossRows<1>(body, row, 1, begin, end, row == rows.begin, first, second);
}

// A float sum of more rows than this is taken in pieces, which are added up in double.
constexpr int64_t kRowsPerPartialSum = 512;

// first[j] = sum over the column, second[j] = maximum or sum. The accumulators live in the outputs,
// which stay in the first-level cache, while the map is read row by row, in the order of memory.
template <typename Body>
CBAM_INLINE void Across(const Body& body, int64_t rows, int64_t columns, typename Body::A* first,
                        typename Body::A* second) {
  using A = typename Body::A;
  if (rows == 0) {
    for (int64_t j = 0; j < columns; ++j) {
      first[j] = 0;
      second[j] = kSecondStart<Body>;
    }
    return;
  }
  if (rows <= kRowsPerPartialSum) return AcrossBlock(body, {0, rows}, 0, columns, first, second);
  constexpr int64_t kColumns = 256;
  double sums[2][kColumns];
  A pieces[2][kColumns];
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const int64_t end = begin + kColumns < columns ? begin + kColumns : columns;
    for (int64_t row = 0; row < rows; row += kRowsPerPartialSum) {
      const int64_t last = row + kRowsPerPartialSum < rows ? row + kRowsPerPartialSum : rows;
      AcrossBlock(body, {row, last}, begin, end, pieces[0], pieces[1]);
      for (int64_t j = 0; j < end - begin; ++j) {
        const double a = pieces[0][j], b = pieces[1][j];
        sums[0][j] = row == 0 ? a : sums[0][j] + a;
        if constexpr (Body::kSecondIsMax) {
          sums[1][j] = row == 0 || b > sums[1][j] ? b : sums[1][j];
        } else {
          sums[1][j] = row == 0 ? b : sums[1][j] + b;
        }
      }
    }
    for (int64_t j = begin; j < end; ++j) {
      first[j] = static_cast<A>(sums[0][j - begin]);
      second[j] = static_cast<A>(sums[1][j - begin]);
    }
  }
}

// Stores past the caches whole vectors that start where one may, of rows that start anywhere. Where
// the rows follow each other a vector may hold the end of one and the beginning of the next; what
// does not fill one, at both ends, is stored plainly.
template <typename T>
class Streamer {
 public:
  using A = typename ComputeOf<T>::A;
  using V = typename Simd<A>::V;
  static constexpr int64_t kLanes = Simd<A>::kLanes;

  // How many elements of a row that starts at `line` belong to a vector that starts before.
  static CBAM_INLINE int64_t Before(const T* line) {
    return -static_cast<int64_t>(reinterpret_cast<uintptr_t>(line) / sizeof(T)) & (kLanes - 1);
  }
  // The first n < kLanes of `value` go to `to` when their vector is full, or with Flush.
  CBAM_INLINE void Part(T* to, V value, int64_t n) {
    const int64_t at = (kLanes - Before(to)) & (kLanes - 1);
    if (begin_ == end_) begin_ = at;
    StoreFirst(part_ + at, value, n);
    end_ = at + n;
    vector_ = to - at;
    if (end_ < kLanes) return;
    if (begin_ > 0) return Flush();
    Stream(vector_, Load(part_));
    end_ = begin_ = 0;
  }
  CBAM_INLINE void Flush() {
    if (begin_ < end_)
      StoreFirst(vector_ + begin_, LoadFirst(part_ + begin_, end_ - begin_), end_ - begin_);
    end_ = begin_ = 0;
  }

 private:
  A part_[kLanes];  // of the vector of the map that starts at vector_, what lies in [begin_, end_)
  T* vector_ = nullptr;
  int64_t begin_ = 0, end_ = 0;
};

// Writes body(row, column) over the tile.
template <typename T, typename Body>
CBAM_INLINE void Map(const Body& body, int64_t rows, int64_t columns, int64_t stride, bool stream,
                     T* out) {
  constexpr int64_t kLanes = Simd<typename Body::A>::kLanes;
  if (!stream) {
    for (int64_t r = 0; r < rows; ++r) {
      const typename Body::Row row = body.At(r);
      T* line = out + r * stride;
      int64_t j = 0;
      for (; j + kLanes <= columns; j += kLanes)
        Store(line + j, body.template Value<false>(row, j, kLanes));
      if (j < columns)
        StoreFirst(line + j, body.template Value<true>(row, j, columns - j), columns - j);
    }
    return;
  }
  Streamer<T> streamer;
  for (int64_t r = 0; r < rows; ++r) {
    const typename Body::Row row = body.At(r);
    T* line = out + r * stride;
    const int64_t before = Streamer<T>::Before(line);
    int64_t j = before < columns ? before : columns;
    if (j > 0) streamer.Part(line, body.template Value<true>(row, 0, j), j);
    for (; j + kLanes <= columns; j += kLanes)
      Stream(line + j, body.template Value<false>(row, j, kLanes));
    if (j < columns)
      streamer.Part(line + j, body.template Value<true>(row, j, columns - j), columns - j);
    if (stride != columns) streamer.Flush();
  }
  streamer.Flush();
  EndStream();
}

// --- Narrow maps ---

// Of an NHWC map with 2, 3 or 4 channels a vector along the channels would be mostly empty. Such a
// map goes through the passes as NCHW, so many positions at a time, transposed into a tile that
// stays in the first-level cache. With more channels the transposition costs what it saves
// (benchmarks/NOTES.md); maps of one channel are NCHW as they are.
constexpr int64_t kNarrowPositions = 256, kNarrowChannels = 4;

template <typename T>
CBAM_INLINE bool IsNarrow(const Sample& sample) {
  return sample.layout == Layout::kNHWC && sample.channels > 1 &&
         sample.channels <= kNarrowChannels &&
         sample.channels < Simd<typename ComputeOf<T>::A>::kLanes;
}

// Calls copy(channels, channel, position) in the order of the map. The number of channels is a
// constant, so that the compiler finds the permutations.
template <typename Copy>
CBAM_INLINE void ForNarrow(int64_t positions, int64_t channels, const Copy& copy) {
  const auto each = [&](auto count) {
    for (int64_t p = 0; p < positions; ++p) {
      for (int64_t c = 0; c < count; ++c) copy(count, c, p);
    }
  };
  switch (channels) {
    case 2:
      return each(Constant<2>());
    case 3:
      return each(Constant<3>());
    default:
      return each(Constant<4>());
  }
}

// Positions of a narrow map, transposed.
template <typename T>
struct NarrowTile {
  alignas(64) T values[kNarrowChannels * kNarrowPositions];

  CBAM_INLINE const T* From(const Sample& sample, const void* map, Range positions) {
    const T* from = MakeTile<T>(sample, map, positions).data;
    const int64_t n = positions.size();
    ForNarrow(n, sample.channels, [&](int64_t channels, int64_t c, int64_t p) {
      values[c * n + p] = from[p * channels + c];
    });
    return values;
  }
  CBAM_INLINE void To(const Sample& sample, Range positions, void* map) const {
    T* to = const_cast<T*>(MakeTile<T>(sample, map, positions).data);
    const int64_t n = positions.size();
    ForNarrow(n, sample.channels, [&](int64_t channels, int64_t c, int64_t p) {
      to[p * channels + c] = values[c * n + p];
    });
  }
};

// What tiles add up to, by channel: sums, and maxima or sums.
template <typename A, bool kSecondIsMax>
struct NarrowTotals {
  double first[kNarrowChannels], second[kNarrowChannels];

  NarrowTotals() {
    for (int64_t c = 0; c < kNarrowChannels; ++c) {
      first[c] = 0;
      second[c] = kSecondIsMax ? -kInfinity<double> : 0;
    }
  }
  void Add(int64_t channels, const A* sums, const A* others) {
    for (int64_t c = 0; c < channels; ++c) {
      first[c] += sums[c];
      if constexpr (kSecondIsMax) {
        if (others[c] > second[c] || others[c] != others[c]) second[c] = others[c];
      } else {
        second[c] += others[c];
      }
    }
  }
  void Get(int64_t channels, A divisor, A* sums, A* others) const {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] = static_cast<A>(first[c] / divisor);
      others[c] = static_cast<A>(second[c]);
    }
  }
};

// Calls body(transposed, positions, offset) for the tiles of a range of a narrow map: the sample
// that a tile is, its positions in the map, and how far from the first of the range they begin.
template <typename Body>
CBAM_INLINE void ForNarrowTiles(const Sample& sample, Range positions, const Body& body) {
  for (int64_t begin = positions.begin; begin < positions.end; begin += kNarrowPositions) {
    const int64_t left = positions.end - begin;
    const int64_t size = left < kNarrowPositions ? left : kNarrowPositions;
    body(Sample{Layout::kNCHW, size, sample.channels, false}, Range{begin, begin + size},
         begin - positions.begin);
  }
}

template <typename A>
PositionValues<A> operator+(const PositionValues<A>& values, int64_t offset) {
  const auto at = [offset](const A* p) { return p == nullptr ? nullptr : p + offset; };
  return {at(values.gate), at(values.d_mean), at(values.maximum), at(values.d_max)};
}

// --- Pools ---

template <typename T, bool kGated, bool kGatePerColumn>
struct PoolBody {
  using A = typename ComputeOf<T>::A;
  using V = typename Simd<A>::V;
  static constexpr bool kSecondIsMax = true;
  static constexpr int kRowsAlong = 4;
  static constexpr int kRowsAcross = 4;

  Tile<T> x;
  Operand<kGatePerColumn, A> gate;

  struct Row {
    const T* x;
    V gate;
  };
  CBAM_INLINE Row At(int64_t row) const {
    if constexpr (kGated) return {x.data + row * x.stride, gate.Row(row)};
    return {x.data + row * x.stride, V{}};
  }
  template <bool kTail>
  CBAM_INLINE void Accumulate(const Row& row, int64_t column, int64_t n, V* sum, V* maximum) const {
    V v = LoadMap<kTail>(row.x + column, x.ahead, n);
    if constexpr (kGated) v *= gate.template At<kTail>(row.gate, column, n);
    *sum += v;
    if constexpr (kTail) v = Select(FirstLanes<A>(n), v, Splat<A>(-kInfinity<A>));
    *maximum = Max(v, *maximum);
  }
  // For the rare element-wise second look.
  A Element(int64_t row, int64_t column) const {
    const A value = ToCompute(x.data[row * x.stride + column]);
    if constexpr (kGated) return value * gate.values[kGatePerColumn ? column : row];
    return value;
  }
};

// Max() does not keep NaN. A NaN (or infinities of both signs) shows in the sum, and only then this
// is called.
template <typename A, typename Body>
A MaximumOrNan(const Body& body, int64_t row, int64_t column, int64_t row_step, int64_t column_step,
               int64_t count) {
  A greatest = -kInfinity<A>;
  for (int64_t i = 0; i < count; ++i, row += row_step, column += column_step) {
    const A value = body.Element(row, column);
    if (value != value) return value;
    if (value > greatest) greatest = value;
  }
  return greatest;
}

template <typename A>
bool AnyNan(const A* values, int64_t count) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  typename Simd<A>::I nan{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) nan |= Load(values + i) != Load(values + i);
  if (i < count) nan |= LoadFirst(values + i, count - i) != LoadFirst(values + i, count - i);
  int64_t any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) any |= nan[lane];
  return any != 0;
}

template <typename Body, typename A>
CBAM_INLINE void PoolAlong(const Body& body, int64_t rows, int64_t columns, A divisor, A* sum,
                           A* maximum) {
  Along(body, rows, columns, [&](int64_t row, double total, double greatest) {
    sum[row] = static_cast<A>(total / divisor);
    maximum[row] =
        total != total ? MaximumOrNan<A>(body, row, 0, 0, 1, columns) : static_cast<A>(greatest);
  });
}
template <typename Body, typename A>
CBAM_INLINE void PoolAcross(const Body& body, int64_t rows, int64_t columns, A divisor, A* sum,
                            A* maximum) {
  Across(body, rows, columns, sum, maximum);
  if (AnyNan(sum, columns)) {
    for (int64_t j = 0; j < columns; ++j) {
      if (sum[j] != sum[j]) maximum[j] = MaximumOrNan<A>(body, 0, j, 1, 0, rows);
    }
  }
  for (int64_t j = 0; j < columns; ++j) sum[j] /= divisor;
}

template <typename T, typename A = typename ComputeOf<T>::A>
void ChannelPool(const Sample& sample, const void* x, Range positions, Range channels, A divisor,
                 A* sum, A* maximum) {
  if (IsNarrow<T>(sample)) {
    NarrowTile<T> tile;
    NarrowTotals<A, true> totals;
    ForNarrowTiles(sample, positions, [&](const Sample& transposed, Range part, int64_t) {
      A sums[kNarrowChannels], maxima[kNarrowChannels];
      ChannelPool<T>(transposed, tile.From(sample, x, part), {0, part.size()}, channels, A{1}, sums,
                     maxima);
      totals.Add(channels.size(), sums, maxima);
    });
    return totals.Get(channels.size(), divisor, sum, maximum);
  }
  const PoolBody<T, false, false> body{MakeTile<T>(sample, x, positions, channels), {nullptr}};
  if (sample.layout == Layout::kNHWC) {
    PoolAcross(body, body.x.rows, body.x.columns, divisor, sum, maximum);
  } else {
    PoolAlong(body, body.x.rows, body.x.columns, divisor, sum, maximum);
  }
}

template <typename T, typename A = typename ComputeOf<T>::A>
void SpatialPool(const Sample& sample, const void* x, const A* gate, Range positions, A* mean,
                 A* maximum) {
  if (IsNarrow<T>(sample)) {
    NarrowTile<T> tile;
    return ForNarrowTiles(sample, positions,
                          [&](const Sample& transposed, Range part, int64_t offset) {
                            SpatialPool<T>(transposed, tile.From(sample, x, part), gate,
                                           {0, part.size()}, mean + offset, maximum + offset);
                          });
  }
  const Tile<T> tile = MakeTile<T>(sample, x, positions);
  const A channels = static_cast<A>(sample.channels);
  if (sample.layout == Layout::kNHWC) {
    if (gate != nullptr) {
      PoolAlong(PoolBody<T, true, true>{tile, {gate}}, tile.rows, tile.columns, channels, mean,
                maximum);
    } else {
      PoolAlong(PoolBody<T, false, true>{tile, {gate}}, tile.rows, tile.columns, channels, mean,
                maximum);
    }
  } else if (gate != nullptr) {
    PoolAcross(PoolBody<T, true, false>{tile, {gate}}, tile.rows, tile.columns, channels, mean,
               maximum);
  } else {
    PoolAcross(PoolBody<T, false, false>{tile, {gate}}, tile.rows, tile.columns, channels, mean,
               maximum);
  }
}

// --- Gates applied ---

template <typename T, bool kChannelsAreColumns, bool kChannelGate, bool kPositionGate,
          bool kResidual, bool kRelu>
struct ApplyBody {
  using A = typename ComputeOf<T>::A;
  using V = typename Simd<A>::V;
  Tile<T> x, residual;
  Operand<kChannelsAreColumns, A> channel_gate;
  Operand<!kChannelsAreColumns, A> position_gate;

  struct Row {
    const T *x, *residual;
    V channel_gate, position_gate;
  };
  CBAM_INLINE Row At(int64_t row) const {
    Row r{x.data + row * x.stride, nullptr, V{}, V{}};
    if constexpr (kResidual) r.residual = residual.data + row * residual.stride;
    if constexpr (kChannelGate) r.channel_gate = channel_gate.Row(row);
    if constexpr (kPositionGate) r.position_gate = position_gate.Row(row);
    return r;
  }
  template <bool kTail>
  CBAM_INLINE V Value(const Row& row, int64_t column, int64_t n) const {
    V v = LoadSome<kTail>(row.x + column, n);
    if constexpr (kChannelGate) v *= channel_gate.template At<kTail>(row.channel_gate, column, n);
    if constexpr (kPositionGate)
      v *= position_gate.template At<kTail>(row.position_gate, column, n);
    if constexpr (kResidual) v += LoadSome<kTail>(row.residual + column, n);
    if constexpr (kRelu) v = Max(V{}, v);  // this order keeps NaN
    return v;
  }
};

template <typename T, bool... kFlags, typename A>
void ApplyWith(const Sample& sample, const void* x, const A* channel_gate, const A* position_gate,
               const void* residual, Range positions, bool stream, void* y) {
  const Tile<T> tile = MakeTile<T>(sample, x, positions);
  const Tile<T> addend = MakeTile<T>(sample, residual == nullptr ? x : residual, positions);
  T* out = const_cast<T*>(MakeTile<T>(sample, y, positions).data);
  const ApplyBody<T, kFlags...> body{tile, addend, {channel_gate}, {position_gate}};
  Map(body, tile.rows, tile.columns, tile.stride, stream, out);
}

template <typename T, typename A = typename ComputeOf<T>::A>
void Apply(const Sample& sample, const void* x, const A* channel_gate, const A* position_gate,
           const void* residual, Activation activation, Range positions, bool stream, void* y) {
  if (IsNarrow<T>(sample)) {
    NarrowTile<T> tile, addend;
    return ForNarrowTiles(
        sample, positions, [&](const Sample& transposed, Range part, int64_t offset) {
          Apply<T>(transposed, tile.From(sample, x, part), channel_gate,
                   position_gate == nullptr ? nullptr : position_gate + offset,
                   residual == nullptr ? nullptr : addend.From(sample, residual, part), activation,
                   {0, part.size()}, false, tile.values);
          tile.To(sample, part, y);
        });
  }
  using Function =
      void (*)(const Sample&, const void*, const A*, const A*, const void*, Range, bool, void*);
#define CBAM_RESIDUAL_RELU(nhwc, channel, position)         \
  {                                                         \
    {ApplyWith<T, nhwc, channel, position, false, false>,   \
     ApplyWith<T, nhwc, channel, position, false, true>},   \
    {                                                       \
      ApplyWith<T, nhwc, channel, position, true, false>,   \
          ApplyWith<T, nhwc, channel, position, true, true> \
    }                                                       \
  }
#define CBAM_GATES(nhwc)                                                               \
  {                                                                                    \
    {CBAM_RESIDUAL_RELU(nhwc, false, false), CBAM_RESIDUAL_RELU(nhwc, false, true)}, { \
      CBAM_RESIDUAL_RELU(nhwc, true, false), CBAM_RESIDUAL_RELU(nhwc, true, true)      \
    }                                                                                  \
  }
  static constexpr Function kTable[2][2][2][2][2] = {CBAM_GATES(false), CBAM_GATES(true)};
#undef CBAM_GATES
#undef CBAM_RESIDUAL_RELU
  kTable[sample.layout == Layout::kNHWC][channel_gate != nullptr][position_gate != nullptr]
        [residual != nullptr][activation == Activation::kRelu](
            sample, x, channel_gate, position_gate, residual, positions, stream, y);
}

template <typename T>
struct MaskBody {
  using A = typename ComputeOf<T>::A;
  using V = typename Simd<A>::V;
  Tile<T> dy, y;
  struct Row {
    const T *dy, *y;
  };
  CBAM_INLINE Row At(int64_t row) const {
    return {dy.data + row * dy.stride, y.data + row * y.stride};
  }
  template <bool kTail>
  CBAM_INLINE V Value(const Row& row, int64_t column, int64_t n) const {
    // A product, so that NaN passes as it does in TensorFlow's gradient of relu.
    return LoadSome<kTail>(row.dy + column, n) *
           Where(LoadSome<kTail>(row.y + column, n) > V{}, Splat<A>(1));
  }
};

template <typename T>
void Mask(const Sample& sample, const void* dy, const void* y, Range positions, void* masked) {
  const MaskBody<T> body{MakeTile<T>(sample, dy, positions), MakeTile<T>(sample, y, positions)};
  T* out = const_cast<T*>(MakeTile<T>(sample, masked, positions).data);
  if (IsNarrow<T>(sample)) return Map(body, 1, positions.size() * sample.channels, 0, false, out);
  Map(body, body.dy.rows, body.dy.columns, body.dy.stride, false, out);
}

// --- Backward ---

// Pass A.
template <typename T, bool kChannelsAreColumns, bool kHasDy, bool kGated, bool kMaximumOfX>
struct BackwardPositionsBody {
  using A = typename ComputeOf<T>::A;
  using V = typename Simd<A>::V;
  static constexpr bool kSecondIsMax = false;
  static constexpr int kRowsAlong = 4;
  static constexpr int kRowsAcross = 4;
  Tile<T> x, dy;
  Operand<kChannelsAreColumns, A> gate;
  Operand<!kChannelsAreColumns, A> maximum;

  struct Row {
    const T *x, *dy;
    V gate, maximum;
  };
  CBAM_INLINE Row At(int64_t row) const {
    Row r{x.data + row * x.stride, nullptr, V{}, maximum.Row(row)};
    if constexpr (kHasDy) r.dy = dy.data + row * dy.stride;
    if constexpr (kGated) r.gate = gate.Row(row);
    return r;
  }
  template <bool kTail>
  CBAM_INLINE void Accumulate(const Row& row, int64_t column, int64_t n, V* dot, V* count) const {
    const V x_value = LoadMap<kTail>(row.x + column, x.ahead, n);
    V u = x_value;
    if constexpr (kGated) u *= gate.template At<kTail>(row.gate, column, n);
    if constexpr (kHasDy) *dot = Fma(LoadMap<kTail>(row.dy + column, x.ahead, n), u, *dot);
    auto tie = (kMaximumOfX ? x_value : u) == maximum.template At<kTail>(row.maximum, column, n);
    if constexpr (kTail) tie &= FirstLanes<A>(n);
    *count = AddWhere(*count, tie, Splat<A>(1));
  }
};

template <typename T, bool kHasDy, bool kGated, bool kMaximumOfX, typename A>
void BackwardPositionsWith(const Sample& sample, const void* x, const void* dy, const A* gate,
                           const A* maximum, Range positions, A* dot, A* count) {
  const Tile<T> tile = MakeTile<T>(sample, x, positions);
  const Tile<T> dy_tile = MakeTile<T>(sample, kHasDy ? dy : x, positions);
  if (sample.layout == Layout::kNHWC) {
    const BackwardPositionsBody<T, true, kHasDy, kGated, kMaximumOfX> body{
        tile, dy_tile, {gate}, {maximum}};
    Along(body, tile.rows, tile.columns, [&](int64_t row, double total, double ties) {
      dot[row] = static_cast<A>(total);
      count[row] = static_cast<A>(ties);
    });
  } else {
    const BackwardPositionsBody<T, false, kHasDy, kGated, kMaximumOfX> body{
        tile, dy_tile, {gate}, {maximum}};
    Across(body, tile.rows, tile.columns, dot, count);
  }
}

template <typename T, typename A = typename ComputeOf<T>::A>
void BackwardPositions(const Sample& sample, Module module, const void* x, const void* dy,
                       const A* gate, const A* maximum, Range positions, A* dot, A* count) {
  if (IsNarrow<T>(sample)) {
    NarrowTile<T> x_tile, dy_tile;
    return ForNarrowTiles(
        sample, positions, [&](const Sample& transposed, Range part, int64_t offset) {
          BackwardPositions<T>(transposed, module, x_tile.From(sample, x, part),
                               dy == nullptr ? nullptr : dy_tile.From(sample, dy, part), gate,
                               maximum + offset, {0, part.size()}, dot + offset, count + offset);
        });
  }
  if (dy == nullptr) {
    BackwardPositionsWith<T, false, false, true>(sample, x, dy, gate, maximum, positions, dot,
                                                 count);
  } else if (gate == nullptr) {
    BackwardPositionsWith<T, true, false, true>(sample, x, dy, gate, maximum, positions, dot,
                                                count);
  } else if (module == Module::kParallel) {
    BackwardPositionsWith<T, true, true, true>(sample, x, dy, gate, maximum, positions, dot, count);
  } else {
    BackwardPositionsWith<T, true, true, false>(sample, x, dy, gate, maximum, positions, dot,
                                                count);
  }
}

// What passes B and C share: the operands, and the gradient that reaches u = x * g_c (or x, where
// there is no channel gate) through the spatial part.
template <typename T, bool kChannelsAreColumns, Module kModule>
struct BackwardBody {
  using A = typename ComputeOf<T>::A;
  using V = typename Simd<A>::V;
  static constexpr bool kHasDy = kModule != Module::kChannelPool && kModule != Module::kSpatialPool;
  static constexpr bool kHasChannel =
      kModule != Module::kSpatialAttention && kModule != Module::kSpatialPool;
  static constexpr bool kHasSpatial =
      kModule != Module::kChannelAttention && kModule != Module::kChannelPool;
  static constexpr bool kSecondIsMax = false;
  static constexpr int kRowsAlong = CBAM_VECTOR_BYTES == 64 ? 4 : 2;  // as registers allow
  static constexpr int kRowsAcross = 2;

  Tile<T> x, dy;
  PositionValues<A> position;
  ChannelValues<A> channel;

  using ByChannel = Operand<kChannelsAreColumns, A>;
  using ByPosition = Operand<!kChannelsAreColumns, A>;

  struct Row {
    const T *x, *dy;
    V position_gate, position_mean, position_maximum, position_max;
    V channel_gate, channel_mean, channel_maximum, channel_max;
  };
  CBAM_INLINE Row At(int64_t row) const {
    Row r{};
    r.x = x.data + row * x.stride;
    if constexpr (kHasDy) r.dy = dy.data + row * dy.stride;
    if constexpr (kHasSpatial) {
      if constexpr (kHasDy) r.position_gate = ByPosition{position.gate}.Row(row);
      r.position_mean = ByPosition{position.d_mean}.Row(row);
      r.position_maximum = ByPosition{position.maximum}.Row(row);
      r.position_max = ByPosition{position.d_max}.Row(row);
    }
    if constexpr (kHasChannel) {
      if constexpr (kHasDy) r.channel_gate = ByChannel{channel.gate}.Row(row);
      r.channel_maximum = ByChannel{channel.maximum}.Row(row);
    }
    return r;
  }

  // Of the descriptors: da_s / C + dm_s * tie.
  template <bool kTail>
  CBAM_INLINE V FromDescriptors(const Row& row, V source, int64_t column, int64_t n) const {
    const auto tie =
        source == ByPosition{position.maximum}.template At<kTail>(row.position_maximum, column, n);
    return AddWhere(ByPosition{position.d_mean}.template At<kTail>(row.position_mean, column, n),
                    tie,
                    ByPosition{position.d_max}.template At<kTail>(row.position_max, column, n));
  }
  template <bool kTail>
  CBAM_INLINE V PositionGate(const Row& row, int64_t column, int64_t n) const {
    return ByPosition{position.gate}.template At<kTail>(row.position_gate, column, n);
  }
  template <bool kTail>
  CBAM_INLINE V ChannelGate(const Row& row, int64_t column, int64_t n) const {
    return ByChannel{channel.gate}.template At<kTail>(row.channel_gate, column, n);
  }
  // The gradient that reaches u, the product x * g_c.
  template <bool kTail>
  CBAM_INLINE V OfProduct(const Row& row, V x_value, V dy_value, int64_t column, int64_t n) const {
    if constexpr (kModule == Module::kChannelFirst) {
      const V u = x_value * ChannelGate<kTail>(row, column, n);
      return Fma(dy_value, PositionGate<kTail>(row, column, n),
                 FromDescriptors<kTail>(row, u, column, n));
    } else if constexpr (kModule == Module::kParallel) {
      return dy_value * PositionGate<kTail>(row, column, n);
    } else {
      return dy_value;
    }
  }

  // Pass B.
  template <bool kTail>
  CBAM_INLINE void Accumulate(const Row& row, int64_t column, int64_t n, V* dot, V* count) const {
    const V x_value = LoadMap<kTail>(row.x + column, x.ahead, n);
    if constexpr (kHasDy) {
      const V dy_value = LoadMap<kTail>(row.dy + column, x.ahead, n);
      *dot = Fma(OfProduct<kTail>(row, x_value, dy_value, column, n), x_value, *dot);
    }
    auto tie =
        x_value == ByChannel{channel.maximum}.template At<kTail>(row.channel_maximum, column, n);
    if constexpr (kTail) tie &= FirstLanes<A>(n);
    *count = AddWhere(*count, tie, Splat<A>(1));
  }
};

// Pass C. The channel's own gradients are needed here only, so they are not in Row of pass B.
template <typename T, bool kChannelsAreColumns, Module kModule>
struct BackwardMapBody : BackwardBody<T, kChannelsAreColumns, kModule> {
  using Base = BackwardBody<T, kChannelsAreColumns, kModule>;
  using A = typename Base::A;
  using V = typename Base::V;
  using Row = typename Base::Row;
  using ByChannel = typename Base::ByChannel;

  CBAM_INLINE Row At(int64_t row) const {
    Row r = Base::At(row);
    if constexpr (Base::kHasChannel) {
      r.channel_mean = ByChannel{this->channel.d_mean}.Row(row);
      r.channel_max = ByChannel{this->channel.d_max}.Row(row);
    }
    return r;
  }
  template <bool kTail>
  CBAM_INLINE V Value(const Row& row, int64_t column, int64_t n) const {
    const V x_value = LoadMap<kTail>(row.x + column, this->x.ahead, n);
    V dx{};
    if constexpr (kModule == Module::kSpatialPool || kModule == Module::kSpatialAttention ||
                  kModule == Module::kParallel) {
      dx = this->template FromDescriptors<kTail>(row, x_value, column, n);
    }
    if constexpr (Base::kHasDy) {
      const V dy_value = LoadMap<kTail>(row.dy + column, this->x.ahead, n);
      if constexpr (kModule == Module::kSpatialAttention) {
        dx = Fma(dy_value, this->template PositionGate<kTail>(row, column, n), dx);
      } else {
        dx = Fma(this->template OfProduct<kTail>(row, x_value, dy_value, column, n),
                 this->template ChannelGate<kTail>(row, column, n), dx);
      }
    }
    if constexpr (Base::kHasChannel) {
      const auto tie = x_value == ByChannel{this->channel.maximum}.template At<kTail>(
                                      row.channel_maximum, column, n);
      dx += AddWhere(
          ByChannel{this->channel.d_mean}.template At<kTail>(row.channel_mean, column, n), tie,
          ByChannel{this->channel.d_max}.template At<kTail>(row.channel_max, column, n));
    }
    return dx;
  }
};

template <typename T, Module kModule, typename A>
void BackwardChannelsWith(const Sample& sample, const void* x, const void* dy,
                          const PositionValues<A>& position, const ChannelValues<A>& channel,
                          Range positions, A* dot, A* count) {
  const Tile<T> tile = MakeTile<T>(sample, x, positions);
  const Tile<T> dy_tile = MakeTile<T>(sample, dy == nullptr ? x : dy, positions);
  if (sample.layout == Layout::kNHWC) {
    const BackwardBody<T, true, kModule> body{tile, dy_tile, position, channel};
    Across(body, tile.rows, tile.columns, dot, count);
  } else {
    const BackwardBody<T, false, kModule> body{tile, dy_tile, position, channel};
    Along(body, tile.rows, tile.columns, [&](int64_t row, double total, double ties) {
      dot[row] = static_cast<A>(total);
      count[row] = static_cast<A>(ties);
    });
  }
}

template <typename T, typename A = typename ComputeOf<T>::A>
void BackwardChannels(const Sample& sample, Module module, const void* x, const void* dy,
                      const PositionValues<A>& position, const ChannelValues<A>& channel,
                      Range positions, A* dot, A* count) {
  if (IsNarrow<T>(sample)) {
    NarrowTile<T> x_tile, dy_tile;
    NarrowTotals<A, false> totals;
    ForNarrowTiles(sample, positions, [&](const Sample& transposed, Range part, int64_t offset) {
      A dots[kNarrowChannels], counts[kNarrowChannels];
      BackwardChannels<T>(transposed, module, x_tile.From(sample, x, part),
                          dy == nullptr ? nullptr : dy_tile.From(sample, dy, part),
                          position + offset, channel, {0, part.size()}, dots, counts);
      totals.Add(sample.channels, dots, counts);
    });
    return totals.Get(sample.channels, A{1}, dot, count);
  }
  switch (module) {
    case Module::kChannelFirst:
      return BackwardChannelsWith<T, Module::kChannelFirst>(sample, x, dy, position, channel,
                                                            positions, dot, count);
    case Module::kParallel:
      return BackwardChannelsWith<T, Module::kParallel>(sample, x, dy, position, channel, positions,
                                                        dot, count);
    case Module::kChannelAttention:
      return BackwardChannelsWith<T, Module::kChannelAttention>(sample, x, dy, position, channel,
                                                                positions, dot, count);
    case Module::kChannelPool:
      return BackwardChannelsWith<T, Module::kChannelPool>(sample, x, dy, position, channel,
                                                           positions, dot, count);
    case Module::kSpatialAttention:
    case Module::kSpatialPool:
      return;  // no channel gate, nothing to reduce
  }
}

template <typename T, Module kModule, typename A>
void BackwardMapWith(const Sample& sample, const void* x, const void* dy,
                     const PositionValues<A>& position, const ChannelValues<A>& channel,
                     Range positions, bool stream, void* dx) {
  const Tile<T> tile = MakeTile<T>(sample, x, positions);
  const Tile<T> dy_tile = MakeTile<T>(sample, dy == nullptr ? x : dy, positions);
  T* out = const_cast<T*>(MakeTile<T>(sample, dx, positions).data);
  if (sample.layout == Layout::kNHWC) {
    const BackwardMapBody<T, true, kModule> body{{tile, dy_tile, position, channel}};
    Map(body, tile.rows, tile.columns, tile.stride, stream, out);
  } else {
    const BackwardMapBody<T, false, kModule> body{{tile, dy_tile, position, channel}};
    Map(body, tile.rows, tile.columns, tile.stride, stream, out);
  }
}

template <typename T, typename A = typename ComputeOf<T>::A>
void BackwardMap(const Sample& sample, Module module, const void* x, const void* dy,
                 const PositionValues<A>& position, const ChannelValues<A>& channel,
                 Range positions, bool stream, void* dx) {
  if (IsNarrow<T>(sample)) {
    NarrowTile<T> x_tile, dy_tile;
    return ForNarrowTiles(
        sample, positions, [&](const Sample& transposed, Range part, int64_t offset) {
          BackwardMap<T>(transposed, module, x_tile.From(sample, x, part),
                         dy == nullptr ? nullptr : dy_tile.From(sample, dy, part),
                         position + offset, channel, {0, part.size()}, false, x_tile.values);
          x_tile.To(sample, part, dx);
        });
  }
  using Function = void (*)(const Sample&, const void*, const void*, const PositionValues<A>&,
                            const ChannelValues<A>&, Range, bool, void*);
  static constexpr Function kTable[] = {
      BackwardMapWith<T, Module::kChannelFirst>,     BackwardMapWith<T, Module::kParallel>,
      BackwardMapWith<T, Module::kChannelAttention>, BackwardMapWith<T, Module::kSpatialAttention>,
      BackwardMapWith<T, Module::kChannelPool>,      BackwardMapWith<T, Module::kSpatialPool>,
  };
  kTable[static_cast<int>(module)](sample, x, dy, position, channel, positions, stream, dx);
}

// --- Conversions ---

template <typename T, typename A = typename ComputeOf<T>::A>
void ToMapType(const A* in, int64_t count, void* out, int64_t stride) {
  T* to = static_cast<T*>(out);
  for (int64_t i = 0; i < count; ++i) StoreFirst(to + i * stride, Splat<A>(in[i]), 1);
}

template <typename T, typename A = typename ComputeOf<T>::A>
void ToComputeType(const void* in, int64_t stride, int64_t count, A* out) {
  const T* from = static_cast<const T*>(in);
  for (int64_t i = 0; i < count; ++i) out[i] = ToCompute(from[i * stride]);
}

}  // namespace
}  // namespace CBAM_LEVEL
}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_MAP_PASSES_H_
