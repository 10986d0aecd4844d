// Gradients of bags with every instruction set of this processor beside those with the code of rules/: the same bits.
#include <cstdlib>

#include "simd_support.h"

using namespace dualbin;

namespace {

constexpr FloatType kTypes[] = {FloatType::kF32, FloatType::kF16, FloatType::kBF16};
constexpr int64_t kRows = 40;
constexpr int64_t kPadding = 6;
const int64_t kDims[] = {1, 7, 8, 9, 31, 32, 64, 100, 128, 130, 384, 767, 1100};

size_t size_of(FloatType type) { return type == FloatType::kF32 ? 4 : 2; }

struct Given {
  std::vector<int64_t> ids, offsets;
  std::vector<float> weights;

  Given(int64_t count, int64_t longest, std::mt19937_64& random) : ids(random_ids(count, kRows, random)), offsets{3, 3} {
    while (offsets.back() < count - 20) {
      offsets.push_back(std::min<int64_t>(count - 20, offsets.back() + static_cast<int64_t>(random() % static_cast<uint64_t>(longest))));
    }
    for (int64_t n = 0; n < count; ++n) weights.push_back(n % 9 == 4 ? 1e-39f : 0.1f * static_cast<float>(n % 13) - 0.5f);
  }

  int64_t bags() const { return static_cast<int64_t>(offsets.size()) - 1; }
  Bags all(BagMode mode, bool weighted) const {
    return {ids_of(ids), ids_of(offsets), weighted ? weights.data() : nullptr, mode, kPadding};
  }
};

void compare_rows(const Given& given, int64_t dim, FloatType type, BagMode mode, bool weighted, std::mt19937_64& random) {
  const std::vector<char> dy = gradients(given.bags(), dim, type, random);
  std::vector<int32_t> counts;
  for (int64_t g = 0; g < given.bags(); ++g) counts.push_back(static_cast<int32_t>(random() % 5));
  const size_t bytes = given.ids.size() * static_cast<size_t>(dim) * size_of(type);
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(64, 2 * ((bytes + 127) / 64 * 64)));
  uint8_t* outs[2] = {memory, memory + (bytes + 127) / 64 * 64};
  const auto write = [&](const char* level, uint8_t* out) {
    std::memset(out, 0xaa, bytes + 64);  // nothing is written behind it
    CHECK(use_simd(level).ok());
    const BagGradientCall call{given.all(mode, weighted), {dy.data(), type}, dim, mode == BagMode::kMean ? counts.data() : nullptr, out};
    CHECK(cpu().bag_gradient({}, call).ok());
  };
  write("portable", outs[0]);
  for_other_levels([&](const char* level) {
    write(level, outs[1]);
    const bool equal = std::memcmp(outs[0], outs[1], bytes + 64) == 0;
    CHECK(equal);
    if (!equal)
      std::fprintf(stderr, "%s: D=%d, type %d, mode %d\n", level, static_cast<int>(dim), static_cast<int>(type), static_cast<int>(mode));
  });
  std::free(memory);
}

TEST(gradients_of_rows) {
  std::mt19937_64 random(5);
  const Given given(300, 40, random);
  for (const int64_t dim : kDims) {
    for (const FloatType type : kTypes) {
      compare_rows(given, dim, type, BagMode::kSum, false, random);
      compare_rows(given, dim, type, BagMode::kSum, true, random);
      compare_rows(given, dim, type, BagMode::kMean, false, random);
      compare_rows(given, dim, type, BagMode::kMajority, false, random);
    }
  }
}

// Results that are large and aligned go past the caches.
TEST(large_gradients_of_rows) {
  std::mt19937_64 random(6);
  for (const FloatType type : kTypes) {
    const Given given((9 << 20) / (96 * static_cast<int64_t>(size_of(type))), 40, random);
    compare_rows(given, 96, type, BagMode::kMean, false, random);
    compare_rows(given, 96, type, BagMode::kSum, true, random);
  }
}

TEST(gradients_of_weights) {
  std::mt19937_64 random(7);
  const Given given(300, 40, random);
  for (const int64_t dim : kDims) {
    for (int planes = 1; planes <= 8; ++planes) {
      Rule rule;
      rule.bits = planes;
      World world(kRows, dim, planes, rule, false, random);
      for (const FloatType type : kTypes) {
        const std::vector<char> dy = gradients(given.bags(), dim, type, random);
        const auto write = [&](const char* level) {
          CHECK(use_simd(level).ok());
          std::vector<float> out(given.ids.size(), -1.0f);
          CHECK(cpu().bag_weight_gradient({}, {world.table(), given.all(BagMode::kSum, true), {dy.data(), type}, out.data()}).ok());
          return out;
        };
        const std::vector<float> want = write("portable");
        for_other_levels([&](const char* level) {
          const bool equal = World::same(write(level), want);
          CHECK(equal);
          if (!equal) std::fprintf(stderr, "%s: D=%d, %d planes, type %d\n", level, static_cast<int>(dim), planes, static_cast<int>(type));
        });
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
