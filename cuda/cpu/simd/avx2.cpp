// The kernels in AVX2, with F16C.
#include "cpu/simd/levels.h"

#if defined(DUALBIN_WITH_X86_SIMD)
#include "cpu/simd/vector_avx2.h"

#include "cpu/simd/table.h"

namespace dualbin::detail {

const Kernels kAvx2 = make_kernels("avx2");

}  // namespace dualbin::detail
#endif
