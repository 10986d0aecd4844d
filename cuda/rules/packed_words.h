// Integer operations on 32-bit words that hold two, four or 32 numbers: instructions on the GPU, their definition in C++ on the host.
#pragma once

#include "rules/common.h"

namespace dualbin {

// The four bytes that the nibbles of `select` name: 0 to 3 are those of a, 4 to 7 those of b; with 8 added, eight copies of the byte's
// sign bit, which __byte_perm() leaves out.
DUALBIN_HD uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(select));
  return out;
#else
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = select >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(both >> (8 * (nibble & 7))) & 0xffu;
    if (nibble >= 8) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
    out |= byte << (8 * i);
  }
  return out;
#endif
}

// sum + the products of the four bytes of a and b.
DUALBIN_HD int32_t dot_bytes(uint32_t a, uint32_t b, int32_t sum) {
#if defined(__CUDA_ARCH__)
  return __dp4a(static_cast<int32_t>(a), static_cast<int32_t>(b), sum);
#else
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
#endif
}

// The same with the bytes of a signed and those of b unsigned.
DUALBIN_HD int32_t dot_bytes_mixed(uint32_t a, uint32_t b, int32_t sum) {
#if defined(__CUDA_ARCH__)
  int32_t out;
  asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
  return out;
#else
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<uint8_t>(b >> i);
  return sum;
#endif
}

DUALBIN_HD uint32_t dot_bytes_unsigned(uint32_t a, uint32_t b, uint32_t sum) {
#if defined(__CUDA_ARCH__)
  return __dp4a(a, b, sum);
#else
  for (int i = 0; i < 32; i += 8) sum += static_cast<uint32_t>(static_cast<uint8_t>(a >> i)) * static_cast<uint8_t>(b >> i);
  return sum;
#endif
}

// sum + the products of the signed halves of a with the lower (kUpper: the upper) two bytes of b, unsigned.
template <bool kUpper>
DUALBIN_HD int32_t dot_halves(uint32_t a, uint32_t b, int32_t sum) {
#if defined(__CUDA_ARCH__)
  int32_t out;
  if constexpr (kUpper) {
    asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
  } else {
    asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
  }
  return out;
#else
  const uint32_t bytes = kUpper ? b >> 16 : b;
  return sum + static_cast<int16_t>(a) * static_cast<uint8_t>(bytes) + static_cast<int16_t>(a >> 16) * static_cast<uint8_t>(bytes >> 8);
#endif
}

// The high word of the signed product, plus `sum`.
DUALBIN_HD int32_t multiply_high(int32_t a, int32_t b, uint32_t sum) {
#if defined(__CUDA_ARCH__)
  int32_t out;
  asm("mad.hi.s32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
  return out;
#else
  return static_cast<int32_t>((static_cast<int64_t>(a) * b >> 32) + static_cast<int32_t>(sum));
#endif
}

// Both signed halves of a word, each into the range of the halves of `low` and `high`.
DUALBIN_HD uint32_t clamp_halves(uint32_t value, uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
  return __vmins2(__vmaxs2(value, low), high);
#else
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 16) {
    auto half = static_cast<int16_t>(value >> i);
    if (half < static_cast<int16_t>(low >> i)) half = static_cast<int16_t>(low >> i);
    if (half > static_cast<int16_t>(high >> i)) half = static_cast<int16_t>(high >> i);
    out |= static_cast<uint32_t>(static_cast<uint16_t>(half)) << i;
  }
  return out;
#endif
}

// Bits of a where `mask` is set, of b elsewhere: one instruction on the GPU.
DUALBIN_HD uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) { return (a & mask) | (b & ~mask); }

// Eight words as a matrix of 8 x 8 bits for each of their four bytes, transposed. Its own inverse.
DUALBIN_HD void transpose_bytes(uint32_t (&words)[8]) {
  DUALBIN_UNROLL
  for (int stage = 0; stage < 3; ++stage) {
    const int step = 4 >> stage;
    const uint32_t mask = stage == 0 ? 0x0f0f0f0fu : stage == 1 ? 0x33333333u : 0x55555555u;
    DUALBIN_UNROLL
    for (int i = 0; i < 8; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t low = words[i];
      const uint32_t high = words[i + step];
      words[i] = select_bits(low, high << step, mask);
      words[i + step] = select_bits(low >> step, high, mask);
    }
  }
}

}  // namespace dualbin
