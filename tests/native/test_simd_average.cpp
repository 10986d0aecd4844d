// The average of tables and their first planes with every instruction set of this processor beside the code of rules/: the same bits.
#include <algorithm>

#include "simd_support.h"

using namespace dualbin;

namespace {

const int64_t kDims[] = {1, 7, 8, 9, 31, 64, 100, 127, 128, 130, 256, 384, 767, 1100};
constexpr int64_t kRows = 53;
constexpr float kWeights[] = {0.0f, 0x1p-18f, 0.001f, 0.3f, 0.9999f, 1.0f};

Rule rule_of(int planes) {
  Rule rule;
  rule.bits = planes;
  return rule;
}

enum class Into { kOther, kFirst, kSecond };

World average(const char* level, World a, World b, float weight, Into into) {
  CHECK(use_simd(level).ok());
  World other = a;
  World& out = into == Into::kOther ? other : into == Into::kFirst ? a : b;
  StepContext context{};
  context.seed[0] = 17;
  context.step[0] = 3;
  context.lr = weight;
  CHECK(cpu().average({}, {a.table(), b.table(), &context, out.table()}).ok());
  return out;
}

TEST(averages) {
  std::mt19937_64 random(31);
  for (const int64_t dim : kDims) {
    for (int planes = 1; planes <= 8; ++planes) {
      const World a(kRows, dim, planes, rule_of(planes), false, random);
      World b(kRows, dim, planes, rule_of(planes), false, random);
      std::shuffle(b.scale.begin(), b.scale.end(), random);
      for (const float weight : kWeights) {
        const World want = average("portable", a, b, weight, Into::kOther);
        CHECK(average("portable", a, b, weight, Into::kSecond).bits == want.bits);
        for_other_levels([&](const char* level) {
          for (const Into into : {Into::kOther, Into::kFirst, Into::kSecond}) {
            const World got = average(level, a, b, weight, into);
            const bool equal = got.bits == want.bits && World::same(got.scale, want.scale);
            CHECK(equal);
            if (!equal) {
              std::fprintf(stderr, "%s: D=%d, %d planes, weight %g\n", level, static_cast<int>(dim), planes, static_cast<double>(weight));
            }
          }
        });
      }
    }
  }
}

TEST(first_planes) {
  std::mt19937_64 random(32);
  for (const int64_t dim : {1, 9, 63, 64, 65, 100, 128, 767, 1100, 5000}) {
    for (int planes = 1; planes <= 8; ++planes) {
      World world(kRows, dim, planes, rule_of(planes), false, random);
      for (int fewer = 1; fewer <= planes; ++fewer) {
        const auto width = static_cast<size_t>(world.table().width());
        std::vector<uint8_t> bits(kRows * static_cast<size_t>(fewer) * width);
        const auto scales = [&](const char* level) {
          CHECK(use_simd(level).ok());
          std::vector<float> scale(kRows, -7.0f);
          FewerPlanesCall call;
          call.table = world.table();
          call.fewer = fewer;
          call.bits = bits.data();
          call.scale = scale.data();
          CHECK(cpu().fewer_planes({}, call).ok());
          return scale;
        };
        const std::vector<float> want = scales("portable");
        for_other_levels([&](const char* level) {
          const bool equal = World::same(scales(level), want);
          CHECK(equal);
          if (!equal) std::fprintf(stderr, "%s: D=%d, %d of %d planes\n", level, static_cast<int>(dim), fewer, planes);
        });
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
