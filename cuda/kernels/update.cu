// Updates of packed rows on the GPU: counters go to update_words.cuh, averages to update_averages.cu. For all else a team of threads, a
// warp or a block, takes a row through its four phases without leaving the chip: the row's sum and its largest magnitude, the integer sums
// over the quantised row, the row's coefficients and new scale, the flips.
#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/update_words.cuh"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::Update;

struct RowArgs {
  UpdateArgs update;
  float* row_buffers;  // one row a block, or null: rows are in shared memory
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

// The scale after the update, beside the mask.
template <typename Team>
__device__ __forceinline__ void write_new_scale(const UpdateArgs& args, const Team& team, const RowWork& work, float scale) {
  if (args.out.new_scale != nullptr && team.rank == 0) args.out.new_scale[args.groups.position(work.begin)] = scale;
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
    const StepContext context = args.step_context();
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

// kKind repeats args.update.rule as a constant.
template <bool kWholeBlock, RuleKind kKind>
__global__ void __launch_bounds__(Policy::kMostThreads, Policy::kBlocksAtOnce) update_rows(const __grid_constant__ RowArgs row_args) {
  extern __shared__ float4 shared_rows[];
  __shared__ TeamShared shared[kWholeBlock ? 1 : Policy::kWarpTeams];
  __shared__ BlockStats block_stats;
  if (threadIdx.x == 0) block_stats = {};
  __syncthreads();
  const UpdateArgs& args = row_args.update;
  const Team<kWholeBlock> team(shared);
  const int64_t dim = args.table.dim;
  float* buffer = row_args.row_buffers == nullptr ? reinterpret_cast<float*>(shared_rows) + team.index * dim
                                                  : row_args.row_buffers + static_cast<int64_t>(blockIdx.x) * dim;
  Rule rule = args.rule;
  rule.kind = kKind;
  Table table = args.table;
  if (kKind != RuleKind::kCounter) table.planes = 1;
  ThreadStats stats;
  const int64_t count = args.groups.count();
  const int64_t teams = static_cast<int64_t>(gridDim.x) * team.per_block;
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * team.per_block + team.index; s < count; s += teams) {
    const int64_t row = args.groups.row(s);
    const RowWork work{row, args.groups.begin(s), args.groups.end(s), args.table.scale[row], buffer};
    update_row(args, rule, table, team, work, &stats);
    team.sync();  // the next row overwrites the buffer and the shared values
  }
  __syncwarp();
  add_stats(args.out.stats, stats, block_stats);
}

using Kernel = void (*)(RowArgs);

Kernel kernel_for(RuleKind kind, bool whole_block) {
  if (kind == RuleKind::kCounter) return update_rows<true, RuleKind::kCounter>;  // update_words has the narrow ones
  if (kind == RuleKind::kBop) return whole_block ? update_rows<true, RuleKind::kBop> : update_rows<false, RuleKind::kBop>;
  return whole_block ? update_rows<true, RuleKind::kSign> : update_rows<false, RuleKind::kSign>;
}

// `buffers` row buffers, 0 if rows are in shared memory.
Status launch_rows(cudaStream_t stream, const UpdateArgs& args, float* row_buffers, int64_t buffers) {
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const int64_t dim = args.table.dim;
  const size_t row_bytes = static_cast<size_t>(dim) * sizeof(float);
  const int64_t ids = args.groups.ids;
  const RowArgs row_args{args, buffers > 0 ? row_buffers : nullptr};
  if (dim <= Policy::kWarpRowLimit) {
    constexpr int kThreads = 32 * Policy::kWarpTeams;
    const Kernel kernel = kernel_for(args.rule.kind, false);
    const unsigned grid = grid_size(ids, Policy::kWarpTeams, Policy::kThreadsPerSm / kThreads * processors);
    kernel<<<grid, kThreads, Policy::kWarpTeams * row_bytes, stream>>>(row_args);
  } else {
    // A thread flips eight columns, a packed byte, at a time.
    const Kernel kernel = kernel_for(args.rule.kind, true);
    const int threads = static_cast<int>(std::min<int64_t>(Policy::kMostThreads, (dim + 255) / 256 * 32));
    const unsigned grid = grid_size(ids, 1, buffers > 0 ? buffers : Policy::kThreadsPerSm / threads * processors);
    const size_t shared_bytes = buffers > 0 ? 0 : row_bytes;
    kernel<<<grid, threads, shared_bytes, stream>>>(row_args);
  }
  DUALBIN_CUDA_LAUNCHED("update_rows");
  return {};
}

// Whether rows are not whole words, or something of theirs does not start where words do.
bool is_ragged(const UpdateArgs& args) {
  return args.table.dim % kWordColumns != 0 || !args.gradient.vector || !aligned(args.table.bits, 4) || !aligned(args.state.counter, 4) ||
         !aligned(args.out.mask, 4);
}

bool goes_by_words(const UpdateArgs& args) {
  if (args.rule.kind == RuleKind::kCounter) return args.table.dim <= WordPolicy::kMaxDim;
  return args.rule.kind == RuleKind::kBop && args.table.dim <= WordPolicy::kMaxAverageDim && !is_ragged(args) &&
         aligned(args.state.ema, 16);
}

Status launch_words(cudaStream_t stream, const UpdateArgs& args) {
  const Table& table = args.table;
  const bool block = table.dim > 32 * kWordColumns;
  const bool averages = args.rule.kind == RuleKind::kBop;
  const bool ragged = is_ragged(args);
  int lanes = 1;
  while (lanes < 32 && lanes * kWordColumns < table.dim) lanes *= 2;
  const int rounds = block ? WordPolicy::kBlockRounds : WordPolicy::rounds(lanes);
  const WordArgs word_args{args, lanes, rounds, inverse_of(table.dim)};
  const int64_t most = std::min(args.groups.ids, table.rows);
  const WordKernel kernel = averages                                ? average_word_kernel(args.gradient.type, block)
                            : args.gradient.type == FloatType::kF32 ? wide_word_kernel(args.rule, block, ragged)
                                                                    : narrow_word_kernel(args.rule, block, ragged);
  const int threads = block ? static_cast<int>((table.dim + 32 * kWordColumns - 1) / (32 * kWordColumns)) * 32 : WordPolicy::kThreads;
  const int64_t rows_of_block = block ? rounds : WordPolicy::kThreads / 32 * (32 / lanes * rounds);
  const size_t shared_bytes = averages ? average_shared_bytes(block, threads)
                              : block  ? word_shared_bytes<true>(threads)
                                       : word_shared_bytes<false>(threads);
  const auto blocks = static_cast<unsigned>((most + rows_of_block - 1) / rows_of_block);
  DUALBIN_CUDA_TRY(launch_after(kernel, blocks, static_cast<unsigned>(threads), shared_bytes, stream, word_args));
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
  if (ids.count == 0) {
    if (out.stats != nullptr) DUALBIN_CUDA_TRY(cudaMemsetAsync(out.stats, 0, sizeof(Stats), stream));
    return {};
  }
  const size_t count = static_cast<size_t>(ids.count);
  if (out.mask != nullptr) {
    DUALBIN_CUDA_TRY(cudaMemsetAsync(out.mask, 0, count * static_cast<size_t>(table.row_bytes()), stream));
    DUALBIN_CUDA_TRY(cudaMemsetAsync(out.new_scale, 0, count * sizeof(float), stream));
  }
  UpdateArgs args{table, call.state, call.rule, call.context, {}, out, {}, make_gradient(workspace, call.dy, table.dim, nullptr)};
  if (call.context_on_host) {  // 32 bytes beside the other arguments cost nothing; a copy costs the host as much as two launches
    args.context_value = *call.context;
    args.context = nullptr;
  }
  DUALBIN_TRY(make_groups(stream, workspace, ids, table.rows, out.stats, &args.groups));
  DUALBIN_TRY(sum_long_rows(stream, args.groups, args.gradient, workspace.partials));
  if (goes_by_words(args)) return launch_words(stream, args);
  return launch_rows(stream, args, workspace.row_buffers, workspace.row_buffer_count);
}

}  // namespace dualbin::kernels
