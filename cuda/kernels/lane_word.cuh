// The 32 columns of a row that one thread has in lookups: a word of every plane, and the integers in it.
#pragma once

#include "kernels/memory.cuh"
#include "rules/packed_words.h"

namespace dualbin::kernels {

constexpr int kWord = 32;

// What a lane loads for its word of a tile.
template <int kPlanes>
struct LaneWord {
  float scale;               // NaN or 0 for ids that have no row
  bool ordinary;             // the planes count
  uint32_t planes[kPlanes];  // the sign, then magnitudes from the least significant on
};

// The words of a row, the sign first, then magnitudes from the least significant on; `to` has room for the planes of the table. kOnce: they
// are not kept in the caches for who reads them next.
template <bool kOnce = false, int kPlanes>
__device__ __forceinline__ void load_planes(const Table& table, int64_t id, int word, uint32_t (&to)[kPlanes]) {
  const uint8_t* at = table.bits + id * table.row_bytes() + 4 * word;
  const int64_t width = table.width();
  const auto load = [](const uint8_t* from) -> uint32_t {
    return kOnce ? __ldcs(reinterpret_cast<const unsigned*>(from)) : *reinterpret_cast<const uint32_t*>(from);
  };
  to[0] = load(at);
#pragma unroll
  for (int i = 1; i < kPlanes; ++i) {
    const int p = table.planes - i;
    if (p > 0) to[i] = load(at + p * width);
  }
}

// The signed integers t of 32 columns, four a word, in the order of columns: the weight is 2t + 1. t is m where the sign is set and -m - 1
// where it is not.
template <int kPlanes>
__device__ __forceinline__ void unpack_word(const uint32_t (&from)[kPlanes], uint32_t (&out)[8]) {
  uint32_t planes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) planes[i] = ~from[0] ^ (i + 1 < kPlanes ? from[i + 1] : 0u);  // above the magnitude: the sign again
  transpose_bytes(planes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t* r = planes + 4 * half;
    const uint32_t a = permute_bytes(r[0], r[1], 0x5140);
    const uint32_t b = permute_bytes(r[2], r[3], 0x5140);
    const uint32_t c = permute_bytes(r[0], r[1], 0x7362);
    const uint32_t d = permute_bytes(r[2], r[3], 0x7362);
    out[half] = permute_bytes(a, b, 0x5410);
    out[2 + half] = permute_bytes(a, b, 0x7632);
    out[4 + half] = permute_bytes(c, d, 0x5410);
    out[6 + half] = permute_bytes(c, d, 0x7632);
  }
}

// Four values scale * (2t + 1) * unit. 2^23 + 128 + t is a float whose last byte is t + 128; what follows is exact up to the product with
// the scale.
__device__ __forceinline__ void scale_bytes(uint32_t bytes, float scale, float unit, float (&values)[4]) {
  const uint32_t raised = bytes ^ 0x80808080u;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float t = bits_float(permute_bytes(raised, 0x4b000000u, 0x7440u | static_cast<uint32_t>(k))) - 8388736.0f;
    values[k] = scale * __fmaf_rn(t, 2.0f * unit, unit);
  }
}

}  // namespace dualbin::kernels
