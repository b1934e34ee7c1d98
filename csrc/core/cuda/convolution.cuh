// The spatial gate: the convolution of the two spatial descriptors, its sigmoid, and back.
//
//   Convolution    g_s = sigmoid(conv(descriptors) + bias); with batch norm z = conv(descriptors)
//                  and each patch's sum and squares about its mean
//   Statistics     with batch norm: mean and variance of z over the batch
//   Normalise      with batch norm: g_s
//   NormGrad       backward with batch norm: dz, normalised z, and each patch's sums of dz and dz *
//                  normalised z
//   Totals         of those sums, over the batch
//   PositionSides  dz -> the transposed convolution, which is what passes B and C need of positions;
//                  and each patch's part of dK and dbias
//   Taps           dK and dbias
//
// A patch is a rectangle of positions, of a volume in one of its slices. Its window, the patch with
// a halo of half the kernel on each side (in as many slices as the kernel has) and zeros beyond the
// border, lies in shared memory beside the kernel: for 4 rows of 56 and 7 x 7 it is 10 x 62 values
// for each descriptor. With a kernel so large that this does not fit, the descriptors are read
// where they are.
#ifndef CBAM_OPS_CORE_CUDA_CONVOLUTION_CUH_
#define CBAM_OPS_CORE_CUDA_CONVOLUTION_CUH_

#include "core/cuda/plan.h"
#include "core/cuda/sides.cuh"

namespace cbam_ops {
namespace cuda {

struct Patch {
  uint32_t slice;
  uint32_t row;
  uint32_t column;
  int rows;
  int columns;

  CBAM_DEVICE int size() const { return rows * columns; }
};

template <typename A>
CBAM_DEVICE Patch PatchAt(const Call<A>& call, uint32_t index) {
  const uint32_t down = index / call.patches.across;
  Patch patch;
  patch.slice = down / call.patches.down;
  patch.row = (down - patch.slice * call.patches.down) * call.patches.rows;
  patch.column = (index - down * call.patches.across) * call.patches.columns;
  patch.rows = static_cast<int>(Smaller(call.patches.rows, call.height - patch.row));
  patch.columns = static_cast<int>(Smaller(call.patches.columns, call.width - patch.column));
  return patch;
}

// Where things lie in shared memory.
template <typename A>
struct Windows {
  int rows;    // of a slice of a window
  int stride;  // values of a row of a window
  A* mean;     // windows
  A* maximum;
  A* gradient;
  const A* kernel;  // here or where it was
  A* sums;          // a warp's worth
  int* corners;     // of the windows of the patch's positions

  CBAM_DEVICE Windows(const Call<A>& call, const Patch& patch) {
    const int values =
        PatchValues(call.patches, call.kernel_depth, call.kernel_height, call.kernel_width);
    const int taps = 2 * call.kernel_depth * call.kernel_height * call.kernel_width;
    rows = patch.rows + call.kernel_height - 1;
    stride = (patch.columns + 1) / 2 * 2 + call.kernel_width - 1;
    sums = Shared<A>();
    A* const weights = sums + kThreads / kWarp;  // first, for vectors of two
    mean = weights + taps;
    maximum = mean + values;
    gradient = maximum + values;
    corners = reinterpret_cast<int*>(gradient + values);
    kernel = call.kernel;
    if (!call.patches.staged) return;
    kernel = weights;
    for (int i = ThreadIndex(); i < taps; i += kThreads) weights[i] = call.kernel[i];
  }

  // Where the patch's first position is in the windows.
  CBAM_DEVICE int Centre(const Call<A>& call) const {
    return (call.kernel_depth / 2 * rows + call.kernel_height / 2) * stride + call.kernel_width / 2;
  }
};

// What lies before the border is beyond it too: the numbers have no sign.
template <typename A>
CBAM_DEVICE bool Inside(const Call<A>& call, uint32_t slice, uint32_t row, uint32_t column) {
  return slice < call.depth && row < call.height && column < call.width;
}
// The index of a position in the map.
template <typename A>
CBAM_DEVICE uint32_t IndexOf(const Call<A>& call, uint32_t slice, uint32_t row, uint32_t column) {
  return (slice * call.height + row) * call.width + column;
}

// A row of the kernel, counted through its slices, by slice and row.
struct KernelRow {
  int slice;
  int row;
};
template <typename A>
CBAM_DEVICE KernelRow KernelRowAt(const Call<A>& call, int i) {
  const int slice = call.kernel_depth > 1 ? i / call.kernel_height : 0;
  return {slice, i - slice * call.kernel_height};
}

// Calls body(row, column, positions, index of the first in the map) for every two neighbours of a
// patch, in its row, or the last one: a thread shares what it reads for them.
template <typename A, typename Body>
CBAM_DEVICE void OverNeighbours(const Call<A>& call, const Patch& patch, Body body) {
  const int pairs = (patch.columns + 1) / 2;
  CBAM_NO_UNROLL
  for (int q = ThreadIndex(); q < patch.rows * pairs; q += kThreads) {
    const int row = q / pairs, column = 2 * (q - row * pairs);
    body(row, column, column + 1 < patch.columns ? 2 : 1,
         IndexOf(call, patch.slice, patch.row + row, patch.column + column));
  }
}

// Calls store(index in the window, inside, position) for the whole window of a patch: a warp takes
// a row.
template <typename A, typename Store>
CBAM_DEVICE void OverWindow(const Call<A>& call, const Patch& patch, const Windows<A>& windows,
                            Store store) {
  const int rows = call.kernel_depth * windows.rows;
  for (int r = ThreadIndex() / kWarp; r < rows; r += kThreads / kWarp) {
    const int above = call.kernel_depth > 1 ? r / windows.rows : 0;
    const uint32_t slice = patch.slice + above - call.kernel_depth / 2;
    const uint32_t row = patch.row + r - above * windows.rows - call.kernel_height / 2;
    CBAM_NO_UNROLL
    for (int c = ThreadIndex() % kWarp; c < windows.stride; c += kWarp) {
      const uint32_t column = patch.column + c - call.kernel_width / 2;
      store(r * windows.stride + c, Inside(call, slice, row, column),
            IndexOf(call, slice, row, column));
    }
  }
}

template <typename A>
CBAM_DEVICE void FillDescriptors(const Call<A>& call, int64_t n, const Patch& patch,
                                 const Windows<A>& windows) {
  OverWindow(call, patch, windows, [&](int i, bool inside, int64_t p) {
    A mean = A(0), maximum = A(0);
    if (inside) Fold<true>(call.spatial_source, n, p, &mean, &maximum);
    windows.mean[i] = mean;
    windows.maximum[i] = maximum;
  });
}

// conv(descriptors) at two neighbours of the patch, from the row and column of the first there.
template <typename A>
CBAM_DEVICE void Convolve(const Call<A>& call, int64_t n, const Patch& patch,
                          const Windows<A>& windows, int row, int column, A (&sums)[2]) {
  const int height = call.kernel_height, width = call.kernel_width;
  sums[0] = sums[1] = A(0);
  CBAM_NO_UNROLL
  for (int of = 0; of < call.kernel_depth * height; ++of) {
    const auto [d, i] = KernelRowAt(call, of);
    const A* const weights = windows.kernel + static_cast<int64_t>(of) * width * 2;
    if (call.patches.staged) {
      const int at = (d * windows.rows + row + i) * windows.stride + column;
      A mean = windows.mean[at], maximum = windows.maximum[at];
      CBAM_UNROLL_4
      for (int j = 0; j < width; ++j) {
        const Vec<A, 2> two = Load<A, 2>(weights + 2 * j);
        sums[0] += mean * two.value[0];
        sums[0] += maximum * two.value[1];
        mean = windows.mean[at + j + 1];
        maximum = windows.maximum[at + j + 1];
        sums[1] += mean * two.value[0];
        sums[1] += maximum * two.value[1];
      }
      continue;
    }
    CBAM_NO_UNROLL
    for (int j = 0; j < 2 * width; ++j) {
      const int k = j / width, tap = j - k * width;
      const uint32_t s = patch.slice + d - call.kernel_depth / 2;
      const uint32_t r = patch.row + row + i - height / 2;
      const uint32_t c = patch.column + column + k + tap - width / 2;
      if (!Inside(call, s, r, c)) continue;
      A mean, maximum;
      Fold<true>(call.spatial_source, n, IndexOf(call, s, r, c), &mean, &maximum);
      const A part = mean * weights[2 * tap] + maximum * weights[2 * tap + 1];
      (k == 0 ? sums[0] : sums[1]) += part;
    }
  }
}

template <typename A>
CBAM_DEVICE A Bias(const Call<A>& call) {
  return call.bias != nullptr ? call.bias[0] : A(0);
}

// Calls body(where in the windows, counted from the patch's first position, index in the map,
// conv(descriptors)) for every position of a patch.
template <typename A, typename Body>
CBAM_DEVICE void OverConvolution(const Call<A>& call, int64_t n, const Patch& patch,
                                 const Windows<A>& windows, Body body) {
  if (call.patches.staged) FillDescriptors(call, n, patch, windows);
  Barrier();
  OverNeighbours(call, patch, [&](int row, int column, int positions, int64_t first) {
    A z[2];
    Convolve(call, n, patch, windows, row, column, z);
    CBAM_NO_UNROLL
    for (int k = 0; k < positions; ++k)
      body(row * windows.stride + column + k, first + k, k == 0 ? z[0] : z[1]);
  });
}

// Two sums of a patch, for all patches.
template <typename A>
CBAM_DEVICE void StorePatchSums(const Call<A>& call, int64_t n, int64_t index, A first, A second) {
  if (ThreadIndex() != 0) return;
  const int64_t at = n * call.patches.count + index;
  call.patch_sums[at] = first;
  call.patch_sums[call.batch * call.patches.count + at] = second;
}

// An item is a patch, as in all that follow.
template <typename A>
CBAM_DEVICE void Convolution(const Call<A>& call, int64_t n, int64_t index) {
  const Patch patch = PatchAt(call, index);
  const Windows<A> windows(call, patch);
  A* const descriptors = call.spatial_descriptors + n * 2 * call.positions;
  A sum = A(0);
  OverConvolution(call, n, patch, windows, [&](int offset, int64_t p, A z) {
    if (call.patches.staged) {
      const int centre = windows.Centre(call) + offset;
      descriptors[p] = windows.mean[centre];
      descriptors[call.positions + p] = windows.maximum[centre];
    } else {
      Fold<true>(call.spatial_source, n, p, descriptors + p, descriptors + call.positions + p);
    }
    if (call.batch_norm) {
      call.z[n * call.positions + p] = z;
      sum += z;
    } else {
      call.spatial_gate[n * call.positions + p] = Sigmoid(z + Bias(call));
    }
  });
  if (!call.batch_norm) return;
  sum = BlockSum(sum, windows.sums);
  const A mean = sum / static_cast<A>(patch.size());
  A squares = A(0);
  OverNeighbours(call, patch, [&](int, int, int positions, int64_t first) {
    for (int k = 0; k < positions; ++k) {  // this thread's own values
      const A distance = call.z[n * call.positions + first + k] - mean;
      squares += distance * distance;
    }
  });
  StorePatchSums(call, n, index, sum, BlockSum(squares, windows.sums));
}

// One item. In double: the patches' means differ by little.
template <typename A>
CBAM_DEVICE void Statistics(const Call<A>& call) {
  double* const shared = Shared<double>();
  const int64_t patches = call.patches.count, count = call.batch * patches;
  const auto positions = static_cast<double>(call.batch * call.positions);
  double sum = 0;
  CBAM_NO_UNROLL
  for (int64_t i = ThreadIndex(); i < count; i += kThreads) sum += call.patch_sums[i];
  const double mean = BlockSum(sum, shared) / positions;
  double squares = 0;
  CBAM_NO_UNROLL
  for (int64_t i = ThreadIndex(); i < count; i += kThreads) {
    const double size = PatchAt(call, i % patches).size();
    const double distance = call.patch_sums[i] / size - mean;
    squares += call.patch_sums[count + i] + size * distance * distance;
  }
  squares = BlockSum(squares, shared);
  if (ThreadIndex() == 0) {
    call.batch_statistics[0] = static_cast<A>(mean);
    call.batch_statistics[1] = static_cast<A>(squares / positions);
  }
}

template <typename A>
CBAM_DEVICE A Deviation(const Call<A>& call) {
  return SquareRoot(call.batch_statistics[1] + call.epsilon);
}

// An item is kChunk positions of a sample.
template <typename A>
CBAM_DEVICE void Normalise(const Call<A>& call, int64_t n, int64_t index) {
  const int64_t end = Smaller((index + 1) * kChunk, call.positions);
  CBAM_NO_UNROLL
  for (int64_t p = index * kChunk + ThreadIndex(); p < end; p += kThreads) {
    const int64_t at = n * call.positions + p;
    const A z = (call.z[at] - call.batch_statistics[0]) / Deviation(call) * call.gamma[0];
    call.spatial_gate[at] = Sigmoid(z + Bias(call));
  }
}

// The gradient with respect to the argument of the sigmoid.
template <typename A>
CBAM_DEVICE A LogitGradient(const Call<A>& call, int64_t n, int64_t p, A t) {
  const int64_t at = n * call.positions + p;
  const A gate = call.spatial_gate[at];
  if (call.d_spatial_gate != nullptr) t += call.d_spatial_gate[at];
  return t * gate * (A(1) - gate);
}

template <typename A>
CBAM_DEVICE void NormGrad(const Call<A>& call, int64_t n, int64_t index) {
  const Patch patch = PatchAt(call, index);
  const Windows<A> windows(call, patch);
  A sum = A(0), product = A(0);
  OverConvolution(call, n, patch, windows, [&](int, int64_t p, A z) {
    const A normalised = (z - call.batch_statistics[0]) / Deviation(call);
    A t, count;
    Fold<false>(call.spatial_pass, n, p, &t, &count);
    const A dz = LogitGradient(call, n, p, t);
    call.dz[n * call.positions + p] = dz;
    call.z[n * call.positions + p] = normalised;
    sum += dz;
    product += dz * normalised;
  });
  sum = BlockSum(sum, windows.sums);
  StorePatchSums(call, n, index, sum, BlockSum(product, windows.sums));
}

// One item.
template <typename A>
CBAM_DEVICE void Totals(const Call<A>& call) {
  A* const shared = Shared<A>();
  const int64_t count = call.batch * call.patches.count;
  A sums[2] = {A(0), A(0)};
  for (int k = 0; k < 2; ++k) {
    for (int64_t i = ThreadIndex(); i < count; i += kThreads)
      sums[k] += call.patch_sums[k * count + i];
    sums[k] = BlockSum(sums[k], shared);
  }
  if (ThreadIndex() != 0) return;
  call.totals[0] = sums[0];
  call.totals[1] = sums[1];
  if (call.dbias != nullptr) call.dbias[0] = sums[0];
  call.dgamma[0] = sums[1];
}

// The gradient with respect to the convolution's result at a position.
template <typename A>
CBAM_DEVICE A ConvolutionGradient(const Call<A>& call, int64_t n, int64_t p) {
  if (call.batch_norm) {
    const int64_t at = n * call.positions + p;
    const A count = static_cast<A>(call.batch * call.positions);
    const A centred = call.dz[at] - call.totals[0] / count - call.z[at] * (call.totals[1] / count);
    return centred * call.gamma[0] / Deviation(call);
  }
  A t, count;
  Fold<false>(call.spatial_pass, n, p, &t, &count);
  return LogitGradient(call, n, p, t);
}

// The transposed convolution at two neighbours of the patch.
template <typename A>
CBAM_DEVICE void ConvolveTransposed(const Call<A>& call, int64_t n, const Patch& patch,
                                    const Windows<A>& windows, int row, int column, A (&d_mean)[2],
                                    A (&d_max)[2]) {
  const int height = call.kernel_height, width = call.kernel_width;
  for (int k = 0; k < 2; ++k) d_mean[k] = d_max[k] = A(0);
  CBAM_NO_UNROLL
  for (int of = 0; of < call.kernel_depth * height; ++of) {
    const auto [d, i] = KernelRowAt(call, of);
    const A* const weights = windows.kernel + static_cast<int64_t>(of) * width * 2;
    if (call.patches.staged) {
      const int from = (call.kernel_depth - 1 - d) * windows.rows + row + height - 1 - i;
      const A* const last = windows.gradient + from * windows.stride + column + width - 1;
      A neighbour = last[1];
      CBAM_UNROLL_4
      for (int j = 0; j < width; ++j) {
        const Vec<A, 2> two = Load<A, 2>(weights + 2 * j);
        const A value = last[-j];
        d_mean[0] += value * two.value[0];
        d_max[0] += value * two.value[1];
        d_mean[1] += neighbour * two.value[0];
        d_max[1] += neighbour * two.value[1];
        neighbour = value;
      }
      continue;
    }
    CBAM_NO_UNROLL
    for (int j = 0; j < 2 * width; ++j) {
      const int k = j / width, tap = j - k * width;
      const uint32_t s = patch.slice - d + call.kernel_depth / 2;
      const uint32_t r = patch.row + row - i + height / 2;
      const uint32_t c = patch.column + column + k - tap + width / 2;
      if (!Inside(call, s, r, c)) continue;
      const A value = ConvolutionGradient(call, n, IndexOf(call, s, r, c));
      (k == 0 ? d_mean[0] : d_mean[1]) += value * weights[2 * tap];
      (k == 0 ? d_max[0] : d_max[1]) += value * weights[2 * tap + 1];
    }
  }
}

// The patch's part of dK, and of dbias as the last tap. A warp sums four columns of a row of the
// kernel at a time, for both descriptors; two of doubles, which take twice the registers.
template <typename A>
CBAM_DEVICE void SumTaps(const Call<A>& call, int64_t n, const Patch& patch,
                         const Windows<A>& windows, int64_t block) {
  constexpr int kColumns = sizeof(A) == 8 ? 2 : 4;
  const int height = call.kernel_height, width = call.kernel_width, lane = ThreadIndex() % kWarp;
  const int rows = call.kernel_depth * height, pieces = (width + kColumns - 1) / kColumns;
  const int64_t blocks = call.batch * call.patches.count;
  const A* const centre = windows.gradient + windows.Centre(call);
  CBAM_NO_UNROLL
  for (int piece = ThreadIndex() / kWarp; piece < rows * pieces; piece += kThreads / kWarp) {
    const int of = piece / pieces, first = (piece - of * pieces) * kColumns;
    const auto [d, i] = KernelRowAt(call, of);
    A sums[kColumns][2] = {}, total = A(0);
    if (call.patches.staged) {
      int others[kColumns];
      CBAM_UNROLL
      for (int j = 0; j < kColumns; ++j)  // beyond the kernel: its last column again
        others[j] =
            (d * windows.rows + i) * windows.stride + (first + j < width ? first + j : width - 1);
      CBAM_NO_UNROLL
      for (int q = lane; q < patch.size(); q += kWarp) {
        const int corner = windows.corners[q];
        const A value = centre[corner];
        total += value;
        CBAM_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          sums[j][0] += value * windows.mean[corner + others[j]];
          sums[j][1] += value * windows.maximum[corner + others[j]];
        }
      }
    } else {
      CBAM_NO_UNROLL
      for (int q = lane; q < patch.size(); q += kWarp) {
        const int row = q / patch.columns, column = q - row * patch.columns;
        const uint32_t r = patch.row + row, c = patch.column + column;
        const A value = ConvolutionGradient(call, n, IndexOf(call, patch.slice, r, c));
        total += value;
        CBAM_NO_UNROLL
        for (int tap = 0; tap < kColumns && first + tap < width; ++tap) {
          const uint32_t to_s = patch.slice + d - call.kernel_depth / 2;
          const uint32_t to_r = r + i - height / 2, to_c = c + first + tap - width / 2;
          if (!Inside(call, to_s, to_r, to_c)) continue;
          A mean, maximum;
          Fold<true>(call.spatial_source, n, IndexOf(call, to_s, to_r, to_c), &mean, &maximum);
          // Which of the sums is known when compiled, so that they are registers.
          CBAM_UNROLL
          for (int j = 0; j < kColumns; ++j) {
            if (j != tap) continue;
            sums[j][0] += value * mean;
            sums[j][1] += value * maximum;
          }
        }
      }
    }
    CBAM_NO_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      total += ShuffleXor(total, mask);
      CBAM_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        sums[j][0] += ShuffleXor(sums[j][0], mask);
        sums[j][1] += ShuffleXor(sums[j][1], mask);
      }
    }
    if (lane != 0) continue;
    if (piece == 0) call.taps[int64_t{2} * rows * width * blocks + block] = total;
    CBAM_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      if (first + j >= width) continue;
      A* const taps =
          call.taps + 2 * (static_cast<int64_t>(of) * width + first + j) * blocks + block;
      taps[0] = sums[j][0];
      taps[blocks] = sums[j][1];
    }
  }
}

template <typename A>
CBAM_DEVICE void PositionSides(const Call<A>& call, int64_t n, int64_t index) {
  const Patch patch = PatchAt(call, index);
  const Windows<A> windows(call, patch);
  if (call.patches.staged) {
    FillDescriptors(call, n, patch, windows);
    OverWindow(call, patch, windows, [&](int i, bool inside, int64_t p) {
      windows.gradient[i] = inside ? ConvolutionGradient(call, n, p) : A(0);
    });
  }
  Barrier();
  OverNeighbours(call, patch, [&](int row, int column, int positions, int64_t first) {
    A d_mean[2], d_max[2];
    ConvolveTransposed(call, n, patch, windows, row, column, d_mean, d_max);
    CBAM_NO_UNROLL
    for (int k = 0; k < positions; ++k) {
      if (call.patches.staged) {
        windows.corners[row * patch.columns + column + k] = row * windows.stride + column + k;
      }
      const int64_t p = first + k;
      A t, count;
      Fold<false>(call.spatial_pass, n, p, &t, &count);
      StoreSide(call.position_sides, n, p,
                MakeSide(call.spatial_gate[n * call.positions + p], k == 0 ? d_mean[0] : d_mean[1],
                         static_cast<A>(call.channels), true, k == 0 ? d_max[0] : d_max[1], count,
                         call.position_maximum[n * call.position_stride + p]));
    }
  });
  Barrier();
  SumTaps(call, n, patch, windows, n * call.patches.count + index);
}

// An item is a warp's worth of taps each.
template <typename A>
CBAM_DEVICE void Taps(const Call<A>& call, int64_t index) {
  const int64_t taps = int64_t{2} * call.kernel_depth * call.kernel_height * call.kernel_width;
  const int64_t blocks = call.batch * call.patches.count;
  const int64_t tap = index * kTapsAtOnce + ThreadIndex() / kWarp;
  if (tap > taps || (tap == taps && call.batch_norm)) return;
  A sum = A(0);
  CBAM_NO_UNROLL
  for (int64_t i = ThreadIndex() % kWarp; i < blocks; i += kWarp)
    sum += call.taps[tap * blocks + i];
  sum = SumOverWarp(sum);
  A* const to = tap < taps ? call.dkernel + tap : call.dbias;
  if (ThreadIndex() % kWarp == 0 && to != nullptr) *to = sum;
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_CONVOLUTION_CUH_
