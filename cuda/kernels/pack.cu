// Packing, unpacking and XOR of packed rows on the GPU.
#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/memory.cuh"
#include "kernels/row_grid.h"
#include "kernels/tuning.h"
#include "rules/pack.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::Pack;

// A warp packs a row, 32 columns at a time: the ballot of their signs is four packed bytes, and every lane adds up the magnitudes of its
// own columns in ascending order. That is the order of the CPU's 32 strided lanes, and the fold at the end is its fold.
template <typename Format>
__global__ void __launch_bounds__(Policy::kThreads)
    pack_rows(const typename Format::Storage* w, int64_t rows, int64_t dim, uint8_t* bits, float* scale) {
  const int lane = threadIdx.x % 32;
  const int64_t width = (dim + 7) / 8;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (Policy::kThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (Policy::kThreads / 32) + threadIdx.x / 32; row < rows; row += warps) {
    double sum = 0.0;
    for (int64_t start = 0; start < dim; start += 32) {
      const int64_t d = start + lane;
      const float x = d < dim ? Format::widen(__ldg(w + row * dim + d)) : -1.0f;  // padding bits are 0
      const uint32_t signs = __ballot_sync(kAllLanes, x >= 0.0f);
      if (d < dim) sum += fabs(static_cast<double>(x));
      const int64_t byte = start / 8 + lane;
      if (lane < 4 && byte < width) bits[row * width + byte] = static_cast<uint8_t>(signs >> (8 * lane));
    }
    if (scale == nullptr) continue;
    for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
    const float mean = static_cast<float>(sum / static_cast<double>(dim));
    if (lane == 0) scale[row] = mean >= kMinScale ? mean : kMinScale;
  }
}

// Sum over the warp, in all lanes.
__device__ __forceinline__ int64_t sum_everywhere(int64_t value) {
  for (int half = 16; half > 0; half /= 2) value += __shfl_xor_sync(kAllLanes, value, half);
  return value;
}

// The scale of least squared error for more than one plane, found by a warp.
template <typename Format>
__device__ __forceinline__ float search_scale(const typename Format::Storage* w, int64_t dim, int planes, int lane) {
  uint32_t largest = 0;
  for (int64_t d = lane; d < dim; d += 32) largest = max(largest, float_bits(Format::widen(__ldg(w + d))) & 0x7fffffffu);
  largest = __reduce_max_sync(kAllLanes, largest);
  const Quantiser quantise = make_quantiser(largest, kSearchBits);
  ScaleSearch search(planes, quantise(bits_float(largest)));
  for (int i = 0; i < kSearchSteps + kRefinements; ++i) {
    const ScaleCandidate candidate = search.candidate(i);
    ScaleSums sums;
    for (int64_t d = lane; d < dim; d += 32) {
      const int32_t h = quantise(fabsf(Format::widen(__ldg(w + d))));
      sums.add(h, candidate.odd(h));
    }
    sums.a = sum_everywhere(sums.a);
    sums.c = sum_everywhere(sums.c);
    search.offer(sums);
  }
  return search.scale(planes, quantise.exponent);
}

// The same for more than one plane: a ballot for each of them.
template <typename Format>
__global__ void __launch_bounds__(Policy::kThreads)
    pack_levels(const typename Format::Storage* w, int64_t rows, int64_t dim, int planes, uint8_t* bits, float* scale) {
  const int lane = threadIdx.x % 32;
  const int64_t width = (dim + 7) / 8;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (Policy::kThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (Policy::kThreads / 32) + threadIdx.x / 32; row < rows; row += warps) {
    const float own = search_scale<Format>(w + row * dim, dim, planes, lane);
    for (int64_t start = 0; start < dim; start += 32) {
      const int64_t d = start + lane;
      const float x = d < dim ? Format::widen(__ldg(w + row * dim + d)) : -1.0f;
      const int32_t level = d < dim ? level_of(fabsf(x), own, planes) : 0;
      const int64_t byte = start / 8 + lane;
      for (int p = 0; p < planes; ++p) {
        const uint32_t plane = __ballot_sync(kAllLanes, p == 0 ? x >= 0.0f : ((level >> (planes - 1 - p)) & 1) != 0);
        if (lane < 4 && byte < width) bits[(row * planes + p) * width + byte] = static_cast<uint8_t>(plane >> (8 * lane));
      }
    }
    if (scale != nullptr && lane == 0) scale[row] = own;
  }
}

// A warp copies the top planes of a row and sums for their scale.
__global__ void __launch_bounds__(Policy::kThreads) keep_planes(const Table table, int fewer, uint8_t* bits, float* scale) {
  const int lane = threadIdx.x % 32;
  const int64_t kept = fewer * table.width();
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (Policy::kThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (Policy::kThreads / 32) + threadIdx.x / 32; row < table.rows; row += warps) {
    const uint8_t* from = table.bits + row * table.row_bytes();
    for (int64_t i = lane; i < kept; i += 32) bits[row * kept + i] = from[i];
    if (scale == nullptr) continue;
    ScaleSums sums;
    for (int64_t d = lane; d < table.dim; d += 32) {
      const int k = static_cast<int>(d % 8);
      sums.add(abs(weight_of(from + d / 8, table.width(), table.planes, k)), abs(weight_of(from + d / 8, table.width(), fewer, k)));
    }
    const int64_t a = sum_everywhere(sums.a);
    const int64_t c = sum_everywhere(sums.c);
    if (lane == 0) scale[row] = fewer_planes_scale(table.scale[row], a, c, table.planes, fewer);
  }
}

// Four signs as four int8 values of +1 or -1: 0x01 or 0xff.
__device__ __forceinline__ uint32_t expand_four(uint32_t packed) {
  uint32_t word = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) word |= ((packed >> k) & 1u ? 0x01u : 0xffu) << (8 * k);
  return word;
}

// Rows of whole 16-element chunks.
__global__ void __launch_bounds__(kRowGridThreads) unpack_chunks(const uint8_t* bits, int64_t rows, int64_t dim, uint4* out) {
  const int64_t chunks = dim / 16;
  for (int64_t row = first_row(); row < rows; row += row_stride()) {
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
      const uint8_t* from = bits + (row * chunks + c) * 2;  // the width of a packed row is 2 * chunks
      const uint32_t low = from[0];
      const uint32_t high = from[1];
      out[row * chunks + c] = make_uint4(expand_four(low), expand_four(low >> 4), expand_four(high), expand_four(high >> 4));
    }
  }
}

// s * (2m + 1) element by element: int8 of one plane, int16 of more.
template <typename Out>
__global__ void __launch_bounds__(kRowGridThreads) unpack_elements(const Table table, Out* out) {
  for (int64_t row = first_row(); row < table.rows; row += row_stride()) {
    const uint8_t* bits = table.bits + row * table.row_bytes();
    for (int64_t d = threadIdx.x; d < table.dim; d += blockDim.x) {
      out[row * table.dim + d] = static_cast<Out>(weight_of(bits + d / 8, table.width(), table.planes, static_cast<int>(d % 8)));
    }
  }
}

// `words` words of type Word make up a row.
template <typename Word>
__global__ void __launch_bounds__(kRowGridThreads) xor_words(Word* bits, int64_t rows, int64_t words, Ids ids, const Word* mask) {
  for (int64_t n = first_row(); n < ids.count; n += row_stride()) {
    const int64_t id = load_id(ids, n);
    if (id < 0 || id >= rows) continue;
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) bits[id * words + i] ^= mask[n * words + i];
  }
}

template <typename Word>
Status launch_xor(cudaStream_t stream, uint8_t* bits, int64_t rows, int64_t width, const Ids& ids, const uint8_t* mask) {
  const int64_t words = width / static_cast<int64_t>(sizeof(Word));
  RowGrid shape;
  DUALBIN_TRY(make_row_grid(ids.count, words, &shape));
  xor_words<Word>
      <<<shape.grid, shape.block, 0, stream>>>(reinterpret_cast<Word*>(bits), rows, words, ids, reinterpret_cast<const Word*>(mask));
  DUALBIN_CUDA_LAUNCHED("xor_words");
  return {};
}

}  // namespace

Status CudaBackend::pack(const Launch& launch, const PackCall& call) const {
  DUALBIN_TRY(call.check());
  const int64_t rows = call.rows;
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const unsigned grid = grid_size(rows, Policy::kThreads / 32, Policy::kBlocksPerSm * processors);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return with_float(call.w.type, [&](auto format) -> Status {
    using Format = decltype(format);
    const auto* data = static_cast<const typename Format::Storage*>(call.w.data);
    if (call.planes > 1) {
      pack_levels<Format><<<grid, Policy::kThreads, 0, stream>>>(data, rows, call.dim, call.planes, call.bits, call.scale);
    } else {
      pack_rows<Format><<<grid, Policy::kThreads, 0, stream>>>(data, rows, call.dim, call.bits, call.scale);
    }
    DUALBIN_CUDA_LAUNCHED("pack_rows");
    return {};
  });
}

Status CudaBackend::unpack(const Launch& launch, const UnpackCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  void* out = call.out;
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const bool chunks = table.planes == 1 && table.dim % 16 == 0 && aligned(out, 16);
  RowGrid shape;
  DUALBIN_TRY(make_row_grid(table.rows, chunks ? table.dim / 16 : table.dim, &shape));
  if (chunks) {
    unpack_chunks<<<shape.grid, shape.block, 0, stream>>>(table.bits, table.rows, table.dim, static_cast<uint4*>(out));
  } else if (table.planes == 1) {
    unpack_elements<<<shape.grid, shape.block, 0, stream>>>(table, static_cast<int8_t*>(out));
  } else {
    unpack_elements<<<shape.grid, shape.block, 0, stream>>>(table, static_cast<int16_t*>(out));
  }
  DUALBIN_CUDA_LAUNCHED("unpack");
  return {};
}

Status CudaBackend::fewer_planes(const Launch& launch, const FewerPlanesCall& call) const {
  DUALBIN_TRY(call.check());
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const unsigned grid = grid_size(call.table.rows, Policy::kThreads / 32, Policy::kBlocksPerSm * processors);
  keep_planes<<<grid, Policy::kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(call.table, call.fewer, call.bits, call.scale);
  DUALBIN_CUDA_LAUNCHED("keep_planes");
  return {};
}

Status CudaBackend::xor_rows(const Launch& launch, const XorRowsCall& call) const {
  DUALBIN_TRY(call.check());
  uint8_t* bits = call.bits;
  const int64_t width = call.width;
  const Ids& ids = call.ids;
  const uint8_t* mask = call.mask;
  if (ids.count == 0) return {};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (width % 8 == 0 && aligned(bits, 8) && aligned(mask, 8)) return launch_xor<uint64_t>(stream, bits, call.rows, width, ids, mask);
  return launch_xor<uint8_t>(stream, bits, call.rows, width, ids, mask);
}

}  // namespace dualbin::kernels
