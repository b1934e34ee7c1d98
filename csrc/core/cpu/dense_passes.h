// The small dense work on descriptors and gates, for one instruction set and compute type: the
// products of the MLP, the sigmoid, and the convolution over the two planes. Included by level.cc
// only.
//
// None of it touches a map, but at C = 2048 the MLP's weights are as large as a sample, so the
// products keep their sums in registers (at most 8 rows x 2 vectors) and read the weights once per
// so many rows.
#ifndef CBAM_OPS_CORE_CPU_DENSE_PASSES_H_
#define CBAM_OPS_CORE_CPU_DENSE_PASSES_H_

#include "core/cpu/passes.h"
#include "core/cpu/simd.h"

namespace cbam_ops {
namespace cpu {
namespace CBAM_LEVEL {
namespace {

// --- Products ---

// Sums over at most this many products before they move to the output: long sums stay accurate, and
// the panel of b that one block of columns reads stays in the first-level cache for all rows.
constexpr int64_t kInnerBlock = 256;

// Sums, rows times vectors, that fill the registers beside what a step loads: AVX-512 has 32, the
// others 16.
constexpr int kProductSums = CBAM_VECTOR_BYTES == 64 ? 16 : 12;

// Rows of b by which the caches are told ahead where a block reads so short a piece of each that
// processors do not see it coming. A tail alone is too little; 8 vectors are runs that they see.
constexpr int64_t kProductAhead = 16;

// What the first-level cache holds beside the rows that a product reads and writes.
constexpr int64_t kPanelBytes = int64_t{32} << 10;

// Adds a's and b's inner range to a block of the output. `n` is the number of columns of the last
// vector, kLanes when it is whole.
template <int kRows, int kVectors, bool kTail, typename A>
CBAM_INLINE void ProductBlock(const Product<A>& p, Range inner, int64_t row, int64_t column,
                              int64_t n) {
  using V = typename Simd<A>::V;
  constexpr int64_t kLanes = Simd<A>::kLanes;
  const auto load = [n](const A* from, int v) {
    if constexpr (kTail) {
      return v == kVectors - 1 ? LoadFirst(from + v * kLanes, n) : Load(from + v * kLanes);
    } else {
      return Load(from + v * kLanes);
    }
  };
  V sum[kRows][kVectors] = {};
  const A* a = p.a + row * p.a_row_stride + inner.begin * p.a_inner_stride;
  const int64_t b_row = inner.begin > 0 ? inner.begin % p.b_rows : 0;
  const A* b = p.b + b_row * p.b_stride + column;
  const A* const b_end = p.b + p.b_rows * p.b_stride + column;
  for (int64_t k = inner.begin; k < inner.end; ++k, a += p.a_inner_stride) {
    V right[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kTellsOfRuns && (kVectors == 2 || kVectors == 4))
        FetchAhead(b + v * kLanes, kProductAhead * p.b_stride);
      right[v] = load(b, v);
    }
    for (int i = 0; i < kRows; ++i) {
      const V left = Splat<A>(a[i * p.a_row_stride]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Fma(left, right[v], sum[i][v]);
    }
    b += p.b_stride;
    if (b == b_end) b = p.b + column;
  }
  const bool first = inner.begin == 0, last = inner.end == p.inner;
  for (int i = 0; i < kRows; ++i) {
    A* out = p.out + (row + i) * p.out_stride + column;
    for (int v = 0; v < kVectors; ++v) {
      V value = sum[i][v];
      if (!first) value += load(out, v);
      if (first && p.bias != nullptr) value += load(p.bias + column, v);
      if (last && p.activation == Activation::kRelu) value = Max(V{}, value);
      if (kTail && v == kVectors - 1) {
        StoreFirst(out + v * kLanes, value, n);
      } else {
        Store(out + v * kLanes, value);
      }
    }
  }
}

template <int kVectors, bool kTail, typename A>
CBAM_INLINE void ProductColumns(const Product<A>& p, int64_t column, int64_t n) {
  int64_t begin = 0;
  do {  // once even where there is nothing to add: the output is written
    const Range inner{begin, begin + kInnerBlock < p.inner ? begin + kInnerBlock : p.inner};
    int64_t row = 0;
    const auto rows = [&](auto count) CBAM_INLINE_LAMBDA {
      for (; row + count <= p.rows; row += count)
        ProductBlock<count, kVectors, kTail>(p, inner, row, column, n);
    };
    constexpr int kMost = kProductSums / (kVectors > 2 ? kVectors : 2);
    rows(Constant<kMost>());
    if constexpr (kMost > 4) rows(Constant<4>());
    if constexpr (kMost > 2) rows(Constant<2>());
    if constexpr (kMost > 1) rows(Constant<1>());
    begin += kInnerBlock;
  } while (begin < p.inner);
}

template <typename A>
CBAM_INLINE void MultiplyRows(const Product<A>& p) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  int64_t column = 0;
  const auto columns = [&](auto vectors) CBAM_INLINE_LAMBDA {
    for (; column + vectors * kLanes <= p.columns; column += vectors * kLanes)
      ProductColumns<vectors, false>(p, column, kLanes);
  };
  // Of few rows more columns at a time: as many sums, and longer pieces of b.
  if (p.rows < kProductSums / 4) columns(Constant<8>());
  if (p.rows < kProductSums / 2) columns(Constant<4>());
  columns(Constant<2>());
  columns(Constant<1>());
  if (column < p.columns) ProductColumns<1, true>(p, column, p.columns - column);
}

template <typename A>
void Multiply(const Product<A>& p) {
  // Where b stays in the first-level cache, the output is written in the order of memory.
  const bool b_stays = p.b_rows * p.columns * int64_t{sizeof(A)} <= kPanelBytes;
  const int64_t step = b_stays ? kProductSums / 2 : p.rows;
  Product<A> part = p;
  for (int64_t left = p.rows; left > 0; left -= step) {
    part.rows = step < left ? step : left;
    MultiplyRows(part);
    part.a += step * p.a_row_stride;
    part.out += step * p.out_stride;
  }
}

// Rows and columns whose dot products fill the registers beside what a step loads.
constexpr int kDotRows = 4;
constexpr int kDotColumns = CBAM_VECTOR_BYTES == 64 ? 4 : 3;

template <int kRows, int kColumns, typename A>
CBAM_INLINE void DotBlock(const DotProducts<A>& p, int64_t row, int64_t column) {
  using V = typename Simd<A>::V;
  constexpr int64_t kLanes = Simd<A>::kLanes;
  V sum[kRows][kColumns] = {};
  const A* a = p.a + row * p.a_stride;
  const A* b = p.b + column * p.b_stride;
  const auto step = [&](int64_t k, auto load) {
    V left[kRows];
    for (int i = 0; i < kRows; ++i) left[i] = load(a + i * p.a_stride + k);
    for (int j = 0; j < kColumns; ++j) {
      const V right = load(b + j * p.b_stride + k);
      if constexpr (kTellsOfRuns && kRows > 1)
        FetchAhead(b + j * p.b_stride + k, kColumns * p.b_stride);
      for (int i = 0; i < kRows; ++i) sum[i][j] = Fma(left[i], right, sum[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= p.inner; k += kLanes) step(k, [](const A* from) { return Load(from); });
  const int64_t n = p.inner - k;
  if (n > 0) step(k, [n](const A* from) { return LoadFirst(from, n); });
  SumLanesOfEach(sum, p.out + row * p.out_stride + column, p.out_stride);
}

template <int kColumns, typename A>
CBAM_INLINE void DotColumns(const DotProducts<A>& p, int64_t column) {
  int64_t row = 0;
  for (; row + kDotRows <= p.rows; row += kDotRows) DotBlock<kDotRows, kColumns>(p, row, column);
  for (; row < p.rows; ++row) DotBlock<1, kColumns>(p, row, column);
}

template <typename A>
void DotProductsOf(const DotProducts<A>& p) {
  int64_t column = 0;
  for (; column + kDotColumns <= p.columns; column += kDotColumns)
    DotColumns<kDotColumns>(p, column);
  for (; column < p.columns; ++column) DotColumns<1>(p, column);
}

// --- Sigmoid ---

// exp(x) for x in [-87.3, 0], within 2 units in the last place: 2^n * exp(r), the polynomial of
// Cephes' expf for |r| <= ln(2) / 2.
CBAM_INLINE VF ExpOfNegative(VF x) {
  using U = Simd<float>::U;  // where x is NaN the bits may wrap; a caller looks at x itself
  const VF magic =
      Splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const VF shifted = x * 1.44269504088896341f + magic;
  const VF n = shifted - magic;
  VF r = Fma(n, Splat(-0.693359375f), x);  // exact: the constant has few bits
  r = Fma(n, Splat(2.12194440e-4f), r);
  VF p = Splat(1.9875691500e-4f);
  p = Fma(p, r, Splat(1.3981999507e-3f));
  p = Fma(p, r, Splat(8.3334519073e-3f));
  p = Fma(p, r, Splat(4.1665795894e-2f));
  p = Fma(p, r, Splat(1.6666665459e-1f));
  p = Fma(p, r, Splat(5.0000001201e-1f));
  p = Fma(p, r * r, r + 1.0f);
  return (VF)((U)p + (((U)shifted - (U)magic) << 23));
}

// exp(-|z|), so that neither end overflows; exactly 0 far out. Of a NaN anything.
CBAM_INLINE VF ExpOfMinusMagnitude(VF z) {
  const VF magnitude = (VF)((Simd<float>::I)z & 0x7fffffff);
  const auto far = magnitude > 87.3f;
  return Where(~far, ExpOfNegative(-Select(far, VF{}, magnitude)));
}
CBAM_INLINE VD ExpOfMinusMagnitude(VD z) {
  VD e{};
  for (int64_t i = 0; i < Simd<double>::kLanes; ++i) e[i] = __builtin_exp(z[i] < 0 ? z[i] : -z[i]);
  return e;
}

// 1 / (1 + exp(-z)); exactly 0 and 1 far out, NaN kept.
template <typename V>
CBAM_INLINE V SigmoidOf(V z) {
  const V e = ExpOfMinusMagnitude(z);
  const V sigmoid = Select(z < 0, e, V{} + 1) / (1 + e);
  return Select(z != z, z, sigmoid);
}
// sigmoid * (1 - sigmoid), without the difference.
template <typename V>
CBAM_INLINE V SigmoidDerivativeOf(V z) {
  const V e = ExpOfMinusMagnitude(z);
  return Select(z != z, z, e / ((1 + e) * (1 + e)));
}

template <typename A>
void Sigmoid(const A* in, int64_t count, A* out) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(out + i, SigmoidOf(Load(in + i)));
  if (i < count) StoreFirst(out + i, SigmoidOf(LoadFirst(in + i, count - i)), count - i);
}

template <typename A>
void SigmoidDerivative(const A* in, int64_t count, A* out) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(out + i, SigmoidDerivativeOf(Load(in + i)));
  if (i < count) StoreFirst(out + i, SigmoidDerivativeOf(LoadFirst(in + i, count - i)), count - i);
}

// --- Convolution ---

// A block is kRows rows by kVectors vectors: enough independent sums to hide the latency of the
// additions, and rows that share what they load, as most vectors of the planes straddle two cache
// lines. Every sum is taken in the same order whatever the block. The last vector of a row reads on
// into its padding and the next row; of the outputs only what the row has is written.

// Calls add(begin, end) with constants.
template <int kBegin, int kEnd, int kRows, typename Add>
CBAM_INLINE void ForRowsOfBlock(int64_t begin, int64_t end, const Add& add) {
  if constexpr (kBegin < kRows && kEnd > kBegin) {
    if (begin == kBegin && end == kEnd) return add(Constant<kBegin>(), Constant<kEnd>());
    if constexpr (kEnd > kBegin + 1) {
      ForRowsOfBlock<kBegin, kEnd - 1, kRows>(begin, end, add);
    } else {
      ForRowsOfBlock<kBegin + 1, kRows, kRows>(begin, end, add);
    }
  }
}
// Calls add(d, k, begin, end) for the slices d that a kernel reaches and the rows k of the planes
// there, counted from the block's first, that reach rows [begin, end) of the block.
template <int kRows, typename A, typename Add>
CBAM_INLINE void ForPlaneRows(const Taps<A>& taps, const Add& add) {
  const int64_t half = taps.half_rows;
  for (int64_t d = -taps.half_slices; d <= taps.half_slices; ++d) {
    for (int64_t k = -half; k < kRows + half; ++k) {
      const int64_t begin = k > half ? k - half : 0;
      const int64_t end = k + half + 1 < kRows ? k + half + 1 : kRows;
      ForRowsOfBlock<0, kRows, kRows>(
          begin, end, [&](auto first, auto last) CBAM_INLINE_LAMBDA { add(d, k, first, last); });
    }
  }
}

// Stores at column w of rows of `width`.
template <int kRows, int kVectors, typename V, typename A>
CBAM_INLINE void StoreBlock(const V (&values)[kRows][kVectors], int64_t w, int64_t width, A* out) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      A* to = out + r * width + w + v * kLanes;
      const int64_t left = width - w - v * kLanes;
      if (left >= kLanes) {
        Store(to, values[r][v]);
      } else {
        StoreFirst(to, values[r][v], left);
      }
    }
  }
}

template <int kRows, int kVectors, typename A>
CBAM_INLINE void ConvolveBlock(const Plane<A>* planes, int64_t row, int64_t w, int64_t width,
                               const Taps<A>& taps, A bias, A* out) {
  using V = typename Simd<A>::V;
  constexpr int64_t kLanes = Simd<A>::kLanes;
  V sum[2][kRows][kVectors] = {};
  ForPlaneRows<kRows>(taps, [&](int64_t d, int64_t k, auto first, auto last) CBAM_INLINE_LAMBDA {
    const int64_t at = row + d * taps.slice_stride + k;
    const A* line[2] = {planes[0].data + at * planes[0].stride + w,
                        planes[1].data + at * planes[1].stride + w};
    const int64_t middle = taps.IndexOf(d, k, 0);
    for (int64_t j = -taps.half_columns; j <= taps.half_columns; ++j) {
      for (int q = 0; q < 2; ++q) {
        V values[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          values[v] = Load(line[q] + j + v * kLanes);
          KeepInRegister(values[v]);
        }
        for (int r = first; r < last; ++r) {
          const V weight = Splat<A>(taps.kernel[middle + (j - r * taps.width) * 2 + q]);
          for (int v = 0; v < kVectors; ++v) sum[q][r][v] = Fma(weight, values[v], sum[q][r][v]);
        }
      }
    }
  });
  // The bias comes last: beside a large one every product would be rounded to its last place.
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[0][r][v] = sum[0][r][v] + sum[1][r][v] + Splat<A>(bias);
  }
  StoreBlock(sum[0], w, width, out);
}

// From the last of the planes' rows to the first, so that the kernel's taps come in their order.
template <int kRows, int kVectors, typename A>
CBAM_INLINE void ConvolveBlockTransposed(const Plane<A>& plane, int64_t row, int64_t w,
                                         int64_t width, const Taps<A>& taps, A* out_mean,
                                         A* out_max) {
  using V = typename Simd<A>::V;
  constexpr int64_t kLanes = Simd<A>::kLanes;
  V sum[2][kRows][kVectors] = {};
  ForPlaneRows<kRows>(taps, [&](int64_t d, int64_t k, auto first, auto last) CBAM_INLINE_LAMBDA {
    const A* line = plane.data + (row - d * taps.slice_stride + kRows - 1 - k) * plane.stride + w;
    const int64_t middle = taps.IndexOf(d, k, 0);
    for (int64_t j = -taps.half_columns; j <= taps.half_columns; ++j) {
      V values[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        values[v] = Load(line - j + v * kLanes);
        KeepInRegister(values[v]);
      }
      for (int s = first; s < last; ++s) {
        for (int q = 0; q < 2; ++q) {
          const V weight = Splat<A>(taps.kernel[middle + (j - s * taps.width) * 2 + q]);
          V* const to = sum[q][kRows - 1 - s];
          for (int v = 0; v < kVectors; ++v) to[v] = Fma(weight, values[v], to[v]);
        }
      }
    }
  });
  StoreBlock(sum[0], w, width, out_mean);
  StoreBlock(sum[1], w, width, out_max);
}

// Calls block(rows of the block, vectors, row, column) for a range of rows.
template <typename A, typename Block>
CBAM_INLINE void ForBlocks(int64_t rows, int64_t width, const Block& block) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  const auto columns = [&](auto count, int64_t row) {
    int64_t w = 0;
    for (; w + kLanes < width; w += 2 * kLanes) block(count, Constant<2>(), row, w);
    if (w < width) block(count, Constant<1>(), row, w);
  };
  int64_t row = 0;
  if constexpr (CBAM_VECTOR_BYTES == 64) {  // the sums of so many fit into its registers
    for (; row + 4 <= rows; row += 4) columns(Constant<4>(), row);
  }
  for (; row + 2 <= rows; row += 2) columns(Constant<2>(), row);
  if (row < rows) columns(Constant<1>(), row);
}

template <typename A>
void ConvolveRows(const Plane<A>* planes, int64_t row, int64_t rows, int64_t width,
                  const Taps<A>& taps, A bias, A* out) {
  ForBlocks<A>(rows, width, [&](auto count, auto vectors, int64_t r, int64_t w) {
    ConvolveBlock<count, vectors>(planes, row + r, w, width, taps, bias, out + r * width);
  });
}

template <typename A>
void ConvolveRowsTransposed(const Plane<A>& plane, int64_t row, int64_t rows, int64_t width,
                            const Taps<A>& taps, A* out_mean, A* out_max) {
  ForBlocks<A>(rows, width, [&](auto count, auto vectors, int64_t r, int64_t w) {
    ConvolveBlockTransposed<count, vectors>(plane, row + r, w, width, taps, out_mean + r * width,
                                            out_max + r * width);
  });
}

// kTaps neighbouring taps of one kernel row. Float sums of few rows, then double.
template <int kTaps, typename A>
CBAM_INLINE void KernelGradientTaps(const Plane<A>& plane, const Plane<A>& dz, const Slices& slices,
                                    int64_t width, int64_t dy, int64_t dx, A* out) {
  using V = typename Simd<A>::V;
  constexpr int64_t kLanes = Simd<A>::kLanes;
  constexpr int64_t kRows = 8;
  double total[kTaps] = {};
  for (int64_t slice = 0; slice < slices.count; ++slice) {
    const int64_t bottom = slice * slices.stride + slices.rows;
    for (int64_t begin = slice * slices.stride; begin < bottom; begin += kRows) {
      const int64_t end = begin + kRows < bottom ? begin + kRows : bottom;
      V sum[kTaps] = {};
      for (int64_t row = begin; row < end; ++row) {
        const A* line = plane.data + (row + dy) * plane.stride + dx;
        const A* values = dz.data + row * dz.stride;
        int64_t w = 0;
        for (; w + kLanes <= width; w += kLanes) {
          const V value = Load(values + w);
          for (int j = 0; j < kTaps; ++j) sum[j] = Fma(value, Load(line + w + j), sum[j]);
        }
        if (w == width) continue;
        const auto inside = FirstLanes<A>(width - w);  // of the row; the next one's may be infinite
        const V value = Where(inside, Load(values + w));
        for (int j = 0; j < kTaps; ++j)
          sum[j] = Fma(value, Where(inside, Load(line + w + j)), sum[j]);
      }
      for (int j = 0; j < kTaps; ++j) total[j] += SumLanes(sum[j]);
    }
  }
  for (int j = 0; j < kTaps; ++j) out[2 * j] = static_cast<A>(total[j]);
}

template <typename A>
void KernelGradient(const Plane<A>* planes, const Plane<A>& dz, const Slices& slices, int64_t width,
                    int64_t half_rows, int64_t half_columns, A* dtaps) {
  const int64_t columns = 2 * half_columns + 1;
  for (int64_t i = -half_rows; i <= half_rows; ++i) {
    for (int q = 0; q < 2; ++q) {
      A* out = dtaps + (i + half_rows) * columns * 2 + q;
      int64_t j = 0;
      for (; j + 7 <= columns; j += 7)
        KernelGradientTaps<7>(planes[q], dz, slices, width, i, j - half_columns, out + 2 * j);
      for (; j < columns; ++j)
        KernelGradientTaps<1>(planes[q], dz, slices, width, i, j - half_columns, out + 2 * j);
    }
  }
}

}  // namespace
}  // namespace CBAM_LEVEL
}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_DENSE_PASSES_H_
