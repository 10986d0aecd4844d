// Ids that are no rows.
#pragma once

#include "core/checks.h"

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

// An error that names the first of the positions [begin, end) whose id is outside [0, rows).
inline Status check_ids(const Ids& ids, int64_t begin, int64_t end, int64_t rows) {
  const int64_t count = end - begin;
  if (count <= 0) return {};
  const bool bad = ids.type == IdType::kI32 ? any_outside(static_cast<const int32_t*>(ids.data) + begin, count, rows)
                                            : any_outside(static_cast<const int64_t*>(ids.data) + begin, count, rows);
  if (!bad) return {};
  for (int64_t n = begin; n < end; ++n) {
    const int64_t id = id_at(ids, n);
    DUALBIN_REQUIRE(id >= 0 && id < rows, Code::kOutOfRange, "id %" PRId64 " at position %" PRId64 " is outside [0, %" PRId64 ")", id, n,
                    rows);
  }
  return {};
}

}  // namespace dualbin::detail
