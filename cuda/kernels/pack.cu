// Packing, unpacking and XOR of packed rows on the GPU.
#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/memory.cuh"
#include "kernels/row_grid.h"
#include "kernels/tuning.h"

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
    if (lane == 0) scale[row] = mean > 0.0f ? mean : 1e-4f;  // 0 would mark a padding row
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

__global__ void __launch_bounds__(kRowGridThreads) unpack_elements(const uint8_t* bits, int64_t rows, int64_t dim, int8_t* out) {
  const int64_t width = (dim + 7) / 8;
  for (int64_t row = first_row(); row < rows; row += row_stride()) {
    for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
      out[row * dim + d] = static_cast<int8_t>(((bits[row * width + d / 8] >> (d % 8)) & 1) * 2 - 1);
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

Status CudaBackend::pack(const Launch& launch, Floats w, int64_t rows, int64_t dim, uint8_t* bits, float* scale) const {
  DUALBIN_TRY(check_pack(w, rows, dim, bits));
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const unsigned grid = grid_size(rows, Policy::kThreads / 32, Policy::kBlocksPerSm * processors);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return with_float(w.type, [&](auto format) -> Status {
    using Format = decltype(format);
    pack_rows<Format><<<grid, Policy::kThreads, 0, stream>>>(static_cast<const typename Format::Storage*>(w.data), rows, dim, bits, scale);
    DUALBIN_CUDA_LAUNCHED("pack_rows");
    return {};
  });
}

Status CudaBackend::unpack(const Launch& launch, const uint8_t* bits, int64_t rows, int64_t dim, int8_t* out) const {
  DUALBIN_TRY(check_unpack(bits, rows, dim, out));
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const bool chunks = dim % 16 == 0 && aligned(out, 16);
  RowGrid shape;
  DUALBIN_TRY(make_row_grid(rows, chunks ? dim / 16 : dim, &shape));
  if (chunks) {
    unpack_chunks<<<shape.grid, shape.block, 0, stream>>>(bits, rows, dim, reinterpret_cast<uint4*>(out));
  } else {
    unpack_elements<<<shape.grid, shape.block, 0, stream>>>(bits, rows, dim, out);
  }
  DUALBIN_CUDA_LAUNCHED("unpack");
  return {};
}

Status CudaBackend::xor_rows(const Launch& launch, uint8_t* bits, int64_t rows, int64_t width, Ids ids, const uint8_t* mask) const {
  DUALBIN_TRY(check_xor_rows(bits, rows, width, ids, mask));
  if (ids.count == 0) return {};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (width % 8 == 0 && aligned(bits, 8) && aligned(mask, 8)) return launch_xor<uint64_t>(stream, bits, rows, width, ids, mask);
  return launch_xor<uint8_t>(stream, bits, rows, width, ids, mask);
}

}  // namespace dualbin::kernels
