// Ids grouped by row on the GPU, and the workspace that this and the row sums need.
#pragma once

#include <cuda_runtime_api.h>

#include "dualbin/status.h"
#include "dualbin/types.h"

namespace dualbin::kernels {

// Occurrences [begin, end) in sorted order, at most kSumBlock of them, of a row with more than that: their sum is partial row `slot`.
struct HotBlock {
  int64_t begin;
  int64_t end;
  int64_t slot;
};

// Occurrences grouped by row. Segment s is one row; its occurrences are [begin(s), end(s)) in sorted order, by ascending position.
// How many segments there are is known on the device only; there are at most `ids` of them. Rows and positions are uint32, uint64 if
// `wide`.
struct Groups {
  int64_t ids = 0;
  bool wide = false;
  const void* keys = nullptr;
  const void* order = nullptr;
  const void* starts = nullptr;
  const int64_t* segments = nullptr;  // null: none
  const HotBlock* hot = nullptr;
  const int64_t* hot_count = nullptr;
  int64_t hot_limit = 0;

#if defined(__CUDACC__)
  __device__ __forceinline__ int64_t at(const void* base, int64_t i) const {
    return wide ? static_cast<const int64_t*>(base)[i] : static_cast<int64_t>(static_cast<const uint32_t*>(base)[i]);
  }
  __device__ __forceinline__ int64_t count() const { return segments == nullptr ? 0 : *segments; }
  __device__ __forceinline__ int64_t begin(int64_t s) const { return at(starts, s); }
  __device__ __forceinline__ int64_t end(int64_t s) const { return at(starts, s + 1); }
  __device__ __forceinline__ int64_t row(int64_t s) const { return at(keys, begin(s)); }
  __device__ __forceinline__ int64_t position(int64_t i) const { return at(order, i); }
#endif
};

// A row with n > kSumBlock occurrences has ceil(n / kSumBlock) partial rows. Per occurrence that is most for n = kSumBlock + 1, where it is
// 2 / (kSumBlock + 1). So the partial rows of a segment that begins at sorted position i can start at slot 2*i / (kSumBlock + 1): they end
// before the slot of the next segment, and all slots lie below that of position N. For N ids that is less than N / 32.
constexpr int64_t kSlotDivisor = kSumBlock + 1;
#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr int64_t first_slot(int64_t begin) {
  return 2 * begin / kSlotDivisor;
}

// Number of partial rows that `ids` occurrences may need.
constexpr int64_t slot_limit(int64_t ids) { return ids <= kSumBlock ? 0 : first_slot(ids); }

// Buffers in the workspace. With `base` null only `bytes` and the sizes are of use.
struct Workspace {
  void* keys[2] = {nullptr, nullptr};
  void* order[2] = {nullptr, nullptr};
  void* starts = nullptr;
  int64_t* counters = nullptr;  // kCounters of them
  HotBlock* hot = nullptr;
  void* temporary = nullptr;  // for CUB
  size_t temporary_bytes = 0;
  float* partials = nullptr;     // [slot_limit(count), dim]
  float* row_buffers = nullptr;  // [row_buffer_count, dim], one a block, for updates of rows that do not fit into shared memory
  int64_t row_buffer_count = 0;  // 0: a row fits
  size_t bytes = 0;
};

Status make_workspace(Op op, void* base, int64_t count, int64_t rows, int64_t dim, Workspace* out);

// Checks the workspace of a launch and cuts it up. Writes nothing to the device.
Status open_workspace(Op op, const Launch& launch, int64_t count, int64_t rows, int64_t dim, Workspace* out);

// Groups the ids in [0, rows); the others are dropped.
Status make_groups(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Groups* out);

}  // namespace dualbin::kernels
