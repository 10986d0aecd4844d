// Rows of floats to planes, and planes to integers.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/levels_of_planes.h"

namespace dualbin::detail {
namespace {

// Calls body(values, column, columns) for 32 columns of a row at a time; behind the last of them are zeros.
template <typename Storage, typename Body>
DUALBIN_INLINE void for_words(const Storage* w, int64_t dim, const Body& body) {
  int64_t d = 0;
  for (; d + kColumnsOfWord <= dim; d += kColumnsOfWord) body(w + d, d, kColumnsOfWord);
  if (d == dim) return;
  const Rest<Storage, kColumnsOfWord> rest(w + d, dim - d);
  body(rest.values, d, dim - d);
}

DUALBIN_INLINE void write_word(uint8_t* to, uint32_t word, int64_t columns) {
  if (columns == kColumnsOfWord) return write_as(to, word);
  word &= (1u << columns) - 1;
  std::memcpy(to, &word, static_cast<size_t>((columns + 7) / 8));
}

// Levels floor(|w| * factor / scale), at most `top`, as level_of() of rules/pack.h has them.
template <typename Read>
DUALBIN_INLINE void write_levels(const typename Read::Storage* values, Vecd factor, Vecd scale, Vecd top, int32_t* levels) {
  for (int v = 0; v < kVecsOfWord; ++v) {
    const Vecf magnitudes = absolute(Read::widen(values + kFloats * v));
    const Vecd halves[2] = {widen_low(magnitudes), widen_upper(magnitudes)};
    for (int h = 0; h < 2; ++h) {
      store_truncated(levels + kFloats * v + kDoubles * h, least(over(times(halves[h], factor), scale), top));
    }
  }
}

template <typename Read>
void pack_row(const void* w, const PackShape& shape, float scale, uint8_t* bits) {
  using Storage = typename Read::Storage;
  const Vecd factor = all_doubles(0.25 * static_cast<double>(1 << shape.planes));
  const Vecd over_scale = all_doubles(static_cast<double>(scale));
  const Vecd top = all_doubles(static_cast<double>((1 << (shape.planes - 1)) - 1));
  for_words(static_cast<const Storage*>(w), shape.dim, [&](const Storage* values, int64_t d, int64_t columns) {
    uint32_t signs = 0;
    for (int v = 0; v < kVecsOfWord; ++v) signs |= at_least_0(Read::widen(values + kFloats * v)) << (kFloats * v);
    write_word(bits + d / 8, signs, columns);
    if (shape.planes == 1) return;
    alignas(64) int32_t levels[kColumnsOfWord];
    write_levels<Read>(values, factor, over_scale, top, levels);
    for (int p = 1; p < shape.planes; ++p) {
      const int to_top = 31 - (shape.planes - 1 - p);
      uint32_t plane = 0;
      for (int v = 0; v < kVecsOfWord; ++v) plane |= tops32(left32(load(levels + kFloats * v), to_top)) << (kFloats * v);
      write_word(bits + p * shape.width + d / 8, plane, columns);
    }
  });
}

// Sum of |w| in double: column d in lane d % 32, then the lanes folded in halves.
template <typename Read>
double sum_magnitudes(const void* w, int64_t dim) {
  using Storage = typename Read::Storage;
  constexpr int kSums = static_cast<int>(kColumnsOfWord) / kDoubles;
  Vecd sums[kSums];
  for (Vecd& sum : sums) sum = all_doubles(0.0);
  for_words(static_cast<const Storage*>(w), dim, [&](const Storage* values, int64_t, int64_t) {
    for (int v = 0; v < kVecsOfWord; ++v) {
      const Vecf magnitudes = absolute(Read::widen(values + kFloats * v));
      sums[2 * v] = add(sums[2 * v], widen_low(magnitudes));
      sums[2 * v + 1] = add(sums[2 * v + 1], widen_upper(magnitudes));
    }
  });
  alignas(64) double lanes[kColumnsOfWord];
  for (int i = 0; i < kSums; ++i) store_doubles(lanes + kDoubles * i, sums[i]);
  for (int half = kColumnsOfWord / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// The sums of a candidate of the search for a scale. All numbers are integers below 2^53 here, and a quotient that is no integer is further
// from one than a rounding: it is at most 2 * top / denominator away from the next where levels change, and denominators are below 2^41.
template <typename Read>
SearchSums search_sums(const void* w, int64_t dim, const SearchStep& step) {
  using Storage = typename Read::Storage;
  const Vecf first = all_floats(step.first);
  const Vecf second = all_floats(step.second);
  const Vecd numerator = all_doubles(step.numerator);
  const Vecd denominator = all_doubles(step.denominator);
  const Vecd top = all_doubles(step.top);
  const Vecd one = all_doubles(1.0);
  Vecd a = all_doubles(0.0);
  Vecd c = all_doubles(0.0);
  int64_t behind = 0;
  for_words(static_cast<const Storage*>(w), dim, [&](const Storage* values, int64_t, int64_t columns) {
    behind = kColumnsOfWord - columns;
    for (int v = 0; v < kVecsOfWord; ++v) {
      const Vecf h = nearest(times(times(absolute(Read::widen(values + kFloats * v)), first), second));
      const Vecd halves[2] = {widen_low(h), widen_upper(h)};
      for (const Vecd x : halves) {
        const Vecd level = least(floor_of(over(times(x, numerator), denominator)), top);
        const Vecd odd = add(add(level, level), one);
        a = add(a, times(x, odd));
        c = add(c, times(odd, odd));
      }
    }
  });
  alignas(64) double sums[2][kDoubles];
  store_doubles(sums[0], a);
  store_doubles(sums[1], c);
  SearchSums result{0, -behind};  // zeros behind the row have level 0
  for (int i = 0; i < kDoubles; ++i) {
    result.a += static_cast<int64_t>(sums[0][i]);
    result.c += static_cast<int64_t>(sums[1][i]);
  }
  return result;
}

DUALBIN_INLINE void unpack_signs(const uint8_t* bits, const PackShape& shape, int8_t* out) {
  constexpr auto kStep = static_cast<int64_t>(sizeof(Vec));
  const Vec set = all8(1);
  const Vec clear = all8(-1);
  int64_t d = 0;
  for (; d + kStep <= shape.dim; d += kStep) store(out + d, pick8(bits + d / 8, clear, set));
  if (d == shape.dim) return;
  const Rest<uint8_t, kStep / 8> rest(bits + d / 8, shape.width - d / 8);
  alignas(64) int8_t values[kStep];
  store(values, pick8(rest.values, clear, set));
  std::memcpy(out + d, values, static_cast<size_t>(shape.dim - d));
}

DUALBIN_INLINE void unpack_levels(const uint8_t* bits, const PackShape& shape, int16_t* out) {
  constexpr auto kStep = static_cast<int64_t>(sizeof(Vec) / sizeof(int16_t));
  const PlaneLevels levels_of(shape.planes);
  const auto integers = [&](const int8_t* level) {  // s * (2m + 1) of 64 times the weight, or of all but its last bit
    const Vec x = widen8(level);
    return shape.planes == 8 ? add16(add16(x, x), all16(1)) : right_signed16(x, 7 - shape.planes);
  };
  for (int64_t first = 0; first < shape.dim; first += kLanes * kChunk) {
    const uint8_t* from[kLanes];
    int64_t bytes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t at = first / 8 + i * kChunkBytes;
      const int64_t left = shape.width - at;
      from[i] = bits + (left > 0 ? at : 0);
      bytes[i] = left < 0 ? 0 : left < kChunkBytes ? left : kChunkBytes;
    }
    alignas(64) int8_t levels[kLanes][kChunk];
    levels_of(from, bytes, shape.width, levels);
    const int8_t* all = &levels[0][0];
    const int64_t columns = shape.dim - first < kLanes * kChunk ? shape.dim - first : kLanes * kChunk;
    int64_t d = 0;
    for (; d + kStep <= columns; d += kStep) store(out + first + d, integers(all + d));
    if (d == columns) continue;
    alignas(64) int16_t values[kStep];
    store(values, integers(all + d));
    std::memcpy(out + first + d, values, static_cast<size_t>(columns - d) * sizeof(int16_t));
  }
}

inline void unpack_row(const uint8_t* bits, const PackShape& shape, void* out) {
  if (shape.planes == 1) return unpack_signs(bits, shape, static_cast<int8_t*>(out));
  unpack_levels(bits, shape, static_cast<int16_t*>(out));
}

// The integer of a row's magnitude, 2m + 1, is the sum of planes times powers of two, behind them one of ones: sums of products are counts
// of bits that two planes share.
inline SearchSums sums_of_fewer(const uint8_t* bits, const PackShape& shape, int fewer) {
  constexpr int64_t kColumns = 64;
  SearchSums sums{0, 0};
  for (int64_t d = 0; d < shape.dim; d += kColumns) {
    const int64_t columns = shape.dim - d < kColumns ? shape.dim - d : kColumns;
    const uint64_t used = columns == kColumns ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
    uint64_t planes[8] = {used};
    for (int p = 1; p < shape.planes; ++p) {
      const uint8_t* from = bits + p * shape.width + d / 8;
      planes[p] = used & read_as<uint64_t>(columns == kColumns ? from : Rest<uint8_t, 8>(from, (columns + 7) / 8).values);
    }
    const auto power = [](int p, int of) { return p == 0 ? 0 : of - p; };
    for (int q = 0; q < fewer; ++q) {
      for (int p = 0; p < shape.planes; ++p) {
        const auto count = static_cast<int64_t>(__builtin_popcountll(planes[p] & planes[q]));
        sums.a += count << (power(p, shape.planes) + power(q, fewer));
        if (p < fewer) sums.c += count << (power(p, fewer) + power(q, fewer));
      }
    }
  }
  return sums;
}

}  // namespace
}  // namespace dualbin::detail
