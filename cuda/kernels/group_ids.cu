// Grouping of ids by row in one kernel: a stable radix sort of (row, position) by the least significant digit, in as many blocks as fit on
// the chip at once, then the starts of the rows and the lists of long rows.
//
// A block keeps a tile of ids in registers. In a pass it ranks them among its own by a histogram for each warp, publishes how many of each
// digit it has, waits for all blocks, adds up what lies before its own, and moves the ids to their places. Waiting for a grid takes
// one to two microseconds, for a cluster a third of one, a kernel of its own for each step several: that, and not the bytes, is what
// grouping costs.
#include <algorithm>

#include "kernels/cuda_check.h"
#include "kernels/group_tile.cuh"
#include "kernels/long_rows.cuh"
#include "kernels/overlap.cuh"
#include "kernels/tuning.h"

namespace dualbin::kernels {

namespace {

// The end of the row that begins at sorted position `begin`: steps that double, then halve.
__device__ __forceinline__ uint32_t end_of_row(const uint2* pairs, uint32_t count, uint32_t begin) {
  const uint32_t key = load_row(pairs, begin);
  uint32_t low = begin + kLongRow - 1;  // the row reaches here
  uint32_t step = kLongRow;
  while (low + step < count && load_row(pairs, low + step) == key) {
    low += step;
    step *= 2;
  }
  uint32_t high = min(low + step, count);
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (load_row(pairs, middle) == key) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return high;
}

// The starts of the rows, in order, and the lists of long rows.
template <int kItems>
__device__ __forceinline__ void list_rows(const GroupArgs& args, const uint2* pairs, GroupShared& shared) {
  const auto count = static_cast<uint32_t>(args.ids.count);
  const auto rows = static_cast<uint32_t>(args.rows);
  unsigned heads[kItems];
  uint32_t of_warp = 0;
  uint32_t end = UINT32_MAX;  // of all rows, in the thread that has their last occurrence
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t at = GroupTile<kItems>::position(i);
    const uint32_t key = at < count ? load_row(pairs, at) : rows;
    const uint32_t previous = at < count && at > 0 ? load_row(pairs, at - 1) : rows;
    heads[i] = __ballot_sync(kAllLanes, key != rows && (at == 0 || previous != key));
    of_warp += __popc(heads[i]);
    if (at < count && key == rows && (at == 0 || previous != rows)) end = at;
    if (at == count - 1 && key != rows) end = count;
  }
  uint32_t segments;
  const bool first_lane = threadIdx.x % 32 == 0;
  uint32_t start = scan_block(first_lane ? of_warp : 0, shared.warps, &segments);
  start = __shfl_sync(kAllLanes, start, 0);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) args.tiles[blockIdx.x] = segments;
    sync_blocks(args);
    const uint32_t of_block = threadIdx.x < gridDim.x ? __ldcg(args.tiles + threadIdx.x) : 0;  // there are no more blocks than threads
    const uint32_t before = scan_block(of_block, shared.warps, &segments);
    if (threadIdx.x == blockIdx.x) shared.places[0] = before;
    __syncthreads();
    start += shared.places[0];
  }
  if (end != UINT32_MAX) {
    args.starts[segments] = end;
    args.counters->segments = segments;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t at = GroupTile<kItems>::position(i);
    const unsigned lane_bit = 1u << (threadIdx.x % 32);
    uint32_t row_end = at;
    if ((heads[i] & lane_bit) != 0) {
      args.starts[start + __popc(heads[i] & (lane_bit - 1))] = at;
      const bool is_long = at + kLongRow <= count && load_row(pairs, at + kLongRow - 1) == load_row(pairs, at);
      if (is_long) row_end = end_of_row(pairs, count, at);
    }
    start += __popc(heads[i]);
    list_long_rows(args.counters, args.long_rows, at, row_end);
  }
}

template <int kItems>
__global__ void __launch_bounds__(GroupPolicy::kThreads) group_ids_kernel(const __grid_constant__ GroupArgs args) {
  __shared__ GroupShared shared;
  let_next_start();  // all blocks are at work
  const auto count = static_cast<uint32_t>(args.ids.count);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *args.counters = {};
    if (args.stats != nullptr) *args.stats = {};
  }
  GroupTile<kItems> tile;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t at = tile.position(i);
    const int64_t id = at < count ? load_id(args.ids, at) : args.rows;
    tile.key[i] = static_cast<uint32_t>(id >= 0 && id < args.rows ? id : args.rows);
    tile.order[i] = at;
  }
  for (int pass = 0; pass < args.plan.passes; ++pass) {
    const int to = pass % 2;
    sort_pass(args, tile, pass, to, shared);
    if (pass + 1 == args.plan.passes) break;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t at = tile.position(i);
      if (at >= count) continue;
      const uint2 pair = __ldcg(args.pairs[to] + at);
      tile.key[i] = pair.x;
      tile.order[i] = pair.y;
    }
  }
  list_rows<kItems>(args, args.pairs[(args.plan.passes - 1) % 2], shared);
}

using Kernel = void (*)(GroupArgs);

Kernel kernel_for(int items) {
  switch (items) {
    case 1:
      return group_ids_kernel<1>;
    case 2:
      return group_ids_kernel<2>;
    case 4:
      return group_ids_kernel<4>;
    case 8:
      return group_ids_kernel<8>;
    default:
      return group_ids_kernel<16>;
  }
}

// Whether this device runs the kernels in clusters of kCluster blocks, which is more than every device with clusters promises.
bool clusters_fit() {
  static DeviceFact fact;
  return fact.get([](int) {
    for (int items = 1; items <= GroupPolicy::kClusterItems; items *= 2) {
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {GroupPolicy::kCluster, 1, 1};
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(GroupPolicy::kCluster);
      config.blockDim = dim3(GroupPolicy::kThreads);
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      const Kernel kernel = kernel_for(items);
      const bool fits = is_hopper_code(kernel) &&
                        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
                        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0;
      if (!fits) return false;
    }
    return true;
  });
}

}  // namespace

Status plan_groups(int64_t count, int64_t rows, GroupPlan* out) {
  *out = {};
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const int64_t most_blocks = std::min<int64_t>(processors, GroupPolicy::kMostBlocks);
  if (is_wide(count, rows) || count > most_blocks * GroupPolicy::kThreads * GroupPolicy::kMostItems) return {};
  GroupPlan plan;
  const auto blocks_of = [&](int items) {
    return (count + int64_t{items} * GroupPolicy::kThreads - 1) / (int64_t{items} * GroupPolicy::kThreads);
  };
  const auto fewest_items = [&](int from, int most, auto&& limit) {
    int items = from;
    while (items < most && blocks_of(items) > limit(items)) items *= 2;
    return items;
  };
  if (count <= GroupPolicy::kOneBlock) {
    plan.items = fewest_items(1, GroupPolicy::kOneBlock / GroupPolicy::kThreads, [](int) { return int64_t{1}; });
  } else if (count <= GroupPolicy::kCluster * GroupPolicy::kThreads * GroupPolicy::kClusterItems && clusters_fit()) {
    plan.cluster = true;
    plan.items = fewest_items(1, GroupPolicy::kClusterItems, [](int) { return int64_t{GroupPolicy::kCluster}; });
  } else {
    plan.items = fewest_items(1, GroupPolicy::kMostItems, [&](int items) { return std::min(most_blocks, GroupPolicy::blocks(items)); });
  }
  plan.blocks = static_cast<int>(blocks_of(plan.items));
  const int most_bits = plan.blocks <= GroupPolicy::kFewBlocks ? GroupPolicy::kMostBits : GroupPolicy::kMostBits - 1;
  const int bits = std::max(1, key_bits(rows));
  plan.passes = (bits + most_bits - 1) / most_bits;
  plan.bits = (bits + plan.passes - 1) / plan.passes;
  *out = plan;
  return {};
}

Status group_ids(cudaStream_t stream, const Workspace& workspace, const Ids& ids, int64_t rows, Stats* stats, Groups* out) {
  const GroupPlan& plan = workspace.plan;
  const auto buffer = [](void* data) { return static_cast<uint2*>(data); };
  GroupArgs args{ids,
                 rows,
                 plan,
                 {buffer(workspace.keys[0]), buffer(workspace.keys[1])},
                 static_cast<uint32_t*>(workspace.starts),
                 workspace.tiles,
                 workspace.counters,
                 workspace.long_rows,
                 stats};
  const uint2* sorted = args.pairs[(plan.passes - 1) % 2];
  out->stride = 2;
  out->keys = &sorted->x;
  out->order = &sorted->y;
  out->starts = workspace.starts;
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(GroupPolicy::kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.blocks > 1 ? 1 : 0;
  if (plan.cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  DUALBIN_CUDA_TRY(cudaLaunchKernelEx(&config, kernel_for(plan.items), args));
  return {};
}

}  // namespace dualbin::kernels
