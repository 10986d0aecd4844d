// Grouping of ids by CUB, for what one kernel cannot hold (group_ids.cu): 64-bit rows, or more ids than fit on the chip at a time. The only
// file that instantiates CUB.
#include <thrust/iterator/counting_iterator.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_select.cuh>

#include "kernels/cuda_check.h"
#include "kernels/long_rows.cuh"
#include "kernels/tuning.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::Groups;

// A sorted position where a row starts.
template <typename Index>
struct IsHead {
  const Index* keys;
  __device__ __forceinline__ bool operator()(Index i) const { return i == 0 || keys[i] != keys[i - 1]; }
};

// Types and CUB calls for one width of rows and positions. Without temporary storage a call only writes its size to `bytes`.
template <typename Index, typename Count>
struct Grouper {
  using Buffers = cub::DoubleBuffer<Index>;

  static cudaError_t sort(void* temporary, size_t& bytes, Buffers& keys, Buffers& order, int64_t count, int64_t rows, cudaStream_t stream) {
    return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, order, static_cast<Count>(count), 0, key_bits(rows), stream);
  }

  static cudaError_t select(void* temporary, size_t& bytes, const Index* keys, Index* starts, int64_t* heads, int64_t count,
                            cudaStream_t stream) {
    return cub::DeviceSelect::If(temporary, bytes, thrust::counting_iterator<Index>(0), starts, heads, static_cast<Count>(count),
                                 IsHead<Index>{keys}, stream);
  }

  static Status temporary_bytes(int64_t count, int64_t rows, size_t* out) {
    size_t sort_bytes = 0;
    size_t select_bytes = 0;
    Buffers keys(nullptr, nullptr);
    Buffers order(nullptr, nullptr);
    DUALBIN_CUDA_TRY(sort(nullptr, sort_bytes, keys, order, count, rows, nullptr));
    DUALBIN_CUDA_TRY(select(nullptr, select_bytes, nullptr, nullptr, nullptr, count, nullptr));
    *out = std::max(sort_bytes, select_bytes);
    return {};
  }

  static Status group(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Groups* out);
};

template <typename Index>
__global__ void __launch_bounds__(Policy::kThreads) write_keys(Ids ids, int64_t rows, Index* keys, Index* order) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * Policy::kThreads;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * Policy::kThreads + threadIdx.x; n < ids.count; n += stride) {
    const int64_t id = load_id(ids, n);
    keys[n] = static_cast<Index>(id >= 0 && id < rows ? id : rows);
    order[n] = static_cast<Index>(n);
  }
}

// Drops the last segment if it holds the ids to drop, and otherwise closes the last one; lists long rows.
template <typename Index>
__global__ void __launch_bounds__(Policy::kThreads)
    finish_groups(const Index* keys, int64_t count, int64_t rows, Index* starts, GroupCounters* counters, LongRows lists) {
  const int64_t heads = counters->heads;
  const bool drops = keys[count - 1] == static_cast<Index>(rows);
  const int64_t segments = drops ? heads - 1 : heads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * Policy::kThreads + threadIdx.x;
  if (thread == 0) {
    counters->segments = segments;
    if (!drops) starts[heads] = static_cast<Index>(count);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * Policy::kThreads;
  const int lane = threadIdx.x % 32;
  for (int64_t base = thread - lane; base < segments; base += stride) {  // whole warps go round together
    const int64_t s = base + lane;
    const int64_t begin = s < segments ? static_cast<int64_t>(starts[s]) : 0;
    const int64_t end = s < segments ? (s + 1 < heads ? static_cast<int64_t>(starts[s + 1]) : count) : 0;
    list_long_rows(counters, lists, begin, end);
  }
}

template <typename Index, typename Count>
Status Grouper<Index, Count>::group(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Groups* out) {
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const unsigned grid = grid_size(ids.count, Policy::kThreads, Policy::kBlocksPerSm * processors);
  DUALBIN_CUDA_TRY(cudaMemsetAsync(workspace.counters, 0, sizeof(GroupCounters), stream));

  Buffers keys(static_cast<Index*>(workspace.keys[0]), static_cast<Index*>(workspace.keys[1]));
  Buffers order(static_cast<Index*>(workspace.order[0]), static_cast<Index*>(workspace.order[1]));
  write_keys<Index><<<grid, Policy::kThreads, 0, stream>>>(ids, rows, keys.Current(), order.Current());
  DUALBIN_CUDA_LAUNCHED("write_keys");

  size_t bytes = workspace.temporary_bytes;
  DUALBIN_CUDA_TRY(sort(workspace.temporary, bytes, keys, order, ids.count, rows, stream));
  auto* starts = static_cast<Index*>(workspace.starts);
  bytes = workspace.temporary_bytes;
  DUALBIN_CUDA_TRY(select(workspace.temporary, bytes, keys.Current(), starts, &workspace.counters->heads, ids.count, stream));
  finish_groups<Index>
      <<<grid, Policy::kThreads, 0, stream>>>(keys.Current(), ids.count, rows, starts, workspace.counters, workspace.long_rows);
  DUALBIN_CUDA_LAUNCHED("finish_groups");

  out->keys = keys.Current();
  out->order = order.Current();
  out->starts = starts;
  return {};
}

using NarrowGrouper = Grouper<uint32_t, int32_t>;
using WideGrouper = Grouper<uint64_t, int64_t>;

}  // namespace

Status sort_bytes(int64_t count, int64_t rows, size_t* out) {
  return is_wide(count, rows) ? WideGrouper::temporary_bytes(count, rows, out) : NarrowGrouper::temporary_bytes(count, rows, out);
}

Status sort_groups(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Stats* stats, Groups* out) {
  if (stats != nullptr) DUALBIN_CUDA_TRY(cudaMemsetAsync(stats, 0, sizeof(Stats), stream));
  return out->wide ? WideGrouper::group(stream, workspace, ids, rows, out) : NarrowGrouper::group(stream, workspace, ids, rows, out);
}

}  // namespace dualbin::kernels
