// The operations on packed tables. One list, two back ends: cpu() and cuda(). docs/design.md defines the results to the last bit; the
// structs of core/ops say what each operation is called with and check it.
//
// No call allocates, synchronises with a device, or keeps state (but with DUALBIN_DEBUG=1, see cpu/update.cpp); CUDA work is ordered by
// Launch::stream. Arguments are checked before anything is written, and a call that returns an error has changed nothing (on CUDA: unless
// the error came from the device itself).
#pragma once

#include "core/ops/average.h"
#include "core/ops/bag.h"
#include "core/ops/exchange.h"
#include "core/ops/lookup.h"
#include "core/ops/pack.h"
#include "core/ops/sums.h"
#include "core/ops/update.h"

// Name of the function, struct of its arguments. Their bindings are made from `arguments()` of the struct: those of the first list are
// functions of dualbin._native only, those of the second are targets of XLA too. The bindings of the third are written by hand.
#define DUALBIN_PYTHON_OPERATIONS(X) \
  X(pack, PackCall)                  \
  X(unpack, UnpackCall)              \
  X(fewer_planes, FewerPlanesCall)   \
  X(route, RouteCall)                \
  X(slot_means, SlotMeansCall)       \
  X(take_rows, TakeRowsCall)         \
  X(put_rows, PutRowsCall)
#define DUALBIN_SHARED_OPERATIONS(X)            \
  X(lookup, LookupCall)                         \
  X(lookup_bag, LookupBagCall)                  \
  X(bag_counts, BagCountsCall)                  \
  X(bag_gradient, BagGradientCall)              \
  X(bag_weight_gradient, BagWeightGradientCall) \
  X(reduce_rows, ReduceRowsCall)                \
  X(segment_sum, SegmentSumCall)                \
  X(xor_rows, XorRowsCall)                      \
  X(average, AverageCall)
#define DUALBIN_STEP_OPERATIONS(X) X(update, UpdateCall) X(advance, AdvanceCall)

#define DUALBIN_OPERATIONS(X) DUALBIN_PYTHON_OPERATIONS(X) DUALBIN_SHARED_OPERATIONS(X) DUALBIN_STEP_OPERATIONS(X)

namespace dualbin {

class Backend {
 public:
  virtual ~Backend() = default;

  // Bytes of workspace that `op` wants for `count` ids, a table of `rows` rows (or that many segments) and `dim` columns.
  virtual size_t workspace_bytes(Op op, const Executor* executor, int64_t count, int64_t rows, int64_t dim) const = 0;

#define DUALBIN_DECLARE(name, Call) virtual Status name(const Launch& launch, const Call& call) const = 0;
  DUALBIN_OPERATIONS(DUALBIN_DECLARE)
#undef DUALBIN_DECLARE
};

// In the body of the class of a back end: what Backend declares.
#define DUALBIN_OVERRIDE(name, Call) Status name(const Launch& launch, const Call& call) const override;
#define DUALBIN_BACKEND_FUNCTIONS                                                                                   \
  size_t workspace_bytes(Op op, const Executor* executor, int64_t count, int64_t rows, int64_t dim) const override; \
  DUALBIN_OPERATIONS(DUALBIN_OVERRIDE)

const Backend& cpu();
const Backend* cuda();  // null when the library was built without CUDA

// Bytes of workspace, fixed + per_id for every id, that are enough for `op` on every GPU and with any number of rows: for programs that are
// compiled without theirs, or for any number of ids. Zeros when the library was built without CUDA.
struct WorkspaceBound {
  int64_t fixed = 0;
  int64_t per_id = 0;
};
WorkspaceBound cuda_workspace_bound(Op op, int64_t dim);

// Tells the system that fresh memory will be written to, so that it comes in huge pages, whole ones within it only: the faults of small
// pages take several times as long as a lookup. Without a meaning on other systems than Linux.
void expect_writes(void* data, size_t bytes);

// Bytes of a result from which on it is worth it, if the memory is fresh. Allocators keep memory of up to 32 MB where they can, which
// depends on what else lies at the end of theirs.
constexpr size_t kLeastHugeResult = size_t{1} << 22;

// Instruction set that the CPU back end uses: the best one that this build and this processor have, until use_simd() chooses another.
const char* simd_level();

// Those that there are to choose from, "portable" first, the best last; null behind them.
const char* simd_level(int index);

// From the next call of cpu() on; null: the best. Results are the same with each.
Status use_simd(const char* name);

}  // namespace dualbin
