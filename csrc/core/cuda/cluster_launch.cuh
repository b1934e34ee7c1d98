// Host code of the cluster path: what fits, over how many blocks, and the launches.
#ifndef CBAM_OPS_CORE_CUDA_CLUSTER_LAUNCH_CUH_
#define CBAM_OPS_CORE_CUDA_CLUSTER_LAUNCH_CUH_

#include "core/cuda/cluster.cuh"
#include "core/cuda/kernels.h"
#include "core/cuda/portable.cuh"

namespace cbam_ops {
namespace cuda {

struct ClusterPlan {
  int cluster = 0;  // blocks per sample; 0 where it does not fit
  size_t shared_bytes = 0;
  int rows_per_block = 0, columns_per_block = 0;
  Tiling tiling = {};
  ClusterLayout layout = {};
};

// float64 is for checking: its maps are twice as large, its kernels would be half of the cluster
// kernels' compile time.
template <typename T>
constexpr bool kHasCluster = sizeof(T) < 8;

// The layout over `cluster` blocks. `shared_bytes` is what a block would need, or beyond any limit.
template <typename T>
ClusterPlan LayOutCluster(const Problem& problem, bool backward, int cluster) {
  using A = Compute<T>;
  ClusterPlan plan;
  const int64_t positions = Positions(problem), radius = problem.kernel_size / 2;
  const int64_t rows = ChannelsLast(problem) ? positions : problem.channels;
  const int64_t columns = ChannelsLast(problem) ? problem.channels : positions;
  const int64_t rows_per_block = CeilDiv(rows, cluster),
                columns_per_block = CeilDiv(columns, cluster);
  const int64_t share_c = ChannelsLast(problem) ? columns_per_block : rows_per_block;
  const int64_t share_p = ChannelsLast(problem) ? rows_per_block : columns_per_block;
  constexpr int64_t kTooMuch = int64_t{1} << 24;
  plan.shared_bytes = kTooMuch;
  plan.cluster = cluster;
  const int64_t slice = rows_per_block * columns * static_cast<int64_t>(sizeof(T));
  if (slice > kTooMuch || columns > kTooMuch || problem.hidden > kTooMuch ||
      problem.width > kTooMuch || problem.kernel_size > 255) {
    return plan;
  }
  plan.rows_per_block = static_cast<int>(rows_per_block);
  plan.columns_per_block = static_cast<int>(columns_per_block);
  const bool channel = HasChannelGate(problem), spatial = HasSpatialGate(problem);
  plan.tiling.height = problem.height;
  plan.tiling.width = problem.width;
  plan.tiling.kernel_size = static_cast<int>(problem.kernel_size);
  plan.tiling.tile = static_cast<int>(share_p);
  plan.tiling.tiles = cluster;
  plan.tiling.staged = true;
  const int64_t window = (AtMost(problem.height, (share_p - 1) / problem.width + 2) + 2 * radius) *
                         (problem.width + 2 * radius);
  if (window > kTooMuch) return plan;
  plan.tiling.window_values = spatial ? static_cast<int>(window) : 0;

  int64_t used = kStages * 8;
  const auto take = [&used](int64_t values, int64_t size) {
    used = CeilDiv(used, 128) * 128;
    const int64_t at = used;
    used += values * size;
    return static_cast<int>(at);
  };
  constexpr int64_t kA = sizeof(A);
  const int64_t value = backward ? static_cast<int64_t>(sizeof(Side<A>)) : kA;
  ClusterLayout& layout = plan.layout;
  layout.x = take(slice, 1);
  layout.dy = take(backward ? slice : 0, 1);
  layout.partial = take((ChannelsLast(problem) ? channel : spatial) ? 2 * columns : 0, kA);
  layout.column_values = take(columns, value);
  layout.row_values = take(rows_per_block, value);
  layout.channel_values = take(channel ? (backward ? 5 : 2) * share_c : 0, kA);
  const int64_t hidden = channel ? 2 * problem.hidden : 0;
  layout.hidden_partial = take(hidden, kA);
  layout.hidden = take(hidden, kA);
  layout.d_hidden_partial = take(backward ? hidden : 0, kA);
  layout.d_hidden = take(backward ? hidden : 0, kA);
  layout.position_values = take(spatial ? 2 * share_p : 0, kA);
  layout.windows = take((backward ? 3 : 2) * static_cast<int64_t>(plan.tiling.window_values), kA);
  layout.weights = take(spatial ? 2 * problem.kernel_size * problem.kernel_size : 0, kA);
  layout.corners = take(spatial && backward ? share_p : 0, sizeof(int));
  layout.scratch = take(channel ? 2 * kClusterThreads : 0, kA);
  if (used < kTooMuch) plan.shared_bytes = static_cast<size_t>(used);
  return plan;
}

// The most blocks a cluster may have: 16 on the big chips, if asked for; 8 everywhere else that has
// clusters.
inline int MostBlocks(const DeviceInfo& device) {
  if (device.capability < 90) return 0;
  return device.capability < 110 ? 16 : 8;
}

// As few blocks as leave room for two on a multiprocessor (forward), else as few as fit. A handful
// of samples is spread over as many blocks as there are: then latency counts.
template <typename T>
ClusterPlan PlanCluster(const Problem& problem, bool backward, const DeviceInfo& device) {
  const int64_t positions = Positions(problem);
  const int64_t rows = ChannelsLast(problem) ? positions : problem.channels;
  const int64_t columns = ChannelsLast(problem) ? problem.channels : positions;
  ClusterPlan best;
  if (problem.batch_norm || columns % kVector<T> != 0 || rows == 0 || columns == 0) return best;
  // Each block has 1 KB reserved for the system.
  const auto half = static_cast<size_t>((device.shared_bytes + 1024) / 2 - 1024);
  const int most = MostBlocks(device);
  for (int cluster = 1; cluster <= most && (cluster == 1 || cluster <= rows); cluster *= 2) {
    const ClusterPlan plan = LayOutCluster<T>(problem, backward, cluster);
    if (plan.shared_bytes > static_cast<size_t>(device.shared_bytes)) continue;
    const bool better = best.cluster == 0 || (!backward && best.shared_bytes > half);
    if (better || problem.batch <= 4) best = plan;
  }
  return best;
}

// Whether the cluster path is expected to be faster: where the MLP's weights, which every cluster
// reads from L2 for its one sample, are not more than two samples. Not measured yet.
template <typename T>
bool ClusterPays(const Problem& problem) {
  if (!HasChannelGate(problem) || problem.batch <= 4) return true;
  const int64_t weights =
      2 * problem.channels * problem.hidden * static_cast<int64_t>(sizeof(Compute<T>));
  return weights <= 2 * Positions(problem) * problem.channels * static_cast<int64_t>(sizeof(T));
}

template <typename A>
ClusterParams<A> MakeClusterParams(const Problem& problem, const ClusterPlan& plan) {
  ClusterParams<A> params = {};
  params.batch = problem.batch;
  params.positions = Positions(problem);
  params.channels = problem.channels;
  params.hidden = problem.hidden;
  params.channel = HasChannelGate(problem);
  params.spatial = HasSpatialGate(problem);
  params.parallel = problem.module == Module::kParallel;
  params.use_mean = UsesMean(problem.pooling);
  params.use_max = UsesMax(problem.pooling);
  params.mlp_relu = problem.mlp_activation == Activation::kRelu;
  params.relu = problem.activation == Activation::kRelu;
  params.tiling = plan.tiling;
  params.layout = plan.layout;
  params.rows_per_block = plan.rows_per_block;
  params.columns_per_block = plan.columns_per_block;
  params.blocks = problem.batch * plan.cluster;
  return params;
}

template <typename T>
Status ClusterForward(const Problem& problem, const ForwardArgs& args, const ClusterPlan& plan,
                      Launcher launcher) {
  using A = Compute<T>;
  ClusterParams<A> params = MakeClusterParams<A>(problem, plan);
  params.x = args.x;
  params.residual = args.residual;
  params.y = args.y;
  params.w0 = static_cast<const A*>(args.w0);
  params.b0 = static_cast<const A*>(args.b0);
  params.w1 = static_cast<const A*>(args.w1);
  params.b1 = static_cast<const A*>(args.b1);
  params.kernel = static_cast<const A*>(args.kernel);
  params.bias = static_cast<const A*>(args.bias);
  params.descriptors = static_cast<A*>(args.channel_descriptors);
  params.channel_gate = static_cast<A*>(args.channel_gate);
  params.planes = static_cast<A*>(args.spatial_descriptors);
  params.spatial_gate = static_cast<A*>(args.spatial_gate);
  launcher.Run(
      "ClusterForward",
      ChannelsLast(problem) ? &ClusterForwardKernel<T, true> : &ClusterForwardKernel<T, false>,
      problem.batch * plan.cluster, plan.shared_bytes, params, kClusterThreads, plan.cluster);
  return launcher.status();
}

template <typename A>
struct ClusterBuffers {
  A* taps;      // [2 k^2 + 1, N * cluster]
  A* hidden;    // [N, 2, hidden]
  A* d_hidden;  // [N, 2, hidden]
  A* d_logits;  // [N, 2, C]
  size_t bytes;

  ClusterBuffers(const Problem& problem, int cluster, void* workspace) {
    Arena arena(workspace);
    const int64_t taps_per_block = 2 * problem.kernel_size * problem.kernel_size + 1;
    taps = arena.Take<A>(HasSpatialGate(problem) ? taps_per_block * problem.batch * cluster : 0);
    hidden = arena.Take<A>(HasChannelGate(problem) ? problem.batch * 2 * problem.hidden : 0);
    d_hidden = arena.Take<A>(HasChannelGate(problem) ? problem.batch * 2 * problem.hidden : 0);
    d_logits = arena.Take<A>(HasChannelGate(problem) ? problem.batch * 2 * problem.channels : 0);
    bytes = arena.bytes();
  }
};

template <typename T>
Status ClusterBackward(const Problem& problem, const BackwardArgs& args, const ClusterPlan& plan,
                       void* workspace, Launcher launcher) {
  using A = Compute<T>;
  const ClusterBuffers<A> buffers(problem, plan.cluster, workspace);
  ClusterParams<A> params = MakeClusterParams<A>(problem, plan);
  params.x = args.x;
  params.dy = args.dy;
  params.y_in = params.relu ? args.y : nullptr;
  params.dx = args.dx;
  params.d_residual = params.relu ? args.d_residual : nullptr;
  params.w0 = static_cast<const A*>(args.w0);
  params.b0 = static_cast<const A*>(args.b0);
  params.w1 = static_cast<const A*>(args.w1);
  params.b1 = static_cast<const A*>(args.b1);
  params.kernel = static_cast<const A*>(args.kernel);
  // Read only in backward.
  params.descriptors = const_cast<A*>(static_cast<const A*>(args.channel_descriptors));
  params.channel_gate = const_cast<A*>(static_cast<const A*>(args.channel_gate));
  params.planes = const_cast<A*>(static_cast<const A*>(args.spatial_descriptors));
  params.spatial_gate = const_cast<A*>(static_cast<const A*>(args.spatial_gate));
  params.d_channel_gate = static_cast<const A*>(args.d_channel_gate);
  params.d_spatial_gate = static_cast<const A*>(args.d_spatial_gate);
  params.hidden_values = buffers.hidden;
  params.d_logits = buffers.d_logits;
  params.d_hidden = buffers.d_hidden;
  params.taps = buffers.taps;
  launcher.Run(
      "ClusterBackward",
      ChannelsLast(problem) ? &ClusterBackwardKernel<T, true> : &ClusterBackwardKernel<T, false>,
      problem.batch * plan.cluster, plan.shared_bytes, params, kClusterThreads, plan.cluster);
  if (params.spatial) {
    const int64_t taps = 2 * problem.kernel_size * problem.kernel_size;
    RunSum<A>(&launcher, buffers.taps, taps + 1, params.blocks, static_cast<A*>(args.dkernel), taps,
              static_cast<A*>(args.dbias));
  }
  if (params.channel)
    RunMlpWeightGradients<A>(&launcher, problem, args, buffers.hidden, buffers.d_logits,
                             buffers.d_hidden);
  return launcher.status();
}

// ---- the choice ---------------------------------------------------------------------------------

template <typename T>
ClusterPlan ChooseCluster(const Problem& problem, bool backward, const DeviceInfo& device,
                          Path path) {
  if (path == Path::kPortable || !kHasCluster<T>) return {};
  ClusterPlan plan = PlanCluster<T>(problem, backward, device);
  if (path == Path::kAuto && !ClusterPays<T>(problem)) plan.cluster = 0;
  return plan;
}

inline Status DoesNotFit() {
  return {StatusCode::kUnsupported,
          "the cluster path was asked for, but the problem or the device does not fit it",
          "Cluster"};
}

// `WorkspaceFor` and `Launch` for each argument struct are what make_table.cuh takes; those of the
// pools are in portable.cuh.

template <typename A>
size_t WorkspaceFor(const Problem& problem, const ForwardArgs&) {
  return ForwardBuffers<A>(problem, nullptr).bytes;
}

// Enough for either path, on any device.
template <typename A>
size_t WorkspaceFor(const Problem& problem, const BackwardArgs&) {
  const size_t portable = BackwardBuffers<A>(problem, nullptr).bytes;
  const size_t cluster = ClusterBuffers<A>(problem, 16, nullptr).bytes;
  return portable > cluster ? portable : cluster;
}

template <typename T>
Status Launch(const Problem& problem, const ForwardArgs& args, void* workspace, Launcher launcher,
              Path path) {
  if constexpr (kHasCluster<T>) {
    const ClusterPlan plan = ChooseCluster<T>(problem, false, launcher.device(), path);
    if (plan.cluster > 0 && Aligned16({args.x, args.y, args.residual})) {
      const Status status = ClusterForward<T>(problem, args, plan, launcher);
      // A cluster can be refused by a device that is shared or has parts switched off: the other
      // path runs there.
      if (status.ok() || path == Path::kCluster) return status;
    }
  }
  if (path == Path::kCluster) return DoesNotFit();
  return PortableForward<T>(problem, args, workspace, launcher);
}

template <typename T>
Status Launch(const Problem& problem, const BackwardArgs& args, void* workspace, Launcher launcher,
              Path path) {
  if constexpr (kHasCluster<T>) {
    const ClusterPlan plan = ChooseCluster<T>(problem, true, launcher.device(), path);
    const bool relu = problem.activation == Activation::kRelu;
    if (plan.cluster > 0 && Aligned16({args.x, args.dy, args.dx, relu ? args.y : nullptr,
                                       relu ? args.d_residual : nullptr})) {
      const Status status = ClusterBackward<T>(problem, args, plan, workspace, launcher);
      if (status.ok() || path == Path::kCluster) return status;
    }
  }
  if (path == Path::kCluster) return DoesNotFit();
  return PortableBackward<T>(problem, args, workspace, launcher);
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_CLUSTER_LAUNCH_CUH_
