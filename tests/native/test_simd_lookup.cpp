// Lookups and bags with every instruction set of this processor beside those with the code of rules/: the same bits.
#include <cstdlib>

#include "simd_support.h"

using namespace dualbin;

namespace {

constexpr FloatType kTypes[] = {FloatType::kF32, FloatType::kF16, FloatType::kBF16};
constexpr int64_t kRows = 40;
const int64_t kDims[] = {1, 7, 8, 9, 31, 64, 100, 128, 130, 384, 767, 1100};

World table_of(int64_t dim, int planes, std::mt19937_64& random) {
  Rule rule;
  rule.bits = planes;
  World world(kRows, dim, planes, rule, false, random);
  world.scale[10] = 1e-40f;  // subnormal, and large enough to overflow in float16
  world.scale[11] = -3e38f;
  world.scale[12] = NAN;
  world.scale[13] = -INFINITY;
  world.scale[14] = 7e-37f;
  world.scale[15] = 6e-8f;
  world.scale[16] = 1.3e-29f;  // the least that kernels of several planes take, and one below it
  world.scale[18] = -1.2e-29f;
  world.scale[19] = 1.5f;  // products halfway between two bfloat16
  return world;
}

size_t size_of(FloatType type) { return type == FloatType::kF32 ? 4 : 2; }

TEST(lookups) {
  std::mt19937_64 random(3);
  for (const int64_t dim : kDims) {
    for (int planes = 1; planes <= 8; ++planes) {
      World world = table_of(dim, planes, random);
      const std::vector<int64_t> ids = random_ids(120, kRows, random);
      for (const FloatType type : kTypes) {
        const auto lookup = [&](const char* level) {
          CHECK(use_simd(level).ok());
          std::vector<uint8_t> out(ids.size() * static_cast<size_t>(dim) * size_of(type) + 64, 0xaa);  // nothing is written behind it
          CHECK(cpu().lookup({}, {world.table(), ids_of(ids), BadIds::kZeros, out.data(), type}).ok());
          return out;
        };
        const std::vector<uint8_t> want = lookup("portable");
        for_other_levels([&](const char* level) {
          const bool equal = lookup(level) == want;
          CHECK(equal);
          if (!equal) std::fprintf(stderr, "%s: D=%d, %d planes, type %d\n", level, static_cast<int>(dim), planes, static_cast<int>(type));
        });
      }
    }
  }
}

// Results that are large and aligned go past the caches.
TEST(large_lookups) {
  std::mt19937_64 random(4);
  for (const int64_t dim : {64, 96, 768}) {
    for (const int planes : {1, 2, 3, 4, 5, 8}) {
      World world = table_of(dim, planes, random);
      for (const FloatType type : kTypes) {
        const int64_t row = dim * static_cast<int64_t>(size_of(type));
        const std::vector<int64_t> ids = random_ids((9 << 20) / row, kRows, random);
        const size_t bytes = ids.size() * static_cast<size_t>(row);
        auto* memory = static_cast<uint8_t*>(std::aligned_alloc(64, 2 * (bytes + 64) / 64 * 64));
        uint8_t* outs[2] = {memory, memory + (bytes + 63) / 64 * 64};
        CHECK(use_simd("portable").ok());
        CHECK(cpu().lookup({}, {world.table(), ids_of(ids), BadIds::kZeros, outs[0], type}).ok());
        for_other_levels([&](const char* level) {
          CHECK(use_simd(level).ok());
          CHECK(cpu().lookup({}, {world.table(), ids_of(ids), BadIds::kZeros, outs[1], type}).ok());
          CHECK(std::memcmp(outs[0], outs[1], bytes) == 0);
        });
        std::free(memory);
      }
    }
  }
}

void compare_bags(World world, BagMode mode, bool weighted, std::mt19937_64& random) {
  const std::vector<int64_t> ids = random_ids(500, kRows, random);
  std::vector<int64_t> offsets = {3, 3};
  while (offsets.back() < 480) offsets.push_back(std::min<int64_t>(480, offsets.back() + static_cast<int64_t>(random() % 40)));
  offsets.push_back(499);  // with blocks of its own
  offsets.insert(offsets.begin(), 0);
  std::vector<float> weights;
  for (size_t n = 0; n < ids.size(); ++n) weights.push_back(n % 9 == 4 ? 1e-39f : 0.1f * static_cast<float>(n % 13) - 0.5f);
  const Bags bags{ids_of(ids), ids_of(offsets), weighted ? weights.data() : nullptr, mode, 6};
  for (const FloatType type : kTypes) {
    const auto sum = [&](const char* level) {
      CHECK(use_simd(level).ok());
      std::vector<uint8_t> out((offsets.size() - 1) * static_cast<size_t>(world.dim) * size_of(type) + 64, 0xaa);
      CHECK(cpu().lookup_bag({}, {world.table(), bags, BadIds::kZeros, out.data(), type}).ok());
      return out;
    };
    const std::vector<uint8_t> want = sum("portable");
    for_other_levels([&](const char* level) {
      const bool equal = sum(level) == want;
      CHECK(equal);
      if (!equal) {
        std::fprintf(stderr, "%s: D=%d, %d planes, type %d, mode %d, weighted %d\n", level, static_cast<int>(world.dim), world.planes,
                     static_cast<int>(type), static_cast<int>(mode), static_cast<int>(weighted));
      }
    });
  }
}

TEST(bags) {
  std::mt19937_64 random(5);
  for (const int64_t dim : kDims) {
    for (const int planes : {1, 2, 4, 8}) {
      World world = table_of(dim, planes, random);
      for (const bool finite : {false, true}) {  // one row that is not makes most bags so
        if (finite) std::fill(world.scale.begin() + 8, world.scale.begin() + 16, 0.3f);
        for (float& scale : world.scale) scale = finite && std::isinf(scale) ? 1.5f : scale;
        compare_bags(world, BagMode::kSum, false, random);
        compare_bags(world, BagMode::kSum, true, random);
        compare_bags(world, BagMode::kMean, false, random);
        if (planes == 1) compare_bags(world, BagMode::kMajority, false, random);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
