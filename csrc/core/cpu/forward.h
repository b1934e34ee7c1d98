// The forward pipeline on CPUs.
//
//           reads                          computes
//   pass 1  x from memory                  channel descriptors of a wave
//           weights, once per wave         the MLP of the wave, as small matrix products
//   pass 2  x from the last-level cache    spatial descriptors of a few rows
//           k/2 rows behind                convolution and sigmoid
//   pass 3  x from the second-level        y for the same rows
//           cache, k/2 rows behind
//
// so x comes from memory once and y goes there once. With batch norm the statistics need every
// sample's convolution before any gate, so pass 3 starts over and x is read from memory twice.
//
// y may be where x or the residual is: no row is read after pass 3 has been there.
#ifndef CBAM_OPS_CORE_CPU_FORWARD_H_
#define CBAM_OPS_CORE_CPU_FORWARD_H_

#include "core/cpu/pipeline.h"

namespace cbam_ops {
namespace cpu {

// Channel descriptors of samples, shared with ChannelPool: partial sums per unit (NHWC) or whole
// channels at once (NCHW, and where a sample is one unit).
template <typename A>
class ChannelDescriptors {
 public:
  ChannelDescriptors(const Geometry& g, const MapPasses<A>& map, Arena* arena) : g_(g), map_(map) {
    if (InUnits()) partial_ = arena->Take<A>(g.slots * g.wave, g.units, 2, g.channels);
  }

  // mean[c] and maximum[c] of a wave's samples of `maps`, whose results are C apart.
  void Run(const void* maps, const Wave& wave, A* mean, A* maximum) const {
    const void* x = g_.At(maps, wave.first);
    if (InUnits()) {
      PartialThenCombined(x, wave, mean, maximum);
    } else {
      WholeChannels(x, wave, mean, maximum);
    }
  }

 private:
  bool InUnits() const { return g_.sample.layout == Layout::kNHWC && g_.units > 1; }

  void PartialThenCombined(const void* x, const Wave& wave, A* mean, A* maximum) const {
    const int64_t c = g_.channels;
    A* const partials = partial_ + wave.row * g_.units * 2 * c;
    const int64_t unit_bytes = std::max<int64_t>(1, g_.sample_bytes / g_.units);
    const int64_t units_per_task =
        std::clamp<int64_t>(Geometry::kStepBytes / unit_bytes, 1, g_.units);
    const int64_t tasks = CeilDiv(g_.units, units_per_task);
    ForEach(wave.parallel, wave.samples * tasks, [&](int64_t task) {
      const int64_t s = task / tasks;
      const int64_t end = std::min(g_.units, (task % tasks + 1) * units_per_task);
      for (int64_t u = task % tasks * units_per_task; u < end; ++u) {
        A* partial = partials + (s * g_.units + u) * 2 * c;
        map_.channel_pool(g_.sample, g_.At(x, s), g_.Unit(u), {0, c}, A{1}, partial, partial + c);
      }
    });
    ForEach(wave.parallel, wave.samples, [&](int64_t s) {
      CombineUnits(
          partials + s * g_.units * 2 * c, g_.units, c, -std::numeric_limits<double>::infinity(),
          [](double a, double b) { return MaxOrNan(a, b); },
          [&](int64_t i, double total, double greatest) {
            mean[s * c + i] = static_cast<A>(total / static_cast<double>(g_.positions));
            maximum[s * c + i] = static_cast<A>(greatest);
          });
    });
  }

  void WholeChannels(const void* x, const Wave& wave, A* mean, A* maximum) const {
    const int64_t c = g_.channels;
    const int64_t channel_bytes = std::max<int64_t>(1, g_.sample_bytes / std::max<int64_t>(1, c));
    int64_t per_task = std::max<int64_t>(1, c);  // all, where rows hold all
    if (g_.sample.layout == Layout::kNCHW)
      per_task = std::clamp<int64_t>(Geometry::kStepBytes / channel_bytes, 1, per_task);
    const int64_t tasks = CeilDiv(c, per_task);
    ForEach(wave.parallel, wave.samples * tasks, [&](int64_t task) {
      const int64_t s = task / tasks;
      const Range range{task % tasks * per_task, std::min(c, (task % tasks + 1) * per_task)};
      map_.channel_pool(g_.sample, g_.At(x, s), {0, g_.positions}, range,
                        static_cast<A>(g_.positions), mean + s * c + range.begin,
                        maximum + s * c + range.begin);
    });
  }

  const Geometry& g_;
  const MapPasses<A>& map_;
  A* partial_ = nullptr;  // [slots * wave, units, 2, C]
};

template <typename A>
class ForwardPipeline {
 public:
  ForwardPipeline(const Problem& problem, const Kernels<A>& kernels, const Parallel& parallel,
                  void* workspace)
      : problem_(problem),
        map_(*kernels.map),
        dense_(*kernels.dense),
        parallel_(parallel),
        g_(problem, parallel, 1),
        stream_(ShouldStream(g_)),
        arena_(workspace),
        channel_descriptors_(g_, map_, &arena_),
        batch_norm_(problem, g_, *kernels.double_dense, parallel_, &arena_) {
    if (HasChannelGate(problem)) {
      const int64_t samples = g_.slots * g_.wave;
      for (int q = 0; q < 2; ++q) {
        hidden_[q] = arena_.Take<A>(samples, problem.hidden);
        logits_[q] = arena_.Take<A>(samples, g_.channels);
      }
      if (AddsHidden(problem)) hidden_sum_ = arena_.Take<A>(samples, problem.hidden);
    }
    blocks_ = g_.BlocksPerSample(g_.wave);
    if (HasSpatialGate(problem) && !problem.batch_norm) {
      int64_t rows = 0;
      for (int64_t b = 0; b < blocks_; ++b) rows = std::max(rows, g_.BlockRows(b, blocks_).size());
      plane_size_ = PaddedPlane<A>::Size(g_, dense_.lanes, rows + 2 * g_.half_rows);
      const int64_t halo_size = 2 * g_.step_rows * g_.width;
      scratch_size_ = RoundUp(2 * plane_size_ + halo_size, 64);
      slots_ = g_.is_own ? 1 : Slots::Count(parallel, g_.wave * blocks_);
      scratch_ = arena_.Take<A>(g_.slots * slots_, scratch_size_);
    }
  }

  size_t workspace_bytes() const { return arena_.bytes(); }

  void Run(const ForwardArgs& args) {
    ForEachWave(g_, parallel_, [&](const Wave& wave) {
      if (HasChannelGate(problem_)) ChannelGate(args, wave);
      if (problem_.batch_norm) {
        SpatialDescriptors(args, wave);
      } else if (HasSpatialGate(problem_)) {
        if (OverwritesX(args) && blocks_ > 1) PoolAtBorders(args, wave);
        A* const scratch = scratch_ + wave.slot * slots_ * scratch_size_;
        ForEachWithSlot(
            wave.parallel, wave.samples * blocks_, slots_, [&](int64_t task, int64_t slot) {
              SpatialBlock(args, wave.first + task / blocks_, g_.BlockRows(task % blocks_, blocks_),
                           scratch + slot * scratch_size_);
            });
      } else {
        ApplyAll(args, wave);
      }
    });
    if (problem_.batch_norm) {
      NormalizedGate(args);
      ApplyAll(args, {parallel_, 0, g_.batch, 0, 0});
    }
  }

 private:
  A* ChannelGateOf(const ForwardArgs& args, int64_t n) const {
    return HasChannelGate(problem_) ? static_cast<A*>(args.channel_gate) + n * g_.channels
                                    : nullptr;
  }

  void ChannelGate(const ForwardArgs& args, const Wave& wave) {
    const int64_t c = g_.channels, h = problem_.hidden, samples = wave.samples;
    A* mean = static_cast<A*>(args.channel_descriptors) + wave.first * c;
    A* maximum = mean + g_.batch * c;
    channel_descriptors_.Run(args.x, wave, mean, maximum);
    A* const hidden[2] = {hidden_[0] + wave.row * h, hidden_[1] + wave.row * h};
    A* const hidden_sum = hidden_sum_ + wave.row * h;
    A* const logits_of[2] = {logits_[0] + wave.row * c, logits_[1] + wave.row * c};

    const Mlp<A> mlp{problem_,
                     dense_,
                     static_cast<const A*>(args.w0),
                     static_cast<const A*>(args.b0),
                     static_cast<const A*>(args.w1),
                     static_cast<const A*>(args.b1)};
    const A* descriptors[2] = {mean, maximum};
    const bool by_branch = HasTwoLogits(problem_), adds_hidden = AddsHidden(problem_);
    const int branch = UsesMean(problem_.pooling) ? 0 : 1;

    const Blocks hidden_blocks = mlp.HiddenBlocks(wave);
    ForEach(wave.parallel, hidden_blocks.count, [&](int64_t i) {
      const Range columns = hidden_blocks.At(i);
      mlp.HiddenBlock(descriptors, samples, columns, hidden);
      for (int64_t s = 0; adds_hidden && s < samples; ++s) {
        for (int64_t j = s * h + columns.begin; j < s * h + columns.end; ++j)
          hidden_sum[j] = hidden[0][j] + hidden[1][j];
      }
    });

    A* gate = ChannelGateOf(args, wave.first);
    const Blocks channel_blocks = mlp.ChannelBlocks(wave);
    ForEach(wave.parallel, channel_blocks.count, [&](int64_t i) {
      const Range columns = channel_blocks.At(i);
      A* logits = logits_of[branch];
      const auto sigmoids = [&](const A* from, A* to) {
        for (int64_t s = 0; s < samples; ++s) {
          const int64_t begin = s * c + columns.begin;
          dense_.sigmoid(from + begin, columns.size(), to + begin);
        }
      };
      const auto output = [&](const A* units, A* to) {
        mlp.OutputBlock(units, samples, columns, problem_.mlp_activation, to + columns.begin, c);
      };
      output(adds_hidden ? hidden_sum : hidden[branch], logits);
      if (by_branch) {
        output(hidden[1], logits_of[1]);
        if (problem_.mlp_merge == MlpMerge::kGates) {
          sigmoids(logits, gate);
          sigmoids(logits_of[1], logits_of[1]);
          return AddRows(logits_of[1], samples, c, columns, gate);
        }
        AddRows(logits_of[1], samples, c, columns, logits);
      }
      bool finite = true;
      if (IsSumOfLogits(problem_)) {
        for (int64_t s = 0; s < samples; ++s) {
          for (int64_t j = columns.begin; j < columns.end; ++j) {
            A& logit = logits[s * c + j];
            if (mlp.b1 != nullptr) logit += mlp.b1[j];  // the second branch's bias
            finite &= std::isfinite(logit);
          }
        }
      }
      if (!finite) {
        // An infinite weight times 0 is NaN, and its branches' sum need not be: what is not finite
        // is taken branch by branch after all.
        output(hidden[0], logits_of[1]);
        output(hidden[1], gate);
        for (int64_t s = 0; s < samples; ++s) {
          for (int64_t j = s * c + columns.begin; j < s * c + columns.end; ++j) {
            if (!std::isfinite(logits[j])) logits[j] = logits_of[1][j] + gate[j];
          }
        }
      }
      sigmoids(logits, gate);
    });
    // A descriptor that the gate does not use must not carry a NaN into a gradient of weights.
    if (!UsesMean(problem_.pooling)) std::fill(mean, mean + samples * c, A{0});
    if (!UsesMax(problem_.pooling)) std::fill(maximum, maximum + samples * c, A{0});
  }

  // The gate that the spatial descriptors are taken behind.
  const A* PoolGateOf(const ForwardArgs& args, int64_t n) const {
    return problem_.module == Module::kChannelFirst ? ChannelGateOf(args, n) : nullptr;
  }

  // As far as pass 2 goes with batch norm, before whose statistics there is no gate.
  void SpatialDescriptors(const ForwardArgs& args, const Wave& wave) {
    const int64_t tasks = CeilDiv(g_.height, g_.step_rows);
    ForEach(wave.parallel, wave.samples * tasks, [&](int64_t task) {
      const int64_t n = wave.first + task / tasks, row = task % tasks * g_.step_rows;
      Pool(args, n, {row, std::min(g_.height, row + g_.step_rows)});
    });
  }

  // The spatial descriptors of rows of sample n.
  void Pool(const ForwardArgs& args, int64_t n, Range rows) {
    const Range positions = g_.RowPositions(rows);
    A* mean = static_cast<A*>(args.spatial_descriptors) + 2 * n * g_.positions + positions.begin;
    Pool(args, n, positions, mean, mean + g_.positions);
  }
  void Pool(const ForwardArgs& args, int64_t n, Range positions, A* mean, A* maximum) {
    map_.spatial_pool(g_.sample, g_.At(args.x, n), PoolGateOf(args, n), positions, mean, maximum);
  }

  // Where y is x, the rows that two blocks need are pooled before any block is written. Else each
  // block pools those of its neighbours too, and no thread waits for another.
  static bool OverwritesX(const ForwardArgs& args) { return args.y == args.x; }

  // The rows of a block that no other block's convolution reaches.
  Range InnerRows(Range rows) const {
    const int64_t begin = rows.begin > 0 ? std::min(rows.end, rows.begin + g_.half_rows) : 0;
    const int64_t end = rows.end < g_.height ? rows.end - g_.half_rows : rows.end;
    return {begin, std::max(begin, end)};
  }
  void PoolAtBorders(const ForwardArgs& args, const Wave& wave) {
    ForEach(wave.parallel, wave.samples * blocks_, [&](int64_t task) {
      const Range rows = g_.BlockRows(task % blocks_, blocks_), inner = InnerRows(rows);
      Pool(args, wave.first + task / blocks_, {rows.begin, inner.begin});
      Pool(args, wave.first + task / blocks_, {inner.end, rows.end});
    });
  }

  // Rows of one sample through passes 2 and 3.
  void SpatialBlock(const ForwardArgs& args, int64_t n, Range rows, A* scratch) {
    const A* channel_gate = ChannelGateOf(args, n);
    const A* const descriptors =
        static_cast<const A*>(args.spatial_descriptors) + n * 2 * g_.positions;
    A* gate = static_cast<A*>(args.spatial_gate) + n * g_.positions;
    const A bias = args.bias == nullptr ? A{0} : *static_cast<const A*>(args.bias);

    const int64_t plane_rows = rows.size() + 2 * g_.half_rows;
    const Plane<A> planes[2] = {
        PaddedPlane<A>::Make(g_, dense_.lanes, plane_rows, scratch),
        PaddedPlane<A>::Make(g_, dense_.lanes, plane_rows, scratch + plane_size_)};
    const Taps<A> taps = g_.TapsOf(static_cast<const A*>(args.kernel));
    const int64_t first_row = rows.begin - g_.half_rows;  // of the planes; may lie above the map

    A* const halo = scratch + 2 * plane_size_;

    const bool overwrites_x = OverwritesX(args);
    const Range own = overwrites_x ? InnerRows(rows) : rows;  // what is pooled here
    int64_t described = std::max<int64_t>(0, first_row);
    const int64_t last = std::min(g_.height, rows.end + g_.half_rows);
    for (int64_t row = rows.begin; row < rows.end; row += g_.step_rows) {
      const int64_t end = std::min(rows.end, row + g_.step_rows);
      while (described < std::min(last, end + g_.half_rows)) {
        const bool is_own = described >= own.begin && described < own.end;
        const int64_t limit = is_own ? own.end : described < own.begin ? own.begin : last;
        const Range next{described, std::min(limit, described + g_.step_rows)};
        const Range positions = g_.RowPositions(next);
        const A* mean = descriptors + positions.begin;
        const A* maximum = mean + g_.positions;
        if (is_own) {
          Pool(args, n, next);
        } else if (!overwrites_x) {
          mean = halo;  // its owner writes it
          maximum = halo + positions.size();
          Pool(args, n, positions, halo, halo + positions.size());
        }
        CopyRows(g_, mean, next, first_row, planes[0]);
        CopyRows(g_, maximum, next, first_row, planes[1]);
        described = next.end;
      }
      g_.ForConvolved({row, end}, first_row,
                      [&](int64_t r, int64_t count, int64_t width, int64_t p) {
                        dense_.convolve_rows(planes, r, count, width, taps, bias, gate + p);
                      });
      const Range positions = g_.RowPositions({row, end});
      dense_.sigmoid(gate + positions.begin, positions.size(), gate + positions.begin);
      Apply(args, n, channel_gate, gate, positions);
    }
  }

  void Apply(const ForwardArgs& args, int64_t n, const A* channel_gate, const A* gate,
             Range positions) {
    const void* residual = args.residual == nullptr ? nullptr : g_.At(args.residual, n);
    const bool is_new = args.y != args.x && args.y != args.residual;
    map_.apply(g_.sample, g_.At(args.x, n), channel_gate,
               gate == nullptr ? nullptr : gate + positions.begin, residual, problem_.activation,
               positions, stream_ && is_new, g_.At(args.y, n));
  }

  void ApplyAll(const ForwardArgs& args, const Wave& wave) {
    const int64_t tasks = CeilDiv(g_.height, g_.step_rows);
    ForEach(wave.parallel, wave.samples * tasks, [&](int64_t task) {
      const int64_t n = wave.first + task / tasks;
      const int64_t row = task % tasks * g_.step_rows;
      const A* gate = HasSpatialGate(problem_)
                          ? static_cast<const A*>(args.spatial_gate) + n * g_.positions
                          : nullptr;
      Apply(args, n, ChannelGateOf(args, n), gate,
            g_.RowPositions({row, std::min(g_.height, row + g_.step_rows)}));
    });
  }

  // From the descriptors of every sample to the gate.
  void NormalizedGate(const ForwardArgs& args) {
    batch_norm_.Run(static_cast<const A*>(args.spatial_descriptors),
                    static_cast<const A*>(args.kernel));
    A* statistics = static_cast<A*>(args.batch_statistics);
    statistics[0] = static_cast<A>(batch_norm_.mean());
    statistics[1] = static_cast<A>(batch_norm_.variance());

    const double gamma = *static_cast<const A*>(args.gamma);
    const double offset = args.bias == nullptr ? 0.0 : *static_cast<const A*>(args.bias);
    ForEach(parallel_, g_.batch, [&](int64_t n) {
      A* gate = static_cast<A*>(args.spatial_gate) + n * g_.positions;
      for (int64_t p = 0; p < g_.positions; ++p) {
        gate[p] = static_cast<A>(batch_norm_.Normalized(n * g_.positions + p) * gamma + offset);
      }
      dense_.sigmoid(gate, g_.positions, gate);
    });
  }

  const Problem& problem_;
  const MapPasses<A>& map_;
  const DensePasses<A>& dense_;
  const Parallel& parallel_;
  const Geometry g_;
  const bool stream_;
  Arena arena_;
  ChannelDescriptors<A> channel_descriptors_;
  BatchNorm<A> batch_norm_;
  A* hidden_[2] = {};        // [g.slots * wave, hidden], for the mean and the maximum
  A* hidden_sum_ = nullptr;  // [g.slots * wave, hidden], where both are added
  A* logits_[2] = {};        // [g.slots * wave, C]
  int64_t blocks_ = 0, slots_ = 0;
  int64_t plane_size_ = 0, scratch_size_ = 0;
  A* scratch_ = nullptr;  // [g.slots * slots, scratch_size]
};

// What takes which arguments (kernels.cc).
template <typename A>
ForwardPipeline<A> PipelineOf(const ForwardArgs&);

}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_FORWARD_H_
