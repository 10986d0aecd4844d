#include "core/arrays.h"

#include <cstdio>

namespace dualbin {

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

ShapeText::ShapeText(const int64_t* shape, int rank) {
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
                  ShapeText(shape.begin(), static_cast<int>(shape.size())).text, ShapeText(array).text);
  return {};
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

Status read_ids(const Array& array, Ids* ids) {
  *ids = {array.data, IdType::kI64, array.size};
  return read_id_type(array, &ids->type);
}

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

Status check_words(const Array& array, size_t bytes, size_t alignment) {
  const bool words = array.type == ElementType::kU32 || array.type == ElementType::kI32 || array.type == ElementType::kU64 ||
                     array.type == ElementType::kI64;
  DUALBIN_REQUIRE(words, Code::kWrongType, "%s must hold integers of 32 or 64 bits, got %s", array.name, type_name(array.type));
  DUALBIN_REQUIRE(array.rank == 1 && array.size * element_bytes(array.type) == static_cast<int64_t>(bytes), Code::kInvalidArgument,
                  "%s must have %zu words of 32 bits or %zu of 64, got %s of shape %s", array.name, bytes / 4, bytes / 8,
                  type_name(array.type), ShapeText(array).text);
  DUALBIN_TRY(check_present(array));
  DUALBIN_REQUIRE(reinterpret_cast<uintptr_t>(array.data) % alignment == 0, Code::kInvalidArgument, "%s must be aligned to %zu bytes",
                  array.name, alignment);
  return {};
}

Status read_planes(const Array& bits, int64_t dim, int* planes) {
  DUALBIN_TRY(check_dim(dim));
  DUALBIN_TRY(check_type(bits, ElementType::kU8));
  const int64_t width = (dim + 7) / 8;
  const int64_t columns = bits.rank == 2 && bits.shape[0] >= 1 ? bits.shape[1] : 0;
  DUALBIN_REQUIRE(columns > 0 && columns % width == 0 && columns / width <= kMaxPlanes, Code::kInvalidArgument,
                  "%s must have shape [V, planes * %" PRId64 "] with V >= 1 and 1 to %d planes for dim %" PRId64 ", got %s", bits.name,
                  width, kMaxPlanes, dim, ShapeText(bits).text);
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

}  // namespace dualbin
