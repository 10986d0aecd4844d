// Grouping ids by row, and the row sum.
#pragma once

#include "core/backend.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"
#include "cpu/simd/kernels.h"

namespace dualbin::detail {

// Occurrences grouped by row: segment s is row keys[starts[s]] and its positions order[starts[s] .. starts[s+1]), ascending.
struct Segments {
  const int64_t* keys = nullptr;
  const int64_t* order = nullptr;
  const int64_t* starts = nullptr;
  int64_t count = 0;

  int64_t row(int64_t s) const { return keys[starts[s]]; }
  int64_t size(int64_t s) const { return starts[s + 1] - starts[s]; }
  const int64_t* positions(int64_t s) const { return order + starts[s]; }
};

// What one worker writes its intermediate results to: two rows of floats, and the evidence of a batch of rows in whole chunks.
struct Scratch {
  float* sum;
  float* block;
  int16_t* evidence;
};

// Rows whose evidence is made before the first of them is stepped, so that the divisions of one row overlap with those of others. Their
// evidence stays in the first-level cache.
constexpr int64_t kMostBatch = 32;

constexpr int64_t padded_dim(int64_t dim) { return (dim + kChunk - 1) / kChunk * kChunk; }
constexpr int64_t batch_rows(int64_t dim) { return std::clamp<int64_t>(6144 / padded_dim(std::max<int64_t>(dim, 1)), 1, kMostBatch); }

// Workspace for `count` ids and the scratch of every worker.
size_t segments_bytes(const Executor* executor, int64_t count, int64_t dim);

// Sorts the ids in [0, rows) by row, stable, into the workspace. With `bad` not null the position of the first other id goes there (-1:
// none).
Segments make_segments(void* workspace, const Ids& ids, int64_t rows, int64_t* bad);

// The scratch of one worker, behind the segments in the workspace.
Scratch worker_scratch(void* workspace, int64_t count, int64_t dim, int worker);

// Calls body(first, end, worker) for ranges of segments with about equal numbers of occurrences. `weights`: columns of all occurrences that
// are worth a thread.
template <typename Body>
void for_segments(const Executor* executor, const Segments& segments, int64_t dim, int64_t weights, const Body& body) {
  const int64_t total = segments.count == 0 ? 0 : segments.starts[segments.count];
  parallel_range(executor, total, std::max<int64_t>(1, weights / dim), [&](int64_t begin, int64_t end, int worker) {
    const auto segment_of = [&](int64_t occurrence) {
      return std::lower_bound(segments.starts, segments.starts + segments.count, occurrence) - segments.starts;
    };
    body(segment_of(begin), segment_of(end), worker);
  });
}

// sum[dim] = the row sum of the occurrences at positions[0 .. size), in the documented order; `block` is scratch of the same size.
template <typename Format>
void sum_occurrences(const typename Format::Storage* dy, int64_t dim, const int64_t* positions, int64_t size, float* sum, float* block) {
  const auto add_block = [&](int64_t from, int64_t to, float* into) {
    std::fill(into, into + dim, 0.0f);
    for (int64_t i = from; i < to; ++i) {
      const auto* row = dy + positions[i] * dim;
      for (int64_t d = 0; d < dim; ++d) into[d] += Format::widen(row[d]);
    }
  };
  if (size <= kSumBlock) return add_block(0, size, sum);
  std::fill(sum, sum + dim, 0.0f);
  for (int64_t from = 0; from < size; from += kSumBlock) {
    add_block(from, std::min(size, from + kSumBlock), block);
    for (int64_t d = 0; d < dim; ++d) sum[d] += block[d];
  }
}

// The same by the kernels, or without any where they are null.
inline void sum_segment(const Kernels* kernels, const Floats& dy, int64_t dim, const Segments& segments, int64_t s, float* sum,
                        float* block) {
  if (kernels != nullptr) {
    return kernels->sum_rows[static_cast<int>(dy.type)](dy.data, dim, segments.positions(s), segments.size(s), sum, block);
  }
  with_float(dy.type, [&](auto format) {
    using Format = decltype(format);
    sum_occurrences<Format>(static_cast<const typename Format::Storage*>(dy.data), dim, segments.positions(s), segments.size(s), sum,
                            block);
  });
}

}  // namespace dualbin::detail
