// Stands in for the CUDA back end in a build without it.
#include "dualbin/backend.h"

#if !defined(DUALBIN_WITH_CUDA)
namespace dualbin {

const Backend* cuda() { return nullptr; }

}  // namespace dualbin
#endif
