// Turns the result of every runtime call and every launch into a Status with its place.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "dualbin/status.h"

namespace dualbin::kernels {

inline Status cuda_error(cudaError_t code, const char* what, const char* file, int line) {
  cudaGetLastError();  // the error is reported here; the next caller of the runtime must not find it again
  return error(Code::kInternal, file, line, "CUDA: %s failed: %s (%s)", what, cudaGetErrorString(code), cudaGetErrorName(code));
}

// Multiprocessors of the current device, from which the grids are sized.
inline Status multiprocessors(int* count) {
  int device = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  return code == cudaSuccess ? Status{} : cuda_error(code, "reading the number of multiprocessors", DUALBIN_FILE, __LINE__);
}

// Blocks that cover `units` of work with `per_block` units each, at least 1 and at most `limit`: kernels stride over what is left.
inline unsigned grid_size(int64_t units, int64_t per_block, int64_t limit) {
  const int64_t wanted = units / per_block + (units % per_block != 0 ? 1 : 0);
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(wanted, limit)));
}

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace dualbin::kernels

// Returns an error from the enclosing function when a runtime call fails.
#define DUALBIN_CUDA_TRY(call)                                                                                             \
  do {                                                                                                                     \
    const cudaError_t dualbin_code_ = (call);                                                                              \
    if (dualbin_code_ != cudaSuccess) return ::dualbin::kernels::cuda_error(dualbin_code_, #call, DUALBIN_FILE, __LINE__); \
  } while (false)

// The same for the kernel launch on the line above.
#define DUALBIN_CUDA_LAUNCHED(kernel)                                                                                                    \
  do {                                                                                                                                   \
    const cudaError_t dualbin_code_ = cudaGetLastError();                                                                                \
    if (dualbin_code_ != cudaSuccess) return ::dualbin::kernels::cuda_error(dualbin_code_, "launching " kernel, DUALBIN_FILE, __LINE__); \
  } while (false)
