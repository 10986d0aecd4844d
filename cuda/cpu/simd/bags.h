// Sums of rows of a table, in the order of the bag.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/levels_of_planes.h"

namespace dualbin::detail {
namespace {

constexpr int64_t kSumRows = 64;  // kSumBlock

DUALBIN_INLINE void settle_block(const float* sums, int64_t columns, bool first, float* total) {
  if (first) {
    std::memcpy(total, sums, static_cast<size_t>(columns) * sizeof(float));
    return;
  }
  for (int64_t d = 0; d < columns; ++d) total[d] += sums[d];
}

// Sums of up to `kWords` * 32 columns of one plane, in registers. kWhole: of all of them.
template <int kWords, bool kWhole>
class SignSums {
 public:
  DUALBIN_INLINE SignSums() {
    for (Vecf& sum : sums_) sum = all_floats(0.0f);
  }

  // A row whose columns here begin at `bits`, in `bytes` bytes.
  DUALBIN_INLINE void add_row(const uint8_t* bits, int64_t bytes, float factor) {
    const Vecf set = all_floats(factor);
    const Vecf clear = all_floats(-factor);
    const Rest<uint8_t, 4 * kWords> rest(bits, kWhole ? 0 : bytes);
    for (int w = 0; w < kWords; ++w) {
      const SignWord word(read_as<uint32_t>((kWhole ? bits : rest.values) + 4 * w));
      for_parts<kVecsOfWord>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        Vecf& sum = sums_[w * kVecsOfWord + kPart];
        sum = add(sum, word.template pick<kPart>(clear, set));
      });
    }
  }

  DUALBIN_INLINE void settle(int64_t columns, bool first, float* total) const {
    if (kWhole) {
      for (int i = 0; i < kWords * kVecsOfWord; ++i) {
        float* to = total + kFloats * i;
        store_floats(to, first ? sums_[i] : add(load_floats(to), sums_[i]));
      }
      return;
    }
    alignas(64) float block[kWords * kColumnsOfWord];
    for (int i = 0; i < kWords * kVecsOfWord; ++i) store_floats(block + kFloats * i, sums_[i]);
    settle_block(block, columns, first, total);
  }

 private:
  Vecf sums_[kWords * kVecsOfWord];
};

template <int kWords, bool kWhole>
DUALBIN_INLINE void add_signs(const BagRow* rows, int64_t count, int64_t byte, int64_t bytes, int64_t columns, bool first, float* total) {
  SignSums<kWords, kWhole> sums;
  for (int64_t r = 0; r < count; ++r) {
    fetch(rows[r].later.bits + byte);
    if (byte == 0) fetch(rows[r].later.scale);
    sums.add_row(rows[r].bits + byte, bytes, rows[r].factor);
  }
  sums.settle(columns, first, total);
}

// The same for the rows of a source; returns how many took part.
template <typename Id, int kWords, bool kWhole>
DUALBIN_INLINE int64_t add_ids(const BagSource& source, int64_t begin, int64_t end, const LookupShape& shape, int64_t byte, bool first,
                               float* total) {
  const auto* ids = static_cast<const Id*>(source.ids);
  const auto rows = static_cast<uint64_t>(source.rows);
  SignSums<kWords, kWhole> sums;
  int64_t used = 0;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t later = ids[n + source.ahead < source.count ? n + source.ahead : n];
    if (static_cast<uint64_t>(later) < rows) {
      fetch(source.bits + later * shape.width + byte);
      if (byte == 0) fetch(source.scale + later);
    }
    const int64_t id = ids[n];
    if (static_cast<uint64_t>(id) >= rows || id == source.padding) continue;
    const float scale = source.scale[id];
    if (scale == 0.0f) continue;
    const float factor = source.votes ? 1.0f : source.weights == nullptr ? scale : source.weights[n] * scale;
    sums.add_row(source.bits + id * shape.width + byte, shape.width - byte, factor);
    ++used;
  }
  sums.settle(shape.dim - 8 * byte, first, total);
  return used;
}

template <typename Id>
int64_t sum_narrow(const BagSource& source, int64_t begin, int64_t end, const LookupShape& shape, float* total) {
  int64_t used = 0;
  int64_t from = begin;
  do {
    const int64_t to = end - from < kSumRows ? end : from + kSumRows;
    const bool first = from == begin;
    int64_t in_block = 0;
    int64_t d = 0;
    for (; d + 64 <= shape.dim; d += 64) in_block = add_ids<Id, 2, true>(source, from, to, shape, d / 8, first, total + d);
    if (d + 32 <= shape.dim) {
      in_block = add_ids<Id, 1, true>(source, from, to, shape, d / 8, first, total + d);
      d += 32;
    }
    if (d < shape.dim) in_block = add_ids<Id, 1, false>(source, from, to, shape, d / 8, first, total + d);
    used += in_block;
    from = to;
  } while (from < end);
  return used;
}

inline int64_t sum_narrow_bag(const BagSource& source, int64_t begin, int64_t end, const LookupShape& shape, float* total) {
  return source.narrow_ids ? sum_narrow<int32_t>(source, begin, end, shape, total) : sum_narrow<int64_t>(source, begin, end, shape, total);
}

// A chunk of columns of several planes, of as many rows at a time as there are lanes.
DUALBIN_INLINE void add_levels(const PlaneLevels& levels_of, const BagRow* rows, int64_t count, const LookupShape& shape, int64_t byte,
                               bool first, float* total) {
  alignas(64) float block[kChunk] = {};
  const int64_t bytes = shape.width - byte < kChunkBytes ? shape.width - byte : kChunkBytes;
  const int64_t columns = shape.dim - 8 * byte < kChunk ? shape.dim - 8 * byte : kChunk;
  for (int64_t r = 0; r < count; r += kLanes) {
    const uint8_t* bits[kLanes];
    int64_t used[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      bits[i] = rows[r + i < count ? r + i : r].bits + byte;
      used[i] = r + i < count ? bytes : 0;
    }
    alignas(64) int8_t levels[kLanes][kChunk];
    levels_of(bits, used, shape.width, levels);
    for (int i = 0; i < kLanes && r + i < count; ++i) {
      const BagRow& row = rows[r + i];
      for (int p = 0; p < shape.planes; ++p) fetch(row.later.bits + p * shape.width + byte);
      if (byte == 0) fetch(row.later.scale);
      const Vecf factor = all_floats(row.factor * 0.015625f);
      for (int64_t d = 0; d < columns; d += kFloats) {
        store_floats(block + d, add(load_floats(block + d), times(levels_of.floats(levels[i] + d), factor)));
      }
    }
  }
  settle_block(block, columns, first, total);
}

inline void add_block(const BagRow* rows, int64_t count, const LookupShape& shape, bool first, float* total) {
  if (shape.planes > 1) {
    const PlaneLevels levels_of(shape.planes);
    for (int64_t d = 0; d < shape.dim; d += kChunk) add_levels(levels_of, rows, count, shape, d / 8, first, total + d);
    return;
  }
  int64_t d = 0;
  for (; d + 64 <= shape.dim; d += 64) add_signs<2, true>(rows, count, d / 8, 8, 64, first, total + d);
  if (d + 32 <= shape.dim) {
    add_signs<1, true>(rows, count, d / 8, 4, 32, first, total + d);
    d += 32;
  }
  if (d < shape.dim) add_signs<1, false>(rows, count, d / 8, shape.width - d / 8, shape.dim - d, first, total + d);
}

template <typename Write>
void finish_bag(const float* total, int64_t dim, float divisor, bool signs, void* out) {
  using Storage = typename Write::Storage;
  auto* to = static_cast<Storage*>(out);
  const Vecf over_all = all_floats(divisor);
  const auto finished = [&](const float* p) {
    if (signs) return sign_of(load_floats(p));
    return one_nan(divisor == 1.0f ? load_floats(p) : over(load_floats(p), over_all));
  };
  int64_t d = 0;
  for (; d + kFloats <= dim; d += kFloats) Write::template put<false>(to + d, finished(total + d));
  if (d == dim) return;
  const Rest<float, kFloats> rest(total + d, dim - d);
  alignas(64) Storage values[kFloats];
  Write::template put<false>(values, finished(rest.values));
  std::memcpy(to + d, values, static_cast<size_t>(dim - d) * sizeof(Storage));
}

}  // namespace
}  // namespace dualbin::detail
