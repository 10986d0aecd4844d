// What a table whose rows are spread over ranks needs beside its own operations: who holds the rows of a batch, and rows with their scales
// in the form in which they travel. Rank r holds rows [r * share, (r + 1) * share).
#pragma once

#include <algorithm>
#include <tuple>

#include "core/arguments.h"
#include "core/ops/sums.h"

namespace dualbin {

constexpr int64_t kScaleBytes = sizeof(float);  // behind the planes of a row that travels

// The distinct ids of a batch, ascending, and so by rank, with the place of every occurrence among them.
//
// Without a capacity, local[j] is distinct id j counted from the first row of its rank, and `share` beyond the last. With one, rank r has
// the places [r * capacity, (r + 1) * capacity) of `local`; it gets the first `capacity` of its ids, and `share` in those that are left.
struct RouteCall {
  Ids ids;
  int64_t rows = 0;
  int64_t share = 0;
  int64_t world = 0;
  int64_t capacity = 0;  // 0: none
  int64_t spare = 0;  // with a capacity: places before those of rank 0, the first of which is for occurrences without a place of their own
  void* local = nullptr;
  IdType local_type = IdType::kI64;
  int64_t places = 0;     // of local
  void* slots = nullptr;  // [ids.count]: spare + the place in local; without one 0, or -1 where there is no capacity
  IdType slots_type = IdType::kI64;
  int64_t* numbers = nullptr;  // [world + 1]: how many distinct ids lie before the end of each rank; the first position of a bad id, or -1
  // [3 + world] or null: added to it the occurrences without a place, then the minimum with 0 and all bad ids, their maximum, and the
  // maximum with the distinct ids of every rank.
  int64_t* missed = nullptr;

  Status check() const {
    DUALBIN_TRY(check_rows("rows", rows));
    DUALBIN_TRY(check_ids("ids", ids));
    DUALBIN_REQUIRE(share >= 1 && share < INT64_MAX, Code::kInvalidArgument, "share must be at least 1, got %" PRId64, share);
    DUALBIN_REQUIRE(world >= 1 && (rows - 1) / share < world, Code::kInvalidArgument,
                    "share must be at least rows / ranks: %" PRId64 " ranks of %" PRId64 " rows have not all of %" PRId64, world, share,
                    rows);
    DUALBIN_REQUIRE(capacity >= 0, Code::kInvalidArgument, "capacity must not be negative, got %" PRId64, capacity);
    DUALBIN_REQUIRE(spare >= (capacity > 0 ? 1 : 0) && (capacity > 0 || spare == 0), Code::kInvalidArgument,
                    "spare must be at least 1 with a capacity and 0 without, got %" PRId64, spare);
    const int64_t wanted = capacity == 0 ? std::min(ids.count, rows) : capacity <= INT64_MAX / world ? capacity * world : -1;
    DUALBIN_REQUIRE(places == wanted, Code::kInvalidArgument,
                    "local must have min(ids, rows) places, or capacity * ranks with a capacity, got %" PRId64, places);
    DUALBIN_TRY(check_data("local", local, places));
    DUALBIN_TRY(check_data("slots", slots, ids.count));
    return check_data("numbers", numbers);
  }

  struct Given {
    Array ids;  // int32 or int64 [N]
    int64_t rows = 0;
    int64_t share = 0;
    int64_t capacity = 0;
    int64_t spare = 0;
    Array local;    // int32 or int64 [min(N, rows)] or [world * capacity]
    Array slots;    // int32 or int64 [N]
    Array numbers;  // int64 [world + 1]
    Array missed;   // int64 [3 + world], or absent
  };

  static constexpr const char* kDoc = "Which rank holds which rows of a batch, and where each id finds its row among them.";
  static constexpr auto arguments() {
    return std::make_tuple(in("ids", &Given::ids), number("rows", &Given::rows), number("share", &Given::share),
                           number("capacity", &Given::capacity), number("spare", &Given::spare), out("local", &Given::local),
                           out("slots", &Given::slots), out("numbers", &Given::numbers), out_optional("missed", &Given::missed));
  }
  Work work() const { return {Op::kReduceRows, ids.count, rows, 1}; }

  Status read(const Given& given) {
    DUALBIN_TRY(read_id_list(given.ids, &ids));
    DUALBIN_TRY(check_rows("rows", given.rows));
    rows = given.rows;
    share = given.share;
    capacity = given.capacity;
    spare = given.spare;
    DUALBIN_TRY(read_id_type(given.local, &local_type));
    DUALBIN_TRY(check_shape(given.local, {kAny}));
    DUALBIN_REQUIRE(local_type == IdType::kI64 || share <= INT32_MAX, Code::kInvalidArgument,
                    "local must be int64 for a share of %" PRId64 " rows, got int32", share);
    local = given.local.data;
    places = given.local.size;
    DUALBIN_TRY(read_id_type(given.slots, &slots_type));
    DUALBIN_TRY(check_shape(given.slots, {ids.count}));
    slots = given.slots.data;
    DUALBIN_REQUIRE(slots_type == IdType::kI64 || (places <= INT32_MAX && spare <= INT32_MAX - places), Code::kInvalidArgument,
                    "slots must be int64 for %" PRId64 " places, got int32", places);
    DUALBIN_TRY(dualbin::read(given.numbers, {kAny}, &numbers));
    world = given.numbers.size - 1;
    return read_optional(given.missed, {3 + world}, &missed);
  }
};

// What a rank sends of its gradient: the row sums of dy [slots.count, dim] at the slots' own places as in SegmentSumCall, each divided by
// `divisor` and rounded to the type of out [segments, dim].
struct SlotMeansCall {
  SegmentSumCall sums;  // without out
  float divisor = 1.0f;
  void* out = nullptr;
  FloatType type = FloatType::kF32;

  Status check() const {
    DUALBIN_REQUIRE(sums.segments >= 0, Code::kInvalidArgument, "segments must not be negative, got %" PRId64, sums.segments);
    DUALBIN_TRY(check_dim(sums.dim));
    DUALBIN_TRY(check_ids("slots", sums.slots));
    DUALBIN_TRY(check_floats("dy", sums.dy.data, sums.dy.type, sums.slots.count));
    DUALBIN_REQUIRE(divisor >= 1.0f, Code::kInvalidArgument, "divisor must be at least 1, got %g", static_cast<double>(divisor));
    return check_floats("out", out, type, sums.segments);
  }

  struct Given {
    Array slots;  // int32 or int64 [N]
    Array dy;     // float32, float16 or bfloat16 [N, D]
    int64_t divisor = 1;
    Array out;  // float32, float16 or bfloat16 [U, D]
  };

  static constexpr const char* kDoc = "Sums of dy by slot, at the slots' own places, over a divisor.";
  static constexpr auto arguments() {
    return std::make_tuple(in("slots", &Given::slots), in("dy", &Given::dy), number("divisor", &Given::divisor),
                           dualbin::out("out", &Given::out));
  }
  Work work() const { return {Op::kSegmentSum, sums.slots.count, sums.segments, sums.dim}; }

  Status read(const Given& given) {
    DUALBIN_TRY(read_id_list(given.slots, &sums.slots));
    DUALBIN_TRY(read_gradient(given.dy, sums.slots.count, kAny, &sums.dy));
    sums.dim = given.dy.shape[1];
    DUALBIN_REQUIRE(given.divisor >= 1 && given.divisor <= (1 << 24), Code::kInvalidArgument,
                    "divisor must be between 1 and 2^24, got %" PRId64, given.divisor);
    divisor = static_cast<float>(given.divisor);
    DUALBIN_TRY(read_float_type(given.out, &type));
    DUALBIN_TRY(check_shape(given.out, {kAny, sums.dim}));
    sums.segments = given.out.shape[0];
    out = given.out.data;
    return {};
  }
};

// Rows of a table as they travel: the bytes of all planes, then those of the scale.
struct TakeRowsCall {
  const uint8_t* bits = nullptr;
  const float* scale = nullptr;
  int64_t rows = 0;
  int64_t width = 0;
  Ids ids;                 // those outside [0, rows) get zeros and a scale of NaN
  uint8_t* out = nullptr;  // [ids.count, width + kScaleBytes]

  Status check() const {
    DUALBIN_TRY(check_rows("rows", rows));
    DUALBIN_TRY(check_row_bytes(width));
    DUALBIN_TRY(check_data("bits", bits));
    DUALBIN_TRY(check_data("scale", scale));
    DUALBIN_TRY(check_ids("ids", ids));
    return check_data("out", out, ids.count);
  }

  static Status check_row_bytes(int64_t width) {
    DUALBIN_REQUIRE(width >= 1 && width <= kMaxPlanes * (kMaxDim / 8), Code::kInvalidArgument,
                    "bits must have between 1 and 2^28 bytes a row, got %" PRId64, width);
    return {};
  }

  struct Given {
    Array bits;   // uint8 [V, W]
    Array scale;  // float32 [V, 1]
    Array ids;    // int32 or int64 [N]
    Array out;    // uint8 [N, W + 4]
  };

  static constexpr const char* kDoc = "Rows of a table with the bytes of their scales behind them.";
  static constexpr auto arguments() {
    return std::make_tuple(in("bits", &Given::bits), in("scale", &Given::scale), in("ids", &Given::ids), dualbin::out("out", &Given::out));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(dualbin::read(given.bits, {kAny, kAny}, &bits));
    rows = given.bits.shape[0];
    width = given.bits.shape[1];
    DUALBIN_TRY(read_column(given.scale, rows, &scale));
    DUALBIN_TRY(read_id_list(given.ids, &ids));
    return dualbin::read(given.out, {ids.count, width + kScaleBytes}, &out);
  }
};

// The inverse: rows that have travelled, to the places `ids` of a table. Ids must be distinct or bring the same; those outside [0, rows)
// are padding.
struct PutRowsCall {
  const uint8_t* packed = nullptr;  // [ids.count, width + kScaleBytes]
  Ids ids;
  uint8_t* bits = nullptr;
  float* scale = nullptr;
  int64_t rows = 0;
  int64_t width = 0;

  Status check() const {
    DUALBIN_REQUIRE(rows >= 0, Code::kInvalidArgument, "rows must not be negative, got %" PRId64, rows);
    DUALBIN_TRY(TakeRowsCall::check_row_bytes(width));
    DUALBIN_TRY(check_data("packed", packed, ids.count));
    if (ids.data != nullptr) DUALBIN_TRY(check_ids("ids", ids));
    DUALBIN_TRY(check_data("bits", bits, rows));
    return check_data("scale", scale, rows);
  }

  struct Given {
    Array packed;  // uint8 [N, W + 4]
    Array bits;    // uint8 [V, W]
    Array scale;   // float32 [V, 1]
    Array ids;     // int32 or int64 [N], or absent: 0, 1, 2, ...
  };

  static constexpr const char* kDoc = "Rows with the bytes of their scales behind them, to their places in a table.";
  static constexpr auto arguments() {
    return std::make_tuple(in("packed", &Given::packed), changed("bits", &Given::bits), changed("scale", &Given::scale),
                           in_optional("ids", &Given::ids));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(dualbin::read(given.bits, {kAny, kAny}, &bits));
    rows = given.bits.shape[0];
    width = given.bits.shape[1];
    DUALBIN_TRY(read_column(given.scale, rows, &scale));
    DUALBIN_TRY(dualbin::read(given.packed, {kAny, width + kScaleBytes}, &packed));
    const int64_t count = given.packed.shape[0];
    if (!given.ids.present()) {
      DUALBIN_REQUIRE(count == rows, Code::kInvalidArgument, "packed must have the %" PRId64 " rows of bits, got %" PRId64, rows, count);
      ids.count = count;
      return {};
    }
    DUALBIN_TRY(read_id_list(given.ids, &ids));
    DUALBIN_REQUIRE(ids.count == count, Code::kInvalidArgument, "ids must have the %" PRId64 " rows of packed, got %" PRId64, count,
                    ids.count);
    return {};
  }
};

}  // namespace dualbin
