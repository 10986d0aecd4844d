// Arrays that begin at any address that their elements may have, and offsets of more than 32 bits.
#include <cstdlib>
#include <memory>

#include "simd_support.h"

using namespace dualbin;

namespace {

// A copy of an array that begins `by` bytes after a multiple of 64. Behind it lies nothing: AddressSanitizer sees every byte too many.
class Shifted {
 public:
  Shifted(const void* data, size_t bytes, size_t by) : bytes_(bytes), memory_(new char[64 + by + bytes]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get() + by);
    start_ = memory_.get() + (64 - (address - by) % 64) % 64 + by;
    if (bytes > 0) std::memcpy(start_, data, bytes);
  }
  template <typename T>
  Shifted(const std::vector<T>& values, size_t by) : Shifted(values.data(), values.size() * sizeof(T), by) {}

  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(start_);
  }
  bool holds(const void* data) const { return bytes_ == 0 || std::memcmp(start_, data, bytes_) == 0; }

 private:
  size_t bytes_;
  std::unique_ptr<char[]> memory_;
  char* start_;
};

constexpr int64_t kRows = 40;
const int64_t kDims[] = {1, 7, 9, 31, 64, 100, 130, 257, 768};

size_t size_of(FloatType type) { return type == FloatType::kF32 ? 4 : 2; }

Rule counter(int bits) {
  Rule rule;
  rule.bits = bits;
  rule.eta = static_cast<float>(1 << bits) / 16.0f;
  return rule;
}

template <typename Body>
void for_all_levels(const Body& body) {
  for (int i = 0; simd_level(i) != nullptr; ++i) {
    CHECK(use_simd(simd_level(i)).ok());
    body();
  }
  CHECK(use_simd(nullptr).ok());
}

TEST(lookups_and_bags) {
  std::mt19937_64 random(41);
  for (const int64_t dim : kDims) {
    for (const int planes : {1, 2, 3, 8}) {
      World world(kRows, dim, planes, counter(planes), false, random);
      const std::vector<int64_t> ids = random_ids(120, kRows, random), offsets = {0, 7, 7, 90, 120};
      for (const FloatType type : {FloatType::kF32, FloatType::kF16, FloatType::kBF16}) {
        const size_t row = static_cast<size_t>(dim) * size_of(type);
        for_all_levels([&] {
          std::vector<uint8_t> want(120 * row), want_bags(4 * row);
          const Bags bags{ids_of(ids), ids_of(offsets), nullptr, BagMode::kSum, 6};
          CHECK(cpu().lookup({}, {world.table(), ids_of(ids), BadIds::kZeros, want.data(), type}).ok());
          CHECK(cpu().lookup_bag({}, {world.table(), bags, BadIds::kZeros, want_bags.data(), type}).ok());
          Shifted bits(world.bits, 3), scale(world.scale, 4), places(ids, 8), starts(offsets, 8);
          const Table table{bits.as<uint8_t>(), scale.as<float>(), kRows, dim, planes};
          const Ids moved{places.as<int64_t>(), IdType::kI64, 120};
          Shifted out(std::vector<uint8_t>(120 * row), size_of(type)), sums(std::vector<uint8_t>(4 * row), size_of(type));
          CHECK(cpu().lookup({}, {table, moved, BadIds::kZeros, out.as<void>(), type}).ok());
          CHECK(out.holds(want.data()));
          const Bags moved_bags{moved, {starts.as<int64_t>(), IdType::kI64, 5}, nullptr, BagMode::kSum, 6};
          CHECK(cpu().lookup_bag({}, {table, moved_bags, BadIds::kZeros, sums.as<void>(), type}).ok());
          CHECK(sums.holds(want_bags.data()));
        });
      }
    }
  }
}

TEST(updates_and_packing) {
  std::mt19937_64 random(42);
  for (const int64_t dim : kDims) {
    for (const int planes : {1, 3}) {
      const World world(kRows, dim, planes, counter(8), true, random);
      const std::vector<int64_t> ids = random_ids(200, kRows, random);
      const FloatType type = dim % 2 == 0 ? FloatType::kF32 : FloatType::kBF16;
      const std::vector<char> dy = gradients(200, dim, type, random);
      const StepContext context{{1, 2}, {3, 0}, {0, 0}, 0.7f, 3e-3f};
      std::vector<char> workspace(cpu().workspace_bytes(Op::kUpdate, nullptr, 200, kRows, dim));
      Launch launch;
      launch.workspace = workspace.data();
      launch.workspace_bytes = workspace.size();
      for_all_levels([&] {
        World want = world;
        CHECK(cpu().update(launch, {want.table(), want.state(), want.rule, &context, ids_of(ids), {dy.data(), type}, false, {}}).ok());
        CHECK(want.bits != world.bits || dim < 8);
        Shifted bits(world.bits, 5), scale(world.scale, 4), below(world.counter, 1), record(world.record, 4), rows(dy, size_of(type));
        State state;
        state.counter = below.as<uint8_t>();
        state.record = record.as<int32_t>();
        const Table table{bits.as<uint8_t>(), scale.as<float>(), kRows, dim, planes};
        CHECK(cpu().update(launch, {table, state, world.rule, &context, ids_of(ids), {rows.as<void>(), type}, false, {}}).ok());
        CHECK(bits.holds(want.bits.data()) && scale.holds(want.scale.data()));
        CHECK(below.holds(want.counter.data()) && record.holds(want.record.data()));

        std::vector<float> w(static_cast<size_t>(kRows * dim));
        for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i * 37 % 101) - 50.0f;
        std::vector<uint8_t> packed(static_cast<size_t>(kRows * planes * ((dim + 7) / 8)));
        std::vector<float> scales(kRows);
        CHECK(cpu().pack({}, {{w.data(), FloatType::kF32}, kRows, dim, planes, packed.data(), scales.data()}).ok());
        Shifted moved(w, 4), to(std::vector<uint8_t>(packed.size()), 7), to_scales(std::vector<float>(kRows), 4);
        CHECK(cpu().pack({}, {{moved.as<void>(), FloatType::kF32}, kRows, dim, planes, to.as<uint8_t>(), to_scales.as<float>()}).ok());
        CHECK(to.holds(packed.data()) && to_scales.holds(scales.data()));
      });
    }
  }
}

// 34 million rows of 129 bytes, of which the last is touched: it becomes what it becomes in a table of its own that starts there.
TEST(offsets_of_more_than_32_bits) {
  const int64_t rows = 34'000'000, last = rows - 1, dim = 1030, width = 129;
  auto* bits = static_cast<uint8_t*>(std::calloc(static_cast<size_t>(rows), width));
  auto* below = static_cast<uint8_t*>(std::calloc(static_cast<size_t>(rows), width));
  auto* scale = static_cast<float*>(std::calloc(static_cast<size_t>(rows), sizeof(float)));
  auto* record = static_cast<int32_t*>(std::calloc(static_cast<size_t>(rows), 16));
  if (bits == nullptr || below == nullptr || scale == nullptr || record == nullptr) {
    std::printf("skipped: no address space for the large table\n");
  } else {
    std::mt19937_64 random(43);
    const std::vector<char> dy = gradients(1, dim, FloatType::kF32, random);
    std::vector<char> workspace(cpu().workspace_bytes(Op::kUpdate, nullptr, 1, rows, dim));
    Launch launch;
    launch.workspace = workspace.data();
    launch.workspace_bytes = workspace.size();
    for_all_levels([&] {
      World one(1, dim, 1, counter(2), true, random);
      one.scale[0] = 0.5f;
      one.record = {3, 0, 0, 0};
      std::memcpy(bits + last * width, one.bits.data(), width);
      std::memcpy(below + last * width, one.counter.data(), width);
      scale[last] = 0.5f;
      std::memcpy(record + last * 4, one.record.data(), 16);
      State state;
      state.counter = below;
      state.record = record;
      const std::vector<int64_t> ids = {last}, first = {0};
      const Floats floats{dy.data(), FloatType::kF32};
      StepContext context{{1, 2}, {3, 0}, {0, 0}, 0.7f, 3e-3f};
      CHECK(cpu().update(launch, {{bits, scale, rows, dim, 1}, state, one.rule, &context, ids_of(ids), floats, true, {}}).ok());
      context.first_row[0] = static_cast<uint32_t>(last);
      CHECK(cpu().update(launch, {one.table(), one.state(), one.rule, &context, ids_of(first), floats, true, {}}).ok());
      CHECK(std::memcmp(bits + last * width, one.bits.data(), width) == 0 &&
            std::memcmp(below + last * width, one.counter.data(), width) == 0);
      CHECK(scale[last] == one.scale[0] && scale[last] != 0.5f && std::memcmp(record + last * 4, one.record.data(), 16) == 0);
      std::vector<float> sum(dim), want(dim);
      const std::vector<int64_t> offsets = {0, 1};
      CHECK(cpu().lookup_bag({}, {{bits, scale, rows, dim, 1}, {ids_of(ids), ids_of(offsets)}, BadIds::kReport, sum.data()}).ok());
      CHECK(cpu().lookup({}, {one.table(), ids_of(first), BadIds::kReport, want.data(), FloatType::kF32}).ok());
      CHECK(World::same(sum, want));
    });
  }
  std::free(bits);
  std::free(below);
  std::free(scale);
  std::free(record);
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
