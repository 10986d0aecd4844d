// Bodies and signatures of the XLA FFI handlers, shared by the CPU and the CUDA registration.
//
// A `Context` says where a call runs: backend(), executor(), launch(bytes, buffer, bytes of the buffer, &launch). The last result of a
// handler that needs a workspace is that buffer: memory that XLA plans ahead stays valid when a command buffer is replayed, unlike scratch
// memory that is freed once the call was recorded. The bodies hand the buffers to the core's own checks (core/arrays.h) and check what only
// they can: that XLA kept the aliases it was asked for.
#pragma once

#include <array>
#include <string>
#include <type_traits>
#include <utility>

#include "core/arrays.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace dualbin::bindings {

namespace ffi = xla::ffi;

inline ffi::Error to_error(const Status& status) {
  if (status.ok()) return ffi::Error::Success();
  const std::string message = std::string("dualbin: ") + status.message;
  switch (status.code) {
    case Code::kInvalidArgument:
    case Code::kWrongType:
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
    case Code::kOutOfRange:
      return ffi::Error(ffi::ErrorCode::kOutOfRange, message);
    default:
      return ffi::Error(ffi::ErrorCode::kInternal, message);
  }
}

#define DUALBIN_FFI_TRY(expression)                      \
  do {                                                   \
    ffi::Error dualbin_error_ = (expression);            \
    if (dualbin_error_.failure()) return dualbin_error_; \
  } while (false)

inline ElementType element_type(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::PRED:
      return ElementType::kBool;
    case ffi::DataType::U8:
      return ElementType::kU8;
    case ffi::DataType::S8:
      return ElementType::kI8;
    case ffi::DataType::U16:
      return ElementType::kU16;
    case ffi::DataType::S16:
      return ElementType::kI16;
    case ffi::DataType::U32:
      return ElementType::kU32;
    case ffi::DataType::S32:
      return ElementType::kI32;
    case ffi::DataType::U64:
      return ElementType::kU64;
    case ffi::DataType::S64:
      return ElementType::kI64;
    case ffi::DataType::F16:
      return ElementType::kF16;
    case ffi::DataType::BF16:
      return ElementType::kBF16;
    case ffi::DataType::F32:
      return ElementType::kF32;
    case ffi::DataType::F64:
      return ElementType::kF64;
    default:
      return ElementType::kOther;
  }
}

using Any = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

// What the core checks of a buffer. It points to the buffer's shape.
inline Array array_of(const char* name, Any buffer) {
  const auto shape = buffer.dimensions();
  return {name,
          buffer.untyped_data(),
          element_type(buffer.element_type()),
          static_cast<int>(shape.size()),
          shape.begin(),
          static_cast<int64_t>(buffer.element_count())};
}

inline Array array_of(const char* name, Out buffer) { return array_of(name, *buffer); }

// The same, absent where the buffer is empty.
template <typename Buffer>
Array optional_array_of(const char* name, Buffer buffer) {
  const Array array = array_of(name, buffer);
  return array.size == 0 ? Array{} : array;
}

inline ffi::Error check_alias(const char* name, Any in, Out out) {
  if (in.untyped_data() == out->untyped_data() || in.element_count() == 0) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("dualbin: XLA did not alias the operand ") + name + " to its result");
}

// Memory that an operation works in. XLA hands it over as a result.
template <typename Context>
ffi::Error launch_with(Context& context, Op op, int64_t count, int64_t rows, int64_t dim, Out workspace, Launch* launch) {
  const Array memory = array_of("workspace", workspace);
  if (memory.type != ElementType::kU8) return ffi::Error::InvalidArgument("dualbin: workspace must be uint8");
  const size_t bytes = context.backend().workspace_bytes(op, context.executor(), count, rows, dim);
  return context.launch(bytes, static_cast<uint8_t*>(memory.data), static_cast<size_t>(memory.size), launch);
}

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
                      Any offsets, Any weights, Out out) {
  BagCall call;
  DUALBIN_FFI_TRY(to_error(read_lookup_bag(array_of("bits", bits), array_of("scale", scale), dim, array_of("ids", ids),
                                           array_of("offsets", offsets), optional_array_of("weights", weights), static_cast<BagMode>(mode),
                                           padding_idx, array_of("out", out), &call)));
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
      .template Arg<Any>()   // weights, or empty
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

template <typename Context>
ffi::Error bag_gradient(Context& context, int32_t mode, int64_t padding_idx, Any ids, Any offsets, Any dy, Any counts, Any weights,
                        Out out) {
  BagGradientCall call;
  const auto bag_mode = static_cast<BagMode>(mode);
  DUALBIN_FFI_TRY(to_error(read_bag_gradient(array_of("ids", ids), array_of("offsets", offsets), array_of("dy", dy), bag_mode,
                                             optional_array_of("counts", counts), optional_array_of("weights", weights), padding_idx,
                                             array_of("out", out), &call)));
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
      .template Arg<Any>()   // counts, or empty
      .template Arg<Any>()   // weights, or empty
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

struct RuleAttrs {
  int64_t dim;
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
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(dualbin::bindings::RuleAttrs, StructMember<int64_t>("dim"),
                                      StructMember<int32_t>("kind") DUALBIN_RULE_NUMBERS(DUALBIN_ATTR));
#undef DUALBIN_ATTR

namespace dualbin::bindings {

// `arrays` lacks the state, which XLA returns in the memory of the operands.
template <typename Context>
ffi::Error update(Context& context, const RuleAttrs& attrs, UpdateArrays arrays, const std::array<Any, kStateArrays>& in,
                  const std::array<Out, kStateArrays>& out, Out workspace) {
  int k = 0;
#define DUALBIN_TAKE(name, type, per_row)             \
  DUALBIN_FFI_TRY(check_alias(#name, in[k], out[k])); \
  arrays.state[k] = optional_array_of(#name, out[k]); \
  ++k;
  DUALBIN_STATE_ARRAYS(DUALBIN_TAKE)
#undef DUALBIN_TAKE
  UpdateCall call;
  DUALBIN_FFI_TRY(to_error(read_update(arrays, attrs.rule(), attrs.dim, &call)));
  Launch launch;
  DUALBIN_FFI_TRY(launch_with(context, Op::kUpdate, call.ids.count, call.table.rows, call.table.dim, workspace, &launch));
  return to_error(
      context.backend().update(launch, call.table, call.state, call.rule, call.context, call.ids, call.dy, /*strict=*/false, call.out));
}

template <typename Context>
ffi::Error update_in_place(Context& context, RuleAttrs attrs, Any bits, Any scale, Any counter, Any ema, Any count, Any scale_m,
                           Any scale_v, Any step_context, Any ids, Any dy, Out bits_out, Out scale_out, Out counter_out, Out ema_out,
                           Out count_out, Out scale_m_out, Out scale_v_out, Out stats, Out workspace) {
  DUALBIN_FFI_TRY(check_alias("bits", bits, bits_out));
  DUALBIN_FFI_TRY(check_alias("scale", scale, scale_out));
  const UpdateArrays arrays{array_of("bits", bits_out), array_of("scale", scale_out), {}, array_of("context", step_context),
                            array_of("ids", ids),       array_of("dy", dy),           {}, {},
                            array_of("stats", stats)};
  return update(context, attrs, arrays, {counter, ema, count, scale_m, scale_v},
                {counter_out, ema_out, count_out, scale_m_out, scale_v_out}, workspace);
}

template <typename Context>
ffi::Error masks(Context& context, RuleAttrs attrs, Any bits, Any scale, Any counter, Any ema, Any count, Any scale_m, Any scale_v,
                 Any step_context, Any ids, Any dy, Out mask, Out new_scale, Out counter_out, Out ema_out, Out count_out, Out scale_m_out,
                 Out scale_v_out, Out stats, Out workspace) {
  const UpdateArrays arrays{array_of("bits", bits),
                            array_of("scale", scale),
                            {},
                            array_of("context", step_context),
                            array_of("ids", ids),
                            array_of("dy", dy),
                            array_of("mask", mask),
                            array_of("new_scale", new_scale),
                            array_of("stats", stats)};
  return update(context, attrs, arrays, {counter, ema, count, scale_m, scale_v},
                {counter_out, ema_out, count_out, scale_m_out, scale_v_out}, workspace);
}

// One signature for both: nine results whose first two are the table, or the mask and the new scales.
template <typename Binding>
auto update_signature(Binding binding) {
  return std::move(binding)
      .template Attrs<RuleAttrs>()
      .template Arg<Any>()   // bits
      .template Arg<Any>()   // scale
      .template Arg<Any>()   // counter
      .template Arg<Any>()   // ema
      .template Arg<Any>()   // count
      .template Arg<Any>()   // scale_m
      .template Arg<Any>()   // scale_v
      .template Arg<Any>()   // context
      .template Arg<Any>()   // ids
      .template Arg<Any>()   // dy
      .template Ret<Any>()   // bits or mask
      .template Ret<Any>()   // scale or new_scale
      .template Ret<Any>()   // counter
      .template Ret<Any>()   // ema
      .template Ret<Any>()   // count
      .template Ret<Any>()   // scale_m
      .template Ret<Any>()   // scale_v
      .template Ret<Any>()   // stats
      .template Ret<Any>();  // workspace
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
