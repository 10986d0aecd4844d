// Grouping ids by row, and the row sum.
#pragma once

#include "cpu/floats.h"
#include "cpu/parallel.h"
#include "dualbin/backend.h"

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

// Workspace for `count` ids and two float rows a worker.
size_t segments_bytes(const Executor* executor, int64_t count, int64_t dim);

// Sorts the ids in [0, rows) by row, stable, into the workspace. With `bad` not null the position of the first other id goes there (-1:
// none).
Segments make_segments(void* workspace, const Ids& ids, int64_t rows, int64_t* bad);

// Two rows of `dim` floats for one worker, behind the segments in the workspace.
float* worker_rows(void* workspace, int64_t count, int64_t dim, int worker);

// Calls body(segment, worker) for every segment; slices hold about equal numbers of occurrences.
template <typename Body>
void for_each_segment(const Executor* executor, const Segments& segments, int64_t dim, const Body& body) {
  const int64_t total = segments.count == 0 ? 0 : segments.starts[segments.count];
  const int64_t grain = std::max<int64_t>(1, 16384 / dim);
  parallel_range(executor, total, grain, [&](int64_t begin, int64_t end, int worker) {
    const int64_t* first = std::lower_bound(segments.starts, segments.starts + segments.count, begin);
    for (int64_t s = first - segments.starts; s < segments.count && segments.starts[s] < end; ++s) body(s, worker);
  });
}

// sum[dim] = the row sum of segment s in the documented order; `block` is scratch of the same size.
template <typename Format>
void sum_segment(const typename Format::Storage* dy, int64_t dim, const Segments& segments, int64_t s, float* sum, float* block) {
  const int64_t size = segments.size(s);
  const int64_t* positions = segments.positions(s);
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

}  // namespace dualbin::detail
