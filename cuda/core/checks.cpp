#include "core/checks.h"

namespace dualbin {

Status check_code(const char* name, int code, int count, const char* allowed) {
  DUALBIN_REQUIRE(code >= 0 && code < count, Code::kInvalidArgument, "%s must be %s, got code %d", name, allowed, code);
  return {};
}

Status check_data(const char* name, const void* data, int64_t count) {
  DUALBIN_REQUIRE(count == 0 || data != nullptr, Code::kInvalidArgument, "%s must not be null", name);
  return {};
}

Status check_rows(const char* name, int64_t rows) {
  DUALBIN_REQUIRE(rows >= 1, Code::kInvalidArgument, "%s must be at least 1, got %" PRId64, name, rows);
  return {};
}

Status check_dim(int64_t dim) {
  DUALBIN_REQUIRE(dim >= 1 && dim <= kMaxDim, Code::kInvalidArgument, "dim must be between 1 and 2^28, got %" PRId64, dim);
  return {};
}

Status check_planes(int planes) {
  DUALBIN_REQUIRE(planes >= 1 && planes <= kMaxPlanes, Code::kInvalidArgument, "planes must be 1 to %d, got %d", kMaxPlanes, planes);
  return {};
}

Status check_table(const Table& table) {
  DUALBIN_TRY(check_rows("rows", table.rows));
  DUALBIN_TRY(check_dim(table.dim));
  DUALBIN_TRY(check_planes(table.planes));
  DUALBIN_TRY(check_data("bits", table.bits));
  return check_data("scale", table.scale);
}

Status check_ids(const char* name, const Ids& ids) {
  DUALBIN_REQUIRE(ids.count >= 0, Code::kInvalidArgument, "%s must not be a negative number of ids, got %" PRId64, name, ids.count);
  DUALBIN_TRY(check_code(name, static_cast<int>(ids.type), 2, "int32 or int64"));
  return check_data(name, ids.data, ids.count);
}

Status check_floats(const char* name, const void* data, FloatType type, int64_t count) {
  DUALBIN_TRY(check_code(name, static_cast<int>(type), 3, "float32, float16 or bfloat16"));
  return check_data(name, data, count);
}

Status check_workspace(const Launch& launch, size_t needed) {
  DUALBIN_REQUIRE(needed == 0 || (launch.workspace != nullptr && launch.workspace_bytes >= needed), Code::kInvalidArgument,
                  "the workspace has %zu bytes, %zu are needed", launch.workspace == nullptr ? size_t{0} : launch.workspace_bytes, needed);
  return {};
}

}  // namespace dualbin
