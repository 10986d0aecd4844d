// Packed bits as sign bits of floats.
#pragma once

#include <cstdint>

namespace dualbin::detail {

// Eight sign bits for every value of a packed byte: a weight is the row's scale with this sign, so a lookup multiplies nothing.
template <typename Storage>
struct SignTable {
  Storage signs[256][8];

  constexpr SignTable() : signs{} {
    constexpr int kTopBit = 8 * sizeof(Storage) - 1;
    for (int byte = 0; byte < 256; ++byte) {
      for (int k = 0; k < 8; ++k) signs[byte][k] = static_cast<Storage>(static_cast<Storage>(((byte >> k) & 1) ^ 1) << kTopBit);
    }
  }
};

alignas(64) inline constexpr SignTable<uint32_t> kSigns32;
alignas(64) inline constexpr SignTable<uint16_t> kSigns16;

}  // namespace dualbin::detail
