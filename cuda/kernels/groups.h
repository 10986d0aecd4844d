// Ids grouped by row on the GPU, and the workspace that this and the row sums need.
#pragma once

#include <cuda_runtime_api.h>

#include "dualbin/status.h"
#include "dualbin/types.h"

namespace dualbin::kernels {

// A row with this many occurrences or more is long: its sum is made before the kernel that wants it, by as many warps as it has blocks.
// Less would make more partial rows, each written and read once; more would leave more work to the one warp that has the row.
constexpr int64_t kLongRow = 9;

// Occurrences [begin, end) in sorted order, at most kSumBlock of them, of a long row whose first is `first`: their sum is partial row
// `slot`.
struct LongBlock {
  int64_t begin;
  int64_t end;
  int64_t slot;
  int64_t first;
};

// A long row with more blocks than this has their sums added beforehand, too, into the first; those of others are added by whoever reads
// them.
constexpr int64_t kFewBlocks = 8;

// Occurrences [begin, end) of a row with more than kFewBlocks blocks.
struct LongRow {
  int64_t begin;
  int64_t end;
};

struct LongRows {
  LongBlock* blocks = nullptr;
  LongRow* rows = nullptr;
};

// How many there are of everything, known on the device only.
struct GroupCounters {
  int64_t heads;  // starts of rows, that of the ids to drop included
  int64_t segments;
  int64_t long_blocks;
  int64_t long_rows;
};

// Rows up to `rows` itself, the key of ids to drop, and positions below `count` fit into 32 bits.
constexpr bool is_wide(int64_t count, int64_t rows) { return rows >= int64_t{UINT32_MAX} || count > int64_t{INT32_MAX}; }

// Bits of the keys of a table of `rows` rows: up to `rows` itself.
constexpr int key_bits(int64_t rows) {
  int bits = 0;
  while (bits < 63 && (rows >> bits) != 0) ++bits;
  return bits;
}

// Occurrences grouped by row. Segment s is one row; its occurrences are [begin(s), end(s)) in sorted order, by ascending position.
// How many segments there are is known on the device only; there are at most `ids` of them. Rows and positions are uint32, uint64 if
// `wide`.
struct Groups {
  int64_t ids = 0;
  bool wide = false;
  int stride = 1;  // of rows and positions: 2 if they lie side by side
  const void* keys = nullptr;
  const void* order = nullptr;
  const void* starts = nullptr;
  const GroupCounters* counters = nullptr;  // null: no segments
  LongRows long_rows;
  int64_t long_limit = 0;  // blocks of long rows there may be

#if defined(__CUDACC__)
  __device__ __forceinline__ int64_t at(const void* base, int64_t i) const {
    return wide ? static_cast<const int64_t*>(base)[i] : static_cast<int64_t>(static_cast<const uint32_t*>(base)[i]);
  }
  __device__ __forceinline__ int64_t count() const { return counters == nullptr ? 0 : counters->segments; }
  __device__ __forceinline__ int64_t begin(int64_t s) const { return at(starts, s); }
  __device__ __forceinline__ int64_t end(int64_t s) const { return at(starts, s + 1); }
  __device__ __forceinline__ int64_t row(int64_t s) const { return at(keys, stride * begin(s)); }
  __device__ __forceinline__ int64_t position(int64_t i) const { return at(order, stride * i); }
#endif
};

// A row with n >= kLongRow occurrences has ceil(n / kSumBlock) partial rows, which is at most floor(n / kLongRow). So the partial rows of
// a segment that begins at sorted position i can start at slot i / kLongRow: they end before the slot of the next segment, and all slots
// lie below N / kLongRow.
static_assert(2 * kLongRow <= kSumBlock);
#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr int64_t first_slot(int64_t begin) {
  return begin / kLongRow;
}

// Partial rows that the sum of a long row with `occurrences` of them is read from.
#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr int64_t partial_rows(int64_t occurrences) {
  const int64_t blocks = (occurrences + kSumBlock - 1) / kSumBlock;
  return blocks <= kFewBlocks ? blocks : 1;
}

// Number of partial rows that `ids` occurrences may need, and of rows with more than kFewBlocks blocks.
constexpr int64_t slot_limit(int64_t ids) { return first_slot(ids); }
constexpr int64_t many_blocks_limit(int64_t ids) { return ids / (kFewBlocks * kSumBlock + 1); }

// How group_ids() sorts: `blocks` blocks of threads with `items` ids a thread, digits of `bits` bits. No blocks: by sort_groups().
struct GroupPlan {
  int blocks = 0;
  bool cluster = false;  // the blocks are a cluster, which waits for itself faster than a grid does
  int items = 0;
  int bits = 0;
  int passes = 0;

  // Counts of every digit in every block; a multiple of four of them for 16-byte loads.
  constexpr int stride() const { return (blocks + 3) / 4 * 4; }
  constexpr size_t tile_bytes() const { return (size_t{1} << bits) * static_cast<size_t>(stride()) * sizeof(uint32_t); }
};

// Buffers in the workspace. With `base` null only `bytes` and the sizes are of use.
struct Workspace {
  void* keys[2] = {nullptr, nullptr};
  void* order[2] = {nullptr, nullptr};
  void* starts = nullptr;
  GroupCounters* counters = nullptr;
  LongRows long_rows;
  GroupPlan plan;
  uint32_t* tiles = nullptr;  // see GroupPlan
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

// Groups the ids in [0, rows); the others are dropped. `stats`, if not null, are set to zeros on the way.
Status make_groups(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Stats* stats, Groups* out);

// The two ways to group, and what they need.
Status plan_groups(int64_t count, int64_t rows, GroupPlan* out);
Status group_ids(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Stats* stats, Groups* out);
Status sort_bytes(int64_t count, int64_t rows, size_t* out);
Status sort_groups(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Stats* stats, Groups* out);

}  // namespace dualbin::kernels
