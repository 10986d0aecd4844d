// Grouping of ids by row in one kernel: a stable radix sort of (row, position) by the least significant digit, in as many blocks as fit on
// the chip at once, then the starts of the rows and the lists of long rows.
//
// A block keeps a tile of ids in registers. In a pass it ranks them among its own by a histogram for each warp, publishes how many of each
// digit it has, waits for all blocks, adds up what lies before its own, and moves the ids to their places. Waiting for a grid takes
// one to two microseconds, for a cluster a third of one, a kernel of its own for each step several: that, and not the bytes, is what
// grouping costs.
#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>

#include "kernels/cuda_check.h"
#include "kernels/long_rows.cuh"
#include "kernels/tuning.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::GroupIds;

constexpr int kWarps = Policy::kThreads / 32;
constexpr int kMostBins = 1 << Policy::kMostBits;
static_assert(kMostBins <= 2 * Policy::kThreads, "a thread adds up two digits");
static_assert(Policy::kMostBlocks <= 4 * 32, "a warp reads the counts of a digit by one load a lane");

struct GroupArgs {
  Ids ids;
  int64_t rows;
  GroupPlan plan;
  uint2* pairs[2];  // row and position
  uint32_t* starts;
  uint32_t* tiles;
  GroupCounters* counters;
  LongRows long_rows;
  Stats* stats;
};

struct Shared {
  // Of each warp: how many ids have the digit; then where those of the warp start among those of the block. Two digits a word.
  uint32_t digits[kWarps][kMostBins / 2];
  uint32_t places[kMostBins];  // where the block's ids of a digit start among all
  uint32_t totals[kMostBins];  // ids of a digit
  uint32_t warps[kWarps];
};

// Waits for all blocks, and makes what they have written visible.
__device__ __forceinline__ void sync_blocks(const GroupArgs& args) {
  if (gridDim.x == 1) {
    __syncthreads();
#if __CUDA_ARCH__ >= 900
  } else if (args.plan.cluster) {
    cooperative_groups::this_cluster().sync();
#endif
  } else {
    cooperative_groups::this_grid().sync();
  }
}

__device__ __forceinline__ uint32_t load_row(const uint2* pairs, uint32_t at) { return __ldcg(&pairs[at].x); }

// The sum of `value` over the threads before this one, and over all.
__device__ __forceinline__ uint32_t scan_block(uint32_t value, uint32_t* warps, uint32_t* total) {
  const int lane = threadIdx.x % 32;
  uint32_t sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();  // what `warps` held before has been read
  if (lane == 31) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  uint32_t before = 0;
  uint32_t all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == static_cast<int>(threadIdx.x / 32)) before = all;
    all += warps[w];
  }
  *total = all;
  return before + sum - value;
}

// A tile of ids, kItems a thread: in the order of positions a warp has 32 * kItems of them, a lane every 32nd of these.
template <int kItems>
struct Tile {
  uint32_t key[kItems];
  uint32_t order[kItems];
  uint32_t rank[kItems];  // among the ids of the same digit of the same warp

  static __device__ __forceinline__ uint32_t position(int item) {
    return (blockIdx.x * kWarps + threadIdx.x / 32) * 32 * kItems + item * 32 + threadIdx.x % 32;
  }
};

// The digit of an item as an index of 16-bit halves of Shared::digits.
__device__ __forceinline__ uint16_t* digit_of(Shared& shared, uint32_t digit) {
  return reinterpret_cast<uint16_t*>(shared.digits[threadIdx.x / 32]) + digit;
}

// The lanes of `all` with the same digit. A vote for every bit: MATCH takes several times as long where digits differ.
__device__ __forceinline__ unsigned peers_of(uint32_t digit, int bits, unsigned all) {
  unsigned peers = all;
#pragma unroll
  for (int b = 0; b < Policy::kMostBits; ++b) {
    if (b >= bits) break;
    const unsigned set = __ballot_sync(all, digit >> b & 1);
    peers &= (digit >> b & 1) != 0 ? set : ~set;
  }
  return peers;
}

// Ranks the items of every warp and leaves in `shared` how many of each digit the warps have.
template <int kItems>
__device__ __forceinline__ void rank_tile(Tile<kItems>& tile, uint32_t count, int shift, int bits, Shared& shared) {
  const uint32_t mask = (1u << bits) - 1;
  for (uint32_t word = threadIdx.x % 32; word <= mask / 2; word += 32) shared.digits[threadIdx.x / 32][word] = 0;
  __syncwarp();
  const unsigned before = (1u << (threadIdx.x % 32)) - 1;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool used = tile.position(i) < count;
    const unsigned all = __ballot_sync(kAllLanes, used);
    if (used) {
      const uint32_t digit = tile.key[i] >> shift & mask;
      const unsigned peers = peers_of(digit, bits, all);
      uint16_t* here = digit_of(shared, digit);
      tile.rank[i] = *here + __popc(peers & before);
      __syncwarp(all);
      if ((peers & before) == 0) *here = static_cast<uint16_t>(*here + __popc(peers));
    }
    __syncwarp();
  }
}

// Of each digit, how many ids all blocks have, and how many the blocks before this one, from what the blocks have published. As many lanes
// read the counts of a digit as need one load for them; kAhead digits are on their way at once.
__device__ __forceinline__ void sum_tiles(const GroupArgs& args, Shared& shared) {
  constexpr int kAhead = Policy::kDigitsAhead;
  const int stride = args.plan.stride();
  int lanes = 1;
  while (4 * lanes < stride) lanes *= 2;
  const int column = 4 * (static_cast<int>(threadIdx.x) & (lanes - 1));
  uint32_t earlier[4];  // all ones where a block is before this one
#pragma unroll
  for (int i = 0; i < 4; ++i) earlier[i] = column + i < static_cast<int>(blockIdx.x) ? ~0u : 0u;
  const int bins = 1 << args.plan.bits;
  const int step = Policy::kThreads / lanes;
  const int own = static_cast<int>(threadIdx.x) / lanes;
  for (int base = 0; base < bins; base += step * kAhead) {
    uint4 counts[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int digit = base + j * step + own;
      counts[j] = make_uint4(0, 0, 0, 0);
      if (digit < bins && column < stride) counts[j] = __ldcg(reinterpret_cast<const uint4*>(args.tiles + digit * stride + column));
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const uint4 n = counts[j];
      uint32_t total = n.x + n.y + n.z + n.w;
      uint32_t before = (n.x & earlier[0]) + (n.y & earlier[1]) + (n.z & earlier[2]) + (n.w & earlier[3]);
      if (lanes == 32) {
        before = __reduce_add_sync(kAllLanes, before);
        total = __reduce_add_sync(kAllLanes, total);
      } else {
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
          before += __shfl_xor_sync(kAllLanes, before, offset);
          total += __shfl_xor_sync(kAllLanes, total, offset);
        }
      }
      const int digit = base + j * step + own;
      if (column == 0 && digit < bins) {
        shared.places[digit] = before;
        shared.totals[digit] = total;
      }
    }
  }
}

// Where the ids of the block go: the digits before, then the same digit in blocks before. Two digits a thread.
__device__ __forceinline__ void place_digits(const GroupArgs& args, Shared& shared) {
  const uint32_t first = 2 * threadIdx.x;
  const bool used = first < 1u << args.plan.bits;
  uint32_t own = 0;  // of the block, two halves: a tile has less than 2^16 ids
  __syncthreads();
  if (used) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t of_warp = shared.digits[w][threadIdx.x];
      shared.digits[w][threadIdx.x] = own;
      own += of_warp;
    }
  }
  uint32_t total[2] = {own & 0xffffu, own >> 16};
  uint32_t before[2] = {0, 0};
  if (gridDim.x > 1) {
    const int stride = args.plan.stride();
    if (used) {
      args.tiles[first * stride + blockIdx.x] = total[0];
      args.tiles[(first + 1) * stride + blockIdx.x] = total[1];
      for (int b = gridDim.x; blockIdx.x == 0 && b < stride; ++b) {  // blocks that there are not
        args.tiles[first * stride + b] = 0;
        args.tiles[(first + 1) * stride + b] = 0;
      }
    }
    sync_blocks(args);
    sum_tiles(args, shared);
    __syncthreads();
    if (used) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        before[k] = shared.places[first + k];
        total[k] = shared.totals[first + k];
      }
    }
  }
  uint32_t all;
  const uint32_t start = scan_block(used ? total[0] + total[1] : 0, shared.warps, &all);
  if (used) {
    shared.places[first] = start + before[0];
    shared.places[first + 1] = start + total[0] + before[1];
  }
  __syncthreads();
}

// One pass: the tile by one digit, to pairs[to].
template <int kItems>
__device__ __forceinline__ void sort_pass(const GroupArgs& args, Tile<kItems>& tile, int pass, int to, Shared& shared) {
  const uint32_t mask = (1u << args.plan.bits) - 1;
  const int shift = pass * args.plan.bits;
  const auto count = static_cast<uint32_t>(args.ids.count);
  rank_tile(tile, count, shift, args.plan.bits, shared);
  place_digits(args, shared);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (tile.position(i) >= count) continue;
    const uint32_t digit = tile.key[i] >> shift & mask;
    const uint32_t place = shared.places[digit] + *digit_of(shared, digit) + tile.rank[i];
    args.pairs[to][place] = make_uint2(tile.key[i], tile.order[i]);
  }
  sync_blocks(args);
}

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
__device__ __forceinline__ void list_rows(const GroupArgs& args, const uint2* pairs, Shared& shared) {
  const auto count = static_cast<uint32_t>(args.ids.count);
  const auto rows = static_cast<uint32_t>(args.rows);
  unsigned heads[kItems];
  uint32_t of_warp = 0;
  uint32_t end = UINT32_MAX;  // of all rows, in the thread that has their last occurrence
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t at = Tile<kItems>::position(i);
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
    const uint32_t at = Tile<kItems>::position(i);
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
__global__ void __launch_bounds__(Policy::kThreads) group_ids_kernel(const __grid_constant__ GroupArgs args) {
  __shared__ Shared shared;
  const auto count = static_cast<uint32_t>(args.ids.count);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *args.counters = {};
    if (args.stats != nullptr) *args.stats = {};
  }
  Tile<kItems> tile;
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
  int device = 0;
  int major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major < 9) return false;
  static std::atomic<int8_t> known[Policy::kMostDevices] = {};  // 0: not asked yet; 1: no; 2: yes. A fact of the device, not a state
  std::atomic<int8_t>* cache = device < Policy::kMostDevices ? &known[device] : nullptr;
  if (cache != nullptr && cache->load() != 0) return cache->load() == 2;
  bool fit = true;
  for (int items = 1; items <= Policy::kClusterItems; items *= 2) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {Policy::kCluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(Policy::kCluster);
    config.blockDim = dim3(Policy::kThreads);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    fit = fit && cudaFuncSetAttribute(kernel_for(items), cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
          cudaOccupancyMaxActiveClusters(&clusters, kernel_for(items), &config) == cudaSuccess && clusters > 0;
  }
  if (!fit) static_cast<void>(cudaGetLastError());  // a refusal is an answer here, not an error of a later call
  if (cache != nullptr) cache->store(fit ? 2 : 1);
  return fit;
}

}  // namespace

Status plan_groups(int64_t count, int64_t rows, GroupPlan* out) {
  *out = {};
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const int64_t most_blocks = std::min<int64_t>(processors, Policy::kMostBlocks);
  if (is_wide(count, rows) || count > most_blocks * Policy::kThreads * Policy::kMostItems) return {};
  GroupPlan plan;
  const auto blocks_of = [&](int items) { return (count + int64_t{items} * Policy::kThreads - 1) / (int64_t{items} * Policy::kThreads); };
  const auto fewest_items = [&](int from, int most, auto&& limit) {
    int items = from;
    while (items < most && blocks_of(items) > limit(items)) items *= 2;
    return items;
  };
  if (count <= Policy::kOneBlock) {
    plan.items = Policy::kOneBlock / Policy::kThreads;
  } else if (count <= Policy::kCluster * Policy::kThreads * Policy::kClusterItems && clusters_fit()) {
    plan.cluster = true;
    plan.items = fewest_items(1, Policy::kClusterItems, [](int) { return int64_t{Policy::kCluster}; });
  } else {
    plan.items = fewest_items(1, Policy::kMostItems, [&](int items) { return std::min(most_blocks, Policy::blocks(items)); });
  }
  plan.blocks = static_cast<int>(blocks_of(plan.items));
  const int most_bits = plan.blocks <= Policy::kFewBlocks ? Policy::kMostBits : Policy::kMostBits - 1;
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
  config.blockDim = dim3(Policy::kThreads);
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
