// Parts of the extension module and the CUDA runtime calls that the bindings, not the core, may make.
#pragma once

#include <pybind11/pybind11.h>

#include <map>

#include "dualbin/status.h"
#include "dualbin/types.h"

namespace dualbin::bindings {

// Names of the enums Op, BagMode, RuleKind and Norm, in their order.
inline constexpr const char* kOps[] = {"reduce_rows", "segment_sum", "update"};
inline constexpr const char* kModes[] = {"sum", "mean", "majority"};
inline constexpr const char* kRules[] = {"counter", "bop", "sign"};
inline constexpr const char* kNorms[] = {"rms", "adagrad"};

void define_functions(pybind11::module_& m);
void define_updates(pybind11::module_& m);  // called by define_functions

// platform -> {target: capsule}; empty when the module was built without the XLA FFI headers.
pybind11::dict registrations();

// (major, minor) of the XLA FFI headers this module was built with, or None.
pybind11::object xla_ffi_api_version();

// Number of CUDA devices; 0 without a driver or without CUDA code.
int cuda_device_count();

// The device's block for bad ids, made at the first call (so not while a graph is captured).
ErrorBlock* error_block(int device);

// Waits for the devices that have a block; returns and empties those that hold an error, by device.
std::map<int, ErrorBlock> take_errors();

// An error while the stream of a launch is captured: replays would see the numbers that the host has now.
Status check_not_captured(const Launch& launch);

// Makes a CUDA device current for the lifetime of the object; does nothing for the CPU (-1).
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace dualbin::bindings
