// Loads and stores of the kernels: ids of two types, gradients of three, in single elements or 16 bytes at a time.
#pragma once

#include <cuda_fp16.h>

#include "dualbin/types.h"
#include "rules/common.h"

namespace dualbin::kernels {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int64_t load_id(const Ids& ids, int64_t n) {
  return ids.type == IdType::kI32 ? static_cast<const int32_t*>(ids.data)[n] : static_cast<const int64_t*>(ids.data)[n];
}

__device__ __forceinline__ void store_int(void* base, IdType type, int64_t at, int64_t value) {
  if (type == IdType::kI32) {
    static_cast<int32_t*>(base)[at] = static_cast<int32_t>(value);
  } else {
    static_cast<int64_t*>(base)[at] = value;
  }
}

// Element types of a gradient. kVector elements fill 16 bytes; widening is exact.
struct F32 {
  using Storage = float;
  static constexpr int kVector = 4;
  static __device__ __forceinline__ float widen(float x) { return x; }
};

struct F16 {
  using Storage = uint16_t;
  static constexpr int kVector = 8;
  static __device__ __forceinline__ float widen(uint16_t x) { return __half2float(__ushort_as_half(x)); }
};

struct BF16 {
  using Storage = uint16_t;
  static constexpr int kVector = 8;
  static __device__ __forceinline__ float widen(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }
};

// Calls body(format) with the type that stands for `type`.
template <typename Body>
__host__ __device__ __forceinline__ auto with_float(FloatType type, Body&& body) {
  switch (type) {
    case FloatType::kF16:
      return body(F16{});
    case FloatType::kBF16:
      return body(BF16{});
    default:
      return body(F32{});
  }
}

// kCount elements from `from` on, widened. More than one: 16 bytes, aligned to 16.
template <typename Format, int kCount>
__device__ __forceinline__ void load_widened(const typename Format::Storage* from, float (&to)[kCount]) {
  static_assert(kCount == 1 || kCount == Format::kVector);
  if constexpr (kCount == 1) {
    to[0] = Format::widen(__ldg(from));
  } else {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kCount == 4) {
        to[k] = bits_float(words[k]);
      } else {
        to[2 * k] = Format::widen(static_cast<uint16_t>(words[k] & 0xffffu));
        to[2 * k + 1] = Format::widen(static_cast<uint16_t>(words[k] >> 16));
      }
    }
  }
}

// kCount floats; more than one: multiples of 4, aligned to 16 bytes.
template <int kCount>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = *from;
  } else {
#pragma unroll
    for (int k = 0; k < kCount; k += 4) {
      const float4 raw = *reinterpret_cast<const float4*>(from + k);
      to[k] = raw.x;
      to[k + 1] = raw.y;
      to[k + 2] = raw.z;
      to[k + 3] = raw.w;
    }
  }
}

template <int kCount>
__device__ __forceinline__ void store_floats(float* to, const float (&from)[kCount]) {
  if constexpr (kCount == 1) {
    *to = from[0];
  } else {
#pragma unroll
    for (int k = 0; k < kCount; k += 4) {
      *reinterpret_cast<float4*>(to + k) = make_float4(from[k], from[k + 1], from[k + 2], from[k + 3]);
    }
  }
}

}  // namespace dualbin::kernels
