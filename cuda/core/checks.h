// Checks of the values that the core is called with, made by both back ends before they write anything. What pointers point to cannot be
// checked here: core/arrays.h does, where sizes are known.
#pragma once

#include <cinttypes>

#include "dualbin/backend.h"

namespace dualbin {

constexpr int64_t kMaxDim = int64_t{1} << 28;

inline int64_t id_at(const Ids& ids, int64_t n) {
  return ids.type == IdType::kI32 ? static_cast<const int32_t*>(ids.data)[n] : static_cast<const int64_t*>(ids.data)[n];
}

// `data` may be null where there are no elements.
Status check_data(const char* name, const void* data, int64_t count = 1);
Status check_rows(const char* name, int64_t rows);
Status check_dim(int64_t dim);
Status check_table(const Table& table);
Status check_ids(const char* name, const Ids& ids);
Status check_floats(const char* name, const void* data, FloatType type, int64_t count);

Status check_planes(int planes);
Status check_pack(Floats w, int64_t rows, int64_t dim, int planes, const uint8_t* bits);
Status check_unpack(const Table& table, const void* out);
Status check_fewer_planes(const Table& table, int fewer, const uint8_t* bits);
Status check_lookup(const Table& table, const Ids& ids, const void* out, FloatType type);
Status check_bags(const Table& table, const Bags& bags, const void* out, FloatType type);
Status check_bag_counts(const float* scale, int64_t rows, const Bags& bags, const int32_t* out);
Status check_bag_gradient(const Bags& bags, const Floats& dy, int64_t dim, const int32_t* counts, const void* out);
Status check_bag_weight_gradient(const Table& table, const Bags& bags, const Floats& dy, const float* out);
Status check_reduce_rows(const Ids& ids, const Floats& dy, int64_t rows, int64_t dim, const RowsOut& out);
Status check_segment_sum(const Ids& slots, const Floats& dy, int64_t segments, int64_t dim, const float* out);
Status check_rule(const Rule& rule, const State& state, int planes);
Status check_update(const Table& table, const State& state, const Rule& rule, const StepContext* context, const Ids& ids, const Floats& dy,
                    const UpdateOut& out);
Status check_xor_rows(const uint8_t* bits, int64_t rows, int64_t width, const Ids& ids, const uint8_t* mask);

Status check_average(const Table& a, const Table& b, const StepContext* context, const Table& out);

// Of offsets in host memory: that they ascend within [0, ids].
Status check_offsets(const Bags& bags);

Status check_workspace(const Launch& launch, size_t needed);

}  // namespace dualbin
