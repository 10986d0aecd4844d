// Packing and unpacking on the CPU, and tables of fewer planes.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"
#include "cpu/simd/kernels.h"
#include "rules/pack.h"

namespace dualbin::detail {

namespace {

// Mean of |w| in double: 32 strided lanes in ascending order, then the lanes folded in halves, so that a GPU warp gets the same bits.
template <typename Format>
float mean_magnitude(const typename Format::Storage* w, int64_t dim) {
  double lanes[32] = {0.0};
  for (int64_t d = 0; d < dim; ++d) lanes[d % 32] += std::fabs(static_cast<double>(Format::widen(w[d])));
  for (int half = 16; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  const float mean = static_cast<float>(lanes[0] / static_cast<double>(dim));
  return mean >= kMinScale ? mean : kMinScale;
}

// The scale of least squared error for more than one plane.
template <typename Format>
float search_scale(const typename Format::Storage* w, int64_t dim, int planes) {
  uint32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, float_bits(Format::widen(w[d])) & 0x7fffffffu);
  const Quantiser quantise = make_quantiser(largest, kSearchBits);
  ScaleSearch search(planes, quantise(bits_float(largest)));
  for (int i = 0; i < kSearchSteps + kRefinements; ++i) {
    const ScaleCandidate candidate = search.candidate(i);
    ScaleSums sums;
    for (int64_t d = 0; d < dim; ++d) {
      const int32_t h = quantise(std::fabs(Format::widen(w[d])));
      sums.add(h, candidate.odd(h));
    }
    search.offer(sums);
  }
  return search.scale(planes, quantise.exponent);
}

template <typename Format>
void pack_row(const typename Format::Storage* w, int64_t dim, int planes, float scale, uint8_t* bits) {
  const int64_t width = (dim + 7) / 8;
  for (int64_t b = 0; b < width; ++b) {
    uint8_t bytes[kMaxPlanes] = {0};
    for (int k = 0; k < 8 && 8 * b + k < dim; ++k) {
      const float value = Format::widen(w[8 * b + k]);
      bytes[0] |= static_cast<uint8_t>((value >= 0.0f) << k);
      const int32_t level = planes > 1 ? level_of(std::fabs(value), scale, planes) : 0;
      for (int p = 1; p < planes; ++p) bytes[p] |= static_cast<uint8_t>(((level >> (planes - 1 - p)) & 1) << k);
    }
    for (int p = 0; p < planes; ++p) bits[p * width + b] = bytes[p];
  }
}

// Eight signs for every value of a packed byte.
struct SignBytes {
  int8_t signs[256][8];

  constexpr SignBytes() : signs{} {
    for (int byte = 0; byte < 256; ++byte) {
      for (int k = 0; k < 8; ++k) signs[byte][k] = ((byte >> k) & 1) != 0 ? 1 : -1;
    }
  }
};

alignas(64) constexpr SignBytes kSignBytes;

void unpack_signs(const uint8_t* row, int64_t dim, int8_t* out) {
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) std::memcpy(out + d, kSignBytes.signs[row[d / 8]], 8);
  if (d < dim) std::memcpy(out + d, kSignBytes.signs[row[d / 8]], static_cast<size_t>(dim - d));
}

void unpack_levels(const Table& table, const uint8_t* row, int16_t* out) {
  for (int64_t d = 0; d < table.dim; ++d) {
    out[d] = static_cast<int16_t>(weight_of(row + d / 8, table.width(), table.planes, static_cast<int>(d % 8)));
  }
}

// First element that may not be packed, or -1: NaN, and with a scale to compute infinity too.
template <typename Format>
int64_t first_bad_element(const Launch& launch, const typename Format::Storage* w, int64_t count, bool infinity_too) {
  std::atomic<int64_t> first{INT64_MAX};
  parallel_range(launch.executor, count, 1 << 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t magnitude = float_bits(Format::widen(w[i])) & 0x7fffffffu;
      if (magnitude < 0x7f800000u || (magnitude == 0x7f800000u && !infinity_too)) continue;
      int64_t seen = first.load();
      while (i < seen && !first.compare_exchange_weak(seen, i)) {
      }
      return;
    }
  });
  const int64_t found = first.load();
  return found == INT64_MAX ? -1 : found;
}

// ---- by kernels

constexpr int64_t kWeightsOfThread = 131072;
constexpr uint32_t kInfinity[kFloatFormats] = {0x7f800000u, 0x7c00u, 0x7f80u};  // in the order of FloatType

// A row of `w` by kernels that read its type.
class PackRows {
 public:
  PackRows(const Kernels& kernels, const PackCall& call)
      : kernels_(kernels),
        data_(static_cast<const char*>(call.w.data)),
        format_(static_cast<int>(call.w.type)),
        row_bytes_(call.dim * (call.w.type == FloatType::kF32 ? 4 : 2)),
        shape_{call.dim, (call.dim + 7) / 8, call.planes} {}

  bool finite(int64_t row) const { return largest(row) < kInfinity[format_]; }
  bool free_of_nan(int64_t row) const { return largest(row) <= kInfinity[format_]; }

  float mean(int64_t row) const {
    const auto found = static_cast<float>(kernels_.sum_magnitudes[format_](data(row), shape_.dim) / static_cast<double>(shape_.dim));
    return found >= kMinScale ? found : kMinScale;
  }

  float searched(int64_t row) const {
    const float most = widened(largest(row));
    const Quantiser quantise = make_quantiser(float_bits(most), kSearchBits);
    ScaleSearch search(shape_.planes, quantise(most));
    for (int i = 0; i < kSearchSteps + kRefinements; ++i) {
      const ScaleCandidate candidate = search.candidate(i);
      const SearchStep step{quantise.first, quantise.second, static_cast<double>(candidate.numerator),
                            static_cast<double>(candidate.denominator), static_cast<double>(candidate.top)};
      const SearchSums found = kernels_.search_sums[format_](data(row), shape_.dim, step);
      ScaleSums sums;
      sums.a = found.a;
      sums.c = found.c;
      search.offer(sums);
    }
    return search.scale(shape_.planes, quantise.exponent);
  }

  void pack(int64_t row, float scale, uint8_t* bits) const {
    kernels_.pack_row[format_](data(row), shape_, scale, bits + row * shape_.planes * shape_.width);
  }

 private:
  const char* data(int64_t row) const { return data_ + row * row_bytes_; }

  uint32_t largest(int64_t row) const { return kernels_.largest[format_](data(row), shape_.dim); }

  float widened(uint32_t magnitude) const {
    const auto half = static_cast<uint16_t>(magnitude);
    if (format_ == static_cast<int>(FloatType::kF32)) return bits_float(magnitude);
    return format_ == static_cast<int>(FloatType::kF16) ? widen_f16(half) : widen_bf16(half);
  }

  const Kernels& kernels_;
  const char* data_;
  const int format_;
  const int64_t row_bytes_;
  const PackShape shape_;
};

// Whether every row is finite, or else free of NaN.
bool all_fit(const Launch& launch, const PackRows& rows, int64_t count, int64_t dim, bool finite) {
  std::atomic<bool> fit{true};
  parallel_range(launch.executor, count, std::max<int64_t>(1, kWeightsOfThread / dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end && fit.load(std::memory_order_relaxed); ++r) {
      if (!(finite ? rows.finite(r) : rows.free_of_nan(r))) fit.store(false, std::memory_order_relaxed);
    }
  });
  return fit.load();
}

void pack_by_kernels(const Launch& launch, const PackRows& rows, const PackCall& call) {
  const int64_t weights = call.planes > 1 ? kWeightsOfThread / 16 : kWeightsOfThread;
  parallel_range(launch.executor, call.rows, std::max<int64_t>(1, weights / call.dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float own = call.planes > 1 ? rows.searched(r) : call.scale != nullptr ? rows.mean(r) : 1.0f;
      rows.pack(r, own, call.bits);
      if (call.scale != nullptr) call.scale[r] = own;
    }
  });
}

SearchSums sums_of_fewer(const Table& table, const uint8_t* row, int fewer) {
  ScaleSums sums;
  for (int64_t d = 0; d < table.dim; ++d) {
    const int k = static_cast<int>(d % 8);
    const int32_t all = std::abs(weight_of(row + d / 8, table.width(), table.planes, k));
    const int32_t few = std::abs(weight_of(row + d / 8, table.width(), fewer, k));
    sums.add(all, few);
  }
  return {sums.a, sums.c};
}

}  // namespace

Status CpuBackend::pack(const Launch& launch, const PackCall& call) const {
  DUALBIN_TRY(call.check());
  const Floats& w = call.w;
  const int64_t dim = call.dim;
  const int planes = call.planes;
  float* scale = call.scale;
  const bool scaled = scale != nullptr || planes > 1;
  const bool by_kernels = kernels_ != nullptr && (planes == 1 || dim <= kMostSearched);
  return with_float(w.type, [&](auto format) -> Status {
    using Format = decltype(format);
    const auto* data = static_cast<const typename Format::Storage*>(w.data);
    const int64_t bad = by_kernels && all_fit(launch, PackRows(*kernels_, call), call.rows, dim, scaled)
                            ? -1
                            : first_bad_element<Format>(launch, data, call.rows * dim, scaled);
    DUALBIN_REQUIRE(bad < 0, Code::kInvalidArgument, "w must be %s, got %g at row %" PRId64 ", column %" PRId64,
                    scaled ? "finite" : "free of NaN", static_cast<double>(Format::widen(data[bad])), bad / dim, bad % dim);
    if (by_kernels) {
      pack_by_kernels(launch, PackRows(*kernels_, call), call);
      return {};
    }
    parallel_range(launch.executor, call.rows, std::max<int64_t>(1, 32768 / dim), [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const auto* row = data + r * dim;
        float own = 1.0f;
        if (scaled) own = planes > 1 ? search_scale<Format>(row, dim, planes) : mean_magnitude<Format>(row, dim);
        pack_row<Format>(row, dim, planes, own, call.bits + r * planes * ((dim + 7) / 8));
        if (scale != nullptr) scale[r] = own;
      }
    });
    return {};
  });
}

Status CpuBackend::unpack(const Launch& launch, const UnpackCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  const int64_t dim = table.dim;
  const int64_t weights = kernels_ != nullptr ? kWeightsOfThread : 65536;
  const PackShape shape{dim, table.width(), table.planes};
  const int64_t out_bytes = dim * (table.planes == 1 ? 1 : 2);
  parallel_range(launch.executor, table.rows, std::max<int64_t>(1, weights / dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* row = table.bits + r * table.row_bytes();
      if (kernels_ != nullptr) {
        kernels_->unpack_row(row, shape, static_cast<char*>(call.out) + r * out_bytes);
      } else if (table.planes == 1) {
        unpack_signs(row, dim, static_cast<int8_t*>(call.out) + r * dim);
      } else {
        unpack_levels(table, row, static_cast<int16_t*>(call.out) + r * dim);
      }
    }
  });
  return {};
}

Status CpuBackend::fewer_planes(const Launch& launch, const FewerPlanesCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  const int fewer = call.fewer;
  const int64_t kept = fewer * table.width();
  parallel_range(launch.executor, table.rows, std::max<int64_t>(1, 32768 / table.dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* row = table.bits + r * table.row_bytes();
      std::memcpy(call.bits + r * kept, row, static_cast<size_t>(kept));
      if (call.scale == nullptr) continue;
      SearchSums sums{0, 0};
      if (kernels_ != nullptr) {
        sums = kernels_->sums_of_fewer(row, {table.dim, table.width(), table.planes}, fewer);
      } else {
        sums = sums_of_fewer(table, row, fewer);
      }
      call.scale[r] = fewer_planes_scale(table.scale[r], sums.a, sums.c, table.planes, fewer);
    }
  });
  return {};
}

}  // namespace dualbin::detail
