// Rows of more than two planes as floats of 16 bits. Within a lane 16 columns become 16 bytes and these two vectors of eight halves.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/levels_of_planes.h"
#include "cpu/simd/lookup_chunks.h"

namespace dualbin::detail {
namespace {

// Columns 16j to 16j + 15 of every lane.
template <bool kStream, bool kWhole>
DUALBIN_INLINE void put_halves(const LookupChunks<uint16_t>& chunks, int j, Vec low, Vec upper) {
  Lane parts[2][kLanes];
  split(low, parts[0]);
  split(upper, parts[1]);
  for (int i = 0; i < kLanes; ++i) {
    uint16_t* out = chunks.out[i] + 16 * j;
    const int64_t left = chunks.columns[i] - 16 * j;
    if (kWhole || left >= 16) {
      for (int half = 0; half < 2; ++half) {
        kStream ? stream_lane(out + 8 * half, parts[half][i]) : store_lane(out + 8 * half, parts[half][i]);
      }
    } else if (left > 0) {
      alignas(16) uint16_t values[16];
      store_lane(values, parts[0][i]);
      store_lane(values + 8, parts[1][i]);
      std::memcpy(out, values, static_cast<size_t>(left) * sizeof(uint16_t));
    }
  }
}

// Up to four planes have up to 16 products with a scale: the bits of a column choose both bytes of one.
template <typename Write, bool kStream>
DUALBIN_INLINE void lookup_nibbles(const LookupRow* rows, int64_t count, const LookupShape& shape) {
  alignas(64) float weights[16];  // of the bits of a column, that of plane p being bit p
  for (int n = 0; n < 16; ++n) {
    int odd = 1;
    for (int p = 1; p < shape.planes; ++p) odd += (n >> p & 1) << (shape.planes - p);
    weights[n] = static_cast<float>(n & 1 ? odd : -odd) / static_cast<float>(1 << (shape.planes - 1));
  }
  Lane low_of_row = lane8(0);
  Lane upper_of_row = lane8(0);
  for_lookup_chunks<uint16_t>(rows, count, shape, [&](const LookupChunks<uint16_t>& chunks, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    Lane lows[kLanes];
    Lane uppers[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      if (chunks.starts[i]) {
        alignas(64) uint16_t products[16];
        alignas(16) uint8_t bytes[2][16];
        for (int v = 0; v < 16; v += kFloats) {
          Write::template put<false>(products + v, times(load_floats(weights + v), all_floats(chunks.row[i]->scale)));
        }
        for (int n = 0; n < 16; ++n) {
          bytes[0][n] = static_cast<uint8_t>(products[n]);
          bytes[1][n] = static_cast<uint8_t>(products[n] >> 8);
        }
        low_of_row = load_lane(bytes[0]);
        upper_of_row = load_lane(bytes[1]);
      }
      lows[i] = low_of_row;
      uppers[i] = upper_of_row;
    }
    const Vec low = join(lows);
    const Vec upper = join(uppers);
    Vec planes[4];
    for (int p = 0; p < 4; ++p) planes[p] = p < shape.planes ? load_chunks<kWhole>(chunks.bits, chunks.bytes, p * shape.width) : zero();
    Vec by_bit[8];
    transpose_nibbles(planes, by_bit);
    Vec columns[8];
    bytes_in_order(by_bit, columns);
    for (int j = 0; j < 8; ++j) {
      const Vec first = choose8(low, columns[j]);
      const Vec second = choose8(upper, columns[j]);
      put_halves<kStream, kWhole>(chunks, j, low8(first, second), upper8(first, second));
    }
  });
}

// Of more planes: the level of a column, in the upper byte of 16 bits and those in the upper half of 32, is an integer that a float holds
// exactly. Even and odd columns go side by side, since halves of 32 bits come together without a change of order.
template <typename Write, bool kStream>
DUALBIN_INLINE void lookup_bytes(const LookupRow* rows, int64_t count, const LookupShape& shape) {
  const PlaneLevels levels_of(shape.planes);
  const Vec behind = all8(shape.planes == 8 ? 0x80 : 0);  // half a level
  const Vec odd = all32(0xffff0000u);
  for_lookup_chunks<uint16_t>(rows, count, shape, [&](const LookupChunks<uint16_t>& chunks, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    Lane factors[kLanes];
    for (int i = 0; i < kLanes; ++i) factors[i] = lane_of_floats(chunks.row[i]->scale * 0x1p-30f);  // 2^-24 of a 64th part
    const Vecf factor = as_floats(join(factors));
    Vec columns[8];
    levels_of.make<kWhole>(chunks.bits, chunks.bytes, shape.width, columns);
    const auto halves = [&](Vec words) {
      return Write::side_by_side(times(floats_of(left32<16>(words)), factor), times(floats_of(both(words, odd)), factor));
    };
    for (int j = 0; j < 8; ++j) {
      put_halves<kStream, kWhole>(chunks, j, halves(low8(behind, columns[j])), halves(upper8(behind, columns[j])));
    }
  });
}

template <typename Write, bool kStream>
DUALBIN_INLINE void lookup_halves(const LookupRow* rows, int64_t count, const LookupShape& shape) {
  shape.planes > 4 ? lookup_bytes<Write, kStream>(rows, count, shape) : lookup_nibbles<Write, kStream>(rows, count, shape);
}

}  // namespace
}  // namespace dualbin::detail
