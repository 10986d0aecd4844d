// The extension module dualbin._native.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>
#include <type_traits>

#include "bindings/array_arg.h"
#include "bindings/call.h"
#include "bindings/executors.h"
#include "bindings/module.h"
#include "core/backend.h"

namespace py = pybind11;
using dualbin::PerRow;
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

const char* form_of(PerRow per_row) {
  switch (per_row) {
    case PerRow::kOne:
      return "one";
    case PerRow::kColumns:
      return "columns";
    case PerRow::kPlanes:
      return "planes";
    case PerRow::kRecord:
      return "record";
  }
  return "unknown";
}

template <typename T>
const char* element_name() {
  return std::is_same_v<T, float> ? "float32" : std::is_same_v<T, int32_t> ? "int32" : std::is_same_v<T, uint8_t> ? "uint8" : "unknown";
}

template <size_t N>
py::tuple names_of(const char* const (&names)[N]) {
  py::list list;
  for (const char* name : names) list.append(name);
  return py::tuple(list);
}

// The names that Python shares with this library, in the order of the enums and structs: dualbin._schema has the same.
py::dict schema() {
  py::dict lists;
  lists["alignment"] = dualbin::kWorkspaceAlignment;
  lists["bag_modes"] = names_of(kModes);
  lists["rule_kinds"] = names_of(kRules);
  lists["norms"] = names_of(kNorms);
  lists["max_planes"] = dualbin::kMaxPlanes;
  lists["workspace_ops"] = names_of(kOps);
  py::list numbers;
#define DUALBIN_NAME(name, type, value) numbers.append(#name);
  DUALBIN_RULE_NUMBERS(DUALBIN_NAME)
#undef DUALBIN_NAME
  lists["rule_numbers"] = py::tuple(numbers);
  py::list stats;
#define DUALBIN_NAME(name) stats.append(#name);
  DUALBIN_STATS(DUALBIN_NAME)
#undef DUALBIN_NAME
  lists["stats"] = py::tuple(stats);
  py::list arrays;
#define DUALBIN_NAME(name, type, per_row) arrays.append(py::make_tuple(#name, element_name<type>(), form_of(per_row)));
  DUALBIN_STATE_ARRAYS(DUALBIN_NAME)
#undef DUALBIN_NAME
  lists["state_arrays"] = py::tuple(arrays);
  py::list record;
#define DUALBIN_NAME(name, type) record.append(py::make_tuple(#name, element_name<type>()));
  DUALBIN_RECORD(DUALBIN_NAME)
#undef DUALBIN_NAME
  lists["record"] = py::tuple(record);
  return lists;
}

// DUALBIN_SIMD chooses the instruction set; what it cannot be is an error of the import, before anything runs with another one.
void define_simd(py::module_& m) {
  const char* wanted = std::getenv("DUALBIN_SIMD");
  if (wanted != nullptr && wanted[0] != 0) {
    const dualbin::Status status = dualbin::use_simd(wanted);
    if (!status.ok()) throw py::value_error(std::string("DUALBIN_SIMD: ") + status.message);
  }
  m.def("simd", [] { return dualbin::simd_level(); }, "Instruction set that the CPU code uses.");
  m.def(
      "simd_levels",
      [] {
        py::list names;
        for (int i = 0; dualbin::simd_level(i) != nullptr; ++i) names.append(dualbin::simd_level(i));
        return names;
      },
      "Instruction sets that this build and this processor have, the best last.");
  m.def(
      "use_simd", [](const char* name) { raise(dualbin::use_simd(name)); }, py::arg("name"),
      "Chooses one of simd_levels() for the calls that follow; None: the best. Results are the same with each.");
}

// The memory of an array that was made and not written yet.
void expect_writes(py::handle out) {
  const ArrayArg argument("out", out, Access::kWrite);
  const dualbin::Array& array = argument.array();
  if (argument.device() < 0) dualbin::expect_writes(array.data, static_cast<size_t>(array.size * dualbin::element_bytes(array.type)));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native code of dualbin: functions of tensors and NumPy arrays, and XLA FFI handlers as capsules.";
  watch_forks();
  m.attr("xla_ffi_api_version") = xla_ffi_api_version();
  define_functions(m);
  m.def("schema", &schema, "Names of state arrays, stats, rule numbers and codes, as dualbin._schema.native_form().");
  m.def("build_info", &build_info, "Options this module was built with.");
  define_simd(m);
  m.def("expect_writes", &expect_writes, py::arg("out"), "Has a large fresh array on the CPU come in huge pages, on Linux.");
  m.def("cuda_device_count", &cuda_device_count, "Number of CUDA devices; 0 without a driver.");
  m.def(
      "make_error_block", [](int device) { error_block(device); }, py::arg("device"),
      "Makes the device's block of bad ids, which lookups fill. The first lookup would, but not while CUDA records a graph.");
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
