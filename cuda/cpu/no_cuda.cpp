// Stands in for the CUDA back end in a build without it.
#include "core/backend.h"

#if !defined(DUALBIN_WITH_CUDA)
namespace dualbin {

const Backend* cuda() { return nullptr; }

}  // namespace dualbin
#endif
