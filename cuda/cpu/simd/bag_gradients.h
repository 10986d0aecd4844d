// What the rows of bags and their weights get of the bags' gradients.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/levels_of_planes.h"

namespace dualbin::detail {
namespace {

template <typename Read, typename Write, bool kStream>
DUALBIN_INLINE void share_columns(const typename Read::Storage* dy, int64_t dim, float factor, float divisor,
                                  typename Write::Storage* out) {
  const Vecf factors = all_floats(factor);
  const Vecf divisors = all_floats(divisor);
  const auto share = [&](const typename Read::Storage* p) {
    return one_nan(divisor == 1.0f ? times(Read::widen(p), factors) : over(Read::widen(p), divisors));
  };
  int64_t d = 0;
  for (; d + kFloats <= dim; d += kFloats) Write::template put<kStream>(out + d, share(dy + d));
  if (d == dim) return;
  const Rest<typename Read::Storage, kFloats> rest(dy + d, dim - d);
  alignas(64) typename Write::Storage values[kFloats];
  Write::template put<false>(values, share(rest.values));
  std::memcpy(out + d, values, static_cast<size_t>(dim - d) * sizeof(typename Write::Storage));
}

template <typename Read, typename Write>
void share_row(const void* dy, int64_t dim, float factor, float divisor, bool streamed, void* out) {
  const auto* from = static_cast<const typename Read::Storage*>(dy);
  auto* to = static_cast<typename Write::Storage*>(out);
  streamed ? share_columns<Read, Write, true>(from, dim, factor, divisor, to)
           : share_columns<Read, Write, false>(from, dim, factor, divisor, to);
}

// 32 sums in double, of every 32nd column each. Columns behind a row have gradients of 0, which change no sum: none is -0.0.
template <typename Read>
class ColumnSums {
 public:
  using Storage = typename Read::Storage;

  ColumnSums() {
    for (Vecd& sum : sums_) sum = all_doubles(0.0);
  }

  // Part `part` of 32 columns, with weights that multiply exactly.
  template <int part>
  DUALBIN_INLINE void add_part(Vecf products) {
    sums_[2 * part] = add(sums_[2 * part], widen_low(products));
    sums_[2 * part + 1] = add(sums_[2 * part + 1], widen_upper(products));
  }

  template <int part>
  DUALBIN_INLINE void add_part(Vecf values, Vecf weights) {
    sums_[2 * part] = add(sums_[2 * part], times(widen_low(values), widen_low(weights)));
    sums_[2 * part + 1] = add(sums_[2 * part + 1], times(widen_upper(values), widen_upper(weights)));
  }

  double folded() const {
    alignas(64) double lanes[kColumnsOfWord];
    for (int i = 0; i < kCount; ++i) store_doubles(lanes + kDoubles * i, sums_[i]);
    for (int half = kColumnsOfWord / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }

 private:
  static constexpr int kCount = static_cast<int>(kColumnsOfWord) / kDoubles;

  Vecd sums_[kCount];
};

// Calls body(gradient, column) for 32 columns at a time.
template <typename Storage, typename Body>
DUALBIN_INLINE void for_gradient_words(const Storage* dy, int64_t begin, int64_t end, const Body& body) {
  int64_t d = begin;
  for (; d + kColumnsOfWord <= end; d += kColumnsOfWord) body(dy + d, d);
  if (d == end) return;
  const Rest<Storage, kColumnsOfWord> rest(dy + d, end - d);
  body(rest.values, d);
}

template <typename Read>
double weigh_row(const void* dy, const uint8_t* bits, const LookupShape& shape) {
  using Storage = typename Read::Storage;
  const auto* gradient = static_cast<const Storage*>(dy);
  ColumnSums<Read> sums;
  if (shape.planes == 1) {
    const Vecf as_it_is = all_floats(0.0f);
    const Vecf turned = all_floats(-0.0f);
    for_gradient_words(gradient, 0, shape.dim, [&](const Storage* values, int64_t d) {
      const int64_t left = shape.width - d / 8;
      const SignWord word(left >= 4 ? read_as<uint32_t>(bits + d / 8) : read_as<uint32_t>(Rest<uint8_t, 4>(bits + d / 8, left).values));
      for_parts<kVecsOfWord>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        const Vecf value = Read::widen(values + kFloats * kPart);
        const Vec sign = bits_of(word.template pick<kPart>(turned, as_it_is));
        sums.template add_part<kPart>(as_floats(differ(bits_of(value), sign)));
      });
    });
    return sums.folded();
  }
  const PlaneLevels levels_of(shape.planes);
  const Vecf unit = all_floats(0.015625f);
  for (int64_t first = 0; first < shape.dim; first += kLanes * kChunk) {
    const uint8_t* chunks[kLanes];
    int64_t bytes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t left = shape.width - first / 8 - i * kChunkBytes;
      bytes[i] = left < 0 ? 0 : left < kChunkBytes ? left : kChunkBytes;
      chunks[i] = bits + first / 8 + (bytes[i] == 0 ? 0 : i * kChunkBytes);
    }
    alignas(64) int8_t levels[kLanes][kChunk];
    levels_of(chunks, bytes, shape.width, levels);
    const int64_t end = shape.dim - first < kLanes * kChunk ? shape.dim : first + kLanes * kChunk;
    for_gradient_words(gradient, first, end, [&](const Storage* values, int64_t d) {
      const int8_t* level = levels[0] + (d - first);
      for_parts<kVecsOfWord>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        sums.template add_part<kPart>(Read::widen(values + kFloats * kPart), times(levels_of.floats(level + kFloats * kPart), unit));
      });
    });
  }
  return sums.folded();
}

}  // namespace
}  // namespace dualbin::detail
