// Bags of rows of whole words, as sums or means. A team of 1 to 32 lanes takes a bag, or 1024 columns of one, and each lane 32 columns: a
// word of every plane of every row. What costs is the way to memory, two random accesses a row and nothing to reuse, so that the rows of
// several bags, some of each, are on their way at once. Blocks of a bag are added in registers and their totals in shared memory, from
// where the warp writes its bags 16 bytes a lane, one after the other.
#include <cuda_bf16.h>

#include "kernels/bag.cuh"
#include "kernels/cuda_check.h"
#include "kernels/lane_word.cuh"
#include "kernels/tuning.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::BagWords;

struct BagTiles {
  int lanes;      // of a bag, a power of two
  int parts;      // of 1024 columns that a bag has
  int64_t count;  // of warps' tiles
};

// The totals of a lane: 32 floats, and 16 bytes more so that neither way of access meets a bank twice.
constexpr int kTotals = kWord + 4;

// Rows of a bag on their way: of a lane, its word of each and the row's magnitude.
template <int kPlanes>
struct BagRows {
  static constexpr int kAhead = Policy::ahead(kPlanes);
  float magnitude[kAhead];  // of rows that do not count: 0
  uint32_t planes[kAhead][kPlanes];
};

template <int kAhead>
__device__ __forceinline__ void load_ids(const BagArgs& args, int64_t begin, int64_t end, int64_t (&ids)[kAhead]) {
#pragma unroll
  for (int i = 0; i < kAhead; ++i) ids[i] = begin + i < end ? load_id(args.bags.ids, begin + i) : -1;
}

// Loads the rows of positions [begin, end), counts them, and sets `bad` where an id is.
template <bool kOnce, int kPlanes>
__device__ __forceinline__ void load_rows(const BagArgs& args, int64_t begin, int64_t end, int word, bool reports,
                                          const int64_t (&ids)[BagRows<kPlanes>::kAhead], BagRows<kPlanes>& rows, bool* bad) {
#pragma unroll
  for (int i = 0; i < BagRows<kPlanes>::kAhead; ++i) {
    const bool inside = ids[i] >= 0 && ids[i] < args.table.rows;
    if (!inside && begin + i < end && args.bad_ids == BadIds::kReport) {
      *bad = true;
      if (reports && args.errors != nullptr) report(args.errors, ids[i]);
    }
    rows.magnitude[i] = 0.0f;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) rows.planes[i][p] = 0;
    if (inside && ids[i] != args.bags.padding_idx) {
      rows.magnitude[i] = __ldg(args.table.scale + ids[i]);
      load_planes<kOnce>(args.table, ids[i], word, rows.planes[i]);
    }
  }
}

// Adds a row to the columns of a block. One that does not count adds zeros, which change nothing: a sum that starts at +0 is never -0.
template <int kPlanes>
__device__ __forceinline__ void add_row(float magnitude, const uint32_t (&planes)[kPlanes], float unit, float (&block)[kWord]) {
  if constexpr (kPlanes == 1) {
    const uint32_t bits = float_bits(magnitude);
    const uint32_t negative = ~planes[0];
#pragma unroll
    for (int k = 0; k < kWord; ++k) block[k] += bits_float(bits ^ ((negative << (31 - k)) & 0x80000000u));
  } else {
    uint32_t bytes[8];
    unpack_word(planes, bytes);
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      float values[4];
      scale_bytes(bytes[w], magnitude, unit, values);
#pragma unroll
      for (int k = 0; k < 4; ++k) block[4 * w + k] += values[k];
    }
  }
}

// The totals of a lane's columns over the bag, left in shared memory. Returns how many rows count, -1 where the offsets or an id are bad.
template <bool kOnce, int kPlanes>
__device__ __forceinline__ int64_t sum_words(const BagArgs& args, const Span& span, int word, bool reports, float* totals) {
  constexpr int kAhead = BagRows<kPlanes>::kAhead;
  int64_t counted = 0;
  bool bad = span.bad;
  int64_t ids[kAhead];
  load_ids(args, span.begin, span.end, ids);
  for (int64_t start = span.begin; start == span.begin || start < span.end; start += kSumBlock) {
    float block[kWord] = {};
    const int64_t stop = start + kSumBlock < span.end ? start + kSumBlock : span.end;
#pragma unroll 1
    for (int64_t n = start; n < stop; n += kAhead) {
      BagRows<kPlanes> rows;
      load_rows<kOnce, kPlanes>(args, n, stop, word, reports, ids, rows, &bad);
      load_ids(args, n + kAhead, span.end, ids);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const bool counts = rows.magnitude[i] != 0.0f;
        counted += counts;
        if (args.bags.weights != nullptr && counts) rows.magnitude[i] *= args.bags.weights[n + i];
        add_row(rows.magnitude[i], rows.planes[i], args.unit, block);
      }
    }
    const bool first = start == span.begin;
#pragma unroll
    for (int k = 0; k < kWord; k += 4) {
      auto* to = reinterpret_cast<float4*>(totals + k);
      float4 total = first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *to;
      BagSum::add(&total.x, block[k]);
      BagSum::add(&total.y, block[k + 1]);
      BagSum::add(&total.z, block[k + 2]);
      BagSum::add(&total.w, block[k + 3]);
      *to = total;
    }
  }
  return bad ? -1 : counted;
}

// Four columns of a bag as they are returned.
__device__ __forceinline__ float4 finish_four(const float* totals, int64_t counted, BagMode mode) {
  const float4 total = *reinterpret_cast<const float4*>(totals);
  if (counted < 0) {
    const float nan = bits_float(0x7fc00000u);
    return make_float4(nan, nan, nan, nan);
  }
  return make_float4(BagSum::finish(total.x, counted, mode), BagSum::finish(total.y, counted, mode), BagSum::finish(total.z, counted, mode),
                     BagSum::finish(total.w, counted, mode));
}

template <int kPlanes, bool kOnce>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kBlocksAtOnce)
    lookup_bag_words(const __grid_constant__ BagArgs args, const BagTiles tiles) {
  __shared__ __align__(16) float shared[Policy::kThreads][kTotals];
  const int lane = threadIdx.x % 32;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * Policy::kWarps + threadIdx.x / 32;
  if (tile >= tiles.count) return;
  const int bags_at_once = 32 / tiles.lanes;
  const int64_t group = tiles.parts == 1 ? tile : tile / tiles.parts;
  const int part = static_cast<int>(tile - group * tiles.parts);
  const int64_t first_bag = group * bags_at_once;
  const int word = part * kWord + (lane & (tiles.lanes - 1));
  const int64_t bag = first_bag + lane / tiles.lanes;
  float (*own)[kTotals] = shared + threadIdx.x / 32 * 32;

  int64_t counted = 0;
  if (bag < args.count && word * kWord < args.table.dim) {
    const Span span = load_span(args, bag, word == 0);
    counted = sum_words<kOnce, kPlanes>(args, span, word, word == 0, own[lane]);
  }
  __syncwarp();

  // The warp writes 32 pieces of 16 bytes at a time.
  const bool wide = args.type == FloatType::kF32;
  const int columns = wide ? 4 : 8;  // of a piece
  const int pieces = kWord / columns;
  for (int i = 0; i < pieces; ++i) {
    const int at = i * 32 + lane;
    const int owner = at / pieces;
    const int64_t rows = __shfl_sync(kAllLanes, counted, owner);
    const int first = at % pieces * columns;
    const int64_t to_bag = first_bag + owner / tiles.lanes;
    const int64_t column = static_cast<int64_t>(part * kWord + (owner & (tiles.lanes - 1))) * kWord + first;
    if (to_bag >= args.count || column >= args.table.dim) continue;
    const int64_t value = to_bag * args.table.dim + column;
    const float4 low = finish_four(own[owner] + first, rows, args.bags.mode);
    if (wide) {
      static_cast<float4*>(args.out)[value / 4] = low;
      continue;
    }
    const float4 high = finish_four(own[owner] + first + 4, rows, args.bags.mode);
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    store_eight(args.out, args.type, value, column, args.table.dim, true, values);
  }
}

using BagKernel = void (*)(BagArgs, BagTiles);

template <int kPlanes>
BagKernel pick_kernel(bool once) {
  return once ? lookup_bag_words<kPlanes, true> : lookup_bag_words<kPlanes, false>;
}

}  // namespace

Status launch_bag_words(cudaStream_t stream, const BagArgs& args) {
  BagTiles tiles;
  const int64_t words = args.table.dim / kWord;
  tiles.lanes = 1;
  while (tiles.lanes < 32 && tiles.lanes < words) tiles.lanes *= 2;
  tiles.parts = static_cast<int>((words + kWord - 1) / kWord);
  const int bags_at_once = 32 / tiles.lanes;
  tiles.count = (args.count + bags_at_once - 1) / bags_at_once * tiles.parts;
  const bool once = args.table.rows * args.table.row_bytes() > Policy::kCachedBytes;
  const auto kernel = args.table.planes == 1   ? pick_kernel<1>(once)
                      : args.table.planes == 2 ? pick_kernel<2>(once)
                      : args.table.planes <= 4 ? pick_kernel<4>(once)
                                               : pick_kernel<kMaxPlanes>(once);
  const auto blocks = static_cast<unsigned>((tiles.count + Policy::kWarps - 1) / Policy::kWarps);
  kernel<<<blocks, Policy::kThreads, 0, stream>>>(args, tiles);
  DUALBIN_CUDA_LAUNCHED("lookup_bag_words");
  return {};
}

}  // namespace dualbin::kernels
