// What a bag's sums and gradients are made of, and what becomes of them. Both back ends include this file.
//
// A row adds +magnitude or -magnitude to a column of a block; the blocks are added to a total. Votes are sums with magnitude 1: a block of
// them is exact in float32, their total is an integer.
#pragma once

#include "dualbin/types.h"
#include "rules/common.h"

namespace dualbin {

// Scale of the row `id`, or 0 where it takes no part in a bag: no row of the table, or padding.
DUALBIN_HD float bag_scale(const float* scale, int64_t rows, int64_t id, int64_t padding_idx) {
  return id >= 0 && id < rows && id != padding_idx ? scale[id] : 0.0f;
}

// The bag of position n, or -1 if it is in none. load(ids, n) reads an id. Offsets that do not ascend give some answer that holds n, or -1.
template <typename Load>
DUALBIN_HD int64_t bag_of(const Bags& bags, int64_t n, Load load) {
  int64_t low = 0;  // offsets before it are at most n
  int64_t high = bags.offsets.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (load(bags.offsets, middle) <= n) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t bag = low - 1;
  return bag >= 0 && bag < bags.count() && load(bags.offsets, bag) <= n && n < load(bags.offsets, bag + 1) ? bag : -1;
}

// What a row of a bag gets of its gradient. A product with 1 and a quotient by 1 are exact, so at most one of the two rounds.
struct BagShare {
  float factor = 1.0f;
  float divisor = 1.0f;

  DUALBIN_HD float operator()(float dy) const { return one_nan(dy * factor / divisor); }
};

DUALBIN_HD BagShare bag_share(const Bags& bags, const int32_t* counts, int64_t bag, int64_t n) {
  BagShare share;
  if (bags.weights != nullptr) share.factor = bags.weights[n];
  if (counts != nullptr) share.divisor = static_cast<float>(counts[bag] > 1 ? counts[bag] : 1);
  return share;
}

// The gradient of a weight from the sum over the columns. Zeros are +0.0, so that a sum over shards changes nothing.
DUALBIN_HD float bag_weight_share(float scale, double sum) { return one_nan(static_cast<float>(static_cast<double>(scale) * sum) + 0.0f); }

struct BagSum {
  using Total = float;

  static DUALBIN_HD float magnitude(float value) { return value; }
  static DUALBIN_HD void add(Total* total, float block) { *total += block; }

  static DUALBIN_HD float finish(Total total, int64_t rows, BagMode mode) {
    return one_nan(mode == BagMode::kMean ? total / static_cast<float>(rows > 1 ? rows : 1) : total);
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
