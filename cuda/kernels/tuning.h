// Sizes of blocks and grids of every kernel, with the reason for each value. They change how fast a result comes, never its bits.
//
// Nothing here belongs to one device: grids, and the buffers that follow from them, are so much for each of the device's multiprocessors
// (multiprocessors() in cuda_check.h). "Resident" counts blocks of 256 threads on a multiprocessor of 2048 threads, as in sm_80, sm_90 and
// sm_100; those of 1536 threads (sm_86, sm_89, sm_120) hold fewer at once and take more waves.
#pragma once

#include <cstdint>

#include "dualbin/types.h"

namespace dualbin::kernels {

// Values that are good on every architecture from sm_80.
struct CommonTuning {
  // Grouping of ids by row: the kernels around CUB, which tunes its own.
  struct Groups {
    static constexpr int kThreads = 256;
    static constexpr int64_t kBlocksPerSm = 16;  // two waves of eight resident blocks
  };

  // Sums of a gradient by row.
  struct RowSum {
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;  // a warp works alone
    static constexpr int64_t kBlocksPerSm = 32;   // four waves of eight resident blocks: rows differ in length, and the next fill the gaps
  };

  // Updates: a warp or a block takes a row.
  struct Update {
    static constexpr int64_t kWarpRowLimit = 256;  // columns up to which a warp takes a row: eight a lane; beyond that a block does
    static constexpr int kWarpTeams = 8;           // rows a block of warp teams works on at a time
    static constexpr int kMostThreads = 256;       // of a block
    static constexpr int kMostTeamWarps = kMostThreads / 32;
    static constexpr int kBlocksAtOnce = 3;         // full blocks a multiprocessor holds: 80 registers a thread, with which no rule spills
    static constexpr int64_t kThreadsPerSm = 2048;  // of the whole grid: over twice those of kBlocksAtOnce, so that early ends are filled
    // Floats of a row kept in shared memory: 32 KiB, less than the 48 KiB that a block may have on any device without asking.
    static constexpr int64_t kSharedRowLimit = 8192;
    // Longer rows are summed in buffers in the workspace, one a block.
    static constexpr int64_t kRowBuffersPerSm = 2;  // of the three blocks that could run: each row of more than 32 KiB costs its buffer
    static constexpr int64_t kRowBufferBytes = int64_t{64} << 20;  // for all of them together, unless one row is larger
    static_assert(32 * kWarpTeams <= kMostThreads && kMostThreads % 32 == 0);
  };

  // Packing: a warp packs a row.
  struct Pack {
    static constexpr int kThreads = 256;         // eight rows a block
    static constexpr int64_t kBlocksPerSm = 32;  // four waves of eight resident blocks
  };

  // Kernels that map rows to threadIdx.y and the items of a row to threadIdx.x: lookups, bags and their rows' gradients, unpacking, XOR.
  struct RowGrid {
    static constexpr int kThreads = 256;         // eight blocks are resident, and a short row still leaves whole warps to the next row
    static constexpr int64_t kBlocksPerSm = 32;  // four times the resident blocks, so that blocks which finish early are replaced
  };

  // Lookup of bags, beside RowGrid.
  struct Bag {
    static constexpr int kAhead = 8;  // rows whose loads are in flight at once: ids and rows are two dependent trips to memory
    static_assert(kSumBlock % kAhead == 0);
  };

  // Counts of bags and gradients of their weights: a warp takes a bag or a position.
  struct BagGradient {
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int64_t kBlocksPerSm = 32;  // four waves of eight resident blocks
  };

  // The average of two tables: a warp takes a row.
  struct Average {
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int64_t kBlocksPerSm = 32;  // four waves of eight resident blocks
  };
};

// The tuning of an architecture, 10 * major + minor. Today all have the same; another one derives from it, replaces what differs and
// is named here. Kernels then need the architecture as a template parameter: a kernel and its launch must use one tuning.
template <int kArchitecture>
struct TuningOf {
  using Type = CommonTuning;
};

// What kernels and launches use.
using Tuning = TuningOf<80>::Type;

}  // namespace dualbin::kernels
