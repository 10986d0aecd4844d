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
  // Grouping of ids by row in one kernel, a block a multiprocessor at most.
  struct GroupIds {
    static constexpr int kThreads = 512;    // 16 warps, each with a histogram of its own in shared memory
    static constexpr int kOneBlock = 2048;  // ids up to which one block does it: four a thread cost less than waiting for other blocks
    // Blocks of a cluster, the most there is, and ids a thread of it; with more, more blocks are faster, although they wait longer.
    static constexpr unsigned kCluster = 16;
    static constexpr int kClusterItems = 2;
    static constexpr int kMostItems = 16;  // ids a thread, all in registers
    // Ids a thread from which a tile is put in order in shared memory before it is moved: 13 % at 262,144 ids, 28 % at a million. With
    // fewer, neighbours of one digit are too rare to save more stores than the detour costs.
    static constexpr int kStagedItems = 4;
    // Blocks that share the work with so many ids a thread. A block reads the counts of all blocks for every digit: that grows with the
    // square of their number, what a thread does one after the other only with the number of its ids.
    static constexpr int64_t blocks(int items) { return items <= 2 ? 64 : kMostBlocks; }
    static constexpr int kMostBlocks = 128;
    static constexpr int kDigitsAhead = 8;  // loads of counts a thread has on their way
    static constexpr int kMostBits = 10;    // of a digit; one less for more than kFewBlocks blocks, see above
    static constexpr int kFewBlocks = 32;
  };

  // Grouping of more ids: the kernels around CUB, which tunes its own.
  struct Groups {
    static constexpr int kThreads = 256;
    static constexpr int64_t kBlocksPerSm = 16;  // two waves of eight resident blocks
  };

  // Sums of a gradient by row.
  struct RowSum {
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;  // a warp works alone
    static constexpr int64_t kBlocksPerSm = 32;   // four waves of eight resident blocks: rows differ in length, and the next fill the gaps
    // Part of that from which on a grid has all of it: blocks without work after those that sum delay the ones of the next kernel, which
    // takes 3 of 85 us from the update of one row by a gradient of 16 bits. 24 blocks and 64 win nothing there; nothing else changes.
    static constexpr double kWholeGridFrom = 0.5;
    // Columns of a block of add_blocks and partial rows that a thread has on their way. Fewer columns load more rows of one hot row at a
    // time, more of them less of nothing for rows of a few blocks. 32 columns take 4 % longer at one hot row; 8 are as 16 there, and 1 %
    // longer with a power law.
    static constexpr int kAddColumns = 16;
    static constexpr int kAddEach = 16;
    static constexpr int64_t kAddBlocksPerSm = 6;  // resident, of 32 KiB each
  };

  // Updates of counters with up to kMaxDim columns: 32 columns a thread, a batch of rows a warp or a block.
  struct UpdateWords {
    static constexpr int kThreads = 128;       // four warps, each with rows of its own
    static constexpr int kBlockThreads = 256;  // at most, where a block takes a row: a warp for each 1024 columns
    // Resident threads: 96 registers where a warp takes several rows, of different lengths, and 80 where a block takes one row. Measured:
    // 80 for both is 5 % slower with narrow rows, 96 for both 4 % slower with wide ones.
    static constexpr int kThreadsPerSm = 640;
    static constexpr int kBlockThreadsPerSm = 768;
    static constexpr int64_t kMaxDim = 32 * kBlockThreads;
    // Averages: two tiles of 4.5 KiB a warp, so that 16 warps are what the shared memory of sm_90 holds, and four of a block what a block
    // may have without asking.
    static constexpr int kAverageThreadsPerSm = 512;
    static constexpr int64_t kMaxAverageDim = 32 * kThreads;
    // Rows that a team takes one after the other; a warp's batch has 32 / lanes times as many, at most 32. More rows share the loads and
    // the double precision of a batch, fewer spread over the multiprocessors more evenly. Measured from 1 to 4.
    static constexpr int kBlockRounds = 4;
    static constexpr int rounds(int lanes) { return lanes <= 2 ? 1 : 2; }
    static_assert(kBlockRounds * 32 < 256, "a thread counts flips in eight bits");
  };

  // Updates of all else: a warp or a block takes a row.
  struct Update {
    static constexpr int64_t kWarpRowLimit = 256;  // columns up to which a warp takes a row: eight a lane; beyond that a block does
    static constexpr int kWarpTeams = 8;           // rows a block of warp teams works on at a time
    static constexpr int kMostThreads = 256;       // of a block
    static constexpr int kMostTeamWarps = kMostThreads / 32;
    static constexpr int kBlocksAtOnce = 3;         // full blocks a multiprocessor holds: 80 registers a thread
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

  // Lookups of rows of whole words: a warp takes 1024 columns, of one row or of several.
  struct LookupWords {
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;
    // Of rows of less than a tile: some tiles a warp, the next one loaded while one is written. Longer rows take a block for every tiles of
    // its warps: memory is then written in order, which is 3 % faster.
    static constexpr int64_t kBlocksPerSm = 16;
    // Results of more bytes are not kept in the L2 cache for whoever reads them next: they do not fit. Up to 7 % faster.
    static constexpr int64_t kStreamedBytes = int64_t{32} << 20;
  };

  // Lookup of bags, beside RowGrid.
  struct Bag {
    static constexpr int kAhead = 8;  // rows whose loads are in flight at once: ids and rows are two dependent trips to memory
    static_assert(kSumBlock % kAhead == 0);
  };

  // Lookup of bags of rows of whole words: a lane has 32 columns of a bag.
  struct BagWords {
    static constexpr int kThreads = 128;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kBlocksAtOnce = 5;  // 96 registers a thread: 32 sums, rows and ids on their way
    // Rows of a bag that a lane has on their way: more are registers that take away warps, and each warp has others.
    static constexpr int ahead(int planes) { return planes <= 2 ? 4 : 2; }
    // Bits of tables of more bytes are read past the caches: a row's line of 128 bytes would push out those of scales, a fifth as many,
    // which come again. 5 % faster with tables of 80 and 160 MB; the L2 cache of an H100 has 50.
    static constexpr int64_t kCachedBytes = int64_t{32} << 20;
  };

  // Counts of bags and gradients of their weights: a warp takes a bag or a position.
  struct BagGradient {
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int64_t kBlocksPerSm = 32;  // four waves of eight resident blocks
  };

  // Where the rows of a batch are: a thread takes an id, a place or a distinct id.
  struct Exchange {
    static constexpr int kThreads = 256;
    static constexpr int64_t kBlocksPerSm = 8;  // resident: every thread searches, and waits for memory most of the time
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
