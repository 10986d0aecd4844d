#include "bindings/array_arg.h"

#include <pybind11/numpy.h>

#include <cinttypes>
#include <cstring>
#include <string>
#include <unordered_map>

namespace py = pybind11;

namespace dualbin::bindings {

namespace {

using dlpack::ExchangeApi;

constexpr const char* kApiAttribute = "__dlpack_c_exchange_api__";

std::string type_of(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// The table of functions that a type announces, in a version that this file knows, or null.
const ExchangeApi* find_api(PyTypeObject* type) {
  const auto capsule = py::reinterpret_steal<py::object>(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), kApiAttribute));
  const void* address = capsule ? PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api") : nullptr;
  PyErr_Clear();  // no such attribute, or another kind of object under its name: then the type is none of these
  const auto* api = static_cast<const ExchangeApi*>(address);
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
  return api != nullptr && api->tensor_from_object != nullptr && api->current_stream != nullptr ? api : nullptr;
}

// The same, remembered by type. The types are kept alive, so that no other type can take their address. Guarded by the interpreter lock.
const ExchangeApi* api_of(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  static auto& known = *new std::unordered_map<PyTypeObject*, const ExchangeApi*>();
  auto entry = known.find(type);
  if (entry == known.end()) {
    entry = known.emplace(type, find_api(type)).first;
    Py_INCREF(reinterpret_cast<PyObject*>(type));
  }
  last_type = type;
  last_api = entry->second;
  return last_api;
}

ElementType integer_type(bool is_signed, int64_t bytes) {
  switch (bytes) {
    case 1:
      return is_signed ? ElementType::kI8 : ElementType::kU8;
    case 2:
      return is_signed ? ElementType::kI16 : ElementType::kU16;
    case 4:
      return is_signed ? ElementType::kI32 : ElementType::kU32;
    case 8:
      return is_signed ? ElementType::kI64 : ElementType::kU64;
    default:
      return ElementType::kOther;
  }
}

ElementType float_type(int64_t bytes) {
  return bytes == 2 ? ElementType::kF16 : bytes == 4 ? ElementType::kF32 : bytes == 8 ? ElementType::kF64 : ElementType::kOther;
}

ElementType element_type(dlpack::DataType type) {
  if (type.lanes != 1 || type.bits % 8 != 0) return ElementType::kOther;
  switch (type.code) {
    case dlpack::kInt:
    case dlpack::kUInt:
      return integer_type(type.code == dlpack::kInt, type.bits / 8);
    case dlpack::kFloat:
      return float_type(type.bits / 8);
    case dlpack::kBfloat:
      return type.bits == 16 ? ElementType::kBF16 : ElementType::kOther;
    case dlpack::kBool:
      return type.bits == 8 ? ElementType::kBool : ElementType::kOther;
    default:
      return ElementType::kOther;
  }
}

// Of one character of the struct module, and the bytes of an element.
ElementType element_type(char format, int64_t bytes) {
  if (format == '?') return ElementType::kBool;
  if (std::strchr("bhilqn", format) != nullptr) return integer_type(true, bytes);
  if (std::strchr("BHILQN", format) != nullptr) return integer_type(false, bytes);
  if (std::strchr("efd", format) != nullptr) return float_type(bytes);
  return ElementType::kOther;
}

constexpr bool kLittleEndian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

bool is_native(char order) { return order == '=' || order == '|' || order == '@' || order == (kLittleEndian ? '<' : '>'); }

}  // namespace

void ArrayArg::ReleaseBuffer::operator()(Py_buffer* buffer) const {
  PyBuffer_Release(buffer);
  delete buffer;
}

ArrayArg::ArrayArg(const char* name, py::handle object, Access access) {
  array_.name = name;
  if (const ExchangeApi* api = api_of(Py_TYPE(object.ptr()))) {
    from_dlpack(api, object);
  } else if (py::isinstance<py::array>(object)) {
    from_numpy(object, access);
  } else if (PyObject_CheckBuffer(object.ptr()) != 0) {
    from_buffer(object, access);
  } else if (py::hasattr(object, "__dlpack__")) {
    throw py::type_error(std::string(name) + " must be an array whose type has " + kApiAttribute + " (torch 2.11 or newer), got " +
                         type_of(object));
  } else {
    throw py::type_error(std::string(name) + " must be a tensor or a NumPy array, got " + type_of(object));
  }
}

void ArrayArg::from_dlpack(const ExchangeApi* api, py::handle object) {
  dlpack::Tensor tensor;
  if (api->tensor_from_object(object.ptr(), &tensor) != 0) {  // no memory (meta), not strided (sparse), a symbol as a size
    py::error_already_set cause;
    throw py::type_error(std::string(array_.name) + " must be a dense tensor on the CPU or a CUDA device, got a " + type_of(object) + ": " +
                         std::string(py::str(cause.value())));
  }
  switch (tensor.device.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
      break;
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
      device_ = tensor.device.id;
      api_ = api;
      break;
    default:
      throw py::value_error(std::string(array_.name) + " must be on the CPU or a CUDA device, got DLPack's device type " +
                            std::to_string(static_cast<int>(tensor.device.type)));
  }
  array_.data = tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
  array_.type = element_type(tensor.type);
  array_.rank = tensor.rank;
  array_.shape = tensor.shape;
  finish(tensor.strides, 1);
}

void ArrayArg::from_numpy(py::handle object, Access access) {
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype type = array.dtype();
  if (!is_native(type.byteorder())) {
    throw py::type_error(std::string(array_.name) + " must have the byte order of this machine, got " + std::string(py::str(type)) +
                         "; convert it with astype");
  }
  if (access == Access::kWrite && !array.writeable()) {
    throw py::value_error(std::string(array_.name) + " must be writable, got a read-only array");
  }
  const int64_t bytes = array.itemsize();
  if (type.kind() == 'b') {
    array_.type = ElementType::kBool;
  } else if (type.kind() == 'i' || type.kind() == 'u') {
    array_.type = integer_type(type.kind() == 'i', bytes);
  } else if (type.kind() == 'f' && type.num() < 256) {  // above: types that others registered, as ml_dtypes
    array_.type = float_type(bytes);
  } else if (bytes == 2 && std::string(py::str(type)) == "bfloat16") {
    array_.type = ElementType::kBF16;
  }
  static_assert(sizeof(py::ssize_t) == sizeof(int64_t), "NumPy's shapes are read as int64");
  array_.data = const_cast<void*>(array.data());
  array_.rank = static_cast<int>(array.ndim());
  array_.shape = reinterpret_cast<const int64_t*>(array.shape());
  finish(reinterpret_cast<const int64_t*>(array.strides()), bytes);
}

void ArrayArg::from_buffer(py::handle object, Access access) {
  buffer_.reset(new Py_buffer());
  const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (access == Access::kWrite ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), buffer_.get(), flags) != 0) {
    py::error_already_set cause;
    throw py::type_error(std::string(array_.name) + " must be " + (access == Access::kWrite ? "a writable" : "an") + " array, got a " +
                         type_of(object) + ": " + std::string(py::str(cause.value())));
  }
  const char* format = buffer_->format == nullptr ? "B" : buffer_->format;
  const char order = std::strlen(format) == 2 ? *format++ : '@';
  if (!is_native(order)) {
    throw py::type_error(std::string(array_.name) + " must have the byte order of this machine, got the format " + buffer_->format);
  }
  if (std::strlen(format) == 1) array_.type = element_type(*format, buffer_->itemsize);
  array_.data = buffer_->buf;
  array_.rank = buffer_->ndim;
  array_.shape = reinterpret_cast<const int64_t*>(buffer_->shape);
  finish(reinterpret_cast<const int64_t*>(buffer_->strides), buffer_->itemsize);
}

// Strides are in units of which an element has `unit`; null stands for a contiguous array.
void ArrayArg::finish(const int64_t* strides, int64_t unit) {
  array_.size = element_count(array_.shape, array_.rank);
  if (array_.size == 0) return;
  int64_t step = unit;
  for (int i = array_.rank - 1; strides != nullptr && i >= 0; --i) {
    if (array_.shape[i] != 1 && strides[i] != step) {
      throw py::value_error(std::string(array_.name) + " must be contiguous, got strides of its own; make a contiguous copy");
    }
    step *= array_.shape[i];
  }
  const int64_t bytes = element_bytes(array_.type);
  if (reinterpret_cast<uintptr_t>(array_.data) % static_cast<uintptr_t>(bytes) != 0) {
    throw py::value_error(std::string(array_.name) + " must be aligned to its elements of " + std::to_string(bytes) +
                          " bytes; make a copy");
  }
}

void* ArrayArg::stream() const {
  void* stream = nullptr;
  if (api_ != nullptr && api_->current_stream(dlpack::kCuda, device_, &stream) != 0) throw py::error_already_set();
  return stream;
}

}  // namespace dualbin::bindings
