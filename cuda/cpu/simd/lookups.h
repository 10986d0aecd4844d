// Rows of a table as floats.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/halves.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/levels_of_planes.h"
#include "cpu/simd/lookup_chunks.h"
#include "cpu/simd/row_weights.h"

namespace dualbin::detail {
namespace {

// 32 columns of one plane: the scale or its negative.
template <typename Write, bool kStream>
class SignsOfRow {
 public:
  using Storage = typename Write::Storage;

  explicit DUALBIN_INLINE SignsOfRow(float scale) {
    if constexpr (sizeof(Storage) == 4) {
      set_ = all_floats(scale);
      clear_ = all_floats(-scale);
    } else {
      uint16_t narrow[kFloats];
      Write::template put<false>(narrow, all_floats(scale));
      set_ = all16(narrow[0]);
      clear_ = all16(narrow[0] ^ 0x8000);
    }
  }

  DUALBIN_INLINE void put(const SignWord& word, Storage* out) const {
    if constexpr (sizeof(Storage) == 4) {
      for_parts<kVecsOfWord>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        Write::template put<kStream>(out + kFloats * kPart, word.template pick<kPart>(clear_, set_));
      });
    } else {
      for_parts<kVecsOfWord / 2>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        const Vec halves = word.template pick16<kPart>(clear_, set_);
        kStream ? stream(out + 2 * kFloats * kPart, halves) : store(out + 2 * kFloats * kPart, halves);
      });
    }
  }

 private:
  template <typename T, int kSize = sizeof(T)>
  struct Pair {
    using Type = Vec;
  };
  template <typename T>
  struct Pair<T, 4> {
    using Type = Vecf;
  };

  typename Pair<Storage>::Type set_;
  typename Pair<Storage>::Type clear_;
};

// 32 columns of two planes: one of four products.
template <typename Write, bool kStream>
class PairsOfRow {
 public:
  using Storage = typename Write::Storage;

  explicit DUALBIN_INLINE PairsOfRow(float scale) : weights_(scale), four_(weights_.four()) {
    if constexpr (sizeof(Storage) == 2) {
      uint16_t narrow[kFloats];
      Write::template put<false>(narrow, four_);
      alignas(64) uint32_t wide[kFloats];
      for (int i = 0; i < kFloats; ++i) wide[i] = narrow[i];
      four_ = as_floats(load(wide));
    }
  }

  DUALBIN_INLINE void put(const PairWord& word, Storage* out) const {
    if constexpr (sizeof(Storage) == 4) {
      for_parts<kVecsOfWord>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        Write::template put<kStream>(out + kFloats * kPart, word.template pick<kPart>(four_));
      });
    } else {
      for_parts<kVecsOfWord / 2>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        const Vec low = bits_of(word.template pick<2 * kPart>(four_));
        const Vec high = bits_of(word.template pick<2 * kPart + 1>(four_));
        const Vec halves = narrow_unsigned_in_order32(low, high);
        kStream ? stream(out + 2 * kFloats * kPart, halves) : store(out + 2 * kFloats * kPart, halves);
      });
    }
  }

 private:
  RowWeights<2> weights_;
  Vecf four_;
};

// A row of one or two planes: `Words` is one of the above.
template <int kPlanes, template <typename, bool> class Words, typename Write, bool kStream>
DUALBIN_INLINE void lookup_words(const LookupRow& row, const LookupShape& shape) {
  using Storage = typename Write::Storage;
  auto* out = static_cast<Storage*>(row.out);
  const uint8_t* bits = row.bits;
  const int64_t dim = shape.dim;
  const int64_t width = shape.width;
  const Words<Write, kStream> words(row.scale);
  int64_t d = 0;
  for (; d + kColumnsOfWord <= dim; d += kColumnsOfWord) words.put(RowWeights<kPlanes>::word(bits + d / 8, width), out + d);
  if (d == dim) return;
  const RestOfPlanes<kPlanes, 1> rest(bits + d / 8, width, width - d / 8);
  alignas(64) Storage values[kColumnsOfWord];
  Words<Write, false>(row.scale).put(RowWeights<kPlanes>::word(rest.planes, rest.kWidth), values);
  std::memcpy(out + d, values, static_cast<size_t>(dim - d) * sizeof(Storage));
}

template <bool kStream>
DUALBIN_INLINE void lookup_levels(const LookupRow* rows, int64_t count, const LookupShape& shape) {
  const PlaneLevels levels_of(shape.planes);
  for_lookup_chunks<float>(rows, count, shape, [&](const LookupChunks<float>& chunks, auto) {
    alignas(64) int8_t levels[kLanes][kChunk];
    levels_of(chunks.bits, chunks.bytes, shape.width, levels);
    for (int i = 0; i < kLanes; ++i) {
      const Vecf factor = all_floats(chunks.row[i]->scale * 0.015625f);
      const int64_t columns = chunks.columns[i];
      int64_t d = 0;
      for (; d + kFloats <= columns; d += kFloats) {
        WriteF32::put<kStream>(chunks.out[i] + d, times(levels_of.floats(levels[i] + d), factor));
      }
      if (d == columns) continue;
      alignas(64) float rest[kFloats];
      WriteF32::put<false>(rest, times(levels_of.floats(levels[i] + d), factor));
      std::memcpy(chunks.out[i] + d, rest, static_cast<size_t>(columns - d) * sizeof(float));
    }
  });
}

template <typename Write, bool kStream>
DUALBIN_INLINE void lookup_rows(const LookupRow* rows, int64_t count, const LookupShape& shape) {
  if (shape.planes > 2) {
    if constexpr (sizeof(typename Write::Storage) == 4) {
      return lookup_levels<kStream>(rows, count, shape);
    } else {
      return lookup_halves<Write, kStream>(rows, count, shape);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    fetch_later(rows[i], shape);
    if (shape.planes == 1) {
      lookup_words<1, SignsOfRow, Write, kStream>(rows[i], shape);
    } else {
      lookup_words<2, PairsOfRow, Write, kStream>(rows[i], shape);
    }
  }
}

template <typename Write>
void lookup(const LookupRow* rows, int64_t count, const LookupShape& shape) {
  shape.streamed ? lookup_rows<Write, true>(rows, count, shape) : lookup_rows<Write, false>(rows, count, shape);
}

inline void settle_streams() { finish_streams(); }

}  // namespace
}  // namespace dualbin::detail
