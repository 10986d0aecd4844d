// The average of two tables on the GPU: a warp for each row, eight weights (one byte of every plane) for each lane.
#include "rules/average.h"

#include "core/checks.h"
#include "kernels/cuda_backend.h"
#include "kernels/cuda_check.h"
#include "kernels/memory.cuh"
#include "kernels/tuning.h"
#include "rules/row.h"

namespace dualbin::kernels {

namespace {

using Policy = Tuning::Average;

// `out` may be the memory of a or of b: a byte is read and written by one lane, and the scales are read before one of them is written.
__global__ void __launch_bounds__(Policy::kThreads)
    average_rows(const Table a, const Table b, const StepContext* context, const Table out) {
  const int lane = threadIdx.x % 32;
  const int64_t width = a.width();
  const int64_t warps = static_cast<int64_t>(gridDim.x) * Policy::kWarps;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * Policy::kWarps + threadIdx.x / 32; r < a.rows; r += warps) {
    const AverageRow row = average_row(context->seed, context->step, global_row(*context, r), a.scale[r], b.scale[r], context->lr);
    __syncwarp();
    if (lane == 0) out.scale[r] = row.scale;
    for (int64_t i = lane; i < width; i += 32) average_byte(row, r, i, a, b, out);
  }
}

}  // namespace

Status CudaBackend::average(const Launch& launch, const AverageCall& call) const {
  DUALBIN_TRY(call.check());
  int processors = 0;
  DUALBIN_TRY(multiprocessors(&processors));
  const unsigned grid = grid_size(call.a.rows, Policy::kWarps, Policy::kBlocksPerSm * processors);
  average_rows<<<grid, Policy::kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(call.a, call.b, call.context, call.out);
  DUALBIN_CUDA_LAUNCHED("average_rows");
  return {};
}

}  // namespace dualbin::kernels
