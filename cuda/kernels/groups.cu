// Grouping of ids by row: a stable radix sort of (row, position), the starts of the rows, and the list of blocks of rows that occur often.
// The only file that instantiates CUB.
#include <thrust/iterator/counting_iterator.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_select.cuh>

#include "core/checks.h"
#include "kernels/cuda_check.h"
#include "kernels/groups.h"
#include "kernels/memory.cuh"
#include "kernels/tuning.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::Groups;

enum Counter { kHeads = 0, kSegments = 1, kHot = 2, kCounters = 3 };

// Rows up to `rows` itself, the key of ids to drop, and positions below `count` fit into 32 bits.
bool is_wide(int64_t count, int64_t rows) { return rows >= int64_t{UINT32_MAX} || count > int64_t{INT32_MAX}; }

int key_bits(int64_t rows) {
  int bits = 0;
  while (bits < 63 && (rows >> bits) != 0) ++bits;
  return bits;
}

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

// Drops the last segment if it holds the ids to drop, and otherwise closes the last one; lists the blocks of rows that need partial sums.
// The list has no fixed order; what a block sums and where it puts it does not depend on that.
template <typename Index>
__global__ void __launch_bounds__(Policy::kThreads)
    finish_groups(const Index* keys, int64_t count, int64_t rows, Index* starts, int64_t* counters, HotBlock* hot) {
  const int64_t heads = counters[kHeads];
  const bool drops = keys[count - 1] == static_cast<Index>(rows);
  const int64_t segments = drops ? heads - 1 : heads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * Policy::kThreads + threadIdx.x;
  if (thread == 0) {
    counters[kSegments] = segments;
    if (!drops) starts[heads] = static_cast<Index>(count);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * Policy::kThreads;
  const int lane = threadIdx.x % 32;
  // Whole warps go round together: a warp writes the list entries of each of its 32 rows in turn.
  for (int64_t base = thread - lane; base < segments; base += stride) {
    const int64_t s = base + lane;
    const int64_t begin = s < segments ? static_cast<int64_t>(starts[s]) : 0;
    const int64_t end = s < segments ? (s + 1 < heads ? static_cast<int64_t>(starts[s + 1]) : count) : 0;
    for (unsigned todo = __ballot_sync(kAllLanes, end - begin > kSumBlock); todo != 0; todo &= todo - 1) {
      const int owner = __ffs(static_cast<int>(todo)) - 1;
      const int64_t from = __shfl_sync(kAllLanes, begin, owner);
      const int64_t to = __shfl_sync(kAllLanes, end, owner);
      const int64_t blocks = (to - from + kSumBlock - 1) / kSumBlock;
      unsigned long long first = 0;
      if (lane == 0) first = atomicAdd(reinterpret_cast<unsigned long long*>(&counters[kHot]), static_cast<unsigned long long>(blocks));
      first = __shfl_sync(kAllLanes, first, 0);
      for (int64_t b = lane; b < blocks; b += 32) {
        const int64_t at = from + b * kSumBlock;
        hot[static_cast<int64_t>(first) + b] = {at, at + kSumBlock < to ? at + kSumBlock : to, first_slot(from) + b};
      }
    }
  }
}

template <typename Index, typename Count>
Status Grouper<Index, Count>::group(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Groups* out) {
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const unsigned grid = grid_size(ids.count, Policy::kThreads, Policy::kBlocksPerSm * processors);
  DUALBIN_CUDA_TRY(cudaMemsetAsync(workspace.counters, 0, kCounters * sizeof(int64_t), stream));

  Buffers keys(static_cast<Index*>(workspace.keys[0]), static_cast<Index*>(workspace.keys[1]));
  Buffers order(static_cast<Index*>(workspace.order[0]), static_cast<Index*>(workspace.order[1]));
  write_keys<Index><<<grid, Policy::kThreads, 0, stream>>>(ids, rows, keys.Current(), order.Current());
  DUALBIN_CUDA_LAUNCHED("write_keys");

  size_t bytes = workspace.temporary_bytes;
  DUALBIN_CUDA_TRY(sort(workspace.temporary, bytes, keys, order, ids.count, rows, stream));
  auto* starts = static_cast<Index*>(workspace.starts);
  bytes = workspace.temporary_bytes;
  DUALBIN_CUDA_TRY(select(workspace.temporary, bytes, keys.Current(), starts, &workspace.counters[kHeads], ids.count, stream));
  finish_groups<Index><<<grid, Policy::kThreads, 0, stream>>>(keys.Current(), ids.count, rows, starts, workspace.counters, workspace.hot);
  DUALBIN_CUDA_LAUNCHED("finish_groups");

  out->keys = keys.Current();
  out->order = order.Current();
  out->starts = starts;
  return {};
}

using NarrowGrouper = Grouper<uint32_t, int32_t>;
using WideGrouper = Grouper<uint64_t, int64_t>;

// Cuts a block of memory into aligned buffers, or, with a null base, only adds up their sizes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  void* take(size_t bytes) {
    void* buffer = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return buffer;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Blocks of an update that each need a row buffer; 0 where a row fits into shared memory.
Status row_buffer_count(int64_t count, int64_t dim, int64_t* out) {
  *out = 0;
  if (dim <= Tuning::Update::kSharedRowLimit) return {};
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const int64_t fit = Tuning::Update::kRowBufferBytes / (dim * static_cast<int64_t>(sizeof(float)));
  *out = std::max<int64_t>(1, std::min({count, fit, Tuning::Update::kRowBuffersPerSm * processors}));
  return {};
}

}  // namespace

Status make_workspace(Op op, void* base, int64_t count, int64_t rows, int64_t dim, Workspace* out) {
  *out = {};
  if (count <= 0) return {};
  const bool wide = is_wide(count, rows);
  DUALBIN_TRY(wide ? WideGrouper::temporary_bytes(count, rows, &out->temporary_bytes)
                   : NarrowGrouper::temporary_bytes(count, rows, &out->temporary_bytes));
  const size_t n = static_cast<size_t>(count);
  const size_t index = wide ? sizeof(uint64_t) : sizeof(uint32_t);
  const size_t row_bytes = static_cast<size_t>(dim) * sizeof(float);
  const size_t slots = static_cast<size_t>(slot_limit(count));
  Carver carver(base);
  for (void*& buffer : out->keys) buffer = carver.take(n * index);
  for (void*& buffer : out->order) buffer = carver.take(n * index);
  out->starts = carver.take((n + 1) * index);
  out->counters = static_cast<int64_t*>(carver.take(kCounters * sizeof(int64_t)));
  out->hot = static_cast<HotBlock*>(carver.take(slots * sizeof(HotBlock)));
  out->temporary = carver.take(out->temporary_bytes);
  out->partials = static_cast<float*>(carver.take(slots * row_bytes));
  if (op == Op::kUpdate) DUALBIN_TRY(row_buffer_count(count, dim, &out->row_buffer_count));
  out->row_buffers = static_cast<float*>(carver.take(static_cast<size_t>(out->row_buffer_count) * row_bytes));
  out->bytes = carver.used();
  return {};
}

Status open_workspace(Op op, const Launch& launch, int64_t count, int64_t rows, int64_t dim, Workspace* out) {
  DUALBIN_TRY(make_workspace(op, launch.workspace, count, rows, dim, out));
  DUALBIN_TRY(check_workspace(launch, out->bytes));
  DUALBIN_REQUIRE(aligned(launch.workspace, kWorkspaceAlignment), Code::kInvalidArgument, "the workspace must be aligned to %zu bytes",
                  kWorkspaceAlignment);
  return {};
}

Status make_groups(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Groups* out) {
  *out = {};
  if (ids.count == 0) return {};
  out->ids = ids.count;
  out->wide = is_wide(ids.count, rows);
  out->segments = &workspace.counters[kSegments];
  out->hot = workspace.hot;
  out->hot_count = &workspace.counters[kHot];
  out->hot_limit = slot_limit(ids.count);
  return out->wide ? WideGrouper::group(stream, workspace, ids, rows, out) : NarrowGrouper::group(stream, workspace, ids, rows, out);
}

}  // namespace dualbin::kernels
