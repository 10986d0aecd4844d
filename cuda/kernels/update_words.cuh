// Updates of counters with 32 columns of a row a thread: one word of each plane, arithmetic of rules/word.h.
//
// A team takes a row: 1 to 32 lanes of a warp for up to 1024 columns, all warps of a block beyond that. A warp goes through a batch of
// rows: (0) lane i loads what belongs to row i; then, for as many rows as it holds teams at once, (1) the sums of the rows, read across the
// columns and handed over in shared memory so that each lane gets its own 32, and the largest magnitude; (2) the integer sums; (3) the
// row's coefficients, without its scale; (4) the flips. At the end (5) lane i finishes scale and record of row i: this is double
// precision, which costs one row as much as 32.
#pragma once

#include "kernels/overlap.cuh"
#include "kernels/word_team.cuh"
#include "rules/word_row.h"

namespace dualbin::kernels {

struct WordArgs {
  UpdateArgs update;
  int lanes;             // of a row within its warp
  int rounds;            // of a batch: 32 / lanes rows each
  uint64_t inverse_dim;  // see inverse_of()
};

// What is the same for all rows of a launch.
struct WordConstants {
  RowKey key;
  uint64_t rate;
  float rate_float;
  uint32_t share;
  double scale_rate;
  int64_t first_row;
  bool trains_scale;
};

constexpr int32_t kSkipped = INT32_MAX;  // as an exponent: phase 5 leaves the row alone

template <bool kBlock>
struct WarpShared {
  float4 tile[kWordColumns * 9];  // 32 floats a lane, and 16 bytes more every 128 so that neither way of access meets a bank twice
  BatchRow rows[kBlock ? WordPolicy::kBlockRounds : 32];
};

__device__ __forceinline__ WordConstants word_constants(const UpdateArgs& args) {
  const StepContext context = args.step_context();
  WordConstants c;
  c.key = step_key(context.seed, context.step);
  c.rate = step_rate(args.rule.bits == 1 ? 1.0f : context.lr, args.rule.eta);
  c.rate_float = static_cast<float>(c.rate);
  c.share = step_share(context.lr);
  c.scale_rate = static_cast<double>(context.lr) * static_cast<double>(context.scale_lr);
  c.first_row = global_row(context, 0);
  c.trains_scale = args.state.record != nullptr && context.scale_lr > 0.0f;
  return c;
}

// Phase 0: segment s of the groups. Past the last one a row without occurrences.
__device__ __forceinline__ BatchRow load_batch_row(const UpdateArgs& args, const WordConstants& constants, int64_t s, int64_t count) {
  BatchRow r = {};
  r.exponent = kSkipped;
  if (s >= count) return r;
  r.begin = args.groups.begin(s);
  r.occurrences = static_cast<uint32_t>(args.groups.end(s) - r.begin);
  r.row = args.groups.row(s);
  r.position = args.groups.position(r.begin);
  int4 record = {};  // on its way with the scale, not after it
  if (args.state.record != nullptr) record = reinterpret_cast<const int4*>(args.state.record)[r.row];
  r.scale = args.table.scale[r.row];
  if (r.scale == 0.0f) return r;
  r.key = row_key(constants.key, constants.first_row + r.row);
  if (args.state.record != nullptr) {
    r.count = record.x;
    r.squares = __int_as_float(record.y);
    r.scale_m = __int_as_float(record.z);
    r.scale_v = __int_as_float(record.w);
  } else {
    if (args.state.count != nullptr) r.count = args.state.count[r.row];
    if (args.state.squares != nullptr) r.squares = args.state.squares[r.row];
  }
  if (r.count != INT32_MAX) ++r.count;
  if (args.rule.anneal_q8 > 0) r.growth = zone_growth(args.rule.anneal_q8, r.count);
  return r;
}

// Where a lane's words of a row lie: plane p of all, the sign first, then magnitudes from the most significant on. kRagged: rows are not
// whole words, or do not start at multiples of four bytes.
template <bool kRagged>
struct LaneWords {
  uint8_t* table;
  uint8_t* counter;
  int width;
  int served;
  int bytes;       // of the words that belong to the row, 0 to 4
  uint32_t valid;  // columns

  __device__ __forceinline__ LaneWords(const UpdateArgs& args, int64_t row, int word) {
    const auto dim = static_cast<int>(args.table.dim);
    width = (dim + 7) / 8;
    served = args.table.planes;
    table = args.table.bits + row * (width * served) + 4 * word;
    counter = args.state.counter + row * (width * (args.rule.bits - served)) + 4 * word;
    const int columns = dim - kWordColumns * word;
    bytes = columns <= 0 ? 0 : columns >= kWordColumns ? 4 : (columns + 7) / 8;
    valid = !kRagged || columns >= kWordColumns ? ~0u : columns <= 0 ? 0u : (1u << columns) - 1;
  }
  // Calls body(i, where plane `levels` - i lies) for the magnitudes, i up to kLevels known to the compiler, the least significant first: a
  // pointer that walks is cheaper than one made for every plane.
  template <int kLevels, typename Body>
  __device__ __forceinline__ void each_magnitude(int levels, Body&& body) const {
    uint8_t* at = counter + (levels - served) * width;
#pragma unroll
    for (int i = 0; i < kLevels; ++i) {
      if (levels - i == served - 1) at = table + (served - 1) * width;
      if (i < levels) body(i, at);
      at -= width;
    }
  }
  __device__ __forceinline__ uint32_t load(const uint8_t* from) const {
    if constexpr (!kRagged) return *reinterpret_cast<const uint32_t*>(from);
    uint32_t word = 0;
    for (int b = 0; b < bytes; ++b) word |= static_cast<uint32_t>(from[b]) << (8 * b);
    return word & valid;
  }
  __device__ __forceinline__ void store(uint8_t* to, uint32_t word) const {
    if constexpr (!kRagged) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
      for (int b = 0; b < bytes; ++b) to[b] = static_cast<uint8_t>(word >> (8 * b));
    }
  }
};

// Phase 3: what the row's words need. `squares` becomes the row's sum with this update.
__device__ __forceinline__ WordStep finish_word_row(const WordArgs& args, const WordConstants& constants, const BatchRow& row,
                                                    const RowSums& sums, int exponent, float* squares) {
  const Rule& rule = args.update.rule;
  const int32_t rms = floor_root(static_cast<uint32_t>(floor_divide(sums.squares, args.inverse_dim)));
  uint32_t coef = floor_quotient(constants.rate, constants.rate_float, rms);
  if (rule.norm == static_cast<int32_t>(Norm::kAdagrad)) {
    *squares = add_squares(*squares, sums.squares, args.update.table.dim, exponent);
    coef = static_cast<uint32_t>(bounded_by_squares(coef, constants.rate, *squares, exponent));
  }
  WordStep step;
  step.key = row.key;
  step.coef = static_cast<int32_t>(coef);
  step.zone = zone_of(rule.dead_zone_q8 + row.growth, rms);
  step.share = constants.share;
  const auto mean = rule.center ? static_cast<int32_t>(sums.aligned / args.update.table.dim) : 0;
  step.offset = row.scale < 0.0f ? -mean : mean;
  return step;
}

// Phase 4: the planes of a lane after the step, least significant first, stored.
template <bool kRagged, int kLevels>
__device__ __forceinline__ void store_words(const LaneWords<kRagged>& lane, int levels, uint32_t signs, const uint32_t (&planes)[8]) {
  lane.store(lane.table, signs);
  lane.template each_magnitude<kLevels>(levels, [&](int i, uint8_t* at) { lane.store(at, planes[i] & lane.valid); });
}

// The same for an update that leaves the table alone: what differs goes to the mask at the row's first occurrence.
template <bool kRagged, int kLevels>
__device__ __forceinline__ void store_mask(const UpdateArgs& args, const LaneWords<kRagged>& lane, int64_t position, int word, int levels,
                                           uint32_t signs, const uint32_t (&planes)[8]) {
  uint8_t* mask = args.out.mask + position * args.table.row_bytes() + 4 * word;
  lane.store(mask, signs ^ lane.load(lane.table));
  lane.template each_magnitude<kLevels>(levels, [&](int i, uint8_t* at) {
    const int p = levels - i;
    const uint32_t after = planes[i] & lane.valid;
    if (p < lane.served) {
      lane.store(mask + p * lane.width, after ^ lane.load(at));
    } else {
      lane.store(at, after);
    }
  });
}

// Columns whose magnitude is the largest possible.
template <int kLevels>
__device__ __forceinline__ uint32_t at_most(const uint32_t (&planes)[8], int levels) {
  uint32_t all = kLevels == 0 ? 0u : ~0u;
#pragma unroll
  for (int i = 0; i < kLevels; ++i) {
    if (i < levels) all &= planes[i];
  }
  return all;
}

// Phase 5, lane i for row i of its warp: record and scale.
__device__ __forceinline__ void finish_batch_row(const UpdateArgs& args, const WordConstants& constants, BatchRow r) {
  float scale = r.scale;
  if (r.exponent != kSkipped) {
    if (constants.trains_scale) {
      const double gradient = static_cast<double>(r.aligned) * power_of_two_double(r.exponent - kGradientBits - (args.table.planes - 1));
      scale =
          adam_scale(scale, gradient, constants.scale_rate, static_cast<uint32_t>(r.count), {&r.count, &r.squares, &r.scale_m, &r.scale_v});
      if (args.out.mask == nullptr) args.table.scale[r.row] = scale;
    }
    if (args.state.record != nullptr) {
      reinterpret_cast<int4*>(args.state.record)[r.row] =
          make_int4(r.count, __float_as_int(r.squares), __float_as_int(r.scale_m), __float_as_int(r.scale_v));
    } else {
      if (args.state.count != nullptr) args.state.count[r.row] = r.count;
      if (args.state.squares != nullptr) args.state.squares[r.row] = r.squares;
    }
  }
  if (args.out.new_scale != nullptr) args.out.new_scale[r.position] = scale;
}

// The rows of a warp: `size` from `begin` on, `at_once` of them in a round, as far as there are any.
struct Batch {
  int at_once, size;
  int64_t begin, count;

  __device__ bool has(int i) const { return i < size && begin + i < count; }
};

// Whether this block has rows.
template <bool kBlock>
__device__ __forceinline__ bool find_batch(const WordArgs& args, Batch* batch) {
  batch->at_once = kBlock ? 1 : 32 / args.lanes;
  batch->size = batch->at_once * args.rounds;
  wait_for_previous();
  batch->count = args.update.groups.count();
  const int64_t warp = kBlock ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32);
  batch->begin = (kBlock ? warp : warp + threadIdx.x / 32) * batch->size;
  return warp * batch->size < batch->count;
}

// Phase 1: what the rows of a batch need, a lane a row.
__device__ __forceinline__ void load_batch(const UpdateArgs& args, const Batch& batch, WordConstants& constants, BlockStats& block_stats,
                                           BatchRow* rows) {
  if (threadIdx.x == 0) {
    constants = word_constants(args);
    block_stats = {};
  }
  __syncthreads();
  const int of_lane = threadIdx.x % 32;
  if (of_lane < batch.size) rows[of_lane] = load_batch_row(args, constants, batch.begin + of_lane, batch.count);
  __syncwarp();
}

// kLevels: magnitude planes that the code has room for. kShaped: there is a dead zone or a mean.
template <typename Width, bool kBlock, bool kRagged, int kLevels, bool kShaped>
__global__ void __launch_bounds__(kBlock ? WordPolicy::kBlockThreads : WordPolicy::kThreads,
                                  kBlock ? WordPolicy::kBlockThreadsPerSm / WordPolicy::kBlockThreads
                                         : WordPolicy::kThreadsPerSm / WordPolicy::kThreads)
    update_words(const __grid_constant__ WordArgs args) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ WordConstants constants;
  __shared__ BlockStats block_stats;
  __shared__ uint32_t largest_of_warps[kBlock ? WordPolicy::kBlockThreads / 32 : 1];
  __shared__ uint4 sums_of_warps[kBlock ? WordPolicy::kBlockThreads / 32 : 1];
  const UpdateArgs& update = args.update;
  const WordTeam<kBlock> team(args.lanes);
  WarpShared<kBlock>& own = reinterpret_cast<WarpShared<kBlock>*>(dynamic)[threadIdx.x / 32];
  Batch batch;
  if (!find_batch<kBlock>(args, &batch)) return;
  load_batch(update, batch, constants, block_stats, own.rows);

  const int levels = kLevels == 0 ? 0 : update.rule.bits - 1;
  uint32_t counted = 0;  // four counts of eight bits: a lane sees at most 128 columns
#pragma unroll 1
  for (int first = 0; batch.has(first); first += batch.at_once) {
    BatchRow& row = own.rows[first + team.slot];
    bool active = row.occurrences != 0 && row.scale != 0.0f;
    const bool raw = start_gather<Width, kRagged>(update, team, row, active, own.tile);
    uint32_t signs = 0;
    uint32_t planes[8] = {};
    if (const LaneWords<kRagged> lane(update, row.row, team.word()); active && lane.bytes > 0) {
      signs = lane.load(lane.table);
      lane.template each_magnitude<kLevels>(levels, [&](int i, const uint8_t* at) { planes[i] = lane.load(at); });
    }

    float x[kWordColumns];
    finish_gather<Width>(update.gradient, own.tile, raw, x);
    const uint32_t largest = largest_of(team, x, largest_of_warps);
    if (active && max(largest, float_bits(row.scale) & 0x7fffffffu) >= kInfinityBits) {
      active = false;
      counted += team.leads() ? 1u << 24 : 0u;
    }

    const Quantiser quantise = make_quantiser(largest);
    if (quantise.second != 1.0f) {
#pragma unroll
      for (int k = 0; k < kWordColumns; ++k) x[k] *= quantise.second;
    }
    const bool negative = row.scale < 0.0f;
    uint32_t f[kWordPairs];
    quantise_word(x, turned_columns(signs, negative), quantise.first, f);
    RowSums sums;
    sums.squares = sum_word_squares(f);
    sums.aligned = sum_word(f);
    if constexpr (kLevels > 0) {
      magnitudes_of(planes, kLevels, planes);
      if (update.table.planes > 1) sums.aligned += 2 * sum_word_magnitudes(f, planes, update.rule.bits - update.table.planes);
    }
    if (!negative) sums.aligned = -sums.aligned;
    sums = sum_team(team, sums, sums_of_warps);

    float squares = row.squares;
    WordStep step = finish_word_row(args, constants, row, sums, quantise.exponent, &squares);
    step.key.k0 += static_cast<uint32_t>(team.word()) * (kWordPairs * kPairStride);
    __syncwarp();  // the row is read above by all lanes, and written below by one
    if (active && team.leads()) {
      row.aligned = sums.aligned;
      row.exponent = quantise.exponent;
      row.squares = squares;
      counted += 1u << 16;
    }

    uint32_t flips;
    if constexpr (kLevels == 0) {
      flips = step_signs<kShaped>(step, f);
    } else {
      flips = step_magnitudes<kShaped>(step, f, levels, planes);
    }
    // Made again, of a row that the compiler has to read again: kept through the arithmetic it would cost registers that are not there.
    const LaneWords<kRagged> lane(update, *static_cast<const volatile int64_t*>(&row.row), team.word());
    if (active && lane.bytes > 0) {
      flips &= lane.valid;
      if (update.out.mask == nullptr) {
        store_words<kRagged, kLevels>(lane, levels, signs ^ flips, planes);
      } else {
        store_mask<kRagged, kLevels>(update, lane, row.position, team.word(), levels, signs ^ flips, planes);
      }
      counted += __popc(flips) + (__popc(at_most<kLevels>(planes, levels) & lane.valid) << 8);
    }
  }
  __syncwarp();
  if (const int of_lane = threadIdx.x % 32; team.warp == 0 && batch.has(of_lane)) finish_batch_row(update, constants, own.rows[of_lane]);
  add_stats(update.out.stats, {counted & 0xffu, counted >> 16 & 0xffu, counted >> 24, counted >> 8 & 0xffu}, block_stats);
}

using WordKernel = void (*)(WordArgs);

template <bool kBlock>
constexpr size_t word_shared_bytes(int threads) {
  return static_cast<size_t>(threads) / 32 * sizeof(WarpShared<kBlock>);
}

// The kernel for gradients of this width. Ragged rows take the code that has room for everything.
template <typename Width, bool kBlock>
WordKernel word_kernel(const Rule& rule, bool ragged) {
  const bool shaped = rule.dead_zone_q8 > 0 || rule.anneal_q8 > 0 || rule.center;
  if (ragged) return rule.bits == 1 ? update_words<Width, kBlock, true, 0, true> : update_words<Width, kBlock, true, 7, true>;
  const auto pick = [&](WordKernel plain, WordKernel with_shape) { return shaped ? with_shape : plain; };
  if (rule.bits == 1) return pick(update_words<Width, kBlock, false, 0, false>, update_words<Width, kBlock, false, 0, true>);
  if (rule.bits <= 4) return pick(update_words<Width, kBlock, false, 3, false>, update_words<Width, kBlock, false, 3, true>);
  return pick(update_words<Width, kBlock, false, 7, false>, update_words<Width, kBlock, false, 7, true>);
}

// The kernel for averages, and the shared memory that it takes.
WordKernel average_word_kernel(FloatType type, bool block);
size_t average_shared_bytes(bool block, int threads);

WordKernel wide_word_kernel(const Rule& rule, bool block, bool ragged);
WordKernel narrow_word_kernel(const Rule& rule, bool block, bool ragged);

}  // namespace dualbin::kernels
