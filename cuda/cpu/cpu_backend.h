// The CPU back end. Its functions are spread over lookup.cpp, bag.cpp, bag_gradient.cpp, segments.cpp,
// update.cpp and average.cpp.
#pragma once

#include "dualbin/backend.h"

namespace dualbin::detail {

class CpuBackend final : public Backend {
 public:
#include "core/backend_overrides.h"
};

}  // namespace dualbin::detail
