// The weights of a row times a float, for 32 columns at a time, where they are few: two with one plane, four with two.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/transpose.h"

namespace dualbin::detail {
namespace {

template <int kPlanes>
class RowWeights;

// +1 where the bit is set, else -1.
template <>
class RowWeights<1> {
 public:
  using Word = SignWord;

  explicit DUALBIN_INLINE RowWeights(float x) : set_(all_floats(x)), clear_(all_floats(-x)) {}

  // Of the columns whose bits begin at `bits`, in whole words.
  static DUALBIN_INLINE Word word(const uint8_t* bits, int64_t) { return Word(read_as<uint32_t>(bits)); }

  template <int part>
  DUALBIN_INLINE Vecf of(const Word& word) const {
    return word.template pick<part>(clear_, set_);
  }

 private:
  Vecf set_;
  Vecf clear_;
};

// s * (2m + 1) / 2 with the sign s of the first plane and the bit m of the second.
template <>
class RowWeights<2> {
 public:
  using Word = PairWord;

  explicit DUALBIN_INLINE RowWeights(float x) : four_(times(all_floats(x), floats_in_lanes(kWeights))) {}

  static DUALBIN_INLINE Word word(const uint8_t* bits, int64_t width) {
    return Word(read_as<uint32_t>(bits), read_as<uint32_t>(bits + width));
  }

  template <int part>
  DUALBIN_INLINE Vecf of(const Word& word) const {
    return word.template pick<part>(four_);
  }

  DUALBIN_INLINE Vecf four() const { return four_; }

 private:
  alignas(16) static constexpr float kWeights[4] = {-0.5f, 0.5f, -1.5f, 1.5f};

  Vecf four_;
};

// The last columns of a row, as planes of whole words.
template <int kPlanes, int kWords>
struct RestOfPlanes {
  static constexpr int64_t kWidth = 4 * kWords;
  alignas(64) uint8_t planes[kPlanes * kWidth] = {};

  DUALBIN_INLINE RestOfPlanes(const uint8_t* bits, int64_t width, int64_t bytes) {
    for (int p = 0; p < kPlanes; ++p) std::memcpy(planes + p * kWidth, bits + p * width, static_cast<size_t>(bytes));
  }
};

}  // namespace
}  // namespace dualbin::detail
