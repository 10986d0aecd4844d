// Updates on the CPU.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/update_rows.h"

namespace dualbin::detail {

namespace {

// Columns of occurrences that are worth a thread: kernels take a tenth of the time.
constexpr int64_t kWeightsOfThread = 16384;
constexpr int64_t kWeightsOfThreadByKernels = 65536;

struct AtomicStats {
  std::atomic<uint64_t> flips{0}, rows{0}, skipped{0}, clipped{0};

  void add(const Stats& stats) {
#define DUALBIN_ADD(name) name.fetch_add(stats.name, std::memory_order_relaxed);
    DUALBIN_STATS(DUALBIN_ADD)
#undef DUALBIN_ADD
  }

  Stats read() const { return {flips.load(), rows.load(), skipped.load(), clipped.load()}; }
};

// With DUALBIN_DEBUG=1, which is read once: the memory of the tables that updates are at work on. Two updates of one table at a time are an
// error of the caller, which nobody would notice otherwise.
class AtWork {
 public:
  explicit AtWork(const Table& table) : mine_(table.bits, table.bits + table.rows * table.row_bytes()) {
    static const bool debug = [] {
      const char* value = std::getenv("DUALBIN_DEBUG");
      return value != nullptr && std::strcmp(value, "1") == 0;
    }();
    if (!debug) return;
    const std::lock_guard<std::mutex> lock(mutex());
    alone_ = std::none_of(all().begin(), all().end(),
                          [&](const Memory& other) { return other.first < mine_.second && mine_.first < other.second; });
    if (!alone_) return;
    all().push_back(mine_);
    listed_ = true;
  }
  ~AtWork() {
    if (!listed_) return;
    const std::lock_guard<std::mutex> lock(mutex());
    all().erase(std::find(all().begin(), all().end(), mine_));
  }
  AtWork(const AtWork&) = delete;
  AtWork& operator=(const AtWork&) = delete;

  bool alone() const { return alone_; }

 private:
  using Memory = std::pair<const uint8_t*, const uint8_t*>;

  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::vector<Memory>& all() {
    static std::vector<Memory> memory;
    return memory;
  }

  Memory mine_;
  bool alone_ = true;
  bool listed_ = false;
};

// Of a row that is not updated, a mask says nothing and the scale stays.
void clear_masks(const Table& table, const Ids& ids, const Segments& segments, const UpdateOut& out) {
  std::memset(out.mask, 0, static_cast<size_t>(ids.count * table.row_bytes()));
  for (int64_t n = 0; n < ids.count; ++n) out.new_scale[n] = 0.0f;
  for (int64_t s = 0; s < segments.count; ++s) out.new_scale[segments.positions(s)[0]] = table.scale[segments.row(s)];
}

}  // namespace

size_t CpuBackend::workspace_bytes(Op, const Executor* executor, int64_t count, int64_t, int64_t dim) const {
  return segments_bytes(executor, std::max<int64_t>(count, 0), std::max<int64_t>(dim, 0));
}

Status CpuBackend::update(const Launch& launch, const UpdateCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  const Ids& ids = call.ids;
  const UpdateOut& out = call.out;
  DUALBIN_TRY(check_workspace(launch, segments_bytes(launch.executor, ids.count, table.dim)));
  const AtWork at_work(table);
  DUALBIN_REQUIRE(
      at_work.alone(), Code::kInternal,
      "two updates of one table at the same time, which DUALBIN_DEBUG=1 looks for: bits are being updated by another thread, and one "
      "update has to wait for the other");
  int64_t bad = -1;
  const Segments segments = make_segments(launch.workspace, ids, table.rows, &bad);
  DUALBIN_REQUIRE(!call.strict || bad < 0, Code::kOutOfRange, "id %" PRId64 " at position %" PRId64 " is outside [0, %" PRId64 ")",
                  id_at(ids, bad), bad, table.rows);
  if (out.mask != nullptr) clear_masks(table, ids, segments, out);
  const UpdateJob job{table, call.state, call.rule, *call.context, call.dy, segments, out};
  const bool by_kernels = kernels_ != nullptr;
  const auto update_rows = call.rule.kind == RuleKind::kCounter ? update_by_kernels : update_signs_by_kernels;
  AtomicStats stats;
  const int64_t weights = by_kernels ? kWeightsOfThreadByKernels : kWeightsOfThread;
  for_segments(launch.executor, segments, table.dim, weights, [&](int64_t begin, int64_t end, int worker) {
    const Scratch scratch = worker_scratch(launch.workspace, ids.count, table.dim, worker);
    stats.add(by_kernels ? update_rows(*kernels_, job, begin, end, scratch) : update_by_rules(job, begin, end, scratch));
  });
  if (out.stats != nullptr) *out.stats = stats.read();
  return {};
}

Status CpuBackend::advance(const Launch&, const AdvanceCall& call) const {
  DUALBIN_TRY(call.check());
  ++*call.step;
  return {};
}

Status CpuBackend::xor_rows(const Launch& launch, const XorRowsCall& call) const {
  DUALBIN_TRY(call.check());
  const int64_t width = call.width;
  parallel_range(launch.executor, call.ids.count, std::max<int64_t>(1, 65536 / width), [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = id_at(call.ids, n);
      if (id < 0 || id >= call.rows) continue;
      for (int64_t b = 0; b < width; ++b) call.bits[id * width + b] ^= call.mask[n * width + b];
    }
  });
  return {};
}

}  // namespace dualbin::detail
