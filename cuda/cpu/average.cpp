// The average of two tables on the CPU, row by row.
#include "rules/average.h"

#include "core/checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/parallel.h"
#include "rules/row.h"

namespace dualbin::detail {

Status CpuBackend::average(const Launch& launch, const AverageCall& call) const {
  DUALBIN_TRY(call.check());
  const Table& a = call.a;
  const StepContext* context = call.context;
  const float weight = context->lr;
  DUALBIN_REQUIRE(is_weight(weight), Code::kInvalidArgument, "weight must be between 0 and 1, got %g", static_cast<double>(weight));
  const int64_t width = a.width();
  parallel_range(launch.executor, a.rows, std::max<int64_t>(1, 4096 / a.dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const AverageRow row = average_row(context->seed, context->step, global_row(*context, r), a.scale[r], call.b.scale[r], weight);
      for (int64_t i = 0; i < width; ++i) average_byte(row, r, i, a, call.b, call.out);
      call.out.scale[r] = row.scale;
    }
  });
  return {};
}

}  // namespace dualbin::detail
