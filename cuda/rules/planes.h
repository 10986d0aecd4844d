// Where the bit-planes of a row lie, and the values that they stand for.
//
// A weight is s * (2m + 1) / 2^(planes - 1) times the scale of its row: s, +1 or -1, is plane 0 of the table, m the integer of its other
// planes, most significant first. The counter of the optimizer holds the less significant planes of the same integer.
#pragma once

#include "dualbin/types.h"
#include "rules/common.h"

namespace dualbin {

// Byte `byte` of every plane of a row, as one list: the sign, then the magnitude from its most significant plane on.
struct RowPlanes {
  uint8_t* table;    // this byte of plane 0
  uint8_t* counter;  // this byte of the first plane below the table's, or null
  int64_t width;     // bytes from plane to plane
  int served;        // planes of the table

  DUALBIN_HD uint8_t* at(int plane) const { return plane < served ? table + plane * width : counter + (plane - served) * width; }
};

DUALBIN_HD RowPlanes row_planes(const Table& table, uint8_t* counter, int bits, int64_t row, int64_t byte) {
  const int64_t width = table.width();
  const int below = bits - table.planes;
  uint8_t* own = below > 0 ? counter + row * width * below + byte : nullptr;
  return {table.bits + row * width * table.planes + byte, own, width, table.planes};
}

// s * (2m + 1) of column k of a byte; `byte` points to it in plane 0.
DUALBIN_HD int32_t weight_of(const uint8_t* byte, int64_t width, int planes, int k) {
  int32_t m = 0;
  for (int p = 1; p < planes; ++p) m = m << 1 | ((byte[p * width] >> k) & 1);
  const int32_t odd = 2 * m + 1;
  return ((byte[0] >> k) & 1) != 0 ? odd : -odd;
}

// 2^(1 - planes): what an odd integer is multiplied with, exactly, before the scale.
DUALBIN_HD float plane_unit(int planes) { return power_of_two(1 - planes); }

}  // namespace dualbin
