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

// Counts a bad id.
__device__ __forceinline__ void report(ErrorBlock* errors, int64_t id) {
  // The count starts at 0, so exactly one thread sees 0 and owns `first`.
  const auto before = atomicAdd(reinterpret_cast<unsigned long long*>(&errors->count), 1ull);
  if (before == 0) errors->first = id;
}

}  // namespace dualbin::kernels
