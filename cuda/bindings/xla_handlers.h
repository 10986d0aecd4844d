// The XLA FFI targets, shared by the CPU and the CUDA registration. Those of updates are here: their state, of a variable number of arrays,
// is aliased. All others are made of what the operations say of their arguments (xla_operation.h).
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "bindings/xla_operation.h"

namespace dualbin::bindings {

// A number of a rule as an attribute; attributes are no bools.
template <typename T>
using AttrOf = std::conditional_t<std::is_floating_point_v<T>, float, int32_t>;

struct UpdateAttrs {
  int64_t dim;
  int32_t state;  // which state arrays there are: bit k for the k-th of DUALBIN_STATE_ARRAYS
  int32_t kind;
#define DUALBIN_MEMBER(name, type, value) AttrOf<type> name;
  DUALBIN_RULE_NUMBERS(DUALBIN_MEMBER)
#undef DUALBIN_MEMBER

  Rule rule() const {
    Rule made;
    made.kind = static_cast<RuleKind>(kind);
#define DUALBIN_COPY(name, type, value) made.name = static_cast<type>(name);
    DUALBIN_RULE_NUMBERS(DUALBIN_COPY)
#undef DUALBIN_COPY
    return made;
  }
};

}  // namespace dualbin::bindings

#define DUALBIN_ATTR(name, type, value) , StructMember<dualbin::bindings::AttrOf<type>>(#name)
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(dualbin::bindings::UpdateAttrs, StructMember<int64_t>("dim"), StructMember<int32_t>("state"),
                                      StructMember<int32_t>("kind") DUALBIN_RULE_NUMBERS(DUALBIN_ATTR));
#undef DUALBIN_ATTR

namespace dualbin::bindings {

// The state of an update, in the memory of the operands, to which XLA aliases the results.
inline ffi::Error take_state(int32_t announced, const ffi::RemainingArgs& in, const ffi::RemainingRets& out, Array* state) {
  constexpr const char* kNames[] = {
#define DUALBIN_NAME(name, type, per_row) #name,
      DUALBIN_STATE_ARRAYS(DUALBIN_NAME)
#undef DUALBIN_NAME
  };
  if (announced < 0 || announced >> kStateArrays != 0) {
    return ffi::Error::InvalidArgument("dualbin: state has a bit for each of " + std::to_string(kStateArrays) + " arrays, got " +
                                       std::to_string(announced));
  }
  std::string names;
  size_t count = 0;
  for (int k = 0; k < kStateArrays; ++k) {
    if ((announced >> k & 1) == 0) continue;
    names += (count++ == 0 ? "" : ", ") + std::string(kNames[k]);
  }
  if (in.size() != count || out.size() != count) {
    return ffi::Error::InvalidArgument("dualbin: operands and results must end in the arrays that state announces (" + names + "), got " +
                                       std::to_string(in.size()) + " operands and " + std::to_string(out.size()) + " results");
  }
  size_t at = 0;
  for (int k = 0; k < kStateArrays; ++k) {
    if ((announced >> k & 1) == 0) continue;
    const ffi::ErrorOr<Any> before = in.get<Any>(at);
    const ffi::ErrorOr<Out> after = out.get<Any>(at++);
    if (!before.has_value()) return before.error();
    if (!after.has_value()) return after.error();
    DUALBIN_FFI_TRY(check_alias(kNames[k], *before, *after));
    state[k] = array_of(kNames[k], *after);
  }
  return ffi::Error::Success();
}

// What both targets have; the mask, the rule and the state are absent.
template <typename Table>
UpdateCall::Given given_of(Table bits, Table scale, Any context, Any ids, Any dy, Out stats) {
  UpdateCall::Given given;
  given.bits = array_of("bits", bits);
  given.scale = array_of("scale", scale);
  given.context = array_of("context", context);
  given.ids = array_of("ids", ids);
  given.dy = array_of("dy", dy);
  given.stats = array_of("stats", stats);
  return given;
}

template <typename Context>
ffi::Error update(Context& context, const UpdateAttrs& attrs, UpdateCall::Given given, const ffi::RemainingArgs& in,
                  const ffi::RemainingRets& out, Out workspace) {
  given.dim = attrs.dim;
  given.rule = attrs.rule();
  DUALBIN_FFI_TRY(take_state(attrs.state, in, out, given.state));
  UpdateCall call;
  DUALBIN_FFI_TRY(to_error(call.read(given)));
  Launch launch;
  DUALBIN_FFI_TRY(launch_with(context, call.work(), workspace, &launch));
  return to_error(context.backend().update(launch, call));
}

// One signature for both targets, whose first two results are the table, or the mask and the new scales. The state is last.
struct StepTarget {
  template <typename Binding>
  static auto signature(Binding&& binding) {
    return std::forward<Binding>(binding)
        .template Attrs<UpdateAttrs>()
        .template Arg<Any>()  // bits
        .template Arg<Any>()  // scale
        .template Arg<Any>()  // context
        .template Arg<Any>()  // ids
        .template Arg<Any>()  // dy
        .RemainingArgs()      // state
        .template Ret<Any>()  // bits or mask
        .template Ret<Any>()  // scale or new_scale
        .template Ret<Any>()  // stats
        .template Ret<Any>()  // workspace
        .RemainingRets();     // state
  }
};

struct UpdateTarget : StepTarget {
  template <typename Context>
  static ffi::Error run(Context& context, UpdateAttrs attrs, Any bits, Any scale, Any step_context, Any ids, Any dy,
                        ffi::RemainingArgs state, Out bits_out, Out scale_out, Out stats, Out workspace, ffi::RemainingRets state_out) {
    DUALBIN_FFI_TRY(check_alias("bits", bits, bits_out));
    DUALBIN_FFI_TRY(check_alias("scale", scale, scale_out));
    return update(context, attrs, given_of(bits_out, scale_out, step_context, ids, dy, stats), state, state_out, workspace);
  }
};

struct MasksTarget : StepTarget {
  template <typename Context>
  static ffi::Error run(Context& context, UpdateAttrs attrs, Any bits, Any scale, Any step_context, Any ids, Any dy,
                        ffi::RemainingArgs state, Out mask, Out new_scale, Out stats, Out workspace, ffi::RemainingRets state_out) {
    UpdateCall::Given given = given_of(bits, scale, step_context, ids, dy, stats);
    given.mask = array_of("mask", mask);
    given.new_scale = array_of("new_scale", new_scale);
    return update(context, attrs, given, state, state_out, workspace);
  }
};

// Every target of both platforms, "dualbin_" and its name: name, what makes it (`run` and `signature`).
#define DUALBIN_TARGET_OF(name, Call) using name##_target = OperationTarget<Call, &Backend::name>;
DUALBIN_SHARED_OPERATIONS(DUALBIN_TARGET_OF)
#undef DUALBIN_TARGET_OF
using update_target = UpdateTarget;
using masks_target = MasksTarget;

#define DUALBIN_XLA_TARGETS(X) DUALBIN_SHARED_OPERATIONS(X) X(update, UpdateCall) X(masks, UpdateCall)

}  // namespace dualbin::bindings
