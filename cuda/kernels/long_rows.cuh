// The lists of long rows, written by both ways of grouping.
#pragma once

#include "kernels/groups.h"
#include "kernels/memory.cuh"

namespace dualbin::kernels {

// Lists the blocks of every lane's row, occurrences [begin, end); the whole warp calls. The lists have no fixed order; what a block sums
// and where it puts it does not depend on that.
__device__ __forceinline__ void list_long_rows(GroupCounters* counters, const LongRows& lists, int64_t begin, int64_t end) {
  const int lane = threadIdx.x % 32;
  const auto take = [](int64_t* counter, int64_t n) {
    return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(n)));
  };
  for (unsigned todo = __ballot_sync(kAllLanes, end - begin >= kLongRow); todo != 0; todo &= todo - 1) {
    const int owner = __ffs(static_cast<int>(todo)) - 1;
    const int64_t from = __shfl_sync(kAllLanes, begin, owner);
    const int64_t to = __shfl_sync(kAllLanes, end, owner);
    const int64_t blocks = (to - from + kSumBlock - 1) / kSumBlock;
    int64_t at = 0;
    if (lane == 0) {
      at = take(&counters->long_blocks, blocks);
      if (blocks > kFewBlocks) lists.rows[take(&counters->long_rows, 1)] = {from, to};
    }
    at = __shfl_sync(kAllLanes, at, 0);
    for (int64_t b = lane; b < blocks; b += 32) {
      const int64_t start = from + b * kSumBlock;
      lists.blocks[at + b] = {start, start + kSumBlock < to ? start + kSumBlock : to, first_slot(from) + b, from};
    }
  }
}

}  // namespace dualbin::kernels
