// Random tables, gradients and states for comparisons of instruction sets.
#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cpu/floats.h"
#include "cpu_support.h"
#include "rules/row.h"

namespace dualbin {

// A table with its state, and what an update of it is made of.
struct World {
  int64_t rows;
  int64_t dim;
  int planes;
  Rule rule;
  bool recorded;  // a trained scale: the numbers of a row lie in a record
  std::vector<uint8_t> bits, counter;
  std::vector<float> scale, squares, ema;
  std::vector<int32_t> record, count;

  World(int64_t rows_, int64_t dim_, int planes_, const Rule& rule_, bool recorded_, std::mt19937_64& random)
      : rows(rows_), dim(dim_), planes(planes_), rule(rule_), recorded(recorded_) {
    const int64_t width = (dim + 7) / 8;
    fill(&bits, rows * planes * width, width, random);
    const int below = rule.kind == RuleKind::kCounter ? rule.bits - planes : 0;
    fill(&counter, rows * below * width, width, random);
    for (int64_t r = 0; r < rows; ++r) {
      const bool odd = r % 17 == 3 || r % 5 == 1 || r % 23 == 9;
      scale.push_back(!odd ? 0.01f * static_cast<float>(1 + random() % 100) : r % 17 == 3 ? 0.0f : r % 5 == 1 ? -0.2f : INFINITY);
      const auto seen = static_cast<int32_t>(r % 7 == 0 ? INT32_MAX - random() % 2 : random() % 100);
      count.push_back(seen);
      squares.push_back(static_cast<float>(random() % 1000) * 1e-3f);
      for (const uint32_t word : {static_cast<uint32_t>(seen), float_bits(squares.back()), float_bits(1e-3f), float_bits(2e-4f)}) {
        record.push_back(static_cast<int32_t>(word));
      }
    }
    if (rule.kind == RuleKind::kBop) ema.assign(static_cast<size_t>(rows * dim), 0.01f);
  }

  Table table() { return {bits.data(), scale.data(), rows, dim, planes}; }

  State state() {
    State state;
    if (!counter.empty()) state.counter = counter.data();
    if (!ema.empty()) state.ema = ema.data();
    if (recorded) {
      state.record = record.data();
    } else {
      state.count = count.data();
      state.squares = squares.data();
    }
    return state;
  }

  bool operator==(const World& other) const {
    return bits == other.bits && counter == other.counter && same(scale, other.scale) && same(squares, other.squares) &&
           same(ema, other.ema) && record == other.record && count == other.count;
  }

  template <typename T>
  static bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
  }

 private:
  // Random planes whose padding bits are 0.
  void fill(std::vector<uint8_t>* to, int64_t bytes, int64_t width, std::mt19937_64& random) const {
    to->resize(static_cast<size_t>(bytes));
    for (int64_t i = 0; i < bytes; ++i) {
      const auto used = static_cast<uint8_t>(i % width == width - 1 && dim % 8 != 0 ? (1 << dim % 8) - 1 : 255);
      (*to)[static_cast<size_t>(i)] = static_cast<uint8_t>(random()) & used;
    }
  }
};

// Gradients of `count` rows in the type, some of them tiny, huge, zero, equal or not finite.
inline std::vector<char> gradients(int64_t count, int64_t dim, FloatType type, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<char> data(static_cast<size_t>(count * dim) * (type == FloatType::kF32 ? 4 : 2));
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t d = 0; d < dim; ++d) {
      float x = normal(random);
      if (n % 31 == 4) x = 0.0f;
      if (n % 37 == 5) x *= 1e-40f;
      if (n % 41 == 6) x *= 1e33f;
      if (n % 43 == 7 && d == n % dim) x *= 1e6f;
      if (n % 97 == 8 && d == n % dim) x = NAN;
      if (n % 53 == 9) x = d % 2 == 0 ? 1.0f : -1.0f;
      if (n % 59 == 11) x = bits_float(0x3f7fffffu);
      const auto at = static_cast<size_t>(n * dim + d);
      if (type == FloatType::kF32) {
        reinterpret_cast<float*>(data.data())[at] = x;
      } else {
        reinterpret_cast<uint16_t*>(data.data())[at] = type == FloatType::kF16 ? detail::narrow_f16(x) : detail::narrow_bf16(x);
      }
    }
  }
  return data;
}

// Ids of which some occur more often than a block of the row sum is long; every 50th is none of the table.
inline std::vector<int64_t> random_ids(int64_t count, int64_t rows, std::mt19937_64& random) {
  std::vector<int64_t> ids;
  for (int64_t n = 0; n < count; ++n) {
    const auto any = static_cast<int64_t>(random() % static_cast<uint64_t>(rows));
    ids.push_back(n % 50 == 49 ? rows : n % 4 == 0 ? rows / 2 : any);
  }
  return ids;
}

// Runs body(name) with every instruction set but the first, which is that of rules/; then the best is in use again.
template <typename Body>
void for_other_levels(const Body& body) {
  for (int i = 1; simd_level(i) != nullptr; ++i) body(simd_level(i));
  CHECK(use_simd(nullptr).ok());
}

}  // namespace dualbin
