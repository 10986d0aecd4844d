// Row sums and updates on the CPU.
#include <atomic>
#include <cstring>

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/segments.h"
#include "rules/row.h"

namespace dualbin::detail {

namespace {

void store_int(void* base, IdType type, int64_t at, int64_t value) {
  if (type == IdType::kI32) {
    static_cast<int32_t*>(base)[at] = static_cast<int32_t>(value);
  } else {
    static_cast<int64_t*>(base)[at] = value;
  }
}

struct AtomicStats {
  std::atomic<uint64_t> flips{0}, rows{0}, skipped{0}, clipped{0};

  Stats read() const { return {flips.load(), rows.load(), skipped.load(), clipped.load()}; }
};

// One call of update(), shared by all workers.
struct UpdateJob {
  const Table& table;
  const State& state;
  const Rule& rule;
  const StepContext& context;
  const UpdateOut& out;
  AtomicStats stats;

  // Updates `row` by its summed gradient; `first` is the position of its first occurrence.
  void row(int64_t row, const float* gradient, int64_t first) {
    const int64_t dim = table.dim;
    const int64_t width = table.width();
    const uint8_t* bits = table.bits + row * table.row_bytes();
    const float scale = table.scale[row];
    if (scale == 0.0f) return;
    uint32_t magnitude = float_bits(scale) & 0x7fffffffu;
    uint32_t largest = 0;
    for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, float_bits(gradient[d]) & 0x7fffffffu);
    if (std::max(magnitude, largest) >= kInfinityBits) {
      stats.skipped.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    const Quantiser quantise = make_quantiser(largest);
    RowSums sums;
    for (int64_t d = 0; d < dim; ++d) {
      sums.add(quantise(gradient[d]), weight_of(bits + d / 8, width, table.planes, static_cast<int>(d % 8)));
    }
    const RowStep step = finish_row(rule, context, state, table, row, scale, sums, quantise.exponent);

    uint64_t flips = 0;
    uint32_t clipped = 0;
    uint8_t* target = out.mask != nullptr ? out.mask + first * table.row_bytes() : table.bits + row * table.row_bytes();
    for (int64_t b = 0; b < width; ++b) {
      const ByteStep changed = step_byte(rule, step, quantise, table, state, row, b, gradient);
      clipped += changed.clipped;
      flips += static_cast<uint64_t>(__builtin_popcount(changed.change[0]));
      for (int p = 0; p < table.planes; ++p) target[p * width + b] ^= changed.change[p];
    }
    if (out.mask == nullptr) table.scale[row] = step.new_scale;
    if (out.new_scale != nullptr) out.new_scale[first] = step.new_scale;
    stats.rows.fetch_add(1, std::memory_order_relaxed);
    stats.flips.fetch_add(flips, std::memory_order_relaxed);
    stats.clipped.fetch_add(clipped, std::memory_order_relaxed);
  }
};

}  // namespace

size_t CpuBackend::workspace_bytes(Op, const Executor* executor, int64_t count, int64_t, int64_t dim) const {
  return segments_bytes(executor, std::max<int64_t>(count, 0), std::max<int64_t>(dim, 0));
}

Status CpuBackend::reduce_rows(const Launch& launch, Ids ids, Floats dy, int64_t rows, int64_t dim, const RowsOut& out) const {
  DUALBIN_TRY(check_reduce_rows(ids, dy, rows, dim, out));
  DUALBIN_TRY(check_workspace(launch, segments_bytes(launch.executor, ids.count, dim)));
  const Segments segments = make_segments(launch.workspace, ids, rows, nullptr);
  store_int(out.count, out.count_type, 0, segments.count);
  with_float(dy.type, [&](auto format) {
    using Format = decltype(format);
    const auto* data = static_cast<const typename Format::Storage*>(dy.data);
    for_each_segment(launch.executor, segments, dim, [&](int64_t s, int worker) {
      if (s >= out.capacity) return;
      sum_segment<Format>(data, dim, segments, s, out.rows + s * dim, worker_rows(launch.workspace, ids.count, dim, worker));
      store_int(out.ids, out.ids_type, s, segments.row(s));
    });
  });
  for (int64_t s = segments.count; s < out.capacity; ++s) {
    store_int(out.ids, out.ids_type, s, rows);
    std::memset(out.rows + s * dim, 0, static_cast<size_t>(dim) * sizeof(float));
  }
  return {};
}

Status CpuBackend::segment_sum(const Launch& launch, Ids slots, Floats dy, int64_t count, int64_t dim, float* out) const {
  DUALBIN_TRY(check_segment_sum(slots, dy, count, dim, out));
  if (count == 0) return {};
  DUALBIN_TRY(check_workspace(launch, segments_bytes(launch.executor, slots.count, dim)));
  const Segments segments = make_segments(launch.workspace, slots, count, nullptr);
  int64_t next = 0;  // slots without an occurrence lie between those with one
  for (int64_t s = 0; s <= segments.count; ++s) {
    const int64_t row = s < segments.count ? segments.row(s) : count;
    if (row > next) std::memset(out + next * dim, 0, static_cast<size_t>((row - next) * dim) * sizeof(float));
    next = row + 1;
  }
  with_float(dy.type, [&](auto format) {
    using Format = decltype(format);
    const auto* data = static_cast<const typename Format::Storage*>(dy.data);
    for_each_segment(launch.executor, segments, dim, [&](int64_t s, int worker) {
      sum_segment<Format>(data, dim, segments, s, out + segments.row(s) * dim, worker_rows(launch.workspace, slots.count, dim, worker));
    });
  });
  return {};
}

Status CpuBackend::update(const Launch& launch, const Table& table, const State& state, const Rule& rule, const StepContext* context,
                          Ids ids, Floats dy, bool strict, const UpdateOut& out) const {
  DUALBIN_TRY(check_update(table, state, rule, context, ids, dy, out));
  DUALBIN_TRY(check_workspace(launch, segments_bytes(launch.executor, ids.count, table.dim)));
  int64_t bad = -1;
  const Segments segments = make_segments(launch.workspace, ids, table.rows, &bad);
  DUALBIN_REQUIRE(!strict || bad < 0, Code::kOutOfRange, "id %" PRId64 " at position %" PRId64 " is outside [0, %" PRId64 ")",
                  id_at(ids, bad), bad, table.rows);
  if (out.mask != nullptr) {
    std::memset(out.mask, 0, static_cast<size_t>(ids.count * table.row_bytes()));
    for (int64_t n = 0; n < ids.count; ++n) out.new_scale[n] = 0.0f;
    for (int64_t s = 0; s < segments.count; ++s) {
      for (int64_t i = 0; i < segments.size(s); ++i) out.new_scale[segments.positions(s)[i]] = table.scale[segments.row(s)];
    }
  }
  UpdateJob job{table, state, rule, *context, out, {}};
  with_float(dy.type, [&](auto format) {
    using Format = decltype(format);
    const auto* data = static_cast<const typename Format::Storage*>(dy.data);
    for_each_segment(launch.executor, segments, table.dim, [&](int64_t s, int worker) {
      float* sum = worker_rows(launch.workspace, ids.count, table.dim, worker);
      sum_segment<Format>(data, table.dim, segments, s, sum, sum + table.dim);
      const int64_t first = segments.positions(s)[0];
      job.row(segments.row(s), sum, first);
      for (int64_t i = 1; out.new_scale != nullptr && i < segments.size(s); ++i)
        out.new_scale[segments.positions(s)[i]] = out.new_scale[first];
    });
  });
  if (out.stats != nullptr) *out.stats = job.stats.read();
  return {};
}

Status CpuBackend::advance(const Launch&, int64_t* step) const {
  DUALBIN_TRY(check_data("step", step));
  ++*step;
  return {};
}

Status CpuBackend::xor_rows(const Launch& launch, uint8_t* bits, int64_t rows, int64_t width, Ids ids, const uint8_t* mask) const {
  DUALBIN_TRY(check_xor_rows(bits, rows, width, ids, mask));
  parallel_range(launch.executor, ids.count, std::max<int64_t>(1, 65536 / width), [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = id_at(ids, n);
      if (id < 0 || id >= rows) continue;
      for (int64_t b = 0; b < width; ++b) bits[id * width + b] ^= mask[n * width + b];
    }
  });
  return {};
}

}  // namespace dualbin::detail

namespace dualbin {

const Backend& cpu() {
  static const detail::CpuBackend backend;
  return backend;
}

const char* simd_level() { return "portable"; }

}  // namespace dualbin
