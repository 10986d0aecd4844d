// Fetching what is read later into the caches.
#pragma once

#include <cstdint>

namespace dualbin::detail {

// GCC takes a function that does nothing but fetch for one without effects, and leaves calls of it out, unless it was inlined before it
// looks: every function around such a function needs this, too.
#if defined(__GNUC__)
#define DUALBIN_FETCHES inline __attribute__((always_inline))
#else
#define DUALBIN_FETCHES inline
#endif

constexpr int64_t kLineBytes = 64;

DUALBIN_FETCHES void prefetch(const void* data) {
#if defined(__GNUC__)
  __builtin_prefetch(data);
#else
  (void)data;
#endif
}

// Every cache line of data[0 .. bytes).
DUALBIN_FETCHES void prefetch(const void* data, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t line = begin - begin % kLineBytes; line < begin + static_cast<uintptr_t>(bytes); line += kLineBytes) {
    prefetch(reinterpret_cast<const void*>(line));
  }
}

}  // namespace dualbin::detail
