// Sums of rows of a table, in the order of the bag.
#pragma once

#include "cpu/simd/formats.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/levels_of_planes.h"
#include "cpu/simd/row_weights.h"

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

// Sums of up to `kWords` * 32 columns of one or two planes, in registers. kWhole: of all of them.
template <int kPlanes, int kWords, bool kWhole>
class WeightSums {
 public:
  DUALBIN_INLINE WeightSums() {
    for (Vecf& sum : sums_) sum = all_floats(0.0f);
  }

  // A row whose columns here begin at `bits`, in `bytes` bytes of every plane.
  DUALBIN_INLINE void add_row(const uint8_t* bits, int64_t width, int64_t bytes, float factor) {
    const RowWeights<kPlanes> weights(factor);
    if constexpr (kWhole) {
      add_words(weights, bits, width);
    } else {
      const RestOfPlanes<kPlanes, kWords> rest(bits, width, bytes);
      add_words(weights, rest.planes, rest.kWidth);
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
  DUALBIN_INLINE void add_words(const RowWeights<kPlanes>& weights, const uint8_t* bits, int64_t width) {
    for (int w = 0; w < kWords; ++w) {
      const auto word = weights.word(bits + 4 * w, width);
      for_parts<kVecsOfWord>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        Vecf& sum = sums_[w * kVecsOfWord + kPart];
        sum = add(sum, weights.template of<kPart>(word));
      });
    }
  }

  Vecf sums_[kWords * kVecsOfWord];
};

// Calls body(first column, words, whole) for the parts of a row that are summed in registers.
template <typename Body>
DUALBIN_INLINE void for_tiles(int64_t dim, const Body& body) {
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) body(d, Index<2>{}, Index<true>{});
  if (d + 32 <= dim) {
    body(d, Index<1>{}, Index<true>{});
    d += 32;
  }
  if (d < dim) body(d, Index<1>{}, Index<false>{});
}

template <int kPlanes>
DUALBIN_INLINE void add_weights(const BagRow* rows, int64_t count, const LookupShape& shape, bool first, float* total) {
  for_tiles(shape.dim, [&](int64_t d, auto words, auto whole) {
    WeightSums<kPlanes, decltype(words)::value, decltype(whole)::value != 0> sums;
    for (int64_t r = 0; r < count; ++r) {
      for (int p = 0; p < kPlanes; ++p) fetch(rows[r].later.bits + p * shape.width + d / 8);
      if (d == 0) fetch(rows[r].later.scale);
      sums.add_row(rows[r].bits + d / 8, shape.width, shape.width - d / 8, rows[r].factor);
    }
    sums.settle(shape.dim - d, first, total + d);
  });
}

// The same for the rows of a source, in the columns from 8 * `byte` on; returns how many took part. What the loop reads lies in values of
// its own: the sums that are stored between two blocks might else be any of it.
template <typename Id, int kPlanes, int kWords, bool kWhole>
DUALBIN_INLINE int64_t add_ids(const BagSource& source, int64_t begin, int64_t end, const LookupShape& shape, int64_t byte, bool first,
                               float* total) {
  const auto* ids = static_cast<const Id*>(source.ids);
  const auto rows = static_cast<uint64_t>(source.rows);
  const uint8_t* const bits = source.bits + byte;
  const float* const scales = source.scale;
  const float* const weights = source.weights;
  const int64_t width = shape.width;
  const int64_t padding = source.padding;
  const bool votes = source.votes;
  const int64_t last = source.count - 1;
  WeightSums<kPlanes, kWords, kWhole> sums;
  int64_t used = 0;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t later = ids[n + source.ahead < last ? n + source.ahead : last];
    const int64_t row = static_cast<uint64_t>(later) < rows ? later : 0;
    fetch(bits + row * kPlanes * width);
    if (byte == 0) fetch(scales + row);
    const int64_t id = ids[n];
    if (static_cast<uint64_t>(id) >= rows || id == padding) continue;
    const float scale = scales[id];
    if (scale == 0.0f) continue;
    const float factor = votes ? 1.0f : weights == nullptr ? scale : weights[n] * scale;
    sums.add_row(bits + id * kPlanes * width, width, width - byte, factor);
    ++used;
  }
  sums.settle(shape.dim - 8 * byte, first, total);
  return used;
}

template <typename Id, int kPlanes>
int64_t sum_narrow(const BagSource& source, int64_t begin, int64_t end, const LookupShape& shape, float* total) {
  int64_t used = 0;
  int64_t from = begin;
  do {
    const int64_t to = end - from < kSumRows ? end : from + kSumRows;
    int64_t in_block = 0;
    for_tiles(shape.dim, [&](int64_t d, auto words, auto whole) {
      constexpr int kWords = decltype(words)::value;
      in_block = add_ids<Id, kPlanes, kWords, decltype(whole)::value != 0>(source, from, to, shape, d / 8, from == begin, total + d);
    });
    used += in_block;
    from = to;
  } while (from < end);
  return used;
}

template <typename Id>
int64_t sum_narrow_of(const BagSource& source, int64_t begin, int64_t end, const LookupShape& shape, float* total) {
  return shape.planes == 1 ? sum_narrow<Id, 1>(source, begin, end, shape, total) : sum_narrow<Id, 2>(source, begin, end, shape, total);
}

inline int64_t sum_narrow_bag(const BagSource& source, int64_t begin, int64_t end, const LookupShape& shape, float* total) {
  return source.narrow_ids ? sum_narrow_of<int32_t>(source, begin, end, shape, total)
                           : sum_narrow_of<int64_t>(source, begin, end, shape, total);
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
  if (shape.planes == 1) return add_weights<1>(rows, count, shape, first, total);
  if (shape.planes == 2) return add_weights<2>(rows, count, shape, first, total);
  const PlaneLevels levels_of(shape.planes);
  for (int64_t d = 0; d < shape.dim; d += kChunk) add_levels(levels_of, rows, count, shape, d / 8, first, total + d);
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
