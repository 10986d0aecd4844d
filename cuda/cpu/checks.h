// Checks of arguments that both back ends make before they write anything.
#pragma once

#include <cinttypes>

#include "dualbin/backend.h"

namespace dualbin::detail {

inline int64_t id_at(const Ids& ids, int64_t n) {
  return ids.type == IdType::kI32 ? static_cast<const int32_t*>(ids.data)[n] : static_cast<const int64_t*>(ids.data)[n];
}

inline Status check_shape(int64_t rows, int64_t dim, const void* bits) {
  DUALBIN_REQUIRE(rows >= 1, Code::kInvalidArgument, "rows must be at least 1, got %" PRId64, rows);
  DUALBIN_REQUIRE(dim >= 1 && dim <= (int64_t{1} << 28), Code::kInvalidArgument, "dim must be between 1 and 2^28, got %" PRId64, dim);
  DUALBIN_REQUIRE(bits != nullptr, Code::kInvalidArgument, "bits must not be null");
  return {};
}

inline Status check_ids(const Ids& ids) {
  DUALBIN_REQUIRE(ids.count >= 0, Code::kInvalidArgument, "the number of ids must not be negative, got %" PRId64, ids.count);
  DUALBIN_REQUIRE(ids.count == 0 || ids.data != nullptr, Code::kInvalidArgument, "ids must not be null");
  DUALBIN_REQUIRE(ids.type == IdType::kI32 || ids.type == IdType::kI64, Code::kInvalidArgument, "ids must be int32 or int64");
  return {};
}

inline Status check_floats(const char* name, FloatType type) {
  const int code = static_cast<int>(type);
  DUALBIN_REQUIRE(code >= 0 && code <= 2, Code::kInvalidArgument, "%s must be float32, float16 or bfloat16, got type code %d", name, code);
  return {};
}

inline Status check_bags(const Table& table, const Bags& bags, FloatType type) {
  DUALBIN_TRY(check_shape(table.rows, table.dim, table.bits));
  DUALBIN_TRY(check_ids(bags.ids));
  DUALBIN_TRY(check_floats("out", type));
  DUALBIN_REQUIRE(table.scale != nullptr, Code::kInvalidArgument, "scale must not be null");
  DUALBIN_REQUIRE(bags.offsets.count >= 1 && bags.offsets.data != nullptr, Code::kInvalidArgument,
                  "offsets must have one element more than there are bags, got %" PRId64, bags.offsets.count);
  DUALBIN_REQUIRE(bags.offsets.type == IdType::kI32 || bags.offsets.type == IdType::kI64, Code::kInvalidArgument,
                  "offsets must be int32 or int64");
  const int mode = static_cast<int>(bags.mode);
  DUALBIN_REQUIRE(mode >= 0 && mode <= 2, Code::kInvalidArgument, "mode must be 0 (sum), 1 (mean) or 2 (majority), got %d", mode);
  DUALBIN_REQUIRE(bags.weights == nullptr || bags.mode == BagMode::kSum, Code::kInvalidArgument, "weights need the mode sum");
  return {};
}

inline Status check_workspace(const Launch& launch, size_t needed) {
  DUALBIN_REQUIRE(needed == 0 || (launch.workspace != nullptr && launch.workspace_bytes >= needed), Code::kInvalidArgument,
                  "the workspace has %zu bytes, %zu are needed", launch.workspace == nullptr ? size_t{0} : launch.workspace_bytes, needed);
  return {};
}

inline Status check_update(const Table& table, const State& state, const Rule& rule, const Clock* clock, const Ids& ids, const Floats& dy,
                           const UpdateOut& out) {
  DUALBIN_TRY(check_shape(table.rows, table.dim, table.bits));
  DUALBIN_TRY(check_ids(ids));
  DUALBIN_TRY(check_floats("dy", dy.type));
  DUALBIN_REQUIRE(table.scale != nullptr, Code::kInvalidArgument, "scale must not be null");
  DUALBIN_REQUIRE(table.first_row >= 0, Code::kInvalidArgument, "first_row must not be negative, got %" PRId64, table.first_row);
  DUALBIN_REQUIRE(clock != nullptr, Code::kInvalidArgument, "clock must not be null");
  DUALBIN_REQUIRE(ids.count == 0 || dy.data != nullptr, Code::kInvalidArgument, "dy must not be null");
  DUALBIN_REQUIRE((out.mask == nullptr) == (out.new_scale == nullptr) || ids.count == 0, Code::kInvalidArgument,
                  "mask and new_scale are given together or not at all");
  DUALBIN_REQUIRE((state.scale_m == nullptr) == (state.scale_v == nullptr), Code::kInvalidArgument,
                  "scale_m and scale_v are given together or not at all");
  DUALBIN_REQUIRE(state.scale_m == nullptr || state.count != nullptr, Code::kInvalidArgument, "training the scale needs count");
  const int kind = static_cast<int>(rule.kind);
  DUALBIN_REQUIRE(kind >= 0 && kind <= 2, Code::kInvalidArgument, "unknown rule kind %d", kind);
  if (rule.kind == RuleKind::kCounter) {
    DUALBIN_REQUIRE(rule.bits >= 1 && rule.bits <= 8, Code::kInvalidArgument, "rule bits must be 1 to 8, got %d", rule.bits);
    DUALBIN_REQUIRE(rule.bits == 1 || state.counter != nullptr, Code::kInvalidArgument, "a counter rule of %d bits needs counter",
                    rule.bits);
    DUALBIN_REQUIRE(rule.dead_zone_q8 >= 0 && rule.dead_zone_q8 <= 65536, Code::kInvalidArgument, "dead_zone_q8 must be 0 to 65536, got %d",
                    rule.dead_zone_q8);
    DUALBIN_REQUIRE(rule.anneal_q8 == 0 || rule.anneal_q8 >= 4, Code::kInvalidArgument, "anneal_q8 must be 0 or at least 4, got %d",
                    rule.anneal_q8);
    DUALBIN_REQUIRE(rule.anneal_q8 == 0 || state.count != nullptr, Code::kInvalidArgument, "a dead zone that grows needs count");
  }
  if (rule.kind == RuleKind::kBop) {
    DUALBIN_REQUIRE(state.ema != nullptr && state.count != nullptr, Code::kInvalidArgument, "the Bop rule needs ema and count");
  }
  return {};
}

}  // namespace dualbin::detail
