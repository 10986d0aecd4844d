// Floats to planes, planes to integers, and fewer planes of a table.
#pragma once

#include <tuple>

#include "core/arguments.h"

namespace dualbin {

// w [rows, dim] -> bits, and scale where it is not null. NaN (with a scale or more than one plane: infinity too) is an error on the CPU and
// undefined on CUDA.
struct PackCall {
  Floats w;
  int64_t rows = 0;
  int64_t dim = 0;
  int planes = 1;
  uint8_t* bits = nullptr;
  float* scale = nullptr;

  Status check() const {
    DUALBIN_TRY(check_rows("rows", rows));
    DUALBIN_TRY(check_dim(dim));
    DUALBIN_TRY(check_planes(planes));
    DUALBIN_TRY(check_floats("w", w.data, w.type, 1));
    return check_data("bits", bits);
  }

  struct Given {
    Array w;      // float32, float16 or bfloat16 [V, D]
    Array bits;   // uint8 [V, planes * B], B = ceil(D/8)
    Array scale;  // float32 [V, 1], or absent
  };

  static constexpr const char* kDoc =
      "Packed planes of w [V, D], as many as bits has room for, and where scale is given the scale of every row.";
  static constexpr auto arguments() {
    return std::make_tuple(in("w", &Given::w), out("bits", &Given::bits), out_optional("scale", &Given::scale));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(read_float_type(given.w, &w.type));
    DUALBIN_REQUIRE(given.w.rank == 2 && given.w.size > 0, Code::kInvalidArgument,
                    "w must have shape [V, D] with V and D at least 1, got %s", ShapeText(given.w).text);
    w.data = given.w.data;
    rows = given.w.shape[0];
    dim = given.w.shape[1];
    DUALBIN_TRY(check_dim(dim));
    DUALBIN_TRY(read_planes(given.bits, dim, &planes));
    DUALBIN_TRY(dualbin::read(given.bits, {rows, kAny}, &bits));
    return given.scale.present() ? read_column(given.scale, rows, &scale) : Status{};
  }
};

// Bits of a table -> int8 +1/-1 [rows, dim]; of more than one plane int16 s * (2m + 1). The table needs no scale.
struct UnpackCall {
  Table table;
  void* out = nullptr;

  Status check() const {
    DUALBIN_TRY(check_rows("rows", table.rows));
    DUALBIN_TRY(check_dim(table.dim));
    DUALBIN_TRY(check_planes(table.planes));
    DUALBIN_TRY(check_data("bits", table.bits));
    return check_data("out", out);
  }

  struct Given {
    Array bits;  // uint8 [V, planes * B]
    int64_t dim = 0;
    Array out;  // int8 [V, D], of more than one plane int16
  };

  static constexpr const char* kDoc = "int8 +1/-1 of packed rows; int16 s * (2m + 1) of rows of more than one plane.";
  static constexpr auto arguments() {
    return std::make_tuple(in("bits", &Given::bits), number("dim", &Given::dim), dualbin::out("out", &Given::out));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(read_bits(given.bits, given.dim, &table));
    DUALBIN_TRY(check_type(given.out, table.planes == 1 ? ElementType::kI8 : ElementType::kI16));
    DUALBIN_TRY(check_shape(given.out, {table.rows, table.dim}));
    out = given.out.data;
    return {};
  }
};

// The top `fewer` planes of a table into bits [rows, fewer * width], and where `scale` is not null the scales of least squared error.
struct FewerPlanesCall {
  Table table;
  int fewer = 1;
  uint8_t* bits = nullptr;
  float* scale = nullptr;

  Status check() const {
    DUALBIN_TRY(check_table(table));
    DUALBIN_REQUIRE(fewer >= 1 && fewer <= table.planes, Code::kInvalidArgument, "fewer must be 1 to the planes of the table, %d, got %d",
                    table.planes, fewer);
    return check_data("out_bits", bits);
  }

  struct Given {
    Array bits;   // uint8 [V, planes * B]
    Array scale;  // float32 [V, 1]
    int64_t dim = 0;
    Array out_bits;   // uint8 [V, fewer * B]
    Array out_scale;  // float32 [V, 1], or absent: the scales stay as they are
  };

  static constexpr const char* kDoc = "The top planes of a table, and where out_scale is given their scales of least squared error.";
  static constexpr auto arguments() {
    return std::make_tuple(in("bits", &Given::bits), in("scale", &Given::scale), number("dim", &Given::dim),
                           out("out_bits", &Given::out_bits), out_optional("out_scale", &Given::out_scale));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(read_table(given.bits, given.scale, given.dim, &table));
    DUALBIN_TRY(read_planes(given.out_bits, given.dim, &fewer));
    DUALBIN_TRY(dualbin::read(given.out_bits, {table.rows, kAny}, &bits));
    return given.out_scale.present() ? read_column(given.out_scale, table.rows, &scale) : Status{};
  }
};

}  // namespace dualbin
