// The threads that take a row of a counter through an update, 32 columns each: the row's sum, its largest magnitude, its integer sums.
#pragma once

#include "kernels/update.cuh"
#include "rules/word.h"

namespace dualbin::kernels {

using WordPolicy = Tuning::UpdateWords;

// A row of the batch of a warp, loaded by one lane and used by the row's team.
struct BatchRow {
  int64_t row;
  int64_t begin;         // of its occurrences in sorted order
  int64_t position;      // of its first occurrence
  int64_t aligned;       // phase 2
  uint32_t occurrences;  // 0: past the end
  float scale;           // 0: nothing to do
  RowKey key;
  int32_t growth;  // of the dead zone, in 1/256
  int32_t count;   // finished updates, this one included
  float squares;   // before; after phase 3 with this update
  float scale_m;
  float scale_v;
  int32_t exponent;  // phase 3; kSkipped
};

// Elements of a gradient in 16 bytes: four floats, or eight of either 16-bit type.
struct Wide {
  static constexpr int kVector = 4;
};
struct Narrow {
  static constexpr int kVector = 8;
};

// 16 bytes that no thread reads again soon.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// Eight values of either 16-bit type.
__device__ __forceinline__ void widen_pairs(uint4 raw, bool bfloat, float (&x)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (bfloat) {
      x[2 * k] = bits_float(words[k] << 16);
      x[2 * k + 1] = bits_float(words[k] & 0xffff0000u);
    } else {
      x[2 * k] = F16::widen(static_cast<uint16_t>(words[k] & 0xffffu));
      x[2 * k + 1] = F16::widen(static_cast<uint16_t>(words[k] >> 16));
    }
  }
}

// kVector columns, 16 bytes.
template <typename Width>
__device__ __forceinline__ void load_columns(const void* from, bool bfloat, float (&x)[Width::kVector]) {
  const uint4 raw = load_once(from);
  if constexpr (Width::kVector == 4) {
    x[0] = bits_float(raw.x);
    x[1] = bits_float(raw.y);
    x[2] = bits_float(raw.z);
    x[3] = bits_float(raw.w);
  } else {
    widen_pairs(raw, bfloat, x);
  }
}

// The threads of a row.
template <bool kBlock>
struct WordTeam {
  int lanes;  // of the row in this warp
  int lane;   // this one's place among them
  int warp;   // of the row, for a row of several
  int slot;   // this warp's row among those it works on at once

  __device__ __forceinline__ explicit WordTeam(int lanes_of_row)
      : lanes(kBlock ? 32 : lanes_of_row),
        lane(threadIdx.x % 32 & (lanes - 1)),
        warp(kBlock ? threadIdx.x / 32 : 0),
        slot(kBlock ? 0 : threadIdx.x % 32 / lanes) {}
  __device__ __forceinline__ int word() const { return lane + 32 * warp; }
  __device__ __forceinline__ int warps() const { return kBlock ? static_cast<int>(blockDim.x / 32) : 1; }
  __device__ __forceinline__ bool leads() const { return lane == 0 && warp == 0; }
};

// Where float `at` of a warp's tile lies, and unit `at` of 16 bytes: 16 bytes of padding every 128.
__device__ __forceinline__ int in_tile(int at) { return at + at / 32 * 4; }
__device__ __forceinline__ int unit_in_tile(int at) { return at + at / 8; }

// 16 bytes from global to shared memory, zeros if not `used`, without a register on the way; await_copies() waits for them.
__device__ __forceinline__ void copy_async(float4* to, const void* from, bool used) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(used ? 16 : 0) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The sums of the team's columns into the tile, an element at a time: for rows or pointers that are not multiples of 16 bytes.
template <typename Width, bool kBlock>
__device__ __noinline__ void gather_elements(const UpdateArgs& args, const WordTeam<kBlock>& team, const BatchRow& row,
                                             uint32_t occurrences, float* tile) {
  const Gradient& gradient = args.gradient;
  float* to = tile + in_tile(team.slot * team.lanes * kWordColumns);
  for (int c = team.lane; c < team.lanes * kWordColumns; c += team.lanes) {
    const int64_t column = 32 * kWordColumns * team.warp + c;
    float sum = 0.0f;
    if (column < gradient.dim && occurrences >= kLongRow) {
      const float* partial = gradient.partials + first_slot(row.begin) * gradient.dim + column;
      for (int64_t b = 0; b < partial_rows(occurrences); ++b) sum += partial[b * gradient.dim];
    } else if (column < gradient.dim) {
      for (uint32_t i = 0; i < occurrences; ++i) {
        const int64_t at = args.groups.position(row.begin + i) * gradient.dim + column;
        if constexpr (Width::kVector == 4) {
          sum += static_cast<const float*>(gradient.data)[at];
        } else {
          const uint16_t raw = static_cast<const uint16_t*>(gradient.data)[at];
          sum += gradient.type == FloatType::kBF16 ? BF16::widen(raw) : F16::widen(raw);
        }
      }
    }
    to[in_tile(c)] = sum;
  }
}

// Whether memory holds the sum of a row as one row: of the gradient, or a partial one.
__device__ __forceinline__ bool is_one_row(uint32_t occurrences) {
  return occurrences <= 1 || (occurrences >= kLongRow && partial_rows(occurrences) == 1);
}

// Whether partial rows are copied as rows of the gradient are: floats both, and worth it. It takes 16 us of 496 from an update by a power
// law, and adds 2 % where blocks take rows, or, with elements of two sizes in a tile, where gradients have 16 bits.
template <typename Width, bool kBlock>
constexpr bool kCopiesPartialRows = Width::kVector == 4 && !kBlock;

// Rows of one occurrence, as they are, and partial rows that are sums, into the tile by 16 bytes.
template <typename Width, bool kBlock>
__device__ __forceinline__ void copy_rows(const UpdateArgs& args, const WordTeam<kBlock>& team, const BatchRow& row, bool active,
                                          float4* tile) {
  constexpr int kCount = Width::kVector;
  constexpr int kPieces = kWordColumns / kCount;
  const auto dim = static_cast<int>(args.gradient.dim);
  const int column = 32 * kWordColumns * team.warp + team.lane * kCount;  // of the first piece
  const int64_t row_bytes = args.gradient.dim * (16 / kCount);
  const char* from = static_cast<const char*>(args.gradient.data) + row.position * row_bytes;
  if (kCopiesPartialRows<Width, kBlock> && row.occurrences > 1) {
    from = reinterpret_cast<const char*>(args.gradient.partials + first_slot(row.begin) * args.gradient.dim);
  }
  from += column * (16 / kCount);
  const int unit = team.slot * team.lanes * kPieces + team.lane;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int place = kBlock ? unit_in_tile(unit) + p * unit_in_tile(32) : unit_in_tile(unit + p * team.lanes);
    copy_async(tile + place, from + p * team.lanes * 16, active && column + p * team.lanes * kCount < dim);
  }
}

// The sums of rows into the tile, as floats, by 16 bytes of the gradient.
template <typename Width, bool kBlock>
__device__ __forceinline__ void gather_vectors(const UpdateArgs& args, const WordTeam<kBlock>& team, const BatchRow& row,
                                               uint32_t occurrences, float* tile) {
  constexpr int kCount = Width::kVector;
  constexpr int kPieces = kWordColumns / kCount;
  constexpr int kAtOnce = kPieces / 2;
  const Gradient& gradient = args.gradient;
  const bool bfloat = gradient.type == FloatType::kBF16;
  const auto dim = static_cast<int>(gradient.dim);
  const int column = 32 * kWordColumns * team.warp + team.lane * kCount;  // of the first piece
  const int step = team.lanes * kCount;                                   // from piece to piece
  const char* data = static_cast<const char*>(gradient.data) + column * (16 / kCount);
  const int64_t row_bytes = gradient.dim * (16 / kCount);
#pragma unroll 1
  for (int first = 0; first < kPieces; first += kAtOnce) {
    float sums[kAtOnce][kCount] = {};
    const auto add = [&](const float (&values)[kAtOnce][kCount]) {
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) sums[p][k] += values[p][k];
      }
    };
    const int start = first * step;
    if (occurrences >= kLongRow) {
      const float* from = gradient.partials + first_slot(row.begin) * gradient.dim + column + start;
#pragma unroll 2
      for (int64_t b = 0; b < partial_rows(occurrences); ++b, from += gradient.dim) {
        float values[kAtOnce][kCount] = {};
#pragma unroll
        for (int p = 0; p < kAtOnce; ++p) {
          if (column + start + p * step < dim) load_floats(from + p * step, values[p]);
        }
        add(values);
      }
    } else {
      int64_t next = row.position;  // known one step ahead: else every row would wait for two trips to memory
#pragma unroll 2
      for (uint32_t i = 0; i < occurrences; ++i) {
        const char* from = data + next * row_bytes + start * (16 / kCount);
        if (i + 1 < occurrences) next = args.groups.position(row.begin + i + 1);
        float values[kAtOnce][kCount] = {};
#pragma unroll
        for (int p = 0; p < kAtOnce; ++p) {
          if (column + start + p * step < dim) load_columns<Width>(from + p * step * (16 / kCount), bfloat, values[p]);
        }
        add(values);
      }
    }
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      auto* to = reinterpret_cast<float4*>(tile + in_tile(team.slot * team.lanes * kWordColumns + team.lane * kCount + (first + p) * step));
#pragma unroll
      for (int k = 0; k < kCount; k += 4) to[k / 4] = make_float4(sums[p][k], sums[p][k + 1], sums[p][k + 2], sums[p][k + 3]);
    }
  }
}

// Phase 1 begins: the rows' sums on their way into the tile. Whether the tile will hold elements of the gradient as they are, or floats.
template <typename Width, bool kRagged, bool kBlock>
__device__ __forceinline__ bool start_gather(const UpdateArgs& args, const WordTeam<kBlock>& team, const BatchRow& row, bool active,
                                             float4* tile) {
  const uint32_t occurrences = active ? row.occurrences : 0;
  if constexpr (kRagged) {
    gather_elements<Width>(args, team, row, occurrences, reinterpret_cast<float*>(tile));
    return false;
  } else {
    const bool copied = __all_sync(kAllLanes, kCopiesPartialRows<Width, kBlock> ? is_one_row(occurrences) : occurrences <= 1);
    if (copied) {
      copy_rows<Width>(args, team, row, active, tile);
    } else {
      gather_vectors<Width>(args, team, row, occurrences, reinterpret_cast<float*>(tile));
    }
    return copied;
  }
}

// Phase 1 ends: this lane's 32 columns of the sum.
template <typename Width>
__device__ __forceinline__ void finish_gather(const Gradient& gradient, const float4* tile, bool raw, float (&x)[kWordColumns]) {
  const int lane = threadIdx.x % 32;
  await_copies();
  __syncwarp();
  if (Width::kVector == 4 || !raw) {
#pragma unroll
    for (int k = 0; k < kWordColumns; k += 4) {
      const float4 v = tile[lane * 9 + k / 4];
      x[k] = v.x;
      x[k + 1] = v.y;
      x[k + 2] = v.z;
      x[k + 3] = v.w;
    }
  } else {
    const bool bfloat = gradient.type == FloatType::kBF16;
#pragma unroll
    for (int k = 0; k < kWordColumns; k += 8) {
      const float4 v = tile[unit_in_tile(4 * lane + k / 8)];
      float eight[8];
      widen_pairs({__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)}, bfloat, eight);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[k + i] = eight[i];
    }
  }
  __syncwarp();
}

// The larger of two magnitudes, NaN if one is.
__device__ __forceinline__ float max_magnitude(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(fabsf(a)), "f"(fabsf(b)));
  return out;
}

// The largest magnitude of the row, as bits.
template <bool kBlock>
__device__ __forceinline__ uint32_t largest_of(const WordTeam<kBlock>& team, const float (&x)[kWordColumns], uint32_t* of_warps) {
  float even = 0.0f;
  float odd = 0.0f;
#pragma unroll
  for (int k = 0; k < kWordColumns; k += 2) {
    even = max_magnitude(even, x[k]);
    odd = max_magnitude(odd, x[k + 1]);
  }
  uint32_t largest = float_bits(max_magnitude(even, odd)) & 0x7fffffffu;
  if (kBlock || team.lanes == 32) {
    largest = __reduce_max_sync(kAllLanes, largest);
  } else {
    for (int offset = team.lanes / 2; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, offset));
  }
  if constexpr (kBlock) {
    if (team.lane == 0) of_warps[team.warp] = largest;
    __syncthreads();
    largest = __reduce_max_sync(kAllLanes, team.lane < team.warps() ? of_warps[team.lane] : 0);
  }
  return largest;
}

// The two sums in parts that 32 of can be added in 32 bits, and back.
__device__ __forceinline__ uint4 split_sums(const RowSums& sums) {
  return make_uint4(static_cast<uint32_t>(sums.squares) & 0x3ffffffu, static_cast<uint32_t>(sums.squares >> 26),
                    static_cast<uint32_t>(sums.aligned) & 0x3ffffffu, static_cast<uint32_t>(sums.aligned >> 26));
}

__device__ __forceinline__ RowSums add_split_sums(uint4 parts) {
  const uint32_t x = __reduce_add_sync(kAllLanes, parts.x);
  const uint32_t y = __reduce_add_sync(kAllLanes, parts.y);
  const uint32_t z = __reduce_add_sync(kAllLanes, parts.z);
  const auto w = static_cast<int32_t>(__reduce_add_sync(kAllLanes, parts.w));
  RowSums sums;
  sums.squares = (static_cast<uint64_t>(y) << 26) + x;
  sums.aligned = static_cast<int64_t>(w) * (1 << 26) + z;
  return sums;
}

// Sums of a row over its team.
template <bool kBlock>
__device__ __forceinline__ RowSums sum_team(const WordTeam<kBlock>& team, RowSums sums, uint4* of_warps) {
  if (!kBlock && team.lanes < 32) {
    for (int offset = team.lanes / 2; offset > 0; offset /= 2) {
      sums.squares += __shfl_xor_sync(kAllLanes, sums.squares, offset);
      sums.aligned += __shfl_xor_sync(kAllLanes, sums.aligned, offset);
    }
    return sums;
  }
  sums = add_split_sums(split_sums(sums));
  if constexpr (kBlock) {
    if (team.lane == 0) of_warps[team.warp] = split_sums(sums);
    __syncthreads();
    sums = add_split_sums(team.lane < team.warps() ? of_warps[team.lane] : make_uint4(0, 0, 0, 0));
  }
  return sums;
}

}  // namespace dualbin::kernels
