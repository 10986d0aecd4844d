// Half-precision conversions in portable code. Widening is exact; narrowing rounds to nearest, ties to even.
#pragma once

#include <cstdint>
#include <utility>

#include "dualbin/types.h"
#include "rules/common.h"

namespace dualbin::detail {

inline float widen_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  const uint32_t fraction = h & 0x3ffu;
  if (exponent == 0x1f) return bits_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return bits_float(sign | float_bits(magnitude));
}

inline float widen_bf16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

inline uint16_t narrow_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);  // keep NaN a NaN
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline uint16_t narrow_f16(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7e00u;
  if (a >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (a < 0x38800000u) {                        // below 2^-14: adding 0.5 lines the fraction up with a subnormal half
    const uint32_t shifted = float_bits(bits_float(a) + 0.5f) - float_bits(0.5f);
    return sign | static_cast<uint16_t>(shifted);
  }
  return sign | static_cast<uint16_t>((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13);
}

struct F32 {
  using Storage = float;
  static float widen(float x) { return x; }
  static float narrow(float x) { return x; }
};

struct F16 {
  using Storage = uint16_t;
  static float widen(uint16_t x) { return widen_f16(x); }
  static uint16_t narrow(float x) { return narrow_f16(x); }
};

struct BF16 {
  using Storage = uint16_t;
  static float widen(uint16_t x) { return widen_bf16(x); }
  static uint16_t narrow(float x) { return narrow_bf16(x); }
};

// Calls body(format) with the type that stands for `type`.
template <typename Body>
auto with_float(FloatType type, Body&& body) {
  switch (type) {
    case FloatType::kF16:
      return std::forward<Body>(body)(F16{});
    case FloatType::kBF16:
      return std::forward<Body>(body)(BF16{});
    default:
      return std::forward<Body>(body)(F32{});
  }
}

}  // namespace dualbin::detail
