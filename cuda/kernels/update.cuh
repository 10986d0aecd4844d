// What the two kernels of updates share: update_words for counters, update_rows for all else.
#pragma once

#include "core/ops/update.h"
#include "kernels/row_sum.cuh"
#include "kernels/team.cuh"
#include "kernels/tuning.h"
#include "rules/row.h"

namespace dualbin::kernels {

struct UpdateArgs {
  Table table;
  State state;
  Rule rule;
  const StepContext* context;  // null: it came with the launch
  StepContext context_value;
  UpdateOut out;
  Groups groups;
  Gradient gradient;

  __device__ __forceinline__ StepContext step_context() const { return context == nullptr ? context_value : *context; }
};

// What a thread counts over all its rows.
struct ThreadStats {
  uint32_t flips = 0;
  uint32_t rows = 0;
  uint32_t skipped = 0;
  uint32_t clipped = 0;
};

// What the warps of a block have counted, and how many of them are done; starts as zeros.
struct BlockStats {
  uint32_t sums[4];
  uint32_t warps;
};

// Adds what the lanes of a warp have counted to the block's, and, as its last warp, the block's to `stats`: atomics on one address take
// turns, and a launch has ten thousands of warps. 2^32 of anything takes more rows than a block sees in a launch.
__device__ __forceinline__ void add_stats(Stats* stats, const ThreadStats& of_thread, BlockStats& of_block) {
  if (stats == nullptr) return;
  const uint32_t counts[4] = {of_thread.flips, of_thread.rows, of_thread.skipped, of_thread.clipped};
  uint32_t sums[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = __reduce_add_sync(kAllLanes, counts[i]);
  if (threadIdx.x % 32 != 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (sums[i] != 0) atomicAdd(&of_block.sums[i], sums[i]);
  }
  __threadfence_block();
  if (atomicAdd(&of_block.warps, 1u) + 1 != (blockDim.x + 31) / 32) return;
  __threadfence_block();
  uint64_t* const totals[4] = {&stats->flips, &stats->rows, &stats->skipped, &stats->clipped};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t sum = atomicExch(&of_block.sums[i], 0u);
    if (sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(totals[i]), static_cast<unsigned long long>(sum));
  }
}

}  // namespace dualbin::kernels
