// CUDA runtime calls of the bindings: device selection and facts. Without CUDA code they are empty.
#include "bindings/module.h"

#if defined(DUALBIN_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace dualbin::bindings {

#if defined(DUALBIN_WITH_CUDA)

namespace {

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string("dualbin: ") + what + " failed: " + cudaGetErrorString(code));
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  if (device < 0) return;
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

Status check_not_captured(const Launch& launch) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t code = cudaStreamIsCapturing(static_cast<cudaStream_t>(launch.stream), &capture);
  DUALBIN_REQUIRE(code == cudaSuccess, Code::kInternal, "asking whether the stream is captured failed: %s", cudaGetErrorString(code));
  DUALBIN_REQUIRE(capture == cudaStreamCaptureStatusNone, Code::kInternal,
                  "a captured update needs its step context on the device, so that replays read new values: XOR(capturable=True)");
  return {};
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device is an answer, not an error to leave behind
    return 0;
  }
  return count;
}

namespace {

std::mutex blocks_mutex;

// One block for each device of the process that was asked for one, kept until the process ends.
std::map<int, ErrorBlock*>& error_blocks() {
  static std::map<int, ErrorBlock*> blocks;
  return blocks;
}

}  // namespace

ErrorBlock* error_block(int device) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  ErrorBlock*& block = error_blocks()[device];
  if (block == nullptr) {
    const DeviceGuard guard(device);
    void* memory = nullptr;
    check(cudaMalloc(&memory, sizeof(ErrorBlock)), "cudaMalloc");
    check(cudaMemset(memory, 0, sizeof(ErrorBlock)), "cudaMemset");
    block = static_cast<ErrorBlock*>(memory);
  }
  return block;
}

std::map<int, ErrorBlock> take_errors() {
  std::map<int, ErrorBlock> found;
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  for (const auto& [device, block] : error_blocks()) {
    const DeviceGuard guard(device);
    ErrorBlock seen{0, 0};
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaMemcpy(&seen, block, sizeof(seen), cudaMemcpyDeviceToHost), "cudaMemcpy");
    if (seen.count == 0) continue;
    check(cudaMemset(block, 0, sizeof(ErrorBlock)), "cudaMemset");
    found[device] = seen;
  }
  return found;
}

#else

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}
Status check_not_captured(const Launch&) { return DUALBIN_ERROR(Code::kInternal, "this dualbin was built without CUDA"); }
int cuda_device_count() { return 0; }
ErrorBlock* error_block(int) { throw py::value_error("this dualbin was built without CUDA: there is no error block"); }
std::map<int, ErrorBlock> take_errors() { return {}; }

#endif

}  // namespace dualbin::bindings
