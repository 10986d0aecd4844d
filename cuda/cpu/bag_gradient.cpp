// Gradients of bags on the CPU: positions side by side, each looks for its bag.
#include <algorithm>
#include <cstring>

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"
#include "cpu/streams.h"
#include "rules/bag.h"
#include "rules/planes.h"

namespace dualbin::detail {

namespace {

// Sum of a row of dy times the weights of the row `id`: 32 strided lanes in ascending order, folded in halves as a GPU warp does.
template <typename Format>
double aligned_sum(const typename Format::Storage* dy, const Table& table, int64_t id) {
  const uint8_t* packed = table.bits + id * table.row_bytes();
  const double unit = static_cast<double>(plane_unit(table.planes));
  const int64_t dim = table.dim;
  double lanes[32] = {0.0};
  for (int64_t start = 0; start < dim; start += 32) {
    const int64_t count = std::min<int64_t>(32, dim - start);
    for (int64_t lane = 0; lane < count; ++lane) {
      const double value = static_cast<double>(Format::widen(dy[start + lane]));
      const int32_t odd = weight_of(packed + (start + lane) / 8, table.width(), table.planes, static_cast<int>(lane % 8));
      lanes[lane] += value * (static_cast<double>(odd) * unit);
    }
  }
  for (int half = 16; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// The bags of ascending positions: mostly that of the position before.
class BagCursor {
 public:
  explicit BagCursor(const Bags& bags) : bags_(bags) {}

  int64_t operator()(int64_t n) {
    if (bag_ >= 0 && n < end_) return bag_;
    bag_ = bag_of(bags_, n, id_at);
    if (bag_ >= 0) end_ = id_at(bags_.offsets, bag_ + 1);
    return bag_;
  }

 private:
  const Bags& bags_;
  int64_t bag_ = -1;
  int64_t end_ = 0;
};

// Positions [begin, end) of a gradient of bags by kernels.
void share_by_kernels(const Kernels& kernels, const BagGradientCall& call, bool streamed, int64_t begin, int64_t end) {
  const Bags& bags = call.bags;
  const int64_t row_bytes = call.dim * (call.dy.type == FloatType::kF32 ? 4 : 2);
  const auto share_row = kernels.share_row[static_cast<int>(call.dy.type)];
  BagCursor bag_at(bags);
  for (int64_t n = begin; n < end; ++n) {
    char* row = static_cast<char*>(call.out) + n * row_bytes;
    const int64_t bag = bag_at(n);
    if (bag < 0 || id_at(bags.ids, n) == bags.padding_idx) {
      std::memset(row, 0, static_cast<size_t>(row_bytes));
      continue;
    }
    const BagShare share = bag_share(bags, call.counts, bag, n);
    share_row(static_cast<const char*>(call.dy.data) + bag * row_bytes, call.dim, share.factor, share.divisor, streamed, row);
  }
  if (streamed) kernels.finish_streams();
}

}  // namespace

Status CpuBackend::bag_counts(const Launch& launch, const BagCountsCall& call) const {
  DUALBIN_TRY(call.check());
  const Bags& bags = call.bags;
  DUALBIN_TRY(check_offsets(bags));
  const int64_t average = bags.ids.count / std::max<int64_t>(bags.count(), 1) + 1;
  parallel_range(launch.executor, bags.count(), 16384 / average, [&](int64_t begin, int64_t end, int) {
    for (int64_t g = begin; g < end; ++g) {
      int32_t count = 0;
      for (int64_t n = id_at(bags.offsets, g); n < id_at(bags.offsets, g + 1); ++n) {
        count += bag_scale(call.scale, call.rows, id_at(bags.ids, n), bags.padding_idx) != 0.0f;
      }
      call.out[g] = count;
    }
  });
  return {};
}

Status CpuBackend::bag_gradient(const Launch& launch, const BagGradientCall& call) const {
  DUALBIN_TRY(call.check());
  const Bags& bags = call.bags;
  const int64_t dim = call.dim;
  DUALBIN_TRY(check_offsets(bags));
  if (kernels_ != nullptr) {
    const bool streamed = streams(call.out, bags.ids.count, dim * (call.dy.type == FloatType::kF32 ? 4 : 2));
    parallel_range(launch.executor, bags.ids.count, std::max<int64_t>(1, 131072 / dim),
                   [&](int64_t begin, int64_t end, int) { share_by_kernels(*kernels_, call, streamed, begin, end); });
    return {};
  }
  return with_float(call.dy.type, [&](auto format) -> Status {
    using Format = decltype(format);
    using Storage = typename Format::Storage;
    parallel_range(launch.executor, bags.ids.count, std::max<int64_t>(1, 32768 / dim), [&](int64_t begin, int64_t end, int) {
      BagCursor bag_at(bags);
      for (int64_t n = begin; n < end; ++n) {
        Storage* row = static_cast<Storage*>(call.out) + n * dim;
        const int64_t bag = bag_at(n);
        if (bag < 0 || id_at(bags.ids, n) == bags.padding_idx) {
          std::fill_n(row, dim, Storage{0});
          continue;
        }
        const Storage* from = static_cast<const Storage*>(call.dy.data) + bag * dim;
        const BagShare share = bag_share(bags, call.counts, bag, n);
        for (int64_t d = 0; d < dim; ++d) row[d] = Format::narrow(share(Format::widen(from[d])));
      }
    });
    return {};
  });
}

Status CpuBackend::bag_weight_gradient(const Launch& launch, const BagWeightGradientCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& table = call.table;
  const Bags& bags = call.bags;
  DUALBIN_TRY(check_offsets(bags));
  const LookupShape shape{table.dim, table.width(), table.planes, false};
  const int64_t weights = kernels_ != nullptr ? 65536 : 16384;
  return with_float(call.dy.type, [&](auto format) -> Status {
    using Format = decltype(format);
    parallel_range(launch.executor, bags.ids.count, std::max<int64_t>(1, weights / table.dim), [&](int64_t begin, int64_t end, int) {
      BagCursor bag_at(bags);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t bag = bag_at(n);
        const int64_t id = id_at(bags.ids, n);
        const float scale = bag < 0 ? 0.0f : bag_scale(table.scale, table.rows, id, bags.padding_idx);
        call.out[n] = 0.0f;
        if (scale == 0.0f) continue;
        const auto* from = static_cast<const typename Format::Storage*>(call.dy.data) + bag * table.dim;
        const double sum = kernels_ == nullptr
                               ? aligned_sum<Format>(from, table, id)
                               : kernels_->weigh_row[static_cast<int>(call.dy.type)](from, table.bits + id * table.row_bytes(), shape);
        call.out[n] = bag_weight_share(scale, sum);
      }
    });
    return {};
  });
}

}  // namespace dualbin::detail
