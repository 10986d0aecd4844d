// What becomes of one row and of eight weights in the average of two tables. Both back ends include this file.
#pragma once

#include <cmath>

#include "dualbin/types.h"
#include "rules/common.h"
#include "rules/hash.h"
#include "rules/planes.h"

namespace dualbin {

constexpr uint32_t kAverageWord = 0x13198A2Eu;    // keeps these random numbers apart from those of an update
constexpr uint32_t kThresholdPair = 0xffffffffu;  // no row has so many columns

struct AverageRow {
  RowKey key;
  uint32_t threshold;  // the share of the way from a to b that a weight goes, in 1/65536
  bool invert_b;       // the scales have different signs
  float scale;
};

DUALBIN_HD bool is_weight(float weight) { return weight >= 0.0f && weight <= 1.0f; }

// Of the row that is `row` in the whole table; a weight outside [0, 1] gives a scale of NaN and the bits of a.
DUALBIN_HD AverageRow average_row(const uint32_t seed[2], const uint32_t step[2], int64_t row, float scale_a, float scale_b, float weight) {
  AverageRow out{row_key(seed, step, row), 0u, false, bits_float(0x7fc00000u)};
  if (!is_weight(weight)) return out;
  out.key = {mix(out.key.k0 ^ kAverageWord), mix(out.key.k1 ^ kAverageWord)};
  const double x = static_cast<double>(1.0f - weight) * static_cast<double>(scale_a);  // both products are exact
  const double y = static_cast<double>(weight) * static_cast<double>(scale_b);
  const double total = std::fabs(x) + std::fabs(y);
  const double share = std::fabs(y) / total;  // NaN where both are 0
  const bool negative = (x != 0.0 ? x : y) < 0.0;
  const uint64_t chance = share > 0.0 ? static_cast<uint64_t>(round_to_int64(share * 4294967296.0)) : 0u;
  out.threshold = static_cast<uint32_t>((chance + (column_pair_bits(out.key, kThresholdPair) & 0xffffu)) >> 16);
  out.invert_b = (y < 0.0) != negative;
  out.scale = one_nan(static_cast<float>(negative ? -total : total));
  return out;
}

// The weights [8*byte, 8*byte + 8) of a row of `dim` of one plane, packed: bits of b where the random bits are below the threshold.
DUALBIN_HD uint8_t average_signs(const AverageRow& row, int64_t byte, int64_t dim, uint8_t a, uint8_t b) {
  uint32_t takes_b = 0;
  uint32_t random = 0;
  for (int k = 0; k < 8 && 8 * byte + k < dim; ++k) {
    if (k % 2 == 0) random = column_pair_bits(row.key, static_cast<uint32_t>(4 * byte + k / 2));
    const uint32_t bits16 = k % 2 == 0 ? random & 0xffffu : random >> 16;
    takes_b |= static_cast<uint32_t>(bits16 < row.threshold) << k;
  }
  const uint32_t other = row.invert_b ? ~static_cast<uint32_t>(b) : b;
  return static_cast<uint8_t>((a & ~takes_b) | (other & takes_b));
}

// The same of several planes: from the level of a towards that of b, rounded up or down at random. Every byte of `a` and `b` is read before
// one of `out` is written, so `out` may be either of them.
DUALBIN_HD void average_levels(const AverageRow& row, int64_t byte, int64_t dim, int64_t width, int planes, const uint8_t* a,
                               const uint8_t* b, uint8_t* out) {
  uint8_t packed[kMaxPlanes] = {};
  uint32_t random = 0;
  for (int k = 0; k < 8 && 8 * byte + k < dim; ++k) {
    if (k % 2 == 0) random = column_pair_bits(row.key, static_cast<uint32_t>(4 * byte + k / 2));
    const uint32_t bits16 = k % 2 == 0 ? random & 0xffffu : random >> 16;
    const int32_t from = weight_of(a, width, planes, k);
    const int32_t to = row.invert_b ? -weight_of(b, width, planes, k) : weight_of(b, width, planes, k);
    const uint32_t apart = static_cast<uint32_t>(to > from ? to - from : from - to) / 2;
    const int32_t way = static_cast<int32_t>((apart * row.threshold + 65535u - bits16) >> 16);  // below 2^24: 255 levels at most
    const int32_t level = to > from ? from + 2 * way : from - 2 * way;
    const int32_t magnitude = (level < 0 ? -level : level) >> 1;
    packed[0] |= static_cast<uint8_t>((level > 0) << k);
    for (int p = 1; p < planes; ++p) packed[p] |= static_cast<uint8_t>(((magnitude >> (planes - 1 - p)) & 1) << k);
  }
  for (int p = 0; p < planes; ++p) out[p * width] = packed[p];
}

// Byte `byte` of every plane of row r.
DUALBIN_HD void average_byte(const AverageRow& row, int64_t r, int64_t byte, const Table& a, const Table& b, const Table& out) {
  const int64_t at = r * a.row_bytes() + byte;
  if (a.planes == 1) {
    out.bits[at] = average_signs(row, byte, a.dim, a.bits[at], b.bits[at]);
  } else {
    average_levels(row, byte, a.dim, a.width(), a.planes, a.bits + at, b.bits + at, out.bits + at);
  }
}

}  // namespace dualbin
