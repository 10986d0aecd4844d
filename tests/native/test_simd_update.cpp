// Updates and row sums with every instruction set of this processor beside those with the code of rules/: the same bits.
#include "simd_support.h"

using namespace dualbin;

namespace {

struct Outcome {
  World world;
  std::vector<uint8_t> mask;
  std::vector<float> new_scale;
  Stats stats{};

  bool operator==(const Outcome& other) const {
    return world == other.world && mask == other.mask && World::same(new_scale, other.new_scale) &&
           std::memcmp(&stats, &other.stats, sizeof(stats)) == 0;
  }
};

// Three updates; with `masked` the table stays and masks tell what would change.
Outcome update(const char* level, World world, const std::vector<int64_t>& ids, const std::vector<char>& dy, FloatType type, float lr,
               bool masked) {
  CHECK(use_simd(level).ok());
  Outcome out{std::move(world), {}, {}};
  const auto n = static_cast<int64_t>(ids.size());
  const Table table = out.world.table();
  out.mask.assign(masked ? static_cast<size_t>(n * table.row_bytes()) : 0, 0xaa);
  out.new_scale.assign(masked ? ids.size() : 0, -1.0f);
  std::vector<char> workspace(cpu().workspace_bytes(Op::kUpdate, nullptr, n, table.rows, table.dim));
  Launch launch;
  launch.workspace = workspace.data();
  launch.workspace_bytes = workspace.size();
  for (uint32_t step = 0; step < 3; ++step) {
    const StepContext context{{123, 4}, {step, 0}, {7, 1}, lr, out.world.recorded ? 3e-3f : 0.0f};
    const UpdateOut to{masked ? out.mask.data() : nullptr, masked ? out.new_scale.data() : nullptr, &out.stats};
    const Status status =
        cpu().update(launch, {table, out.world.state(), out.world.rule, &context, ids_of(ids), {dy.data(), type}, false, to});
    CHECK(status.ok());
    if (!status.ok()) std::fprintf(stderr, "%s\n", status.message);
  }
  return out;
}

uint64_t flips_seen = 0;  // of all comparisons: a comparison of tables that stay as they are says little

Rule counter(int bits, int variant) {
  Rule rule;
  rule.bits = bits;
  rule.eta = variant == 1 ? 3e5f : static_cast<float>(1 << bits) / 16.0f;
  rule.dead_zone_q8 = variant == 2 ? 200 : variant == 3 ? 65536 : 0;
  rule.anneal_q8 = variant == 2 ? 2560 : 0;
  rule.norm = variant == 0 ? 1 : 0;
  return rule;
}

void compare(int64_t dim, int planes, const Rule& rule, int variant, std::mt19937_64& random) {
  const auto type = static_cast<FloatType>(random() % 3);
  const int64_t n = variant == 0 ? 400 : 60;
  const World world(40, dim, planes, rule, variant != 1, random);
  const std::vector<int64_t> ids = random_ids(n, world.rows, random);
  const std::vector<char> dy = gradients(n, dim, type, random);
  for (const bool masked : {false, true}) {
    const float lr = variant == 1 ? 70000.0f : 0.37f;
    const Outcome want = update("portable", world, ids, dy, type, lr, masked);
    CHECK(want.stats.rows > 0);
    flips_seen += want.stats.flips;
    for_other_levels([&](const char* level) {
      const bool equal = update(level, world, ids, dy, type, lr, masked) == want;
      CHECK(equal);
      if (!equal) {
        std::fprintf(stderr, "%s: D=%d, %d bits, %d planes, variant %d, type %d, masked %d\n", level, static_cast<int>(dim), rule.bits,
                     planes, variant, static_cast<int>(type), static_cast<int>(masked));
      }
    });
  }
}

TEST(counters_of_every_number_of_bits_and_planes) {
  std::mt19937_64 random(7);
  for (const int64_t dim : {1, 7, 8, 9, 31, 64, 100, 128, 130, 255, 384, 767, 1100}) {
    for (int bits = 1; bits <= 8; ++bits) {
      for (int planes = 1; planes <= bits; planes += bits == 8 || planes < 2 ? 1 : 2) {
        const int variant = static_cast<int>(random() % 4);
        compare(dim, planes, counter(bits, variant), variant, random);
      }
    }
  }
  CHECK(flips_seen > 100000);
}

TEST(centred_evidence) {
  std::mt19937_64 random(8);
  for (const int64_t dim : {1, 9, 100, 128, 767}) {
    for (const int bits : {1, 2, 8}) {
      for (const int variant : {0, 2}) {
        Rule rule = counter(bits, variant);
        rule.center = true;
        compare(dim, 1, rule, variant, random);
      }
    }
  }
}

TEST(other_rules) {
  std::mt19937_64 random(9);
  for (const RuleKind kind : {RuleKind::kSign, RuleKind::kBop}) {
    flips_seen = 0;
    for (const int64_t dim : {1, 7, 9, 31, 32, 33, 64, 100, 384, 767, 1100}) {
      for (const int variant : {0, 1, 2}) {
        Rule rule;
        rule.kind = kind;
        rule.norm = variant == 0 ? 1 : 0;
        if (kind == RuleKind::kBop) {
          rule.gamma = variant == 2 ? 3.0f : 0.3f;
          rule.tau = variant == 2 ? -0.5f : variant == 1 ? 0.0f : 0.01f;
        }
        compare(dim, 1, rule, variant, random);
      }
    }
    CHECK(flips_seen > 50000);
  }
}

// Gradients of equal magnitude, where the mean of the evidence is as large as it can be.
TEST(largest_mean) {
  std::mt19937_64 random(10);
  for (const int bits : {1, 8}) {
    Rule rule = counter(bits, 0);
    rule.center = true;
    const int64_t dim = 200;
    World world(4, dim, 1, rule, true, random);
    world.scale = {1.0f, -1.0f, 2.0f, -2.0f};
    std::vector<char> dy(static_cast<size_t>(4 * dim) * 4);
    auto* values = reinterpret_cast<float*>(dy.data());
    for (int64_t i = 0; i < 4 * dim; ++i) {
      const bool positive = (world.bits[static_cast<size_t>(i / dim * 25 + i % dim / 8)] >> (i % dim % 8)) & 1;
      values[i] = (positive ? 1.0f : -1.0f) * (i % dim == 77 ? -1.0f : 1.0f) * (i / dim < 2 ? 1.0f : -1.0f);
    }
    const std::vector<int64_t> ids = {0, 1, 2, 3};
    const Outcome want = update("portable", world, ids, dy, FloatType::kF32, 1.0f, false);
    for_other_levels([&](const char* level) { CHECK(update(level, world, ids, dy, FloatType::kF32, 1.0f, false) == want); });
  }
}

TEST(row_sums) {
  std::mt19937_64 random(11);
  for (const int64_t dim : {1, 7, 16, 33, 100, 768}) {
    for (const FloatType type : {FloatType::kF32, FloatType::kF16, FloatType::kBF16}) {
      const int64_t n = 700;
      const std::vector<int64_t> ids = random_ids(n, 50, random);
      std::vector<char> dy = gradients(n, dim, type, random);
      if (type == FloatType::kF32) reinterpret_cast<float*>(dy.data())[0] = -0.0f;  // +0.0 after the sum
      const auto sums = [&](const char* level) {
        CHECK(use_simd(level).ok());
        std::vector<char> workspace(cpu().workspace_bytes(Op::kReduceRows, nullptr, n, 50, dim));
        Launch launch;
        launch.workspace = workspace.data();
        launch.workspace_bytes = workspace.size();
        std::vector<float> rows(static_cast<size_t>(n * dim), NAN);
        std::vector<int64_t> found(static_cast<size_t>(n));
        int64_t count = 0;
        RowsOut out;
        out.ids = found.data();
        out.rows = rows.data();
        out.count = &count;
        out.capacity = n;
        CHECK(cpu().reduce_rows(launch, {ids_of(ids), {dy.data(), type}, 50, dim, out}).ok());
        for (float& x : rows) x = one_nan(x);  // which NaN of two is left has no definition
        return rows;
      };
      const std::vector<float> want = sums("portable");
      for_other_levels([&](const char* level) { CHECK(World::same(sums(level), want)); });
    }
  }
}

TEST(names_of_instruction_sets) {
  CHECK(std::string(simd_level(0)) == "portable");
  CHECK(says(use_simd("mmx"), Code::kInvalidArgument, "(portable"));
  const std::string before = simd_level();
  CHECK(use_simd("portable").ok() && std::string(simd_level()) == "portable");
  CHECK(use_simd(nullptr).ok() && simd_level() == before);
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
