// Launch shape of the kernels that map rows to threadIdx.y and the items of a row to threadIdx.x.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda_check.h"
#include "kernels/tuning.h"

namespace dualbin::kernels {

constexpr int kRowGridThreads = Tuning::RowGrid::kThreads;

struct RowGrid {
  dim3 block;
  unsigned grid;
};

// Lanes of a row: the largest power of two that divides the items (no lane idles), or, where that is less than a warp, one that covers
// them.
inline int row_lanes(int64_t items) {
  for (int lanes = kRowGridThreads; lanes >= 32; lanes /= 2) {
    if (items % lanes == 0) return lanes;
  }
  int lanes = 1;
  while (lanes < kRowGridThreads && lanes < items) lanes *= 2;
  return lanes;
}

inline Status make_row_grid(int64_t rows, int64_t items, RowGrid* out) {
  int count = 0;
  DUALBIN_TRY(multiprocessors(&count));
  const int lanes = row_lanes(items);
  const int rows_per_block = kRowGridThreads / lanes;
  out->block = dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(rows_per_block));
  out->grid = grid_size(rows, rows_per_block, Tuning::RowGrid::kBlocksPerSm * count);
  return {};
}

// First row of this thread and the distance to its next one.
#if defined(__CUDACC__)
__device__ __forceinline__ int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.y; }
#endif

}  // namespace dualbin::kernels
