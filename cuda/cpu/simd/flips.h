// Counters of one or more bits: what evidence does to the sign and the magnitude planes of rows, a chunk of columns in each lane.
//
// A move is (evidence * coef + (U << 16)) >> 32. With coef = high * 2^16 + low that is (evidence * high + (evidence * low >> 16) + U) >>
// 16, to the last bit, since the rest is a multiple of 2^16: one multiply-add of 16-bit pairs and the upper half of a product.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/transpose.h"

namespace dualbin::detail {
namespace {

constexpr uint32_t kGolden = 0x9e3779b9u;  // of rules/hash.h, as the two factors below
constexpr uint32_t kFirstFactor = 0x7feb352du;
constexpr uint32_t kLastFactor = 0x846ca68bu;

// The chunks that the lanes work on: consecutive ones of a list of rows; lanes behind the last chunk have no bytes.
struct Chunks {
  const FlipRow* row[kLanes];
  uint8_t* table[kLanes];    // this byte of plane 0
  uint8_t* counter[kLanes];  // of plane 0 too, if the planes of the counter went back so far
  uint8_t* target[kLanes];
  int64_t at[kLanes];  // first byte
  int64_t bytes[kLanes];
  Vec used;  // the bits that stand for columns

  // kWhole: every lane has 16 bytes.
  template <bool kWhole>
  DUALBIN_INLINE Vec read(const FlipShape& shape, int p) const {
    Lane lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const uint8_t* from = (p < shape.planes ? table[i] : counter[i]) + p * shape.width;
      lanes[i] = kWhole ? load_lane(from) : bytes[i] == 0 ? lane8(0) : load_bytes(from, bytes[i]);
    }
    return join(lanes);
  }

  template <bool kWhole>
  DUALBIN_INLINE void write(const FlipShape& shape, int p, Vec value) const {
    if (shape.masked && p < shape.planes) value = differ(value, read<kWhole>(shape, p));
    Lane lanes[kLanes];
    split(value, lanes);
    for (int i = 0; i < kLanes; ++i) {
      uint8_t* to = (p < shape.planes ? target[i] : counter[i]) + p * shape.width;
      if (kWhole) {
        store_lane(to, lanes[i]);
      } else if (bytes[i] != 0) {
        store_bytes(to, bytes[i], lanes[i]);
      }
    }
  }

  template <typename Make>
  DUALBIN_INLINE Vec each(const Make& make) const {
    Lane lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = make(*row[i]);
    return join(lanes);
  }
};

// Calls body(chunks, whole) for groups of kLanes chunks of all rows.
template <typename Body>
DUALBIN_INLINE void for_chunks(const FlipRow* rows, int64_t count, const FlipShape& shape, const Body& body) {
  const int64_t in_row = (shape.width + kChunkBytes - 1) / kChunkBytes;
  const int64_t in_last = shape.width - (in_row - 1) * kChunkBytes;
  alignas(16) uint8_t last_used[kChunkBytes];
  store_lane(last_used, first_bytes(in_last));
  last_used[in_last - 1] = shape.last;
  const Lane used[3] = {lane8(0xff), load_lane(last_used), lane8(0)};
  int64_t r = 0;
  int64_t c = 0;
  while (r < count) {
    Chunks chunks;
    Lane masks[kLanes];
    bool whole = true;
    for (int i = 0; i < kLanes; ++i) {
      const bool there = r < count;
      const bool last = c == in_row - 1;
      const FlipRow& row = rows[there ? r : count - 1];
      const int64_t at = there ? c * kChunkBytes : 0;
      chunks.row[i] = &row;
      chunks.table[i] = row.table + at;
      chunks.counter[i] = row.counter == nullptr ? chunks.table[i] : row.counter + at - shape.planes * shape.width;
      chunks.target[i] = row.target + at;
      chunks.at[i] = at;
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

// Random numbers of eight columns a lane at a time, as four words of two.
class ChunkRandom {
 public:
  template <typename AnyChunks>
  explicit DUALBIN_INLINE ChunkRandom(const AnyChunks& chunks) {
    Lane starts[kLanes];
    Lane keys[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      starts[i] = lane32(chunks.row[i]->k0 + static_cast<uint32_t>(4 * chunks.at[i]) * kGolden);
      keys[i] = lane32(chunks.row[i]->k1);
    }
    alignas(16) static constexpr uint32_t kSteps[4] = {0, kGolden, 2 * kGolden, 3 * kGolden};
    counter_ = add32(join(starts), in_lanes(load_lane(kSteps)));
    key_ = join(keys);
  }

  DUALBIN_INLINE Vec next() {
    Vec x = counter_;
    counter_ = add32(counter_, all32(4 * kGolden));
    x = times32(differ(x, right32<16>(x)), all32(kFirstFactor));
    x = differ(differ(x, right32<15>(x)), key_);
    x = times32(x, all32(kLastFactor));
    return differ(x, right32<16>(x));
  }

 private:
  Vec counter_;
  Vec key_;
};

// Evidence of columns 16 * i + 8 * half of every lane's chunk, less its mean and the dead zone.
template <bool kZone>
class ChunkEvidence {
 public:
  explicit DUALBIN_INLINE ChunkEvidence(const Chunks& chunks, const FlipShape& shape) : later_step_(16 * shape.later_element) {
    for (int i = 0; i < kLanes; ++i) {
      from_[i] = chunks.row[i]->evidence + 8 * chunks.at[i];
      later_[i] = static_cast<const char*>(chunks.row[i]->later) + 8 * chunks.at[i] * shape.later_element;
    }
    if (!kZone) return;
    zone_ = chunks.each([](const FlipRow& r) { return lane16(r.zone); });
    mean_ = chunks.each([](const FlipRow& r) { return lane16(r.mean); });
  }

  DUALBIN_INLINE Vec operator()(int i, int half) const {
    if (half == 0) {
      for (int l = 0; l < kLanes; ++l) fetch(later_[l] + i * later_step_);
    }
    Lane lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = load_lane(from_[l] + 16 * i + 8 * half);
    const Vec all = join(lanes);
    if (!kZone) return all;
    const Vec centred = sub16(all, mean_);
    return with_sign16(less_to_zero16(abs16(centred), zone_), centred);
  }

 private:
  const int16_t* from_[kLanes];
  const char* later_[kLanes];
  int64_t later_step_;
  Vec zone_;
  Vec mean_;
};

// a * high + (b in 1/65536) for the even and for the odd columns: b is the upper half of a * low.
struct Products {
  Vec even;
  Vec odd;

  DUALBIN_INLINE Products(Vec a, Vec b, Vec high_and_1)
      : even(dot16(odd16(a, left32<16>(b)), high_and_1)), odd(dot16(odd16(right32<16>(a), b), high_and_1)) {}
};

DUALBIN_INLINE Lane high_and_1(int32_t high) { return lane32(static_cast<uint32_t>(high) | 0x10000u); }

DUALBIN_INLINE uint64_t ones_of(Vec x) {
  alignas(64) uint64_t words[sizeof(Vec) / 8];
  store(words, x);
  uint64_t total = 0;
  for (const uint64_t word : words) total += static_cast<uint64_t>(__builtin_popcountll(word));
  return total;
}

template <int kBits, bool kZone>
FlipCounts flip_rows(const FlipRow* rows, int64_t count, const FlipShape& shape) {
  FlipCounts counts{0, 0};
  const Vec most = all16((1 << (kBits - 1)) - 1);
  const Vec top = all8(0x80);
  const Vec low_half = all32(0xffff);
  for_chunks(rows, count, shape, [&](const Chunks& chunks, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    Vec planes[8];
    for (int p = 1; p < kBits; ++p) planes[kBits - 1 - p] = chunks.template read<kWhole>(shape, p);
    for (int p = kBits - 1; p < 8; ++p) planes[p] = zero();
    transpose_bits(planes);
    Vec columns[8];
    bytes_in_order(planes, columns);
    // coef = high * 2^16 + low with a signed low
    const Vec low = chunks.each([](const FlipRow& r) { return lane16(static_cast<int16_t>(r.coef)); });
    const Vec high = chunks.each([](const FlipRow& r) { return high_and_1((r.coef - static_cast<int16_t>(r.coef)) >> 16); });
    ChunkRandom random(chunks);
    const ChunkEvidence<kZone> evidence(chunks, shape);
    for (int i = 0; i < 8; ++i) {
      Vec next[2];
      Vec flip[2];
      for (int half = 0; half < 2; ++half) {
        const Vec e = evidence(i, half);
        const Vec u = random.next();
        const Products sum(e, high16(e, low), high);
        const Vec even = right32<16>(add32(sum.even, both(u, low_half)));
        const Vec move = odd16(even, add32(sum.odd, right32<16>(u)));
        const Vec magnitude = half == 0 ? low8(columns[i], zero()) : upper8(columns[i], zero());
        const Vec moved = add16(magnitude, move);
        flip[half] = signs16(moved);
        next[half] = min16(differ(moved, flip[half]), most);
      }
      columns[i] = either(narrow_unsigned16(next[0], next[1]), both(narrow16(flip[0], flip[1]), top));
    }
    bytes_by_bit(columns, planes);
    transpose_bits(planes);
    Vec full = chunks.used;
    for (int p = 1; p < kBits; ++p) {
      const Vec plane = both(planes[kBits - 1 - p], chunks.used);
      full = both(full, plane);
      chunks.template write<kWhole>(shape, p, plane);
    }
    const Vec flips = both(planes[7], chunks.used);
    chunks.template write<kWhole>(shape, 0, differ(flips, chunks.template read<kWhole>(shape, 0)));
    counts.flips += ones_of(flips);
    counts.clipped += ones_of(full);
  });
  return counts;
}

// A counter of one bit: it flips by chance, with the rate times (evidence * coef) >> 16.
template <bool kZone>
FlipCounts flip_by_chance(const FlipRow* rows, int64_t count, const FlipShape& shape) {
  FlipCounts counts{0, 0};
  const Vec low_half = all32(0xffff);
  const Vec most = all32(65536);
  for_chunks(rows, count, shape, [&](const Chunks& chunks, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    const Vec low = chunks.each([](const FlipRow& r) { return lane16(static_cast<int16_t>(r.coef & 0xffff)); });
    const Vec high = chunks.each([](const FlipRow& r) { return high_and_1(r.coef >> 16); });
    const Vec share = chunks.each([](const FlipRow& r) { return lane32(r.share); });
    ChunkRandom random(chunks);
    const ChunkEvidence<kZone> evidence(chunks, shape);
    alignas(64) uint16_t found[8 * kLanes];
    for (int i = 0; i < 8; ++i) {
      Vec flip[2];
      for (int half = 0; half < 2; ++half) {
        const Vec against = max16(sub16(zero(), evidence(i, half)), zero());
        const Vec u = random.next();
        const Products chance(against, high_unsigned16(against, low), high);
        const auto flips = [&](Vec product, Vec u16) {
          const Vec x = min32(product, most);
          const Vec even = right64<16>(times_even32(x, share));
          const Vec odd = left64<16>(times_even32(right64<32>(x), share));
          return above32(odd32(even, odd), u16);
        };
        flip[half] = odd16(flips(chance.even, both(u, low_half)), flips(chance.odd, right32<16>(u)));
      }
      const uint64_t tops = tops8(narrow16(flip[0], flip[1]));
      for (int l = 0; l < kLanes; ++l) found[8 * l + i] = static_cast<uint16_t>(tops >> (16 * l));
    }
    const Vec flips = both(load(found), chunks.used);
    chunks.template write<kWhole>(shape, 0, differ(flips, chunks.template read<kWhole>(shape, 0)));
    counts.flips += ones_of(flips);
  });
  return counts;
}

template <int kBits>
FlipCounts flip(const FlipRow* rows, int64_t count, const FlipShape& shape) {
  bool plain = true;
  for (int64_t i = 0; i < count; ++i) plain = plain && rows[i].zone == 0 && rows[i].mean == 0;
  if constexpr (kBits == 1) {
    return plain ? flip_by_chance<false>(rows, count, shape) : flip_by_chance<true>(rows, count, shape);
  } else {
    return plain ? flip_rows<kBits, false>(rows, count, shape) : flip_rows<kBits, true>(rows, count, shape);
  }
}

}  // namespace
}  // namespace dualbin::detail
