// Packing and unpacking on the CPU, and tables of fewer planes.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"
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

}  // namespace

Status CpuBackend::pack(const Launch& launch, const PackCall& call) const {
  DUALBIN_TRY(call.check());
  const Floats& w = call.w;
  const int64_t dim = call.dim;
  const int planes = call.planes;
  float* scale = call.scale;
  return with_float(w.type, [&](auto format) -> Status {
    using Format = decltype(format);
    const auto* data = static_cast<const typename Format::Storage*>(w.data);
    const bool scaled = scale != nullptr || planes > 1;
    const int64_t bad = first_bad_element<Format>(launch, data, call.rows * dim, scaled);
    DUALBIN_REQUIRE(bad < 0, Code::kInvalidArgument, "w must be %s, got %g at row %" PRId64 ", column %" PRId64,
                    scaled ? "finite" : "free of NaN", static_cast<double>(Format::widen(data[bad])), bad / dim, bad % dim);
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
  parallel_range(launch.executor, table.rows, std::max<int64_t>(1, 65536 / dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* row = table.bits + r * table.row_bytes();
      if (table.planes == 1) {
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
      ScaleSums sums;
      for (int64_t d = 0; d < table.dim; ++d) {
        const int k = static_cast<int>(d % 8);
        const int32_t all = std::abs(weight_of(row + d / 8, table.width(), table.planes, k));
        const int32_t few = std::abs(weight_of(row + d / 8, table.width(), fewer, k));
        sums.add(all, few);
      }
      call.scale[r] = fewer_planes_scale(table.scale[r], sums.a, sums.c, table.planes, fewer);
    }
  });
  return {};
}

}  // namespace dualbin::detail
