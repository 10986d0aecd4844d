// The smallest test harness: TEST registers a test, CHECK counts failures, run_tests runs the tests whose name contains a filter.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstring>
#include <vector>

struct Test {
  const char* name;
  void (*body)();
};

inline std::atomic<int> failures{0};  // some tests check in several threads
inline std::atomic<int> checks{0};

inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

inline bool add_test(const char* name, void (*body)()) {
  tests().push_back({name, body});
  return true;
}

// TEST(name) { ... }: tests run in the order in which a file lists them.
#define TEST(name)                                                         \
  void test_##name();                                                      \
  [[maybe_unused]] const bool added_##name = add_test(#name, test_##name); \
  void test_##name()

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    ++checks;                                                                            \
    if (!(condition)) {                                                                  \
      ++failures;                                                                        \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
    }                                                                                    \
  } while (false)

// PROGRAM [FILTER]: the exit status is 0 if every test passes, 1 if one fails, 2 if there is none of that name.
inline int run_tests(int argc, char** argv) {
  const char* filter = argc == 2 ? argv[1] : "";
  int run = 0;
  int failed = 0;
  for (const Test& test : tests()) {
    if (argc > 2 || std::strstr(test.name, filter) == nullptr) continue;
    const int before = failures;
    test.body();
    ++run;
    if (failures == before) continue;
    ++failed;
    std::fprintf(stderr, "test %s failed: %d checks\n", test.name, failures - before);
  }
  if (run == 0) {
    std::fprintf(stderr, "usage: %s [FILTER], a part of the names of tests:\n", argv[0]);
    for (const Test& test : tests()) std::fprintf(stderr, "  %s\n", test.name);
    return 2;
  }
  std::printf("%d tests, %d failed; %d checks, %d failed\n", run, failed, checks.load(), failures.load());
  return failures == 0 ? 0 : 1;
}
