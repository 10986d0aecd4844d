// What the workspace of make_workspace() has room for on any device: for programs that are compiled without one, or for a batch of any
// size.
#include <algorithm>

#include "core/backend.h"
#include "kernels/groups.h"
#include "kernels/tuning.h"

namespace dualbin {

WorkspaceBound cuda_workspace_bound(Op op, int64_t dim) {
  using kernels::Tuning;
  constexpr int64_t kIndex = sizeof(uint64_t);
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(float));
  // slot_limit() is the floor of a fixed share of the ids: with one slot more, that of 2^20 ids is an upper bound of the share. There are
  // fewer rows of many blocks than slots.
  constexpr int64_t kMany = int64_t{1} << 20;
  const int64_t slot_bytes = static_cast<int64_t>(sizeof(kernels::LongBlock) + sizeof(kernels::LongRow)) + row_bytes;
  const int64_t slots = ((kernels::slot_limit(kMany) + 1) * slot_bytes + kMany - 1) / kMany;
  WorkspaceBound bound;
  bound.per_id =
      5 * kIndex + slots + 3;  // keys and order twice, starts; and what CUB takes: 1 KiB for each of its tiles of 1024 ids and more
  bound.fixed = 2 * kMany;     // alignment, counters, histograms, and counts of every digit in every block of group_ids()
  static_assert((int64_t{4} << Tuning::GroupIds::kMostBits) * Tuning::GroupIds::kMostBlocks <= kMany);
  if (op == Op::kUpdate && dim > Tuning::Update::kSharedRowLimit) bound.fixed += std::max(Tuning::Update::kRowBufferBytes, row_bytes);
  return bound;
}

}  // namespace dualbin
