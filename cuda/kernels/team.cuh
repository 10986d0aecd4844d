// The threads that work on one row together: a warp, or a whole block.
#pragma once

#include "kernels/memory.cuh"
#include "kernels/tuning.h"
#include "rules/row.h"

namespace dualbin::kernels {

// Sum over the warp, in its first lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(kAllLanes, value, offset);
  return value;
}

struct TeamShared {
  RowStep step;
  uint32_t largest[Tuning::Update::kMostTeamWarps];
  uint64_t squares[Tuning::Update::kMostTeamWarps];
  int64_t aligned[Tuning::Update::kMostTeamWarps];
};

template <bool kWholeBlock>
struct Team {
  int rank;       // of the thread in its team
  int size;       // threads of a team
  int index;      // of the team in its block
  int per_block;  // teams of a block
  TeamShared* shared;

  __device__ __forceinline__ explicit Team(TeamShared* of_block)
      : rank(kWholeBlock ? threadIdx.x : threadIdx.x % 32),
        size(kWholeBlock ? blockDim.x : 32),
        index(kWholeBlock ? 0 : threadIdx.x / 32),
        per_block(kWholeBlock ? 1 : blockDim.x / 32),
        shared(of_block + index) {}

  // Orders the team's memory accesses before and after it.
  __device__ __forceinline__ void sync() const {
    if constexpr (kWholeBlock) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Largest value of the team, in every thread; also a sync(). Once a row.
  __device__ __forceinline__ uint32_t max(uint32_t value) const {
    value = __reduce_max_sync(kAllLanes, value);
    if constexpr (!kWholeBlock) {
      __syncwarp();
      return value;
    }
    if (rank % 32 == 0) shared->largest[rank / 32] = value;
    __syncthreads();
    uint32_t largest = 0;
    for (int warp = 0; warp < size / 32; ++warp) largest = ::max(largest, shared->largest[warp]);
    return largest;
  }

  // Sums of the team, in its first thread. Once a row.
  __device__ __forceinline__ RowSums sum(RowSums sums) const {
    sums.squares = warp_sum(sums.squares);
    sums.aligned = warp_sum(sums.aligned);
    if constexpr (!kWholeBlock) return sums;
    if (rank % 32 == 0) {
      shared->squares[rank / 32] = sums.squares;
      shared->aligned[rank / 32] = sums.aligned;
    }
    __syncthreads();
    for (int warp = 1; rank == 0 && warp < size / 32; ++warp) {
      sums.squares += shared->squares[warp];
      sums.aligned += shared->aligned[warp];
    }
    return sums;
  }
};

}  // namespace dualbin::kernels
