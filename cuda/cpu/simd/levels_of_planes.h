// The weights of several planes as signed bytes.
#pragma once

#include "cpu/simd/transpose.h"

namespace dualbin::detail {
namespace {

// A plane of the chunks at bits[i], of bytes[i] bytes; kWhole: 16 bytes each.
template <bool kWhole>
DUALBIN_INLINE Vec load_chunks(const uint8_t* const (&bits)[kLanes], const int64_t (&bytes)[kLanes], int64_t plane) {
  Lane lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = kWhole ? load_lane(bits[i] + plane) : bytes[i] == 0 ? lane8(0) : load_bytes(bits[i] + plane, bytes[i]);
  }
  return join(lanes);
}

// With the sign s of a weight and the k - 1 bits m of its magnitude, s * (2m + 1) is 2v + 1 for a number v of k bits in two's complement:
// its top bit is that of s inverted, the others those of m, inverted where s is below 0. In the top bits of a byte, with a 1 behind them,
// v is s * (2m + 1) * 2^(7 - k), 64 times the weight; eight planes leave no room for that 1.
class PlaneLevels {
 public:
  explicit DUALBIN_INLINE PlaneLevels(int planes) : planes_(planes), half_(all_floats(planes == kMost ? 0.5f : 0.0f)) {}

  // The chunks at bits[i], of bytes[i] bytes of every plane, one in each lane; vector j has the columns 16j to 16j + 15 of each.
  template <bool kWhole>
  DUALBIN_INLINE void make(const uint8_t* const (&bits)[kLanes], const int64_t (&bytes)[kLanes], int64_t width, Vec (&columns)[8]) const {
    Vec planes[8];
    planes[7] = differ(load_chunks<kWhole>(bits, bytes, 0), all8(0xff));
    for (int p = 1; p < 8; ++p) {
      planes[7 - p] = p < planes_ ? differ(load_chunks<kWhole>(bits, bytes, p * width), planes[7]) : p == planes_ ? all8(0xff) : zero();
    }
    transpose_bits(planes);
    bytes_in_order(planes, columns);
  }

  // The same, a chunk's columns side by side.
  DUALBIN_INLINE void operator()(const uint8_t* const (&bits)[kLanes], const int64_t (&bytes)[kLanes], int64_t width,
                                 int8_t (&levels)[kLanes][kChunk]) const {
    Vec columns[8];
    make<false>(bits, bytes, width, columns);
    for (int i = 0; i < 8; ++i) {
      Lane lanes[kLanes];
      split(columns[i], lanes);
      for (int l = 0; l < kLanes; ++l) store_lane(levels[l] + 16 * i, lanes[l]);
    }
  }

  // 64 times the weights whose bytes begin at p, exactly.
  DUALBIN_INLINE Vecf floats(const int8_t* p) const { return add(floats_of_bytes(p), half_); }

 private:
  static constexpr int kMost = 8;

  int planes_;
  Vecf half_;
};

}  // namespace
}  // namespace dualbin::detail
