// An XLA FFI target made of what an operation says of its arguments (core/arguments.h): numbers are attributes, arrays that it reads are
// operands, those that it writes results, each in their order; one that is changed is both, and aliased. Operands that may be absent are
// announced by the attribute `given`, bit k for the k-th of them. A workspace is the last result.
//
// A `Context` says where a call runs: backend(), executor(), launch(bytes, buffer, bytes of the buffer, &launch), and what becomes of
// results before anything is written to them: expect_writes(array).
#pragma once

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "bindings/xla_buffers.h"

namespace dualbin::bindings {

// Hands the operands, results and attributes of a call to its arguments, one after the other, and keeps the first error.
template <typename Given>
class Taker {
 public:
  Taker(const ffi::RemainingArgs& operands, const ffi::RemainingRets& results, const ffi::Dictionary& attributes)
      : operands_{operands}, results_{results}, attributes_(attributes) {}

  template <Use use, bool optional>
  void operator()(const ArrayArgument<Given, use, optional>& argument) {
    if (optional && !announced()) return;
    Array& array = given.*argument.member;
    if constexpr (use == Use::kIn) {
      if (const auto operand = next(operands_, argument.name)) array = array_of(argument.name, *operand);
    } else if constexpr (use == Use::kOut) {
      if (const auto result = next(results_, argument.name)) array = array_of(argument.name, *result);
    } else {
      const auto before = next(operands_, argument.name);
      const auto after = next(results_, argument.name);
      if (!before || !after) return;
      keep(check_alias(argument.name, *before, *after));
      array = array_of(argument.name, *after);
    }
  }

  template <typename T, Numbers kind>
  void operator()(const NumberArgument<Given, T, kind>& argument) {
    std::conditional_t<std::is_enum_v<T>, int32_t, T> value{};
    read(argument.name, &value);
    given.*argument.member = static_cast<T>(value);
  }

  std::optional<Out> workspace() { return next(results_, "workspace"); }

  // After the last argument: what did not fit.
  ffi::Error finish() {
    keep(check_count("operands", operands_));
    keep(check_count("results", results_));
    if (announced_ >> optional_ != 0) {
      keep(ffi::Error::InvalidArgument("dualbin: given has a bit for each of " + std::to_string(optional_) +
                                       " operands that may be absent, got " + std::to_string(announced_)));
    }
    return error_;
  }

  Given given;

 private:
  // Operands or results, and the names of those that arguments asked for.
  template <typename Buffers>
  struct Side {
    const Buffers& buffers;
    std::array<const char*, 16> names{};
    size_t count = 0;
  };

  // Null where there are fewer, of which finish() tells.
  template <typename Buffers>
  auto next(Side<Buffers>& side, const char* name) {
    auto found = side.buffers.template get<Any>(side.count);
    std::optional<std::decay_t<decltype(*found)>> buffer;
    side.names.at(side.count++) = name;
    if (side.count > side.buffers.size()) return buffer;
    if (found.has_value()) {
      buffer = *found;
    } else {
      keep(found.error());
    }
    return buffer;
  }

  template <typename Buffers>
  static ffi::Error check_count(const char* what, const Side<Buffers>& side) {
    if (side.count == side.buffers.size()) return ffi::Error::Success();
    std::string names;
    for (size_t i = 0; i < side.count; ++i) names += std::string(i == 0 ? "" : ", ") + side.names[i];
    return ffi::Error::InvalidArgument("dualbin: the " + std::string(what) + " must be " + names + ", got " +
                                       std::to_string(side.buffers.size()));
  }

  void keep(ffi::Error error) {
    if (error_.success()) error_ = std::move(error);
  }

  template <typename T>
  void read(const char* name, T* value) {
    const auto found = attributes_.get<T>(name);
    if (found.has_value()) {
      *value = *found;
    } else {
      keep(ffi::Error::InvalidArgument("dualbin: the attribute " + std::string(name) + " is absent or of another type"));
    }
  }

  bool announced() {
    if (optional_ == 0) read("given", &announced_);
    return (announced_ >> optional_++ & 1) != 0;
  }

  Side<ffi::RemainingArgs> operands_;
  Side<ffi::RemainingRets> results_;
  const ffi::Dictionary& attributes_;
  int optional_ = 0;  // arguments that may be absent met so far
  int32_t announced_ = 0;
  ffi::Error error_ = ffi::Error::Success();
};

template <typename Argument>
constexpr bool is_result = false;
template <typename Given, bool optional>
constexpr bool is_result<ArrayArgument<Given, Use::kOut, optional>> = true;

template <typename Call, Status (Backend::*function)(const Launch&, const Call&) const>
struct OperationTarget {
  template <typename Context>
  static ffi::Error run(Context& context, ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes) {
    Taker<typename Call::Given> take(operands, results, attributes);
    std::apply([&](const auto&... argument) { (take(argument), ...); }, Call::arguments());
    Call call;
    Launch launch;
    if constexpr (has_work<Call>) {
      const auto workspace = take.workspace();
      DUALBIN_FFI_TRY(take.finish());
      DUALBIN_FFI_TRY(to_error(call.read(take.given)));
      DUALBIN_FFI_TRY(launch_with(context, call.work(), *workspace, &launch));
    } else {
      DUALBIN_FFI_TRY(take.finish());
      DUALBIN_FFI_TRY(to_error(call.read(take.given)));
      DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
    }
    std::apply([&](const auto&... argument) { (expect_writes(context, take.given, argument), ...); }, Call::arguments());
    return to_error((context.backend().*function)(launch, call));
  }

  template <typename Context, typename Argument>
  static void expect_writes(const Context& context, const typename Call::Given& given, const Argument& argument) {
    if constexpr (is_result<Argument>) context.expect_writes(given.*argument.member);
  }

  template <typename Binding>
  static auto signature(Binding&& binding) {
    return std::forward<Binding>(binding).RemainingArgs().RemainingRets().Attrs();
  }
};

}  // namespace dualbin::bindings
