// Planes of bits to bytes of columns and back, for 16 bytes of each plane a lane: 8 x 8 bits by three rounds of exchanges, then the bytes
// by unpacking. Included after a vector header.
#pragma once

namespace dualbin::detail {
namespace {

template <int k>
DUALBIN_INLINE void exchange_bits(Vec& a, Vec& b, Vec keep) {
  const Vec moved = both(differ(right16<k>(a), b), keep);
  b = differ(b, moved);
  a = differ(a, left16<k>(moved));
}

// Bit k of byte i of planes[p] changes places with bit p of byte i of planes[k].
DUALBIN_INLINE void transpose_bits(Vec (&planes)[8]) {
  const Vec nibbles = all8(0x0f);
  const Vec pairs = all8(0x33);
  const Vec ones = all8(0x55);
  for (int i = 0; i < 4; ++i) exchange_bits<4>(planes[i], planes[i + 4], nibbles);
  for (int i = 0; i < 2; ++i) exchange_bits<2>(planes[i], planes[i + 2], pairs);
  for (int i = 4; i < 6; ++i) exchange_bits<2>(planes[i], planes[i + 2], pairs);
  for (int i = 0; i < 8; i += 2) exchange_bits<1>(planes[i], planes[i + 1], ones);
}

// The same for four planes, of which the bytes become nibbles: as if four planes of zeros were behind them.
DUALBIN_INLINE void transpose_nibbles(Vec (&planes)[4], Vec (&by_bit)[8]) {
  const Vec nibbles = all8(0x0f);
  const Vec pairs = all8(0x33);
  const Vec ones = all8(0x55);
  for (int i = 0; i < 2; ++i) exchange_bits<2>(planes[i], planes[i + 2], pairs);
  for (int i = 0; i < 4; i += 2) exchange_bits<1>(planes[i], planes[i + 1], ones);
  for (int i = 0; i < 4; ++i) {
    by_bit[i] = both(planes[i], nibbles);
    by_bit[i + 4] = both(right16<4>(planes[i]), nibbles);
  }
}

// Byte i of by_bit[k] is column 8i + k of a lane; in order, vector j holds the columns 16j to 16j + 15.
DUALBIN_INLINE void bytes_in_order(const Vec (&by_bit)[8], Vec (&columns)[8]) {
  for (int half = 0; half < 2; ++half) {
    Vec a[4];
    for (int i = 0; i < 4; ++i) {
      a[i] = half == 0 ? low8(by_bit[2 * i], by_bit[2 * i + 1]) : upper8(by_bit[2 * i], by_bit[2 * i + 1]);
    }
    const Vec b[4] = {low16(a[0], a[1]), upper16(a[0], a[1]), low16(a[2], a[3]), upper16(a[2], a[3])};
    columns[4 * half] = low32(b[0], b[2]);
    columns[4 * half + 1] = upper32(b[0], b[2]);
    columns[4 * half + 2] = low32(b[1], b[3]);
    columns[4 * half + 3] = upper32(b[1], b[3]);
  }
}

// The way back. Bytes of two columns come together first; after that an unpacking is a transposition of pairs.
DUALBIN_INLINE void bytes_by_bit(const Vec (&columns)[8], Vec (&by_bit)[8]) {
  alignas(16) static constexpr uint8_t kPairs[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  const Vec pairs = in_lanes(load_lane(kPairs));
  Vec a[8];
  for (int i = 0; i < 8; ++i) a[i] = choose8(columns[i], pairs);
  for (int half = 0; half < 2; ++half) {  // bits 4 * half to 4 * half + 3
    Vec b[4];
    for (int i = 0; i < 4; ++i) b[i] = half == 0 ? low16(a[2 * i], a[2 * i + 1]) : upper16(a[2 * i], a[2 * i + 1]);
    const Vec c[4] = {low32(b[0], b[1]), upper32(b[0], b[1]), low32(b[2], b[3]), upper32(b[2], b[3])};
    by_bit[4 * half] = low64(c[0], c[2]);
    by_bit[4 * half + 1] = upper64(c[0], c[2]);
    by_bit[4 * half + 2] = low64(c[1], c[3]);
    by_bit[4 * half + 3] = upper64(c[1], c[3]);
  }
}

// ---- the bytes of a plane, 16 at most

template <typename T>
DUALBIN_INLINE T read_as(const uint8_t* p) {
  T x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

template <typename T>
DUALBIN_INLINE void write_as(uint8_t* p, T x) {
  std::memcpy(p, &x, sizeof(x));
}

// `bytes` bytes from p on and zeros behind them; no other byte is read.
DUALBIN_INLINE Lane load_bytes(const uint8_t* p, int64_t bytes) {
  if (bytes == kChunkBytes) return load_lane(p);
  uint64_t x[2] = {0, 0};
  if (bytes >= 8) {
    x[0] = read_as<uint64_t>(p);
    if (bytes > 8) x[1] = read_as<uint64_t>(p + bytes - 8) >> (8 * (16 - bytes));
  } else if (bytes >= 4) {
    x[0] = read_as<uint32_t>(p) | static_cast<uint64_t>(read_as<uint32_t>(p + bytes - 4)) << (8 * (bytes - 4));
  } else {
    for (int64_t i = 0; i < bytes; ++i) x[0] |= static_cast<uint64_t>(p[i]) << (8 * i);
  }
  return load_lane(x);
}

DUALBIN_INLINE void store_bytes(uint8_t* p, int64_t bytes, Lane value) {
  if (bytes == kChunkBytes) return store_lane(p, value);
  uint64_t x[2];
  store_lane(x, value);
  if (bytes >= 8) {
    write_as(p, x[0]);
    if (bytes > 8) write_as(p + bytes - 8, x[0] >> (8 * (bytes - 8)) | x[1] << (8 * (16 - bytes)));
  } else if (bytes >= 4) {
    write_as(p, static_cast<uint32_t>(x[0]));
    write_as(p + bytes - 4, static_cast<uint32_t>(x[0] >> (8 * (bytes - 4))));
  } else {
    for (int64_t i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(x[0] >> (8 * i));
  }
}

// All ones in the first `bytes` bytes of a lane.
DUALBIN_INLINE Lane first_bytes(int64_t bytes) {
  alignas(16) static constexpr uint8_t kRamp[32] = {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
  return load_lane(kRamp + kChunkBytes - bytes);
}

}  // namespace
}  // namespace dualbin::detail
