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
  const StepContext* context;
  UpdateOut out;
  Groups groups;
  Gradient gradient;
};

// What a thread counts over all its rows.
struct ThreadStats {
  uint32_t flips = 0;
  uint32_t rows = 0;
  uint32_t skipped = 0;
  uint32_t clipped = 0;
};

// Adds what the lanes of a warp have counted. One thread of all: 2^32 of anything takes more rows than a thread sees in a launch.
__device__ __forceinline__ void add_stats(Stats* stats, const ThreadStats& of_thread) {
  const auto add = [](uint64_t* total, uint32_t value) {
    const uint32_t sum = __reduce_add_sync(kAllLanes, value);
    if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(sum));
  };
  if (stats == nullptr) return;
  add(&stats->flips, of_thread.flips);
  add(&stats->rows, of_thread.rows);
  add(&stats->skipped, of_thread.skipped);
  add(&stats->clipped, of_thread.clipped);
}

}  // namespace dualbin::kernels
