// rules/word.h and rules/word_row.h, which the GPU kernels are made of, against rules/row.h, on the host.
#include "rules/word.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_support.h"
#include "rules/word_row.h"

using namespace dualbin;

namespace {

struct Random {
  uint32_t state;

  uint32_t operator()() { return state = mix(state + 0x9E3779B9u); }
  uint32_t below(uint32_t n) { return (*this)() % n; }
  double uniform() { return (*this)() * 0x1p-32; }
};

// A row of `dim` columns, a multiple of 32, with its planes, and what a step makes of it by rules/row.h.
struct Row {
  int64_t dim;
  int planes;
  Rule rule;
  std::vector<uint8_t> bits, counter;
  std::vector<float> gradient;
  float scale;
};

float random_value(Random& random, int style, float size) {
  const double uniform = random.uniform();
  switch (style) {
    case 0:
      return static_cast<float>(2 * uniform - 1) * size;
    case 1:
      return random.below(7) != 0 ? 0.0f : static_cast<float>(uniform - 0.5) * size;
    case 2:
      return std::ldexp(static_cast<float>(uniform - 0.5), -static_cast<int>(random.below(40))) * size;
    case 3:
      return random.below(2) != 0 ? size : -size;
    default:  // halves of a unit in the last place of the quantised value
      return (static_cast<float>(random.below(32769)) * 0.5f - 8192.0f) * size;
  }
}

Row random_row(Random& random, int bits, int planes, bool shaped, int64_t dim) {
  Row row{dim, planes, {}, {}, {}, {}, 0.0f};
  row.rule.kind = RuleKind::kCounter;
  row.rule.bits = bits;
  row.rule.eta = std::ldexp(1.0f, static_cast<int>(random.below(12)) - 4);
  if (shaped) {
    row.rule.dead_zone_q8 = static_cast<int32_t>(random.below(600));
    row.rule.center = random.below(2) != 0;
  }
  const size_t width = static_cast<size_t>(dim) / 8;
  for (size_t i = 0; i < width * static_cast<size_t>(planes); ++i) row.bits.push_back(static_cast<uint8_t>(random.below(256)));
  for (size_t i = 0; i < width * static_cast<size_t>(bits - planes); ++i) row.counter.push_back(static_cast<uint8_t>(random.below(256)));
  const int style = static_cast<int>(random.below(5));
  const float size = std::ldexp(1.0f, static_cast<int>(random.below(120)) - 60);
  for (int64_t d = 0; d < dim; ++d) row.gradient.push_back(random_value(random, style, size));
  row.scale = static_cast<float>(random.uniform() - 0.5);
  return row;
}

uint32_t load_word(const uint8_t* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

void check_row(Random& random, Row& row) {
  const int bits = row.rule.bits;
  const int levels = bits - 1;
  const int64_t width = row.dim / 8;
  const Table table{row.bits.data(), &row.scale, 1, row.dim, row.planes};
  State state;
  state.counter = row.counter.data();
  const StepContext context{{7, random.below(1 << 30)}, {3, 0}, {0, 0}, 0.7f, 0.0f};

  uint32_t largest = 0;
  for (const float g : row.gradient) largest = std::max(largest, float_bits(g) & 0x7fffffffu);
  const Quantiser quantise = make_quantiser(largest);
  RowSums sums;
  for (int64_t d = 0; d < row.dim; ++d) {
    sums.add(quantise(row.gradient[d]), weight_of(row.bits.data() + d / 8, width, row.planes, static_cast<int>(d % 8)));
  }
  const RowStep step = finish_row(row.rule, context, state, table, 0, row.scale, sums, quantise.exponent);

  // The row's integers in their cheap form.
  CHECK(floor_root(static_cast<uint32_t>(floor_divide(sums.squares, inverse_of(row.dim)))) == step.rms);
  const uint64_t rate = step_rate(bits == 1 ? 1.0f : context.lr, row.rule.eta);
  CHECK(floor_quotient(rate, static_cast<float>(rate), step.rms) == static_cast<uint32_t>(step.coef));

  const bool shaped = row.rule.dead_zone_q8 > 0 || row.rule.center;
  RowSums word_sums;
  const RowPlanes where = row_planes(table, state.counter, bits, 0, 0);
  for (int64_t at = 0; at < row.dim; at += kWordColumns) {
    float x[kWordColumns];
    std::copy_n(row.gradient.begin() + at, kWordColumns, x);
    const uint32_t signs = load_word(where.at(0) + at / 8);
    uint32_t planes[8] = {};
    for (int p = 0; p < levels; ++p) planes[p] = load_word(where.at(levels - p) + at / 8);
    uint32_t f[kWordPairs];
    uint32_t values[8];
    for (float& value : x) value *= quantise.first;
    quantise_word(x, turned_columns(signs, step.negative), quantise.second, f);
    magnitudes_of(planes, levels, values);
    word_sums.squares += sum_word_squares(f);
    int64_t aligned = sum_word(f);
    if (row.planes > 1) aligned += 2 * int64_t{sum_word_magnitudes(f, values, bits - row.planes)};
    word_sums.aligned += step.negative ? aligned : -aligned;

    WordStep word{step.key, step.coef, step.zone, step.negative ? -step.mean : step.mean, step.share};
    word.key.k0 += static_cast<uint32_t>(at / 2) * kPairStride;
    uint32_t flips;
    if (levels == 0) {
      flips = shaped ? step_signs<true>(word, f) : step_signs<false>(word, f);
    } else {
      flips = shaped ? step_magnitudes<true>(word, f, levels, values) : step_magnitudes<false>(word, f, levels, values);
    }
    uint32_t most = levels == 0 ? 0u : ~0u;
    for (int p = 0; p < levels; ++p) most &= values[p];
    int clipped = __builtin_popcount(most);
    for (int64_t b = at / 8; b < at / 8 + 4; ++b) {
      const ByteStep want = step_byte(row.rule, step, quantise, table, state, 0, b, row.gradient.data());
      const int shift = static_cast<int>(b - at / 8) * 8;
      CHECK(want.change[0] == static_cast<uint8_t>(flips >> shift));
      for (int p = 1; p < row.planes; ++p) {
        const auto after = static_cast<uint8_t>(values[levels - p] >> shift);
        CHECK(want.change[p] == static_cast<uint8_t>(after ^ row.bits[p * width + b]));
      }
      for (int p = row.planes; p < bits; ++p) {
        CHECK(row.counter[(p - row.planes) * width + b] == static_cast<uint8_t>(values[levels - p] >> shift));
      }
      clipped -= static_cast<int>(want.clipped);
    }
    CHECK(clipped == 0);
  }
  CHECK(word_sums.squares == sums.squares);
  CHECK(word_sums.aligned == sums.aligned);
}

TEST(words_equal_bytes) {
  Random random{11};
  for (int bits = 1; bits <= 8; ++bits) {
    for (int planes = 1; planes <= bits; ++planes) {
      for (const bool shaped : {false, true}) {
        for (int round = 0; round < 40; ++round) {
          Row row = random_row(random, bits, planes, shaped, 32 * (1 + random.below(4)));
          check_row(random, row);
        }
      }
    }
  }
}

TEST(quotients_and_roots) {
  Random random{12};
  for (int round = 0; round < 300000; ++round) {
    const auto rms = static_cast<int32_t>(1 + random.below(1u << (1 + random.below(14))));
    const uint64_t any = static_cast<uint64_t>(random.below(1u << 31)) << 25 | random.below(1u << 25);
    uint64_t rate = any >> random.below(50);
    if (round % 3 == 0) rate = static_cast<uint64_t>(rms) * random.below(1u << 30) + (random.below(3) - 1);  // at and around multiples
    if (rate >> 56 != 0) rate = 0;
    const uint64_t want = std::min(rate / static_cast<uint64_t>(rms), kMaxCoef);
    CHECK(floor_quotient(rate, static_cast<float>(rate), rms) == want);

    const auto dim = static_cast<int64_t>(1 + random.below(kMaxWordDim));
    const uint64_t squares = std::min<uint64_t>(any >> random.below(50), static_cast<uint64_t>(dim) << 28);
    CHECK(floor_divide(squares, inverse_of(dim)) == squares / static_cast<uint64_t>(dim));
    CHECK(floor_root(static_cast<uint32_t>(squares / dim)) == row_rms(squares, dim));
  }
  for (uint32_t root = 1; root <= 1 << 14; ++root) {
    CHECK(floor_root(root * root) == static_cast<int32_t>(root));
    CHECK(floor_root(root * root - 1) == std::max(1, static_cast<int32_t>(root) - 1));
  }
}

TEST(rounded_quotients) {
  constexpr int32_t kMost = 1 << kGradientBits;
  int wrong = 0;
  for (int32_t rms = 1; rms <= kMost; ++rms) {
    const float inverse = 1.0f / static_cast<float>(rms);
    const int32_t step = rms % 251 == 0 ? 1 : 127;  // all numbers for some, some for all
    for (int32_t q = -kMost + rms % step; q <= kMost; q += step) {
      if (float_bits(rounded_quotient(q, rms, inverse)) != float_bits(static_cast<float>(q) / static_cast<float>(rms))) ++wrong;
    }
  }
  CHECK(wrong == 0);
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
