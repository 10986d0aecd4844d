// Buffers of XLA as arrays of the core, and its statuses as XLA's errors: what all handlers share.
#pragma once

#include <string>

#include "core/backend.h"
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

inline ffi::Error check_alias(const char* name, Any in, Out out) {
  if (in.untyped_data() == out->untyped_data() || in.element_count() == 0) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("dualbin: XLA did not alias the operand ") + name + " to its result");
}

// Memory that an operation works in. XLA hands it over as a result: memory that it plans ahead stays valid when a command buffer is
// replayed, unlike scratch memory that is freed once the call was recorded.
template <typename Context>
ffi::Error launch_with(Context& context, const Work& work, Out workspace, Launch* launch) {
  const Array memory = array_of("workspace", workspace);
  if (memory.type != ElementType::kU8) return ffi::Error::InvalidArgument("dualbin: workspace must be uint8");
  const size_t bytes = context.backend().workspace_bytes(work.op, context.executor(), work.count, work.rows, work.dim);
  return context.launch(bytes, static_cast<uint8_t*>(memory.data), static_cast<size_t>(memory.size), launch);
}

}  // namespace dualbin::bindings
