// The row sum on the GPU: blocks of kSumBlock occurrences in order, then the block sums in order. Columns are independent, so any number of
// threads may share a row; no thread ever adds in another order. Long rows have their sum made beforehand, in their first partial row.
#pragma once

#include "kernels/groups.h"
#include "kernels/memory.cuh"

namespace dualbin::kernels {

// A gradient and the partial rows of its blocks.
struct Gradient {
  const void* data = nullptr;
  FloatType type = FloatType::kF32;
  bool vector = false;  // 16-byte accesses are possible for the gradient, the partial rows and the result
  int64_t dim = 0;
  const float* partials = nullptr;
};

// kCount columns, from `column` on, of the sum over the occurrences [begin, end).
template <typename Format, int kCount>
__device__ __forceinline__ void sum_occurrences(const Groups& groups, const Gradient& gradient, int64_t begin, int64_t end, int64_t column,
                                                float (&sum)[kCount]) {
  const auto* data = static_cast<const typename Format::Storage*>(gradient.data) + column;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum[k] = 0.0f;
#pragma unroll 8  // rows on their way at once
  for (int64_t i = begin; i < end; ++i) {
    float row[kCount];
    load_widened<Format>(data + groups.position(i) * gradient.dim, row);
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum[k] += row[k];
  }
}

// The same columns of the sum of a row with the occurrences [begin, end).
template <typename Format, int kCount>
__device__ __forceinline__ void sum_row(const Groups& groups, const Gradient& gradient, int64_t begin, int64_t end, int64_t column,
                                        float (&sum)[kCount]) {
  if (end - begin < kLongRow) return sum_occurrences<Format>(groups, gradient, begin, end, column, sum);
  const float* partial = gradient.partials + first_slot(begin) * gradient.dim + column;
  const int64_t blocks = partial_rows(end - begin);
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum[k] = 0.0f;
#pragma unroll 4
  for (int64_t b = 0; b < blocks; ++b) {
    float block[kCount];
    load_floats(partial + b * gradient.dim, block);
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum[k] += block[k];
  }
}

// Makes the sums of long rows.
Status sum_long_rows(cudaStream_t stream, const Groups& groups, const Gradient& gradient, float* partials);
// The gradient that goes with `workspace`; `out` is where sums go if they are written with 16-byte accesses, or null.
Gradient make_gradient(const Workspace& workspace, Floats dy, int64_t dim, const float* out);

}  // namespace dualbin::kernels
