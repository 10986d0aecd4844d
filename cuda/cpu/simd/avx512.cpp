// The kernels in AVX-512.
#include "cpu/simd/levels.h"

#if defined(DUALBIN_WITH_X86_SIMD)
#include "cpu/simd/vector_avx512.h"

#include "cpu/simd/table.h"

namespace dualbin::detail {

const Kernels kAvx512 = make_kernels("avx512");

}  // namespace dualbin::detail
#endif
