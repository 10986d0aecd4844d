// Rows of a table, and flips of its bits.
#pragma once

#include <tuple>

#include "core/arguments.h"

namespace dualbin {

// out [ids.count, dim] of type `type`.
struct LookupCall {
  Table table;
  Ids ids;
  BadIds bad_ids = BadIds::kReport;
  void* out = nullptr;
  FloatType type = FloatType::kF32;

  Status check() const {
    DUALBIN_TRY(check_table(table));
    DUALBIN_TRY(check_ids("ids", ids));
    return check_floats("out", out, type, ids.count);
  }

  struct Given {
    Array bits;   // uint8 [V, planes * B], B = ceil(D/8)
    Array scale;  // float32 [V, 1]
    int64_t dim = 0;
    Array ids;  // int32 or int64 of any shape
    Array out;  // float32, float16 or bfloat16 [*shape of ids, D]
    BadIds bad_ids = BadIds::kReport;
  };

  static constexpr const char* kDoc = "Rows of a table: out[n] is row ids[n].";
  static constexpr auto arguments() {
    return std::make_tuple(in("bits", &Given::bits), in("scale", &Given::scale), number("dim", &Given::dim), in("ids", &Given::ids),
                           dualbin::out("out", &Given::out), attribute("bad_ids", &Given::bad_ids));
  }

  Status read(const Given& given) {
    const Array& rows = given.ids;
    const Array& result = given.out;
    DUALBIN_TRY(read_table(given.bits, given.scale, given.dim, &table));
    DUALBIN_TRY(read_ids(rows, &ids));
    DUALBIN_TRY(read_float_type(result, &type));
    bool fits = result.rank == rows.rank + 1 && result.shape[rows.rank] == table.dim;
    for (int i = 0; fits && i < rows.rank; ++i) fits = result.shape[i] == rows.shape[i];
    DUALBIN_REQUIRE(fits, Code::kInvalidArgument, "out must have the shape of ids, %s, and then dim, %" PRId64 ", got %s",
                    ShapeText(rows).text, table.dim, ShapeText(result).text);
    out = result.data;
    bad_ids = given.bad_ids;
    return {};
  }
};

// bits[ids[n]] ^= mask[n]. Ids must be distinct; those outside [0, rows) are padding.
struct XorRowsCall {
  uint8_t* bits = nullptr;
  int64_t rows = 0;
  int64_t width = 0;
  Ids ids;
  const uint8_t* mask = nullptr;

  Status check() const {
    DUALBIN_TRY(check_rows("rows", rows));
    DUALBIN_REQUIRE(width >= 1 && width <= kMaxPlanes * (kMaxDim / 8), Code::kInvalidArgument,
                    "width must be between 1 and 2^28, got %" PRId64, width);
    DUALBIN_TRY(check_data("bits", bits));
    DUALBIN_TRY(check_ids("ids", ids));
    return check_data("mask", mask, ids.count);
  }

  struct Given {
    Array bits;  // uint8 [V, W]
    Array ids;   // int32 or int64 [N]
    Array mask;  // uint8 [N, W]
  };

  static constexpr const char* kDoc = "bits[ids[n]] ^= mask[n] for distinct ids.";
  static constexpr auto arguments() {
    return std::make_tuple(changed("bits", &Given::bits), in("ids", &Given::ids), in("mask", &Given::mask));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(dualbin::read(given.bits, {kAny, kAny}, &bits));
    rows = given.bits.shape[0];
    width = given.bits.shape[1];
    DUALBIN_TRY(read_id_list(given.ids, &ids));
    return dualbin::read(given.mask, {ids.count, width}, &mask);
  }
};

}  // namespace dualbin
