// XLA FFI handlers for CUDA: XLA's stream and memory, no synchronisation, so XLA may record the calls into a command buffer.
#include <cuda_runtime_api.h>

#include "bindings/module.h"
#include "bindings/xla_handlers.h"
#include "bindings/xla_register.h"

namespace dualbin::bindings {

namespace {

class CudaContext {
 public:
  CudaContext(cudaStream_t stream, int32_t device) : stream_(stream), device_(device) {}

  const Backend& backend() const { return *cuda(); }
  const Executor* executor() const { return nullptr; }

  ffi::Error launch(size_t bytes, uint8_t* buffer, size_t buffer_bytes, Launch* launch) {
    const auto address = reinterpret_cast<uintptr_t>(buffer);
    const size_t skip = (kWorkspaceAlignment - address % kWorkspaceAlignment) % kWorkspaceAlignment;
    if (bytes > 0 && buffer_bytes < skip + bytes) {
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, "dualbin: the call was traced without this GPU: its workspace has " +
                                                              std::to_string(buffer_bytes) + " bytes, " + std::to_string(skip + bytes) +
                                                              " are needed");
    }
    launch->workspace = buffer + skip;
    launch->workspace_bytes = bytes;
    launch->stream = stream_;
    launch->errors = error_block(device_);
    return ffi::Error::Success();
  }

  void expect_writes(const Array&) const {}

 private:
  cudaStream_t stream_;
  int32_t device_;
};

// The callable of a handler: makes the context of the call, then hands the operands to the shared body.
template <typename Body>
struct OnCuda {
  template <typename... Operands>
  ffi::Error operator()(cudaStream_t stream, int32_t device, Operands... operands) const {
    CudaContext context(stream, device);
    return Body::run(context, operands...);
  }
};

auto bind_cuda() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::DeviceOrdinal>(); }

}  // namespace

#define DUALBIN_HANDLER(name, Call) \
  XLA_FFI_DEFINE_HANDLER(k_##name, OnCuda<name##_target>{}, name##_target::signature(bind_cuda()), {ffi::Traits::kCmdBufferCompatible});
DUALBIN_XLA_TARGETS(DUALBIN_HANDLER)
#undef DUALBIN_HANDLER

std::vector<Target> cuda_targets() {
#define DUALBIN_TARGET(name, Call) {"dualbin_" #name, k_##name},
  return {DUALBIN_XLA_TARGETS(DUALBIN_TARGET)};
#undef DUALBIN_TARGET
}

}  // namespace dualbin::bindings
