// What the forward and backward pipelines share: how a problem is cut into waves, units and row
// blocks, the workspace, and parallel loops.
//
// A *wave* is as many samples as stay in the last-level cache between the first pass over them and
// the last, so that only the first pass reads memory. Where the batch has enough samples for all
// threads, a wave is one thread's *own*: no thread waits for another between passes, and one reads
// memory while the other computes. Else the threads share each pass of a wave. A *unit* is a fixed
// range of positions, a few image rows, for which partial sums over positions are kept; the partial
// sums are then added in double and in order, so results do not depend on which thread took which
// unit. A *row block* is a run of rows that one task takes through several passes while they are in
// its own caches; blocks may depend on the number of threads since they only repeat, never change,
// what is computed.
#ifndef CBAM_OPS_CORE_CPU_PIPELINE_H_
#define CBAM_OPS_CORE_CPU_PIPELINE_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <type_traits>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "core/checked.h"
#include "core/contract.h"
#include "core/cpu/kernels.h"
#include "core/cpu/passes.h"

namespace cbam_ops {
namespace cpu {

// The passes of one instruction set for one map type.
template <typename A>
struct Kernels {
  const MapPasses<A>* map;
  const DensePasses<A>* dense;
  const DensePasses<double>* double_dense;
};

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

inline int64_t ElementSize(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return 4;
    case DataType::kFloat16:
    case DataType::kBFloat16:
      return 2;
    case DataType::kFloat64:
      return 8;
  }
  return 8;
}

// What the calling thread's floating-point unit does with denormals, rounding and exceptions.
#if defined(__SSE2__)
using FloatingPointModes = unsigned int;
inline FloatingPointModes GetFloatingPointModes() { return _mm_getcsr(); }
inline void SetFloatingPointModes(FloatingPointModes modes) { _mm_setcsr(modes); }
#elif defined(__aarch64__)
using FloatingPointModes = uint64_t;
inline FloatingPointModes GetFloatingPointModes() {
  FloatingPointModes modes;
  asm volatile("mrs %0, fpcr" : "=r"(modes));
  return modes;
}
inline void SetFloatingPointModes(FloatingPointModes modes) {
  asm volatile("msr fpcr, %0" : : "r"(modes) : "memory");
}
#else
#error "csrc/core/cpu/pipeline.h does not know the floating-point modes of this processor"
#endif

// Calls body(i) for i in [0, tasks). Every task runs with the caller's floating-point modes:
// frameworks flush denormals on some of their threads and not on others, and results must not
// depend on who took a task.
template <typename Body>
void ForEach(const Parallel& parallel, int64_t tasks, const Body& body) {
  if (tasks < 2 || parallel.run == nullptr || parallel.threads < 2) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  const struct Context {
    const Body& body;
    FloatingPointModes modes;
  } context{body, GetFloatingPointModes()};
  const auto task = [](void* argument, int64_t i) {
    const auto* c = static_cast<const Context*>(argument);
    const FloatingPointModes own_modes = GetFloatingPointModes();
    SetFloatingPointModes(c->modes);
    c->body(i);
    SetFloatingPointModes(own_modes);
  };
  parallel.run(parallel.context, tasks, task, const_cast<Context*>(&context));
}

using Arena = WorkspaceArena<kHostAlignment>;

// Scratch memory of tasks: of `count` pieces each task takes one that no other has.
class Slots {
 public:
  // As many as tasks may run at once.
  static int64_t Count(const Parallel& parallel, int64_t tasks) {
    return std::min<int64_t>(tasks, std::clamp(parallel.threads, 1, kMost));
  }
  explicit Slots(int64_t count) : count_(count) {}

  int64_t Take() {
    for (;;) {
      for (int64_t slot = 0; slot < count_; ++slot) {
        if (!taken_[slot].load(std::memory_order_relaxed) &&
            !taken_[slot].exchange(true, std::memory_order_acquire))
          return slot;
      }
      std::this_thread::yield();  // each is with a task that runs
    }
  }
  void Give(int64_t slot) { taken_[slot].store(false, std::memory_order_release); }

 private:
  static constexpr int kMost = 256;  // threads; beyond, some wait for others
  const int64_t count_;
  std::atomic<bool> taken_[kMost] = {};
};

// Calls body(i, slot) for i in [0, tasks): of two that share one of `count` slots one ends before
// the other begins.
template <typename Body>
void ForEachWithSlot(const Parallel& parallel, int64_t tasks, int64_t count, const Body& body) {
  Slots slots(count);
  ForEach(parallel, tasks, [&](int64_t i) {
    const int64_t slot = slots.Take();
    body(i, slot);
    slots.Give(slot);
  });
}

// How a problem is cut into waves and below. `maps` is how many maps of a sample a wave must keep
// in the cache. An empty batch has no positions, however high and wide it says it is, and takes no
// workspace; nor does a problem that is refused.
struct Geometry {
  Geometry(const Problem& problem, const Parallel& parallel, int maps)
      : batch(CheckProblem(problem).ok() ? problem.batch : 0),
        depth(batch > 0 ? problem.depth : 0),
        height(batch > 0 ? depth * problem.height : 0),
        width(batch > 0 ? problem.width : 0),
        channels(problem.channels),
        positions(height * width),
        threads(std::max(1, parallel.threads)),
        slice_rows(batch > 0 ? problem.height : 0),
        half_slices(HalfWithin(problem, problem.kernel_depth, depth)),
        half_slice_rows(HalfWithin(problem, problem.kernel_height, slice_rows)),
        half_rows(half_slices * slice_rows + half_slice_rows),
        half_columns(HalfWithin(problem, problem.kernel_width, width)),
        sample{LayoutOf(problem), positions, channels, false},
        sample_bytes(positions * channels * ElementSize(problem.dtype)) {
    // Maps that the second-level caches of the call's threads can hold may be there already.
    sample.from_memory = batch * maps * sample_bytes > 2 * threads * kOwnBytes;
    const int64_t bytes = std::max(kLeastSampleBytes, maps * sample_bytes);
    const int64_t samples = std::max<int64_t>(1, batch);
    int64_t most = std::clamp<int64_t>(kWaveBytes / bytes, 1, samples);
    taps = 2 * (2 * half_slices + 1) * (2 * half_slice_rows + 1) * (2 * half_columns + 1);
    if (batch > 0 && HasChannelGate(problem) && !problem.batch_norm &&
        bytes <= 2 * kWaveBytes / threads &&
        samples * taps * ElementSize(ComputeType(problem.dtype)) <= kFoldBytes) {
      // What a thread can take alone is as much as stays in its own caches, and twice what it has
      // to read of weights.
      const int64_t weights =
          2 * channels * problem.hidden * ElementSize(ComputeType(problem.dtype));
      const int64_t share = CeilDiv(samples, threads);
      const int64_t own = std::clamp<int64_t>(std::max(kOwnBytes, 2 * weights) / bytes, 1, share);
      is_own = weights <= 2 * share * bytes && (samples % threads == 0 || samples >= 4 * threads);
      if (is_own) most = own;
    }
    // Waves of the same size: the last of them is no remainder too small for the MLP's products.
    waves = CeilDiv(samples, most);
    if (is_own) {
      waves = std::min(samples, RoundUp(waves, threads));
      slots = Slots::Count(parallel, waves);
      threads = 1;
    }
    wave = CeilDiv(batch, waves);

    if (width > kUnitPositions) {
      unit_rows = 1;
      units_per_row = CeilDiv(width, kUnitPositions);
    } else {
      // With few samples, small units let the threads share one.
      const int64_t most = batch < 8 ? CeilDiv(height, 4) : height;
      unit_rows = std::clamp<int64_t>(kUnitPositions / std::max<int64_t>(1, width), 1,
                                      std::max<int64_t>(1, most));
      units_per_row = 1;
    }
    units = units_per_row > 1 ? height * units_per_row : CeilDiv(height, unit_rows);

    // Of an NCHW map a step reads and writes a run per channel: all of it up to kWholeBytes, which
    // is the order of memory; of a longer one kRunBytes, so that pass B finds the step in a cache,
    // and whole cache lines where rows allow, since a line that two steps write in part is streamed
    // twice.
    const int64_t element = ElementSize(problem.dtype);
    const int64_t row_bytes = std::max<int64_t>(1, width * channels * element);
    step_rows = std::max<int64_t>(1, kStepBytes / row_bytes);
    if (sample.layout == Layout::kNCHW) {
      const int64_t run_row = std::max<int64_t>(1, width * element);
      step_rows = height * run_row <= kWholeBytes
                      ? height
                      : RoundUp(std::max(step_rows, CeilDiv(kRunBytes, run_row)),
                                64 / std::gcd(run_row, int64_t{64}));
    }
    step_rows = std::clamp<int64_t>(step_rows, 1, std::max<int64_t>(1, height));

    gap = depth > 1 ? half_slice_rows : 0;
    is_line = HasSpatialGate(problem) && width == 1 && problem.kernel_width == 1 &&
              problem.kernel_height > 1 && depth == 1 && problem.kernel_depth == 1;
    kernel_depth = problem.kernel_depth;
    kernel_height = is_line ? 1 : problem.kernel_height;
    kernel_width = is_line ? problem.kernel_height : problem.kernel_width;
  }

  // Calls body(first, count) for runs of rows that lie within a slice, if planes have gaps between
  // them.
  template <typename Body>
  void ForRuns(Range rows, const Body& body) const {
    for (int64_t row = rows.begin; row < rows.end;) {
      int64_t count = rows.end - row;
      if (gap > 0) count = std::min(count, slice_rows - row % slice_rows);
      body(row, count);
      row += count;
    }
  }
  // Calls convolve(row of the plane, rows, width, first position) for what it takes of rows of the
  // map at a time; row 0 of the plane is that of row `first`.
  template <typename Convolve>
  void ForConvolved(Range rows, int64_t first, const Convolve& convolve) const {
    ForRuns(rows, [&](int64_t row, int64_t count) {
      convolve(PlaneRow(row, first), is_line ? 1 : count, is_line ? count : width, row * width);
    });
  }
  // The taps of a kernel for these.
  template <typename A>
  Taps<A> TapsOf(const A* kernel) const {
    return {kernel,
            kernel_depth,
            kernel_height,
            kernel_width,
            half_slices,
            is_line ? 0 : half_slice_rows,
            is_line ? half_rows : half_columns,
            slice_rows + gap};
  }
  // The row of a padded plane that is row r of the map, if its row 0 is that of row `first`, which
  // may lie above the map.
  int64_t PlaneRow(int64_t r, int64_t first) const {
    if (gap == 0) return r - first;
    const auto slice = [this](int64_t row) { return (row + height) / slice_rows; };
    return r - first + (slice(r) - slice(first)) * gap;
  }

  // Where there is one position or one channel the layouts are the same memory. The passes take the
  // one whose rows are long.
  static Layout LayoutOf(const Problem& problem) {
    if (problem.depth == 1 && problem.height == 1 && problem.width == 1) return Layout::kNHWC;
    return problem.channels == 1 ? Layout::kNCHW : problem.layout;
  }

  // Rows or columns on either side of a position that its convolution can reach.
  static int64_t HalfWithin(const Problem& problem, int64_t kernel, int64_t size) {
    if (!HasSpatialGate(problem)) return 0;
    return std::clamp<int64_t>(size - 1, 0, kernel / 2);
  }

  // Blocks of whole units that `samples` samples are cut into so that every thread has as much
  // work. As few as that takes: the rows that a block's convolution needs of its neighbours are
  // read and pooled in both.
  int64_t BlocksPerSample(int64_t samples) const {
    const int64_t least_rows =
        std::max<int64_t>(2 * half_rows, 1);  // so that a halo costs at most as much as the block
    const int64_t most = std::max<int64_t>(1, height / least_rows);
    int64_t blocks = 1;
    while (blocks < most && samples * blocks % threads != 0 && samples * blocks < 4 * threads)
      ++blocks;
    return blocks;
  }
  // Rows of block b of `blocks`, on unit boundaries.
  Range BlockRows(int64_t b, int64_t blocks) const {
    const int64_t row_units = CeilDiv(height, unit_rows);
    return {std::min(height, row_units * b / blocks * unit_rows),
            std::min(height, row_units * (b + 1) / blocks * unit_rows)};
  }
  // Positions of unit u.
  Range Unit(int64_t u) const {
    if (units_per_row > 1) {
      const int64_t row = u / units_per_row, piece = u % units_per_row;
      return {row * width + piece * kUnitPositions,
              std::min((row + 1) * width, row * width + (piece + 1) * kUnitPositions)};
    }
    return {u * unit_rows * width, std::min(height, (u + 1) * unit_rows) * width};
  }
  // Units that lie in rows [begin, end), which are unit boundaries.
  Range UnitsOfRows(Range rows) const {
    if (units_per_row > 1) return {rows.begin * units_per_row, rows.end * units_per_row};
    return {rows.begin / unit_rows, CeilDiv(rows.end, unit_rows)};
  }
  Range RowPositions(Range rows) const { return {rows.begin * width, rows.end * width}; }

  // The start of sample n of a map.
  const void* At(const void* map, int64_t n) const {
    return static_cast<const char*>(map) + n * sample_bytes;
  }
  void* At(void* map, int64_t n) const { return static_cast<char*>(map) + n * sample_bytes; }

  int64_t batch;
  int64_t depth;
  int64_t height;  // of a volume the rows of all slices, which lie one below the other
  int64_t width, channels, positions;
  int threads;                           // that share a wave
  int64_t slice_rows;                    // of an image all
  int64_t half_slices, half_slice_rows;  // that a convolution reaches, and rows within a slice
  int64_t half_rows, half_columns;
  int64_t taps;  // of both planes, that touch the map
  Sample sample;
  int64_t sample_bytes;
  int64_t wave;  // samples, at most
  int64_t waves;
  bool is_own = false;  // a wave is one thread's own, and `slots` of them run at once
  int64_t slots = 1;
  int64_t unit_rows;      // rows per unit, or 1 when a row is cut
  int64_t units_per_row;  // 1 unless a row is cut
  int64_t units;          // per sample
  int64_t step_rows;      // rows that a task takes through a pass at a time
  // A series: one column, and a kernel of one. Its rows lie next to each other and are convolved as
  // one.
  bool is_line;
  int64_t kernel_depth, kernel_height, kernel_width;  // of what is convolved
  int64_t gap;  // rows of zeros between the slices of a padded plane

  // What two cores still read at cache speed; 4 and 16 MB, and steps of 64 and 256 KB, were within
  // the noise of these or slower (benchmarks/NOTES.md).
  static constexpr int64_t kWaveBytes = int64_t{8} << 20;
  // What a core still reads at the speed of its second-level cache.
  static constexpr int64_t kOwnBytes = int64_t{1} << 20;
  // What the samples' gradients of the convolution kernel may take until they are added up.
  static constexpr int64_t kFoldBytes = int64_t{4} << 20;
  // What a sample counts at least: it has results of its own to keep besides its maps.
  static constexpr int64_t kLeastSampleBytes = 2048;
  static constexpr int64_t kUnitPositions = 256;
  static constexpr int64_t kRunBytes = 512;
  static constexpr int64_t kWholeBytes = 4096;
  static constexpr int64_t kStepBytes = int64_t{128} << 10;
};

// Samples [first, first + samples) of a batch on their way through all passes, and whose threads
// take them.
struct Wave {
  // Where sample n is kept in an array of slots * wave samples.
  int64_t Row(int64_t n) const { return row + n - first; }
  const Parallel& parallel;
  int64_t first, samples;
  int64_t row, slot;
};

// Calls body(wave) for all waves.
template <typename Body>
void ForEachWave(const Geometry& g, const Parallel& parallel, const Body& body) {
  const auto take = [&](const Parallel& threads, int64_t i, int64_t slot) {
    const int64_t first = g.batch * i / g.waves, end = g.batch * (i + 1) / g.waves;
    body(Wave{threads, first, end - first, slot * g.wave, slot});
  };
  if (g.batch == 0) return;
  if (g.is_own) {
    const Parallel alone;
    ForEachWithSlot(parallel, g.waves, g.slots,
                    [&](int64_t i, int64_t slot) { take(alone, i, slot); });
  } else {
    for (int64_t i = 0; i < g.waves; ++i) take(parallel, i, 0);
  }
}

// Outputs larger than a wave are stored past the caches, where they would take the place of what
// the next passes read. Not those that lie where a map is that the same pass reads: that is in a
// cache.
inline bool ShouldStream(const Geometry& g) {
  return g.batch * g.sample_bytes > Geometry::kWaveBytes;
}

// Zero-padded planes of `rows` rows, for the convolution. The zeros between two rows pad both, as
// do those between two slices.
template <typename A>
struct PaddedPlane {
  static int64_t Stride(const Geometry& g) { return g.width + g.half_columns; }
  static int64_t Size(const Geometry& g, int64_t lanes, int64_t rows) {
    if (g.gap > 0) rows += CeilDiv(rows, g.slice_rows) * g.gap;
    return rows * Stride(g) + 2 * g.half_columns + lanes;
  }
  // Lays a zeroed plane out in `memory`; its row 0 is the first of `rows`.
  static Plane<A> Make(const Geometry& g, int64_t lanes, int64_t rows, A* memory) {
    std::memset(memory, 0, static_cast<size_t>(Size(g, lanes, rows)) * sizeof(A));
    return {memory + g.half_columns, Stride(g)};
  }
};

// Copies rows of a map into a plane whose row 0 is that of row `first`.
template <typename From, typename A>
void CopyRows(const Geometry& g, const From* from, Range rows, int64_t first,
              const Plane<A>& plane) {
  g.ForRuns(rows, [&](int64_t row, int64_t count) {
    A* to = plane.data + g.PlaneRow(row, first) * plane.stride;
    int64_t width = g.width;
    if (plane.stride == width) {
      width *= count;
      count = 1;
    }
    for (; count > 0; --count, from += width, to += plane.stride) std::copy(from, from + width, to);
  });
}

// The greater, NaN if either is.
template <typename A>
A MaxOrNan(A a, A b) {
  return b > a || b != b ? b : a;
}

// Adds up the partial results of a sample's units in double, column by column: calls
// finish(column, sum of the first halves, `second` of the second halves) for partial [units, 2, C],
// where `second` folds values into a double that starts at `start`. By then nothing more of the
// column is read: what finishes it may be written there.
template <typename A, typename Fold, typename Finish>
void CombineUnits(const A* partial, int64_t units, int64_t channels, double start,
                  const Fold& second, const Finish& finish) {
  constexpr int64_t kColumns = 256;  // unit by unit in the order of memory, so some at a time
  double sums[kColumns], seconds[kColumns];
  for (int64_t begin = 0; begin < channels; begin += kColumns) {
    const int64_t count = std::min(kColumns, channels - begin);
    std::fill(sums, sums + count, 0.0);
    std::fill(seconds, seconds + count, start);
    for (int64_t u = 0; u < units; ++u) {
      const A* first = partial + u * 2 * channels + begin;
      for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(first[i]);
      for (int64_t i = 0; i < count; ++i)
        seconds[i] = second(seconds[i], static_cast<double>(first[channels + i]));
    }
    for (int64_t i = 0; i < count; ++i) finish(begin + i, sums[i], seconds[i]);
  }
}

// to[r, j] += from[r, j] over a range of columns; rows are `stride` apart in both.
template <typename A>
void AddRows(const A* from, int64_t rows, int64_t stride, Range columns, A* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = r * stride + columns.begin; j < r * stride + columns.end; ++j)
      to[j] += from[j];
  }
}

// out[j] = scale * the sum of from[r, j] over rows r, in double and in order, for a range of
// columns; rows are `stride` apart.
template <typename From, typename To>
void SumRows(const From* from, int64_t rows, int64_t stride, double scale, Range columns, To* out) {
  constexpr int64_t kColumns = 32;  // row by row in the order of memory, so some at a time
  for (int64_t begin = columns.begin; begin < columns.end; begin += kColumns) {
    const int64_t count = std::min(kColumns, columns.end - begin);
    double sums[kColumns] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < count; ++i)
        sums[i] += static_cast<double>(from[r * stride + begin + i]);
    }
    for (int64_t i = 0; i < count; ++i) out[begin + i] = static_cast<To>(scale * sums[i]);
  }
}

// The sum of value(i) over [begin, end), by halves: its error does not grow with the count.
template <typename Value>
double PairwiseSum(int64_t begin, int64_t end, const Value& value) {
  constexpr int64_t kBlock = 128, kSums = 8;
  if (end - begin > kBlock) {
    const int64_t middle = begin + (end - begin) / 2;
    return PairwiseSum(begin, middle, value) + PairwiseSum(middle, end, value);
  }
  double sums[kSums] = {};
  int64_t i = begin;
  for (; i + kSums <= end; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) sums[j] += value(i + j);
  }
  for (int64_t j = 0; i + j < end; ++j) sums[j] += value(i + j);
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// The convolution of every sample's spatial descriptors, normalised by its own mean and variance.
// In double: where the mean is large beside the deviation, what is left of a rounded difference is
// nothing.
template <typename A>
class BatchNorm {
 public:
  BatchNorm(const Problem& problem, const Geometry& g, const DensePasses<double>& dense,
            const Parallel& parallel, Arena* arena)
      : problem_(problem), g_(g), dense_(dense), parallel_(parallel) {
    if (!problem.batch_norm) return;
    plane_size_ = PaddedPlane<double>::Size(g, dense.lanes, g.height + 2 * g.half_rows);
    slots_ = Slots::Count(parallel, g.batch);
    scratch_ = arena->Take<double>(slots_, 2 * plane_size_);
    kernel_ = arena->Take<double>(std::min<int64_t>(g.batch, 1), 2, problem.kernel_depth,
                                  problem.kernel_height, problem.kernel_width);
    convolved_ = arena->Take<double>(g.batch, g.positions);
    sums_ = arena->Take<double>(g.batch);
  }

  // From the descriptors [N, 2, H, W].
  void Run(const A* descriptors, const A* kernel) {
    if (g_.batch * g_.positions == 0) return;
    const Taps<double> taps = g_.TapsOf(kernel_);
    std::copy(kernel, kernel + taps.size(), kernel_);
    ForEachWithSlot(parallel_, g_.batch, slots_, [&](int64_t n, int64_t slot) {
      double* memory = scratch_ + slot * 2 * plane_size_;
      Plane<double> planes[2];
      for (int q = 0; q < 2; ++q) {
        planes[q] = PaddedPlane<double>::Make(g_, dense_.lanes, g_.height + 2 * g_.half_rows,
                                              memory + q * plane_size_);
        CopyRows(g_, descriptors + (2 * n + q) * g_.positions, {0, g_.height}, -g_.half_rows,
                 planes[q]);
      }
      double* convolved = convolved_ + n * g_.positions;
      g_.ForConvolved({0, g_.height}, -g_.half_rows,
                      [&](int64_t row, int64_t rows, int64_t width, int64_t p) {
                        dense_.convolve_rows(planes, row, rows, width, taps, 0.0, convolved + p);
                      });
    });
    mean_ = MeanOf([&](int64_t i) { return convolved_[i]; });
    // Once more about it: of equal logits the mean is that logit, to the last bit.
    const double more = MeanOf([&](int64_t i) { return convolved_[i] - mean_; });
    if (std::isfinite(mean_)) mean_ += more;
    variance_ = MeanOf([&](int64_t i) {
      const double centred = convolved_[i] - mean_;
      return centred * centred;
    });
    inverse_deviation_ = 1.0 / std::sqrt(variance_ + problem_.epsilon);
  }

  // Of an empty batch both are 0.
  double mean() const { return mean_; }
  double variance() const { return variance_; }
  double inverse_deviation() const { return inverse_deviation_; }
  // At position i of the batch.
  double Normalized(int64_t i) const { return (convolved_[i] - mean_) * inverse_deviation_; }

  // The mean of value(i) over the positions of the batch: by samples, then over them.
  template <typename Value>
  double MeanOf(const Value& value) const {
    ForEach(parallel_, g_.batch, [&](int64_t n) {
      sums_[n] = PairwiseSum(n * g_.positions, (n + 1) * g_.positions, value);
    });
    const double count = static_cast<double>(g_.batch * g_.positions);
    return PairwiseSum(0, g_.batch, [&](int64_t n) { return sums_[n]; }) / count;
  }

 private:
  const Problem& problem_;
  const Geometry& g_;
  const DensePasses<double>& dense_;
  const Parallel& parallel_;
  int64_t plane_size_ = 0, slots_ = 0;
  double* scratch_ = nullptr;    // of a task on a sample
  double* kernel_ = nullptr;     // [kernel_depth, kernel_height, kernel_width, 2]
  double* convolved_ = nullptr;  // [N, P]
  double* sums_ = nullptr;       // [N]
  double mean_ = 0, variance_ = 0, inverse_deviation_ = 0;
};

// Cuts `size` columns of work into blocks of whole cache lines, a few for each thread: the longer a
// block's rows, the faster they are read and written.
struct Blocks {
  Blocks(const Parallel& parallel, int64_t size, int64_t multiply_adds) : size_(size) {
    const int64_t threads = std::max(1, parallel.threads), least = threads > 1 ? 32 : 256;
    const int64_t wanted = std::clamp<int64_t>(multiply_adds / 32768, 1, 4 * threads);
    block_ = std::max(least, RoundUp(CeilDiv(size, wanted), 32));
    count = CeilDiv(size, block_);
  }
  Range At(int64_t i) const { return {i * block_, std::min(size_, (i + 1) * block_)}; }
  int64_t count;

 private:
  int64_t size_;
  int64_t block_;
};

// The channel gate's MLP on `samples` samples starting at `first` of `batch`.
template <typename A>
struct Mlp {
  const Problem& problem;
  const DensePasses<A>& dense;
  const A *w0, *b0, *w1, *b1;

  bool IsUsed(int q) const { return q == 0 ? UsesMean(problem.pooling) : UsesMax(problem.pooling); }

  // hidden[q][n, j] = relu(descriptors[q].W0 + b0) over a block of columns j. Rows of
  // descriptors[q] are C apart, of hidden hidden.
  void HiddenBlock(const A* const descriptors[2], int64_t samples, Range columns,
                   A* const hidden[2]) const {
    const int64_t h = problem.hidden, c = problem.channels;
    for (int q = 0; q < 2; ++q) {
      if (!IsUsed(q)) continue;
      dense.product({samples, columns.size(), c, descriptors[q], c, 1, w0 + columns.begin, c, h,
                     b0 == nullptr ? nullptr : b0 + columns.begin, Activation::kRelu,
                     hidden[q] + columns.begin, h});
    }
  }
  // out[n, c] = activation(hidden.W1 + b1) over a block of columns c: out begins at the block's
  // first column, and its rows are `stride` apart.
  void OutputBlock(const A* hidden, int64_t samples, Range columns, Activation activation, A* out,
                   int64_t stride) const {
    dense.product({samples, columns.size(), problem.hidden, hidden, problem.hidden, 1,
                   w1 + columns.begin, problem.hidden, problem.channels,
                   b1 == nullptr ? nullptr : b1 + columns.begin, activation, out, stride});
  }
  Blocks HiddenBlocks(const Wave& wave) const {
    return {wave.parallel, problem.hidden, wave.samples * problem.channels * problem.hidden};
  }
  Blocks ChannelBlocks(const Wave& wave) const {
    return {wave.parallel, problem.channels, wave.samples * problem.channels * problem.hidden};
  }
};

}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_PIPELINE_H_
