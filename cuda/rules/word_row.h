// Integers of a row for rules/word.h: the results of row_rms() and step_coefficient() in rules/row.h without 64-bit and double divisions.
// Each takes a float guess that is wrong by little and puts it right exactly.
#pragma once

#include "rules/row.h"

namespace dualbin {

constexpr int64_t kMaxWordDim = 16384;  // squares of a row stay below 2^42, where inverse_of() is exact

// floor(2^64 / dim) + 1, for floor_divide(); 0 for 1.
constexpr uint64_t inverse_of(int64_t dim) { return dim == 1 ? 0 : UINT64_MAX / static_cast<uint64_t>(dim) + 1; }

// floor(n / dim), n < 2^42 and dim <= kMaxWordDim: the inverse is too large by less than dim / 2^64 of itself, so that the error, below
// n * dim / 2^64 < 2^-8, cannot reach the next multiple, which is 1 / dim away.
DUALBIN_HD uint64_t floor_divide(uint64_t n, uint64_t inverse) {
  if (inverse == 0) return n;
#if defined(__CUDA_ARCH__)
  return __umul64hi(n, inverse);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(n) * inverse >> 64);
#endif
}

// floor(sqrt(mean)), at least 1; mean <= 2^28.
DUALBIN_HD int32_t floor_root(uint32_t mean) {
#if defined(__CUDA_ARCH__)
  float guess;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(guess) : "f"(__uint2float_rn(mean)));
#else
  const float guess = std::sqrt(static_cast<float>(mean));
#endif
  auto root = static_cast<uint32_t>(guess);
  if (root * root > mean) --root;
  if ((root + 1) * (root + 1) <= mean) ++root;
  return root < 1 ? 1 : static_cast<int32_t>(root);
}

// min(floor(rate / rms), kMaxCoef). rate < 2^56, with `rate_float` near it; rms <= 2^14. The guess is wrong by less than 2^9 units, so what
// is left of the rate fits into 32 bits.
DUALBIN_HD uint32_t floor_quotient(uint64_t rate, float rate_float, int32_t rms) {
  if (rate >= kMaxCoef * static_cast<uint64_t>(rms)) return static_cast<uint32_t>(kMaxCoef);
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__int2float_rn(rms)));
#else
  const float inverse = 1.0f / static_cast<float>(rms);
#endif
  auto quotient = static_cast<uint32_t>(rate_float * inverse);
  auto rest = static_cast<int32_t>(static_cast<uint32_t>(rate) - quotient * static_cast<uint32_t>(rms));
  const auto more = static_cast<int32_t>(static_cast<float>(rest) * inverse);
  quotient += static_cast<uint32_t>(more);
  rest -= more * rms;
  if (rest < 0) {
    --quotient;
    rest += rms;
  }
  if (rest >= rms) ++quotient;
  return quotient;
}

// q / rms, rounded as a division rounds it, for |q| and rms up to 2^14 and `inverse` the rounded 1 / rms: a product with the inverse, put
// right once by what it leaves of q (Markstein, IBM J. Res. Dev. 34(1), 1990, pages 111 to 119). tests/native/test_word.cpp compares both.
DUALBIN_HD float rounded_quotient(int32_t q, int32_t rms, float inverse) {
  const auto number = static_cast<float>(q);
  const float guess = number * inverse;
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(__fmaf_rn(-guess, static_cast<float>(rms), number), inverse, guess);
#else
  return std::fma(std::fma(-guess, static_cast<float>(rms), number), inverse, guess);
#endif
}

}  // namespace dualbin
