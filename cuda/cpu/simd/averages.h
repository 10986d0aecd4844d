// The average of two tables: weights go from the level of a towards that of b, by the same formula for one plane and for more. A level is
// v of s * (2m + 1) = 2v + 1, a number of as many bits as there are planes in two's complement, so it fits a byte.
#pragma once

#include "cpu/simd/flips.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/transpose.h"

namespace dualbin::detail {
namespace {

// The chunks that the lanes work on: consecutive ones of a list of rows; lanes behind the last chunk have no bytes.
struct AverageChunks {
  const RowPair* row[kLanes];
  int64_t at[kLanes];  // first byte
  int64_t bytes[kLanes];
  Vec used;  // the bits that stand for columns

  template <typename Make>
  DUALBIN_INLINE Vec each(const Make& make) const {
    Lane lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = make(*row[i]);
    return join(lanes);
  }

  // Plane p of the table that `bits` of a row begins.
  template <bool kWhole>
  DUALBIN_INLINE Vec read(const uint8_t* RowPair::* bits, const AverageShape& shape, int p) const {
    Lane lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const uint8_t* from = row[i]->*bits + p * shape.width + at[i];
      lanes[i] = kWhole ? load_lane(from) : bytes[i] == 0 ? lane8(0) : load_bytes(from, bytes[i]);
    }
    return join(lanes);
  }

  template <bool kWhole>
  DUALBIN_INLINE void write(const AverageShape& shape, int p, Vec value) const {
    Lane lanes[kLanes];
    split(value, lanes);
    for (int i = 0; i < kLanes; ++i) {
      uint8_t* to = row[i]->out + p * shape.width + at[i];
      if (kWhole) {
        store_lane(to, lanes[i]);
      } else if (bytes[i] != 0) {
        store_bytes(to, bytes[i], lanes[i]);
      }
    }
  }
};

template <typename Body>
DUALBIN_INLINE void for_average_chunks(const RowPair* rows, int64_t count, const AverageShape& shape, const Body& body) {
  const int64_t in_row = (shape.width + kChunkBytes - 1) / kChunkBytes;
  const int64_t in_last = shape.width - (in_row - 1) * kChunkBytes;
  alignas(16) uint8_t last_used[kChunkBytes];
  store_lane(last_used, first_bytes(in_last));
  last_used[in_last - 1] = shape.last;
  const Lane used[3] = {lane8(0xff), load_lane(last_used), lane8(0)};
  int64_t r = 0;
  int64_t c = 0;
  while (r < count) {
    AverageChunks chunks;
    Lane masks[kLanes];
    bool whole = true;
    for (int i = 0; i < kLanes; ++i) {
      const bool there = r < count;
      const bool last = c == in_row - 1;
      chunks.row[i] = &rows[there ? r : count - 1];
      chunks.at[i] = there ? c * kChunkBytes : 0;
      chunks.bytes[i] = !there ? 0 : last ? in_last : kChunkBytes;
      whole = whole && chunks.bytes[i] == kChunkBytes;
      masks[i] = used[!there ? 2 : last ? 1 : 0];
      if (!there) continue;
      c = last ? 0 : c + 1;
      r += last ? 1 : 0;
    }
    chunks.used = join(masks);
    whole ? body(chunks, Bool<true>{}) : body(chunks, Bool<false>{});
  }
}

// The random numbers of a chunk and the share of the way: `share` in 1/65536, and one that is a whole has random numbers of 0.
class Shares {
 public:
  explicit DUALBIN_INLINE Shares(const AverageChunks& chunks) : random_(chunks) {
    share_ = chunks.each([](const RowPair& r) { return lane16(static_cast<int>(r.share < 65535u ? r.share : 65535u)); });
    keep_ = chunks.each([](const RowPair& r) { return lane16(r.share > 65535u ? 0 : 0xffff); });
  }

  // All ones where a weight that is one level away goes there, for the next eight columns of every lane.
  DUALBIN_INLINE Vec next_taken() { return above_unsigned16(share_, both(random_.next(), keep_)); }

  // How many levels a weight goes that is `apart` levels away: (apart * share + 65535 - u) >> 16.
  DUALBIN_INLINE Vec next_way(Vec apart) {
    const Vec more = above_unsigned16(times16(apart, share_), both(random_.next(), keep_));
    return sub16(high_unsigned16(apart, share_), more);
  }

 private:
  ChunkRandom random_;
  Vec share_;
  Vec keep_;
};

DUALBIN_INLINE void average_signs(const RowPair* rows, int64_t count, const AverageShape& shape) {
  for_average_chunks(rows, count, shape, [&](const AverageChunks& chunks, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    const Vec a = chunks.read<kWhole>(&RowPair::a, shape, 0);
    const Vec inverted = chunks.each([](const RowPair& r) { return lane8(r.invert_b ? 0xff : 0); });
    const Vec b = differ(chunks.read<kWhole>(&RowPair::b, shape, 0), inverted);
    Shares shares(chunks);
    alignas(64) uint16_t found[8 * kLanes];
    for (int i = 0; i < 8; ++i) {
      const Vec first = shares.next_taken();
      const uint64_t tops = tops8(narrow16(first, shares.next_taken()));
      for (int l = 0; l < kLanes; ++l) found[8 * l + i] = static_cast<uint16_t>(tops >> (16 * l));
    }
    const Vec takes_b = both(load(found), chunks.used);
    chunks.write<kWhole>(shape, 0, either(without(a, takes_b), both(b, takes_b)));
  });
}

// The levels of a table as signed bytes, 16 columns of every lane in each vector. `inverted` inverts the weights.
template <bool kWhole>
DUALBIN_INLINE void read_levels(const AverageChunks& chunks, const uint8_t* RowPair::* bits, const AverageShape& shape, Vec inverted,
                                Vec (&columns)[8]) {
  const Vec negative = differ(differ(chunks.read<kWhole>(bits, shape, 0), all8(0xff)), inverted);
  Vec planes[8];
  for (int p = 0; p < 8; ++p) planes[p] = negative;
  for (int p = 1; p < shape.planes; ++p) planes[shape.planes - 1 - p] = differ(chunks.read<kWhole>(bits, shape, p), negative);
  transpose_bits(planes);
  bytes_in_order(planes, columns);
}

DUALBIN_INLINE void average_levels(const RowPair* rows, int64_t count, const AverageShape& shape) {
  for_average_chunks(rows, count, shape, [&](const AverageChunks& chunks, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    Vec columns[8];
    Vec to[8];
    read_levels<kWhole>(chunks, &RowPair::a, shape, zero(), columns);
    const Vec inverted = chunks.each([](const RowPair& r) { return lane8(r.invert_b ? 0xff : 0); });
    read_levels<kWhole>(chunks, &RowPair::b, shape, inverted, to);
    Shares shares(chunks);
    const auto step = [&](Vec from, Vec towards) {  // bytes of levels in the upper halves of 16 bits
      const Vec at = right_signed16(from, 8);
      const Vec distance = sub16(right_signed16(towards, 8), at);
      const Vec down = signs16(distance);
      return add16(at, sub16(differ(shares.next_way(abs16(distance)), down), down));
    };
    for (int i = 0; i < 8; ++i) {
      const Vec first = step(low8(columns[i], columns[i]), low8(to[i], to[i]));
      columns[i] = narrow16(first, step(upper8(columns[i], columns[i]), upper8(to[i], to[i])));
    }
    Vec planes[8];
    bytes_by_bit(columns, planes);
    transpose_bits(planes);
    const Vec negative = planes[7];
    chunks.write<kWhole>(shape, 0, without(chunks.used, negative));
    for (int p = 1; p < shape.planes; ++p) {
      chunks.write<kWhole>(shape, p, both(differ(planes[shape.planes - 1 - p], negative), chunks.used));
    }
  });
}

inline void average_rows(const RowPair* rows, int64_t count, const AverageShape& shape) {
  shape.planes == 1 ? average_signs(rows, count, shape) : average_levels(rows, count, shape);
}

}  // namespace
}  // namespace dualbin::detail
