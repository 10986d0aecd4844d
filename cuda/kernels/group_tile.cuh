// The blocks of group_ids.cu: a tile of ids for each, ranked, placed among the tiles of all blocks, and moved.
#pragma once

#include <cooperative_groups.h>

#include "kernels/groups.h"
#include "kernels/memory.cuh"
#include "kernels/tuning.h"

namespace dualbin::kernels {

using GroupPolicy = Tuning::GroupIds;

constexpr int kGroupWarps = GroupPolicy::kThreads / 32;
constexpr int kMostDigits = 1 << GroupPolicy::kMostBits;
static_assert(kMostDigits <= 2 * GroupPolicy::kThreads, "a thread adds up two digits");
static_assert(GroupPolicy::kMostBlocks <= 4 * 32, "a warp reads the counts of a digit by one load a lane");

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

struct GroupShared {
  // Of each warp: how many ids have the digit; then where those of the warp start among those of the block. Two digits a word.
  uint32_t digits[kGroupWarps][kMostDigits / 2];
  uint32_t places[kMostDigits];  // where the block's ids of a digit start among all
  uint32_t totals[kMostDigits];  // ids of a digit
  uint32_t warps[kGroupWarps];
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
  for (int w = 0; w < kGroupWarps; ++w) {
    if (w == static_cast<int>(threadIdx.x / 32)) before = all;
    all += warps[w];
  }
  *total = all;
  return before + sum - value;
}

// A tile of ids, kItems a thread: in the order of positions a warp has 32 * kItems of them, a lane every 32nd of these.
template <int kItems>
struct GroupTile {
  uint32_t key[kItems];
  uint32_t order[kItems];
  uint32_t rank[kItems];  // among the ids of the same digit of the same warp

  static __device__ __forceinline__ uint32_t position(int item) {
    return (blockIdx.x * kGroupWarps + threadIdx.x / 32) * 32 * kItems + item * 32 + threadIdx.x % 32;
  }
};

// The digit of an item as an index of 16-bit halves of GroupShared::digits.
__device__ __forceinline__ uint16_t* digit_of(GroupShared& shared, uint32_t digit) {
  return reinterpret_cast<uint16_t*>(shared.digits[threadIdx.x / 32]) + digit;
}

// The lanes of `all` with the same digit. A vote for every bit: MATCH takes several times as long where digits differ.
__device__ __forceinline__ unsigned peers_of(uint32_t digit, int bits, unsigned all) {
  unsigned peers = all;
#pragma unroll
  for (int b = 0; b < GroupPolicy::kMostBits; ++b) {
    if (b >= bits) break;
    const unsigned set = __ballot_sync(all, digit >> b & 1);
    peers &= (digit >> b & 1) != 0 ? set : ~set;
  }
  return peers;
}

// Ranks the items of every warp and leaves in `shared` how many of each digit the warps have.
template <int kItems>
__device__ __forceinline__ void rank_tile(GroupTile<kItems>& tile, uint32_t count, int shift, int bits, GroupShared& shared) {
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
__device__ __forceinline__ void sum_tiles(const GroupArgs& args, GroupShared& shared) {
  constexpr int kAhead = GroupPolicy::kDigitsAhead;
  const int stride = args.plan.stride();
  int lanes = 1;
  while (4 * lanes < stride) lanes *= 2;
  const int column = 4 * (static_cast<int>(threadIdx.x) & (lanes - 1));
  uint32_t earlier[4];  // all ones where a block is before this one
#pragma unroll
  for (int i = 0; i < 4; ++i) earlier[i] = column + i < static_cast<int>(blockIdx.x) ? ~0u : 0u;
  const int bins = 1 << args.plan.bits;
  const int step = GroupPolicy::kThreads / lanes;
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

// Where the ids of the block go: the digits before, then the same digit in blocks before. Two digits a thread. kStaged: `places` are those
// within the block, and `totals` what the place among all has more.
template <bool kStaged>
__device__ __forceinline__ void place_digits(const GroupArgs& args, GroupShared& shared) {
  const uint32_t first = 2 * threadIdx.x;
  const bool used = first < 1u << args.plan.bits;
  uint32_t own = 0;  // of the block, two halves: a tile has less than 2^16 ids
  __syncthreads();
  if (used) {
#pragma unroll
    for (int w = 0; w < kGroupWarps; ++w) {
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
  const uint32_t places[2] = {start + before[0], start + total[0] + before[1]};
  if constexpr (kStaged) {
    const uint32_t in_block = scan_block(used ? (own & 0xffffu) + (own >> 16) : 0, shared.warps, &all);
    if (used) {
      shared.places[first] = in_block;
      shared.places[first + 1] = in_block + (own & 0xffffu);
      shared.totals[first] = places[0] - in_block;
      shared.totals[first + 1] = places[1] - (in_block + (own & 0xffffu));
    }
  } else if (used) {
    shared.places[first] = places[0];
    shared.places[first + 1] = places[1];
  }
  __syncthreads();
}

// Moves the tile by way of shared memory, where it is put in order, as much at a time as there is room: what lies side by side there goes
// to few sectors of memory. The counts of the digits are not needed any more and leave their space. tile.rank is the place in the block.
template <int kItems>
__device__ __forceinline__ void move_staged(const GroupArgs& args, const GroupTile<kItems>& tile, int shift, uint32_t mask, uint2* to,
                                            GroupShared& shared) {
  constexpr uint32_t kRoom = sizeof(shared.digits) / sizeof(uint2);
  constexpr uint32_t kTile = GroupPolicy::kThreads * kItems;
  auto* staged = reinterpret_cast<uint2*>(shared.digits);
  const uint32_t left = static_cast<uint32_t>(args.ids.count) - blockIdx.x * kTile;
  const uint32_t here = left < kTile ? left : kTile;
  for (uint32_t from = 0; from < here; from += kRoom) {
    __syncthreads();  // what lay here has been read
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t at = tile.rank[i] - from;
      if (tile.position(i) < args.ids.count && at < kRoom) staged[at] = make_uint2(tile.key[i], tile.order[i]);
    }
    __syncthreads();
    const uint32_t stop = here - from < kRoom ? here - from : kRoom;
#pragma unroll 4
    for (uint32_t at = threadIdx.x; at < stop; at += GroupPolicy::kThreads) {
      const uint2 pair = staged[at];
      to[shared.totals[pair.x >> shift & mask] + from + at] = pair;
    }
  }
}

// One pass: the tile by one digit, to pairs[to].
template <int kItems>
__device__ __forceinline__ void sort_pass(const GroupArgs& args, GroupTile<kItems>& tile, int pass, int to, GroupShared& shared) {
  const uint32_t mask = (1u << args.plan.bits) - 1;
  const int shift = pass * args.plan.bits;
  const auto count = static_cast<uint32_t>(args.ids.count);
  constexpr bool kStaged = kItems >= GroupPolicy::kStagedItems;
  rank_tile(tile, count, shift, args.plan.bits, shared);
  place_digits<kStaged>(args, shared);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (tile.position(i) >= count) continue;
    const uint32_t digit = tile.key[i] >> shift & mask;
    const uint32_t place = shared.places[digit] + *digit_of(shared, digit) + tile.rank[i];
    if constexpr (kStaged) {
      tile.rank[i] = place;
    } else {
      args.pairs[to][place] = make_uint2(tile.key[i], tile.order[i]);
    }
  }
  if constexpr (kStaged) move_staged(args, tile, shift, mask, args.pairs[to], shared);
  sync_blocks(args);
}

}  // namespace dualbin::kernels
