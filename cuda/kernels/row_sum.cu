// Sums of a gradient by row: those of long rows, reduce_rows and segment_sum.
#include "kernels/row_sum.cuh"

#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/overlap.cuh"
#include "kernels/tuning.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::RowSum;

// One block a multiprocessor is enough: with 80 registers in place of 92 a hot row takes 12 % longer.
template <typename Format, int kCount>
__global__ void __launch_bounds__(Policy::kThreads, 1) sum_blocks(const Groups groups, const Gradient gradient, float* partials) {
  wait_for_previous();
  let_next_start();
  const int64_t items = groups.counters->long_blocks;
  for (Tiles<kCount> tiles(gradient.dim); tiles.unit < items * tiles.per_item; tiles.unit += tiles.stride) {
    const int64_t item = tiles.item();
    const int64_t column = tiles.column(item);
    if (column >= gradient.dim) continue;
    const LongBlock block = groups.long_rows.blocks[item];
    float sum[kCount];
    sum_occurrences<Format>(groups, gradient, block.begin, block.end, column, sum);
    store_floats(partials + block.slot * gradient.dim + column, sum);
  }
}

// Adds the blocks of a long row, in order, into its first partial row: a block of threads for a few columns. All threads bring partial rows
// to shared memory, kChunk at a time, and load the next ones while the first few add: these alone would wait for memory at every step.
__global__ void __launch_bounds__(Policy::kThreads) add_blocks(const Groups groups, int64_t dim, float* partials) {
  constexpr int kColumns = Policy::kAddColumns;
  constexpr int kEach = Policy::kAddEach;
  constexpr int kRows = Policy::kThreads / kColumns;  // that all threads load at a time
  constexpr int kChunk = kRows * kEach;
  __shared__ float shared[2][kChunk][kColumns];
  const int own = threadIdx.x / kColumns;
  const int lane = threadIdx.x % kColumns;
  const int64_t tiles = (dim + kColumns - 1) / kColumns;
  wait_for_previous();
  let_next_start();
  const int64_t items = groups.counters->long_rows * tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const LongRow row = groups.long_rows.rows[item / tiles];
    const int64_t column = item % tiles * kColumns + lane;
    const int64_t blocks = (row.end - row.begin + kSumBlock - 1) / kSumBlock;
    float* first = partials + first_slot(row.begin) * dim + column;
    const auto load = [&](int64_t from, float (&values)[kEach]) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const int64_t b = from + k * kRows + own;
        values[k] = b < blocks && column < dim ? first[b * dim] : 0.0f;
      }
    };
    float values[kEach];
    float sum = 0.0f;
    load(0, values);
    int side = 0;
    for (int64_t from = 0; from < blocks; from += kChunk, side ^= 1) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) shared[side][k * kRows + own][lane] = values[k];
      __syncthreads();  // the other side is free: the first threads were here after they had added it
      load(from + kChunk, values);
      if (own != 0) continue;
      const int here = static_cast<int>(blocks - from < kChunk ? blocks - from : kChunk);
#pragma unroll 16
      for (int b = 0; b < here; ++b) sum += shared[side][b][lane];
    }
    if (own == 0 && column < dim) *first = sum;
    __syncthreads();
  }
}

// Row sums to out[s], with zeros from the last row up to `capacity`, or, `by_row`, to out[row(s)].
template <typename Format, int kCount>
__global__ void __launch_bounds__(Policy::kThreads)
    sum_rows(const Groups groups, const Gradient gradient, bool by_row, int64_t capacity, float* out) {
  const int64_t count = groups.count();
  const int64_t items = by_row ? count : capacity;
  for (Tiles<kCount> tiles(gradient.dim); tiles.unit < items * tiles.per_item; tiles.unit += tiles.stride) {
    const int64_t s = tiles.item();
    const int64_t column = tiles.column(s);
    if (column >= gradient.dim) continue;
    float sum[kCount] = {};
    if (s < count) sum_row<Format>(groups, gradient, groups.begin(s), groups.end(s), column, sum);
    store_floats(out + (by_row ? groups.row(s) : s) * gradient.dim + column, sum);
  }
}

__global__ void __launch_bounds__(Policy::kThreads) write_rows(const Groups groups, int64_t rows, const RowsOut out) {
  const int64_t count = groups.count();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * Policy::kThreads + threadIdx.x;
  if (thread == 0) store_int(out.count, out.count_type, 0, count);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * Policy::kThreads;
  for (int64_t s = thread; s < out.capacity; s += stride) store_int(out.ids, out.ids_type, s, s < count ? groups.row(s) : rows);
}

Status launch_sum_rows(cudaStream_t stream, const Groups& groups, const Gradient& gradient, bool by_row, int64_t capacity, float* out) {
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  return with_columns(gradient, [&](auto format, auto columns) -> Status {
    const unsigned grid = grid_size(tile_count(capacity, gradient.dim, columns.value), Policy::kWarps, Policy::kBlocksPerSm * processors);
    sum_rows<decltype(format), columns.value><<<grid, Policy::kThreads, 0, stream>>>(groups, gradient, by_row, capacity, out);
    DUALBIN_CUDA_LAUNCHED("sum_rows");
    return {};
  });
}

}  // namespace

Gradient make_gradient(const Workspace& workspace, Floats dy, int64_t dim, const float* out) {
  const int64_t per_vector = dy.type == FloatType::kF32 ? 4 : 8;
  return {dy.data, dy.type, dim % per_vector == 0 && aligned(dy.data, 16) && aligned(out, 16), dim, workspace.partials};
}

Status sum_long_rows(cudaStream_t stream, const Groups& groups, const Gradient& gradient, float* partials) {
  if (groups.long_limit == 0) return {};
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  DUALBIN_TRY(with_columns(gradient, [&](auto format, auto columns) -> Status {
    const int64_t most = Policy::kBlocksPerSm * processors;
    unsigned grid = grid_size(tile_count(groups.long_limit, gradient.dim, columns.value), Policy::kWarps, most);
    if (grid >= Policy::kWholeGridFrom * most) grid = static_cast<unsigned>(most);
    DUALBIN_CUDA_TRY(
        launch_after(sum_blocks<decltype(format), columns.value>, grid, Policy::kThreads, 0, stream, groups, gradient, partials));
    return {};
  }));
  const int64_t rows = many_blocks_limit(groups.ids);
  if (rows == 0) return {};
  const unsigned grid =
      grid_size(rows * ((gradient.dim + Policy::kAddColumns - 1) / Policy::kAddColumns), 1, Policy::kAddBlocksPerSm * processors);
  DUALBIN_CUDA_TRY(launch_after(add_blocks, grid, Policy::kThreads, 0, stream, groups, gradient.dim, partials));
  return {};
}

size_t CudaBackend::workspace_bytes(Op op, const Executor*, int64_t count, int64_t rows, int64_t dim) const {
  Workspace workspace;
  const Status status = make_workspace(op, nullptr, count, rows, dim, &workspace);
  return status.ok() ? workspace.bytes : 0;
}

Status CudaBackend::reduce_rows(const Launch& launch, const ReduceRowsCall& call) const {
  DUALBIN_TRY(call.check());
  const int64_t rows = call.rows;
  const RowsOut& out = call.out;
  Workspace workspace;
  DUALBIN_TRY(open_workspace(Op::kReduceRows, launch, call.ids.count, rows, call.dim, &workspace));
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  Groups groups;
  DUALBIN_TRY(make_groups(stream, workspace, call.ids, rows, nullptr, &groups));
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  write_rows<<<grid_size(out.capacity, Policy::kThreads, Policy::kBlocksPerSm * processors), Policy::kThreads, 0, stream>>>(groups, rows,
                                                                                                                            out);
  DUALBIN_CUDA_LAUNCHED("write_rows");
  if (out.capacity == 0) return {};
  const Gradient gradient = make_gradient(workspace, call.dy, call.dim, out.rows);
  DUALBIN_TRY(sum_long_rows(stream, groups, gradient, workspace.partials));
  return launch_sum_rows(stream, groups, gradient, false, out.capacity, out.rows);
}

Status CudaBackend::segment_sum(const Launch& launch, const SegmentSumCall& call) const {
  DUALBIN_TRY(call.check());
  const Ids& slots = call.slots;
  const int64_t segments = call.segments;
  const int64_t dim = call.dim;
  float* out = call.out;
  if (segments == 0) return {};
  Workspace workspace;
  DUALBIN_TRY(open_workspace(Op::kSegmentSum, launch, slots.count, segments, dim, &workspace));
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  DUALBIN_CUDA_TRY(cudaMemsetAsync(out, 0, static_cast<size_t>(segments) * static_cast<size_t>(dim) * sizeof(float), stream));
  if (slots.count == 0) return {};
  Groups groups;
  DUALBIN_TRY(make_groups(stream, workspace, slots, segments, nullptr, &groups));
  const Gradient gradient = make_gradient(workspace, call.dy, dim, out);
  DUALBIN_TRY(sum_long_rows(stream, groups, gradient, workspace.partials));
  return launch_sum_rows(stream, groups, gradient, true, std::min(slots.count, segments), out);
}

}  // namespace dualbin::kernels
