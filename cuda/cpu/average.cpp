// The average of two tables on the CPU, row by row.
#include "rules/average.h"

#include <algorithm>

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/parallel.h"
#include "rules/row.h"

namespace dualbin::detail {

namespace {

constexpr int64_t kRowsOfCall = 16;

struct AverageJob {
  const AverageCall& call;
  float weight;

  AverageRow row(int64_t r) const {
    const StepContext& context = *call.context;
    return average_row(context.seed, context.step, global_row(context, r), call.a.scale[r], call.b.scale[r], weight);
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t width = call.a.width();
    for (int64_t r = begin; r < end; ++r) {
      const AverageRow row = this->row(r);
      for (int64_t i = 0; i < width; ++i) average_byte(row, r, i, call.a, call.b, call.out);
      call.out.scale[r] = row.scale;
    }
  }

  void run(const Kernels& kernels, int64_t begin, int64_t end) const {
    const Table& a = call.a;
    const auto last = static_cast<uint8_t>(a.dim % 8 == 0 ? 0xff : (1 << a.dim % 8) - 1);
    const AverageShape shape{a.width(), a.planes, last};
    for (int64_t first = begin; first < end; first += kRowsOfCall) {
      RowPair rows[kRowsOfCall];
      const int64_t count = std::min(kRowsOfCall, end - first);
      for (int64_t i = 0; i < count; ++i) {
        const AverageRow row = this->row(first + i);
        const int64_t at = (first + i) * a.row_bytes();
        rows[i] = {a.bits + at, call.b.bits + at, call.out.bits + at, row.key.k0, row.key.k1, row.threshold, row.invert_b};
        call.out.scale[first + i] = row.scale;
      }
      kernels.average_rows(rows, count, shape);
    }
  }
};

}  // namespace

Status CpuBackend::average(const Launch& launch, const AverageCall& call) const {
  DUALBIN_TRY(call.check());
  const float weight = call.context->lr;
  DUALBIN_REQUIRE(is_weight(weight), Code::kInvalidArgument, "weight must be between 0 and 1, got %g", static_cast<double>(weight));
  const AverageJob job{call, weight};
  const int64_t weights = kernels_ != nullptr ? 65536 : 4096;
  parallel_range(launch.executor, call.a.rows, std::max<int64_t>(1, weights / call.a.dim),
                 [&](int64_t begin, int64_t end, int) { kernels_ != nullptr ? job.run(*kernels_, begin, end) : job.run(begin, end); });
  return {};
}

}  // namespace dualbin::detail
