// What a rule does to one row and to the eight weights of one byte. Both back ends include this file; neither has arithmetic of its own.
//
// The phases of a row: (1) the largest magnitude gives RowStep::exponent; (2) quantised values give sum(h*h) and sum(w*q);
// (3) finish_row() turns these sums into coefficients and a new scale; (4) flip_byte() does eight weights at a time.
#pragma once

#include "dualbin/types.h"
#include "rules/common.h"
#include "rules/hash.h"

namespace dualbin {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr int kFineBits = 24;                   // |q| <= 2^24: every float32 keeps its 24 significant bits at the top of the row's range
constexpr int kCoarseShift = 9;                 // h = |q| >> 9 <= 2^15: squares of a row add up exactly in 64 bits
constexpr uint64_t kMaxCoef = 1ull << 30;       // keeps (h * coef) >> 16 within 2^30: less its mean, |e| >> 9 <= 2^16
constexpr double kMaxRate = 140737488355328.0;  // 2^47, keeps rate << 8 within 64 bits
constexpr double kMaxScaleGrad = 1152921504606846976.0;  // 2^60, keeps its square finite in float32
constexpr float kMinScale = 1e-4f;
constexpr uint64_t kTwoLn2 = 90852;         // 2 ln 2 in 1/65536
constexpr double kMaxShare = 1073741824.0;  // 2^30

// Scales a row by a power of two and rounds to integers. Two factors, since 2^(24-E) alone can overflow for a row of tiny values.
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

DUALBIN_HD Quantiser make_quantiser(uint32_t max_magnitude) {
  const int exponent = float_exponent(max_magnitude);
  const int shift = kFineBits - exponent;
  const int first = shift < 100 ? shift : 100;
  return {power_of_two(first), power_of_two(shift - first), exponent};
}

DUALBIN_HD int32_t coarse(int32_t q) { return (q < 0 ? -q : q) >> kCoarseShift; }

// Exact sums over a row; adding the partial sums of several threads in any order gives the same integers.
struct RowSums {
  uint64_t squares = 0;  // of h
  int64_t aligned = 0;   // of w * q

  DUALBIN_HD void add(int32_t q, bool positive) {
    const uint64_t h = static_cast<uint64_t>(coarse(q));
    squares += h * h;
    aligned += positive ? q : -q;
  }
};

// Everything the weights of one row need, after the row's sums are known.
struct RowStep {
  RowKey key;
  uint32_t coef;   // counter: 2^-32 levels per unit of h
  int32_t zone;    // counter: dead zone in units of h
  int32_t mean;    // counter: mean of w * q over the row, 0 if evidence is not centred
  uint32_t share;  // counter of one bit: lr in 1/65536
  int32_t rms;     // in units of h
  float gamma;     // bop: rate for this row
  float new_scale;
  bool negative;  // the scale is below 0: evidence changes sign
};

struct ScaleState {
  float m;
  float v;
};

// One Adam step of a row's scale (Kingma & Ba 2015, arXiv:1412.6980). Doubles, so that only the three stored values are rounded.
DUALBIN_HD float adam_scale(float scale, double gradient, double rate, uint32_t n, ScaleState* state) {
  if (gradient > kMaxScaleGrad) gradient = kMaxScaleGrad;
  if (gradient < -kMaxScaleGrad) gradient = -kMaxScaleGrad;
  const double g = static_cast<double>(static_cast<float>(gradient));
  state->m = static_cast<float>(0.9 * static_cast<double>(state->m) + 0.1 * g);
  state->v = static_cast<float>(0.99 * static_cast<double>(state->v) + 0.01 * (g * g));
  const double m = static_cast<double>(state->m) / (1.0 - integer_power(0.9, n));
  const double v = static_cast<double>(state->v) / (1.0 - integer_power(0.99, n));
  const float next = static_cast<float>(static_cast<double>(scale) - rate * (m / (square_root(v) + 1e-12)));
  return next >= kMinScale ? next : kMinScale;
}

DUALBIN_HD int32_t row_rms(uint64_t squares, int64_t dim) {
  const int32_t rms = static_cast<int32_t>(square_root(static_cast<double>(squares / static_cast<uint64_t>(dim))));
  return rms < 1 ? 1 : rms;
}

DUALBIN_HD uint32_t step_coefficient(float lr, float eta, int32_t rms) {
  const double wanted = static_cast<double>(lr) * static_cast<double>(eta) * 16777216.0;
  if (!(wanted > 0.0)) return 0;
  const uint64_t rate = static_cast<uint64_t>(round_to_int64(wanted < kMaxRate ? wanted : kMaxRate));
  const uint64_t coef = (rate << 8) / static_cast<uint64_t>(rms);
  return static_cast<uint32_t>(coef < kMaxCoef ? coef : kMaxCoef);
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

// Coefficients of a row, its new scale and count. `scale` is the old one; the state is changed in place.
DUALBIN_HD RowStep finish_row(const Rule& rule, const StepContext& context, const State& state, const Table& table, int64_t row,
                              float scale, const RowSums& sums, int exponent) {
  RowStep step;
  step.key = row_key(context.seed, context.step, global_row(context, row));
  step.rms = row_rms(sums.squares, table.dim);
  step.coef = step_coefficient(rule.bits == 1 ? 1.0f : context.lr, rule.eta, step.rms);
  const double share = static_cast<double>(context.lr) * 65536.0;
  step.share = share > 0.0 ? static_cast<uint32_t>(round_to_int64(share < kMaxShare ? share : kMaxShare)) : 0u;
  step.mean = rule.center ? static_cast<int32_t>(sums.aligned / table.dim) : 0;
  step.negative = scale < 0.0f;
  step.new_scale = scale;
  step.gamma = 0.0f;
  step.zone = zone_of(rule.dead_zone_q8, step.rms);
  if (state.count == nullptr) return step;
  const int32_t before = state.count[row];
  const int32_t n = before == INT32_MAX ? before : before + 1;
  state.count[row] = n;
  if (rule.anneal_q8 > 0) step.zone = zone_of(rule.dead_zone_q8 + zone_growth(rule.anneal_q8, n), step.rms);
  const float rate = context.lr * rule.gamma;
  const float mean = 1.0f / static_cast<float>(n);
  step.gamma = rate > mean ? rate : mean;
  if (state.scale_m != nullptr && context.scale_lr > 0.0f) {
    ScaleState moments{state.scale_m[row], state.scale_v[row]};
    const double gradient = static_cast<double>(sums.aligned) * power_of_two_double(exponent - kFineBits);
    const double scale_rate = static_cast<double>(context.lr) * static_cast<double>(context.scale_lr);
    step.new_scale = adam_scale(scale, gradient, scale_rate, static_cast<uint32_t>(n), &moments);
    state.scale_m[row] = moments.m;
    state.scale_v[row] = moments.v;
  }
  return step;
}

// Counter rule for one weight: the new magnitude, and whether the bit flips.
DUALBIN_HD int32_t counter_weight(const RowStep& step, int32_t level, int32_t max_level, int32_t q, bool positive, uint32_t random16,
                                  bool* flip) {
  const int32_t e = (positive ? q : -q) - step.mean;
  const int32_t over = coarse(e) - step.zone;
  uint64_t t = (static_cast<uint64_t>(over > 0 ? over : 0) * step.coef) >> 16;
  if (max_level == 0) t = (t < 65536 ? t : 65536) * step.share >> 16;  // one bit: lr times a probability
  const bool evidence = (e > 0) != step.negative;
  const int32_t move = static_cast<int32_t>(t);
  int32_t next = level + (((evidence ? -move : move) + static_cast<int32_t>(random16)) >> 16);
  *flip = next < 0;
  if (next < 0) next = -next - 1;
  return next < max_level ? next : max_level;
}

// Bop for one weight: updates the average, tells whether the bit flips.
DUALBIN_HD bool bop_weight(const RowStep& step, float tau, int32_t q, bool positive, float* average) {
  const float h = static_cast<float>(coarse(q));
  const float x = (q < 0 ? -h : h) / static_cast<float>(step.rms);
  const float m = *average + step.gamma * (x - *average);
  *average = m;
  return (positive != step.negative ? m : -m) > tau;
}

// Flips of the weights [8*byte, 8*byte + 8) of a row. `gradient` points to the row's sums, `packed` is the byte before the update.
// The row's counters or averages change in place; `clipped` counts counters at their maximum.
DUALBIN_HD uint8_t flip_byte(const Rule& rule, const RowStep& step, const Quantiser& quantise, const State& state, int64_t row, int64_t dim,
                             int64_t byte, uint8_t packed, const float* gradient, uint32_t* clipped) {
  const int64_t width = (dim + 7) / 8;
  const int64_t start = byte * 8;
  const int used = dim - start < 8 ? static_cast<int>(dim - start) : 8;
  const int planes = rule.kind == RuleKind::kCounter ? rule.bits - 1 : 0;
  const int32_t max_level = (1 << planes) - 1;
  uint8_t* counter = planes > 0 ? state.counter + row * width * planes + byte : nullptr;
  uint8_t old_planes[7] = {0, 0, 0, 0, 0, 0, 0};
  uint8_t new_planes[7] = {0, 0, 0, 0, 0, 0, 0};
  for (int p = 0; p < planes; ++p) old_planes[p] = counter[p * width];

  uint32_t mask = 0;
  uint32_t random = 0;
  for (int k = 0; k < used; ++k) {
    const float g = gradient[start + k];
    const bool positive = (packed >> k) & 1u;
    bool flip = false;
    if (rule.kind == RuleKind::kCounter) {
      if (k % 2 == 0) random = column_pair_bits(step.key, static_cast<uint32_t>((start + k) / 2));
      int32_t level = 0;
      for (int p = 0; p < planes; ++p) level |= ((old_planes[p] >> k) & 1) << p;
      level = counter_weight(step, level, max_level, quantise(g), positive, k % 2 == 0 ? random & 0xffffu : random >> 16, &flip);
      if (planes > 0 && level == max_level) ++*clipped;
      for (int p = 0; p < planes; ++p) new_planes[p] |= static_cast<uint8_t>(((level >> p) & 1) << k);
    } else if (rule.kind == RuleKind::kBop) {
      flip = bop_weight(step, rule.tau, quantise(g), positive, state.ema + row * dim + start + k);
    } else {
      const bool up = step.negative ? g < 0.0f : g > 0.0f;
      flip = g != 0.0f && positive == up;
    }
    mask |= static_cast<uint32_t>(flip) << k;
  }
  for (int p = 0; p < planes; ++p) counter[p * width] = new_planes[p];
  return static_cast<uint8_t>(mask);
}

}  // namespace dualbin
