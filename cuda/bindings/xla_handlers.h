// Bodies and signatures of the XLA FFI handlers, shared by the CPU and the CUDA registration.
//
// A `Context` says where a call runs: backend(), executor(), launch(bytes, buffer, bytes of the buffer, &launch). The last result of a
// handler that needs a workspace is that buffer: memory that XLA plans ahead stays valid when a command buffer is replayed, unlike scratch
// memory that is freed once the call was recorded. The bodies translate buffers into the structs of the core and check what Python could
// not: that XLA kept the aliases it was asked for.
#pragma once

#include <string>
#include <utility>

#include "dualbin/backend.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace dualbin::bindings {

namespace ffi = xla::ffi;

inline ffi::Error to_error(const Status& status) {
  if (status.ok()) return ffi::Error::Success();
  const std::string message = std::string("dualbin: ") + status.message;
  switch (status.code) {
    case Code::kInvalidArgument:
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

inline ffi::Error read_id_type(const char* name, ffi::DataType type, IdType* out) {
  if (type != ffi::DataType::S32 && type != ffi::DataType::S64) {
    return ffi::Error::InvalidArgument(std::string("dualbin: ") + name + " must be int32 or int64");
  }
  *out = type == ffi::DataType::S32 ? IdType::kI32 : IdType::kI64;
  return ffi::Error::Success();
}

inline ffi::Error read_ids(ffi::AnyBuffer buffer, Ids* ids) {
  ids->data = buffer.untyped_data();
  ids->count = static_cast<int64_t>(buffer.element_count());
  return read_id_type("ids", buffer.element_type(), &ids->type);
}

inline ffi::Error read_float_type(const char* name, ffi::DataType type, FloatType* out) {
  switch (type) {
    case ffi::DataType::F32:
      *out = FloatType::kF32;
      break;
    case ffi::DataType::F16:
      *out = FloatType::kF16;
      break;
    case ffi::DataType::BF16:
      *out = FloatType::kBF16;
      break;
    default:
      return ffi::Error::InvalidArgument(std::string("dualbin: ") + name + " must be float32, float16 or bfloat16");
  }
  return ffi::Error::Success();
}

inline ffi::Error check_rank2(const char* name, ffi::AnyBuffer::Dimensions shape) {
  if (shape.size() == 2) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string("dualbin: ") + name + " must have 2 dimensions, got " + std::to_string(shape.size()));
}

template <typename In, typename Out>
ffi::Error check_alias(const char* name, In in, Out out) {
  if (in.untyped_data() == out->untyped_data() || in.element_count() == 0) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("dualbin: XLA did not alias the operand ") + name + " to its result");
}

using U8 = ffi::Buffer<ffi::U8>;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;
using Any = ffi::AnyBuffer;

// ---- lookup ----------------------------------------------------------------------------------------------------------------------------

template <typename Context>
ffi::Error lookup(Context& context, int64_t dim, int32_t bad_ids, U8 bits, F32 scale, Any ids, ffi::Result<Any> out) {
  DUALBIN_FFI_TRY(check_rank2("bits", bits.dimensions()));
  const Table table{bits.typed_data(), scale.typed_data(), bits.dimensions()[0], dim};
  Ids core_ids;
  FloatType type;
  DUALBIN_FFI_TRY(read_ids(ids, &core_ids));
  DUALBIN_FFI_TRY(read_float_type("the output", out->element_type(), &type));
  if (bits.dimensions()[1] != table.width() || static_cast<int64_t>(out->element_count()) != core_ids.count * dim) {
    return ffi::Error::InvalidArgument("dualbin: bits must have ceil(dim/8) columns and the output dim values for every id");
  }
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().lookup(launch, table, core_ids, static_cast<BadIds>(bad_ids), out->untyped_data(), type));
}

template <typename Binding>
auto lookup_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("dim")
      .template Attr<int32_t>("bad_ids")
      .template Arg<U8>()
      .template Arg<F32>()
      .template Arg<Any>()
      .template Ret<Any>();
}

template <typename Context>
ffi::Error lookup_bag(Context& context, int64_t dim, int32_t mode, int32_t bad_ids, U8 bits, F32 scale, Any ids, Any offsets, F32 weights,
                      ffi::Result<Any> out) {
  DUALBIN_FFI_TRY(check_rank2("bits", bits.dimensions()));
  const Table table{bits.typed_data(), scale.typed_data(), bits.dimensions()[0], dim};
  Bags bags;
  FloatType type;
  DUALBIN_FFI_TRY(read_ids(ids, &bags.ids));
  bags.offsets = {offsets.untyped_data(), IdType::kI64, static_cast<int64_t>(offsets.element_count())};
  DUALBIN_FFI_TRY(read_id_type("offsets", offsets.element_type(), &bags.offsets.type));
  DUALBIN_FFI_TRY(read_float_type("the output", out->element_type(), &type));
  const auto weighted = static_cast<int64_t>(weights.element_count());
  if (bits.dimensions()[1] != table.width() || static_cast<int64_t>(out->element_count()) != bags.count() * dim ||
      (weighted != 0 && weighted != bags.ids.count)) {
    return ffi::Error::InvalidArgument(
        "dualbin: bits must have ceil(dim/8) columns, the output dim values for every bag, and weights one for every id or none");
  }
  bags.weights = weighted == 0 ? nullptr : weights.typed_data();
  bags.mode = static_cast<BagMode>(mode);
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().lookup_bag(launch, table, bags, static_cast<BadIds>(bad_ids), out->untyped_data(), type));
}

template <typename Binding>
auto lookup_bag_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("dim")
      .template Attr<int32_t>("mode")
      .template Attr<int32_t>("bad_ids")
      .template Arg<U8>()
      .template Arg<F32>()
      .template Arg<Any>()
      .template Arg<Any>()
      .template Arg<F32>()
      .template Ret<Any>();
}

// ---- row sums --------------------------------------------------------------------------------------------------------------------------

template <typename Context>
ffi::Error segment_sum(Context& context, Any slots, Any dy, ffi::Result<F32> out, ffi::Result<U8> workspace) {
  DUALBIN_FFI_TRY(check_rank2("dy", dy.dimensions()));
  DUALBIN_FFI_TRY(check_rank2("the output", out->dimensions()));
  Ids core_slots;
  Floats floats{dy.untyped_data()};
  DUALBIN_FFI_TRY(read_ids(slots, &core_slots));
  DUALBIN_FFI_TRY(read_float_type("dy", dy.element_type(), &floats.type));
  const int64_t segments = out->dimensions()[0];
  const int64_t dim = out->dimensions()[1];
  if (dy.dimensions()[0] != core_slots.count || dy.dimensions()[1] != dim) {
    return ffi::Error::InvalidArgument("dualbin: dy must have one row for every slot and as many columns as the output");
  }
  Launch launch;
  const size_t bytes = context.backend().workspace_bytes(Op::kSegmentSum, context.executor(), core_slots.count, segments, dim);
  DUALBIN_FFI_TRY(context.launch(bytes, workspace->typed_data(), workspace->element_count(), &launch));
  return to_error(context.backend().segment_sum(launch, core_slots, floats, segments, dim, out->typed_data()));
}

template <typename Binding>
auto segment_sum_signature(Binding binding) {
  return std::move(binding).template Arg<Any>().template Arg<Any>().template Ret<F32>().template Ret<U8>();
}

template <typename Context>
ffi::Error reduce_rows(Context& context, int64_t rows, Any ids, Any dy, ffi::Result<Any> out_ids, ffi::Result<F32> out_rows,
                       ffi::Result<S32> out_count, ffi::Result<U8> workspace) {
  DUALBIN_FFI_TRY(check_rank2("dy", dy.dimensions()));
  DUALBIN_FFI_TRY(check_rank2("the output", out_rows->dimensions()));
  Ids core_ids;
  Floats floats{dy.untyped_data()};
  RowsOut out{out_ids->untyped_data(), IdType::kI64, out_rows->typed_data(),
              out_count->typed_data(), IdType::kI32, out_rows->dimensions()[0]};
  DUALBIN_FFI_TRY(read_ids(ids, &core_ids));
  DUALBIN_FFI_TRY(read_float_type("dy", dy.element_type(), &floats.type));
  DUALBIN_FFI_TRY(read_id_type("the output ids", out_ids->element_type(), &out.ids_type));
  const int64_t dim = out_rows->dimensions()[1];
  if (dy.dimensions()[0] != core_ids.count || dy.dimensions()[1] != dim || static_cast<int64_t>(out_ids->element_count()) != out.capacity ||
      out_count->element_count() != 1) {
    return ffi::Error::InvalidArgument("dualbin: dy must be [ids, dim], the outputs [capacity], [capacity, dim] and [1]");
  }
  Launch launch;
  const size_t bytes = context.backend().workspace_bytes(Op::kReduceRows, context.executor(), core_ids.count, rows, dim);
  DUALBIN_FFI_TRY(context.launch(bytes, workspace->typed_data(), workspace->element_count(), &launch));
  return to_error(context.backend().reduce_rows(launch, core_ids, floats, rows, dim, out));
}

template <typename Binding>
auto reduce_rows_signature(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("rows")
      .template Arg<Any>()
      .template Arg<Any>()
      .template Ret<Any>()
      .template Ret<F32>()
      .template Ret<S32>()
      .template Ret<U8>();
}

// ---- update ----------------------------------------------------------------------------------------------------------------------------

struct RuleAttrs {
  int64_t dim;
  int32_t kind;
  int32_t bits;
  float eta;
  int32_t dead_zone_q8;
  int32_t anneal_q8;
  int32_t center;
  float gamma;
  float tau;

  Rule rule() const { return {static_cast<RuleKind>(kind), static_cast<int>(bits), eta, dead_zone_q8, anneal_q8, center != 0, gamma, tau}; }
};

}  // namespace dualbin::bindings

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(dualbin::bindings::RuleAttrs, StructMember<int64_t>("dim"), StructMember<int32_t>("kind"),
                                      StructMember<int32_t>("rule_bits"), StructMember<float>("eta"), StructMember<int32_t>("dead_zone_q8"),
                                      StructMember<int32_t>("anneal_q8"), StructMember<int32_t>("center"), StructMember<float>("gamma"),
                                      StructMember<float>("tau"));

namespace dualbin::bindings {

// Operands of both update targets.
struct UpdateOperands {
  U8 bits;
  F32 scale;
  U8 counter;
  F32 ema;
  S32 count;
  F32 scale_m;
  F32 scale_v;
  U32 clock;
  U32 first_row;
  Any ids;
  Any dy;
};

// The state as XLA returns it: the same memory as the operands.
struct StateResults {
  ffi::Result<U8> counter;
  ffi::Result<F32> ema;
  ffi::Result<S32> count;
  ffi::Result<F32> scale_m;
  ffi::Result<F32> scale_v;
  ffi::Result<U32> stats;
  ffi::Result<U8> workspace;
};

inline ffi::Error check_state_aliases(const UpdateOperands& in, StateResults out) {
  DUALBIN_FFI_TRY(check_alias("counter", in.counter, out.counter));
  DUALBIN_FFI_TRY(check_alias("ema", in.ema, out.ema));
  DUALBIN_FFI_TRY(check_alias("count", in.count, out.count));
  DUALBIN_FFI_TRY(check_alias("scale_m", in.scale_m, out.scale_m));
  return check_alias("scale_v", in.scale_v, out.scale_v);
}

inline ffi::Error check_update_shapes(const Table& table, const RuleAttrs& rule, const UpdateOperands& in, const Ids& ids,
                                      StateResults out) {
  const auto absent_or = [](size_t have, int64_t want) { return have == 0 || static_cast<int64_t>(have) == want; };
  const int64_t planes = static_cast<RuleKind>(rule.kind) == RuleKind::kCounter ? rule.bits - 1 : 0;
  const bool ok = in.bits.dimensions()[1] == table.width() && static_cast<int64_t>(in.scale.element_count()) == table.rows &&
                  absent_or(in.counter.element_count(), table.rows * table.width() * planes) &&
                  absent_or(in.ema.element_count(), table.rows * table.dim) && absent_or(in.count.element_count(), table.rows) &&
                  absent_or(in.scale_m.element_count(), table.rows) && absent_or(in.scale_v.element_count(), table.rows) &&
                  in.clock.element_count() * sizeof(uint32_t) == sizeof(Clock) && in.first_row.element_count() == 2 &&
                  in.dy.dimensions()[0] == ids.count && in.dy.dimensions()[1] == table.dim &&
                  out.stats->element_count() * sizeof(uint32_t) == sizeof(Stats);
  if (ok) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("dualbin: the operands of the update do not fit one table of " + std::to_string(table.rows) + " x " +
                                     std::to_string(table.dim));
}

template <typename T>
auto data_or_null(T buffer) {
  return buffer->element_count() == 0 ? nullptr : buffer->typed_data();
}

// `bits` and `scale` are what the table reads: the aliased results when it changes in place, the operands otherwise.
template <typename Context>
ffi::Error update(Context& context, const RuleAttrs& attrs, uint8_t* bits, float* scale, const UpdateOperands& in, StateResults out,
                  UpdateOut target) {
  DUALBIN_FFI_TRY(check_rank2("bits", in.bits.dimensions()));
  DUALBIN_FFI_TRY(check_rank2("dy", in.dy.dimensions()));
  DUALBIN_FFI_TRY(check_state_aliases(in, out));
  const Table table{bits, scale, in.bits.dimensions()[0], attrs.dim, 0, in.first_row.typed_data()};
  Ids ids;
  Floats dy{in.dy.untyped_data()};
  DUALBIN_FFI_TRY(read_ids(in.ids, &ids));
  DUALBIN_FFI_TRY(read_float_type("dy", in.dy.element_type(), &dy.type));
  DUALBIN_FFI_TRY(check_update_shapes(table, attrs, in, ids, out));
  const State state{data_or_null(out.counter), data_or_null(out.ema), data_or_null(out.count), data_or_null(out.scale_m),
                    data_or_null(out.scale_v)};
  target.stats = reinterpret_cast<Stats*>(out.stats->typed_data());
  Launch launch;
  const size_t bytes = context.backend().workspace_bytes(Op::kUpdate, context.executor(), ids.count, table.rows, table.dim);
  DUALBIN_FFI_TRY(context.launch(bytes, out.workspace->typed_data(), out.workspace->element_count(), &launch));
  const auto* clock = reinterpret_cast<const Clock*>(in.clock.typed_data());
  return to_error(context.backend().update(launch, table, state, attrs.rule(), clock, ids, dy, /*strict=*/false, target));
}

template <typename Context>
ffi::Error update_in_place(Context& context, RuleAttrs attrs, U8 bits, F32 scale, U8 counter, F32 ema, S32 count, F32 scale_m, F32 scale_v,
                           U32 clock, U32 first_row, Any ids, Any dy, ffi::Result<U8> bits_out, ffi::Result<F32> scale_out,
                           ffi::Result<U8> counter_out, ffi::Result<F32> ema_out, ffi::Result<S32> count_out, ffi::Result<F32> scale_m_out,
                           ffi::Result<F32> scale_v_out, ffi::Result<U32> stats, ffi::Result<U8> workspace) {
  DUALBIN_FFI_TRY(check_alias("bits", bits, bits_out));
  DUALBIN_FFI_TRY(check_alias("scale", scale, scale_out));
  return update(context, attrs, bits_out->typed_data(), scale_out->typed_data(),
                {bits, scale, counter, ema, count, scale_m, scale_v, clock, first_row, ids, dy},
                {counter_out, ema_out, count_out, scale_m_out, scale_v_out, stats, workspace}, UpdateOut{});
}

template <typename Context>
ffi::Error masks(Context& context, RuleAttrs attrs, U8 bits, F32 scale, U8 counter, F32 ema, S32 count, F32 scale_m, F32 scale_v, U32 clock,
                 U32 first_row, Any ids, Any dy, ffi::Result<U8> mask, ffi::Result<F32> new_scale, ffi::Result<U8> counter_out,
                 ffi::Result<F32> ema_out, ffi::Result<S32> count_out, ffi::Result<F32> scale_m_out, ffi::Result<F32> scale_v_out,
                 ffi::Result<U32> stats, ffi::Result<U8> workspace) {
  const auto n = ids.element_count();
  if (new_scale->element_count() != n || static_cast<int64_t>(mask->element_count()) != static_cast<int64_t>(n) * ((attrs.dim + 7) / 8)) {
    return ffi::Error::InvalidArgument("dualbin: mask must be [ids, ceil(dim/8)] and new_scale [ids, 1]");
  }
  return update(context, attrs, bits.typed_data(), scale.typed_data(),
                {bits, scale, counter, ema, count, scale_m, scale_v, clock, first_row, ids, dy},
                {counter_out, ema_out, count_out, scale_m_out, scale_v_out, stats, workspace},
                UpdateOut{mask->typed_data(), new_scale->typed_data(), nullptr});
}

// One signature for both: nine results whose first two are the table, or the mask and the new scales.
template <typename Binding>
auto update_signature(Binding binding) {
  return std::move(binding)
      .template Attrs<RuleAttrs>()
      .template Arg<U8>()
      .template Arg<F32>()
      .template Arg<U8>()
      .template Arg<F32>()
      .template Arg<S32>()
      .template Arg<F32>()
      .template Arg<F32>()
      .template Arg<U32>()
      .template Arg<U32>()
      .template Arg<Any>()
      .template Arg<Any>()
      .template Ret<U8>()
      .template Ret<F32>()
      .template Ret<U8>()
      .template Ret<F32>()
      .template Ret<S32>()
      .template Ret<F32>()
      .template Ret<F32>()
      .template Ret<U32>()
      .template Ret<U8>();
}

// ---- xor -------------------------------------------------------------------------------------------------------------------------------

template <typename Context>
ffi::Error xor_rows(Context& context, U8 bits, Any ids, U8 mask, ffi::Result<U8> out) {
  DUALBIN_FFI_TRY(check_rank2("bits", bits.dimensions()));
  DUALBIN_FFI_TRY(check_alias("bits", bits, out));
  Ids core_ids;
  DUALBIN_FFI_TRY(read_ids(ids, &core_ids));
  const int64_t width = bits.dimensions()[1];
  if (static_cast<int64_t>(mask.element_count()) != core_ids.count * width) {
    return ffi::Error::InvalidArgument("dualbin: mask must have one row for every id and as many columns as bits");
  }
  Launch launch;
  DUALBIN_FFI_TRY(context.launch(0, nullptr, 0, &launch));
  return to_error(context.backend().xor_rows(launch, out->typed_data(), bits.dimensions()[0], width, core_ids, mask.typed_data()));
}

template <typename Binding>
auto xor_rows_signature(Binding binding) {
  return std::move(binding).template Arg<U8>().template Arg<Any>().template Arg<U8>().template Ret<U8>();
}

}  // namespace dualbin::bindings
