// What the tests of the CPU back end share.
#pragma once

#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/backend.h"

namespace dualbin {

inline Ids ids_of(const std::vector<int64_t>& ids) { return {ids.data(), IdType::kI64, static_cast<int64_t>(ids.size())}; }

inline bool says(const Status& status, Code code, const char* text) {
  return status.code == code && std::string(status.message).find(text) != std::string::npos;
}

// Threads started and joined for every call: enough for a test.
struct ThreadExecutor {
  Executor executor{&ThreadExecutor::run, this, 4};

  static void run(void*, int64_t tasks, Executor::Task task, void* context) {
    std::vector<std::thread> threads;
    for (int worker = 0; worker < 4; ++worker) {
      threads.emplace_back([=] {
        for (int64_t i = worker; i < tasks; i += 4) task(context, i, worker);
      });
    }
    for (auto& thread : threads) thread.join();
  }
};

}  // namespace dualbin
