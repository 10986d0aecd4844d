// Arrays as a framework hands them over, and the parts of which every operation (core/ops) reads its arguments. Everything that a call
// trusts about its memory is checked there, once, for all frontends: type, shape, and that the sizes of all arrays agree. What kind of
// object an array came from, where it lies and whether it is contiguous is the business of the bindings.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "core/checks.h"

namespace dualbin {

// Element types, those of foreign arrays included so that messages can name them: enumerator, name, bytes.
#define DUALBIN_ELEMENT_TYPES(X) \
  X(kBool, "bool", 1)            \
  X(kU8, "uint8", 1)             \
  X(kI8, "int8", 1)              \
  X(kU16, "uint16", 2)           \
  X(kI16, "int16", 2)            \
  X(kU32, "uint32", 4)           \
  X(kI32, "int32", 4)            \
  X(kU64, "uint64", 8)           \
  X(kI64, "int64", 8)            \
  X(kF16, "float16", 2)          \
  X(kBF16, "bfloat16", 2)        \
  X(kF32, "float32", 4)          \
  X(kF64, "float64", 8)          \
  X(kOther, "of another type", 1)

enum class ElementType : int {
#define DUALBIN_MEMBER(enumerator, name, bytes) enumerator,
  DUALBIN_ELEMENT_TYPES(DUALBIN_MEMBER)
#undef DUALBIN_MEMBER
};

const char* type_name(ElementType type);
int64_t element_bytes(ElementType type);

// A contiguous array. One without a name is absent.
struct Array {
  const char* name = nullptr;
  void* data = nullptr;
  ElementType type = ElementType::kOther;
  int rank = 0;
  const int64_t* shape = nullptr;
  int64_t size = 0;  // elements

  bool present() const { return name != nullptr; }
};

int64_t element_count(const int64_t* shape, int rank);

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

  ShapeText(const int64_t* shape, int rank);
  explicit ShapeText(const Array& array) : ShapeText(array.shape, array.rank) {}
};

Status check_present(const Array& array);
Status check_type(const Array& array, ElementType type);
Status check_shape(const Array& array, std::initializer_list<int64_t> shape);

template <typename T>
Status read(const Array& array, std::initializer_list<int64_t> shape, T** out) {
  DUALBIN_TRY(check_type(array, ElementOf<std::remove_const_t<T>>::value));
  DUALBIN_TRY(check_shape(array, shape));
  *out = static_cast<T*>(array.data);
  return {};
}

// An array that may be absent: `out` is then left as it is.
template <typename T>
Status read_optional(const Array& array, std::initializer_list<int64_t> shape, T** out) {
  return array.present() ? read(array, shape, out) : Status{};
}

// [rows, 1] or [rows].
template <typename T>
Status read_column(const Array& array, int64_t rows, T** out) {
  if (array.rank == 1) return read(array, {rows}, out);
  return read(array, {rows, 1}, out);
}

Status read_float_type(const Array& array, FloatType* type);
Status read_id_type(const Array& array, IdType* type);

// Ids of any shape, and ids [N].
Status read_ids(const Array& array, Ids* ids);
Status read_id_list(const Array& array, Ids* ids);

// dy [count, dim]; dim may be kAny.
Status read_gradient(const Array& dy, int64_t count, int64_t dim, Floats* floats);

// A struct of `bytes` bytes, aligned to `alignment`, as an array of its words.
Status check_words(const Array& array, size_t bytes, size_t alignment);

template <typename T>
Status read_words(const Array& array, T** out) {
  DUALBIN_TRY(check_words(array, sizeof(T), alignof(T)));
  *out = static_cast<T*>(array.data);
  return {};
}

// Planes of an array of packed rows: its width over that of one plane.
Status read_planes(const Array& bits, int64_t dim, int* planes);

// bits [V, planes * ceil(dim/8)], and with scale float32 [V, 1].
Status read_bits(const Array& bits, int64_t dim, Table* table);
Status read_table(const Array& bits, const Array& scale, int64_t dim, Table* table);

}  // namespace dualbin
