// How a row of floats becomes planes: the search for its scale in integers, and the level of a weight. Both back ends include this file.
//
// Magnitudes are integers h = rint(|w| * 2^(15-E)) in the search, so that its sums have no order. Levels m leave the least squared error at
// the scale A/C with A = sum h*(2m+1), C = sum (2m+1)^2, and the less of it, the larger A*A/C is (Lloyd 1982,
// doi:10.1109/TIT.1982.1056489).
#pragma once

#include "rules/common.h"
#include "rules/row.h"

namespace dualbin {

constexpr int kSearchBits = 15;
constexpr int kSearchSteps = 15;  // first candidates: the highest level at 64/64, 60/64, ... 8/64 of the row's largest magnitude
constexpr int kRefinements = 4;   // of the best of them, each by quantising anew with its best scale

// The levels that candidate `index` of a search gives are floor(h * numerator / denominator), at most `top`.
struct ScaleCandidate {
  int64_t numerator;
  int64_t denominator;
  int64_t top;

  DUALBIN_HD int64_t odd(int32_t h) const {
    const int64_t m = h * numerator / denominator;
    return 2 * (m < top ? m : top) + 1;
  }
};

struct ScaleSums {
  int64_t a = 0;
  int64_t c = 0;

  DUALBIN_HD void add(int32_t h, int64_t odd) {
    a += h * odd;
    c += odd * odd;
  }
};

struct ScaleSearch {
  int64_t top;
  int64_t largest;  // h of the row's largest magnitude, at least 1
  int64_t best_a = 0;
  int64_t best_c = 1;
  double score = -1.0;

  DUALBIN_HD ScaleSearch(int planes, int32_t largest_h) : top((int64_t{1} << (planes - 1)) - 1), largest(largest_h < 1 ? 1 : largest_h) {}

  DUALBIN_HD ScaleCandidate candidate(int index) const {
    if (index < kSearchSteps) return {64 * (2 * top + 1), 2 * (64 - 4 * index) * largest, top};
    return {best_c, best_a > 0 ? 2 * best_a : 1, top};
  }

  DUALBIN_HD void offer(const ScaleSums& sums) {
    const double a = static_cast<double>(sums.a);
    const double value = a * a / static_cast<double>(sums.c);
    if (!(value > score)) return;
    score = value;
    best_a = sums.a;
    best_c = sums.c;
  }

  // `exponent` is that of the row's largest magnitude.
  DUALBIN_HD float scale(int planes, int exponent) const {
    const double ratio = static_cast<double>(best_a) / static_cast<double>(best_c);
    const float found = static_cast<float>(ratio * power_of_two_double(exponent - kSearchBits + planes - 1));
    return found >= kMinScale ? found : kMinScale;
  }
};

// m of a weight with magnitude |w| in a row of this scale: the nearest level.
DUALBIN_HD int32_t level_of(float magnitude, float scale, int planes) {
  const double level = static_cast<double>(magnitude) * power_of_two_double(planes - 2) / static_cast<double>(scale);
  const double top = static_cast<double>((1 << (planes - 1)) - 1);
  return static_cast<int32_t>(level < top ? level : top);
}

// Scale of the top `fewer` planes of a row, from the exact sums A = sum (2M+1)*(2m+1) and C = sum (2m+1)^2: that of least squared error
// against the values of all planes.
DUALBIN_HD float fewer_planes_scale(float scale, int64_t a, int64_t c, int planes, int fewer) {
  if (scale == 0.0f) return 0.0f;
  const double ratio = static_cast<double>(a) / static_cast<double>(c);
  const float found = static_cast<float>(static_cast<double>(scale) * ratio * power_of_two_double(fewer - planes));
  const float magnitude = found < 0.0f ? -found : found;
  const float kept = magnitude >= kMinScale ? magnitude : kMinScale;
  return scale < 0.0f ? -kept : kept;
}

}  // namespace dualbin
