// The kernels: one for forward and one for backward of a map type, each over all items of a call.
//
// Of a block's threads, kThreads work on an item. One thread of the warp beside them takes the next
// ticket meanwhile and waits for what its item depends on, and counts the last item as done: what
// these cost, latencies of memory and of a fence, passes while the others work.
#ifndef CBAM_OPS_CORE_CUDA_KERNEL_CUH_
#define CBAM_OPS_CORE_CUDA_KERNEL_CUH_

#include "core/cuda/convolution.cuh"
#include "core/cuda/maps.cuh"
#include "core/cuda/mlp.cuh"
#include "core/cuda/pools.cuh"

namespace cbam_ops {
namespace cuda {

// An item as those who work on it need it.
struct Work {
  Item item;
  Task task;
  int64_t n;  // the sample, or of a stage that does not go by samples the group
  int index;  // among the items of that
};

// The start of a block's shared memory.
struct Control {
  Work works[2];      // in turn: the one that is worked on, the next
  uint32_t finished;  // items that the block has worked on
};
static_assert(sizeof(Control) <= kControlBytes, "more than is set aside");

template <typename A>
CBAM_DEVICE void CountAsDone(const Call<A>& call, const Item& item) {
  const Schedule& schedule = call.schedule;
  if (schedule.awaited_all >> item.stage & 1)
    AddRelease(call.counters + schedule.TotalOf(item.stage));
  if (schedule.awaited >> item.stage & 1)
    AddRelease(call.counters + schedule.CounterOf(item.stage, item.group));
}

// Puts the next item where the block finds it, when all is done that it depends on. That may be the
// last item, `fetched` before it: when the block has finished that, it must be counted before more
// is waited for. Returns whether it was. `ticket` is the item's, and then that of the one after it:
// it is on its way while this one is waited for and worked on.
template <typename A>
CBAM_DEVICE bool Fetch(const Call<A>& call, Control* control, const Item& last, uint32_t fetched,
                       uint64_t* ticket, int* section) {
  const Schedule& schedule = call.schedule;
  const Item next = schedule.At(*ticket, section);
  *ticket = TakeTicket(call.next_ticket);
  bool counted = last.stage < 0;
  const auto wait = [&](int64_t counter, int64_t target) {
    const uint32_t* const address = call.counters + counter;
    const auto wanted = static_cast<uint32_t>(target);
    if (!counted) {
      if (WaitUnless(address, wanted, &control->finished, fetched)) return;
      CountAsDone(call, last);
      counted = true;
    }
    WaitAcquire(address, wanted);
  };
  for (int s = 0; s < next.stage; ++s) {
    const Stage& stage = schedule.stages[next.stage];
    const Stage& other = schedule.stages[s];
    if (stage.after >> s & 1) wait(schedule.CounterOf(s, next.group), other.items);
    if (stage.after_all >> s & 1) wait(schedule.TotalOf(s), other.items * other.groups);
  }
  Work work = {next, Task(), next.group, next.index};
  if (next.stage >= 0) {
    const Stage& stage = schedule.stages[next.stage];
    work.task = stage.task;
    if (stage.sample_items > 0) {
      const int32_t sample = next.index / stage.sample_items;
      work.n = next.group * schedule.group_samples + sample;
      work.index = next.index - sample * stage.sample_items;
    }
  }
  control->works[fetched & 1] = work;
  return counted;
}

// Runs run(task, sample or group, index) for every item that the block gets.
template <typename A, typename Run>
CBAM_DEVICE void RunItems(const Call<A>& call, Run run) {
  Control* const control = reinterpret_cast<Control*>(BlockMemory());
  if (ThreadIndex() == 0) control->finished = 0;
  BlockBarrier();
  if (ThreadIndex() < kThreads) {
    Work work;
    uint32_t fetched = 0;
    // Never, but nvcc does not know: what may be entered in the middle is no loop to its optimizer,
    // which would look for what all items have in common, for a third of its time and in vain.
    if (call.batch == 0) goto finished;
    for (;; ++fetched) {
      BlockBarrier();  // the last item is finished, the next one known
      work = control->works[fetched & 1];
      if (work.item.stage < 0) return;
      ForgetShared();
      if (work.n < call.batch) run(work.task, work.n, work.index);  // the last group may be smaller
    finished:
      Barrier();
      if (ThreadIndex() == 0) Publish(&control->finished, fetched + 1);
    }
  }
  const bool fetches = ThreadIndex() == kThreads;
  Item last = {-1, 0, 0};
  uint64_t ticket = fetches ? TakeTicket(call.next_ticket) : 0;
  int section = 0;
  for (uint32_t fetched = 0;; ++fetched) {
    const bool counted = !fetches || Fetch(call, control, last, fetched, &ticket, &section);
    ConvergeWarp();
    BlockBarrier();
    if (!counted) CountAsDone(call, last);
    last = control->works[fetched & 1].item;
    if (last.stage < 0) return;
  }
}

// Calls pass(traits) with those of the call's maps. A kernel has the passes for both layouts, with and
// without vectors, and for NCHW whose rows are several channels: what is not a pass over maps, nearly
// half of its code, is compiled once for all five.
template <typename T, typename RunPass>
CBAM_DEVICE void WithTraits(const Call<Compute<T>>& call, RunPass pass) {
  if constexpr (kWidest<T> > 1) {
    if (call.vector > 1) {
      if (call.fold > 1) return pass(MapTraits<T, kWidest<T>, false, true>());
      return call.channels_last ? pass(MapTraits<T, kWidest<T>, true>())
                                : pass(MapTraits<T, kWidest<T>, false>());
    }
  }
  return call.channels_last ? pass(MapTraits<T, 1, true>()) : pass(MapTraits<T, 1, false>());
}

template <typename T>
CBAM_KERNEL(kForwardBlocks<Compute<T>>)
ForwardKernel(CBAM_PARAMETER Call<Compute<T>> call) {
  RunItems(call, [&](Task task, int64_t n, int index) CBAM_INLINE_LAMBDA {
    const auto over_maps = [&](auto pass) CBAM_INLINE_LAMBDA { WithTraits<T>(call, pass); };
    switch (task) {
      case Task::kHidden:
        return Hidden(call, n, index);
      case Task::kGate:
        return Gate(call, n, index, false);
      case Task::kHiddenFold:
        return FoldHidden(call, n, index, false);
      case Task::kStatistics:
        return Statistics(call);
      case Task::kChannelPool:
        return over_maps([&](auto traits) CBAM_INLINE_LAMBDA {
          Reduce<decltype(traits), Pass::kChannelPool>(call, n, index);
        });
      case Task::kSpatialPool:
        return over_maps([&](auto traits) CBAM_INLINE_LAMBDA {
          Reduce<decltype(traits), Pass::kSpatialPool>(call, n, index);
        });
      case Task::kConvolution:
        return Convolution(call, n, index);
      case Task::kNormalise:
        return Normalise(call, n, index);
      case Task::kApply:
        return over_maps([&](auto traits) CBAM_INLINE_LAMBDA {
          using M = decltype(traits);
          call.residual != nullptr ? Apply<M, true>(call, n, index)
                                   : Apply<M, false>(call, n, index);
        });
      default:
        return StorePool<T>(call, n, index);
    }
  });
}

template <typename T>
CBAM_KERNEL(kBackwardBlocks<Compute<T>>)
BackwardKernel(CBAM_PARAMETER Call<Compute<T>> call) {
  RunItems(call, [&](Task task, int64_t n, int index) CBAM_INLINE_LAMBDA {
    const auto over_maps = [&](auto pass) CBAM_INLINE_LAMBDA { WithTraits<T>(call, pass); };
    switch (task) {
      case Task::kHidden:
        return Hidden(call, n, index);
      case Task::kLogits:
        return Gate(call, n, index, true);
      case Task::kHiddenGrad:
        return HiddenGrad(call, n, index);
      case Task::kHiddenFold:
      case Task::kHiddenGradFold:
        return FoldHidden(call, n, index, task == Task::kHiddenGradFold);
      case Task::kChannelSides:
        return ChannelSides(call, n, index);
      case Task::kWeights0:
      case Task::kWeights1:
        return WeightGradient(call, index, task == Task::kWeights0);
      case Task::kTotals:
        return Totals(call);
      case Task::kTaps:
        return Taps(call, index);
      case Task::kSpatialGrad:
        return over_maps([&](auto traits) CBAM_INLINE_LAMBDA {
          Reduce<decltype(traits), Pass::kSpatialGrad>(call, n, index);
        });
      case Task::kChannelGrad:
        return over_maps([&](auto traits) CBAM_INLINE_LAMBDA {
          Reduce<decltype(traits), Pass::kChannelGrad>(call, n, index);
        });
      case Task::kMapGrad:
        return over_maps([&](auto traits) CBAM_INLINE_LAMBDA {
          using M = decltype(traits);
          if (call.pool_maxima != nullptr) return MapGrad<M, Gradient::kNone>(call, n, index);
          call.mask != nullptr ? MapGrad<M, Gradient::kMasked>(call, n, index)
                               : MapGrad<M, Gradient::kPlain>(call, n, index);
        });
      case Task::kNormGrad:
        return NormGrad(call, n, index);
      case Task::kPositionSides:
        return PositionSides(call, n, index);
      case Task::kPoolMaxima:
        return PoolMaxima<T>(call, n, index);
      default:
        return PoolSides<T>(call, n, index);
    }
  });
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_KERNEL_CUH_
