// Lookup of bags on the CPU: a tile of columns of one bag is summed on the stack, straight from the packed rows.
#include "rules/bag.h"

#include <cmath>

#include "cpu/cpu_backend.h"
#include "cpu/floats.h"
#include "cpu/ids.h"
#include "cpu/parallel.h"
#include "cpu/prefetch.h"
#include "rules/planes.h"

namespace dualbin::detail {

namespace {

constexpr int64_t kTileBytes = 64;  // a cache line of a packed row; the sums of its columns stay in the first-level cache
constexpr int64_t kTile = 8 * kTileBytes;
constexpr int64_t kMostBagDim = 8192;  // kernels keep a row of sums on the stack

// Eight signs as floats for every value of a packed byte. A product with one is exact, and compilers make vector code of it.
struct UnitTable {
  float units[256][8];

  constexpr UnitTable() : units{} {
    for (int byte = 0; byte < 256; ++byte) {
      for (int k = 0; k < 8; ++k) units[byte][k] = ((byte >> k) & 1) != 0 ? 1.0f : -1.0f;
    }
  }
};

alignas(64) constexpr UnitTable kUnits;

struct BagJob {
  const Table& table;
  const Bags& bags;
  void* out;
  FloatType type;

  // Number of columns from `first` on that are in the tile.
  int64_t columns(int64_t first) const { return std::min(kTile, table.dim - first); }
};

// The weights of a byte of a table of several planes; `byte` is that of plane 0.
const float* read_levels(const Table& table, const uint8_t* byte, float (&levels)[8]) {
  const float unit = plane_unit(table.planes);
  for (int k = 0; k < 8; ++k) levels[k] = static_cast<float>(weight_of(byte, table.width(), table.planes, k)) * unit;
  return levels;
}

// Adds the rows of a bag to `total`; returns how many they are.
template <typename Kind>
int64_t add_bag(const BagJob& job, int64_t bag, int64_t first, typename Kind::Total* total) {
  const Table& table = job.table;
  const int64_t bytes = (job.columns(first) + 7) / 8;
  const int64_t end = id_at(job.bags.offsets, bag + 1);
  int64_t rows = 0;
  for (int64_t start = id_at(job.bags.offsets, bag); start < end; start += kSumBlock) {
    alignas(64) float block[kTile];
    std::fill_n(block, 8 * bytes, 0.0f);
    for (int64_t n = start; n < std::min(start + kSumBlock, end); ++n) {
      const int64_t id = id_at(job.bags.ids, n);
      const float scale = bag_scale(table.scale, table.rows, id, job.bags.padding_idx);
      if (scale == 0.0f) continue;
      const float magnitude = Kind::magnitude(job.bags.weights == nullptr ? scale : job.bags.weights[n] * scale);
      const uint8_t* packed = table.bits + id * table.row_bytes() + first / 8;
      for (int64_t b = 0; b < bytes; ++b) {
        float levels[8];
        const float* units = table.planes == 1 ? kUnits.units[packed[b]] : read_levels(table, packed + b, levels);
        float* to = block + 8 * b;
        float sums[8];  // all loads before the stores: compilers then see two vectors
        for (int k = 0; k < 8; ++k) sums[k] = to[k] + magnitude * units[k];
        for (int k = 0; k < 8; ++k) to[k] = sums[k];
      }
      ++rows;
    }
    for (int64_t c = 0; c < 8 * bytes; ++c) Kind::add(total + c, block[c]);
  }
  return rows;
}

template <typename Kind>
void write_tile(const BagJob& job, int64_t bag, int64_t first) {
  typename Kind::Total total[kTile] = {};
  const int64_t rows = add_bag<Kind>(job, bag, first, total);
  const int64_t at = bag * job.table.dim + first;
  for (int64_t c = 0; c < job.columns(first); ++c) {
    const float value = Kind::finish(total[c], rows, job.bags.mode);
    if (job.type == FloatType::kF32) {
      static_cast<float*>(job.out)[at + c] = value;
    } else {
      static_cast<uint16_t*>(job.out)[at + c] = job.type == FloatType::kF16 ? narrow_f16(value) : narrow_bf16(value);
    }
  }
}

// ---- by kernels

constexpr int64_t kIdsAhead = 24;
constexpr int64_t kMostVotes = int64_t{1} << 24;  // float32 counts so far

// A range of bags of one slice; `total` is room for a row of the result.
class BagsByKernels {
 public:
  BagsByKernels(const Kernels& kernels, const BagJob& job, float* total)
      : kernels_(kernels), job_(job), total_(total), votes_(job.bags.mode == BagMode::kMajority) {
    const Ids& ids = job.bags.ids;
    shape_ = {job.table.dim, job.table.width(), job.table.planes, false};
    source_ = {job.table.bits,           job.table.scale, job.table.rows, job.bags.padding_idx, ids.data,
               ids.type == IdType::kI32, ids.count,       kIdsAhead,      job.bags.weights,     votes_};
  }

  // False where a bag has more votes than float32 counts, or a factor that kernels do not take; nothing is written then.
  bool sum(int64_t bag) {
    const int64_t begin = id_at(job_.bags.offsets, bag);
    const int64_t end = id_at(job_.bags.offsets, bag + 1);
    if (votes_ && end - begin > kMostVotes) return false;
    if (shape_.planes <= 2 && shape_.dim <= kMostNarrow) {
      finish(bag, kernels_.sum_narrow_bag(source_, begin, end, shape_, total_));
      return true;
    }
    bool first = true;
    int64_t count = 0;
    for (int64_t start = begin; start < end; start += kSumBlock) {
      BagRow rows[kSumBlock];
      int64_t used = 0;
      for (int64_t n = start; n < std::min(start + kSumBlock, end); ++n) {
        const int64_t id = id_at(job_.bags.ids, n);
        const float scale = bag_scale(job_.table.scale, job_.table.rows, id, job_.bags.padding_idx);
        const LaterRow ahead = later(n);
        if (scale == 0.0f) {
          prefetch(ahead.bits);
          prefetch(ahead.scale);
          continue;
        }
        const float factor = votes_ ? 1.0f : job_.bags.weights == nullptr ? scale : job_.bags.weights[n] * scale;
        if (shape_.planes > 1 && !(std::fabs(factor) >= kLeastLevelScale && std::isfinite(factor))) return false;
        rows[used++] = {job_.table.bits + id * job_.table.row_bytes(), factor, ahead};
      }
      if (used == 0) continue;
      kernels_.add_block(rows, used, shape_, first, total_);
      first = false;
      count += used;
    }
    if (first) std::fill_n(total_, shape_.dim, 0.0f);
    finish(bag, count);
    return true;
  }

 private:
  void finish(int64_t bag, int64_t count) const {
    const int64_t at = bag * shape_.dim * (job_.type == FloatType::kF32 ? 4 : 2);
    const float divisor = job_.bags.mode == BagMode::kMean && count > 1 ? static_cast<float>(count) : 1.0f;
    kernels_.finish_bag[static_cast<int>(job_.type)](total_, shape_.dim, divisor, votes_ && count > 0, static_cast<char*>(job_.out) + at);
  }

  // What is fetched while position n is added; row 0 where nothing is left.
  LaterRow later(int64_t n) const {
    int64_t id = n + kIdsAhead < job_.bags.ids.count ? id_at(job_.bags.ids, n + kIdsAhead) : 0;
    if (id < 0 || id >= job_.table.rows) id = 0;
    return {job_.table.bits + id * job_.table.row_bytes(), job_.table.scale + id};
  }

  const Kernels& kernels_;
  const BagJob& job_;
  float* total_;
  const bool votes_;
  LookupShape shape_;
  BagSource source_;
};

Status check_bag_values(const Launch& launch, const Table& table, const Bags& bags, BadIds bad_ids) {
  DUALBIN_TRY(check_offsets(bags));
  if (bad_ids != BadIds::kReport) return {};
  return check_ids(launch.executor, bags.ids, id_at(bags.offsets, 0), id_at(bags.offsets, bags.count()), table.rows);
}

}  // namespace

Status CpuBackend::lookup_bag(const Launch& launch, const LookupBagCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  const Bags& bags = call.bags;
  DUALBIN_TRY(check_bag_values(launch, table, bags, call.bad_ids));
  if (bags.count() == 0) return {};
  const BagJob job{table, bags, call.out, call.type};
  const int64_t tiles = (table.dim + kTile - 1) / kTile;  // a few wide bags still keep every thread busy
  const auto tile = [&](int64_t bag, int64_t first) {
    if (bags.mode == BagMode::kMajority) {
      write_tile<BagVotes>(job, bag, first);
    } else {
      write_tile<BagSum>(job, bag, first);
    }
  };
  if (kernels_ != nullptr && table.dim <= kMostBagDim) {
    const int64_t weights = (bags.ids.count / bags.count() + 1) * table.dim;  // of an average bag
    parallel_range(launch.executor, bags.count(), std::max<int64_t>(1, 262144 / weights), [&](int64_t begin, int64_t end, int) {
      alignas(64) float total[kMostBagDim];
      BagsByKernels by_kernels(*kernels_, job, total);
      for (int64_t bag = begin; bag < end; ++bag) {
        if (by_kernels.sum(bag)) continue;
        for (int64_t i = 0; i < tiles; ++i) tile(bag, i * kTile);
      }
    });
    return {};
  }
  const int64_t columns = (bags.ids.count / bags.count() + 1) * std::min(table.dim, kTile);  // that an average tile adds up
  parallel_range(launch.executor, bags.count() * tiles, 32768 / columns, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) tile(i / tiles, i % tiles * kTile);
  });
  return {};
}

}  // namespace dualbin::detail
