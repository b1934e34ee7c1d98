// Lends a thread pool to the kernels, for the adapters (TensorFlow, XLA, Python) that have one.
//
// The calling thread always works; helpers from the pool join when they get a thread. Nothing ever
// waits for a task that has not started, so a call made from a thread of the same pool, or on a
// pool whose threads are all busy, cannot deadlock: helpers that arrive late find no work left and
// leave.
#ifndef CBAM_OPS_CORE_CPU_WORK_SHARING_H_
#define CBAM_OPS_CORE_CPU_WORK_SHARING_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "core/cpu/kernels.h"

namespace cbam_ops {
namespace cpu {

class WorkSharing {
 public:
  // `schedule` hands a closure to the pool without blocking. It must outlive the calls made through
  // `parallel()`.
  WorkSharing(int threads, std::function<void(std::function<void()>)> schedule)
      : threads_(threads < 1 ? 1 : threads), schedule_(std::move(schedule)) {}

  Parallel parallel() { return Parallel{threads_, this, &WorkSharing::Run}; }

 private:
  // Shared with helpers that may start after the call has returned.
  struct Batch {
    int64_t tasks;
    void (*task)(void*, int64_t);
    void* argument;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> finished{0};

    void Work() {
      int64_t done = 0;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks; ++done) {
        task(argument, i);
      }
      if (done > 0) finished.fetch_add(done, std::memory_order_acq_rel);
    }
  };

  static void Run(void* context, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
    auto* self = static_cast<WorkSharing*>(context);
    const int64_t helpers = (tasks < self->threads_ ? tasks : self->threads_) - 1;
    if (helpers < 1) {
      for (int64_t i = 0; i < tasks; ++i) task(argument, i);
      return;
    }
    auto batch = std::make_shared<Batch>();
    batch->tasks = tasks;
    batch->task = task;
    batch->argument = argument;
    for (int64_t i = 0; i < helpers; ++i) {
      self->schedule_([batch] { batch->Work(); });
    }
    batch->Work();
    // Every task is taken by now; what is left runs on a thread this moment. Tasks are short, so
    // spin, then give way.
    for (int spins = 0; batch->finished.load(std::memory_order_acquire) < tasks; ++spins) {
      if (spins > 256) std::this_thread::yield();
    }
  }

  const int threads_;
  const std::function<void(std::function<void()>)> schedule_;
};

}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_WORK_SHARING_H_
