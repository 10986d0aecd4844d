// Sums of a gradient by row.
#pragma once

#include <tuple>

#include "core/arguments.h"

namespace dualbin {

// Sorted distinct rows of a gradient. `ids` has the type of the input ids; slots past `count` hold id `rows` and zeros.
struct RowsOut {
  void* ids = nullptr;
  IdType ids_type = IdType::kI64;
  float* rows = nullptr;
  void* count = nullptr;  // number of distinct rows, also when that exceeds the capacity
  IdType count_type = IdType::kI64;
  int64_t capacity = 0;
};

// dy [ids.count, dim] -> sums by row. Ids outside [0, rows) are dropped.
struct ReduceRowsCall {
  Ids ids;
  Floats dy;
  int64_t rows = 0;
  int64_t dim = 0;
  RowsOut out;

  Status check() const {
    DUALBIN_TRY(check_rows("rows", rows));
    DUALBIN_TRY(check_dim(dim));
    DUALBIN_TRY(check_ids("ids", ids));
    DUALBIN_TRY(check_floats("dy", dy.data, dy.type, ids.count));
    DUALBIN_REQUIRE(out.capacity >= 0, Code::kInvalidArgument, "capacity must not be negative, got %" PRId64, out.capacity);
    DUALBIN_TRY(check_data("out_ids", out.ids, out.capacity));
    DUALBIN_TRY(check_data("out_rows", out.rows, out.capacity));
    return check_data("out_count", out.count);
  }

  struct Given {
    Array ids;  // int32 or int64 [N]
    Array dy;   // float32, float16 or bfloat16 [N, D]
    int64_t rows = 0;
    Array out_ids;    // int32 or int64 [C]
    Array out_rows;   // float32 [C, D]
    Array out_count;  // int32 or int64 [1]
  };

  static constexpr const char* kDoc = "Sums of dy by row: ascending distinct ids, float32 rows, their number.";
  static constexpr auto arguments() {
    return std::make_tuple(in("ids", &Given::ids), in("dy", &Given::dy), number("rows", &Given::rows),
                           dualbin::out("out_ids", &Given::out_ids), dualbin::out("out_rows", &Given::out_rows),
                           dualbin::out("out_count", &Given::out_count));
  }
  Work work() const { return {Op::kReduceRows, ids.count, rows, dim}; }

  Status read(const Given& given) {
    DUALBIN_TRY(read_id_list(given.ids, &ids));
    DUALBIN_TRY(check_rows("rows", given.rows));
    rows = given.rows;
    DUALBIN_TRY(read_gradient(given.dy, ids.count, kAny, &dy));
    dim = given.dy.shape[1];
    DUALBIN_TRY(read_id_type(given.out_ids, &out.ids_type));
    DUALBIN_TRY(check_shape(given.out_ids, {kAny}));
    DUALBIN_REQUIRE(out.ids_type == IdType::kI64 || rows <= INT32_MAX, Code::kInvalidArgument,
                    "out_ids must be int64 for a table of %" PRId64 " rows, got int32", rows);
    out.ids = given.out_ids.data;
    out.capacity = given.out_ids.size;
    DUALBIN_TRY(dualbin::read(given.out_rows, {out.capacity, dim}, &out.rows));
    DUALBIN_TRY(read_id_type(given.out_count, &out.count_type));
    DUALBIN_TRY(check_shape(given.out_count, {1}));
    out.count = given.out_count.data;
    return {};
  }
};

// dy [slots.count, dim] -> out [segments, dim], the same sums at the slots' own places. Slots outside [0, segments) are dropped.
struct SegmentSumCall {
  Ids slots;
  Floats dy;
  int64_t segments = 0;
  int64_t dim = 0;
  float* out = nullptr;

  Status check() const {
    DUALBIN_REQUIRE(segments >= 0, Code::kInvalidArgument, "segments must not be negative, got %" PRId64, segments);
    DUALBIN_TRY(check_dim(dim));
    DUALBIN_TRY(check_ids("slots", slots));
    DUALBIN_TRY(check_floats("dy", dy.data, dy.type, slots.count));
    return check_data("out", out, segments);
  }

  struct Given {
    Array slots;  // int32 or int64 [N]
    Array dy;     // float32, float16 or bfloat16 [N, D]
    Array out;    // float32 [U, D]
  };

  static constexpr const char* kDoc = "Sums of dy by slot, at the slots' own places.";
  static constexpr auto arguments() {
    return std::make_tuple(in("slots", &Given::slots), in("dy", &Given::dy), dualbin::out("out", &Given::out));
  }
  Work work() const { return {Op::kSegmentSum, slots.count, segments, dim}; }

  Status read(const Given& given) {
    DUALBIN_TRY(read_id_list(given.slots, &slots));
    DUALBIN_TRY(read_gradient(given.dy, slots.count, kAny, &dy));
    dim = given.dy.shape[1];
    DUALBIN_TRY(dualbin::read(given.out, {kAny, dim}, &out));
    segments = given.out.shape[0];
    return {};
  }
};

}  // namespace dualbin
