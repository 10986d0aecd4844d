// One call of update(), and the two ways to update the rows of a range of segments.
#pragma once

#include <atomic>

#include "core/backend.h"
#include "cpu/segments.h"

namespace dualbin::detail {

struct UpdateJob {
  const Table& table;
  const State& state;
  const Rule& rule;
  const StepContext& context;
  const Floats& dy;
  const Segments& segments;
  const UpdateOut& out;

  // The table's row, or that of its mask, which takes what changes.
  uint8_t* target(int64_t s) const {
    return out.mask == nullptr ? table.bits + segments.row(s) * table.row_bytes() : out.mask + segments.positions(s)[0] * table.row_bytes();
  }

  void set_scale(int64_t s, float scale) const {
    if (out.mask == nullptr) table.scale[segments.row(s)] = scale;
    if (out.new_scale != nullptr) out.new_scale[segments.positions(s)[0]] = scale;
  }
};

// The summed gradient of a row, and its largest magnitude as the bits of a float32.
struct RowGradient {
  const void* values;
  FloatType type;
  uint32_t largest;
};

// Of segment s by kernels: where a row occurs once it is read where it lies.
inline RowGradient sum_of_segment(const Kernels& kernels, const UpdateJob& job, int64_t s, const Scratch& scratch) {
  const int64_t dim = job.table.dim;
  RowGradient gradient{};
  gradient.type = job.dy.type;
  if (job.segments.size(s) > 1) {
    sum_segment(&kernels, job.dy, dim, job.segments, s, scratch.sum, scratch.block);
    gradient.values = scratch.sum;
    gradient.type = FloatType::kF32;
  } else {
    const int64_t element = job.dy.type == FloatType::kF32 ? 4 : 2;
    gradient.values = static_cast<const char*>(job.dy.data) + job.segments.positions(s)[0] * dim * element;
  }
  const uint32_t largest = kernels.largest[static_cast<int>(gradient.type)](gradient.values, dim);
  const auto half = static_cast<uint16_t>(largest);
  gradient.largest = gradient.type == FloatType::kF32   ? largest
                     : gradient.type == FloatType::kF16 ? float_bits(widen_f16(half))
                                                        : float_bits(widen_bf16(half));
  return gradient;
}

// Row by row, with the code of rules/row.h.
Stats update_by_rules(const UpdateJob& job, int64_t begin, int64_t end, const Scratch& scratch);

// A counter, by kernels: batches of rows, each phase for all rows of a batch.
Stats update_by_kernels(const Kernels& kernels, const UpdateJob& job, int64_t begin, int64_t end, const Scratch& scratch);

// One of the rules of one plane without counters, by kernels.
Stats update_signs_by_kernels(const Kernels& kernels, const UpdateJob& job, int64_t begin, int64_t end, const Scratch& scratch);

}  // namespace dualbin::detail
