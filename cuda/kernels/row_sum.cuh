// The row sum on the GPU: blocks of kSumBlock occurrences in order, then the block sums in order. Columns are independent, so any number of
// threads may share a row; no thread ever adds in another order. Long rows have their sum made beforehand, in their first partial row.
#pragma once

#include "kernels/groups.h"
#include "kernels/memory.cuh"
#include "kernels/tuning.h"

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

#if defined(__CUDACC__)
// A warp's share of the work: `item` (a row or a block of one) and the columns of one tile, kCount a lane.
template <int kCount>
struct Tiles {
  int64_t per_item;
  int64_t unit;
  int64_t stride;

  __device__ __forceinline__ explicit Tiles(int64_t dim)
      : per_item((dim + 32 * kCount - 1) / (32 * kCount)),
        unit(static_cast<int64_t>(blockIdx.x) * Tuning::RowSum::kWarps + threadIdx.x / 32),
        stride(static_cast<int64_t>(gridDim.x) * Tuning::RowSum::kWarps) {}
  __device__ __forceinline__ int64_t item() const { return per_item == 1 ? unit : unit / per_item; }
  __device__ __forceinline__ int64_t column(int64_t item) const { return ((unit - item * per_item) * 32 + threadIdx.x % 32) * kCount; }
};
#endif

inline int64_t tile_count(int64_t items, int64_t dim, int count) { return items * ((dim + 32 * count - 1) / (32 * count)); }

// Calls body(format, columns a lane) with both as types.
template <typename Body>
Status with_columns(const Gradient& gradient, Body&& body) {
  return with_float(gradient.type, [&](auto format) -> Status {
    using Format = decltype(format);
    if (gradient.vector) return body(format, std::integral_constant<int, Format::kVector>{});
    return body(format, std::integral_constant<int, 1>{});
  });
}

// Makes the sums of long rows.
Status sum_long_rows(cudaStream_t stream, const Groups& groups, const Gradient& gradient, float* partials);
// The gradient that goes with `workspace`; `out` is where sums go if they are written with 16-byte accesses, or null.
Gradient make_gradient(const Workspace& workspace, Floats dy, int64_t dim, const float* out);

}  // namespace dualbin::kernels
