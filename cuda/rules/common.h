// Arithmetic primitives that give the same bits on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DUALBIN_HD __host__ __device__ __forceinline__
#else
#define DUALBIN_HD inline
#endif

// Before a loop whose indices have to be constants on the GPU, so that arrays stay in registers.
#if defined(__CUDA_ARCH__)
#define DUALBIN_UNROLL _Pragma("unroll")
#else
#define DUALBIN_UNROLL
#endif

namespace dualbin {

DUALBIN_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
#endif
}

DUALBIN_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
#endif
}

// Every NaN becomes the positive quiet one: processors disagree on the sign of a new NaN.
DUALBIN_HD float one_nan(float x) { return x == x ? x : bits_float(0x7fc00000u); }

// Nearest integer, ties to even.
DUALBIN_HD int32_t round_to_int(float x) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(x);
#else
  return static_cast<int32_t>(lrintf(x));
#endif
}

DUALBIN_HD int64_t round_to_int64(double x) {
#if defined(__CUDA_ARCH__)
  return __double2ll_rn(x);
#else
  return llrint(x);
#endif
}

DUALBIN_HD double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

// 2^k as a float, -126 <= k <= 127.
DUALBIN_HD float power_of_two(int k) { return bits_float(static_cast<uint32_t>(k + 127) << 23); }

// 2^k as a double, -1022 <= k <= 1023.
DUALBIN_HD double power_of_two_double(int k) {
  const uint64_t u = static_cast<uint64_t>(k + 1023) << 52;
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(u));
#else
  double x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
#endif
}

// base^n by squaring: the same products in the same order everywhere, which pow() does not promise.
DUALBIN_HD double integer_power(double base, uint32_t n) {
  double result = 1.0;
  for (; n != 0; n >>= 1) {
    if (n & 1u) result *= base;
    base *= base;
  }
  return result;
}

}  // namespace dualbin
