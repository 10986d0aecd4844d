// How an operation says what it is called with: a tuple of these in `arguments()` of its struct (core/ops), in the order of
// dualbin._native. From it the bindings make the Python function and the XLA target, whose attributes, operands and results keep this order
// among themselves.
#pragma once

#include <type_traits>

#include "core/arrays.h"

namespace dualbin {

// kChanged: in Python an array that is written, in XLA an operand whose memory the result takes.
enum class Use { kIn, kOut, kChanged };

#if defined(__CUDACC__)  // nvcc hands pointers to members to the host compiler with parentheses of its own
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wparentheses"
#endif

template <typename Given, Use use_of, bool may_lack>
struct ArrayArgument {
  static constexpr Use use = use_of;
  static constexpr bool optional = may_lack;  // None in Python; announced by a bit of the attribute `given` in XLA
  const char* name;
  Array Given::* member;
};

// kDefault: with the value that it has in Given. kAttribute: in XLA alone; in Python it keeps that value.
enum class Numbers { kRequired, kDefault, kAttribute };

template <typename Given, typename T, Numbers kind_of>
struct NumberArgument {
  static constexpr Numbers kind = kind_of;
  const char* name;
  T Given::* member;
};

#if defined(__CUDACC__)
#pragma GCC diagnostic pop
#endif

template <typename Given>
constexpr ArrayArgument<Given, Use::kIn, false> in(const char* name, Array Given::* member) {
  return {name, member};
}
template <typename Given>
constexpr ArrayArgument<Given, Use::kIn, true> in_optional(const char* name, Array Given::* member) {
  return {name, member};
}
template <typename Given>
constexpr ArrayArgument<Given, Use::kOut, false> out(const char* name, Array Given::* member) {
  return {name, member};
}
template <typename Given>
constexpr ArrayArgument<Given, Use::kOut, true> out_optional(const char* name, Array Given::* member) {
  return {name, member};
}
template <typename Given>
constexpr ArrayArgument<Given, Use::kChanged, false> changed(const char* name, Array Given::* member) {
  return {name, member};
}
template <typename Given, typename T>
constexpr NumberArgument<Given, T, Numbers::kRequired> number(const char* name, T Given::* member) {
  return {name, member};
}
template <typename Given, typename T>
constexpr NumberArgument<Given, T, Numbers::kDefault> number_or_default(const char* name, T Given::* member) {
  return {name, member};
}
template <typename Given, typename T>
constexpr NumberArgument<Given, T, Numbers::kAttribute> attribute(const char* name, T Given::* member) {
  return {name, member};
}

// What an operation asks Backend::workspace_bytes for.
struct Work {
  Op op;
  int64_t count;
  int64_t rows;
  int64_t dim;
};

// Whether an operation needs a workspace: `Work work() const` of its struct.
template <typename Operation, typename = void>
constexpr bool has_work = false;
template <typename Operation>
constexpr bool has_work<Operation, std::void_t<decltype(&Operation::work)>> = true;

}  // namespace dualbin
