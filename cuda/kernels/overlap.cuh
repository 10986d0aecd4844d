// Launches of one operation that overlap: the next kernel is set up, and its blocks move in, while the last blocks of the one before are
// still at work (programmatic dependent launch, CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization").
//
// A kernel launched by launch_after() calls wait_for_previous() in every thread before it touches global memory: it returns when the
// kernel before has ended and what it wrote is visible. As each of a chain waits, all before it have ended, too. A kernel may call
// let_next_start() where its blocks need nothing that those of the next one could take from them.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <utility>

#include "kernels/cuda_check.h"
#include "kernels/tuning.h"

namespace dualbin::kernels {

#if defined(__CUDACC__)
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
#endif

// A fact about the current device, found once: ask(&answer) returns whether it could tell.
class DeviceFact {
 public:
  template <typename Ask>
  bool get(Ask&& ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    std::atomic<int8_t>* known = device < kMostDevices ? &known_[device] : nullptr;
    if (known != nullptr && known->load(std::memory_order_relaxed) != 0) return known->load(std::memory_order_relaxed) == 2;
    const bool answer = ask(device);
    if (!answer) static_cast<void>(cudaGetLastError());  // a refusal is an answer here, not an error of a later call
    if (known != nullptr) known->store(answer ? 2 : 1, std::memory_order_relaxed);
    return answer;
  }

 private:
  static constexpr int kMostDevices = 64;         // whose answers are remembered
  std::atomic<int8_t> known_[kMostDevices] = {};  // 0: not asked yet; 1: no; 2: yes
};

// Whether the code of this kernel that the current device runs was compiled for sm_90 or newer: it may be older code, compiled again.
template <typename Kernel>
bool is_hopper_code(Kernel kernel) {
  cudaFuncAttributes attributes = {};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_after(void (*kernel)(Parameters...), unsigned grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                         Arguments&&... arguments) {
  static DeviceFact overlaps;  // all kernels of a build are compiled for the same architectures
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps.get([&](int) { return is_hopper_code(kernel); }) ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace dualbin::kernels
