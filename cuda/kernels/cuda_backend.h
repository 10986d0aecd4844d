// The CUDA back end. Its functions are spread over the files of this folder.
#pragma once

#include "core/backend.h"

namespace dualbin::kernels {

class CudaBackend final : public Backend {
 public:
  // workspace_bytes needs a device: CUB sizes its sort for the current one, and row buffers follow its multiprocessors. 0 without a device;
  // the call that wants the workspace then reports why.
  DUALBIN_BACKEND_FUNCTIONS
};

}  // namespace dualbin::kernels
