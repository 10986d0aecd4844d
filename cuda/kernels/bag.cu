// Lookup of bags on the GPU: rows of whole words go to bag_words.cu. Here a team of threads takes a bag, eight columns (one packed byte)
// for each thread.
#include <type_traits>

#include "core/checks.h"
#include "kernels/bag.cuh"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/lane_word.cuh"
#include "kernels/row_grid.h"
#include "kernels/tuning.h"
#include "rules/planes.h"

namespace dualbin::kernels {

namespace {

constexpr int kAhead = Tuning::Bag::kAhead;

constexpr int kSeveral = 0;  // planes of a table: as many as it says

// kAhead rows of a bag, as one thread sees them.
template <int kPlanes>
struct Members {
  float magnitude[kAhead];
  // A byte of plane 0; of several planes a byte of each, that of plane p in byte 7 - p.
  std::conditional_t<kPlanes == 1, uint8_t, uint64_t> packed[kAhead];
  bool counts[kAhead];  // the row exists and is not padding
};

// A matrix of 8 x 8 bits, a row a byte, transposed (Warren, Hacker's Delight, section 7-3).
__device__ __forceinline__ uint64_t transpose(uint64_t x) {
  const auto swap = [&](int shift, uint64_t mask) {
    const uint64_t moved = (x ^ (x >> shift)) & mask;
    x ^= moved ^ (moved << shift);
  };
  swap(7, 0x00aa00aa00aa00aaull);
  swap(14, 0x0000cccc0000ccccull);
  swap(28, 0x00000000f0f0f0f0ull);
  return x;
}

// s * (2m + 1) of a column from its byte of a transposed word: the sign at the top, then the magnitude.
__device__ __forceinline__ int32_t weight_of_column(uint32_t byte, int planes) {
  const uint32_t magnitude = (byte & 0x7fu) >> (8 - planes);
  const auto odd = static_cast<int32_t>(2 * magnitude + 1);
  return (byte & 0x80u) != 0 ? odd : -odd;
}

template <int kPlanes>
__device__ __forceinline__ auto load_packed(const BagArgs& args, int64_t id, int64_t byte) {
  const uint8_t* at = args.table.bits + id * args.table.row_bytes() + byte;
  if constexpr (kPlanes == 1) {
    return __ldg(at);
  } else {
    uint64_t packed = 0;
#pragma unroll
    for (int p = 0; p < kMaxPlanes; ++p) {
      if (p < args.table.planes) packed |= static_cast<uint64_t>(__ldg(at + p * args.width)) << (56 - 8 * p);
    }
    return packed;
  }
}

// Loads the rows [begin, end) of at most kAhead; sets `bad` where an id is.
template <int kPlanes>
__device__ __forceinline__ Members<kPlanes> load_members(const BagArgs& args, int64_t begin, int64_t end, int64_t byte, bool* bad) {
  Members<kPlanes> m;
  int64_t ids[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) ids[i] = begin + i < end ? load_id(args.bags.ids, begin + i) : 0;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const bool inside = ids[i] >= 0 && ids[i] < args.table.rows;
    if (!inside && args.bad_ids == BadIds::kReport) {
      *bad = true;
      if (byte == 0 && args.errors != nullptr) report(args.errors, ids[i]);
    }
    const bool wanted = inside && begin + i < end && ids[i] != args.bags.padding_idx;
    m.magnitude[i] = wanted ? __ldg(args.table.scale + ids[i]) : 0.0f;
    m.packed[i] = 0;
    if (wanted) m.packed[i] = load_packed<kPlanes>(args, ids[i], byte);
  }
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    m.counts[i] = m.magnitude[i] != 0.0f;
    if (args.bags.weights != nullptr && m.counts[i]) m.magnitude[i] *= args.bags.weights[begin + i];
  }
  return m;
}

// Eight columns of a bag, as float32: NaN where its offsets or one of its ids are bad.
template <typename Kind, int kPlanes>
__device__ __forceinline__ void sum_columns(const BagArgs& args, const Span& span, int64_t byte, float (&values)[8]) {
  typename Kind::Total total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t rows = 0;
  bool bad = span.bad;
  for (int64_t start = span.begin; start < span.end; start += kSumBlock) {
    float block[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    const int64_t stop = start + kSumBlock < span.end ? start + kSumBlock : span.end;
    for (int64_t n = start; n < stop; n += kAhead) {
      const auto m = load_members<kPlanes>(args, n, stop, byte, &bad);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (!m.counts[i]) continue;
        if constexpr (kPlanes == 1) {
          const uint32_t magnitude = float_bits(Kind::magnitude(m.magnitude[i]));
          const uint32_t negative = ~static_cast<uint32_t>(m.packed[i]);
#pragma unroll
          for (int k = 0; k < 8; ++k) block[k] += bits_float(magnitude ^ ((negative >> k) << 31));
        } else {
          const uint64_t columns = transpose(m.packed[i]);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const int32_t weight = weight_of_column(static_cast<uint32_t>(columns >> (8 * k)) & 0xffu, args.table.planes);
            block[k] += m.magnitude[i] * (static_cast<float>(weight) * args.unit);
          }
        }
        ++rows;
      }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) Kind::add(&total[k], block[k]);
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = bad ? bits_float(0x7fc00000u) : Kind::finish(total[k], rows, args.bags.mode);
}

template <typename Kind, int kPlanes>
__global__ void __launch_bounds__(kRowGridThreads) lookup_bags(const BagArgs args) {
  for (int64_t bag = first_row(); bag < args.count; bag += row_stride()) {
    const Span span = load_span(args, bag, threadIdx.x == 0);
    for (int64_t byte = threadIdx.x; byte < args.width; byte += blockDim.x) {
      float values[8];
      sum_columns<Kind, kPlanes>(args, span, byte, values);
      store_eight(args.out, args.type, bag * args.table.dim + 8 * byte, 8 * byte, args.table.dim, args.vectors, values);
    }
  }
}

}  // namespace

Status CudaBackend::lookup_bag(const Launch& launch, const LookupBagCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  const Bags& bags = call.bags;
  if (bags.count() == 0) return {};
  const bool vectors = table.dim % 8 == 0 && aligned(call.out, 16);
  const BagArgs args{table,        bags,      bags.count(), table.width(), plane_unit(table.planes),
                     call.bad_ids, call.type, call.out,     vectors,       launch.errors};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (table.dim % kWord == 0 && aligned(table.bits, 4) && vectors && bags.mode != BagMode::kMajority) return launch_bag_words(stream, args);
  RowGrid shape;
  DUALBIN_TRY(make_row_grid(bags.count(), table.width(), &shape));
  if (bags.mode == BagMode::kMajority) {
    lookup_bags<BagVotes, 1><<<shape.grid, shape.block, 0, stream>>>(args);
  } else if (table.planes == 1) {
    lookup_bags<BagSum, 1><<<shape.grid, shape.block, 0, stream>>>(args);
  } else {
    lookup_bags<BagSum, kSeveral><<<shape.grid, shape.block, 0, stream>>>(args);
  }
  DUALBIN_CUDA_LAUNCHED("lookup_bags");
  return {};
}

}  // namespace dualbin::kernels
