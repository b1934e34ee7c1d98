// Fills a map type's table (table.h).
#ifndef CBAM_OPS_CORE_CUDA_MAKE_TABLE_CUH_
#define CBAM_OPS_CORE_CUDA_MAKE_TABLE_CUH_

#include <type_traits>

#include "core/cuda/kernel.cuh"
#include "core/cuda/plan.h"
#include "core/cuda/table.h"

namespace cbam_ops {
namespace cuda {

// The widths of vectors that a type's kernels have, widest first.
template <typename T>
constexpr int kWidths[] = {kWidest<T>, 1};

template <typename Args>
constexpr bool kIsForward =
    std::is_same_v<Args, ForwardArgs> || std::is_same_v<Args, ChannelPoolArgs> ||
    std::is_same_v<Args, SpatialPoolArgs>;

template <typename T, typename Args>
size_t WorkspaceFor(const Problem& problem) {
  if (problem.batch == 0) return 0;
  // Whether the call's addresses allow vectors is not known yet.
  size_t most = 0;
  for (const int vector : kWidths<T>) {
    Plan<T> plan(problem, vector, nullptr);
    plan.Fill(Args());
    if (plan.bytes() > most) most = plan.bytes();
  }
  return most;
}

template <typename T, typename Args>
bool MakeOrder(Plan<T>* plan, const Problem& problem, const Args& args, int64_t blocks) {
  ScheduleBuilder builder(&plan->call.schedule, problem.batch, plan->group_samples());
  plan->Order(args, &builder);
  return builder.Finish(blocks);
}

// Of an empty batch: gradients of nothing are 0, and so are statistics.
inline Status RunEmpty(const Problem& problem, const BackwardArgs& args, const Launcher& launcher) {
  const bool channel = HasChannelGate(problem), spatial = HasSpatialGate(problem);
  const int64_t weights = channel ? problem.channels * problem.hidden : 0;
  const int64_t taps =
      spatial ? 2 * problem.kernel_depth * problem.kernel_height * problem.kernel_width : 0;
  struct {
    void* data;
    int64_t values;
  } const results[] = {{args.dw0, weights},
                       {args.db0, channel ? problem.hidden : 0},
                       {args.dw1, weights},
                       {args.db1, channel ? problem.channels : 0},
                       {args.dkernel, taps},
                       {args.dbias, spatial ? 1 : 0},
                       {args.dgamma, problem.batch_norm ? 1 : 0}};
  for (const auto& result : results) {
    const Status status = launcher.Zero(problem.dtype, result.data, result.values);
    if (!status.ok()) return status;
  }
  return {};
}
inline Status RunEmpty(const Problem& problem, const ForwardArgs& args, const Launcher& launcher) {
  return launcher.Zero(problem.dtype, args.batch_statistics, problem.batch_norm ? 2 : 0);
}
template <typename Args>
Status RunEmpty(const Problem&, const Args&, const Launcher&) {
  return {};
}

template <typename T, typename Args>
Status RunCall(const Problem& problem, const Args& args, void* workspace,
               const Launcher& launcher) {
  if (problem.batch == 0) return RunEmpty(problem, args, launcher);
  for (const int vector : kWidths<T>) {
    Plan<T> plan(problem, vector, workspace);
    plan.Fill(args);
    if (!plan.Fits()) continue;
    constexpr int kAtOnce =
        kIsForward<Args> ? kForwardBlocks<Compute<T>> : kBackwardBlocks<Compute<T>>;
    const int64_t blocks = launcher.device().multiprocessors * kAtOnce;
    if (!MakeOrder(&plan, problem, args, blocks)) break;
    return launcher.Run<kIsForward<Args> ? &ForwardKernel<T> : &BackwardKernel<T>, kAtOnce>(
        blocks, plan.call, plan.counter_bytes);
  }
  return {StatusCode::kUnsupported, "more tiles than the counters of a GPU can count", ""};
}

template <typename T, typename Args>
Schedule OrderFor(const Problem& problem, int64_t blocks) {
  Plan<T> plan(problem, kWidest<T>, nullptr);
  plan.Fill(Args());
  MakeOrder(&plan, problem, Args(), blocks);
  return plan.call.schedule;
}

template <typename T>
Status LoadKernels() {
  const Status status = Launcher::Load(&ForwardKernel<T>);
  return status.ok() ? Launcher::Load(&BackwardKernel<T>) : status;
}

template <typename T>
constexpr Table MakeTable() {
  Table table = {};
#define CBAM_OPS_FILL(Args) \
  table.for_##Args = {&WorkspaceFor<T, Args>, &RunCall<T, Args>, &OrderFor<T, Args>};
  CBAM_OPS_FOR_EACH_ARGS(CBAM_OPS_FILL)
#undef CBAM_OPS_FILL
  table.load = &LoadKernels<T>;
  return table;
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_MAKE_TABLE_CUH_
