// What a counter does to 32 weights of a row, one word of each of its planes: the results of rules/row.h in a sixth of the instructions.
//
// Values of 32 columns are kept as sixteen words of two halves. What moves a magnitude is the evidence of rules/row.h, the quantised
// gradient q with its sign turned where the weight and the scale say so; the turned value, before dead zone and mean, is called f here.
#pragma once

#include "rules/packed_words.h"
#include "rules/row.h"

namespace dualbin {

constexpr int kWordColumns = 32;
constexpr int kWordPairs = 16;

// What a word needs beside the row's RowStep values, prepared once a row.
struct WordStep {
  RowKey key;      // k0 at the first pair of the word's columns
  int32_t coef;    // see RowStep
  int32_t zone;    // see RowStep
  int32_t offset;  // added to f before the dead zone: the mean, with the sign of the scale
  uint32_t share;  // see RowStep
};

// Where the sign of a gradient turns: columns whose weight, sign of the scale included, is positive.
DUALBIN_HD uint32_t turned_columns(uint32_t signs, bool negative_scale) { return negative_scale ? ~signs : signs; }

// f of 32 columns as halves of sixteen words. `factor` is the quantiser's, `x` has its first factor already if that is not the only one.
// 1.5 * 2^23 has its unit in the last place: the sum rounds to an integer, ties to even, whose low half is that of the float's bits.
DUALBIN_HD void quantise_word(const float (&x)[kWordColumns], uint32_t turned, float factor, uint32_t (&f)[kWordPairs]) {
  DUALBIN_UNROLL
  for (int i = 0; i < kWordPairs; ++i) {
    uint32_t rounded[2];
    DUALBIN_UNROLL
    for (int k = 0; k < 2; ++k) {
      const int c = 2 * i + k;
      const float value = bits_float(float_bits(x[c]) ^ ((turned << (31 - c)) & 0x80000000u));
#if defined(__CUDA_ARCH__)
      rounded[k] = float_bits(__fmaf_rn(value, factor, 12582912.0f));  // the product is exact, by a power of two: one rounding either way
#else
      rounded[k] = float_bits(value * factor + 12582912.0f);
#endif
    }
    f[i] = permute_bytes(rounded[0], rounded[1], 0x5410);
  }
}

// Sum of f over the word.
DUALBIN_HD int32_t sum_word(const uint32_t (&f)[kWordPairs]) {
  int32_t high = 0;
  uint32_t low = 0;
  DUALBIN_UNROLL
  for (int i = 0; i < kWordPairs; i += 2) {
    high = dot_bytes(permute_bytes(f[i], f[i + 1], 0x7531), 0x01010101u, high);
    low = dot_bytes_unsigned(permute_bytes(f[i], f[i + 1], 0x6420), 0x01010101u, low);
  }
  return high * 256 + static_cast<int32_t>(low);
}

// Sum of f * f over the word, from products of its signed high and its unsigned low bytes.
DUALBIN_HD uint64_t sum_word_squares(const uint32_t (&f)[kWordPairs]) {
  int32_t high_high = 0;
  int32_t high_low = 0;
  uint32_t low_low = 0;
  DUALBIN_UNROLL
  for (int i = 0; i < kWordPairs; i += 2) {
    const uint32_t high = permute_bytes(f[i], f[i + 1], 0x7531);
    const uint32_t low = permute_bytes(f[i], f[i + 1], 0x6420);
    high_high = dot_bytes(high, high, high_high);
    high_low = dot_bytes_mixed(high, low, high_low);
    low_low = dot_bytes_unsigned(low, low, low_low);
  }
  const auto middle =
      static_cast<uint64_t>(static_cast<int64_t>(high_low));  // may be negative: shifted to the left as it is, it would be undefined
  return (static_cast<uint64_t>(high_high) << 16) + (middle << 9) + low_low;
}

// Magnitudes by column from planes, least significant first: byte b of magnitudes[r] is that of column 8 * b + r.
DUALBIN_HD void magnitudes_of(const uint32_t* planes, int count, uint32_t (&magnitudes)[8]) {
  DUALBIN_UNROLL
  for (int p = 0; p < 8; ++p) magnitudes[p] = p < count ? planes[p] : 0u;
  transpose_bytes(magnitudes);
}

// Sum of f * (magnitude >> below) over the word: what the planes of the table, all but the lowest `below`, stand for beside the sign.
DUALBIN_HD int32_t sum_word_magnitudes(const uint32_t (&f)[kWordPairs], const uint32_t (&magnitudes)[8], int below) {
  const uint32_t kept = 0x01010101u * (0xffu & (0xffu << below));
  int32_t sum = 0;
  DUALBIN_UNROLL
  for (int r = 0; r < 8; r += 2) {
    const uint32_t even = magnitudes[r] & kept;
    const uint32_t odd = magnitudes[r + 1] & kept;
    const uint32_t first = permute_bytes(even, odd, 0x5140);   // columns r, r + 1, r + 8, r + 9
    const uint32_t second = permute_bytes(even, odd, 0x7362);  // columns r + 16, r + 17, r + 24, r + 25
    sum = dot_halves<false>(f[r / 2], first, sum);
    sum = dot_halves<true>(f[r / 2 + 4], first, sum);
    sum = dot_halves<false>(f[r / 2 + 8], second, sum);
    sum = dot_halves<true>(f[r / 2 + 12], second, sum);
  }
  return sum >> below;  // exact: every term is a multiple of 2^below
}

DUALBIN_HD uint32_t pair_bits(const WordStep& step, int pair) { return column_pair_bits(step.key, static_cast<uint32_t>(pair)); }

// Half k of a word, sign extended.
DUALBIN_HD int32_t signed_half(uint32_t word, int k) {
  return k == 0 ? static_cast<int32_t>(word << 16) >> 16 : static_cast<int32_t>(word) >> 16;
}

// Evidence with a mean or a dead zone: f plus the offset, moved by at most the zone towards zero.
DUALBIN_HD int32_t evidence_of(const WordStep& step, int32_t f) {
  const int32_t e = f + step.offset;
  const int32_t from = e > -step.zone ? e : -step.zone;
  return e - (from < step.zone ? from : step.zone);
}

// Flips of 32 counters of one bit.
template <bool kShaped>
DUALBIN_HD uint32_t step_signs(const WordStep& step, const uint32_t (&f)[kWordPairs]) {
  uint32_t flips = 0;
  DUALBIN_UNROLL
  for (int i = 0; i < kWordPairs; ++i) {
    const uint32_t random = pair_bits(step, i);
    DUALBIN_UNROLL
    for (int k = 0; k < 2; ++k) {
      int32_t e = signed_half(f[i], k);
      if (kShaped) e = evidence_of(step, e);
      const uint32_t against = static_cast<uint32_t>(e < 0 ? -e : 0);
      uint32_t t = 65536u;
      if (kShaped) {
        const uint64_t wide = static_cast<uint64_t>(against) * static_cast<uint32_t>(step.coef) >> 16;
        if (wide < 65536) t = static_cast<uint32_t>(wide);
      } else {  // |f| <= 2^14, coef <= 2^30: the product shifted up by 16 bits has the same high word
        const uint32_t narrow = static_cast<uint32_t>(static_cast<uint64_t>(against << 16) * static_cast<uint32_t>(step.coef) >> 32);
        if (narrow < 65536) t = narrow;
      }
      const uint32_t chance = static_cast<uint32_t>(static_cast<uint64_t>(t) * step.share >> 16);
      // share * 65536 >> 16 is below 2^31: it fits
      flips |= static_cast<uint32_t>(chance > (k == 0 ? random & 0xffffu : random >> 16)) << (2 * i + k);
    }
  }
  return flips;
}

// The same for counters of `count` magnitude planes, 1 to 7. `magnitudes` holds their values by column before and their planes after the
// step; flips are the result. kShaped: there is a dead zone or a mean.
template <bool kShaped>
DUALBIN_HD uint32_t step_magnitudes(const WordStep& step, const uint32_t (&f)[kWordPairs], int count, uint32_t (&magnitudes)[8]) {
  const int32_t most = (1 << count) - 1;
  DUALBIN_UNROLL
  for (int r = 0; r < 8; r += 2) {
    int32_t next[2][4];  // of columns r and r + 1 of each byte; before the last step in 1/65536
    DUALBIN_UNROLL
    for (int b = 0; b < 4; ++b) {
      const uint32_t random = pair_bits(step, 4 * b + r / 2);
      const uint32_t pair = f[4 * b + r / 2];
      DUALBIN_UNROLL
      for (int k = 0; k < 2; ++k) {
        if constexpr (kShaped) {
          const uint32_t magnitude = magnitudes[r + k] >> (8 * b) & 0xffu;
          const int64_t start =
              static_cast<int64_t>(static_cast<uint64_t>(magnitude) << 32 | (k == 0 ? random << 16 : random & 0xffff0000u));
          const int64_t moved = static_cast<int64_t>(evidence_of(step, signed_half(pair, k))) * step.coef + start;
          int32_t value = static_cast<int32_t>(moved >> 32);
          value = value > -most - 1 ? value : -most - 1;
          next[k][b] = value < most ? value : most;
        } else {
          // floor((floor(f * coef / 2^16) + random) / 2^16), the same as with one floor since `random` is an integer.
          const auto high = static_cast<int32_t>(k == 0 ? pair << 16 : pair & 0xffff0000u);
          // two random bytes, the magnitude, its sign bit: 0
          const uint32_t bytes = (k == 0 ? 0x0010u : 0x0032u) | static_cast<uint32_t>(4 + b) << 8 | static_cast<uint32_t>(12 + b) << 12;
          next[k][b] = multiply_high(high, step.coef, permute_bytes(random, magnitudes[r + k], bytes));
        }
      }
    }
    DUALBIN_UNROLL
    for (int k = 0; k < 2; ++k) {
      const uint32_t select = kShaped ? 0x5410u : 0x7632u;
      uint32_t first = permute_bytes(static_cast<uint32_t>(next[k][0]), static_cast<uint32_t>(next[k][1]), select);
      uint32_t second = permute_bytes(static_cast<uint32_t>(next[k][2]), static_cast<uint32_t>(next[k][3]), select);
      if (!kShaped) {
        const uint32_t high = static_cast<uint32_t>(most) * 0x10001u;
        first = clamp_halves(first, ~high, high);
        second = clamp_halves(second, ~high, high);
      }
      magnitudes[r + k] = permute_bytes(first, second, 0x6420);
    }
  }
  // A byte is m, or -m - 1 after a flip: bit 7 says which, and the complement of -m - 1 is m.
  transpose_bytes(magnitudes);
  const uint32_t flips = magnitudes[7];
  DUALBIN_UNROLL
  for (int p = 0; p < 8; ++p) magnitudes[p] ^= flips;
  return flips;
}

}  // namespace dualbin
