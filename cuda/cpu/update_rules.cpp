// Updates row by row, on every processor and with every rule.
#include "cpu/update_rows.h"
#include "rules/row.h"

namespace dualbin::detail {

namespace {

// Updates the row of segment s by its summed gradient.
void update_row(const UpdateJob& job, int64_t s, const float* gradient, Stats* stats) {
  const Table& table = job.table;
  const int64_t row = job.segments.row(s);
  const int64_t dim = table.dim;
  const int64_t width = table.width();
  const uint8_t* bits = table.bits + row * table.row_bytes();
  const float scale = table.scale[row];
  const uint32_t magnitude = float_bits(scale) & 0x7fffffffu;
  uint32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, float_bits(gradient[d]) & 0x7fffffffu);
  if (std::max(magnitude, largest) >= kInfinityBits) {
    ++stats->skipped;
    return;
  }
  const Quantiser quantise = make_quantiser(largest);
  RowSums sums;
  for (int64_t d = 0; d < dim; ++d) {
    sums.add(quantise(gradient[d]), weight_of(bits + d / 8, width, table.planes, static_cast<int>(d % 8)));
  }
  const RowStep step = finish_row(job.rule, job.context, job.state, table, row, scale, sums, quantise.exponent);

  uint8_t* target = job.target(s);
  for (int64_t b = 0; b < width; ++b) {
    const ByteStep changed = step_byte(job.rule, step, quantise, table, job.state, row, b, gradient);
    stats->clipped += changed.clipped;
    stats->flips += static_cast<uint64_t>(__builtin_popcount(changed.change[0]));
    for (int p = 0; p < table.planes; ++p) target[p * width + b] ^= changed.change[p];
  }
  job.set_scale(s, step.new_scale);
  ++stats->rows;
}

}  // namespace

Stats update_by_rules(const UpdateJob& job, int64_t begin, int64_t end, const Scratch& scratch) {
  Stats stats{};
  for (int64_t s = begin; s < end; ++s) {
    if (job.table.scale[job.segments.row(s)] == 0.0f) continue;
    sum_segment(nullptr, job.dy, job.table.dim, job.segments, s, scratch.sum, scratch.block);
    update_row(job, s, scratch.sum, &stats);
  }
  return stats;
}

}  // namespace dualbin::detail
