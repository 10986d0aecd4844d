// Which results go past the caches.
#pragma once

#include <cstdint>

#include "cpu/prefetch.h"

namespace dualbin::detail {

constexpr int64_t kLeastStreamed = 8 << 20;  // bytes of a result that no cache keeps for whoever reads it next

// Rows of a result, side by side from `out` on.
inline bool streams(const void* out, int64_t rows, int64_t row_bytes) {
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kLineBytes == 0 && row_bytes % kLineBytes == 0;
  return aligned && rows * row_bytes >= kLeastStreamed;
}

}  // namespace dualbin::detail
