// Gradients of bags on the GPU: positions side by side, each looks for its bag, so that one large bag does not hold the others up.
#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/memory.cuh"
#include "kernels/output.cuh"
#include "kernels/row_grid.h"
#include "kernels/team.cuh"
#include "kernels/tuning.h"
#include "rules/bag.h"
#include "rules/planes.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::BagGradient;

struct LoadId {
  __device__ __forceinline__ int64_t operator()(const Ids& ids, int64_t n) const { return load_id(ids, n); }
};

__device__ __forceinline__ int64_t first_warp() {
  return static_cast<int64_t>(blockIdx.x) * Policy::kWarps + static_cast<int64_t>(threadIdx.x / 32);
}
__device__ __forceinline__ int64_t warp_stride() { return static_cast<int64_t>(gridDim.x) * Policy::kWarps; }

// A warp counts the rows of a bag. Offsets that do not ascend within [0, ids] give 0.
__global__ void __launch_bounds__(Policy::kThreads) count_bags(const float* scale, int64_t rows, const Bags bags, int32_t* out) {
  const int lane = threadIdx.x % 32;
  for (int64_t bag = first_warp(); bag < bags.count(); bag += warp_stride()) {
    const int64_t begin = load_id(bags.offsets, bag);
    const int64_t end = load_id(bags.offsets, bag + 1);
    int32_t count = 0;
    if (begin >= 0 && end <= bags.ids.count) {
      for (int64_t n = begin + lane; n < end; n += 32) {
        count += bag_scale(scale, rows, load_id(bags.ids, n), bags.padding_idx) != 0.0f ? 1 : 0;
      }
    }
    count = warp_sum(count);
    if (lane == 0) out[bag] = count;
  }
}

struct GradientArgs {
  Bags bags;
  const void* dy;
  int64_t dim;
  FloatType type;
  const int32_t* counts;
  void* rows;
};

// kCount elements, narrowed; more than one: 16 bytes, aligned to 16.
template <typename Format, int kCount>
__device__ __forceinline__ void store_narrowed(FloatType type, const float (&from)[kCount], typename Format::Storage* to) {
  uint32_t words[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) words[k] = narrow_word(from[k], type);
  if constexpr (kCount == 1) {
    if constexpr (sizeof(typename Format::Storage) == 4) {
      *to = bits_float(words[0]);
    } else {
      *to = static_cast<uint16_t>(words[0]);
    }
  } else if constexpr (kCount == 4) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    const auto pair = [&](int k) { return (words[k] & 0xffffu) | (words[k + 1] << 16); };
    *reinterpret_cast<uint4*>(to) = make_uint4(pair(0), pair(2), pair(4), pair(6));
  }
}

// Rows are mapped to threadIdx.y, kCount columns of a row to a thread.
template <typename Format, int kCount>
__global__ void __launch_bounds__(kRowGridThreads) spread_bags(const GradientArgs args) {
  using Storage = typename Format::Storage;
  for (int64_t n = first_row(); n < args.bags.ids.count; n += row_stride()) {
    const int64_t bag = bag_of(args.bags, n, LoadId{});
    const bool counted = bag >= 0 && load_id(args.bags.ids, n) != args.bags.padding_idx;
    const BagShare share = counted ? bag_share(args.bags, args.counts, bag, n) : BagShare{};
    const Storage* from = static_cast<const Storage*>(args.dy) + (counted ? bag : 0) * args.dim;
    Storage* to = static_cast<Storage*>(args.rows) + n * args.dim;
    for (int64_t d = static_cast<int64_t>(threadIdx.x) * kCount; d < args.dim; d += static_cast<int64_t>(blockDim.x) * kCount) {
      float values[kCount] = {};
      if (counted) {
        load_widened<Format>(from + d, values);
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] = share(values[k]);
      }
      store_narrowed<Format>(args.type, values, to + d);
    }
  }
}

// A warp sums a row of dy with the signs of the position's row: every lane its own columns in ascending order, then the lanes in halves.
template <typename Format>
__global__ void __launch_bounds__(Policy::kThreads)
    align_bags(const Table table, const Bags bags, const typename Format::Storage* dy, float* out) {
  const int lane = threadIdx.x % 32;
  for (int64_t n = first_warp(); n < bags.ids.count; n += warp_stride()) {
    const int64_t bag = bag_of(bags, n, LoadId{});
    const int64_t id = load_id(bags.ids, n);
    const float scale = bag < 0 ? 0.0f : bag_scale(table.scale, table.rows, id, bags.padding_idx);
    const float unit = plane_unit(table.planes);
    double sum = 0.0;
    for (int64_t d = lane; scale != 0.0f && d < table.dim; d += 32) {
      const double value = static_cast<double>(Format::widen(__ldg(dy + bag * table.dim + d)));
      const uint8_t* byte = table.bits + id * table.row_bytes() + d / 8;
      sum += value * static_cast<double>(static_cast<float>(weight_of(byte, table.width(), table.planes, static_cast<int>(d % 8))) * unit);
    }
    sum = warp_sum(sum);  // the first lane: itself and half of the others, again and again
    if (lane == 0) out[n] = scale == 0.0f ? 0.0f : bag_weight_share(scale, sum);
  }
}

}  // namespace

Status CudaBackend::bag_counts(const Launch& launch, const BagCountsCall& call) const {
  DUALBIN_TRY(call.check());
  const Bags& bags = call.bags;
  if (bags.count() == 0) return {};
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const unsigned grid = grid_size(bags.count(), Policy::kWarps, Policy::kBlocksPerSm * processors);
  count_bags<<<grid, Policy::kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(call.scale, call.rows, bags, call.out);
  DUALBIN_CUDA_LAUNCHED("count_bags");
  return {};
}

Status CudaBackend::bag_gradient(const Launch& launch, const BagGradientCall& call) const {
  DUALBIN_TRY(call.check());
  const Bags& bags = call.bags;
  const Floats& dy = call.dy;
  const int64_t dim = call.dim;
  if (bags.ids.count == 0) return {};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const GradientArgs args{bags, dy.data, dim, dy.type, call.counts, call.out};
  return with_float(dy.type, [&](auto format) -> Status {
    using Format = decltype(format);
    const bool vectors = dim % Format::kVector == 0 && aligned(dy.data, 16) && aligned(call.out, 16);
    RowGrid shape;
    DUALBIN_TRY(make_row_grid(bags.ids.count, vectors ? dim / Format::kVector : dim, &shape));
    if (vectors) {
      spread_bags<Format, Format::kVector><<<shape.grid, shape.block, 0, stream>>>(args);
    } else {
      spread_bags<Format, 1><<<shape.grid, shape.block, 0, stream>>>(args);
    }
    DUALBIN_CUDA_LAUNCHED("spread_bags");
    return {};
  });
}

Status CudaBackend::bag_weight_gradient(const Launch& launch, const BagWeightGradientCall& call) const {
  DUALBIN_TRY(call.check());
  const Bags& bags = call.bags;
  if (bags.ids.count == 0) return {};
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const unsigned grid = grid_size(bags.ids.count, Policy::kWarps, Policy::kBlocksPerSm * processors);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return with_float(call.dy.type, [&](auto format) -> Status {
    using Format = decltype(format);
    align_bags<Format>
        <<<grid, Policy::kThreads, 0, stream>>>(call.table, bags, static_cast<const typename Format::Storage*>(call.dy.data), call.out);
    DUALBIN_CUDA_LAUNCHED("align_bags");
    return {};
  });
}

}  // namespace dualbin::kernels
