// The handlers of one platform. Every platform serves the same targets under the same names.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace dualbin::bindings {

struct HandlerSet {
  XLA_FFI_Handler* lookup;
  XLA_FFI_Handler* lookup_bag;
  XLA_FFI_Handler* segment_sum;
  XLA_FFI_Handler* reduce_rows;
  XLA_FFI_Handler* update;
  XLA_FFI_Handler* masks;
  XLA_FFI_Handler* xor_rows;
  XLA_FFI_Handler* bag_counts;
  XLA_FFI_Handler* bag_gradient;
  XLA_FFI_Handler* bag_weight_gradient;
  XLA_FFI_Handler* average;
};

HandlerSet cpu_handlers();
HandlerSet cuda_handlers();  // only in builds with CUDA

}  // namespace dualbin::bindings
