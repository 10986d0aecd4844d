// What the kernels of lookups share.
#pragma once

#include <cuda_runtime_api.h>

#include "core/backend.h"

namespace dualbin::kernels {

struct LookupArgs {
  Table table;
  int64_t width;
  Ids ids;
  BadIds bad_ids;
  FloatType type;
  void* out;
  ErrorBlock* errors;
};

// For rows of whole 32-bit words, with the table aligned to them and the result to 16 bytes.
Status launch_lookup_words(cudaStream_t stream, const LookupArgs& args);

}  // namespace dualbin::kernels
