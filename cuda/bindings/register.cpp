// The one dict of XLA FFI targets that Python loops over.
#include "bindings/module.h"

#if defined(DUALBIN_WITH_XLA)
#include "bindings/xla_register.h"
#endif

namespace py = pybind11;

namespace dualbin::bindings {

#if defined(DUALBIN_WITH_XLA)

namespace {

py::dict capsules(const std::vector<Target>& targets) {
  py::dict names;
  for (const Target& target : targets) {
    names[target.name] = py::capsule(reinterpret_cast<void*>(target.handler));  // XLA looks the address up in a capsule without a name
  }
  return names;
}

}  // namespace

py::dict registrations() {
  py::dict platforms;
  platforms["cpu"] = capsules(cpu_targets());
#if defined(DUALBIN_WITH_CUDA)
  platforms["CUDA"] = capsules(cuda_targets());
#endif
  return platforms;
}

py::object xla_ffi_api_version() { return py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); }

#else

py::dict registrations() { return {}; }
py::object xla_ffi_api_version() { return py::none(); }

#endif

}  // namespace dualbin::bindings
