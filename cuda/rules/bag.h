// What a bag's sums are made of, and what becomes of them. Both back ends include this file.
//
// A row adds +magnitude or -magnitude to a column of a block; the blocks are added to a total. Votes are sums with magnitude 1: a block of
// them is exact in float32, their total is an integer.
#pragma once

#include "dualbin/types.h"
#include "rules/common.h"

namespace dualbin {

struct BagSum {
  using Total = float;

  static DUALBIN_HD float magnitude(float value) { return value; }
  static DUALBIN_HD void add(Total* total, float block) { *total += block; }

  static DUALBIN_HD float finish(Total total, int64_t rows, BagMode mode) {
    const float value = mode == BagMode::kMean ? total / static_cast<float>(rows > 1 ? rows : 1) : total;
    return value == value ? value : bits_float(0x7fc00000u);  // processors disagree on the sign of a new NaN
  }
};

struct BagVotes {
  using Total = int64_t;

  static DUALBIN_HD float magnitude(float) { return 1.0f; }
  static DUALBIN_HD void add(Total* total, float block) { *total += static_cast<int32_t>(block); }

  static DUALBIN_HD float finish(Total total, int64_t rows, BagMode) {
    if (rows == 0) return 0.0f;
    return total >= 0 ? 1.0f : -1.0f;
  }
};

}  // namespace dualbin
