// What lookups write: values in three types, and the error block.
#pragma once

#include <cuda_fp16.h>

#include "dualbin/types.h"
#include "rules/common.h"

namespace dualbin::kernels {

// Round to nearest, ties to even. NaN is spelled out: the conversion instructions would change its bits.
__device__ __forceinline__ uint32_t narrow_f16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return ((u >> 16) & 0x8000u) | 0x7e00u;
  return __half_as_ushort(__float2half_rn(x));
}

__device__ __forceinline__ uint32_t narrow_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (u >> 16) | 0x40u;
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

// One float32, or the same 16-bit value in both halves.
__device__ __forceinline__ uint32_t narrow_word(float x, FloatType type) {
  if (type == FloatType::kF32) return float_bits(x);
  return (type == FloatType::kF16 ? narrow_f16(x) : narrow_bf16(x)) * 0x10001u;
}

// The values of the columns [first, first + 8) of a row of `dim`, to `out` from element `at` on. With `vectors` they are stored in units of
// 16 bytes, which `at` and `out` must allow.
__device__ __forceinline__ void store_eight(void* out, FloatType type, int64_t at, int64_t first, int64_t dim, bool vectors,
                                            const float (&values)[8]) {
  uint32_t words[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) words[k] = narrow_word(values[k], type);
  if (vectors && type == FloatType::kF32) {
    uint4* to = static_cast<uint4*>(out) + at / 4;
    to[0] = make_uint4(words[0], words[1], words[2], words[3]);
    to[1] = make_uint4(words[4], words[5], words[6], words[7]);
  } else if (vectors) {
    const auto pair = [&](int k) { return (words[k] & 0xffffu) | (words[k + 1] << 16); };
    static_cast<uint4*>(out)[at / 8] = make_uint4(pair(0), pair(2), pair(4), pair(6));
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (first + k >= dim) break;
      if (type == FloatType::kF32) {
        static_cast<uint32_t*>(out)[at + k] = words[k];
      } else {
        static_cast<uint16_t*>(out)[at + k] = static_cast<uint16_t>(words[k]);
      }
    }
  }
}

// Counts a bad id.
__device__ __forceinline__ void report(ErrorBlock* errors, int64_t id) {
  // The count starts at 0, so exactly one thread sees 0 and owns `first`.
  const auto before = atomicAdd(reinterpret_cast<unsigned long long*>(&errors->count), 1ull);
  if (before == 0) errors->first = id;
}

}  // namespace dualbin::kernels
