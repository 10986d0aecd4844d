// The CPU back end. Its functions are spread over the files of this folder.
#pragma once

#include "dualbin/backend.h"

namespace dualbin::detail {

class CpuBackend final : public Backend {
 public:
#include "core/backend_overrides.h"
};

}  // namespace dualbin::detail
