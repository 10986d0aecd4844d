// Arguments of the Python functions that are arrays: tensors of a framework that speaks DLPack's C interface, NumPy arrays, and whatever
// else exports a buffer. Nothing is copied and nothing is owned: an ArrayArg is valid as long as its object is.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/dlpack.h"
#include "core/arrays.h"

namespace dualbin::bindings {

enum class Access { kRead, kWrite };

class ArrayArg {
 public:
  ArrayArg() = default;  // absent

  // Raises TypeError or ValueError, with `name`, unless `object` is a contiguous, aligned array in memory that the library can reach.
  ArrayArg(const char* name, pybind11::handle object, Access access);

  const Array& array() const { return array_; }
  int device() const { return device_; }  // -1: CPU, else a CUDA ordinal

  // The stream on which the framework of this array works on its device.
  void* stream() const;

 private:
  struct ReleaseBuffer {
    void operator()(Py_buffer* buffer) const;
  };

  void from_dlpack(const dlpack::ExchangeApi* api, pybind11::handle object);
  void from_numpy(pybind11::handle object, Access access);
  void from_buffer(pybind11::handle object, Access access);
  void finish(const int64_t* strides, int64_t unit);

  Array array_;
  int device_ = -1;
  const dlpack::ExchangeApi* api_ = nullptr;
  std::unique_ptr<Py_buffer, ReleaseBuffer> buffer_;
};

}  // namespace dualbin::bindings
