// Rows that travel between ranks: where those of a batch are, and rows with their scales, on the GPU.
#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/groups.h"
#include "kernels/memory.cuh"
#include "kernels/output.cuh"
#include "kernels/overlap.cuh"
#include "kernels/row_grid.h"
#include "kernels/row_sum.cuh"
#include "kernels/tuning.h"
#include "rules/common.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::Exchange;

__device__ __forceinline__ int64_t thread_number() { return static_cast<int64_t>(blockIdx.x) * Policy::kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * Policy::kThreads; }

// The segment that begins at sorted position `begin`.
__device__ __forceinline__ int64_t segment_at(const Groups& groups, int64_t count, int64_t begin) {
  int64_t low = 0;  // the last segment that begins at or before it is in [low, high)
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (groups.begin(middle) <= begin) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls give(segment, position) for every occurrence of a row: a thread takes a row of few, a warp a block of a long one.
template <typename Give>
__device__ __forceinline__ void for_occurrences(const Groups& groups, int64_t count, const Give& give) {
  for (int64_t s = thread_number(); s < count; s += thread_count()) {
    const int64_t begin = groups.begin(s);
    const int64_t end = groups.end(s);
    if (end - begin >= kLongRow) continue;
    for (int64_t i = begin; i < end; ++i) give(s, groups.position(i));
  }
  const int64_t blocks = groups.counters == nullptr ? 0 : groups.counters->long_blocks;
  for (int64_t b = thread_number() / 32; b < blocks; b += thread_count() / 32) {
    const LongBlock block = groups.long_rows.blocks[b];
    const int64_t s = segment_at(groups, count, block.first);
    for (int64_t i = block.begin + threadIdx.x % 32; i < block.end; i += 32) give(s, groups.position(i));
  }
}

// Where the ids of every rank end, and, without a capacity, distinct ids and slots.
__global__ void __launch_bounds__(Policy::kThreads) cut_ranks(const Groups groups, const RouteCall call) {
  wait_for_previous();
  let_next_start();
  const int64_t count = groups.count();
  const int64_t known = groups.counters == nullptr ? 0 : groups.begin(count);  // occurrences; those of bad ids come behind them
  if (thread_number() == 0) call.numbers[call.world] = known < call.ids.count ? groups.position(known) : -1;
  const bool limited = call.capacity > 0;
  for (int64_t s = thread_number(); s <= count || (!limited && s < call.places); s += thread_count()) {
    const int64_t row = s < count ? groups.row(s) : 0;
    const int64_t rank = s < count ? row / call.share : call.world;
    if (s <= count) {
      for (int64_t r = s == 0 ? 0 : groups.row(s - 1) / call.share; r < rank; ++r) call.numbers[r] = s;
    }
    if (!limited && s < call.places) store_int(call.local, call.local_type, s, s < count ? row - rank * call.share : call.share);
  }
  if (limited) return;
  for_occurrences(groups, count, [&](int64_t s, int64_t position) { store_int(call.slots, call.slots_type, position, s); });
  for (int64_t i = known + thread_number(); i < call.ids.count; i += thread_count()) {
    store_int(call.slots, call.slots_type, groups.position(i), -1);
  }
}

__device__ __forceinline__ void add_to(int64_t* sum, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
}
__device__ __forceinline__ void lower_to(int64_t* least, int64_t value) {
  atomicMin(reinterpret_cast<long long*>(least), static_cast<long long>(value));
}
__device__ __forceinline__ void raise_to(int64_t* most, int64_t value) {
  atomicMax(reinterpret_cast<long long*>(most), static_cast<long long>(value));
}

// With a capacity: the ids of every rank to its places, and slots; behind cut_ranks.
__global__ void __launch_bounds__(Policy::kThreads) fill_places(const Groups groups, const RouteCall call) {
  wait_for_previous();
  const int64_t count = groups.count();
  const int64_t known = groups.counters == nullptr ? 0 : groups.begin(count);
  const auto begin = [&](int64_t rank) { return rank == 0 ? 0 : call.numbers[rank - 1]; };
  for (int64_t place = thread_number(); place < call.places; place += thread_count()) {
    const int64_t rank = place / call.capacity;
    const int64_t s = begin(rank) + place % call.capacity;
    const int64_t end = call.numbers[rank];
    store_int(call.local, call.local_type, place, s < end ? groups.row(s) - rank * call.share : call.share);
    if (call.missed != nullptr && place % call.capacity == 0) raise_to(call.missed + 3 + rank, end - begin(rank));
  }
  for_occurrences(groups, count, [&](int64_t s, int64_t position) {
    const int64_t rank = groups.row(s) / call.share;
    const int64_t among = s - begin(rank);
    const bool fits = among < call.capacity;
    store_int(call.slots, call.slots_type, position, fits ? call.spare + rank * call.capacity + among : 0);
    if (!fits && call.missed != nullptr) add_to(call.missed, 1);
  });
  for (int64_t i = known + thread_number(); i < call.ids.count; i += thread_count()) {
    const int64_t position = groups.position(i);
    store_int(call.slots, call.slots_type, position, 0);
    if (call.missed == nullptr) continue;
    const int64_t id = load_id(call.ids, position);
    add_to(call.missed, 1);
    lower_to(call.missed + 1, id);
    raise_to(call.missed + 2, id);
  }
}

// Row sums over a divisor to out[row(s)].
template <typename Format, int kCount>
__global__ void __launch_bounds__(Tuning::RowSum::kThreads)
    slot_means(const Groups groups, const Gradient gradient, float divisor, FloatType type, void* out) {
  wait_for_previous();
  const int64_t count = groups.count();
  for (Tiles<kCount> tiles(gradient.dim); tiles.unit < count * tiles.per_item; tiles.unit += tiles.stride) {
    const int64_t s = tiles.item();
    const int64_t column = tiles.column(s);
    if (column >= gradient.dim) continue;
    float sum[kCount];
    sum_row<Format>(groups, gradient, groups.begin(s), groups.end(s), column, sum);
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum[k] /= divisor;
    const int64_t at = groups.row(s) * gradient.dim + column;
    if (type == FloatType::kF32) {
      store_floats(static_cast<float*>(out) + at, sum);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      static_cast<uint16_t*>(out)[at + k] = static_cast<uint16_t>(narrow_word(sum[k], type));
    }
  }
}

// A row that travels: its planes and behind them its scale, in elements of type T.
template <typename T>
__device__ __forceinline__ T part_of_scale(float scale, int64_t part) {
  return static_cast<T>(float_bits(scale) >> (8 * sizeof(T) * part % 32));
}

template <typename T>
__global__ void __launch_bounds__(kRowGridThreads) take_rows(const TakeRowsCall call) {
  const int64_t planes = call.width / static_cast<int64_t>(sizeof(T));
  const int64_t all = planes + kScaleBytes / static_cast<int64_t>(sizeof(T));
  const auto* bits = reinterpret_cast<const T*>(call.bits);
  auto* out = reinterpret_cast<T*>(call.out);
  for (int64_t n = first_row(); n < call.ids.count; n += row_stride()) {
    const int64_t id = load_id(call.ids, n);
    const bool inside = id >= 0 && id < call.rows;
    for (int64_t i = threadIdx.x; i < all; i += blockDim.x) {
      if (i >= planes) {
        out[n * all + i] = part_of_scale<T>(inside ? call.scale[id] : bits_float(0x7fc00000u), i - planes);
      } else {
        out[n * all + i] = inside ? bits[id * planes + i] : T{0};
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowGridThreads) put_rows(const PutRowsCall call) {
  const int64_t planes = call.width / static_cast<int64_t>(sizeof(T));
  const int64_t all = planes + kScaleBytes / static_cast<int64_t>(sizeof(T));
  const auto* packed = reinterpret_cast<const T*>(call.packed);
  auto* bits = reinterpret_cast<T*>(call.bits);
  auto* scale = reinterpret_cast<T*>(call.scale);
  for (int64_t n = first_row(); n < call.ids.count; n += row_stride()) {
    const int64_t id = call.ids.data == nullptr ? n : load_id(call.ids, n);
    if (id < 0 || id >= call.rows) continue;
    for (int64_t i = threadIdx.x; i < all; i += blockDim.x) {
      (i < planes ? bits[id * planes + i] : scale[id * (all - planes) + i - planes]) = packed[n * all + i];
    }
  }
}

// Launches one of the two kernels for rows that travel with `width` bytes of planes.
template <typename Call>
Status launch_rows(cudaStream_t stream, void (*words)(Call), void (*bytes)(Call), const Call& call, const void* packed) {
  if (call.ids.count == 0) return {};
  const bool whole = call.width % 4 == 0 && aligned(call.bits, 4) && aligned(packed, 4);
  RowGrid shape;
  DUALBIN_TRY(make_row_grid(call.ids.count, (call.width + kScaleBytes) / (whole ? 4 : 1), &shape));
  (whole ? words : bytes)<<<shape.grid, shape.block, 0, stream>>>(call);
  DUALBIN_CUDA_LAUNCHED("rows that travel");
  return {};
}

}  // namespace

Status CudaBackend::route(const Launch& launch, const RouteCall& call) const {
  DUALBIN_TRY(call.check());
  Workspace workspace;
  DUALBIN_TRY(open_workspace(Op::kReduceRows, launch, call.ids.count, call.rows, 1, &workspace));
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  Groups groups;
  DUALBIN_TRY(make_groups(stream, workspace, call.ids, call.rows, nullptr, &groups));
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const unsigned grid = grid_size(std::max(call.ids.count, call.places) + 1, Policy::kThreads, Policy::kBlocksPerSm * processors);
  DUALBIN_CUDA_TRY(launch_after(cut_ranks, grid, Policy::kThreads, 0, stream, groups, call));
  if (call.capacity > 0) DUALBIN_CUDA_TRY(launch_after(fill_places, grid, Policy::kThreads, 0, stream, groups, call));
  return {};
}

Status CudaBackend::slot_means(const Launch& launch, const SlotMeansCall& call) const {
  DUALBIN_TRY(call.check());
  const SegmentSumCall& sums = call.sums;
  if (sums.segments == 0) return {};
  Workspace workspace;
  DUALBIN_TRY(open_workspace(Op::kSegmentSum, launch, sums.slots.count, sums.segments, sums.dim, &workspace));
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto bytes = static_cast<size_t>(sums.segments * sums.dim) * (call.type == FloatType::kF32 ? 4 : 2);
  DUALBIN_CUDA_TRY(cudaMemsetAsync(call.out, 0, bytes, stream));
  if (sums.slots.count == 0) return {};
  Groups groups;
  DUALBIN_TRY(make_groups(stream, workspace, sums.slots, sums.segments, nullptr, &groups));
  const Gradient gradient = make_gradient(workspace, sums.dy, sums.dim, static_cast<const float*>(call.out));
  DUALBIN_TRY(sum_long_rows(stream, groups, gradient, workspace.partials));
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  return with_columns(gradient, [&](auto format, auto columns) -> Status {
    const int64_t tiles = tile_count(std::min(sums.slots.count, sums.segments), sums.dim, columns.value);
    const unsigned grid = grid_size(tiles, Tuning::RowSum::kWarps, Tuning::RowSum::kBlocksPerSm * processors);
    DUALBIN_CUDA_TRY(launch_after(kernels::slot_means<decltype(format), columns.value>, grid, Tuning::RowSum::kThreads, 0, stream, groups,
                                  gradient, call.divisor, call.type, call.out));
    return {};
  });
}

Status CudaBackend::take_rows(const Launch& launch, const TakeRowsCall& call) const {
  DUALBIN_TRY(call.check());
  return launch_rows(static_cast<cudaStream_t>(launch.stream), kernels::take_rows<uint32_t>, kernels::take_rows<uint8_t>, call, call.out);
}

Status CudaBackend::put_rows(const Launch& launch, const PutRowsCall& call) const {
  DUALBIN_TRY(call.check());
  return launch_rows(static_cast<cudaStream_t>(launch.stream), kernels::put_rows<uint32_t>, kernels::put_rows<uint8_t>, call, call.packed);
}

}  // namespace dualbin::kernels
