// Bodies and signatures of the XLA FFI handlers, shared by the CPU and the CUDA registration.
//
// A `Context` says where a call runs: backend(), executor(), launch(bytes, buffer, bytes of the buffer, &launch). The last of the fixed
// results of a handler that needs a workspace is that buffer: memory that XLA plans ahead stays valid when a command buffer is replayed,
// unlike scratch memory that is freed once the call was recorded. The bodies hand the buffers to the core's own checks (core/arrays.h) and
// check what only they can: that XLA kept the aliases it was asked for, and that the arrays of a state are those that were announced.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "bindings/xla_buffers.h"

namespace dualbin::bindings {

// ---- lookup ----------------------------------------------------------------------------------------------------------------------------

template <typename Context>
ffi::Error lookup(Context& context, int64_t dim, int32_t bad_ids, Any bits, Any scale, Any ids, Out out) {
  LookupCall call;
  DUALBIN_FFI_TRY(
      to_error(read_lookup(array_of("bits", bits), array_of("scale", scale), dim, array_of("ids", ids), array_of("out", out), &call)));
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().lookup(launch, call.table, call.ids, static_cast<BadIds>(bad_ids), call.out, call.type));
}

template <typename Binding>
auto lookup_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("dim")
      .template Attr<int32_t>("bad_ids")
      .template Arg<Any>()   // bits
      .template Arg<Any>()   // scale
      .template Arg<Any>()   // ids
      .template Ret<Any>();  // out
}

template <typename Context>
ffi::Error lookup_bag(Context& context, int64_t dim, int32_t mode, int32_t bad_ids, int64_t padding_idx, Any bits, Any scale, Any ids,
                      Any offsets, ffi::RemainingArgs rest, Out out) {
  Array weights;
  DUALBIN_FFI_TRY(take_optional("weights", rest, &weights));
  BagCall call;
  DUALBIN_FFI_TRY(
      to_error(read_lookup_bag(array_of("bits", bits), array_of("scale", scale), dim, array_of("ids", ids), array_of("offsets", offsets),
                               weights, static_cast<BagMode>(mode), padding_idx, array_of("out", out), &call)));
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().lookup_bag(launch, call.table, call.bags, static_cast<BadIds>(bad_ids), call.out, call.type));
}

template <typename Binding>
auto lookup_bag_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("dim")
      .template Attr<int32_t>("mode")
      .template Attr<int32_t>("bad_ids")
      .template Attr<int64_t>("padding_idx")
      .template Arg<Any>()   // bits
      .template Arg<Any>()   // scale
      .template Arg<Any>()   // ids
      .template Arg<Any>()   // offsets
      .RemainingArgs()       // weights
      .template Ret<Any>();  // out
}

template <typename Context>
ffi::Error bag_counts(Context& context, int64_t padding_idx, Any scale, Any ids, Any offsets, Out out) {
  BagCountsCall call;
  DUALBIN_FFI_TRY(to_error(read_bag_counts(array_of("scale", scale), array_of("ids", ids), array_of("offsets", offsets), padding_idx,
                                           array_of("out", out), &call)));
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().bag_counts(launch, call.scale, call.rows, call.bags, call.out));
}

template <typename Binding>
auto bag_counts_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("padding_idx")
      .template Arg<Any>()   // scale
      .template Arg<Any>()   // ids
      .template Arg<Any>()   // offsets
      .template Ret<Any>();  // out
}

// The last operand is what the mode divides or multiplies by: with mean the counts of the bags, else weights.
template <typename Context>
ffi::Error bag_gradient(Context& context, int32_t mode, int64_t padding_idx, Any ids, Any offsets, Any dy, ffi::RemainingArgs rest,
                        Out out) {
  const auto bag_mode = static_cast<BagMode>(mode);
  const bool mean = bag_mode == BagMode::kMean;
  Array counts, weights;
  DUALBIN_FFI_TRY(take_optional(mean ? "counts" : "weights", rest, mean ? &counts : &weights));
  BagGradientCall call;
  DUALBIN_FFI_TRY(to_error(read_bag_gradient(array_of("ids", ids), array_of("offsets", offsets), array_of("dy", dy), bag_mode, counts,
                                             weights, padding_idx, array_of("out", out), &call)));
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().bag_gradient(launch, call.bags, call.dy, call.dim, call.counts, call.out));
}

template <typename Binding>
auto bag_gradient_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int32_t>("mode")
      .template Attr<int64_t>("padding_idx")
      .template Arg<Any>()   // ids
      .template Arg<Any>()   // offsets
      .template Arg<Any>()   // dy
      .RemainingArgs()       // counts or weights
      .template Ret<Any>();  // out
}

template <typename Context>
ffi::Error bag_weight_gradient(Context& context, int64_t padding_idx, Any bits, Any scale, Any ids, Any offsets, Any dy, Out out) {
  BagWeightGradientCall call;
  DUALBIN_FFI_TRY(
      to_error(read_bag_weight_gradient(array_of("bits", bits), array_of("scale", scale), array_of("ids", ids),
                                        array_of("offsets", offsets), array_of("dy", dy), padding_idx, array_of("out", out), &call)));
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().bag_weight_gradient(launch, call.table, call.bags, call.dy, call.out));
}

template <typename Binding>
auto bag_weight_gradient_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("padding_idx")
      .template Arg<Any>()   // bits
      .template Arg<Any>()   // scale
      .template Arg<Any>()   // ids
      .template Arg<Any>()   // offsets
      .template Arg<Any>()   // dy
      .template Ret<Any>();  // out
}

// ---- row sums --------------------------------------------------------------------------------------------------------------------------

template <typename Context>
ffi::Error segment_sum(Context& context, Any slots, Any dy, Out out, Out workspace) {
  SegmentCall call;
  DUALBIN_FFI_TRY(to_error(read_segment_sum(array_of("slots", slots), array_of("dy", dy), array_of("out", out), &call)));
  Launch launch;
  DUALBIN_FFI_TRY(launch_with(context, Op::kSegmentSum, call.slots.count, call.segments, call.dim, workspace, &launch));
  return to_error(context.backend().segment_sum(launch, call.slots, call.dy, call.segments, call.dim, call.out));
}

template <typename Binding>
auto segment_sum_signature(Binding binding) {
  return std::move(binding)
      .template Arg<Any>()   // slots
      .template Arg<Any>()   // dy
      .template Ret<Any>()   // out
      .template Ret<Any>();  // workspace
}

template <typename Context>
ffi::Error reduce_rows(Context& context, int64_t rows, Any ids, Any dy, Out out_ids, Out out_rows, Out out_count, Out workspace) {
  ReduceCall call;
  DUALBIN_FFI_TRY(to_error(read_reduce_rows(array_of("ids", ids), array_of("dy", dy), rows, array_of("out_ids", out_ids),
                                            array_of("out_rows", out_rows), array_of("out_count", out_count), &call)));
  Launch launch;
  DUALBIN_FFI_TRY(launch_with(context, Op::kReduceRows, call.ids.count, rows, call.dim, workspace, &launch));
  return to_error(context.backend().reduce_rows(launch, call.ids, call.dy, rows, call.dim, call.out));
}

template <typename Binding>
auto reduce_rows_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("rows")
      .template Arg<Any>()   // ids
      .template Arg<Any>()   // dy
      .template Ret<Any>()   // out_ids
      .template Ret<Any>()   // out_rows
      .template Ret<Any>()   // out_count
      .template Ret<Any>();  // workspace
}

// ---- update ----------------------------------------------------------------------------------------------------------------------------

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

// `arrays` lacks the state.
template <typename Context>
ffi::Error update(Context& context, const UpdateAttrs& attrs, UpdateArrays arrays, const ffi::RemainingArgs& in,
                  const ffi::RemainingRets& out, Out workspace) {
  DUALBIN_FFI_TRY(take_state(attrs.state, in, out, arrays.state));
  UpdateCall call;
  DUALBIN_FFI_TRY(to_error(read_update(arrays, attrs.rule(), attrs.dim, &call)));
  Launch launch;
  DUALBIN_FFI_TRY(launch_with(context, Op::kUpdate, call.ids.count, call.table.rows, call.table.dim, workspace, &launch));
  return to_error(
      context.backend().update(launch, call.table, call.state, call.rule, call.context, call.ids, call.dy, /*strict=*/false, call.out));
}

template <typename Context>
ffi::Error update_in_place(Context& context, UpdateAttrs attrs, Any bits, Any scale, Any step_context, Any ids, Any dy,
                           ffi::RemainingArgs state, Out bits_out, Out scale_out, Out stats, Out workspace, ffi::RemainingRets state_out) {
  DUALBIN_FFI_TRY(check_alias("bits", bits, bits_out));
  DUALBIN_FFI_TRY(check_alias("scale", scale, scale_out));
  const UpdateArrays arrays{array_of("bits", bits_out), array_of("scale", scale_out), {}, array_of("context", step_context),
                            array_of("ids", ids),       array_of("dy", dy),           {}, {},
                            array_of("stats", stats)};
  return update(context, attrs, arrays, state, state_out, workspace);
}

template <typename Context>
ffi::Error masks(Context& context, UpdateAttrs attrs, Any bits, Any scale, Any step_context, Any ids, Any dy, ffi::RemainingArgs state,
                 Out mask, Out new_scale, Out stats, Out workspace, ffi::RemainingRets state_out) {
  const UpdateArrays arrays{array_of("bits", bits),
                            array_of("scale", scale),
                            {},
                            array_of("context", step_context),
                            array_of("ids", ids),
                            array_of("dy", dy),
                            array_of("mask", mask),
                            array_of("new_scale", new_scale),
                            array_of("stats", stats)};
  return update(context, attrs, arrays, state, state_out, workspace);
}

// One signature for both, whose first two results are the table, or the mask and the new scales. The state is last.
template <typename Binding>
auto update_signature(Binding binding) {
  return std::move(binding)
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

// ---- xor -------------------------------------------------------------------------------------------------------------------------------

template <typename Context>
ffi::Error xor_rows(Context& context, Any bits, Any ids, Any mask, Out out) {
  DUALBIN_FFI_TRY(check_alias("bits", bits, out));
  XorCall call;
  DUALBIN_FFI_TRY(to_error(read_xor_rows(array_of("bits", out), array_of("ids", ids), array_of("mask", mask), &call)));
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().xor_rows(launch, call.bits, call.rows, call.width, call.ids, call.mask));
}

template <typename Binding>
auto xor_rows_signature(Binding binding) {
  return std::move(binding)
      .template Arg<Any>()   // bits
      .template Arg<Any>()   // ids
      .template Arg<Any>()   // mask
      .template Ret<Any>();  // bits
}

// ---- average ---------------------------------------------------------------------------------------------------------------------------

template <typename Context>
ffi::Error average(Context& context, int64_t dim, Any bits_a, Any scale_a, Any bits_b, Any scale_b, Any step_context, Out bits, Out scale) {
  AverageCall call;
  DUALBIN_FFI_TRY(to_error(read_average(array_of("bits_a", bits_a), array_of("scale_a", scale_a), array_of("bits_b", bits_b),
                                        array_of("scale_b", scale_b), dim, array_of("context", step_context), array_of("bits", bits),
                                        array_of("scale", scale), &call)));
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().average(launch, call.a, call.b, call.context, call.out));
}

template <typename Binding>
auto average_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("dim")
      .template Arg<Any>()   // bits_a
      .template Arg<Any>()   // scale_a
      .template Arg<Any>()   // bits_b
      .template Arg<Any>()   // scale_b
      .template Arg<Any>()   // context
      .template Ret<Any>()   // bits
      .template Ret<Any>();  // scale
}

// ---- targets ---------------------------------------------------------------------------------------------------------------------------

// Every target of both platforms, "dualbin_" and its name: name, body, signature.
#define DUALBIN_XLA_TARGETS(X)                                               \
  X(lookup, lookup, lookup_signature)                                        \
  X(lookup_bag, lookup_bag, lookup_bag_signature)                            \
  X(bag_counts, bag_counts, bag_counts_signature)                            \
  X(bag_gradient, bag_gradient, bag_gradient_signature)                      \
  X(bag_weight_gradient, bag_weight_gradient, bag_weight_gradient_signature) \
  X(segment_sum, segment_sum, segment_sum_signature)                         \
  X(reduce_rows, reduce_rows, reduce_rows_signature)                         \
  X(update, update_in_place, update_signature)                               \
  X(masks, masks, update_signature)                                          \
  X(xor_rows, xor_rows, xor_rows_signature)                                  \
  X(average, average, average_signature)

}  // namespace dualbin::bindings
