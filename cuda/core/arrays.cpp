#include "core/arrays.h"

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <type_traits>

#include "core/checks.h"

namespace dualbin {

namespace {

constexpr int64_t kAny = -1;  // of a dimension: free

template <typename T>
struct ElementOf;
template <>
struct ElementOf<uint8_t> {
  static constexpr ElementType value = ElementType::kU8;
};
template <>
struct ElementOf<int8_t> {
  static constexpr ElementType value = ElementType::kI8;
};
template <>
struct ElementOf<int32_t> {
  static constexpr ElementType value = ElementType::kI32;
};
template <>
struct ElementOf<int64_t> {
  static constexpr ElementType value = ElementType::kI64;
};
template <>
struct ElementOf<float> {
  static constexpr ElementType value = ElementType::kF32;
};

// "[3, 4]" in a fixed buffer; kAny is "*". Long shapes end in "...".
struct ShapeText {
  char text[80];

  ShapeText(const int64_t* shape, int rank) {
    size_t used = static_cast<size_t>(std::snprintf(text, sizeof(text), "["));
    for (int i = 0; i < rank; ++i) {
      const char* comma = i == 0 ? "" : ", ";
      if (used > sizeof(text) - 32) {
        used += static_cast<size_t>(std::snprintf(text + used, sizeof(text) - used, "%s...", comma));
        break;
      }
      used += static_cast<size_t>(shape[i] == kAny ? std::snprintf(text + used, sizeof(text) - used, "%s*", comma)
                                                   : std::snprintf(text + used, sizeof(text) - used, "%s%" PRId64, comma, shape[i]));
    }
    std::snprintf(text + used, sizeof(text) - used, "]");
  }
};

Status check_present(const Array& array) {
  DUALBIN_REQUIRE(array.size == 0 || array.data != nullptr, Code::kInvalidArgument, "%s must have memory, got an array without",
                  array.name);
  return {};
}

Status check_type(const Array& array, ElementType type) {
  DUALBIN_REQUIRE(array.type == type, Code::kWrongType, "%s must be %s, got %s", array.name, type_name(type), type_name(array.type));
  return check_present(array);
}

Status check_shape(const Array& array, std::initializer_list<int64_t> shape) {
  bool same = array.rank == static_cast<int>(shape.size());
  for (int i = 0; same && i < array.rank; ++i) same = shape.begin()[i] == kAny || shape.begin()[i] == array.shape[i];
  DUALBIN_REQUIRE(same, Code::kInvalidArgument, "%s must have shape %s, got %s", array.name,
                  ShapeText(shape.begin(), static_cast<int>(shape.size())).text, ShapeText(array.shape, array.rank).text);
  return {};
}

template <typename T>
Status read(const Array& array, std::initializer_list<int64_t> shape, T** out) {
  DUALBIN_TRY(check_type(array, ElementOf<std::remove_const_t<T>>::value));
  DUALBIN_TRY(check_shape(array, shape));
  *out = static_cast<T*>(array.data);
  return {};
}

// float32 [rows, 1] or [rows].
template <typename T>
Status read_column(const Array& array, int64_t rows, T** out) {
  if (array.rank == 1) return read(array, {rows}, out);
  return read(array, {rows, 1}, out);
}

Status read_float_type(const Array& array, FloatType* type) {
  DUALBIN_TRY(check_present(array));
  switch (array.type) {
    case ElementType::kF32:
      *type = FloatType::kF32;
      return {};
    case ElementType::kF16:
      *type = FloatType::kF16;
      return {};
    case ElementType::kBF16:
      *type = FloatType::kBF16;
      return {};
    default:
      return DUALBIN_ERROR(Code::kWrongType, "%s must be float32, float16 or bfloat16, got %s", array.name, type_name(array.type));
  }
}

Status read_id_type(const Array& array, IdType* type) {
  DUALBIN_TRY(check_present(array));
  DUALBIN_REQUIRE(array.type == ElementType::kI32 || array.type == ElementType::kI64, Code::kWrongType, "%s must be int32 or int64, got %s",
                  array.name, type_name(array.type));
  *type = array.type == ElementType::kI32 ? IdType::kI32 : IdType::kI64;
  return {};
}

// Ids of any shape.
Status read_ids(const Array& array, Ids* ids) {
  *ids = {array.data, IdType::kI64, array.size};
  return read_id_type(array, &ids->type);
}

// Ids [N].
Status read_id_list(const Array& array, Ids* ids) {
  DUALBIN_TRY(read_ids(array, ids));
  return check_shape(array, {kAny});
}

Status read_gradient(const Array& dy, int64_t count, int64_t dim, Floats* floats) {
  floats->data = dy.data;
  DUALBIN_TRY(read_float_type(dy, &floats->type));
  DUALBIN_TRY(check_shape(dy, {count, dim}));
  DUALBIN_REQUIRE(dy.shape[1] >= 1 && dy.shape[1] <= kMaxDim, Code::kInvalidArgument,
                  "%s must have between 1 and 2^28 columns, got %" PRId64, dy.name, dy.shape[1]);
  return {};
}

// A struct of `bytes` bytes as an array of its words.
template <typename T>
Status read_words(const Array& array, T** out) {
  const bool words = array.type == ElementType::kU32 || array.type == ElementType::kI32 || array.type == ElementType::kU64 ||
                     array.type == ElementType::kI64;
  const auto bytes = static_cast<int64_t>(sizeof(T));
  DUALBIN_REQUIRE(words, Code::kWrongType, "%s must hold integers of 32 or 64 bits, got %s", array.name, type_name(array.type));
  DUALBIN_REQUIRE(array.rank == 1 && array.size * element_bytes(array.type) == bytes, Code::kInvalidArgument,
                  "%s must have %" PRId64 " words of 32 bits or %" PRId64 " of 64, got %s of shape %s", array.name, bytes / 4, bytes / 8,
                  type_name(array.type), ShapeText(array.shape, array.rank).text);
  DUALBIN_TRY(check_present(array));
  DUALBIN_REQUIRE(reinterpret_cast<uintptr_t>(array.data) % alignof(T) == 0, Code::kInvalidArgument, "%s must be aligned to %zu bytes",
                  array.name, alignof(T));
  *out = static_cast<T*>(array.data);
  return {};
}

// Planes of an array of packed rows: its width over that of one plane.
Status read_planes(const Array& bits, int64_t dim, int* planes) {
  DUALBIN_TRY(check_dim(dim));
  DUALBIN_TRY(check_type(bits, ElementType::kU8));
  const int64_t width = (dim + 7) / 8;
  const int64_t columns = bits.rank == 2 && bits.shape[0] >= 1 ? bits.shape[1] : 0;
  DUALBIN_REQUIRE(columns > 0 && columns % width == 0 && columns / width <= kMaxPlanes, Code::kInvalidArgument,
                  "%s must have shape [V, planes * %" PRId64 "] with V >= 1 and 1 to %d planes for dim %" PRId64 ", got %s", bits.name,
                  width, kMaxPlanes, dim, ShapeText(bits.shape, bits.rank).text);
  *planes = static_cast<int>(columns / width);
  return {};
}

Status read_bits(const Array& bits, int64_t dim, Table* table) {
  DUALBIN_TRY(read_planes(bits, dim, &table->planes));
  table->dim = dim;
  table->bits = static_cast<uint8_t*>(bits.data);
  table->rows = bits.shape[0];
  return {};
}

Status read_table(const Array& bits, const Array& scale, int64_t dim, Table* table) {
  DUALBIN_TRY(read_bits(bits, dim, table));
  return read_column(scale, table->rows, &table->scale);
}

// ids [N] and offsets [G + 1].
Status read_bags(const Array& ids, const Array& offsets, BagMode mode, int64_t padding_idx, Bags* bags) {
  DUALBIN_TRY(read_id_list(ids, &bags->ids));
  DUALBIN_TRY(read_id_list(offsets, &bags->offsets));
  DUALBIN_REQUIRE(offsets.size >= 1, Code::kInvalidArgument, "offsets must have shape [G + 1], one more than there are bags, got [0]");
  bags->mode = mode;
  bags->padding_idx = padding_idx;
  return {};
}

template <typename T>
Status read_state(const Array& array, PerRow per_row, const Table& table, const Rule& rule, T** out) {
  if (!array.present()) return {};
  switch (per_row) {
    case PerRow::kOne:
      return read(array, {table.rows}, out);
    case PerRow::kColumns:
      return read(array, {table.rows, table.dim}, out);
    case PerRow::kPlanes:
      return read(array, {table.rows, rule.kind == RuleKind::kCounter ? std::max(0, rule.bits - table.planes) * table.width() : 0}, out);
    case PerRow::kRecord:
      return read(array, {table.rows, 4}, out);
  }
  return {};
}

}  // namespace

const char* type_name(ElementType type) {
  switch (type) {
#define DUALBIN_CASE(enumerator, name, bytes) \
  case ElementType::enumerator:               \
    return name;
    DUALBIN_ELEMENT_TYPES(DUALBIN_CASE)
#undef DUALBIN_CASE
  }
  return "of another type";
}

int64_t element_bytes(ElementType type) {
  switch (type) {
#define DUALBIN_CASE(enumerator, name, bytes) \
  case ElementType::enumerator:               \
    return bytes;
    DUALBIN_ELEMENT_TYPES(DUALBIN_CASE)
#undef DUALBIN_CASE
  }
  return 1;
}

int64_t element_count(const int64_t* shape, int rank) {
  int64_t count = 1;
  for (int i = 0; i < rank; ++i) {
    if (shape[i] == 0) return 0;
    count = shape[i] > INT64_MAX / count ? INT64_MAX : count * shape[i];
  }
  return count;
}

Status read_pack(const Array& w, const Array& bits, const Array& scale, PackCall* call) {
  *call = {};
  DUALBIN_TRY(read_float_type(w, &call->w.type));
  DUALBIN_REQUIRE(w.rank == 2 && w.size > 0, Code::kInvalidArgument, "w must have shape [V, D] with V and D at least 1, got %s",
                  ShapeText(w.shape, w.rank).text);
  call->w.data = w.data;
  call->rows = w.shape[0];
  call->dim = w.shape[1];
  DUALBIN_TRY(check_dim(call->dim));
  DUALBIN_TRY(read_planes(bits, call->dim, &call->planes));
  DUALBIN_TRY(read(bits, {call->rows, kAny}, &call->bits));
  return scale.present() ? read_column(scale, call->rows, &call->scale) : Status{};
}

Status read_unpack(const Array& bits, int64_t dim, const Array& out, UnpackCall* call) {
  *call = {};
  DUALBIN_TRY(read_bits(bits, dim, &call->table));
  DUALBIN_TRY(check_type(out, call->table.planes == 1 ? ElementType::kI8 : ElementType::kI16));
  DUALBIN_TRY(check_shape(out, {call->table.rows, dim}));
  call->out = out.data;
  return {};
}

Status read_fewer_planes(const Array& bits, const Array& scale, int64_t dim, const Array& out_bits, const Array& out_scale,
                         FewerCall* call) {
  *call = {};
  DUALBIN_TRY(read_table(bits, scale, dim, &call->table));
  DUALBIN_TRY(read_planes(out_bits, dim, &call->fewer));
  DUALBIN_TRY(read(out_bits, {call->table.rows, kAny}, &call->bits));
  if (out_scale.present()) DUALBIN_TRY(read_column(out_scale, call->table.rows, &call->scale));
  return check_fewer_planes(call->table, call->fewer, call->bits);
}

Status read_lookup(const Array& bits, const Array& scale, int64_t dim, const Array& ids, const Array& out, LookupCall* call) {
  *call = {};
  DUALBIN_TRY(read_table(bits, scale, dim, &call->table));
  DUALBIN_TRY(read_ids(ids, &call->ids));
  DUALBIN_TRY(read_float_type(out, &call->type));
  bool fits = out.rank == ids.rank + 1 && out.shape[ids.rank] == dim;
  for (int i = 0; fits && i < ids.rank; ++i) fits = out.shape[i] == ids.shape[i];
  DUALBIN_REQUIRE(fits, Code::kInvalidArgument, "out must have the shape of ids, %s, and then dim, %" PRId64 ", got %s",
                  ShapeText(ids.shape, ids.rank).text, dim, ShapeText(out.shape, out.rank).text);
  call->out = out.data;
  return {};
}

Status read_lookup_bag(const Array& bits, const Array& scale, int64_t dim, const Array& ids, const Array& offsets, const Array& weights,
                       BagMode mode, int64_t padding_idx, const Array& out, BagCall* call) {
  *call = {};
  DUALBIN_TRY(read_table(bits, scale, dim, &call->table));
  DUALBIN_TRY(read_bags(ids, offsets, mode, padding_idx, &call->bags));
  if (weights.present()) DUALBIN_TRY(read(weights, {ids.size}, &call->bags.weights));
  DUALBIN_TRY(read_float_type(out, &call->type));
  DUALBIN_TRY(check_shape(out, {call->bags.count(), dim}));
  call->out = out.data;
  return {};
}

Status read_bag_counts(const Array& scale, const Array& ids, const Array& offsets, int64_t padding_idx, const Array& out,
                       BagCountsCall* call) {
  *call = {};
  DUALBIN_REQUIRE(scale.size >= 1, Code::kInvalidArgument, "scale must have shape [V, 1] with V >= 1, got %s",
                  ShapeText(scale.shape, scale.rank).text);
  call->rows = scale.size;
  DUALBIN_TRY(read_column(scale, call->rows, &call->scale));
  DUALBIN_TRY(read_bags(ids, offsets, BagMode::kSum, padding_idx, &call->bags));
  return read(out, {call->bags.count()}, &call->out);
}

Status read_bag_gradient(const Array& ids, const Array& offsets, const Array& dy, BagMode mode, const Array& counts, const Array& weights,
                         int64_t padding_idx, const Array& out, BagGradientCall* call) {
  *call = {};
  DUALBIN_TRY(read_bags(ids, offsets, mode, padding_idx, &call->bags));
  DUALBIN_TRY(read_gradient(dy, call->bags.count(), kAny, &call->dy));
  call->dim = dy.shape[1];
  if (counts.present()) DUALBIN_TRY(read(counts, {call->bags.count()}, &call->counts));
  if (weights.present()) DUALBIN_TRY(read(weights, {ids.size}, &call->bags.weights));
  FloatType type;
  DUALBIN_TRY(read_float_type(out, &type));
  DUALBIN_REQUIRE(type == call->dy.type, Code::kWrongType, "%s must be %s as dy is, got %s", out.name, type_name(dy.type),
                  type_name(out.type));
  DUALBIN_TRY(check_shape(out, {ids.size, call->dim}));
  call->out = out.data;
  return {};
}

Status read_bag_weight_gradient(const Array& bits, const Array& scale, const Array& ids, const Array& offsets, const Array& dy,
                                int64_t padding_idx, const Array& out, BagWeightGradientCall* call) {
  *call = {};
  DUALBIN_TRY(read_bags(ids, offsets, BagMode::kSum, padding_idx, &call->bags));
  DUALBIN_TRY(read_gradient(dy, call->bags.count(), kAny, &call->dy));
  DUALBIN_TRY(read_table(bits, scale, dy.shape[1], &call->table));
  return read(out, {ids.size}, &call->out);
}

Status read_reduce_rows(const Array& ids, const Array& dy, int64_t rows, const Array& out_ids, const Array& out_rows,
                        const Array& out_count, ReduceCall* call) {
  *call = {};
  DUALBIN_TRY(read_id_list(ids, &call->ids));
  DUALBIN_TRY(check_rows("rows", rows));
  call->rows = rows;
  DUALBIN_TRY(read_gradient(dy, ids.size, kAny, &call->dy));
  call->dim = dy.shape[1];
  DUALBIN_TRY(read_id_type(out_ids, &call->out.ids_type));
  DUALBIN_TRY(check_shape(out_ids, {kAny}));
  DUALBIN_REQUIRE(call->out.ids_type == IdType::kI64 || rows <= INT32_MAX, Code::kInvalidArgument,
                  "out_ids must be int64 for a table of %" PRId64 " rows, got int32", rows);
  call->out.ids = out_ids.data;
  call->out.capacity = out_ids.size;
  DUALBIN_TRY(read(out_rows, {out_ids.size, call->dim}, &call->out.rows));
  DUALBIN_TRY(read_id_type(out_count, &call->out.count_type));
  DUALBIN_TRY(check_shape(out_count, {1}));
  call->out.count = out_count.data;
  return {};
}

Status read_segment_sum(const Array& slots, const Array& dy, const Array& out, SegmentCall* call) {
  *call = {};
  DUALBIN_TRY(read_id_list(slots, &call->slots));
  DUALBIN_TRY(read_gradient(dy, slots.size, kAny, &call->dy));
  call->dim = dy.shape[1];
  DUALBIN_TRY(read(out, {kAny, call->dim}, &call->out));
  call->segments = out.shape[0];
  return {};
}

Status read_update(const UpdateArrays& arrays, const Rule& rule, int64_t dim, UpdateCall* call) {
  *call = {};
  call->rule = rule;
  Table& table = call->table;
  DUALBIN_TRY(read_table(arrays.bits, arrays.scale, dim, &table));
  const Array* array = arrays.state;
#define DUALBIN_READ(name, type, per_row) DUALBIN_TRY(read_state(*array++, per_row, table, rule, &call->state.name));
  DUALBIN_STATE_ARRAYS(DUALBIN_READ)
#undef DUALBIN_READ
  DUALBIN_TRY(read_words(arrays.context, &call->context));
  DUALBIN_TRY(read_id_list(arrays.ids, &call->ids));
  DUALBIN_TRY(read_gradient(arrays.dy, call->ids.count, dim, &call->dy));
  DUALBIN_REQUIRE(arrays.mask.present() == arrays.new_scale.present(), Code::kInvalidArgument,
                  "mask and new_scale are given together or not at all");
  if (arrays.mask.present()) {
    DUALBIN_TRY(read(arrays.mask, {call->ids.count, table.row_bytes()}, &call->out.mask));
    DUALBIN_TRY(read_column(arrays.new_scale, call->ids.count, &call->out.new_scale));
  }
  if (arrays.stats.present()) DUALBIN_TRY(read_words(arrays.stats, &call->out.stats));
  return check_update(table, call->state, rule, call->context, call->ids, call->dy, call->out);
}

Status read_step(const Array& step, int64_t** count) { return read(step, {}, count); }

Status read_xor_rows(const Array& bits, const Array& ids, const Array& mask, XorCall* call) {
  *call = {};
  DUALBIN_TRY(read(bits, {kAny, kAny}, &call->bits));
  call->rows = bits.shape[0];
  call->width = bits.shape[1];
  DUALBIN_TRY(read_id_list(ids, &call->ids));
  DUALBIN_TRY(read(mask, {ids.size, call->width}, &call->mask));
  return check_xor_rows(call->bits, call->rows, call->width, call->ids, call->mask);
}

Status read_average(const Array& bits_a, const Array& scale_a, const Array& bits_b, const Array& scale_b, int64_t dim, const Array& context,
                    const Array& bits, const Array& scale, AverageCall* call) {
  *call = {};
  DUALBIN_TRY(read_table(bits_a, scale_a, dim, &call->a));
  DUALBIN_TRY(read_table(bits_b, scale_b, dim, &call->b));
  DUALBIN_TRY(read_table(bits, scale, dim, &call->out));
  DUALBIN_TRY(read_words(context, &call->context));
  return check_average(call->a, call->b, call->context, call->out);
}

}  // namespace dualbin
