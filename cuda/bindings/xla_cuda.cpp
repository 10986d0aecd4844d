// XLA FFI handlers for CUDA: XLA's stream and scratch memory, no synchronisation, so XLA may record the calls into a command buffer.
#include <cuda_runtime_api.h>

#include "bindings/raw.h"
#include "bindings/xla_handlers.h"
#include "bindings/xla_register.h"

namespace dualbin::bindings {

namespace {

constexpr size_t kWorkspaceAlignment = 256;  // what Launch::workspace promises
constexpr size_t kXlaAlignment = 64;         // XLA refuses to allocate with more

class CudaContext {
 public:
  CudaContext(cudaStream_t stream, ffi::ScratchAllocator scratch, int32_t device)
      : stream_(stream), scratch_(std::move(scratch)), device_(device) {}

  const Backend& backend() const { return *cuda(); }
  const Executor* executor() const { return nullptr; }

  ffi::Error launch(size_t bytes, Launch* launch) {
    if (bytes > 0) {
      const auto memory = scratch_.Allocate(bytes + kWorkspaceAlignment, kXlaAlignment);
      if (!memory.has_value()) {
        return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                          "dualbin: no device memory for a workspace of " + std::to_string(bytes) + " bytes");
      }
      const auto address = reinterpret_cast<uintptr_t>(*memory);
      launch->workspace = reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
    }
    launch->workspace_bytes = bytes;
    launch->stream = stream_;
    launch->errors = error_block(device_);
    return ffi::Error::Success();
  }

 private:
  cudaStream_t stream_;
  ffi::ScratchAllocator scratch_;
  int32_t device_;
};

// The callable of a handler: makes the context of the call, then hands the operands to the shared body.
template <auto body>
struct OnCuda {
  template <typename... Operands>
  ffi::Error operator()(cudaStream_t stream, ffi::ScratchAllocator scratch, int32_t device, Operands... operands) const {
    CudaContext context(stream, std::move(scratch), device);
    return body(context, operands...);
  }
};

auto bind_cuda() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::ScratchAllocator>().Ctx<ffi::DeviceOrdinal>();
}

}  // namespace

#define DUALBIN_CUDA_HANDLER(name, body, signature) \
  XLA_FFI_DEFINE_HANDLER(name, OnCuda<&body<CudaContext>>{}, signature(bind_cuda()), {ffi::Traits::kCmdBufferCompatible})

DUALBIN_CUDA_HANDLER(kLookup, lookup, lookup_signature);
DUALBIN_CUDA_HANDLER(kSegmentSum, segment_sum, segment_sum_signature);
DUALBIN_CUDA_HANDLER(kReduceRows, reduce_rows, reduce_rows_signature);
DUALBIN_CUDA_HANDLER(kUpdate, update_in_place, update_signature);
DUALBIN_CUDA_HANDLER(kMasks, masks, update_signature);
DUALBIN_CUDA_HANDLER(kXorRows, xor_rows, xor_rows_signature);

HandlerSet cuda_handlers() { return {kLookup, kSegmentSum, kReduceRows, kUpdate, kMasks, kXorRows}; }

}  // namespace dualbin::bindings
