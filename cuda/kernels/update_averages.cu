// Updates of averages (Bop) with 32 columns of a row a thread, in the phases of update_words.cuh. What differs is phase 4: the averages,
// four bytes a weight and most of what moves, come into a tile of their own beside the gradient's, across the columns, and leave by it.
#include "kernels/update_words.cuh"

namespace dualbin::kernels {

namespace {

template <bool kBlock>
struct AverageShared {
  WarpShared<kBlock> words;
  float4 averages[kWordColumns * 9];  // as the tile
};

// Units of 16 bytes of a row of floats that a lane moves: calls body(place in the tile, column) for those of the row.
template <bool kBlock, typename Body>
__device__ __forceinline__ void each_unit(const WordTeam<kBlock>& team, int dim, Body&& body) {
  constexpr int kUnits = kWordColumns / 4;
  const int column = 32 * kWordColumns * team.warp + 4 * team.lane;
  const int unit = team.slot * team.lanes * kUnits + team.lane;
#pragma unroll
  for (int p = 0; p < kUnits; ++p) {
    if (column + 4 * p * team.lanes < dim) body(unit_in_tile(unit + p * team.lanes), column + 4 * p * team.lanes);
  }
}

// Phase 4: the averages of a lane, in the tile, and which columns flip.
__device__ __forceinline__ uint32_t step_averages(const RowStep& step, float tau, const uint32_t (&f)[kWordPairs], uint32_t signs,
                                                  float4* averages) {
  const float inverse = 1.0f / static_cast<float>(step.rms);
  uint32_t flips = 0;
#pragma unroll
  for (int k = 0; k < kWordColumns; k += 4) {
    const float4 before = averages[k / 4];
    float values[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = k + i;
      const bool positive = (signs >> c & 1u) != 0;
      const int32_t turned = signed_half(f[c / 2], c % 2);  // q, with its sign turned where the weight is positive
      const float x = rounded_quotient(positive ? -turned : turned, step.rms, inverse);
      flips |= static_cast<uint32_t>(bop_weight(step, tau, x, positive, &values[i])) << c;
    }
    averages[k / 4] = make_float4(values[0], values[1], values[2], values[3]);
  }
  return flips;
}

template <typename Width, bool kBlock>
__global__ void __launch_bounds__(WordPolicy::kThreads, WordPolicy::kAverageThreadsPerSm / WordPolicy::kThreads)
    update_averages(const __grid_constant__ WordArgs args) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ WordConstants constants;
  __shared__ BlockStats block_stats;
  __shared__ uint32_t largest_of_warps[WordPolicy::kThreads / 32];
  __shared__ uint4 sums_of_warps[WordPolicy::kThreads / 32];
  const UpdateArgs& update = args.update;
  const auto dim = static_cast<int>(update.table.dim);
  const WordTeam<kBlock> team(args.lanes);
  AverageShared<kBlock>& shared = reinterpret_cast<AverageShared<kBlock>*>(dynamic)[threadIdx.x / 32];
  WarpShared<kBlock>& own = shared.words;
  Batch batch;
  if (!find_batch<kBlock>(args, &batch)) return;
  load_batch(update, batch, constants, block_stats, own.rows);
  const float rate = update.step_context().lr * update.rule.gamma;
  const int of_lane = threadIdx.x % 32;

  ThreadStats stats;
#pragma unroll 1
  for (int first = 0; batch.has(first); first += batch.at_once) {
    BatchRow& row = own.rows[first + team.slot];
    bool active = row.occurrences != 0 && row.scale != 0.0f;
    float* averages = update.state.ema + row.row * dim;
    if (active) {
      each_unit(team, dim, [&](int place, int column) { copy_async(shared.averages + place, averages + column, true); });
    }
    const bool raw = start_gather<Width, false>(update, team, row, active, own.tile);
    const LaneWords<false> lane(update, row.row, team.word());
    const uint32_t signs = active && lane.bytes > 0 ? lane.load(lane.table) : 0;

    float x[kWordColumns];
    finish_gather<Width>(update.gradient, own.tile, raw, x);
    const uint32_t largest = largest_of(team, x, largest_of_warps);
    if (active && max(largest, float_bits(row.scale) & 0x7fffffffu) >= kInfinityBits) {
      active = false;
      if (team.leads()) ++stats.skipped;
    }
    const Quantiser quantise = make_quantiser(largest);
    if (quantise.second != 1.0f) {
#pragma unroll
      for (int k = 0; k < kWordColumns; ++k) x[k] *= quantise.second;
    }
    uint32_t f[kWordPairs];
    quantise_word(x, signs, quantise.first, f);
    RowSums sums;
    sums.squares = sum_word_squares(f);
    sums.aligned = -static_cast<int64_t>(sum_word(f));
    sums = sum_team(team, sums, sums_of_warps);

    RowStep step;
    step.rms = floor_root(static_cast<uint32_t>(floor_divide(sums.squares, args.inverse_dim)));
    const float mean = 1.0f / static_cast<float>(row.count);
    step.gamma = rate > mean ? rate : mean;
    step.negative = row.scale < 0.0f;
    __syncwarp();  // the row is read above by all lanes, and written below by one
    if (active && team.leads()) {
      row.aligned = sums.aligned;
      row.exponent = quantise.exponent;
      ++stats.rows;
    }

    if (active && lane.bytes > 0) {
      const uint32_t flips = step_averages(step, update.rule.tau, f, signs, shared.averages + of_lane * 9);
      stats.flips += __popc(flips);
      const uint32_t none[8] = {};
      if (update.out.mask == nullptr) {
        store_words<false, 0>(lane, 0, signs ^ flips, none);
      } else {
        store_mask<false, 0>(update, lane, row.position, team.word(), 0, signs ^ flips, none);
      }
    }
    __syncwarp();
    if (active) {
      each_unit(team, dim, [&](int place, int column) { *reinterpret_cast<float4*>(averages + column) = shared.averages[place]; });
    }
    __syncwarp();  // before the next round's copies
  }
  if (team.warp == 0 && batch.has(of_lane)) finish_batch_row(update, constants, own.rows[of_lane]);
  add_stats(update.out.stats, stats, block_stats);
}

}  // namespace

WordKernel average_word_kernel(FloatType type, bool block) {
  const bool wide = type == FloatType::kF32;
  if (block) return wide ? update_averages<Wide, true> : update_averages<Narrow, true>;
  return wide ? update_averages<Wide, false> : update_averages<Narrow, false>;
}

size_t average_shared_bytes(bool block, int threads) {
  return static_cast<size_t>(threads) / 32 * (block ? sizeof(AverageShared<true>) : sizeof(AverageShared<false>));
}

}  // namespace dualbin::kernels
