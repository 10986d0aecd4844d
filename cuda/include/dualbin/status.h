// Result of a core call: a code and a message in a fixed buffer, so that reporting an error allocates nothing.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace dualbin {

enum class Code { kOk = 0, kInvalidArgument = 1, kOutOfRange = 2, kWrongType = 3, kInternal = 4 };

struct [[nodiscard]] Status {
  Code code = Code::kOk;
  char message[256] = {0};

  bool ok() const { return code == Code::kOk; }
};

// Builds an error; use DUALBIN_ERROR, which fills in the place.
#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
inline Status error(Code code, const char* file, int line, const char* format, ...) {
  Status status;
  status.code = code;
  va_list args;
  va_start(args, format);
  const int used = std::vsnprintf(status.message, sizeof(status.message), format, args);
  va_end(args);
  if (used >= 0 && used < static_cast<int>(sizeof(status.message))) {
    std::snprintf(status.message + used, sizeof(status.message) - static_cast<size_t>(used), " [%s:%d]", file, line);
  }
  return status;
}

}  // namespace dualbin

#ifdef __FILE_NAME__
#define DUALBIN_FILE __FILE_NAME__
#else  // older than gcc 12: the whole path is better than nothing
#define DUALBIN_FILE __FILE__
#endif

// An error with the place it came from: a code, a printf format and its arguments.
#define DUALBIN_ERROR(code, ...) ::dualbin::error(code, DUALBIN_FILE, __LINE__, __VA_ARGS__)

// Returns an error from the enclosing function when `condition` does not hold.
#define DUALBIN_REQUIRE(condition, code, ...)                  \
  do {                                                         \
    if (!(condition)) return DUALBIN_ERROR(code, __VA_ARGS__); \
  } while (false)

// Passes an error of a callee on to the caller.
#define DUALBIN_TRY(expression)                        \
  do {                                                 \
    ::dualbin::Status dualbin_status_ = (expression);  \
    if (!dualbin_status_.ok()) return dualbin_status_; \
  } while (false)
