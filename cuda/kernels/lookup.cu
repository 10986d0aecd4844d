// Lookup on the GPU of rows that are not whole words; lookup_words.cu has the others. A weight of one plane is the row's scale, narrowed
// once, with the sign of its bit: no arithmetic touches an element. With more planes every weight is a product of its own.
#include <type_traits>

#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/lookup.cuh"
#include "kernels/memory.cuh"
#include "kernels/output.cuh"
#include "kernels/row_grid.h"
#include "rules/planes.h"

namespace dualbin::kernels {

namespace {

// What the elements of an output row share: the magnitude, and which of the packed bits may set a sign (all or none).
struct RowValue {
  const uint8_t* bits;
  uint32_t word;
  uint32_t signs;
};

__device__ __forceinline__ RowValue row_value(const LookupArgs& args, int64_t n) {
  const int64_t id = load_id(args.ids, n);
  if (id < 0 || id >= args.table.rows) {
    if (args.bad_ids == BadIds::kZeros) return {args.table.bits, 0u, 0u};
    if (threadIdx.x == 0 && args.errors != nullptr) report(args.errors, id);
    return {args.table.bits, narrow_word(bits_float(0x7fc00000u), args.type), 0u};
  }
  const float scale = args.table.scale[id];
  if (scale == 0.0f) return {args.table.bits, 0u, 0u};
  return {args.table.bits + id * args.width, narrow_word(scale, args.type), 0xffffffffu};
}

// 16 bytes of output from 4 (float32) or 8 (16-bit types) sign bits; a set bit of `negative` sets the sign.
template <typename Storage>
__device__ __forceinline__ uint4 expand(uint32_t word, uint32_t negative) {
  if constexpr (std::is_same_v<Storage, uint32_t>) {
    return make_uint4(word ^ (negative << 31), word ^ ((negative >> 1) << 31), word ^ ((negative >> 2) << 31),
                      word ^ ((negative >> 3) << 31));
  } else {
    const auto pair = [&](int k) { return word ^ (((negative >> k) & 1u) << 15) ^ ((negative >> (k + 1)) << 31); };
    return make_uint4(pair(0), pair(2), pair(4), pair(6));
  }
}

// Rows of whole 16-byte chunks.
template <typename Storage>
__global__ void __launch_bounds__(kRowGridThreads) lookup_chunks(const LookupArgs args) {
  constexpr int kPerChunk = 16 / sizeof(Storage);
  const int64_t chunks = args.table.dim / kPerChunk;
  for (int64_t n = first_row(); n < args.ids.count; n += row_stride()) {
    const RowValue row = row_value(args, n);
    uint4* out = static_cast<uint4*>(args.out) + n * chunks;
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
      const uint32_t packed = kPerChunk == 8 ? row.bits[c] : row.bits[c / 2] >> (4 * (c % 2));
      out[c] = expand<Storage>(row.word, ~packed & row.signs);
    }
  }
}

// Rows that do not start or end on a 16-byte boundary: element by element.
template <typename Storage>
__global__ void __launch_bounds__(kRowGridThreads) lookup_elements(const LookupArgs args) {
  constexpr int kTopBit = 8 * sizeof(Storage) - 1;
  for (int64_t n = first_row(); n < args.ids.count; n += row_stride()) {
    const RowValue row = row_value(args, n);
    Storage* out = static_cast<Storage*>(args.out) + n * args.table.dim;
    for (int64_t d = threadIdx.x; d < args.table.dim; d += blockDim.x) {
      const uint32_t negative = (~static_cast<uint32_t>(row.bits[d / 8]) & row.signs) >> (d % 8) & 1u;
      out[d] = static_cast<Storage>(row.word ^ (negative << kTopBit));
    }
  }
}

// Rows of several planes: a thread unpacks the eight columns of a byte.
__global__ void __launch_bounds__(kRowGridThreads) lookup_levels(const LookupArgs args, bool vectors) {
  const Table& table = args.table;
  const float unit = plane_unit(table.planes);
  for (int64_t n = first_row(); n < args.ids.count; n += row_stride()) {
    const int64_t id = load_id(args.ids, n);
    const bool inside = id >= 0 && id < table.rows;
    const bool bad = !inside && args.bad_ids == BadIds::kReport;
    if (bad && threadIdx.x == 0 && args.errors != nullptr) report(args.errors, id);
    const float scale = inside ? table.scale[id] : 0.0f;
    const uint8_t* bits = table.bits + (inside ? id : 0) * table.row_bytes();
    for (int64_t byte = threadIdx.x; byte < args.width; byte += blockDim.x) {
      float values[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float weight = static_cast<float>(weight_of(bits + byte, args.width, table.planes, k)) * unit;
        values[k] = bad ? bits_float(0x7fc00000u) : scale == 0.0f ? 0.0f : scale * weight;
      }
      store_eight(args.out, args.type, n * table.dim + 8 * byte, 8 * byte, table.dim, vectors, values);
    }
  }
}

Status launch_levels(cudaStream_t stream, const LookupArgs& args) {
  RowGrid shape;
  DUALBIN_TRY(make_row_grid(args.ids.count, args.width, &shape));
  lookup_levels<<<shape.grid, shape.block, 0, stream>>>(args, args.table.dim % 8 == 0 && aligned(args.out, 16));
  DUALBIN_CUDA_LAUNCHED("lookup_levels");
  return {};
}

template <typename Storage>
Status launch_lookup(cudaStream_t stream, const LookupArgs& args) {
  constexpr int64_t kPerChunk = 16 / sizeof(Storage);
  const bool chunks = args.table.dim % kPerChunk == 0 && aligned(args.out, 16);
  RowGrid shape;
  DUALBIN_TRY(make_row_grid(args.ids.count, chunks ? args.table.dim / kPerChunk : args.table.dim, &shape));
  if (chunks) {
    lookup_chunks<Storage><<<shape.grid, shape.block, 0, stream>>>(args);
  } else {
    lookup_elements<Storage><<<shape.grid, shape.block, 0, stream>>>(args);
  }
  DUALBIN_CUDA_LAUNCHED("lookup");
  return {};
}

}  // namespace

Status CudaBackend::lookup(const Launch& launch, const LookupCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  if (call.ids.count == 0) return {};
  const LookupArgs args{table, table.width(), call.ids, call.bad_ids, call.type, call.out, launch.errors};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (table.dim % 32 == 0 && aligned(table.bits, 4) && aligned(call.out, 16)) return launch_lookup_words(stream, args);
  if (table.planes > 1) return launch_levels(stream, args);
  return call.type == FloatType::kF32 ? launch_lookup<uint32_t>(stream, args) : launch_lookup<uint16_t>(stream, args);
}

}  // namespace dualbin::kernels

namespace dualbin {

const Backend* cuda() {
  static const kernels::CudaBackend backend;
  return &backend;
}

}  // namespace dualbin
