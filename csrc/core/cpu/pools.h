// The pools on their own, and their gradients: one pass over x forward; backward one pass that
// counts equal maxima and one that writes dx, wave by wave so that the second finds x in the
// last-level cache.
#ifndef CBAM_OPS_CORE_CPU_POOLS_H_
#define CBAM_OPS_CORE_CPU_POOLS_H_

#include "core/cpu/backward.h"
#include "core/cpu/forward.h"
#include "core/cpu/pipeline.h"

namespace cbam_ops {
namespace cpu {

template <typename A>
class ChannelPoolPipeline {
 public:
  ChannelPoolPipeline(const Problem& problem, const Kernels<A>& kernels, const Parallel& parallel,
                      void* workspace)
      : map_(*kernels.map),
        parallel_(parallel),
        element_size_(ElementSize(problem.dtype)),
        g_(problem, parallel, 1),
        stream_(ShouldStream(g_)),
        arena_(workspace),
        descriptors_(g_, map_, &arena_) {
    for (auto& values : values_) values = arena_.Take<A>(g_.wave, g_.channels);
    partial_ = arena_.Take<A>(g_.wave, g_.units, 2, g_.channels);
  }

  size_t workspace_bytes() const { return arena_.bytes(); }

  void Run(const ChannelPoolArgs& args) {
    ForEachWave(g_, parallel_, [&](const Wave& wave) {
      const int64_t count = wave.samples * g_.channels;
      descriptors_.Run(args.x, wave, values_[0], values_[1]);
      map_.to_map_type(values_[0], count, ChannelsOf(args.mean, wave.first), 1);
      map_.to_map_type(values_[1], count, ChannelsOf(args.maximum, wave.first), 1);
    });
  }

  void Run(const ChannelPoolGradArgs& args) {
    const int64_t c = g_.channels;
    ForEachWave(g_, parallel_, [&](const Wave& wave) {
      const int64_t first = wave.first, samples = wave.samples;
      A *d_mean = values_[0], *maximum = values_[1], *d_max = values_[2];
      map_.to_compute_type(ChannelsOf(args.d_mean, first), 1, samples * c, d_mean);
      map_.to_compute_type(ChannelsOf(args.maximum, first), 1, samples * c, maximum);
      map_.to_compute_type(ChannelsOf(args.d_maximum, first), 1, samples * c, d_max);
      ForEach(parallel_, samples * g_.units, [&](int64_t task) {
        const int64_t s = task / g_.units;
        A* partial = partial_ + task * 2 * c;
        map_.backward_channels(g_.sample, Module::kChannelPool, g_.At(args.x, first + s), nullptr,
                               {}, {nullptr, nullptr, maximum + s * c, nullptr},
                               g_.Unit(task % g_.units), partial, partial + c);
      });
      for (int64_t i = 0; i < samples * c; ++i) {
        double count = 0;
        for (int64_t u = 0; u < g_.units; ++u)
          count += partial_[(i / c * g_.units + u) * 2 * c + c + i % c];
        d_mean[i] /= static_cast<A>(g_.positions);
        ShareAmongMaxima(d_max[i], static_cast<A>(count), &d_mean[i], &d_max[i]);
      }
      ForEach(parallel_, samples * g_.units, [&](int64_t task) {
        const int64_t s = task / g_.units, n = first + s;
        map_.backward_map(g_.sample, Module::kChannelPool, g_.At(args.x, n), nullptr, {},
                          {nullptr, d_mean + s * c, maximum + s * c, d_max + s * c},
                          g_.Unit(task % g_.units), stream_, g_.At(args.dx, n));
      });
    });
  }

 private:
  template <typename P>
  P* ChannelsOf(P* values, int64_t n) const {
    using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
    return static_cast<Byte*>(values) + n * g_.channels * element_size_;
  }

  const MapPasses<A>& map_;
  const Parallel& parallel_;
  const int64_t element_size_;
  const Geometry g_;
  const bool stream_;
  Arena arena_;
  ChannelDescriptors<A> descriptors_;
  A* values_[3] = {};     // [wave, C]
  A* partial_ = nullptr;  // [wave, units, 2, C]
};

template <typename A>
class SpatialPoolPipeline {
 public:
  SpatialPoolPipeline(const Problem& problem, const Kernels<A>& kernels, const Parallel& parallel,
                      void* workspace)
      : map_(*kernels.map),
        parallel_(parallel),
        element_size_(ElementSize(problem.dtype)),
        layout_(problem.layout),
        g_(problem, parallel, 1),
        stream_(ShouldStream(g_)) {
    Arena arena(workspace);
    scratch_size_ = RoundUp(4 * g_.step_rows * g_.width, 64);
    steps_ = CeilDiv(g_.height, g_.step_rows);
    slots_ = Slots::Count(parallel, g_.wave * steps_);
    scratch_ = arena.Take<A>(slots_, scratch_size_);
    bytes_ = arena.bytes();
  }

  size_t workspace_bytes() const { return bytes_; }

  void Run(const SpatialPoolArgs& args) {
    ForSteps([&](int64_t n, Range positions, A* scratch) {
      A *mean = scratch, *maximum = scratch + positions.size();
      map_.spatial_pool(g_.sample, g_.At(args.x, n), nullptr, positions, mean, maximum);
      map_.to_map_type(mean, positions.size(), Descriptor(args.descriptors, n, 0, positions.begin),
                       Stride());
      map_.to_map_type(maximum, positions.size(),
                       Descriptor(args.descriptors, n, 1, positions.begin), Stride());
    });
  }

  void Run(const SpatialPoolGradArgs& args) {
    ForSteps([&](int64_t n, Range positions, A* scratch) {
      const int64_t count = positions.size();
      A *d_mean = scratch, *d_max = scratch + count, *maximum = scratch + 2 * count,
        *ties = scratch + 3 * count;
      map_.to_compute_type(Descriptor(args.descriptors, n, 1, positions.begin), Stride(), count,
                           maximum);
      // The dot product that pass A also makes has no dy here; it is overwritten next.
      map_.backward_positions(g_.sample, Module::kSpatialPool, g_.At(args.x, n), nullptr, nullptr,
                              maximum, positions, d_mean, ties);
      map_.to_compute_type(Descriptor(args.d_descriptors, n, 0, positions.begin), Stride(), count,
                           d_mean);
      map_.to_compute_type(Descriptor(args.d_descriptors, n, 1, positions.begin), Stride(), count,
                           d_max);
      for (int64_t i = 0; i < count; ++i) {
        d_mean[i] /= static_cast<A>(g_.channels);
        ShareAmongMaxima(d_max[i], ties[i], &d_mean[i], &d_max[i]);
      }
      map_.backward_map(g_.sample, Module::kSpatialPool, g_.At(args.x, n), nullptr,
                        {nullptr, d_mean, maximum, d_max}, {}, positions, stream_,
                        g_.At(args.dx, n));
    });
  }

 private:
  // body(sample, positions, scratch) over steps of rows.
  template <typename Body>
  void ForSteps(const Body& body) const {
    ForEachWave(g_, parallel_, [&](const Wave& wave) {
      ForEachWithSlot(parallel_, wave.samples * steps_, slots_, [&](int64_t task, int64_t slot) {
        const int64_t row = task % steps_ * g_.step_rows;
        body(wave.first + task / steps_,
             g_.RowPositions({row, std::min(g_.height, row + g_.step_rows)}),
             scratch_ + slot * scratch_size_);
      });
    });
  }
  int64_t Stride() const { return layout_ == Layout::kNHWC ? 2 : 1; }
  // The address of descriptor q at position p.
  template <typename P>
  P* Descriptor(P* descriptors, int64_t n, int q, int64_t p) const {
    using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
    const int64_t index =
        layout_ == Layout::kNHWC ? (n * g_.positions + p) * 2 + q : (n * 2 + q) * g_.positions + p;
    return static_cast<Byte*>(descriptors) + index * element_size_;
  }

  const MapPasses<A>& map_;
  const Parallel& parallel_;
  const int64_t element_size_;
  const Layout layout_;  // of the descriptors
  const Geometry g_;
  const bool stream_;
  size_t bytes_ = 0;
  int64_t steps_ = 0, slots_ = 0, scratch_size_ = 0;
  A* scratch_ = nullptr;  // [slots, 4 step_rows W]
};

// What takes which arguments (kernels.cc).
template <typename A>
ChannelPoolPipeline<A> PipelineOf(const ChannelPoolArgs&);
template <typename A>
ChannelPoolPipeline<A> PipelineOf(const ChannelPoolGradArgs&);
template <typename A>
SpatialPoolPipeline<A> PipelineOf(const SpatialPoolArgs&);
template <typename A>
SpatialPoolPipeline<A> PipelineOf(const SpatialPoolGradArgs&);

}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_POOLS_H_
