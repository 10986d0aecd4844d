// The handlers of one platform. Every platform serves the same targets under the same names.
#pragma once

#include <vector>

#include "xla/ffi/api/c_api.h"

namespace dualbin::bindings {

struct Target {
  const char* name;
  XLA_FFI_Handler* handler;
};

std::vector<Target> cpu_targets();
std::vector<Target> cuda_targets();  // only in builds with CUDA

}  // namespace dualbin::bindings
