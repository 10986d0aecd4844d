// The extension module dualbin._native.
#include <pybind11/pybind11.h>

#include "bindings/raw.h"
#include "dualbin/backend.h"

namespace py = pybind11;
using namespace dualbin::bindings;

#ifndef DUALBIN_VERSION
#define DUALBIN_VERSION "unknown"
#endif
#ifndef DUALBIN_CUDA_ARCHITECTURES
#define DUALBIN_CUDA_ARCHITECTURES ""
#endif

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = DUALBIN_VERSION;
  info["compiler"] = __VERSION__;
#if defined(DUALBIN_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_architectures"] = DUALBIN_CUDA_ARCHITECTURES;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["xla_ffi"] = xla_ffi_api_version();
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native code of dualbin: raw-pointer functions, and XLA FFI handlers as capsules.";
  m.attr("F32") = 0;
  m.attr("F16") = 1;
  m.attr("BF16") = 2;
  m.attr("I32") = 0;
  m.attr("I64") = 1;
  m.attr("clock_bytes") = sizeof(dualbin::Clock);
  m.attr("stats_bytes") = sizeof(dualbin::Stats);
  m.attr("sum_block") = dualbin::kSumBlock;
  m.attr("xla_ffi_api_version") = xla_ffi_api_version();
  define_raw(m);
  m.def("build_info", &build_info, "Options this module was built with.");
  m.def("simd", &dualbin::simd_level, "Instruction set that the CPU code uses on this machine.");
  m.def("cuda_device_count", &cuda_device_count, "Number of CUDA devices; 0 without a driver.");
  m.def("cuda_info", &cuda_info, "CUDA runtime, driver and first device.");
  m.def(
      "error_block", [](int device) { return reinterpret_cast<uintptr_t>(error_block(device)); }, py::arg("device"),
      "Address of the device's error block, which lookups fill; made at the first call.");
  m.def(
      "take_errors",
      [] {
        py::dict found;
        for (const auto& [device, block] : take_errors()) found[py::int_(device)] = py::make_tuple(block.count, block.first);
        return found;
      },
      "Waits for the devices; returns device -> (number of bad ids, first bad id) since the last call, where there were any.");
  m.def("registrations", &registrations, "XLA FFI targets: platform -> {name: capsule}.");
}
