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

// Row by row, with the code of rules/row.h.
Stats update_by_rules(const UpdateJob& job, int64_t begin, int64_t end, const Scratch& scratch);

// A counter, by kernels: batches of rows, each phase for all rows of a batch.
Stats update_by_kernels(const Kernels& kernels, const UpdateJob& job, int64_t begin, int64_t end, const Scratch& scratch);

}  // namespace dualbin::detail
