// Threads for the kernels when nobody else lends any: a queue and workers that stay between calls.
#ifndef CBAM_OPS_PYTHON_THREAD_POOL_H_
#define CBAM_OPS_PYTHON_THREAD_POOL_H_

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace cbam_ops {
namespace python {

class ThreadPool {
 public:
  // The pool of this process, with at least `workers` workers. It is never destroyed: at the end of
  // the process the workers sleep, and joining them from a static destructor is what hangs.
  static ThreadPool& Shared(int workers) {
    static std::mutex mutex;
    static ThreadPool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (pool == nullptr || owner != getpid()) {  // a forked child has the pool but not its threads
      pool = new ThreadPool();
      owner = getpid();
    }
    pool->Grow(workers);
    return *pool;
  }

  // Does not wait, and promises only that some worker runs the closure sooner or later.
  void Schedule(std::function<void()> closure) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(closure));
    }
    wake_.notify_one();
  }

 private:
  ThreadPool() = default;

  void Grow(int workers) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (; workers_ < workers; ++workers_) {
      std::thread([this] { Work(); }).detach();
    }
  }

  void Work() {
    for (;;) {
      std::function<void()> closure;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return !queue_.empty(); });
        closure = std::move(queue_.front());
        queue_.pop_front();
      }
      closure();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  int workers_ = 0;
};

}  // namespace python
}  // namespace cbam_ops

#endif  // CBAM_OPS_PYTHON_THREAD_POOL_H_
