// Lookup on the CPU.
#include <cmath>
#include <cstring>

#include "cpu/cpu_backend.h"
#include "cpu/floats.h"
#include "cpu/ids.h"
#include "cpu/parallel.h"
#include "cpu/prefetch.h"
#include "cpu/streams.h"
#include "rules/planes.h"

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

// The same for a table of more planes: every product of the scale with an odd integer is rounded, so there is no sign to flip.
template <typename Storage>
void expand_levels(const Table& table, int64_t id, float scale, Storage (*narrow)(float), Storage* out) {
  const uint8_t* bits = table.bits + id * table.row_bytes();
  const float unit = plane_unit(table.planes);
  for (int64_t d = 0; d < table.dim; ++d) {
    const int32_t odd = weight_of(bits + d / 8, table.width(), table.planes, static_cast<int>(d % 8));
    out[d] = narrow(scale * (static_cast<float>(odd) * unit));
  }
}

template <typename Storage>
void lookup_row(const Table& table, int64_t id, float scale, Storage (*narrow)(float), const SignTable<Storage>& signs, Storage* row) {
  if (scale == 0.0f) {
    std::memset(row, 0, static_cast<size_t>(table.dim) * sizeof(Storage));
  } else if (table.planes > 1) {
    expand_levels(table, id, scale, narrow, row);
  } else {
    expand_row(table.bits + id * table.width(), table.dim, narrow(scale), signs, row);
  }
}

template <typename Storage>
void lookup_rows(const Launch& launch, const Table& table, const Ids& ids, Storage (*narrow)(float), const SignTable<Storage>& signs,
                 Storage* out) {
  const int64_t grain = std::max<int64_t>(1, 32768 / (table.dim * table.planes));
  parallel_range(launch.executor, ids.count, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = id_at(ids, n);
      const float scale = id >= 0 && id < table.rows ? table.scale[id] : 0.0f;
      lookup_row(table, id, scale, narrow, signs, out + n * table.dim);
    }
  });
}

uint32_t narrow_f32(float x) { return float_bits(x); }

// ---- by kernels

constexpr int64_t kRowsOfCall = 16;
constexpr int64_t kColumnsAhead = 4096;  // of rows that are fetched before their turn

struct LookupJob {
  const Kernels& kernels;
  const Table& table;
  const Ids& ids;
  FloatType type;
  char* out;

  int64_t element() const { return type == FloatType::kF32 ? 4 : 2; }
  int64_t row_bytes() const { return table.dim * element(); }

  // Of position n; of row 0 where it has none.
  LaterRow later(int64_t n) const {
    int64_t id = n < ids.count ? id_at(ids, n) : 0;
    if (id < 0 || id >= table.rows) id = 0;
    return {table.bits + id * table.row_bytes(), table.scale + id};
  }

  DUALBIN_FETCHES void fetch(const LaterRow& row) const {
    prefetch(row.bits, table.row_bytes());
    prefetch(row.scale);
  }

  // Kernels leave what is not finite, and scales that are tiny, to the portable code.
  bool suits(float scale) const {
    if (table.planes == 1) return type == FloatType::kF32 || std::isfinite(scale);
    return std::isfinite(scale) && std::fabs(scale) >= kLeastLevelScale;
  }

  void other_row(int64_t id, float scale, void* row) const {
    if (scale == 0.0f) {
      std::memset(row, 0, static_cast<size_t>(row_bytes()));
    } else if (type == FloatType::kF32) {
      lookup_row(table, id, scale, narrow_f32, kSigns32, static_cast<uint32_t*>(row));
    } else {
      lookup_row(table, id, scale, type == FloatType::kF16 ? narrow_f16 : narrow_bf16, kSigns16, static_cast<uint16_t*>(row));
    }
  }

  void run(int64_t begin, int64_t end) const {
    const LookupShape shape{table.dim, table.width(), table.planes, streams(out, ids.count, row_bytes())};
    // Scales are read for kRowsOfCall rows before the first of them fetches anything, so the distance is not below that.
    const int64_t ahead = kRowsOfCall + std::clamp<int64_t>(kColumnsAhead / table.dim, 2, 16);
    for (int64_t n = begin; n < std::min(end, begin + ahead); ++n) fetch(later(n));
    LookupRow rows[kRowsOfCall];
    int64_t count = 0;
    const auto flush = [&] {
      if (count > 0) kernels.lookup[static_cast<int>(type)](rows, count, shape);
      count = 0;
    };
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = id_at(ids, n);
      const float scale = id >= 0 && id < table.rows ? table.scale[id] : 0.0f;
      void* row = out + n * row_bytes();
      if (scale == 0.0f || !suits(scale)) {
        other_row(id, scale, row);
        fetch(later(n + ahead));
        continue;
      }
      rows[count++] = {table.bits + id * table.row_bytes(), scale, row, later(n + ahead)};
      if (count == kRowsOfCall) flush();
    }
    flush();
    if (shape.streamed) kernels.finish_streams();
  }
};

}  // namespace

Status CpuBackend::lookup(const Launch& launch, const LookupCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  const Ids& ids = call.ids;
  void* out = call.out;
  if (ids.count == 0) return {};
  if (call.bad_ids == BadIds::kReport) DUALBIN_TRY(check_ids(launch.executor, ids, 0, ids.count, table.rows));
  if (kernels_ != nullptr) {
    const LookupJob job{*kernels_, table, ids, call.type, static_cast<char*>(out)};
    const int64_t grain = std::max<int64_t>(1, 131072 / table.dim);
    parallel_range(launch.executor, ids.count, grain, [&](int64_t begin, int64_t end, int) { job.run(begin, end); });
    return {};
  }
  switch (call.type) {
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
