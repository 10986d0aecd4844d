// What a rule does to one row and to the eight weights of one byte. Both back ends include this file; neither has arithmetic of its own.
//
// The phases of a row: (1) the largest magnitude gives RowStep::exponent; (2) quantised values give sum(q*q) and sum(w*q);
// (3) finish_row() turns these sums into coefficients and a new scale; (4) step_byte() does eight weights at a time.
#pragma once

#include "dualbin/types.h"
#include "rules/common.h"
#include "rules/hash.h"
#include "rules/planes.h"

namespace dualbin {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr int kGradientBits = 14;                        // |q| <= 2^14: 16 bits hold it, and squares of a row add up exactly in 64
constexpr uint64_t kMaxCoef = 1ull << 30;                // of levels in 2^-32: q * coef stays within 2^46, less its mean within 2^47
constexpr double kMaxRate = 140737488355328.0;           // 2^47, keeps rate << 8 within 64 bits and exact in a double
constexpr double kMaxScaleGrad = 1152921504606846976.0;  // 2^60, keeps its square finite in float32
constexpr double kMaxMeanSquare = 1267650600228229401496703205376.0;  // 2^100, keeps sums of them finite in float32
constexpr float kMinScale = 1e-4f;
constexpr uint64_t kTwoLn2 = 90852;         // 2 ln 2 in 1/65536
constexpr double kMaxShare = 1073741824.0;  // 2^30

// Scales a row by a power of two and rounds to integers. Two factors, since 2^(14-E) alone can overflow for a row of tiny values.
struct Quantiser {
  float first;
  float second;
  int exponent;

  DUALBIN_HD int32_t operator()(float g) const { return round_to_int((g * first) * second); }
};

// The exponent of frexp for a magnitude given by its bits; 0 for zero.
DUALBIN_HD int float_exponent(uint32_t magnitude) {
  if (magnitude == 0) return 0;
  int exponent = static_cast<int>(magnitude >> 23);
  if (exponent != 0) return exponent - 126;
  int length = 0;  // subnormal: length of the significand
  for (uint32_t m = magnitude; m != 0; m >>= 1) ++length;
  return length - 149;
}

// The largest magnitude becomes at most 2^bits.
DUALBIN_HD Quantiser make_quantiser(uint32_t max_magnitude, int bits = kGradientBits) {
  const int exponent = float_exponent(max_magnitude);
  const int shift = bits - exponent;
  const int first = shift < 100 ? shift : 100;
  return {power_of_two(first), power_of_two(shift - first), exponent};
}

// Exact sums over a row; adding the partial sums of several threads in any order gives the same integers.
struct RowSums {
  uint64_t squares = 0;  // of q
  int64_t aligned = 0;   // of w * q, w = s * (2m + 1)

  DUALBIN_HD void add(int32_t q, int32_t weight) {
    squares += static_cast<uint64_t>(static_cast<int64_t>(q) * q);
    aligned += static_cast<int64_t>(q) * weight;
  }
};

// The state of one row. With a trained scale the four numbers lie side by side in one record, else in arrays of their own, if at all.
struct RowState {
  int32_t* count;
  float* squares;
  float* scale_m;  // null where the scale has no moments
  float* scale_v;
};

DUALBIN_HD RowState row_state(const State& state, int64_t row) {
  if (state.record != nullptr) {
    auto* record = reinterpret_cast<Record*>(state.record) + row;
    return {&record->count, &record->squares, &record->scale_m, &record->scale_v};
  }
  return {state.count == nullptr ? nullptr : state.count + row, state.squares == nullptr ? nullptr : state.squares + row, nullptr, nullptr};
}

// Everything the weights of one row need, after the row's sums are known.
struct RowStep {
  RowKey key;
  int32_t coef;    // counter: 2^-32 levels per unit of q
  int32_t zone;    // counter: dead zone in units of q
  int32_t mean;    // counter: mean of w * q over the row, 0 if evidence is not centred
  uint32_t share;  // counter of one bit: lr in 1/65536
  int32_t rms;     // in units of q
  float gamma;     // bop: rate for this row
  float new_scale;
  bool negative;  // the scale is below 0: evidence changes sign
};

// What the moments after n updates are divided by, since they began at 0.
struct AdamBias {
  double m;
  double v;
};

DUALBIN_HD AdamBias adam_bias(uint32_t n) { return {1.0 - integer_power(0.9, n), 1.0 - integer_power(0.99, n)}; }

// One Adam step of a row's scale (Kingma & Ba 2015, arXiv:1412.6980). Doubles, so that only the three stored values are rounded.
DUALBIN_HD float adam_scale(float scale, double gradient, double rate, AdamBias bias, const RowState& state) {
  if (gradient > kMaxScaleGrad) gradient = kMaxScaleGrad;
  if (gradient < -kMaxScaleGrad) gradient = -kMaxScaleGrad;
  const double g = static_cast<double>(static_cast<float>(gradient));
  const float m = static_cast<float>(0.9 * static_cast<double>(*state.scale_m) + 0.1 * g);
  const float v = static_cast<float>(0.99 * static_cast<double>(*state.scale_v) + 0.01 * (g * g));
  *state.scale_m = m;
  *state.scale_v = v;
  const double m_hat = static_cast<double>(m) / bias.m;
  const double v_hat = static_cast<double>(v) / bias.v;
  const float next = static_cast<float>(static_cast<double>(scale) - rate * (m_hat / (square_root(v_hat) + 1e-12)));
  return next >= kMinScale ? next : kMinScale;
}

DUALBIN_HD float adam_scale(float scale, double gradient, double rate, uint32_t n, const RowState& state) {
  return adam_scale(scale, gradient, rate, adam_bias(n), state);
}

DUALBIN_HD int32_t row_rms(uint64_t squares, int64_t dim) {
  const int32_t rms = static_cast<int32_t>(square_root(static_cast<double>(squares / static_cast<uint64_t>(dim))));
  return rms < 1 ? 1 : rms;
}

// The sum of the mean squares of a row's gradients with those of this update, of integers scaled by 2^(14-exponent).
DUALBIN_HD float add_squares(float before, uint64_t squares, int64_t dim, int exponent) {
  const double mean = static_cast<double>(squares) / static_cast<double>(dim) * power_of_two_double(2 * (exponent - kGradientBits));
  return static_cast<float>(static_cast<double>(before) + (mean < kMaxMeanSquare ? mean : kMaxMeanSquare));
}

// The rate of a step in 2^-24 levels, times 2^8.
DUALBIN_HD uint64_t step_rate(float lr, float eta) {
  const double wanted = static_cast<double>(lr) * static_cast<double>(eta) * 16777216.0;
  return wanted > 0.0 ? static_cast<uint64_t>(round_to_int64(wanted < kMaxRate ? wanted : kMaxRate)) << 8 : 0;
}

// `coef`, or less where the rate over the root of the row's sum of squares (below 0: it has none) is less.
DUALBIN_HD uint64_t bounded_by_squares(uint64_t coef, uint64_t rate, float squares, int exponent) {
  if (!(squares > 0.0f)) return coef;
  const double root = square_root(static_cast<double>(squares)) * power_of_two_double(kGradientBits - exponent);
  const double quotient = static_cast<double>(rate) / root;
  return quotient < static_cast<double>(coef) ? static_cast<uint64_t>(quotient) : coef;
}

// Levels per unit of q in 2^-32: the rate over the rms of the update, or over the root of the sum of squares where there is one. That root
// is not below the rms but for what float32 loses of tiny squares, so the first quotient is a bound of the second.
DUALBIN_HD int32_t step_coefficient(uint64_t rate, int32_t rms, float squares, int exponent) {
  const uint64_t coef = rate / static_cast<uint64_t>(rms);
  return static_cast<int32_t>(bounded_by_squares(coef < kMaxCoef ? coef : kMaxCoef, rate, squares, exponent));
}

// lr of a counter of one bit in 1/65536.
DUALBIN_HD uint32_t step_share(float lr) {
  const double share = static_cast<double>(lr) * 65536.0;
  return share > 0.0 ? static_cast<uint32_t>(round_to_int64(share < kMaxShare ? share : kMaxShare)) : 0u;
}

// floor(256 sqrt(2 ln(1 + n / anneal))): the largest of n standard normal numbers grows so. In integers, since log() differs between
// libraries: log2 of a number in 1/65536, 16 digits after the point by repeated squaring.
DUALBIN_HD int32_t zone_growth(int32_t anneal_q8, int32_t n) {
  const uint64_t x = 65536u + (static_cast<uint64_t>(n) << 24) / static_cast<uint64_t>(anneal_q8);
  int length = 0;
  for (uint64_t m = x; m > 1; m >>= 1) ++length;
  uint64_t mantissa = length <= 31 ? x << (31 - length) : x >> (length - 31);
  uint64_t log2 = static_cast<uint64_t>(length - 16) << 16;
  for (int digit = 15; digit >= 0; --digit) {
    mantissa = mantissa * mantissa >> 31;
    if (mantissa >> 32 == 0) continue;
    mantissa >>= 1;
    log2 |= 1ull << digit;
  }
  return static_cast<int32_t>(square_root(static_cast<double>(log2 * kTwoLn2 >> 16)));
}

// The row of the whole table that `row` of a shard is.
DUALBIN_HD int64_t global_row(const StepContext& context, int64_t row) {
  const uint64_t first = static_cast<uint64_t>(context.first_row[1]) << 32 | context.first_row[0];
  return static_cast<int64_t>(first + static_cast<uint64_t>(row));
}

DUALBIN_HD int32_t zone_of(int32_t zone_q8, int32_t rms) { return static_cast<int32_t>(static_cast<int64_t>(zone_q8) * rms >> 8); }

// What all rows of a step share.
struct StepShared {
  RowKey key;
  uint64_t rate;
  uint32_t share;
  double scale_rate;
  const AdamBias* biases;  // of n = 0, 1, ... below `known`, or null
  uint32_t known;

  DUALBIN_HD AdamBias bias(uint32_t n) const { return n < known ? biases[n] : adam_bias(n); }
};

DUALBIN_HD StepShared step_shared(const Rule& rule, const StepContext& context) {
  StepShared shared;
  shared.key = step_key(context.seed, context.step);
  shared.rate = step_rate(rule.bits == 1 ? 1.0f : context.lr, rule.eta);
  shared.share = step_share(context.lr);
  shared.scale_rate = static_cast<double>(context.lr) * static_cast<double>(context.scale_lr);
  shared.biases = nullptr;
  shared.known = 0;
  return shared;
}

// Coefficients of a row, its new scale and row state. `scale` is the old one; the state is changed in place.
DUALBIN_HD RowStep finish_row(const Rule& rule, const StepContext& context, const StepShared& shared, const State& all, const Table& table,
                              int64_t row, float scale, const RowSums& sums, int exponent) {
  RowStep step;
  const RowState state = row_state(all, row);
  step.key = row_key(shared.key, global_row(context, row));
  step.rms = row_rms(sums.squares, table.dim);
  float squares = -1.0f;
  if (rule.norm == static_cast<int32_t>(Norm::kAdagrad)) {
    squares = add_squares(*state.squares, sums.squares, table.dim, exponent);
    *state.squares = squares;
  }
  step.coef = step_coefficient(shared.rate, step.rms, squares, exponent);
  step.share = shared.share;
  step.mean = rule.center ? static_cast<int32_t>(sums.aligned / table.dim) : 0;
  step.negative = scale < 0.0f;
  step.new_scale = scale;
  step.gamma = 0.0f;
  step.zone = zone_of(rule.dead_zone_q8, step.rms);
  if (state.count == nullptr) return step;
  const int32_t before = *state.count;
  const int32_t n = before == INT32_MAX ? before : before + 1;
  *state.count = n;
  if (rule.anneal_q8 > 0) step.zone = zone_of(rule.dead_zone_q8 + zone_growth(rule.anneal_q8, n), step.rms);
  const float rate = context.lr * rule.gamma;
  const float mean = 1.0f / static_cast<float>(n);
  step.gamma = rate > mean ? rate : mean;
  if (state.scale_m != nullptr && context.scale_lr > 0.0f) {
    const double gradient = static_cast<double>(sums.aligned) * power_of_two_double(exponent - kGradientBits - (table.planes - 1));
    step.new_scale = adam_scale(scale, gradient, shared.scale_rate, shared.bias(static_cast<uint32_t>(n)), state);
  }
  return step;
}

DUALBIN_HD RowStep finish_row(const Rule& rule, const StepContext& context, const State& all, const Table& table, int64_t row, float scale,
                              const RowSums& sums, int exponent) {
  return finish_row(rule, context, step_shared(rule, context), all, table, row, scale, sums, exponent);
}

// q less the dead zone, positive where it is evidence for the sign as it is.
DUALBIN_HD int32_t evidence_for(const RowStep& step, int32_t q, bool positive) {
  const int32_t e = (positive ? q : -q) - step.mean;
  const int32_t against = step.negative ? e : -e;
  const int32_t over = (against < 0 ? -against : against) - step.zone;
  return over <= 0 ? 0 : against < 0 ? -over : over;
}

// Counter of one weight: its magnitude moved by stochastic rounding, the floor of a level and a uniform part of one. Below zero the sign
// flips.
DUALBIN_HD int32_t move_magnitude(const RowStep& step, int32_t magnitude, int32_t most, int32_t evidence, uint32_t random16, bool* flip) {
  const int64_t move = (static_cast<int64_t>(evidence) * step.coef + (static_cast<int64_t>(random16) << 16)) >> 32;
  int32_t next = magnitude + static_cast<int32_t>(move);
  *flip = next < 0;
  if (next < 0) next = -next - 1;
  return next < most ? next : most;
}

// A counter of one bit: it flips with lr times a probability.
DUALBIN_HD bool flips_by_chance(const RowStep& step, int32_t evidence, uint32_t random16) {
  const uint64_t t = evidence < 0 ? (static_cast<uint64_t>(-evidence) * static_cast<uint32_t>(step.coef)) >> 16 : 0;
  return ((t < 65536 ? t : 65536) * step.share >> 16) > random16;
}

// Bop for one weight: updates the average by x, q over the rms of its row, and tells whether the bit flips.
DUALBIN_HD bool bop_weight(const RowStep& step, float tau, float x, bool positive, float* average) {
  const float m = *average + step.gamma * (x - *average);
  *average = m;
  return (positive != step.negative ? m : -m) > tau;
}

// What an update does to one byte of the planes of a table.
struct ByteStep {
  uint8_t change[kMaxPlanes];  // of plane p of the table: bits to flip
  uint32_t clipped;            // counters at their maximum after the update
};

// The weights [8*byte, 8*byte + 8) of a row. `gradient` points to the row's sums. The row's counters or averages change in place, the
// planes of the table do not.
DUALBIN_HD ByteStep step_byte(const Rule& rule, const RowStep& step, const Quantiser& quantise, const Table& table, const State& state,
                              int64_t row, int64_t byte, const float* gradient) {
  const int64_t start = byte * 8;
  const int used = table.dim - start < 8 ? static_cast<int>(table.dim - start) : 8;
  const bool counts = rule.kind == RuleKind::kCounter;
  const int planes = counts ? rule.bits : 1;
  const int32_t most = (1 << (planes - 1)) - 1;
  const RowPlanes where = row_planes(table, state.counter, planes, row, byte);
  uint8_t before[kMaxPlanes];
  uint8_t after[kMaxPlanes];
  for (int p = 0; p < planes; ++p) {
    before[p] = *where.at(p);
    after[p] = 0;
  }

  ByteStep result;
  result.clipped = 0;
  uint32_t random = 0;
  for (int k = 0; k < used; ++k) {
    const float g = gradient[start + k];
    const bool positive = (before[0] >> k) & 1u;
    bool flip = false;
    if (counts) {
      if (k % 2 == 0) random = column_pair_bits(step.key, static_cast<uint32_t>((start + k) / 2));
      const uint32_t random16 = k % 2 == 0 ? random & 0xffffu : random >> 16;
      const int32_t evidence = evidence_for(step, quantise(g), positive);
      if (planes == 1) {
        flip = flips_by_chance(step, evidence, random16);
      } else {
        int32_t magnitude = 0;
        for (int p = 1; p < planes; ++p) magnitude = magnitude << 1 | ((before[p] >> k) & 1);
        magnitude = move_magnitude(step, magnitude, most, evidence, random16, &flip);
        if (magnitude == most) ++result.clipped;
        for (int p = 1; p < planes; ++p) after[p] |= static_cast<uint8_t>(((magnitude >> (planes - 1 - p)) & 1) << k);
      }
    } else if (rule.kind == RuleKind::kBop) {
      const float x = static_cast<float>(quantise(g)) / static_cast<float>(step.rms);
      flip = bop_weight(step, rule.tau, x, positive, state.ema + row * table.dim + start + k);
    } else {
      const bool up = step.negative ? g < 0.0f : g > 0.0f;
      flip = g != 0.0f && positive == up;
    }
    after[0] |= static_cast<uint8_t>((positive != flip) << k);
  }
  for (int p = 0; p < kMaxPlanes; ++p) result.change[p] = p < planes && p < table.planes ? before[p] ^ after[p] : 0;
  for (int p = table.planes; p < planes; ++p) *where.at(p) = after[p];
  return result;
}

}  // namespace dualbin
