// Updates of packed rows on the GPU. A team of threads, a warp or a block, takes a row through its four phases without leaving the chip:
// the row's sum and its largest magnitude, the integer sums over the quantised row, the row's coefficients and new scale, the flips.
#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/row_sum.cuh"
#include "kernels/team.cuh"
#include "kernels/tuning.h"
#include "rules/row.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::Update;

struct UpdateArgs {
  Table table;
  State state;
  Rule rule;
  const StepContext* context;
  UpdateOut out;
  Groups groups;
  Gradient gradient;
  float* row_buffers;  // one row a block, or null: rows are in shared memory
};

// What a thread counts over all its rows.
struct ThreadStats {
  uint64_t flips = 0;
  uint64_t rows = 0;
  uint64_t skipped = 0;
  uint64_t clipped = 0;
};

// One row on its way through the phases.
struct RowWork {
  int64_t row;
  int64_t begin;
  int64_t end;
  float scale;
  float* sum;  // [dim], shared by the team
};

// Phase 1: the row's sum into work.sum. Returns the largest magnitude of this thread's columns.
template <typename Format, int kCount, typename Team>
__device__ __forceinline__ uint32_t gather(const UpdateArgs& args, const Team& team, const RowWork& work) {
  uint32_t largest = 0;
  for (int64_t column = team.rank * kCount; column < args.table.dim; column += team.size * kCount) {
    float sum[kCount];
    sum_row<Format>(args.groups, args.gradient, work.begin, work.end, column, sum);
    store_floats(work.sum + column, sum);
#pragma unroll
    for (int k = 0; k < kCount; ++k) largest = max(largest, float_bits(sum[k]) & 0x7fffffffu);
  }
  return largest;
}

template <typename Team>
__device__ __forceinline__ uint32_t gather_any(const UpdateArgs& args, const Team& team, const RowWork& work) {
  return with_float(args.gradient.type, [&](auto format) {
    using Format = decltype(format);
    return args.gradient.vector ? gather<Format, Format::kVector>(args, team, work) : gather<Format, 1>(args, team, work);
  });
}

// Phase 2: this thread's part of the sums over the quantised row.
template <typename Team>
__device__ __forceinline__ RowSums integer_sums(const Table& table, const Team& team, const RowWork& work, const Quantiser& quantise) {
  const uint8_t* bits = table.bits + work.row * table.row_bytes();
  RowSums sums;
  for (int64_t d = team.rank; d < table.dim; d += team.size) {
    sums.add(quantise(work.sum[d]), weight_of(bits + d / 8, table.width(), table.planes, static_cast<int>(d % 8)));
  }
  return sums;
}

// Phase 4: the flips, to the table or to the mask of the row's first occurrence.
template <typename Team>
__device__ __forceinline__ void flip_row(const UpdateArgs& args, const Rule& rule, const Table& table, const Team& team,
                                         const RowWork& work, const Quantiser& quantise, const RowStep& step, ThreadStats* stats) {
  const int64_t width = table.width();
  uint8_t* bits = table.bits + work.row * table.row_bytes();
  uint8_t* mask_out = args.out.mask == nullptr ? nullptr : args.out.mask + args.groups.position(work.begin) * table.row_bytes();
  for (int64_t b = team.rank; b < width; b += team.size) {
    const ByteStep changed = step_byte(rule, step, quantise, table, args.state, work.row, b, work.sum);
    stats->flips += static_cast<uint64_t>(__popc(changed.change[0]));
    stats->clipped += changed.clipped;
#pragma unroll
    for (int p = 0; p < kMaxPlanes; ++p) {
      if (p >= table.planes) break;
      if (mask_out != nullptr) {
        mask_out[p * width + b] = changed.change[p];
      } else {
        bits[p * width + b] ^= changed.change[p];
      }
    }
  }
}

// The scale after the update, for every occurrence.
template <typename Team>
__device__ __forceinline__ void write_new_scale(const UpdateArgs& args, const Team& team, const RowWork& work, float scale) {
  if (args.out.new_scale == nullptr) return;
  for (int64_t i = work.begin + team.rank; i < work.end; i += team.size) args.out.new_scale[args.groups.position(i)] = scale;
}

// Takes one row through all phases. Every return is taken by the whole team.
template <typename Team>
__device__ __forceinline__ void update_row(const UpdateArgs& args, const Rule& rule, const Table& table, const Team& team,
                                           const RowWork& work, ThreadStats* stats) {
  if (work.scale == 0.0f) return write_new_scale(args, team, work, work.scale);
  const uint32_t largest = team.max(gather_any(args, team, work));
  if (max(largest, float_bits(work.scale) & 0x7fffffffu) >= kInfinityBits) {
    if (team.rank == 0) ++stats->skipped;
    return write_new_scale(args, team, work, work.scale);
  }
  const Quantiser quantise = make_quantiser(largest);
  const RowSums sums = team.sum(integer_sums(table, team, work, quantise));
  if (team.rank == 0) {  // phase 3
    const StepContext context = *args.context;
    const RowStep step = finish_row(rule, context, args.state, table, work.row, work.scale, sums, quantise.exponent);
    team.shared->step = step;
    if (args.out.mask == nullptr) table.scale[work.row] = step.new_scale;
    ++stats->rows;
  }
  team.sync();
  const RowStep step = team.shared->step;
  flip_row(args, rule, table, team, work, quantise, step, stats);
  write_new_scale(args, team, work, step.new_scale);
}

__device__ __forceinline__ void add_to(uint64_t* total, uint64_t value) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0 && value != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(value));
  }
}

// kKind and kBits repeat args.rule as constants, and kOnePlane the planes of the table, so that step_byte keeps a byte's planes in
// registers.
template <bool kWholeBlock, RuleKind kKind, int kBits, bool kOnePlane>
__global__ void __launch_bounds__(Policy::kMostThreads, Policy::kBlocksAtOnce) update_rows(const __grid_constant__ UpdateArgs args) {
  extern __shared__ float4 shared_rows[];
  __shared__ TeamShared shared[kWholeBlock ? 1 : Policy::kWarpTeams];
  const Team<kWholeBlock> team(shared);
  const int64_t dim = args.table.dim;
  float* buffer = args.row_buffers == nullptr ? reinterpret_cast<float*>(shared_rows) + team.index * dim
                                              : args.row_buffers + static_cast<int64_t>(blockIdx.x) * dim;
  Rule rule = args.rule;
  rule.kind = kKind;
  rule.bits = kBits;
  Table table = args.table;
  if (kOnePlane) table.planes = 1;
  ThreadStats stats;
  const int64_t count = args.groups.count();
  const int64_t teams = static_cast<int64_t>(gridDim.x) * team.per_block;
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * team.per_block + team.index; s < count; s += teams) {
    const int64_t row = args.groups.row(s);
    const RowWork work{row, args.groups.begin(s), args.groups.end(s), args.table.scale[row], buffer};
    update_row(args, rule, table, team, work, &stats);
    team.sync();  // the next row overwrites the buffer and the shared values
  }
  if (args.out.stats == nullptr) return;
  __syncwarp();
  add_to(&args.out.stats->flips, stats.flips);
  add_to(&args.out.stats->rows, stats.rows);
  add_to(&args.out.stats->skipped, stats.skipped);
  add_to(&args.out.stats->clipped, stats.clipped);
}

using Kernel = void (*)(UpdateArgs);

template <bool kWholeBlock, bool kOnePlane>
Kernel counter_kernel(int bits) {
  static constexpr Kernel kKernels[kMaxPlanes] = {
      update_rows<kWholeBlock, RuleKind::kCounter, 1, true>,      update_rows<kWholeBlock, RuleKind::kCounter, 2, kOnePlane>,
      update_rows<kWholeBlock, RuleKind::kCounter, 3, kOnePlane>, update_rows<kWholeBlock, RuleKind::kCounter, 4, kOnePlane>,
      update_rows<kWholeBlock, RuleKind::kCounter, 5, kOnePlane>, update_rows<kWholeBlock, RuleKind::kCounter, 6, kOnePlane>,
      update_rows<kWholeBlock, RuleKind::kCounter, 7, kOnePlane>, update_rows<kWholeBlock, RuleKind::kCounter, 8, kOnePlane>,
  };
  return kKernels[bits - 1];
}

template <bool kWholeBlock>
Kernel kernel_for(const Rule& rule, int planes) {
  if (rule.kind == RuleKind::kBop) return update_rows<kWholeBlock, RuleKind::kBop, 1, true>;
  if (rule.kind == RuleKind::kSign) return update_rows<kWholeBlock, RuleKind::kSign, 1, true>;
  return planes == 1 ? counter_kernel<kWholeBlock, true>(rule.bits) : counter_kernel<kWholeBlock, false>(rule.bits);
}

// `buffers` row buffers, 0 if rows are in shared memory.
Status launch_update(cudaStream_t stream, const UpdateArgs& args, int64_t ids, int64_t buffers) {
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const int64_t dim = args.table.dim;
  const size_t row_bytes = static_cast<size_t>(dim) * sizeof(float);
  if (dim <= Policy::kWarpRowLimit) {
    constexpr int kThreads = 32 * Policy::kWarpTeams;
    const Kernel kernel = kernel_for<false>(args.rule, args.table.planes);
    const unsigned grid = grid_size(ids, Policy::kWarpTeams, Policy::kThreadsPerSm / kThreads * processors);
    kernel<<<grid, kThreads, Policy::kWarpTeams * row_bytes, stream>>>(args);
  } else {
    // A thread flips eight columns, a packed byte, at a time.
    const Kernel kernel = kernel_for<true>(args.rule, args.table.planes);
    const int threads = static_cast<int>(std::min<int64_t>(Policy::kMostThreads, (dim + 255) / 256 * 32));
    const unsigned grid = grid_size(ids, 1, buffers > 0 ? buffers : Policy::kThreadsPerSm / threads * processors);
    const size_t shared_bytes = buffers > 0 ? 0 : row_bytes;
    kernel<<<grid, threads, shared_bytes, stream>>>(args);
  }
  DUALBIN_CUDA_LAUNCHED("update_rows");
  return {};
}

__global__ void advance_step(int64_t* step) { ++*step; }

}  // namespace

Status CudaBackend::advance(const Launch& launch, const AdvanceCall& call) const {
  DUALBIN_TRY(call.check());
  advance_step<<<1, 1, 0, static_cast<cudaStream_t>(launch.stream)>>>(call.step);
  DUALBIN_CUDA_LAUNCHED("advance_step");
  return {};
}

Status CudaBackend::update(const Launch& launch, const UpdateCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  const Ids& ids = call.ids;
  const UpdateOut& out = call.out;
  Workspace workspace;
  DUALBIN_TRY(open_workspace(Op::kUpdate, launch, ids.count, table.rows, table.dim, &workspace));
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (out.stats != nullptr) DUALBIN_CUDA_TRY(cudaMemsetAsync(out.stats, 0, sizeof(Stats), stream));
  if (ids.count == 0) return {};
  const size_t count = static_cast<size_t>(ids.count);
  if (out.mask != nullptr) {
    DUALBIN_CUDA_TRY(cudaMemsetAsync(out.mask, 0, count * static_cast<size_t>(table.row_bytes()), stream));
    DUALBIN_CUDA_TRY(cudaMemsetAsync(out.new_scale, 0, count * sizeof(float), stream));  // stays so for padding ids
  }
  UpdateArgs args{table, call.state, call.rule, call.context, out, {}, make_gradient(workspace, call.dy, table.dim, nullptr), nullptr};
  if (workspace.row_buffer_count > 0) args.row_buffers = workspace.row_buffers;
  DUALBIN_TRY(make_groups(stream, workspace, ids, table.rows, &args.groups));
  DUALBIN_TRY(sum_hot_blocks(stream, args.groups, args.gradient, workspace.partials));
  return launch_update(stream, args, ids.count, workspace.row_buffer_count);
}

}  // namespace dualbin::kernels
