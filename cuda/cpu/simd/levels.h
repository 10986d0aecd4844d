// The instruction sets that this build has kernels for.
#pragma once

#include "cpu/simd/kernels.h"

namespace dualbin::detail {

#if defined(DUALBIN_WITH_X86_SIMD)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace dualbin::detail
