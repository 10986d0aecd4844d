// Lookup of bags and its gradients.
#pragma once

#include <tuple>

#include "core/arguments.h"

namespace dualbin {

inline Status check_bags(const Bags& bags) {
  DUALBIN_TRY(check_ids("ids", bags.ids));
  DUALBIN_REQUIRE(bags.offsets.count >= 1, Code::kInvalidArgument, "offsets must have one element more than there are bags, got %" PRId64,
                  bags.offsets.count);
  DUALBIN_TRY(check_ids("offsets", bags.offsets));
  DUALBIN_TRY(check_code("mode", static_cast<int>(bags.mode), 3, "sum, mean or majority"));
  DUALBIN_REQUIRE(bags.weights == nullptr || bags.mode == BagMode::kSum, Code::kInvalidArgument, "weights need the mode sum");
  DUALBIN_REQUIRE(bags.padding_idx >= -1, Code::kInvalidArgument, "padding_idx must be an id, or -1 for none, got %" PRId64,
                  bags.padding_idx);
  return {};
}

// Of offsets in host memory: that they ascend within [0, ids].
inline Status check_offsets(const Bags& bags) {
  int64_t before = 0;
  for (int64_t g = 0; g <= bags.count(); ++g) {
    const int64_t offset = id_at(bags.offsets, g);
    DUALBIN_REQUIRE(offset >= before && offset <= bags.ids.count, Code::kInvalidArgument,
                    "offsets must ascend from 0 to at most the %" PRId64 " ids, got %" PRId64 " at position %" PRId64, bags.ids.count,
                    offset, g);
    before = offset;
  }
  return {};
}

// ids [N] and offsets [G + 1].
inline Status read_bags(const Array& ids, const Array& offsets, int64_t padding_idx, Bags* bags) {
  DUALBIN_TRY(read_id_list(ids, &bags->ids));
  DUALBIN_TRY(read_id_list(offsets, &bags->offsets));
  DUALBIN_REQUIRE(offsets.size >= 1, Code::kInvalidArgument, "offsets must have shape [G + 1], one more than there are bags, got [0]");
  bags->padding_idx = padding_idx;
  return {};
}

// out [bags.count(), dim] of type `type`.
struct LookupBagCall {
  Table table;
  Bags bags;
  BadIds bad_ids = BadIds::kReport;
  void* out = nullptr;
  FloatType type = FloatType::kF32;

  Status check() const {
    DUALBIN_TRY(check_table(table));
    DUALBIN_TRY(check_bags(bags));
    DUALBIN_REQUIRE(bags.mode != BagMode::kMajority || table.planes == 1, Code::kInvalidArgument,
                    "mode must be sum or mean for a table of %d planes: majority votes by one plane", table.planes);
    return check_floats("out", out, type, bags.count());
  }

  struct Given {
    Array bits;   // uint8 [V, planes * B], B = ceil(D/8)
    Array scale;  // float32 [V, 1]
    int64_t dim = 0;
    Array ids;      // int32 or int64 [N]
    Array offsets;  // int32 or int64 [G + 1]
    Array weights;  // float32 [N], or absent
    BagMode mode = BagMode::kSum;
    Array out;  // float32, float16 or bfloat16 [G, D]
    int64_t padding_idx = -1;
    BadIds bad_ids = BadIds::kReport;
  };

  static constexpr const char* kDoc = "Sum, mean or majority of the rows of every bag.";
  static constexpr auto arguments() {
    return std::make_tuple(in("bits", &Given::bits), in("scale", &Given::scale), number("dim", &Given::dim), in("ids", &Given::ids),
                           in("offsets", &Given::offsets), in_optional("weights", &Given::weights), number("mode", &Given::mode),
                           dualbin::out("out", &Given::out), number_or_default("padding_idx", &Given::padding_idx),
                           attribute("bad_ids", &Given::bad_ids));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(read_table(given.bits, given.scale, given.dim, &table));
    DUALBIN_TRY(read_bags(given.ids, given.offsets, given.padding_idx, &bags));
    bags.mode = given.mode;
    DUALBIN_TRY(read_optional(given.weights, {bags.ids.count}, &bags.weights));
    DUALBIN_TRY(read_float_type(given.out, &type));
    DUALBIN_TRY(check_shape(given.out, {bags.count(), table.dim}));
    out = given.out.data;
    bad_ids = given.bad_ids;
    return {};
  }
};

// scale [rows] -> out [bags.count()]: the rows of every bag that are in the table and not padding.
struct BagCountsCall {
  const float* scale = nullptr;
  int64_t rows = 0;
  Bags bags;
  int32_t* out = nullptr;

  Status check() const {
    DUALBIN_TRY(check_rows("rows", rows));
    DUALBIN_TRY(check_data("scale", scale));
    DUALBIN_TRY(check_bags(bags));
    return check_data("out", out, bags.count());
  }

  struct Given {
    Array scale;    // float32 [V, 1]
    Array ids;      // int32 or int64 [N]
    Array offsets;  // int32 or int64 [G + 1]
    Array out;      // int32 [G]
    int64_t padding_idx = -1;
  };

  static constexpr const char* kDoc = "The number of rows of every bag that are in the table and not padding.";
  static constexpr auto arguments() {
    return std::make_tuple(in("scale", &Given::scale), in("ids", &Given::ids), in("offsets", &Given::offsets),
                           dualbin::out("out", &Given::out), number_or_default("padding_idx", &Given::padding_idx));
  }

  Status read(const Given& given) {
    DUALBIN_REQUIRE(given.scale.size >= 1, Code::kInvalidArgument, "scale must have shape [V, 1] with V >= 1, got %s",
                    ShapeText(given.scale).text);
    rows = given.scale.size;
    DUALBIN_TRY(read_column(given.scale, rows, &scale));
    DUALBIN_TRY(read_bags(given.ids, given.offsets, given.padding_idx, &bags));
    return dualbin::read(given.out, {bags.count()}, &out);
  }
};

// The gradient of lookup_bag: dy [bags.count(), dim] -> out [bags.ids.count, dim] of the type of dy. `counts` [bags.count()] with the mode
// mean, else null.
struct BagGradientCall {
  Bags bags;
  Floats dy;
  int64_t dim = 0;
  const int32_t* counts = nullptr;
  void* out = nullptr;

  Status check() const {
    DUALBIN_TRY(check_dim(dim));
    DUALBIN_TRY(check_bags(bags));
    DUALBIN_TRY(check_floats("dy", dy.data, dy.type, bags.count()));
    DUALBIN_REQUIRE(bags.count() == 0 || (counts != nullptr) == (bags.mode == BagMode::kMean), Code::kInvalidArgument,
                    "counts are given with the mode mean, and with no other");
    return check_data("out", out, bags.ids.count);
  }

  struct Given {
    Array ids;      // int32 or int64 [N]
    Array offsets;  // int32 or int64 [G + 1]
    Array dy;       // float32, float16 or bfloat16 [G, D]
    BagMode mode = BagMode::kSum;
    Array out;      // [N, D] of the type of dy
    Array counts;   // int32 [G], or absent
    Array weights;  // float32 [N], or absent
    int64_t padding_idx = -1;
  };

  static constexpr const char* kDoc = "What every row of every bag gets of dy.";
  static constexpr auto arguments() {
    return std::make_tuple(in("ids", &Given::ids), in("offsets", &Given::offsets), in("dy", &Given::dy), number("mode", &Given::mode),
                           dualbin::out("out", &Given::out), in_optional("counts", &Given::counts), in_optional("weights", &Given::weights),
                           number_or_default("padding_idx", &Given::padding_idx));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(read_bags(given.ids, given.offsets, given.padding_idx, &bags));
    bags.mode = given.mode;
    DUALBIN_TRY(read_gradient(given.dy, bags.count(), kAny, &dy));
    dim = given.dy.shape[1];
    DUALBIN_TRY(read_optional(given.counts, {bags.count()}, &counts));
    DUALBIN_TRY(read_optional(given.weights, {bags.ids.count}, &bags.weights));
    FloatType type;
    DUALBIN_TRY(read_float_type(given.out, &type));
    DUALBIN_REQUIRE(type == dy.type, Code::kWrongType, "%s must be %s as dy is, got %s", given.out.name, type_name(given.dy.type),
                    type_name(given.out.type));
    DUALBIN_TRY(check_shape(given.out, {bags.ids.count, dim}));
    out = given.out.data;
    return {};
  }
};

// The gradient of lookup_bag with respect to its weights: dy [bags.count(), table.dim] -> out [bags.ids.count].
struct BagWeightGradientCall {
  Table table;
  Bags bags;
  Floats dy;
  float* out = nullptr;

  Status check() const {
    DUALBIN_TRY(check_table(table));
    DUALBIN_TRY(check_bags(bags));
    DUALBIN_TRY(check_floats("dy", dy.data, dy.type, bags.count()));
    return check_data("out", out, bags.ids.count);
  }

  struct Given {
    Array bits;     // uint8 [V, planes * B], B = ceil(D/8)
    Array scale;    // float32 [V, 1]
    Array ids;      // int32 or int64 [N]
    Array offsets;  // int32 or int64 [G + 1]
    Array dy;       // float32, float16 or bfloat16 [G, D]
    Array out;      // float32 [N]
    int64_t padding_idx = -1;
  };

  static constexpr const char* kDoc = "What every weight of every bag gets of dy.";
  static constexpr auto arguments() {
    return std::make_tuple(in("bits", &Given::bits), in("scale", &Given::scale), in("ids", &Given::ids), in("offsets", &Given::offsets),
                           in("dy", &Given::dy), dualbin::out("out", &Given::out), number_or_default("padding_idx", &Given::padding_idx));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(read_bags(given.ids, given.offsets, given.padding_idx, &bags));
    DUALBIN_TRY(read_gradient(given.dy, bags.count(), kAny, &dy));
    DUALBIN_TRY(read_table(given.bits, given.scale, given.dy.shape[1], &table));
    return dualbin::read(given.out, {bags.ids.count}, &out);
  }
};

}  // namespace dualbin
