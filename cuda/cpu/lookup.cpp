// Packing, unpacking and lookup on the CPU.
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"

namespace dualbin::detail {

namespace {

// Eight sign bits for every value of a packed byte: a weight is the row's scale with this sign, so a lookup multiplies nothing.
template <typename Storage>
struct SignTable {
  Storage signs[256][8];

  constexpr SignTable() : signs{} {
    constexpr int kTopBit = 8 * sizeof(Storage) - 1;
    for (int byte = 0; byte < 256; ++byte) {
      for (int k = 0; k < 8; ++k) signs[byte][k] = static_cast<Storage>(static_cast<Storage>(((byte >> k) & 1) ^ 1) << kTopBit);
    }
  }
};

alignas(64) constexpr SignTable<uint32_t> kSigns32;
alignas(64) constexpr SignTable<uint16_t> kSigns16;

template <typename Storage>
void expand_row(const uint8_t* bits, int64_t dim, Storage scale, const SignTable<Storage>& table, Storage* out) {
  const int64_t full = dim / 8;
  for (int64_t b = 0; b < full; ++b) {
    const Storage* signs = table.signs[bits[b]];
    for (int k = 0; k < 8; ++k) out[8 * b + k] = scale ^ signs[k];
  }
  for (int64_t d = 8 * full; d < dim; ++d) out[d] = scale ^ table.signs[bits[full]][d % 8];
}

template <typename Storage>
void lookup_rows(const Launch& launch, const Table& table, const Ids& ids, Storage (*narrow)(float), const SignTable<Storage>& signs,
                 Storage* out) {
  const int64_t grain = std::max<int64_t>(1, 32768 / table.dim);
  parallel_range(launch.executor, ids.count, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = id_at(ids, n);
      Storage* row = out + n * table.dim;
      const float scale = id >= 0 && id < table.rows ? table.scale[id] : 0.0f;
      if (scale == 0.0f) {
        std::memset(row, 0, static_cast<size_t>(table.dim) * sizeof(Storage));
      } else {
        expand_row(table.bits + id * table.width(), table.dim, narrow(scale), signs, row);
      }
    }
  });
}

uint32_t narrow_f32(float x) { return float_bits(x); }

// Mean of |w| in double: 32 strided lanes in ascending order, then the lanes folded in halves, so that a GPU warp gets the same bits.
template <typename Format>
float mean_magnitude(const typename Format::Storage* w, int64_t dim) {
  double lanes[32] = {0.0};
  for (int64_t d = 0; d < dim; ++d) lanes[d % 32] += std::fabs(static_cast<double>(Format::widen(w[d])));
  for (int half = 16; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  const float mean = static_cast<float>(lanes[0] / static_cast<double>(dim));
  return mean > 0.0f ? mean : 1e-4f;  // 0 would mark a padding row
}

template <typename Format>
void pack_row(const typename Format::Storage* w, int64_t dim, uint8_t* bits) {
  for (int64_t b = 0; b < (dim + 7) / 8; ++b) {
    uint32_t byte = 0;
    for (int k = 0; k < 8 && 8 * b + k < dim; ++k) byte |= static_cast<uint32_t>(Format::widen(w[8 * b + k]) >= 0.0f) << k;
    bits[b] = static_cast<uint8_t>(byte);
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

Status CpuBackend::pack(const Launch& launch, Floats w, int64_t rows, int64_t dim, uint8_t* bits, float* scale) const {
  DUALBIN_TRY(check_pack(w, rows, dim, bits));
  return with_float(w.type, [&](auto format) -> Status {
    using Format = decltype(format);
    const auto* data = static_cast<const typename Format::Storage*>(w.data);
    const int64_t bad = first_bad_element<Format>(launch, data, rows * dim, scale != nullptr);
    DUALBIN_REQUIRE(bad < 0, Code::kInvalidArgument, "w must be %s, got %g at row %" PRId64 ", column %" PRId64,
                    scale != nullptr ? "finite" : "free of NaN", static_cast<double>(Format::widen(data[bad])), bad / dim, bad % dim);
    parallel_range(launch.executor, rows, std::max<int64_t>(1, 32768 / dim), [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        pack_row<Format>(data + r * dim, dim, bits + r * ((dim + 7) / 8));
        if (scale != nullptr) scale[r] = mean_magnitude<Format>(data + r * dim, dim);
      }
    });
    return {};
  });
}

Status CpuBackend::unpack(const Launch& launch, const uint8_t* bits, int64_t rows, int64_t dim, int8_t* out) const {
  DUALBIN_TRY(check_unpack(bits, rows, dim, out));
  const int64_t width = (dim + 7) / 8;
  parallel_range(launch.executor, rows, std::max<int64_t>(1, 65536 / dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t d = 0; d < dim; ++d) out[r * dim + d] = static_cast<int8_t>(((bits[r * width + d / 8] >> (d % 8)) & 1) * 2 - 1);
    }
  });
  return {};
}

Status CpuBackend::lookup(const Launch& launch, const Table& table, Ids ids, BadIds bad_ids, void* out, FloatType type) const {
  DUALBIN_TRY(check_lookup(table, ids, out, type));
  if (ids.count == 0) return {};
  for (int64_t n = 0; bad_ids == BadIds::kReport && n < ids.count; ++n) {
    const int64_t id = id_at(ids, n);
    DUALBIN_REQUIRE(id >= 0 && id < table.rows, Code::kOutOfRange, "id %" PRId64 " at position %" PRId64 " is outside [0, %" PRId64 ")", id,
                    n, table.rows);
  }
  switch (type) {
    case FloatType::kF32:
      lookup_rows<uint32_t>(launch, table, ids, narrow_f32, kSigns32, static_cast<uint32_t*>(out));
      break;
    case FloatType::kF16:
      lookup_rows<uint16_t>(launch, table, ids, narrow_f16, kSigns16, static_cast<uint16_t*>(out));
      break;
    case FloatType::kBF16:
      lookup_rows<uint16_t>(launch, table, ids, narrow_bf16, kSigns16, static_cast<uint16_t*>(out));
      break;
  }
  return {};
}

}  // namespace dualbin::detail
