// The part of DLPack's C interface that the bindings use: how a framework describes a tensor in place, without a copy or a capsule. Layouts
// as in version 1 of https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h ("DLPackExchangeAPI").
#pragma once

#include <cstdint>

namespace dualbin::dlpack {

constexpr uint32_t kMajorVersion = 1;

struct Version {
  uint32_t major;
  uint32_t minor;
};

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

struct Device {
  DeviceType type;
  int32_t id;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// Shape and strides (in elements; null: contiguous) belong to the object that the tensor describes.
struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;  // of an older major version
  void* make_managed;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // 0, or -1 with a Python exception set
  int (*current_stream)(DeviceType type, int32_t id, void** out);
};

}  // namespace dualbin::dlpack
