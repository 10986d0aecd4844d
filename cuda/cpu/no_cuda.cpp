// Stands in for the CUDA back end in a build without it.
#include "core/backend.h"

#if !defined(DUALBIN_WITH_CUDA)
namespace dualbin {

const Backend* cuda() { return nullptr; }

WorkspaceBound cuda_workspace_bound(Op, int64_t) { return {}; }

}  // namespace dualbin
#endif
