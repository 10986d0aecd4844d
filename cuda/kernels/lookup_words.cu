// Lookup of rows of whole words. A warp makes a tile of up to 1024 consecutive values of the result, of one row or of several: each lane
// loads one word of every plane and leaves it in shared memory in the order of columns; then the lanes write the tile 16 bytes at a time,
// one after the other, whatever rows the values belong to.
#include <cuda_bf16.h>

#include "kernels/cuda_check.h"
#include "kernels/lane_word.cuh"
#include "kernels/lookup.cuh"
#include "kernels/memory.cuh"
#include "kernels/output.cuh"
#include "kernels/tuning.h"
#include "rules/planes.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::LookupWords;

struct Tiles {
  int words;      // of a row
  int rows;       // of a tile
  int parts;      // tiles of a row, 1 if a tile has several rows
  int64_t count;  // of tiles
  bool streamed;  // the result is not for the cache
};

// A word of the tile: its row's value, and the columns whose sign is set or, of several planes, nothing.
struct TileWord {
  uint32_t negative;
  uint32_t value;  // narrowed, if the table has one plane; else float32
};

template <bool kOnePlane>
struct WarpTile {
  TileWord words[kWord];
  uint32_t bytes[kOnePlane ? 1 : kWord * 8];  // four columns a word
};

template <int kPlanes>
__device__ __forceinline__ LaneWord<kPlanes> load_word(const LookupArgs& args, int64_t n, int word) {
  LaneWord<kPlanes> out = {};
  const int64_t id = load_id(args.ids, n);
  if (id < 0 || id >= args.table.rows) {
    if (args.bad_ids == BadIds::kZeros) return out;
    if (word == 0 && args.errors != nullptr) report(args.errors, id);
    out.scale = bits_float(0x7fc00000u);
    return out;
  }
  load_planes(args.table, id, word, out.planes);
  out.scale = args.table.scale[id];
  out.ordinary = true;
  return out;
}

__device__ __forceinline__ uint32_t narrow_pair(float low, float high, FloatType type) {
  if (type == FloatType::kF16) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 16 bytes of the result, number `chunk` of the tile.
template <bool kOnePlane, bool kWide>
__device__ __forceinline__ uint4 make_chunk(const WarpTile<kOnePlane>& tile, int chunk, FloatType type, float unit) {
  constexpr int kPerWord = kWide ? 8 : 4;
  const TileWord word = tile.words[chunk / kPerWord];
  if constexpr (kOnePlane) {
    const uint32_t negative = word.negative >> (kWord / kPerWord * (chunk % kPerWord));
    if constexpr (kWide) {
      return make_uint4(word.value ^ (negative << 31), word.value ^ ((negative >> 1) << 31), word.value ^ ((negative >> 2) << 31),
                        word.value ^ ((negative >> 3) << 31));
    } else {
      const auto pair = [&](int k) { return word.value ^ (((negative >> k) & 1u) << 15) ^ ((negative >> (k + 1)) << 31); };
      return make_uint4(pair(0), pair(2), pair(4), pair(6));
    }
  } else {
    const float scale = bits_float(word.value);
    if (scale != scale) {  // one NaN for all: a product would change its bits
      const uint32_t same = narrow_word(scale, type);
      return make_uint4(same, same, same, same);
    }
    float values[4];
    if constexpr (kWide) {
      scale_bytes(tile.bytes[chunk], scale, unit, values);
      return make_uint4(float_bits(values[0]), float_bits(values[1]), float_bits(values[2]), float_bits(values[3]));
    } else {
      float more[4];
      scale_bytes(tile.bytes[2 * chunk], scale, unit, values);
      scale_bytes(tile.bytes[2 * chunk + 1], scale, unit, more);
      return make_uint4(narrow_pair(values[0], values[1], type), narrow_pair(values[2], values[3], type),
                        narrow_pair(more[0], more[1], type), narrow_pair(more[2], more[3], type));
    }
  }
}

// Which values of the result a tile has.
struct TilePlace {
  int64_t first;  // row of the result
  int part;       // of a row of several tiles
  int used;       // words
};

__device__ __forceinline__ TilePlace place_of(const LookupArgs& args, const Tiles& tiles, int64_t tile) {
  if (tile >= tiles.count) return {0, 0, 0};
  if (tiles.parts > 1) {
    const int64_t row = tile / tiles.parts;
    const auto part = static_cast<int>(tile - row * tiles.parts);
    return {row, part, min(kWord, tiles.words - part * kWord)};
  }
  const int64_t first = tile * tiles.rows;
  const int64_t left = args.ids.count - first;
  return {first, 0, (left < tiles.rows ? static_cast<int>(left) : tiles.rows) * tiles.words};
}

// A lane's word in shared memory.
template <bool kOnePlane>
__device__ __forceinline__ void store_word(WarpTile<kOnePlane>& tile, int lane, const LaneWord<kOnePlane ? 1 : kMaxPlanes>& word,
                                           FloatType type) {
  const bool ordinary = word.ordinary && word.scale != 0.0f;
  const float scale = word.scale == 0.0f ? 0.0f : word.scale;  // no sign
  if constexpr (kOnePlane) {
    tile.words[lane] = {ordinary ? ~word.planes[0] : 0u, narrow_word(scale, type)};
  } else {
    // A NaN of the table is what the product with a weight makes of it.
    tile.words[lane] = {0, ordinary && scale != scale ? 0x7fffffffu : float_bits(scale)};
    uint32_t bytes[8] = {};
    if (ordinary) unpack_word(word.planes, bytes);
    auto* to = reinterpret_cast<uint4*>(&tile.bytes[8 * lane]);
    to[0] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
    to[1] = make_uint4(bytes[4], bytes[5], bytes[6], bytes[7]);
  }
}

template <bool kOnePlane, bool kWide>
__global__ void __launch_bounds__(Policy::kThreads) lookup_words(const LookupArgs args, const Tiles tiles) {
  __shared__ WarpTile<kOnePlane> shared[Policy::kWarps];
  constexpr int kPerWord = kWide ? 8 : 4;  // chunks
  constexpr int kPlanes = kOnePlane ? 1 : kMaxPlanes;
  WarpTile<kOnePlane>& tile = shared[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int row_of_lane = tiles.rows > 1 ? lane / tiles.words : 0;
  const float unit = plane_unit(args.table.planes);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * Policy::kWarps;
  const auto load = [&](const TilePlace& place) {
    if (lane >= place.used) return LaneWord<kPlanes>{};
    return load_word<kPlanes>(args, place.first + row_of_lane, place.part * kWord + lane - row_of_lane * tiles.words);
  };
  int64_t t = static_cast<int64_t>(blockIdx.x) * Policy::kWarps + threadIdx.x / 32;
  TilePlace place = place_of(args, tiles, t);
  LaneWord<kPlanes> word = load(place);
  while (place.used > 0) {
    store_word<kOnePlane>(tile, lane, word, args.type);
    t += stride;
    const TilePlace next = place_of(args, tiles, t);
    word = load(next);  // on its way while this tile is written
    __syncwarp();
    const int64_t value = place.first * args.table.dim + static_cast<int64_t>(place.part) * kWord * kWord;
    uint4* out = static_cast<uint4*>(args.out) + value / (kWide ? 4 : 8);
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) {
      const int chunk = i * 32 + lane;
      if (chunk >= place.used * kPerWord) continue;
      const uint4 values = make_chunk<kOnePlane, kWide>(tile, chunk, args.type, unit);
      if (tiles.streamed) {
        __stcs(out + chunk, values);
      } else {
        out[chunk] = values;
      }
    }
    __syncwarp();
    place = next;
  }
}

}  // namespace

Status launch_lookup_words(cudaStream_t stream, const LookupArgs& args) {
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  Tiles tiles;
  tiles.words = static_cast<int>(args.table.dim / kWord);
  tiles.rows = tiles.words >= kWord ? 1 : kWord / tiles.words;
  tiles.parts = (tiles.words + kWord - 1) / kWord;
  tiles.count = tiles.parts > 1 ? args.ids.count * tiles.parts : (args.ids.count + tiles.rows - 1) / tiles.rows;
  const bool wide = args.type == FloatType::kF32;
  tiles.streamed = args.ids.count * args.table.dim * (wide ? 4 : 2) > Policy::kStreamedBytes;
  const int64_t most_blocks = tiles.parts > 1 ? INT32_MAX : Policy::kBlocksPerSm * processors;
  const unsigned grid = grid_size(tiles.count, Policy::kWarps, most_blocks);
  const auto kernel = args.table.planes == 1 ? (wide ? lookup_words<true, true> : lookup_words<true, false>)
                                             : (wide ? lookup_words<false, true> : lookup_words<false, false>);
  kernel<<<grid, Policy::kThreads, 0, stream>>>(args, tiles);
  DUALBIN_CUDA_LAUNCHED("lookup_words");
  return {};
}

}  // namespace dualbin::kernels
