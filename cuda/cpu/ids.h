// Ids that are no rows, and arrays of ids that are written.
#pragma once

#include <atomic>

#include "core/checks.h"
#include "cpu/parallel.h"

namespace dualbin::detail {

// True where one of ids[0 .. count) is outside [0, rows). No branch a number, so that compilers take several at once.
template <typename Id>
bool any_outside(const Id* ids, int64_t count, int64_t rows) {
  uint64_t signs = 0;
  for (int64_t n = 0; n < count; ++n) {
    const auto id = static_cast<uint64_t>(static_cast<int64_t>(ids[n]));
    signs |= id | (static_cast<uint64_t>(rows) - 1 - id);
  }
  return signs >> 63 != 0;
}

inline void store_int(void* base, IdType type, int64_t at, int64_t value) {
  if (type == IdType::kI32) {
    static_cast<int32_t*>(base)[at] = static_cast<int32_t>(value);
  } else {
    static_cast<int64_t*>(base)[at] = value;
  }
}

constexpr int64_t kIdsOfThread = 65536;  // that are worth a thread

// An error that names the first of the positions [begin, end) whose id is outside [0, rows).
inline Status check_ids(const Executor* executor, const Ids& ids, int64_t begin, int64_t end, int64_t rows) {
  if (end <= begin) return {};
  std::atomic<bool> bad{false};
  parallel_range(executor, end - begin, kIdsOfThread, [&](int64_t from, int64_t to, int) {
    const int64_t first = begin + from;
    const int64_t count = to - from;
    const bool found = ids.type == IdType::kI32 ? any_outside(static_cast<const int32_t*>(ids.data) + first, count, rows)
                                                : any_outside(static_cast<const int64_t*>(ids.data) + first, count, rows);
    if (found) bad.store(true, std::memory_order_relaxed);
  });
  if (!bad.load()) return {};
  for (int64_t n = begin; n < end; ++n) {
    const int64_t id = id_at(ids, n);
    DUALBIN_REQUIRE(id >= 0 && id < rows, Code::kOutOfRange, "id %" PRId64 " at position %" PRId64 " is outside [0, %" PRId64 ")", id, n,
                    rows);
  }
  return {};
}

}  // namespace dualbin::detail
