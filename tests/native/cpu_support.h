// What the tests of the CPU back end share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "core/backend.h"

namespace dualbin {

inline Ids ids_of(const std::vector<int64_t>& ids) { return {ids.data(), IdType::kI64, static_cast<int64_t>(ids.size())}; }

inline bool says(const Status& status, Code code, const char* text) {
  return status.code == code && std::string(status.message).find(text) != std::string::npos;
}

}  // namespace dualbin
