// Row sums on the CPU.
#include <cstring>

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/ids.h"
#include "cpu/segments.h"

namespace dualbin::detail {

namespace {

constexpr int64_t kWeightsOfThread = 32768;  // columns of occurrences that are worth a thread

}  // namespace

Status CpuBackend::reduce_rows(const Launch& launch, const ReduceRowsCall& call) const {
  DUALBIN_TRY(call.check());
  const Ids& ids = call.ids;
  const int64_t dim = call.dim;
  const RowsOut& out = call.out;
  DUALBIN_TRY(check_workspace(launch, segments_bytes(launch.executor, ids.count, dim)));
  const Segments segments = make_segments(launch.workspace, ids, call.rows, nullptr);
  store_int(out.count, out.count_type, 0, segments.count);
  for_segments(launch.executor, segments, dim, kWeightsOfThread, [&](int64_t begin, int64_t end, int worker) {
    const Scratch scratch = worker_scratch(launch.workspace, ids.count, dim, worker);
    for (int64_t s = begin; s < std::min(end, out.capacity); ++s) {
      sum_segment(kernels_, call.dy, dim, segments, s, out.rows + s * dim, scratch.sum);
      store_int(out.ids, out.ids_type, s, segments.row(s));
    }
  });
  for (int64_t s = segments.count; s < out.capacity; ++s) {
    store_int(out.ids, out.ids_type, s, call.rows);
    std::memset(out.rows + s * dim, 0, static_cast<size_t>(dim) * sizeof(float));
  }
  return {};
}

Status CpuBackend::segment_sum(const Launch& launch, const SegmentSumCall& call) const {
  DUALBIN_TRY(call.check());
  const Ids& slots = call.slots;
  const int64_t count = call.segments;
  const int64_t dim = call.dim;
  if (count == 0) return {};
  DUALBIN_TRY(check_workspace(launch, segments_bytes(launch.executor, slots.count, dim)));
  const Segments segments = make_segments(launch.workspace, slots, count, nullptr);
  int64_t next = 0;  // slots without an occurrence lie between those with one
  for (int64_t s = 0; s <= segments.count; ++s) {
    const int64_t row = s < segments.count ? segments.row(s) : count;
    if (row > next) std::memset(call.out + next * dim, 0, static_cast<size_t>((row - next) * dim) * sizeof(float));
    next = row + 1;
  }
  for_segments(launch.executor, segments, dim, kWeightsOfThread, [&](int64_t begin, int64_t end, int worker) {
    const Scratch scratch = worker_scratch(launch.workspace, slots.count, dim, worker);
    for (int64_t s = begin; s < end; ++s) sum_segment(kernels_, call.dy, dim, segments, s, call.out + segments.row(s) * dim, scratch.sum);
  });
  return {};
}

}  // namespace dualbin::detail
