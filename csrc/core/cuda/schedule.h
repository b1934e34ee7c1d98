// The work of a call as a list of items in a fixed order, and the order's arithmetic.
//
// An item is a piece of one *task* (a pass over some tile of a map, some tile of the MLP, ...) for
// one *group* of samples. Items are numbered; a block of the kernel takes the next number (a
// ticket), waits until the items that its own depends on are done, works, and counts it as done.
// An item depends on items of smaller numbers only, and whoever holds a smaller number works or
// waits for one still smaller. So there is no deadlock, however few blocks run and in whatever
// order they are started (CUB's decoupled look-back argues the same way).
//
// The order is a software pipeline. Time goes in steps; a stage (a task over all groups) has its
// items of group g in step first_step + g. Its predecessors are some steps ahead, so far that their
// items are done when a block comes to need them (ScheduleBuilder::kLag).
// Between two steps at which a stage begins or ends, every step has the same items: a *section*.
// From a ticket to its item is a search among the sections and one division.
#ifndef CBAM_OPS_CORE_CUDA_SCHEDULE_H_
#define CBAM_OPS_CORE_CUDA_SCHEDULE_H_

#include <cstdint>

#if defined(__CUDACC__)
#define CBAM_HOST_DEVICE __host__ __device__
#else
#define CBAM_HOST_DEVICE
#endif

namespace cbam_ops {
namespace cuda {

enum class Task : int32_t {
  // Passes over maps: pools, gradients by position and by channel, the results.
  kChannelPool,
  kSpatialPool,
  kSpatialGrad,
  kChannelGrad,
  kApply,
  kMapGrad,
  // The MLP.
  kHidden,
  kGate,
  kLogits,
  kHiddenGrad,
  kHiddenFold,
  kHiddenGradFold,
  kChannelSides,
  kWeights0,
  kWeights1,
  // The convolution.
  kConvolution,
  kStatistics,
  kNormalise,
  kNormGrad,
  kTotals,
  kPositionSides,
  kTaps,
  // The pools on their own.
  kStorePool,
  kPoolMaxima,
  kPoolSides,
};

struct Stage {
  Task task;
  int32_t items;         // per group
  int32_t sample_items;  // of these, of each sample; 0: they are of the group
  int64_t groups;
  int64_t first_step;
  uint32_t after;      // stages that come first for the same group, a bit each
  uint32_t after_all;  // stages that come first for all groups
};

struct Section {
  uint64_t first_ticket;
  int64_t first_step;
  int64_t items;    // per step
  uint32_t active;  // stages that have items here, a bit each
};

struct Item {
  int32_t stage;  // -1: there are no more
  int32_t index;  // within the group
  int64_t group;
};

struct Schedule {
  static constexpr int kMaxStages = 16;

  int32_t stage_count = 0;
  int32_t section_count = 0;
  uint64_t tickets = 0;
  int64_t groups = 0;         // of the stages that go by groups; others have one
  int64_t group_samples = 1;  // samples of a group; the last may have fewer
  // Stages for whose group, and for all of whose items, another one waits, a bit each.
  uint32_t awaited = 0;
  uint32_t awaited_all = 0;
  Stage stages[kMaxStages] = {};
  Section sections[2 * kMaxStages] = {};

  // `section` is where that of a smaller ticket was found, or 0, and where this one's is
  // afterwards.
  CBAM_HOST_DEVICE Item At(uint64_t ticket, int* section) const {
    if (ticket >= tickets) return {-1, 0, 0};
    int& s = *section;
    while (s + 1 < section_count && ticket >= sections[s + 1].first_ticket) ++s;
    const uint64_t items = static_cast<uint64_t>(sections[s].items);
    const uint64_t step = (ticket - sections[s].first_ticket) / items;
    auto rest = static_cast<int64_t>(ticket - sections[s].first_ticket - step * items);
    int stage = 0;
    for (;; ++stage) {
      if ((sections[s].active >> stage & 1) == 0) continue;
      if (rest < stages[stage].items) break;
      rest -= stages[stage].items;
    }
    return {stage, static_cast<int32_t>(rest),
            sections[s].first_step + static_cast<int64_t>(step) - stages[stage].first_step};
  }

  // Counters of items that are done: one for each group of each stage, and one for each stage. Only
  // what is awaited is counted.
  CBAM_HOST_DEVICE int64_t CounterOf(int stage, int64_t group) const {
    return kMaxStages + stage * groups + group;
  }
  CBAM_HOST_DEVICE int64_t TotalOf(int stage) const { return stage; }
  static int64_t Counters(int64_t groups) { return kMaxStages * (1 + groups); }
};

// Puts stages in order. They are added in an order in which each comes after those it depends on.
class ScheduleBuilder {
 public:
  ScheduleBuilder(Schedule* schedule, int64_t batch, int64_t group_samples) : schedule_(*schedule) {
    schedule_.group_samples = group_samples;
    schedule_.groups = (batch + group_samples - 1) / group_samples;
  }

  // A stage of `items` per group, after the same group's items of some stages and after all items
  // of others. Returns its bit.
  uint32_t Add(Task task, int64_t items, uint32_t after) {
    return AddStage(task, items, 0, schedule_.groups, after, 0);
  }
  // One of `items` per sample.
  uint32_t AddBySample(Task task, int64_t items, uint32_t after, uint32_t after_all = 0) {
    return AddStage(task, items * schedule_.group_samples, items, schedule_.groups, after,
                    after_all);
  }
  // One that does not go by groups.
  uint32_t AddOnce(Task task, int64_t items, uint32_t after_all) {
    return AddStage(task, items, 0, 1, 0, after_all);
  }

  // A stage follows what it depends on by so many tickets for each block that runs. Items of one
  // ticket per block ago would be done if all took the same time; those of the MLP take many times
  // as long, and blocks that wait for them hold up the others. Measured on an H200 (NOTES.md), from
  // 1 to 32 at batch 256: 14 x 14 and 7 x 7 take 0.3 to 0.55 of the time, 56 x 56 up to 5 % more
  // forward.
  static constexpr int64_t kLag = 32;

  // For `blocks` at a time. False where there are more items than counters can count.
  bool Finish(int64_t blocks) {
    // Stages that run side by side: of one part. A part begins after all of another.
    int part[Schedule::kMaxStages] = {};
    int64_t step_items[Schedule::kMaxStages] = {};
    for (int s = 0; s < schedule_.stage_count; ++s) {
      const Stage& stage = schedule_.stages[s];
      for (int d = 0; d < s; ++d) {
        if (stage.after >> d & 1) part[s] = part[d] > part[s] ? part[d] : part[s];
        if (stage.after_all >> d & 1) part[s] = part[d] + 1 > part[s] ? part[d] + 1 : part[s];
      }
      step_items[part[s]] += stage.items;
    }
    for (int s = 0; s < schedule_.stage_count; ++s) {
      Stage& stage = schedule_.stages[s];
      const int64_t items = step_items[part[s]] > 0 ? step_items[part[s]] : 1;
      const int64_t lag = (kLag * blocks + items - 1) / items;
      for (int d = 0; d < s; ++d) {
        const Stage& other = schedule_.stages[d];
        int64_t least = 0;
        if (stage.after >> d & 1) least = other.first_step + lag;
        if (stage.after_all >> d & 1) least = other.first_step + other.groups;
        if (least > stage.first_step) stage.first_step = least;
      }
      if (too_many_ || static_cast<double>(stage.items) * static_cast<double>(stage.groups) > 4e9) {
        return false;
      }
    }
    MakeSections();
    return true;
  }

 private:
  uint32_t AddStage(Task task, int64_t items, int64_t sample_items, int64_t groups, uint32_t after,
                    uint32_t after_all) {
    too_many_ = too_many_ || items > 0x7fffffff;
    const int s = schedule_.stage_count++;
    // What is done before those that it comes after needs no wait of its own.
    uint32_t before = 0;
    for (int d = 0; d < s; ++d) {
      if ((after | after_all) >> d & 1) before |= before_[d];
    }
    after &= ~before;
    before_[s] = before | after | after_all;
    schedule_.awaited |= after;
    schedule_.awaited_all |= after_all;
    schedule_.stages[s] = {
        task,     static_cast<int32_t>(items), static_cast<int32_t>(sample_items), groups, 0, after,
        after_all};
    return uint32_t{1} << s;
  }

  void MakeSections() {
    Section section = {};
    for (int64_t step = -1;;) {
      // The next step at which a stage begins or ends.
      int64_t next = INT64_MAX;
      for (int s = 0; s < schedule_.stage_count; ++s) {
        const Stage& stage = schedule_.stages[s];
        const int64_t ends[] = {stage.first_step, stage.first_step + stage.groups};
        for (const int64_t at : ends) {
          if (at > step && at < next) next = at;
        }
      }
      if (section.items > 0) {
        schedule_.sections[schedule_.section_count++] = section;
        schedule_.tickets += static_cast<uint64_t>(section.items * (next - step));
      }
      if (next == INT64_MAX) return;  // all have ended
      step = next;
      section = {schedule_.tickets, step, 0, 0};
      for (int s = 0; s < schedule_.stage_count; ++s) {
        const Stage& stage = schedule_.stages[s];
        if (step < stage.first_step || step >= stage.first_step + stage.groups) continue;
        section.items += stage.items;
        section.active |= uint32_t{1} << s;
      }
    }
  }

  Schedule& schedule_;
  uint32_t before_[Schedule::kMaxStages] = {};  // of each stage: those that are done for its group
  bool too_many_ = false;
};

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_SCHEDULE_H_
