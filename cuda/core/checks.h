// Checks of the values that operations (core/ops) are called with, made by both back ends before they write anything. What pointers point
// to cannot be checked here: core/arrays.h does, where sizes are known.
#pragma once

#include <cinttypes>

#include "dualbin/status.h"
#include "dualbin/types.h"

namespace dualbin {

constexpr int64_t kMaxDim = int64_t{1} << 28;

inline int64_t id_at(const Ids& ids, int64_t n) {
  return ids.type == IdType::kI32 ? static_cast<const int32_t*>(ids.data)[n] : static_cast<const int64_t*>(ids.data)[n];
}

// The code of an enum of `count` values; `allowed` names them.
Status check_code(const char* name, int code, int count, const char* allowed);

// `data` may be null where there are no elements.
Status check_data(const char* name, const void* data, int64_t count = 1);
Status check_rows(const char* name, int64_t rows);
Status check_dim(int64_t dim);
Status check_table(const Table& table);
Status check_ids(const char* name, const Ids& ids);
Status check_floats(const char* name, const void* data, FloatType type, int64_t count);

Status check_planes(int planes);
Status check_workspace(const Launch& launch, size_t needed);

}  // namespace dualbin
