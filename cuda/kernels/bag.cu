// Lookup of bags on the GPU: a team of threads for each bag, eight columns (one packed byte) for each thread.
#include "rules/bag.h"

#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/memory.cuh"
#include "kernels/output.cuh"
#include "kernels/row_grid.h"
#include "kernels/tuning.h"

namespace dualbin::kernels {

namespace {

constexpr int kAhead = Tuning::Bag::kAhead;

struct BagArgs {
  Table table;
  Bags bags;
  int64_t count;
  int64_t width;
  BadIds bad_ids;
  FloatType type;
  void* out;
  bool vectors;  // eight output values can be stored in units of 16 bytes
  ErrorBlock* errors;
};

struct Span {
  int64_t begin;
  int64_t end;
  bool bad;
};

__device__ __forceinline__ Span load_span(const BagArgs& args, int64_t bag, bool reports) {
  const int64_t begin = load_id(args.bags.offsets, bag);
  const int64_t end = load_id(args.bags.offsets, bag + 1);
  if (begin >= 0 && end >= begin && end <= args.bags.ids.count) return {begin, end, false};
  if (reports && args.errors != nullptr) report(args.errors, begin < 0 ? begin : end);
  return {0, 0, true};
}

// kAhead rows of a bag, as one thread sees them.
struct Members {
  float magnitude[kAhead];
  uint8_t packed[kAhead];
  bool counts[kAhead];  // the row exists and is not padding
};

// Loads the rows [begin, end) of at most kAhead; sets `bad` where an id is.
__device__ __forceinline__ Members load_members(const BagArgs& args, int64_t begin, int64_t end, int64_t byte, bool* bad) {
  Members m;
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
    m.packed[i] = wanted ? __ldg(args.table.bits + ids[i] * args.width + byte) : 0;
  }
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    m.counts[i] = m.magnitude[i] != 0.0f;
    if (args.bags.weights != nullptr && m.counts[i]) m.magnitude[i] *= args.bags.weights[begin + i];
  }
  return m;
}

// Eight columns of a bag, as float32: NaN where its offsets or one of its ids are bad.
template <typename Kind>
__device__ __forceinline__ void sum_columns(const BagArgs& args, const Span& span, int64_t byte, float (&values)[8]) {
  typename Kind::Total total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t rows = 0;
  bool bad = span.bad;
  for (int64_t start = span.begin; start < span.end; start += kSumBlock) {
    float block[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    const int64_t stop = start + kSumBlock < span.end ? start + kSumBlock : span.end;
    for (int64_t n = start; n < stop; n += kAhead) {
      const Members m = load_members(args, n, stop, byte, &bad);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (!m.counts[i]) continue;
        const uint32_t magnitude = float_bits(Kind::magnitude(m.magnitude[i]));
        const uint32_t negative = ~static_cast<uint32_t>(m.packed[i]);
#pragma unroll
        for (int k = 0; k < 8; ++k) block[k] += bits_float(magnitude ^ ((negative >> k) << 31));
        ++rows;
      }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) Kind::add(&total[k], block[k]);
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = bad ? bits_float(0x7fc00000u) : Kind::finish(total[k], rows, args.bags.mode);
}

__device__ __forceinline__ void store_columns(const BagArgs& args, int64_t bag, int64_t byte, const float (&values)[8]) {
  const int64_t first = bag * args.table.dim + 8 * byte;
  uint32_t words[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) words[k] = narrow_word(values[k], args.type);
  if (args.vectors && args.type == FloatType::kF32) {
    uint4* out = static_cast<uint4*>(args.out) + first / 4;
    out[0] = make_uint4(words[0], words[1], words[2], words[3]);
    out[1] = make_uint4(words[4], words[5], words[6], words[7]);
  } else if (args.vectors) {
    const auto pair = [&](int k) { return (words[k] & 0xffffu) | (words[k + 1] << 16); };
    static_cast<uint4*>(args.out)[first / 8] = make_uint4(pair(0), pair(2), pair(4), pair(6));
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (8 * byte + k >= args.table.dim) break;
      if (args.type == FloatType::kF32) {
        static_cast<uint32_t*>(args.out)[first + k] = words[k];
      } else {
        static_cast<uint16_t*>(args.out)[first + k] = static_cast<uint16_t>(words[k]);
      }
    }
  }
}

template <typename Kind>
__global__ void __launch_bounds__(kRowGridThreads) lookup_bags(const BagArgs args) {
  for (int64_t bag = first_row(); bag < args.count; bag += row_stride()) {
    const Span span = load_span(args, bag, threadIdx.x == 0);
    for (int64_t byte = threadIdx.x; byte < args.width; byte += blockDim.x) {
      float values[8];
      sum_columns<Kind>(args, span, byte, values);
      store_columns(args, bag, byte, values);
    }
  }
}

}  // namespace

Status CudaBackend::lookup_bag(const Launch& launch, const Table& table, const Bags& bags, BadIds bad_ids, void* out,
                               FloatType type) const {
  DUALBIN_TRY(check_bags(table, bags, out, type));
  if (bags.count() == 0) return {};
  RowGrid shape;
  DUALBIN_TRY(make_row_grid(bags.count(), table.width(), &shape));
  const bool vectors = table.dim % 8 == 0 && aligned(out, 16);
  const BagArgs args{table, bags, bags.count(), table.width(), bad_ids, type, out, vectors, launch.errors};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (bags.mode == BagMode::kMajority) {
    lookup_bags<BagVotes><<<shape.grid, shape.block, 0, stream>>>(args);
  } else {
    lookup_bags<BagSum><<<shape.grid, shape.block, 0, stream>>>(args);
  }
  DUALBIN_CUDA_LAUNCHED("lookup_bags");
  return {};
}

}  // namespace dualbin::kernels
