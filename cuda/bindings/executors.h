// Executors over the thread pools of the two callers: OpenMP for PyTorch, XLA's intra-op pool for JAX.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "dualbin/types.h"

#if defined(_OPENMP)
#include <omp.h>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define DUALBIN_HAS_FORK 1
#endif
#endif

namespace dualbin::bindings {

// A forked process (a DataLoader worker) has none of its parent's OpenMP threads and would wait for them for ever: it uses one.
inline std::atomic<bool> forked{false};

inline void watch_forks() {
#if defined(DUALBIN_HAS_FORK)
  pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif
}

// `threads` OpenMP threads; the frontend passes what its framework is set to.
class OpenMpExecutor {
 public:
  explicit OpenMpExecutor(int threads)
      : executor_{&OpenMpExecutor::run, this, forked.load(std::memory_order_relaxed) ? 1 : std::max(1, threads)} {}
  OpenMpExecutor(const OpenMpExecutor&) = delete;
  OpenMpExecutor& operator=(const OpenMpExecutor&) = delete;

  const Executor* get() const { return &executor_; }

 private:
  static void run(void* self, int64_t tasks, Executor::Task task, void* context) {
#if defined(_OPENMP)
    const int threads = static_cast<int>(std::min<int64_t>(tasks, static_cast<OpenMpExecutor*>(self)->executor_.workers));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < tasks; ++i) task(context, i, omp_get_thread_num());
#else
    (void)self;
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
#endif
  }

  Executor executor_;
};

}  // namespace dualbin::bindings
