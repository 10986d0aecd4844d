// What a row adds to the columns of its bag, and what the sums become. Both back ends include this file.
#pragma once

#include "dualbin/types.h"
#include "rules/common.h"

namespace dualbin {

// The two kinds of sums. `Part` adds up a block of rows, `Total` the blocks; a column of a row has the sign bit `sign`: 0, or the top one.
struct BagSum {
  using Part = float;
  using Total = float;

  static DUALBIN_HD Part term(float magnitude, uint32_t sign) { return bits_float(float_bits(magnitude) ^ sign); }

  static DUALBIN_HD float finish(Total total, int64_t rows, BagMode mode) {
    const float value = mode == BagMode::kMean ? total / static_cast<float>(rows > 1 ? rows : 1) : total;
    return value == value ? value : bits_float(0x7fc00000u);  // processors disagree on the sign of a new NaN
  }
};

struct BagVotes {
  using Part = int32_t;
  using Total = int64_t;

  static DUALBIN_HD Part term(float, uint32_t sign) { return 1 - 2 * static_cast<int32_t>(sign >> 31); }

  static DUALBIN_HD float finish(Total total, int64_t rows, BagMode) {
    if (rows == 0) return 0.0f;
    return total >= 0 ? 1.0f : -1.0f;
  }
};

}  // namespace dualbin
