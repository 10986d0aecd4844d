// Rows of one plane whose bits flip by the sign of a gradient or of its average.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/transpose.h"

namespace dualbin::detail {
namespace {

DUALBIN_INLINE uint64_t turn_word(const SignRow& row, int64_t d, uint32_t flips) {
  const int64_t columns = row.dim - d;
  if (columns >= kColumnsOfWord) {
    write_as(row.target + d / 8, read_as<uint32_t>(row.target + d / 8) ^ flips);
  } else {
    flips &= (1u << columns) - 1;
    for (int64_t b = 0; 8 * b < columns; ++b) row.target[d / 8 + b] ^= static_cast<uint8_t>(flips >> (8 * b));
  }
  return static_cast<uint64_t>(__builtin_popcount(flips));
}

DUALBIN_INLINE uint32_t word_of_row(const SignRow& row, int64_t d) {
  if (row.dim - d >= kColumnsOfWord) return read_as<uint32_t>(row.bits + d / 8);
  const Rest<uint8_t, 4> rest(row.bits + d / 8, (row.dim + 7) / 8 - d / 8);
  return read_as<uint32_t>(rest.values);
}

// What the kernels read 32 columns of: the memory itself, or, behind the last whole word, a copy with zeros behind it.
template <typename Storage, typename Body>
DUALBIN_INLINE void with_columns(const Storage* values, int64_t d, int64_t dim, const Body& body) {
  if (dim - d >= kColumnsOfWord) return body(values + d);
  const Rest<Storage, kColumnsOfWord> rest(values + d, dim - d);
  body(rest.values);
}

DUALBIN_INLINE void fetch_columns(const void* row, int64_t d, int64_t element) {
  for (int64_t at = 0; at < kColumnsOfWord * element; at += kLine) fetch(static_cast<const char*>(row) + d * element + at);
}

template <typename Read>
uint64_t flip_signs(const SignRow& row) {
  using Storage = typename Read::Storage;
  const Vecf none = all_floats(0.0f);
  uint64_t flips = 0;
  for (int64_t d = 0; d < row.dim; d += kColumnsOfWord) {
    fetch_columns(row.later_gradient, d, sizeof(Storage));
    with_columns(static_cast<const Storage*>(row.gradient), d, row.dim, [&](const Storage* gradient) {
      uint32_t up = 0;
      uint32_t down = 0;
      for (int v = 0; v < kVecsOfWord; ++v) {
        const Vecf g = Read::widen(gradient + kFloats * v);
        up |= above(g, none) << (kFloats * v);
        down |= above(none, g) << (kFloats * v);
      }
      const uint32_t bits = word_of_row(row, d);
      flips += turn_word(row, d, row.negative ? (bits & down) | (~bits & up) : (bits & up) | (~bits & down));
    });
  }
  return flips;
}

template <typename Read>
uint64_t flip_averages(const AveragedRow& averaged) {
  using Storage = typename Read::Storage;
  const SignRow& row = averaged.row;
  const Vecf first = all_floats(averaged.first);
  const Vecf second = all_floats(averaged.second);
  const Vecf rms = all_floats(averaged.rms);
  const Vecf gamma = all_floats(averaged.gamma);
  const Vecf tau = all_floats(averaged.tau);
  const Vecf as_it_is = all_floats(0.0f);
  const Vecf turned = all_floats(-0.0f);
  uint64_t flips = 0;
  for (int64_t d = 0; d < row.dim; d += kColumnsOfWord) {
    fetch_columns(row.later_gradient, d, sizeof(Storage));
    fetch_columns(averaged.later_average, d, sizeof(float));
    const SignWord word(row.negative ? ~word_of_row(row, d) : word_of_row(row, d));
    uint32_t found = 0;
    const auto step = [&](const Storage* gradient, float* average) {
      for_parts<kVecsOfWord>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        const Vec q = rounded(times(times(Read::widen(gradient + kFloats * kPart), first), second));
        const Vecf before = load_floats(average + kFloats * kPart);
        const Vecf after = add(before, times(gamma, sub(over(floats_of(q), rms), before)));
        store_floats(average + kFloats * kPart, after);
        const Vecf against = as_floats(differ(bits_of(after), bits_of(word.template pick<kPart>(turned, as_it_is))));
        found |= above(against, tau) << (kFloats * kPart);
      });
    };
    with_columns(static_cast<const Storage*>(row.gradient), d, row.dim, [&](const Storage* gradient) {
      if (row.dim - d >= kColumnsOfWord) return step(gradient, averaged.average + d);
      Rest<float, kColumnsOfWord> rest(averaged.average + d, row.dim - d);
      step(gradient, rest.values);
      std::memcpy(averaged.average + d, rest.values, static_cast<size_t>(row.dim - d) * sizeof(float));
    });
    flips += turn_word(row, d, found);
  }
  return flips;
}

}  // namespace
}  // namespace dualbin::detail
