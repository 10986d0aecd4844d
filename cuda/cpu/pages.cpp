// Pages of results that nobody has written to.
#include <cstdint>

#include "core/backend.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dualbin {

void expect_writes(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // no more than a hint: it may fail
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace dualbin
