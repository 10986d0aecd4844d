// Running a loop on the caller's executor, in the floating-point environment that the definition of the results assumes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dualbin/types.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dualbin::detail {

// Round to nearest, subnormals kept. XLA's threads come with flush-to-zero on, and a host program may have changed the rounding mode.
class FloatEnvironment {
 public:
#if defined(__SSE2__)
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // the power-on default: all exceptions masked
  ~FloatEnvironment() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  FloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    set(0);  // that of a new process: to nearest, nothing flushed, NaNs passed on, exceptions masked
  }
  ~FloatEnvironment() { set(saved_); }
#else
  FloatEnvironment() {}  // what this processor has, if anything, is as the program left it
  ~FloatEnvironment() {}
#endif
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if defined(__SSE2__)
  unsigned saved_;
#elif defined(__aarch64__)
  static void set(uint64_t fpcr) { __asm__ volatile("msr fpcr, %0" : : "r"(fpcr)); }

  uint64_t saved_;
#endif
};

inline int workers(const Executor* executor) {
  return executor == nullptr || executor->run == nullptr ? 1 : std::max(1, executor->workers);
}

// Calls body(task, worker) for every task. The body is called in place when there is one task or one worker.
template <typename Body>
void parallel_tasks(const Executor* executor, int64_t tasks, const Body& body) {
  if (tasks <= 1 || workers(executor) == 1) {
    const FloatEnvironment environment;
    for (int64_t i = 0; i < tasks; ++i) body(i, 0);
    return;
  }
  auto task = [](void* context, int64_t i, int worker) {
    const FloatEnvironment environment;
    (*static_cast<const Body*>(context))(i, worker);
  };
  executor->run(executor->self, tasks, task, const_cast<Body*>(&body));
}

// Calls body(begin, end, worker) over slices of [0, count). `grain` is the smallest slice worth handing to another thread.
template <typename Body>
void parallel_range(const Executor* executor, int64_t count, int64_t grain, const Body& body) {
  const int64_t most = 4 * static_cast<int64_t>(workers(executor));  // a few slices a worker even out uneven rows
  const int64_t slices = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, most);
  parallel_tasks(executor, count > 0 ? slices : 0, [&](int64_t i, int worker) {
    const int64_t begin = count / slices * i + std::min(i, count % slices);
    body(begin, begin + count / slices + (i < count % slices ? 1 : 0), worker);
  });
}

}  // namespace dualbin::detail
