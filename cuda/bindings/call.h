// One call of the core with the arrays of Python objects.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <utility>

#include "bindings/array_arg.h"
#include "bindings/executors.h"
#include "bindings/module.h"
#include "core/backend.h"

namespace dualbin::bindings {

namespace py = pybind11;

// A failed status as the exception that stands for it in Python.
inline void raise(const Status& status) {
  if (status.ok()) return;
  switch (status.code) {
    case Code::kInvalidArgument:
      throw py::value_error(status.message);
    case Code::kOutOfRange:
      throw py::index_error(status.message);
    case Code::kWrongType:
      throw py::type_error(status.message);
    default:
      throw std::runtime_error(std::string("dualbin: ") + status.message);
  }
}

inline const Backend& backend_of(int device) {
  const Backend* backend = device < 0 ? &cpu() : cuda();
  if (backend == nullptr) throw py::value_error("this dualbin was built without CUDA (DUALBIN_CUDA=OFF or no nvcc): it has no CUDA code");
  return *backend;
}

// The arrays of one call, all on one device, and how it runs there: on the CPU on `threads` threads, on CUDA on the current stream of the
// framework that the first array comes from.
class Call {
 public:
  explicit Call(int threads) : threads_(threads) {}

  // An array that the call reads or writes; None only where it is `optional`.
  const Array& read(const char* name, py::handle object) { return add(name, object, Access::kRead); }
  const Array& write(const char* name, py::handle object) { return add(name, object, Access::kWrite); }
  Array read_optional(const char* name, py::handle object) { return object.is_none() ? Array{} : read(name, object); }
  Array write_optional(const char* name, py::handle object) { return object.is_none() ? Array{} : write(name, object); }

  // Memory for the operation to work in: uint8 of any shape, as large as workspace_bytes says.
  void workspace(py::handle object) {
    const Array& memory = write("workspace", object);
    if (memory.type != ElementType::kU8) throw py::type_error(std::string("workspace must be uint8, got ") + type_name(memory.type));
    const size_t skip = (kWorkspaceAlignment - reinterpret_cast<uintptr_t>(memory.data) % kWorkspaceAlignment) % kWorkspaceAlignment;
    const auto size = static_cast<size_t>(memory.size);
    workspace_ = static_cast<char*>(memory.data) + skip;
    workspace_bytes_ = memory.data == nullptr || size < skip ? 0 : size - skip;
  }

  bool on_cpu() const { return device() < 0; }

  // body(backend, launch) without the interpreter lock; a failed status becomes an exception.
  template <typename Body>
  void run(Body&& body) const {
    const Backend& backend = backend_of(device());
    const OpenMpExecutor openmp(threads_);
    const DeviceGuard guard(device());
    Launch launch;
    if (device() < 0) {
      launch.executor = openmp.get();
    } else {
      launch.stream = arrays_[0].stream();
      launch.errors = error_block(device());
    }
    launch.workspace = workspace_bytes_ == 0 ? nullptr : workspace_;
    launch.workspace_bytes = workspace_bytes_;
    Status status;
    {
      const py::gil_scoped_release release;
      status = body(backend, launch);
    }
    raise(status);
  }

 private:
  static constexpr size_t kMostArrays = 16;

  int device() const { return arrays_[0].device(); }

  const Array& add(const char* name, py::handle object, Access access) {
    if (count_ == kMostArrays) throw std::logic_error("dualbin: a call has more arrays than there is room for");
    ArrayArg& added = arrays_[count_] = ArrayArg(name, object, access);
    const auto place = [](int device) { return device < 0 ? std::string("the CPU") : "cuda:" + std::to_string(device); };
    if (added.device() != device()) {
      throw py::value_error(std::string(name) + " must be on the device of " + arrays_[0].array().name + ", " + place(device()) + ", got " +
                            place(added.device()));
    }
    ++count_;
    return added.array();
  }

  std::array<ArrayArg, kMostArrays> arrays_;
  size_t count_ = 0;
  int threads_;
  char* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
};

}  // namespace dualbin::bindings
