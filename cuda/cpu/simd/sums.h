// Row sums, and the largest magnitude of a row.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"

namespace dualbin::detail {
namespace {

constexpr int64_t kBlock = 64;     // kSumBlock
constexpr int64_t kTogether = 4;   // rows that are added in one pass over the sum
constexpr int64_t kRowsAhead = 4;  // a pass fetches what the next one reads

// One pass: into[d] = ((from + rows[0][d]) + rows[1][d]) + ..., `from` being 0 for the first rows of a block.
template <typename Read, int kRows, bool kFirst>
DUALBIN_INLINE void add_rows(const typename Read::Storage* const (&rows)[kTogether], const void* const (&next)[kTogether], int64_t dim,
                             float* into) {
  constexpr int64_t kStep = kLine / static_cast<int64_t>(sizeof(typename Read::Storage));
  const auto at = [&](int64_t d) {
    Vecf sum = kFirst ? all_floats(0.0f) : load_floats(into + d);
    for (int r = 0; r < kRows; ++r) sum = add(sum, Read::widen(rows[r] + d));
    store_floats(into + d, sum);
  };
  int64_t d = 0;
  for (; d + kStep <= dim; d += kStep) {
    for (int r = 0; r < kRows; ++r) {
      if (next[r] != nullptr) fetch(static_cast<const typename Read::Storage*>(next[r]) + d);
    }
    for (int64_t z = 0; z < kStep; z += kFloats) at(d + z);
  }
  for (; d + kFloats <= dim; d += kFloats) at(d);
  if (d == dim) return;
  Rest<float, kFloats> sum(into + d, kFirst ? 0 : dim - d);
  for (int r = 0; r < kRows; ++r) {
    const Rest<typename Read::Storage, kFloats> row(rows[r] + d, dim - d);
    store_floats(sum.values, add(load_floats(sum.values), Read::widen(row.values)));
  }
  std::memcpy(into + d, sum.values, static_cast<size_t>(dim - d) * sizeof(float));
}

template <typename Read>
void sum_rows(const void* dy, int64_t dim, const int64_t* positions, int64_t count, float* sum, float* block) {
  using Storage = typename Read::Storage;
  const auto row = [&](int64_t i) { return static_cast<const Storage*>(dy) + positions[i] * dim; };
  for (int64_t from = 0; from < count; from += kBlock) {
    const int64_t to = count - from < kBlock ? count : from + kBlock;
    float* into = from == 0 ? sum : block;
    const int64_t head = 1 + (to - from - 1) % kTogether;  // the rest of the block comes in fours
    for (int64_t i = from; i < to; i += i == from ? head : kTogether) {
      const int64_t rows_now = i == from ? head : kTogether;
      const Storage* rows[kTogether];
      const void* next[kTogether];
      for (int64_t r = 0; r < kTogether; ++r) {
        rows[r] = row(i + (r < rows_now ? r : 0));
        next[r] = i + kRowsAhead + r < count ? row(i + kRowsAhead + r) : nullptr;
      }
      if (i > from) {
        add_rows<Read, 4, false>(rows, next, dim, into);
      } else if (head == 1) {
        add_rows<Read, 1, true>(rows, next, dim, into);
      } else if (head == 2) {
        add_rows<Read, 2, true>(rows, next, dim, into);
      } else if (head == 3) {
        add_rows<Read, 3, true>(rows, next, dim, into);
      } else {
        add_rows<Read, 4, true>(rows, next, dim, into);
      }
    }
    if (from == 0) continue;
    int64_t d = 0;
    for (; d + kFloats <= dim; d += kFloats) store_floats(sum + d, add(load_floats(sum + d), load_floats(block + d)));
    for (; d < dim; ++d) sum[d] += block[d];
  }
}

// Magnitudes compare as the integers that their bits are, in every format.
template <typename Storage>
uint32_t largest(const void* row, int64_t dim) {
  constexpr bool kWide = sizeof(Storage) == 4;
  constexpr int64_t kStep = kLine / static_cast<int64_t>(sizeof(Storage));
  constexpr int64_t kIn = static_cast<int64_t>(sizeof(Vec) / sizeof(Storage));
  const auto* p = static_cast<const Storage*>(row);
  const Vec magnitude = kWide ? all32(0x7fffffffu) : all16(0x7fff);
  Vec most[2] = {zero(), zero()};
  const auto take = [&](const Storage* from, int i) {
    const Vec x = both(load(from), magnitude);
    most[i] = kWide ? max32(most[i], x) : max16(most[i], x);
  };
  int64_t d = 0;
  for (; d + kStep <= dim; d += kStep) {
    take(p + d, 0);
    if (kStep > kIn) take(p + d + kIn, 1);
  }
  for (; d + kIn <= dim; d += kIn) take(p + d, 0);
  if (d < dim) take(Rest<Storage, kIn>(p + d, dim - d).values, 0);
  alignas(64) uint32_t found[sizeof(Vec) / 4];
  store(found, kWide ? max32(most[0], most[1]) : max16(most[0], most[1]));
  uint32_t result = 0;
  for (const uint32_t x : found) {
    if (kWide) {
      result = x > result ? x : result;
    } else {
      result = (x & 0xffffu) > result ? x & 0xffffu : result;
      result = x >> 16 > result ? x >> 16 : result;
    }
  }
  return result;
}

}  // namespace
}  // namespace dualbin::detail
