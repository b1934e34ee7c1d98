// The backward pipeline on CPUs: the gradient of forward.h's module, from x, dy and the small saved
// tensors.
//
//           reads                        computes
//   pass A  x, dy from memory            t[p] = sum_c dy * u, how many channels attain the maximum
//           k/2 rows behind              the gate's gradient, the transposed convolution
//   pass B  x, dy from a cache,          dg_c partial sums, how many positions attain the maximum
//           k/2 rows behind
//                                        the MLP's gradient of the wave; the convolution kernel's
//   pass C  x, dy from the last-level    dx
//           cache
//   last                                 the gradients of the weights, over the whole batch
//
// so x and dy come from memory once each and dx goes there once. With batch norm every sample's
// pass A must precede any pass B, and x and dy are read from memory twice.
//
// dx may be where dy or the rectified y is: pass C is the last that reads a wave.
#ifndef CBAM_OPS_CORE_CPU_BACKWARD_H_
#define CBAM_OPS_CORE_CPU_BACKWARD_H_

#include "core/cpu/pipeline.h"

namespace cbam_ops {
namespace cpu {

// A gradient shared evenly among `count` equal maxima. None are equal to a NaN: the share is then
// NaN, for all, as in TensorFlow.
template <typename A>
void ShareAmongMaxima(A gradient, A count, A* of_all, A* of_maxima) {
  // Both are written whatever the count, so that loops over this are vectors.
  const A share = gradient / count;
  *of_maxima = count > 0 ? share : A{0};
  *of_all = count > 0 ? *of_all : std::numeric_limits<A>::quiet_NaN();
}

// Whether a gate is so near to 1 that 1 - gate has lost digits that the logit still has: the
// derivative is then taken from the logit, which is computed again.
template <typename A>
bool IsSaturated(A gate) {
  return gate > A{0.875};
}
template <typename A>
bool AnySaturated(const A* gates, int64_t count) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) any |= IsSaturated(gates[i]);
  return any;
}
// gradients[i] *= the sigmoid's derivative at its value gates[i], or derivatives[i] where that is
// saturated; null where none is.
template <typename A>
void MultiplyByDerivative(const A* gates, const A* derivatives, int64_t count, A* gradients) {
  if (derivatives == nullptr) {
    for (int64_t i = 0; i < count; ++i) gradients[i] *= gates[i] * (A{1} - gates[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    gradients[i] *= IsSaturated(gates[i]) ? derivatives[i] : gates[i] * (A{1} - gates[i]);
  }
}

template <typename A>
class BackwardPipeline {
 public:
  BackwardPipeline(const Problem& problem, const Kernels<A>& kernels, const Parallel& parallel,
                   void* workspace)
      : problem_(problem),
        map_(*kernels.map),
        dense_(*kernels.dense),
        parallel_(parallel),
        module_(problem.module),
        g_(problem, parallel, 2),
        stream_(ShouldStream(g_)),
        tap_slices_(2 * g_.half_slices + 1),
        arena_(workspace),
        batch_norm_(problem, g_, *kernels.double_dense, parallel_, &arena_) {
    const int64_t n = g_.batch, c = g_.channels, p = g_.positions, h = problem.hidden;
    const int64_t w = g_.slots * g_.wave;
    blocks_ = g_.BlocksPerSample(g_.wave);
    block_slots_ = g_.is_own ? 1 : Slots::Count(parallel, g_.wave * blocks_);
    sample_slots_ = g_.is_own ? 1 : Slots::Count(parallel, g_.wave * tap_slices_);
    if (HasChannelGate(problem)) {
      partial_ = arena_.Take<A>(w, PartialsPerSample(), 2, c);
      arena_.TakePair(hidden_, n, h);
      arena_.TakePair(d_hidden_, n, h);
      if (HasTwoLogits(problem)) {
        arena_.TakePair(dz_channel_, n, c);
      } else {
        dz_channel_[0] = dz_channel_[1] = arena_.Take<A>(n, c);
      }
    }
    if (HasSpatialGate(problem)) {
      dz_ = arena_.Take<A>(problem.batch_norm ? n : w, p);
      d_position_mean_ = arena_.Take<A>(w, p);
      d_position_max_ = arena_.Take<A>(w, p);
      fold_ = g_.is_own ? n
                        : std::clamp(Geometry::kFoldBytes / (g_.taps * int64_t{sizeof(A)}),
                                     std::min<int64_t>(w, 2 * g_.threads), w);
      dtaps_ = arena_.Take<A>(fold_, g_.taps);
      dtaps_total_ = arena_.Take<double>(std::min<int64_t>(n, 1), g_.taps);
      dbias_ = arena_.Take<double>(n);
      const auto plane_size = [&](int64_t rows) {
        return PaddedPlane<A>::Size(g_, dense_.lanes, rows + 2 * g_.half_rows);
      };
      block_size_ = RoundUp(plane_size(LargestBlock()) +       // dz
                                2 * g_.step_rows * g_.width +  // dot, count of a step
                                LargestBlock() * g_.width +    // count of own rows
                                g_.step_rows * g_.width +      // logits of a step, and their planes
                                2 * plane_size(g_.step_rows),
                            64);
      sample_size_ = RoundUp(3 * plane_size(g_.height) + (g_.is_line ? g_.taps : 0), 64);
      scratch_size_ = std::max(block_slots_ * block_size_, sample_slots_ * sample_size_);
      scratch_ = arena_.Take<A>(g_.slots, scratch_size_);
    }
  }

  size_t workspace_bytes() const { return arena_.bytes(); }

  void Run(const BackwardArgs& args) {
    if (g_.batch == 0) return ZeroWeightGradients(args);
    // Where y is rectified, the masked dy takes dy's place; it is also the residual's gradient.
    // Without one it waits in dx, which pass C overwrites element by element.
    dy_ = args.dy;
    if (problem_.activation == Activation::kRelu)
      dy_ = args.d_residual != nullptr ? args.d_residual : args.dx;

    if (problem_.batch_norm) {
      batch_norm_.Run(static_cast<const A*>(args.spatial_descriptors),
                      static_cast<const A*>(args.kernel));
      gamma_ = *static_cast<const A*>(args.gamma);
      ForEachWave(g_, parallel_, [&](const Wave& wave) { PositionsOfWave(args, wave, true); });
      BackwardThroughBatchNorm(args);
    }
    if (HasSpatialGate(problem_)) std::fill_n(dtaps_total_, g_.taps, 0.0);
    ForEachWave(g_, parallel_, [&](const Wave& wave) {
      PositionsOfWave(args, wave, false);
      Reductions(args, wave);
      if (HasChannelGate(problem_)) ThroughMlp(args, wave);
      MapOfWave(args, wave);
    });
    if (HasSpatialGate(problem_) && g_.is_own) AddTaps(g_.batch);
    WeightGradients(args);
  }

 private:
  int64_t LargestBlock() const {
    int64_t rows = 0;
    for (int64_t b = 0; b < blocks_; ++b) rows = std::max(rows, g_.BlockRows(b, blocks_).size());
    return rows;
  }
  const A* ChannelGateOf(const BackwardArgs& args, int64_t n) const {
    return HasChannelGate(problem_) ? static_cast<const A*>(args.channel_gate) + n * g_.channels
                                    : nullptr;
  }
  const A* SpatialGateOf(const BackwardArgs& args, int64_t n) const {
    return static_cast<const A*>(args.spatial_gate) + n * g_.positions;
  }
  const A* SpatialDescriptorsOf(const BackwardArgs& args, int64_t n) const {
    return static_cast<const A*>(args.spatial_descriptors) + n * 2 * g_.positions;
  }
  Taps<A> TapsOf(const BackwardArgs& args) const {
    return g_.TapsOf(static_cast<const A*>(args.kernel));
  }
  A BiasOf(const BackwardArgs& args) const {
    return args.bias == nullptr ? A{0} : *static_cast<const A*>(args.bias);
  }
  // The descriptors of sample n for the convolution at `rows`: row 0 of the planes is g_.half_rows
  // above the first.
  void DescriptorPlanes(const BackwardArgs& args, int64_t n, Range rows, A* memory,
                        Plane<A>* planes) const {
    const int64_t first = rows.begin - g_.half_rows, size = rows.size() + 2 * g_.half_rows;
    const Range inside{std::max<int64_t>(0, first), std::min(g_.height, rows.end + g_.half_rows)};
    const A* from = SpatialDescriptorsOf(args, n) + inside.begin * g_.width;
    for (int q = 0; q < 2; ++q) {
      planes[q] = PaddedPlane<A>::Make(g_, dense_.lanes, size,
                                       memory + q * PaddedPlane<A>::Size(g_, dense_.lanes, size));
      CopyRows(g_, from + q * g_.positions, inside, first, planes[q]);
    }
  }
  A* DzOf(const Wave& wave, int64_t n) const {
    return dz_ + (problem_.batch_norm ? n : wave.Row(n)) * g_.positions;
  }

  // [C]: the gradient of the mean (0) or maximum (1) of a sample's channels, where its partial sums
  // were, which are added up by then. Until it is known, that of the maximum is how many attain it.
  A* DChannel(const Wave& wave, int64_t n, int q) const {
    return partial_ + (wave.Row(n) * PartialsPerSample() * 2 + q) * g_.channels;
  }
  int64_t PartialsPerSample() const { return std::max<int64_t>(1, g_.units); }

  // Positions [p, ...) of sample n of the wave, and the sample's channels.
  PositionValues<A> PositionsAt(const BackwardArgs& args, const Wave& wave, int64_t n,
                                int64_t p) const {
    if (!HasSpatialGate(problem_)) return {};
    const int64_t i = wave.Row(n) * g_.positions + p;
    return {SpatialGateOf(args, n) + p, d_position_mean_ + i,
            SpatialDescriptorsOf(args, n) + g_.positions + p, d_position_max_ + i};
  }
  ChannelValues<A> ChannelsAt(const BackwardArgs& args, const Wave& wave, int64_t n) const {
    if (!HasChannelGate(problem_)) return {};
    const A* maximum =
        static_cast<const A*>(args.channel_descriptors) + (g_.batch + n) * g_.channels;
    return {ChannelGateOf(args, n), DChannel(wave, n, 0), maximum, DChannel(wave, n, 1)};
  }

  // Passes A and B of a wave. `gate_only` (batch norm's first sweep) stops at the gradient of the
  // gate's argument.
  void PositionsOfWave(const BackwardArgs& args, const Wave& wave, bool gate_only) {
    const bool first_sweep = gate_only || !problem_.batch_norm;
    if (first_sweep && problem_.activation == Activation::kRelu) {
      const int64_t steps = CeilDiv(g_.height, g_.step_rows);
      ForEach(wave.parallel, wave.samples * steps, [&](int64_t task) {
        const int64_t n = wave.first + task / steps, row = task % steps * g_.step_rows;
        const Range positions = g_.RowPositions({row, std::min(g_.height, row + g_.step_rows)});
        map_.mask(g_.sample, g_.At(args.dy, n), g_.At(args.y, n), positions,
                  const_cast<void*>(g_.At(dy_, n)));
      });
    }
    A* const scratch = scratch_ + wave.slot * scratch_size_;
    ForEachWithSlot(wave.parallel, wave.samples * blocks_, block_slots_,
                    [&](int64_t task, int64_t slot) {
                      const int64_t n = wave.first + task / blocks_;
                      const Range rows = g_.BlockRows(task % blocks_, blocks_);
                      if (HasSpatialGate(problem_)) {
                        SpatialBlock(args, wave, n, rows, gate_only, scratch + slot * block_size_);
                      } else {
                        ChannelPartials(args, wave, n, g_.UnitsOfRows(rows));
                      }
                    });
  }

  void SpatialBlock(const BackwardArgs& args, const Wave& wave, int64_t n, Range rows,
                    bool gate_only, A* scratch) {
    const int64_t w = g_.width;
    const bool dz_is_there = problem_.batch_norm && !gate_only;
    const int64_t plane_rows = rows.size() + 2 * g_.half_rows;
    const Plane<A> plane = PaddedPlane<A>::Make(g_, dense_.lanes, plane_rows, scratch);
    A* step = scratch + PaddedPlane<A>::Size(g_, dense_.lanes, LargestBlock() + 2 * g_.half_rows);
    A* own_count = step + 2 * g_.step_rows * w;
    A* logits = own_count + LargestBlock() * w;
    const int64_t first_row = rows.begin - g_.half_rows;
    const int64_t halo = gate_only ? 0 : g_.half_rows;

    int64_t ready = std::max<int64_t>(0, rows.begin - halo);
    const int64_t last = std::min(g_.height, rows.end + halo);
    int64_t unit = g_.UnitsOfRows(rows).begin;
    for (int64_t row = rows.begin; row < rows.end; row += g_.step_rows) {
      const int64_t end = std::min(rows.end, row + g_.step_rows);
      while (ready < std::min(last, end + halo)) {
        const bool own = ready >= rows.begin && ready < rows.end;
        const int64_t limit = own ? rows.end : ready < rows.begin ? rows.begin : last;
        const int64_t stop = std::min(limit, ready + g_.step_rows);
        A* dz = own || dz_is_there ? DzOf(wave, n) + ready * w : step;
        A* ties = own ? own_count + (ready - rows.begin) * w : step + g_.step_rows * w;
        if (!dz_is_there || own) {
          // With batch norm the second sweep needs the counts again; dz was made in the first.
          A* dot = dz_is_there ? step : dz;
          map_.backward_positions(g_.sample, module_, g_.At(args.x, n), g_.At(dy_, n),
                                  ChannelGateOf(args, n),
                                  SpatialDescriptorsOf(args, n) + g_.positions + ready * w,
                                  g_.RowPositions({ready, stop}), dot, ties);
          if (!dz_is_there) ThroughSigmoid(args, n, {ready, stop}, logits, dz);
        }
        if (!gate_only) CopyRows(g_, dz, {ready, stop}, first_row, plane);
        ready = stop;
      }
      if (gate_only) continue;
      A* const d_mean = d_position_mean_ + wave.Row(n) * g_.positions;
      A* const d_max = d_position_max_ + wave.Row(n) * g_.positions;
      g_.ForConvolved({row, end}, first_row,
                      [&](int64_t r, int64_t count, int64_t width, int64_t p) {
                        dense_.convolve_rows_transposed(plane, r, count, width, TapsOf(args),
                                                        d_mean + p, d_max + p);
                      });
      for (int64_t i = row * w; i < end * w; ++i) {
        d_mean[i] /= static_cast<A>(g_.channels);
        ShareAmongMaxima(d_max[i], own_count[i - rows.begin * w], &d_mean[i], &d_max[i]);
      }
      if (HasChannelGate(problem_)) {
        const int64_t units_end =
            end == rows.end ? g_.UnitsOfRows(rows).end
                            : (g_.units_per_row > 1 ? end * g_.units_per_row : end / g_.unit_rows);
        ChannelPartials(args, wave, n, {unit, units_end});
        unit = units_end;
      }
    }
  }

  // dz = (t + what reaches the gate otherwise) * g (1 - g), in place of t, over rows of sample n.
  void ThroughSigmoid(const BackwardArgs& args, int64_t n, Range rows, A* scratch, A* dz) const {
    const Range positions = g_.RowPositions(rows);
    const A* gate = SpatialGateOf(args, n) + positions.begin;
    if (args.d_spatial_gate != nullptr) {
      const A* more =
          static_cast<const A*>(args.d_spatial_gate) + n * g_.positions + positions.begin;
      for (int64_t i = 0; i < positions.size(); ++i) dz[i] += more[i];
    }
    if (!AnySaturated(gate, positions.size()))
      return MultiplyByDerivative<A>(gate, nullptr, positions.size(), dz);
    A* const logits = scratch;
    if (problem_.batch_norm) {
      const int64_t begin = n * g_.positions + positions.begin;
      for (int64_t i = 0; i < positions.size(); ++i)
        logits[i] = static_cast<A>(gamma_ * batch_norm_.Normalized(begin + i) + BiasOf(args));
    } else {
      Plane<A> planes[2];
      DescriptorPlanes(args, n, rows, scratch + g_.step_rows * g_.width, planes);
      g_.ForConvolved(rows, rows.begin - g_.half_rows,
                      [&](int64_t r, int64_t count, int64_t width, int64_t p) {
                        dense_.convolve_rows(planes, r, count, width, TapsOf(args), BiasOf(args),
                                             logits + p - positions.begin);
                      });
    }
    dense_.sigmoid_derivative(logits, positions.size(), logits);
    MultiplyByDerivative(gate, logits, positions.size(), dz);
  }

  void ChannelPartials(const BackwardArgs& args, const Wave& wave, int64_t n, Range units) {
    const int64_t c = g_.channels;
    for (int64_t u = units.begin; u < units.end; ++u) {
      A* partial = partial_ + (wave.Row(n) * g_.units + u) * 2 * c;
      const Range positions = g_.Unit(u);
      map_.backward_channels(g_.sample, module_, g_.At(args.x, n), g_.At(dy_, n),
                             PositionsAt(args, wave, n, positions.begin), ChannelsAt(args, wave, n),
                             positions, partial, partial + c);
    }
  }

  // Per sample of the wave: the units' partial sums, which are the channel gate's gradient; and the
  // convolution kernel's gradient.
  void Reductions(const BackwardArgs& args, const Wave& wave) {
    int64_t begin = 0;
    do {
      const int64_t channel_tasks = HasChannelGate(problem_) && begin == 0 ? wave.samples : 0;
      const int64_t kernels = HasSpatialGate(problem_) ? std::min(fold_, wave.samples - begin) : 0;
      const int64_t slices = kernels * tap_slices_, runs = std::min(slices, sample_slots_);
      A* const scratch = scratch_ + wave.slot * scratch_size_;
      A* const dtaps = dtaps_ + (g_.is_own ? wave.first * g_.taps : 0);
      ForEach(wave.parallel, runs + channel_tasks, [&](int64_t task) {
        if (task >= runs) return CombineChannels(args, wave, wave.first + task - runs);
        KernelGradients(args, wave, wave.first + begin,
                        {slices * task / runs, slices * (task + 1) / runs},
                        scratch + task * sample_size_, dtaps);
      });
      if (!g_.is_own) AddTaps(kernels);
      begin += kernels;
    } while (HasSpatialGate(problem_) && begin < wave.samples);
  }

  // In the order of samples, in double.
  void AddTaps(int64_t samples) {
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t j = 0; j < g_.taps; ++j)
        dtaps_total_[j] += static_cast<double>(dtaps_[i * g_.taps + j]);
    }
  }

  void CombineChannels(const BackwardArgs& args, const Wave& wave, int64_t n) {
    const int64_t c = g_.channels;
    const A* more = args.d_channel_gate == nullptr
                        ? nullptr
                        : static_cast<const A*>(args.d_channel_gate) + n * c;
    A* dz = dz_channel_[0] + n * c;
    A* ties = DChannel(wave, n, 1);
    CombineUnits(
        DChannel(wave, n, 0), g_.units, c, 0.0, [](double a, double b) { return a + b; },
        [&](int64_t i, double dot, double count) {
          if (more != nullptr) dot += static_cast<double>(more[i]);
          dz[i] = static_cast<A>(dot);
          ties[i] = static_cast<A>(count);
        });
  }

  // From dz, the gradient of the gate, by that of its logits to the descriptors'. Leaves in
  // DChannel what pass C adds to every position and to those that attain the maximum.
  void ThroughMlp(const BackwardArgs& args, const Wave& wave) {
    const int64_t c = g_.channels, h = problem_.hidden;
    const int64_t first = wave.first, samples = wave.samples;
    const Mlp<A> mlp{problem_,
                     dense_,
                     static_cast<const A*>(args.w0),
                     static_cast<const A*>(args.b0),
                     static_cast<const A*>(args.w1),
                     static_cast<const A*>(args.b1)};
    const A* mean = static_cast<const A*>(args.channel_descriptors) + first * c;
    const A* descriptors[2] = {mean, mean + g_.batch * c};
    A* hidden[2] = {hidden_[0] + first * h, hidden_[1] + first * h};
    A* dz[2] = {dz_channel_[0] + first * c, dz_channel_[1] + first * c};
    const bool relu = problem_.mlp_activation == Activation::kRelu;
    const bool by_branch = HasTwoLogits(problem_), adds_hidden = AddsHidden(problem_);
    const bool gates = by_branch && problem_.mlp_merge == MlpMerge::kGates;
    const bool is_merged = adds_hidden && problem_.mlp_merge == MlpMerge::kHidden;
    const A* const twice = IsSumOfLogits(problem_) ? mlp.b1 : nullptr;
    const int branch = mlp.IsUsed(0) ? 0 : 1;

    A* const hidden_sum = d_hidden_[0] + first * h;  // as in the forward pass; free until later
    const Blocks hidden_blocks = mlp.HiddenBlocks(wave);
    ForEach(wave.parallel, hidden_blocks.count, [&](int64_t i) {
      const Range columns = hidden_blocks.At(i);
      mlp.HiddenBlock(descriptors, samples, columns, hidden);
      for (int64_t s = 0; adds_hidden && s < samples; ++s) {
        for (int64_t j = s * h + columns.begin; j < s * h + columns.end; ++j)
          hidden_sum[j] = hidden[0][j] + hidden[1][j];
      }
    });

    const A* gate = ChannelGateOf(args, first);
    const Blocks channel_blocks = mlp.ChannelBlocks(wave);
    ForEachTile(wave, channel_blocks, [&](Range rows, Range columns) {
      bool saturated = false;
      for (int64_t s = rows.begin; s < rows.end; ++s)
        saturated |= AnySaturated(gate + s * c + columns.begin, columns.size());
      Tile logits[2];  // the only one, or those of both branches
      const auto output = [&](const A* units, A* to) {
        mlp.OutputBlock(units + rows.begin * h, rows.size(), columns, Activation::kNone, to,
                        kTileColumns);
      };
      if (relu || by_branch || saturated) {
        output(adds_hidden ? hidden_sum : hidden[branch], logits[0]);
        if (by_branch) output(hidden[1], logits[1]);
      }
      for (int64_t s = rows.begin; s < rows.end; ++s) {
        const int64_t at = s * c + columns.begin;
        A* const logit[2] = {logits[0] + (s - rows.begin) * kTileColumns,
                             logits[1] + (s - rows.begin) * kTileColumns};
        A slopes[kTileColumns];  // of the sigmoid
        for (int q = 1; gates && q >= 0; --q) {
          dense_.sigmoid_derivative(logit[q], columns.size(), slopes);
          for (int64_t j = 0; j < columns.size(); ++j) dz[q][at + j] = dz[0][at + j] * slopes[j];
        }
        if (!gates) {
          const A* const one = logit[0];
          const A* sum = one;
          if (saturated && by_branch) {
            for (int64_t j = 0; j < columns.size(); ++j)
              slopes[j] = std::max(one[j], A{0}) + std::max(logit[1][j], A{0});
            sum = slopes;
          } else if (saturated && twice != nullptr) {
            for (int64_t j = 0; j < columns.size(); ++j)
              slopes[j] = one[j] + twice[columns.begin + j];
            sum = slopes;
          }
          if (saturated) dense_.sigmoid_derivative(sum, columns.size(), slopes);
          MultiplyByDerivative(gate + at, saturated ? slopes : nullptr, columns.size(), dz[0] + at);
          if (by_branch) std::copy_n(dz[0] + at, columns.size(), dz[1] + at);
        }
        for (int q = by_branch ? 1 : 0; relu && q >= 0; --q) {
          for (int64_t j = 0; j < columns.size(); ++j)
            dz[q][at + j] *= static_cast<A>(logit[q][j] > 0);
        }
      }
    });

    ForEach(wave.parallel, hidden_blocks.count, [&](int64_t i) {
      const Range columns = hidden_blocks.At(i);
      for (int q = 0; q < 2; ++q) {
        if (!mlp.IsUsed(q)) continue;
        A* d_hidden = d_hidden_[q] + first * h;
        if (q == 0 || !adds_hidden) {  // else both share the product
          dense_.dot_products({samples, columns.size(), c, dz[q], c, mlp.w1 + columns.begin * c, c,
                               d_hidden + columns.begin, h});
        }
      }
      for (int64_t s = first; s < first + samples; ++s) {
        for (int64_t j = s * h + columns.begin; j < s * h + columns.end; ++j) {
          const A of_mean = mlp.IsUsed(0) ? d_hidden_[0][j] : A{0};
          const A of_max = adds_hidden ? of_mean : mlp.IsUsed(1) ? d_hidden_[1][j] : A{0};
          // Multiplied, not selected: as in TensorFlow, a gradient that is NaN or infinite stays
          // NaN.
          if (mlp.IsUsed(0)) d_hidden_[0][j] = of_mean * static_cast<A>(hidden_[0][j] > 0);
          if (mlp.IsUsed(1)) d_hidden_[1][j] = of_max * static_cast<A>(hidden_[1][j] > 0);
          if (is_merged) hidden_[0][j] += hidden_[1][j];  // what dW1 takes
        }
      }
    });

    ForEachTile(wave, channel_blocks, [&](Range rows, Range columns) {
      Tile gradients[2];
      for (int q = 0; q < 2; ++q) {
        if (mlp.IsUsed(q)) {
          dense_.dot_products({rows.size(), columns.size(), h,
                               d_hidden_[q] + (first + rows.begin) * h, h,
                               mlp.w0 + columns.begin * h, h, gradients[q], kTileColumns});
        }
      }
      for (int64_t s = rows.begin; s < rows.end; ++s) {
        const int64_t at = (s - rows.begin) * kTileColumns;
        A* const of_all = DChannel(wave, first + s, 0) + columns.begin;
        A* const of_maxima = DChannel(wave, first + s, 1) + columns.begin;
        for (int64_t j = 0; j < columns.size(); ++j) {
          of_all[j] = mlp.IsUsed(0) ? gradients[0][at + j] / static_cast<A>(g_.positions) : A{0};
          if (mlp.IsUsed(1)) {
            ShareAmongMaxima(gradients[1][at + j], of_maxima[j], &of_all[j], &of_maxima[j]);
          } else {
            of_maxima[j] = 0;
          }
        }
      }
    });
  }

  // What the MLP's gradient is between two products: at most so many samples and channels.
  static constexpr int64_t kTileRows = 16, kTileColumns = 96;
  using Tile = A[kTileRows * kTileColumns];

  // Calls body(samples of the wave, columns) for all tiles of all blocks.
  template <typename Body>
  static void ForEachTile(const Wave& wave, const Blocks& blocks, const Body& body) {
    ForEach(wave.parallel, blocks.count, [&](int64_t i) {
      const Range block = blocks.At(i);
      for (int64_t column = block.begin; column < block.end; column += kTileColumns) {
        const Range columns{column, std::min(block.end, column + kTileColumns)};
        for (int64_t row = 0; row < wave.samples; row += kTileRows)
          body(Range{row, std::min(wave.samples, row + kTileRows)}, columns);
      }
    });
  }

  // The gradient of the kernel's slices, of all that those of the samples from `begin` on are.
  void KernelGradients(const BackwardArgs& args, const Wave& wave, int64_t begin, Range slices,
                       A* scratch, A* all_dtaps) const {
    const int64_t rows = g_.height + 2 * g_.half_rows;
    const int64_t size = PaddedPlane<A>::Size(g_, dense_.lanes, rows);
    Plane<A> planes[3];
    for (int64_t i = slices.begin; i < slices.end; ++i) {
      const int64_t n = begin + i / tap_slices_, slice = i % tap_slices_;
      if (slice == 0 || i == slices.begin) {
        DescriptorPlanes(args, n, {0, g_.height}, scratch, planes);
        planes[2] = PaddedPlane<A>::Make(g_, dense_.lanes, rows, scratch + 2 * size);
        CopyRows(g_, DzOf(wave, n), {0, g_.height}, -g_.half_rows, planes[2]);
        for (Plane<A>& plane : planes) plane.data += g_.PlaneRow(0, -g_.half_rows) * plane.stride;
      }
      A* dtaps = all_dtaps + i * (g_.taps / tap_slices_);
      if (g_.is_line) {
        LineKernelGradient(planes, scratch + 3 * size, dtaps);
      } else {
        const Slices all = {g_.depth, g_.slice_rows, g_.slice_rows + g_.gap};
        const int64_t away = (slice - g_.half_slices) * all.stride;
        Plane<A> shifted[2] = {planes[0], planes[1]};
        for (Plane<A>& plane : shifted) plane.data += away * plane.stride;
        dense_.convolution_kernel_gradient(shifted, planes[2], all, g_.width, g_.half_slice_rows,
                                           g_.half_columns, dtaps);
      }
      if (slice == 0 && !problem_.batch_norm) {
        double sum = 0;
        for (int64_t p = 0; p < g_.positions; ++p) sum += DzOf(wave, n)[p];
        dbias_[n] = sum;
      }
    }
  }

  // Of a line, in pieces of a row's width: sums of few values before they are added in double.
  void LineKernelGradient(const Plane<A>* line, A* rest, A* dtaps) const {
    constexpr int64_t kPiece = 64;
    Plane<A> planes[3];
    for (int i = 0; i < 3; ++i) planes[i] = {line[i].data, kPiece};
    const int64_t pieces = g_.height / kPiece, left = g_.height % kPiece;
    dense_.convolution_kernel_gradient(planes, planes[2], {1, pieces, 0}, kPiece, 0, g_.half_rows,
                                       dtaps);
    for (Plane<A>& plane : planes) plane.data += pieces * kPiece;
    dense_.convolution_kernel_gradient(planes, planes[2], {1, 1, 0}, left, 0, g_.half_rows, rest);
    for (int64_t i = 0; i < g_.taps; ++i) dtaps[i] += rest[i];
  }

  // dz_ holds the gradient of the normalised and scaled convolution; turns it into the
  // convolution's.
  void BackwardThroughBatchNorm(const BackwardArgs& args) {
    const double mean = batch_norm_.MeanOf([&](int64_t i) { return dz_[i]; });
    const double product =
        batch_norm_.MeanOf([&](int64_t i) { return dz_[i] * batch_norm_.Normalized(i); });
    const double count = static_cast<double>(g_.batch * g_.positions);
    *static_cast<A*>(args.dbias) = static_cast<A>(mean * count);
    *static_cast<A*>(args.dgamma) = static_cast<A>(product * count);
    ForEach(parallel_, g_.batch, [&](int64_t n) {
      for (int64_t p = n * g_.positions; p < (n + 1) * g_.positions; ++p) {
        dz_[p] = static_cast<A>(gamma_ * batch_norm_.inverse_deviation() *
                                (dz_[p] - mean - batch_norm_.Normalized(p) * product));
      }
    });
  }

  void MapOfWave(const BackwardArgs& args, const Wave& wave) {
    const int64_t steps = CeilDiv(g_.height, g_.step_rows), tasks = wave.samples * steps;
    // From the last to the first, as what was read last is most likely still in a cache.
    ForEach(wave.parallel, tasks, [&](int64_t i) {
      const int64_t task = tasks - 1 - i;
      const int64_t n = wave.first + task / steps, row = task % steps * g_.step_rows;
      const Range positions = g_.RowPositions({row, std::min(g_.height, row + g_.step_rows)});
      map_.backward_map(g_.sample, module_, g_.At(args.x, n), g_.At(dy_, n),
                        PositionsAt(args, wave, n, positions.begin), ChannelsAt(args, wave, n),
                        positions, stream_ && args.dx != dy_, g_.At(args.dx, n));
    });
  }

  void ZeroWeightGradients(const BackwardArgs& args) const {
    const auto zero = [](void* gradient, int64_t size) {
      std::fill_n(static_cast<A*>(gradient), size, A{0});
    };
    if (HasSpatialGate(problem_)) {
      zero(args.dkernel, TapsOf(args).size());
      zero(args.dbias, 1);
      if (problem_.batch_norm) zero(args.dgamma, 1);
    }
    if (HasChannelGate(problem_)) {
      zero(args.dw0, g_.channels * problem_.hidden);
      zero(args.db0, problem_.hidden);
      zero(args.dw1, problem_.hidden * g_.channels);
      zero(args.db1, g_.channels);
    }
  }

  void WeightGradients(const BackwardArgs& args) {
    if (HasSpatialGate(problem_)) {
      const Taps<A> taps = TapsOf(args);
      A* dkernel = static_cast<A*>(args.dkernel);
      std::fill_n(dkernel, taps.size(), A{0});
      const int64_t row_size = 2 * (2 * taps.half_columns + 1);
      const double* from = dtaps_total_;
      for (int64_t d = -taps.half_slices; d <= taps.half_slices; ++d) {
        for (int64_t i = -taps.half_rows; i <= taps.half_rows; ++i) {
          A* to = dkernel + taps.IndexOf(d, i, -taps.half_columns);
          for (int64_t j = 0; j < row_size; ++j) to[j] = static_cast<A>(*from++);
        }
      }
      if (!problem_.batch_norm)
        SumRows(dbias_, g_.batch, 1, 1.0, {0, 1}, static_cast<A*>(args.dbias));
    }
    if (!HasChannelGate(problem_)) return;

    // dW0 = descriptors^T . d_hidden and dW1 = hidden^T . dz, each one product: the maximum's rows
    // follow the mean's. Where hidden units are added the branches have dz in common.
    const int64_t n = g_.batch, c = g_.channels, h = problem_.hidden;
    const bool both = problem_.pooling == Pooling::kAvgMax;
    const int branch = problem_.pooling == Pooling::kMax ? 1 : 0;  // the first of those in use
    const int64_t rows = both ? 2 * n : n;
    const int64_t dz_rows = HasTwoLogits(problem_) ? rows : n;
    const int64_t hidden_rows = problem_.mlp_merge == MlpMerge::kHidden ? n : rows;
    const A* descriptors = static_cast<const A*>(args.channel_descriptors) + branch * n * c;
    A* dw0 = static_cast<A*>(args.dw0);
    A* dw1 = static_cast<A*>(args.dw1);
    const Blocks blocks(parallel_, c, n * c * h);
    ForEach(parallel_, blocks.count, [&](int64_t i) {
      const Range channels = blocks.At(i);
      dense_.product({channels.size(), h, rows, descriptors + channels.begin, 1, c,
                      d_hidden_[branch], rows, h, nullptr, Activation::kNone,
                      dw0 + channels.begin * h, h});
      dense_.product({h, channels.size(), hidden_rows, hidden_[branch], 1, h,
                      dz_channel_[branch] + channels.begin, dz_rows, c, nullptr, Activation::kNone,
                      dw1 + channels.begin, c});
      SumRows(dz_channel_[branch], dz_rows, c, IsSumOfLogits(problem_) ? 2.0 : 1.0, channels,
              static_cast<A*>(args.db1));
    });
    SumRows(d_hidden_[branch], rows, h, 1.0, {0, h}, static_cast<A*>(args.db0));
  }

  const Problem& problem_;
  const MapPasses<A>& map_;
  const DensePasses<A>& dense_;
  const Parallel& parallel_;
  const Module module_;
  const Geometry g_;
  const bool stream_;
  const int64_t tap_slices_;  // of the convolution kernel, that touch the map
  Arena arena_;
  BatchNorm<A> batch_norm_;
  int64_t blocks_ = 1;
  const void* dy_ = nullptr;

  // For the channel gate; [2] is for the mean and the maximum, whose arrays follow each other.
  A* partial_ = nullptr;   // [g.slots * wave, units, 2, C]
  A* hidden_[2] = {};      // [N, hidden]
  A* d_hidden_[2] = {};    // [N, hidden]
  A* dz_channel_[2] = {};  // [N, C], one tensor unless there are two logits

  // For the spatial gate.
  A* dz_ = nullptr;                // [g.slots * wave, P], with batch norm [N, P]
  A* d_position_mean_ = nullptr;   // [g.slots * wave, P]
  A* d_position_max_ = nullptr;    // [g.slots * wave, P]
  A* dtaps_ = nullptr;             // [fold, taps that touch the map, 2]
  double* dtaps_total_ = nullptr;  // [taps that touch the map, 2]
  double* dbias_ = nullptr;        // [N]
  double gamma_ = 0;               // with batch norm
  int64_t fold_ = 0;
  // Of tasks on blocks or on samples.
  int64_t block_slots_ = 0, block_size_ = 0, sample_slots_ = 0, sample_size_ = 0;
  int64_t scratch_size_ = 0;
  A* scratch_ = nullptr;  // [g.slots, scratch_size]
};

// What takes which arguments (kernels.cc).
template <typename A>
BackwardPipeline<A> PipelineOf(const BackwardArgs&);

}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_BACKWARD_H_
