// The workspace of row sums and updates, and which way of grouping a call takes.
#include "kernels/groups.h"

#include <algorithm>

#include "core/checks.h"
#include "kernels/cuda_check.h"
#include "kernels/tuning.h"

namespace dualbin::kernels {

namespace {

// Cuts a block of memory into aligned buffers, or, with a null base, only adds up their sizes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  void* take(size_t bytes) {
    void* buffer = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return buffer;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Blocks of an update that each need a row buffer; 0 where a row fits into shared memory.
Status row_buffer_count(int64_t count, int64_t dim, int64_t* out) {
  *out = 0;
  if (dim <= Tuning::Update::kSharedRowLimit) return {};
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const int64_t fit = Tuning::Update::kRowBufferBytes / (dim * static_cast<int64_t>(sizeof(float)));
  *out = std::max<int64_t>(1, std::min({count, fit, Tuning::Update::kRowBuffersPerSm * processors}));
  return {};
}

}  // namespace

Status make_workspace(Op op, void* base, int64_t count, int64_t rows, int64_t dim, Workspace* out) {
  *out = {};
  if (count <= 0) return {};
  DUALBIN_TRY(plan_groups(count, rows, &out->plan));
  if (out->plan.blocks == 0) DUALBIN_TRY(sort_bytes(count, rows, &out->temporary_bytes));
  const size_t n = static_cast<size_t>(count);
  const size_t index = is_wide(count, rows) ? sizeof(uint64_t) : sizeof(uint32_t);
  const size_t row_bytes = static_cast<size_t>(dim) * sizeof(float);
  const size_t slots = static_cast<size_t>(slot_limit(count));
  Carver carver(base);
  // Keys and positions of group_ids() lie side by side, in the space of both.
  for (int side = 0; side < 2; ++side) {
    out->keys[side] = carver.take(n * index * (out->plan.blocks > 0 ? 2 : 1));
    out->order[side] = carver.take(out->plan.blocks > 0 ? 0 : n * index);
  }
  out->starts = carver.take((n + 1) * index);
  out->counters = static_cast<GroupCounters*>(carver.take(sizeof(GroupCounters)));
  out->long_rows.blocks = static_cast<LongBlock*>(carver.take(slots * sizeof(LongBlock)));
  out->long_rows.rows = static_cast<LongRow*>(carver.take(static_cast<size_t>(many_blocks_limit(count)) * sizeof(LongRow)));
  out->tiles = static_cast<uint32_t*>(carver.take(out->plan.tile_bytes()));
  out->temporary = carver.take(out->temporary_bytes);
  out->partials = static_cast<float*>(carver.take(slots * row_bytes));
  if (op == Op::kUpdate) DUALBIN_TRY(row_buffer_count(count, dim, &out->row_buffer_count));
  out->row_buffers = static_cast<float*>(carver.take(static_cast<size_t>(out->row_buffer_count) * row_bytes));
  out->bytes = carver.used();
  return {};
}

Status open_workspace(Op op, const Launch& launch, int64_t count, int64_t rows, int64_t dim, Workspace* out) {
  DUALBIN_TRY(make_workspace(op, launch.workspace, count, rows, dim, out));
  DUALBIN_TRY(check_workspace(launch, out->bytes));
  DUALBIN_REQUIRE(aligned(launch.workspace, kWorkspaceAlignment), Code::kInvalidArgument, "the workspace must be aligned to %zu bytes",
                  kWorkspaceAlignment);
  return {};
}

Status make_groups(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Stats* stats, Groups* out) {
  *out = {};
  if (ids.count == 0) return {};
  out->ids = ids.count;
  out->wide = is_wide(ids.count, rows);
  out->counters = workspace.counters;
  out->long_rows = workspace.long_rows;
  out->long_limit = slot_limit(ids.count);
  return workspace.plan.blocks > 0 ? group_ids(stream, workspace, ids, rows, stats, out)
                                   : sort_groups(stream, workspace, ids, rows, stats, out);
}

}  // namespace dualbin::kernels
