// XLA FFI handlers for the CPU. XLA's own thread pool does the work; the calling thread takes part, so a busy pool cannot stall it.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>

#include "bindings/xla_handlers.h"
#include "bindings/xla_register.h"

namespace dualbin::bindings {

namespace {

// Fork-join on XLA's pool, with as many threads as the pool has, the calling one among them: XLA makes one for each processor, and where
// the caller is none of them, one more would have two of our threads share a processor. The state outlives the call because a helper may be
// scheduled only after all tasks are done; it then finds none left.
class XlaExecutor {
 public:
  explicit XlaExecutor(ffi::ThreadPool pool)
      : pool_(pool), executor_{&XlaExecutor::run, this, std::max(1, static_cast<int>(pool.num_threads()))} {}

  const Executor* get() const { return &executor_; }

 private:
  struct Join {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::atomic<int> workers{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };

  static void work(const std::shared_ptr<Join>& join, int64_t tasks, Executor::Task task, void* context) {
    const int worker = join->workers.fetch_add(1);
    for (int64_t i; (i = join->next.fetch_add(1)) < tasks;) {
      task(context, i, worker);
      if (join->done.fetch_add(1) + 1 == tasks) {
        const std::lock_guard<std::mutex> lock(join->mutex);
        join->all_done.notify_all();
      }
    }
  }

  static void run(void* self, int64_t tasks, Executor::Task task, void* context) {
    auto* executor = static_cast<XlaExecutor*>(self);
    const auto join = std::make_shared<Join>();
    const int64_t helpers = std::min<int64_t>(tasks, executor->executor_.workers) - 1;
    for (int64_t i = 0; i < helpers; ++i) {
      executor->pool_.Schedule([join, tasks, task, context] { work(join, tasks, task, context); });
    }
    work(join, tasks, task, context);
    std::unique_lock<std::mutex> lock(join->mutex);
    join->all_done.wait(lock, [&] { return join->done.load() == tasks; });
  }

  ffi::ThreadPool pool_;
  Executor executor_;
};

// How much workspace a call wants depends on the threads of XLA's pool, which Python does not know: it is ours for the length of the call.
class CpuContext {
 public:
  explicit CpuContext(ffi::ThreadPool pool) : executor_(pool) {}

  const Backend& backend() const { return cpu(); }
  const Executor* executor() const { return executor_.get(); }

  ffi::Error launch(size_t bytes, uint8_t*, size_t, Launch* launch) {
    if (bytes > 0) {
      workspace_.reset(new (std::nothrow) int64_t[(bytes + 7) / 8]);
      if (workspace_ == nullptr) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "dualbin: no memory for a workspace");
    }
    launch->executor = executor_.get();
    launch->workspace = workspace_.get();
    launch->workspace_bytes = bytes;
    return ffi::Error::Success();
  }

  // XLA takes large results from the system anew for every call.
  void expect_writes(const Array& array) const {
    const auto bytes = static_cast<size_t>(array.size * element_bytes(array.type));
    if (bytes >= kLeastHugeResult) dualbin::expect_writes(array.data, bytes);
  }

 private:
  XlaExecutor executor_;
  std::unique_ptr<int64_t[]> workspace_;
};

// The callable of a handler: makes the context of the call, then hands the operands to the shared body.
template <typename Body>
struct OnCpu {
  template <typename... Operands>
  ffi::Error operator()(ffi::ThreadPool pool, Operands... operands) const {
    CpuContext context(pool);
    return Body::run(context, operands...);
  }
};

auto bind_cpu() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace

#define DUALBIN_HANDLER(name, Call) XLA_FFI_DEFINE_HANDLER(k_##name, OnCpu<name##_target>{}, name##_target::signature(bind_cpu()));
DUALBIN_XLA_TARGETS(DUALBIN_HANDLER)
#undef DUALBIN_HANDLER

std::vector<Target> cpu_targets() {
#define DUALBIN_TARGET(name, Call) {"dualbin_" #name, k_##name},
  return {DUALBIN_XLA_TARGETS(DUALBIN_TARGET)};
#undef DUALBIN_TARGET
}

}  // namespace dualbin::bindings
