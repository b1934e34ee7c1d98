// How a problem is cut up: plain host code, for the launchers and the workspace queries. Nothing
// here depends on the device but the order of the items, which no result depends on.
#ifndef CBAM_OPS_CORE_CUDA_PLAN_H_
#define CBAM_OPS_CORE_CUDA_PLAN_H_

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/checked.h"
#include "core/contract.h"
#include "core/cuda/call.h"
#include "core/cuda/device.cuh"

namespace cbam_ops {
namespace cuda {

constexpr int kSamples = 8;        // of a group at most: they share each read of the MLP's weights
constexpr int kUnits = 32;         // hidden units of an item
constexpr int kGateChannels = 64;  // channels of an item of the MLP
constexpr int kBlockSide = 4;      // outputs of a thread, and inner indices that it takes at a time
constexpr int kInnerIndices = 128;  // of a thread of an item that sums over channels
constexpr int kOuterLeft = 32;      // of a weight's gradient
constexpr int kOuterRight = 64;
constexpr int kTapsAtOnce = kThreads / kWarp;
constexpr int kChunk = 1024;  // small values of an item
// Loads of an item of a forward pass; backward has half as much of each of two maps.
constexpr int64_t kTileBytes = 32 * 1024;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t AtMost(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t AtLeast(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t Positions(const Problem& problem) {
  return problem.depth * problem.height * problem.width;
}
inline bool ChannelsLast(const Problem& problem) { return problem.layout == Layout::kNHWC; }

// Tiles for a pass along the rows, `at_once` rows at a time per thread. Long rows come in pieces of
// about `widest` columns: what goes with the columns of a tile is read once for all of its rows,
// and stays in the first-level cache from row to row. A row has as few lanes as leave the wanted
// number of elements to the block, from 8 to a warp; a piece is of whole vectors for 8.
inline Tiles RowTiles(int64_t rows, int64_t columns, int vector, int at_once, int64_t elements,
                      int64_t widest) {
  Tiles tiles = {};
  tiles.lane_bits = 3;
  const int64_t unit = int64_t{tiles.lanes()} * vector, most = AtLeast(1, widest / unit);
  const int64_t units = AtLeast(1, CeilDiv(columns, unit));
  tiles.columns = CeilDiv(units, AtLeast(1, (units + most / 2) / most)) * unit;
  tiles.across = AtLeast(1, CeilDiv(columns, tiles.columns));
  const auto batch = [&] { return int64_t{kThreads} / tiles.lanes() * at_once; };
  while (tiles.lanes() < kWarp && int64_t{2} * tiles.lanes() * vector < tiles.columns &&
         batch() * tiles.columns > elements) {
    ++tiles.lane_bits;
  }
  const int64_t batches = AtLeast(1, elements / (batch() * tiles.columns));
  tiles.rows = batch() * AtMost(batches, AtLeast(1, CeilDiv(rows, batch())));
  tiles.down = CeilDiv(rows, tiles.rows);
  return tiles;
}

// Tiles for a pass across the rows: 512 bytes of a row, or down to 128 where that leaves more rows
// to a tile; then as many rows as the wanted number of elements has.
inline Tiles ColumnTiles(int64_t rows, int64_t columns, int vector, int element_bytes,
                         int64_t elements) {
  Tiles tiles = {};
  tiles.lane_bits = 5;  // a warp
  while (tiles.lanes() > 1 && int64_t{tiles.lanes()} / 2 * vector >= columns) --tiles.lane_bits;
  while (int64_t{tiles.lanes()} * vector * element_bytes > 128 &&
         rows * tiles.lanes() * vector > elements) {
    --tiles.lane_bits;
  }
  tiles.columns = int64_t{tiles.lanes()} * vector;
  const int64_t row_threads = kThreads / tiles.lanes();
  tiles.down = AtLeast(1, CeilDiv(rows * tiles.columns, elements));
  tiles.rows = CeilDiv(AtLeast(1, CeilDiv(rows, tiles.down)), row_threads) * row_threads;
  tiles.down = AtLeast(1, CeilDiv(rows, tiles.rows));
  tiles.across = CeilDiv(columns, tiles.columns);
  return tiles;
}

// How many threads share the inner dimension of a tile of the MLP's outputs: what is left of a block
// when each has kBlockSide outputs of four values, a sample having so many branches.
CBAM_HOST_DEVICE inline int InnerThreads(int outputs, int64_t group_samples, int branches) {
  int threads = kThreads / (outputs / kBlockSide);
  for (int64_t values = 4; values < group_samples * branches; values *= 2) threads /= 2;
  return threads;
}

// Values of a patch's window: of pairs of columns.
CBAM_HOST_DEVICE inline int PatchValues(const Patches& patches, int kernel_depth, int kernel_height,
                                        int kernel_width) {
  return kernel_depth * (patches.rows + kernel_height - 1) *
         ((patches.columns + 1) / 2 * 2 + kernel_width - 1);
}

// Patches of about two positions per thread: whole rows where these are short, else pieces of 64. A
// window has as many slices as the kernel: for these to fit, patches of volumes may be smaller.
inline Patches MakePatches(const Problem& problem, int value_bytes) {
  Patches patches = {};
  patches.columns = static_cast<int>(AtMost(AtLeast(1, problem.width), 64));
  patches.rows = static_cast<int>(
      AtMost(AtLeast(1, problem.height), AtLeast(1, 2 * kThreads / patches.columns)));
  const int64_t taps = problem.kernel_depth * problem.kernel_height * problem.kernel_width;
  const auto fits = [&] {
    if (taps * value_bytes > kItemBytes) return false;
    const int64_t values = int64_t{3} * PatchValues(patches, static_cast<int>(problem.kernel_depth),
                                                    static_cast<int>(problem.kernel_height),
                                                    static_cast<int>(problem.kernel_width)) +
                           2 * taps + kThreads / kWarp;
    return values * value_bytes + 2 * kThreads * int64_t{sizeof(int)} <= kItemBytes;
  };
  const Patches whole = patches;
  while (!fits() && problem.kernel_depth > 1 && patches.rows * patches.columns > kThreads / 8) {
    int& side = patches.rows * 4 > patches.columns ? patches.rows : patches.columns;
    side = (side + 1) / 2;
  }
  patches.staged = fits();
  if (!patches.staged) patches = whole;
  const int64_t across = CeilDiv(problem.width, patches.columns);
  const int64_t down = CeilDiv(problem.height, patches.rows);
  patches.across = static_cast<uint32_t>(across);
  patches.down = static_cast<uint32_t>(down);
  patches.count = across * down * problem.depth;
  return patches;
}

// How many channels of NCHW make a row. Several where one is not of whole vectors: so many that a row
// begins where a sector does, or fewer if channels are not of so many. 1 too where vectors do not fit.
inline int FoldOf(const Problem& problem, int vector, int element_bytes) {
  const int64_t positions = Positions(problem);
  if (ChannelsLast(problem) || positions % vector == 0 || problem.channels % vector != 0 ||
      positions < vector || positions > 0x7fffffff / kSector) {
    return 1;
  }
  int fold = vector;
  while (positions * fold * element_bytes % kSector != 0 && problem.channels % (2 * fold) == 0)
    fold *= 2;
  return fold;
}

// A call of one of the argument structs with maps read in vectors: all but the schedule. With a
// null workspace it only counts bytes.
template <typename T>
class Plan {
 public:
  using A = Compute<T>;

  Plan(const Problem& problem, int vector, void* workspace)
      : problem_(problem), arena_(workspace), call({}) {
    call.vector = vector;
    call.channels_last = ChannelsLast(problem);
    call.batch = problem.batch;
    call.depth = static_cast<uint32_t>(problem.depth);
    call.height = static_cast<uint32_t>(problem.height);
    call.width = static_cast<uint32_t>(problem.width);
    call.positions = Positions(problem);
    call.channels = problem.channels;
    call.fold = FoldOf(problem, vector, sizeof(T));
    call.rows =
        static_cast<uint32_t>(ChannelsLast(problem) ? call.positions : call.channels / call.fold);
    call.columns =
        static_cast<uint32_t>(ChannelsLast(problem) ? call.channels : call.positions * call.fold);
    call.hidden = problem.hidden;
    call.kernel_depth = static_cast<uint16_t>(problem.kernel_depth);
    call.kernel_height = static_cast<uint16_t>(problem.kernel_height);
    call.kernel_width = static_cast<uint16_t>(problem.kernel_width);
    call.batch_norm = problem.batch_norm;
    call.use_mean = UsesMean(problem.pooling);
    call.use_max = UsesMax(problem.pooling);
    call.mlp_relu = problem.mlp_activation == Activation::kRelu;
    call.by_branch = HasTwoLogits(problem);
    call.sum_of_gates = call.by_branch && problem.mlp_merge == MlpMerge::kGates;
    call.sum_of_logits = IsSumOfLogits(problem);
    call.serial = problem.module == Module::kChannelFirst;
    call.floor = problem.activation == Activation::kRelu ? A(0) : -static_cast<A>(INFINITY);
    call.epsilon = static_cast<A>(problem.epsilon);
    if (HasSpatialGate(problem)) call.patches = MakePatches(problem, sizeof(A));
    // Where reading the weights for each sample would cost more than a quarter of reading its map.
    if (HasChannelGate(problem)) {
      const double weights =
          2.0 * static_cast<double>(problem.channels * problem.hidden) * sizeof(A);
      const double map = static_cast<double>(call.positions * problem.channels) * sizeof(T);
      while (group_samples_ < kSamples && static_cast<double>(group_samples_) * map < 4 * weights) {
        group_samples_ *= 2;
      }
    }
    group_samples_ = AtLeast(1, AtMost(group_samples_, problem.batch));
    call.mlp_slice = int64_t{kInnerIndices} * InnerThreads(kUnits, group_samples_, 2);
    const int64_t groups = CeilDiv(problem.batch, group_samples_);
    counter_bytes = sizeof(uint64_t) + sizeof(uint32_t) * Schedule::Counters(groups);
    call.next_ticket = arena_.template Take<uint64_t>(CeilDiv(counter_bytes, sizeof(uint64_t)));
    if (call.next_ticket != nullptr)
      call.counters = reinterpret_cast<uint32_t*>(call.next_ticket + 1);
  }

  void Fill(const ForwardArgs& args) {
    PlanPasses(1, args.residual != nullptr ? 2 : 1);
    call.x = args.x;
    call.residual = args.residual;
    call.result = args.y;
    if (HasChannelGate(problem_)) {
      call.w0 = static_cast<const A*>(args.w0);
      call.b0 = static_cast<const A*>(args.b0);
      call.w1 = static_cast<const A*>(args.w1);
      call.b1 = static_cast<const A*>(args.b1);
      call.channel_descriptors = static_cast<A*>(args.channel_descriptors);
      call.channel_gate = static_cast<A*>(args.channel_gate);
      call.channel_source = TakeChannelPass(static_cast<A>(call.positions));
      TakeHiddenSlices();
      call.hidden_values = Take(problem_.batch, 2, problem_.hidden);
    }
    if (HasSpatialGate(problem_)) {
      call.kernel = static_cast<const A*>(args.kernel);
      call.bias = static_cast<const A*>(args.bias);
      call.gamma = static_cast<const A*>(args.gamma);
      call.spatial_descriptors = static_cast<A*>(args.spatial_descriptors);
      call.spatial_gate = static_cast<A*>(args.spatial_gate);
      call.spatial_source = TakeSpatialPass(static_cast<A>(call.channels));
      if (problem_.batch_norm) {
        call.batch_statistics = static_cast<A*>(args.batch_statistics);
        call.z = Take(problem_.batch, call.positions);
        call.patch_sums = Take(2, problem_.batch, call.patches.count);
      }
    }
  }
  void Order(const ForwardArgs&, ScheduleBuilder* builder) const {
    uint32_t channel = 0, spatial = 0;
    if (HasChannelGate(problem_)) {
      channel = builder->AddBySample(Task::kChannelPool, call.channel_tiles.count(), 0);
      channel = AddHidden(builder, Task::kHidden, Task::kHiddenFold, channel);
      channel = builder->Add(Task::kGate, CeilDiv(call.channels, kGateChannels), channel);
    }
    if (HasSpatialGate(problem_)) {
      spatial = builder->AddBySample(Task::kSpatialPool, call.spatial_tiles.count(),
                                     call.serial ? channel : 0);
      spatial = builder->AddBySample(Task::kConvolution, call.patches.count, spatial);
      if (problem_.batch_norm) {
        spatial = builder->AddOnce(Task::kStatistics, 1, spatial);
        spatial =
            builder->AddBySample(Task::kNormalise, CeilDiv(call.positions, kChunk), 0, spatial);
      }
    }
    builder->AddBySample(Task::kApply, call.map_tiles.count(), channel | spatial);
  }

  void Fill(const BackwardArgs& args) {
    const bool relu = problem_.activation == Activation::kRelu;
    PlanPasses(relu ? 3 : 2, relu ? 3 : 2);
    call.x = args.x;
    call.dy = args.dy;
    call.mask = relu ? args.y : nullptr;
    call.result = args.dx;
    call.d_residual = relu ? args.d_residual : nullptr;
    if (HasChannelGate(problem_)) {
      call.w0 = static_cast<const A*>(args.w0);
      call.b0 = static_cast<const A*>(args.b0);
      call.w1 = static_cast<const A*>(args.w1);
      call.b1 = static_cast<const A*>(args.b1);
      call.channel_gate = Written(args.channel_gate);
      call.d_channel_gate = static_cast<const A*>(args.d_channel_gate);
      call.dw0 = static_cast<A*>(args.dw0);
      call.db0 = static_cast<A*>(args.db0);
      call.dw1 = static_cast<A*>(args.dw1);
      call.db1 = static_cast<A*>(args.db1);
      A* const means = Written(args.channel_descriptors);
      A* const maxima = means != nullptr ? means + problem_.batch * problem_.channels : nullptr;
      call.channel_source = {means, maxima, call.channels, 1, call.channels, A(1)};
      call.channel_maximum = maxima;
      TakeChannelPass(A(1));
      TakeSides(&call.channel_sides, call.channels, !ChannelsLast(problem_));
      TakeHiddenSlices();
      call.hidden_values = Take(problem_.batch, 2, problem_.hidden);
      call.d_hidden = Take(problem_.batch, 2, problem_.hidden);
      const int branches = call.by_branch ? 2 : 1;
      call.d_logits = Take(problem_.batch, branches, problem_.channels);
      if (NeedsLogits()) call.logits = Take(problem_.batch, branches, problem_.channels);
    }
    if (HasSpatialGate(problem_)) {
      call.kernel = static_cast<const A*>(args.kernel);
      call.bias = static_cast<const A*>(args.bias);
      call.gamma = static_cast<const A*>(args.gamma);
      call.spatial_gate = Written(args.spatial_gate);
      call.batch_statistics = Written(args.batch_statistics);
      call.d_spatial_gate = static_cast<const A*>(args.d_spatial_gate);
      call.dkernel = static_cast<A*>(args.dkernel);
      call.dbias = static_cast<A*>(args.dbias);
      call.dgamma = static_cast<A*>(args.dgamma);
      A* const means = Written(args.spatial_descriptors);
      A* const maxima = means != nullptr ? means + call.positions : nullptr;
      call.spatial_source = {means, maxima, call.positions, 1, 2 * call.positions, A(1)};
      call.position_maximum = maxima;
      call.position_stride = 2 * call.positions;
      TakeSpatialPass(A(1));
      TakeSides(&call.position_sides, call.positions, ChannelsLast(problem_));
      const int64_t patches = call.patches.count;
      call.taps = Take(
          CheckedSize(2) * problem_.kernel_depth * problem_.kernel_height * problem_.kernel_width +
              1,
          problem_.batch, patches);
      if (problem_.batch_norm) {
        call.z = Take(problem_.batch, call.positions);
        call.dz = Take(problem_.batch, call.positions);
        call.patch_sums = Take(2, problem_.batch, patches);
        call.totals = Take(2);
      }
    }
  }
  void Order(const BackwardArgs&, ScheduleBuilder* builder) const {
    const int64_t channels = CeilDiv(call.channels, kGateChannels);
    uint32_t hidden = 0, spatial = 0, hidden_grad = 0, channel = 0;
    if (HasChannelGate(problem_)) {
      hidden = AddHidden(builder, Task::kHidden, Task::kHiddenFold, 0);
      if (NeedsLogits()) hidden |= builder->Add(Task::kLogits, channels, hidden);
    }
    if (HasSpatialGate(problem_)) {
      spatial = builder->AddBySample(Task::kSpatialGrad, call.spatial_tiles.count(), 0);
      uint32_t totals = 0;
      if (problem_.batch_norm) {
        totals = builder->AddBySample(Task::kNormGrad, call.patches.count, spatial);
        totals = builder->AddOnce(Task::kTotals, 1, totals);
      }
      spatial = builder->AddBySample(Task::kPositionSides, call.patches.count, spatial, totals);
    }
    if (HasChannelGate(problem_)) {
      channel = builder->AddBySample(Task::kChannelGrad, call.channel_tiles.count(),
                                     call.serial ? spatial : 0);
      hidden_grad = AddHidden(builder, Task::kHiddenGrad, Task::kHiddenGradFold, channel | hidden);
      channel = builder->Add(Task::kChannelSides, channels, hidden_grad);
    }
    builder->AddBySample(Task::kMapGrad, call.map_tiles.count(), spatial | channel);
    if (HasSpatialGate(problem_)) {
      const int64_t taps =
          2 * problem_.kernel_depth * problem_.kernel_height * problem_.kernel_width;
      builder->AddOnce(Task::kTaps, CeilDiv(taps + 1, kTapsAtOnce), spatial);
    }
    if (HasChannelGate(problem_)) {
      builder->AddOnce(Task::kWeights1,
                       CeilDiv(call.hidden, kOuterLeft) * CeilDiv(call.channels, kOuterRight),
                       hidden_grad);
      builder->AddOnce(Task::kWeights0,
                       CeilDiv(call.channels, kOuterLeft) * CeilDiv(call.hidden, kOuterRight),
                       hidden_grad);
    }
  }

  void Fill(const ChannelPoolArgs& args) {
    FillPool(false, args.x, args.mean, args.maximum, call.channels, 1);
  }
  void Fill(const SpatialPoolArgs& args) {
    const int64_t second = ChannelsLast(problem_) ? 1 : call.positions;
    FillPool(true, args.x, args.descriptors, Second(args.descriptors, second), 2 * call.positions,
             ChannelsLast(problem_) ? 2 : 1);
  }
  void Order(const ChannelPoolArgs&, ScheduleBuilder* builder) const { OrderPool(builder); }
  void Order(const SpatialPoolArgs&, ScheduleBuilder* builder) const { OrderPool(builder); }

  void Fill(const ChannelPoolGradArgs& args) {
    FillPoolGrad(false, args.x, args.maximum, args.d_mean, args.d_maximum, args.dx, call.channels,
                 1);
  }
  void Fill(const SpatialPoolGradArgs& args) {
    const int64_t second = ChannelsLast(problem_) ? 1 : call.positions;
    FillPoolGrad(true, args.x, Second(args.descriptors, second), args.d_descriptors,
                 Second(args.d_descriptors, second), args.dx, 2 * call.positions,
                 ChannelsLast(problem_) ? 2 : 1);
  }
  void Order(const ChannelPoolGradArgs&, ScheduleBuilder* builder) const { OrderPoolGrad(builder); }
  void Order(const SpatialPoolGradArgs&, ScheduleBuilder* builder) const { OrderPoolGrad(builder); }

  // Whether all addresses allow the vectors: of the maps, and of what goes with their columns.
  bool Fits() const {
    if (call.columns % call.vector != 0) return false;
    const void* const maps[] = {call.x,    call.residual, call.dy,
                                call.mask, call.result,   call.d_residual};
    for (const void* map : maps) {
      if (reinterpret_cast<uintptr_t>(map) % (call.vector * sizeof(T)) != 0) return false;
    }
    if (call.fold > 1) return true;  // these are read one by one
    const A* const columns[] = {call.channels_last ? call.channel_gate : call.spatial_gate,
                                call.channels_last ? call.channel_maximum : call.position_maximum};
    for (const A* values : columns) {
      if (reinterpret_cast<uintptr_t>(values) % (call.vector * sizeof(A)) != 0) return false;
    }
    return true;
  }

  size_t bytes() const { return arena_.bytes(); }
  int64_t group_samples() const { return group_samples_; }

 private:
  template <typename... Sizes>
  A* Take(Sizes... sizes) {
    return arena_.template Take<A>(sizes...);
  }
  static A* Written(const void* values) { return static_cast<A*>(const_cast<void*>(values)); }
  static T* Second(void* values, int64_t offset) {
    return values != nullptr ? static_cast<T*>(values) + offset : nullptr;
  }
  static const T* Second(const void* values, int64_t offset) {
    return Second(const_cast<void*>(values), offset);
  }

  // Whether backward computes the logits again.
  bool NeedsLogits() const { return call.by_branch || call.mlp_relu; }
  void TakeHiddenSlices() {
    const int64_t slices = CeilDiv(call.channels, call.mlp_slice);
    if (slices > 1) call.hidden_slices = TakeReduced(call.hidden, slices, A(1));
  }
  // Sums over channels for the hidden units, and the fold of their slices. HiddenGrad's take the
  // place of Hidden's, which are folded before.
  uint32_t AddHidden(ScheduleBuilder* builder, Task sums, Task fold, uint32_t after) const {
    const int64_t slices = CeilDiv(call.channels, call.mlp_slice);
    after = builder->Add(sums, slices * CeilDiv(call.hidden, kUnits), after);
    if (slices == 1) return after;
    return builder->AddBySample(fold, CeilDiv(call.hidden, kChunk), after);
  }

  // By how many maps the reductions read, and how many the pass that writes one reads.
  void PlanPasses(int maps, int result_maps) {
    const int64_t elements = kTileBytes / maps / static_cast<int64_t>(sizeof(T));
    const auto row_tiles = [&](int64_t rows, int64_t columns, int read, int64_t widest) {
      return RowTiles(rows, columns, call.vector, RowsAtOnce<T>(call.vector, read), elements,
                      widest);
    };
    const Tiles columns = ColumnTiles(call.rows, call.columns, call.vector, sizeof(T), elements);
    // The more goes with a column, the fewer columns; the end of a row costs a sum more than a map.
    const int64_t widest = int64_t{kThreads} * call.vector;
    const int64_t with_sides = AtMost(widest, kThreads);
    call.channel_tiles = ChannelsLast(problem_) ? columns
                                                : row_tiles(call.channels, call.positions, maps,
                                                            maps > 1 ? with_sides : widest);
    call.spatial_tiles =
        ChannelsLast(problem_) ? row_tiles(call.rows, call.columns, maps, widest) : columns;
    call.map_tiles = call.fold > 1
                         ? ColumnTiles(call.rows, call.columns, call.vector, sizeof(T),
                                       kTileBytes / result_maps / static_cast<int64_t>(sizeof(T)))
                         : row_tiles(call.rows, call.columns, result_maps, kThreads);
  }

  Reduced<A> TakeReduced(int64_t results, int64_t slices, A divisor) {
    Reduced<A> reduced = {};
    reduced.results = results;
    reduced.slices = static_cast<int>(slices);
    reduced.sample_stride = slices * results;
    reduced.divisor = divisor;
    reduced.first = Take(problem_.batch, slices, results);
    reduced.second = Take(problem_.batch, slices, results);
    return reduced;
  }
  Reduced<A> TakeChannelPass(A divisor) {
    call.channel_pass = TakeReduced(
        call.channels, ChannelsLast(problem_) ? call.channel_tiles.down : call.channel_tiles.across,
        divisor);
    return call.channel_pass;
  }
  Reduced<A> TakeSpatialPass(A divisor) {
    call.spatial_pass = TakeReduced(call.positions,
                                    ChannelsLast(problem_) ? call.spatial_tiles.across
                                    : call.fold > 1        ? call.spatial_tiles.count()
                                                           : call.spatial_tiles.down,
                                    divisor);
    return call.spatial_pass;
  }
  void TakeSides(Sides<A>* sides, int64_t size, bool together) {
    const int copies = !together && call.fold > 1 ? call.vector : 1;
    *sides = {Take(problem_.batch, 4, copies, size), size, together, size * copies};
  }

  // What pools and their gradients share.
  void FillPools(const void* x, bool over_channels, int64_t stride, int64_t step, int maps) {
    PlanPasses(maps, maps);
    call.x = x;
    call.pool_over_channels = over_channels;
    call.pool_stride = stride;
    call.pool_step = step;
  }
  void FillPool(bool over_channels, const void* x, void* first, void* second, int64_t stride,
                int64_t step) {
    FillPools(x, over_channels, stride, step, 1);
    call.pool_first = first;
    call.pool_second = second;
    if (over_channels) {
      TakeSpatialPass(static_cast<A>(call.channels));
    } else {
      TakeChannelPass(static_cast<A>(call.positions));
    }
  }
  int64_t PoolChunks() const {
    return CeilDiv(call.pool_over_channels ? call.positions : call.channels, kChunk);
  }
  uint32_t AddPass(ScheduleBuilder* builder, Task over_channels, Task over_positions,
                   uint32_t after) const {
    return builder->AddBySample(
        call.pool_over_channels ? over_channels : over_positions,
        call.pool_over_channels ? call.spatial_tiles.count() : call.channel_tiles.count(), after);
  }
  void OrderPool(ScheduleBuilder* builder) const {
    builder->AddBySample(Task::kStorePool, PoolChunks(),
                         AddPass(builder, Task::kSpatialPool, Task::kChannelPool, 0));
  }

  void FillPoolGrad(bool over_channels, const void* x, const void* maximum, const void* d_first,
                    const void* d_second, void* dx, int64_t stride, int64_t step) {
    FillPools(x, over_channels, stride, step, 2);
    call.dy = x;
    call.result = dx;
    call.pool_maximum = maximum;
    call.d_pool_first = d_first;
    call.d_pool_second = d_second;
    const int64_t results = over_channels ? call.positions : call.channels;
    call.pool_maxima = Take(problem_.batch, results);
    if (over_channels) {
      TakeSpatialPass(A(1));
      TakeSides(&call.position_sides, results, ChannelsLast(problem_));
      call.position_maximum = call.pool_maxima;
      call.position_stride = results;
    } else {
      TakeChannelPass(A(1));
      TakeSides(&call.channel_sides, results, !ChannelsLast(problem_));
      call.channel_maximum = call.pool_maxima;
    }
  }
  void OrderPoolGrad(ScheduleBuilder* builder) const {
    uint32_t bit = builder->AddBySample(Task::kPoolMaxima, PoolChunks(), 0);
    bit = AddPass(builder, Task::kSpatialGrad, Task::kChannelGrad, bit);
    bit = builder->AddBySample(Task::kPoolSides, PoolChunks(), bit);
    builder->AddBySample(Task::kMapGrad, call.map_tiles.count(), bit);
  }

  const Problem& problem_;
  WorkspaceArena<kCudaAlignment> arena_;
  int64_t group_samples_ = 1;

 public:
  Call<A> call;
  int64_t counter_bytes;  // from next_ticket on, to be 0
};

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_PLAN_H_
