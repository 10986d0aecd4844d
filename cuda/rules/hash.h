// Counter-based random numbers: 16 uniform bits a weight from (seed, step, row, column), so that neither order nor sharding changes them.
// The mixing constants are those of the public-domain 32-bit finaliser "lowbias32" (Chris Wellons, hash-prospector).
#pragma once

#include "rules/common.h"

namespace dualbin {

DUALBIN_HD uint32_t mix_first(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  return x ^ (x >> 15);
}

DUALBIN_HD uint32_t mix_last(uint32_t x) {
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

DUALBIN_HD uint32_t mix(uint32_t x) { return mix_last(mix_first(x)); }

struct RowKey {
  uint32_t k0;
  uint32_t k1;
};

DUALBIN_HD RowKey mix_word(RowKey key, uint32_t word) { return {mix(key.k0 ^ word), mix(key.k1 ^ word)}; }

// What all rows of a step share of their keys.
DUALBIN_HD RowKey step_key(const uint32_t seed[2], const uint32_t step[2]) {
  RowKey key{0x243F6A88u, 0x85A308D3u};  // first words of pi: two different streams
  key = mix_word(key, seed[0]);
  key = mix_word(key, seed[1]);
  key = mix_word(key, step[0]);
  return mix_word(key, step[1]);
}

DUALBIN_HD RowKey row_key(RowKey of_step, int64_t row) {
  const uint64_t r = static_cast<uint64_t>(row);
  return mix_word(mix_word(of_step, static_cast<uint32_t>(r)), static_cast<uint32_t>(r >> 32));
}

DUALBIN_HD RowKey row_key(const uint32_t seed[2], const uint32_t step[2], int64_t row) { return row_key(step_key(seed, step), row); }

constexpr uint32_t kPairStride = 0x9E3779B9u;

// Random bits of the columns 2*pair (low half) and 2*pair + 1 (high half).
DUALBIN_HD uint32_t column_pair_bits(RowKey key, uint32_t pair) { return mix_last(mix_first(key.k0 + pair * kPairStride) ^ key.k1); }

}  // namespace dualbin
