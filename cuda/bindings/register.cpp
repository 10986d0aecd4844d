// The one dict of XLA FFI targets that Python loops over.
#include "bindings/module.h"

#if defined(DUALBIN_WITH_XLA)
#include "bindings/xla_register.h"
#endif

namespace py = pybind11;

namespace dualbin::bindings {

#if defined(DUALBIN_WITH_XLA)

namespace {

py::dict targets(const HandlerSet& set) {
  // XLA looks the address up in a capsule without a name.
  const auto capsule = [](XLA_FFI_Handler* handler) { return py::capsule(reinterpret_cast<void*>(handler)); };
  py::dict names;
  names["dualbin_lookup"] = capsule(set.lookup);
  names["dualbin_lookup_bag"] = capsule(set.lookup_bag);
  names["dualbin_segment_sum"] = capsule(set.segment_sum);
  names["dualbin_reduce_rows"] = capsule(set.reduce_rows);
  names["dualbin_update"] = capsule(set.update);
  names["dualbin_masks"] = capsule(set.masks);
  names["dualbin_xor_rows"] = capsule(set.xor_rows);
  names["dualbin_bag_counts"] = capsule(set.bag_counts);
  names["dualbin_bag_gradient"] = capsule(set.bag_gradient);
  names["dualbin_bag_weight_gradient"] = capsule(set.bag_weight_gradient);
  names["dualbin_average"] = capsule(set.average);
  return names;
}

}  // namespace

py::dict registrations() {
  py::dict platforms;
  platforms["cpu"] = targets(cpu_handlers());
#if defined(DUALBIN_WITH_CUDA)
  platforms["CUDA"] = targets(cuda_handlers());
#endif
  return platforms;
}

py::object xla_ffi_api_version() { return py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); }

#else

py::dict registrations() { return {}; }
py::object xla_ffi_api_version() { return py::none(); }

#endif

}  // namespace dualbin::bindings
