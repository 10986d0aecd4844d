// Every operation that runs on several threads beside one thread, and several tables in threads of their own: the same bits, and under
// ThreadSanitizer no race.
#include <functional>
#include <thread>

#include "simd_support.h"

using namespace dualbin;

namespace {

Rule counter(int bits) {
  Rule rule;
  rule.bits = bits;
  rule.eta = static_cast<float>(1 << bits) / 16.0f;
  return rule;
}

// What an operation writes.
using Bytes = std::vector<uint8_t>;

// The launch of an operation on the threads of an executor, or on this thread alone.
struct Room {
  Launch launch;
  std::vector<char> workspace;

  Room(Op op, const Executor* executor, int64_t count, int64_t rows, int64_t dim)
      : workspace(cpu().workspace_bytes(op, executor, count, rows, dim)) {
    launch.executor = executor;
    launch.workspace = workspace.data();
    launch.workspace_bytes = workspace.size();
  }
};

void compare(const char* name, int64_t dim, const std::function<Bytes(const Executor*)>& run) {
  ThreadExecutor threads;
  for (int i = 0; simd_level(i) != nullptr; ++i) {
    CHECK(use_simd(simd_level(i)).ok());
    const bool equal = run(nullptr) == run(&threads.executor);
    CHECK(equal);
    if (!equal) std::fprintf(stderr, "%s, %s: D=%d\n", name, simd_level(i), static_cast<int>(dim));
  }
  CHECK(use_simd(nullptr).ok());
}

constexpr int64_t kRows = 300;
constexpr int64_t kCount = 5000;
const int64_t kDims[] = {33, 100, 257};

TEST(what_reads_a_table) {
  std::mt19937_64 random(31);
  for (const int64_t dim : kDims) {
    World world(kRows, dim, 2, counter(2), false, random);
    const std::vector<int64_t> ids = random_ids(kCount, kRows, random);
    std::vector<int64_t> offsets;
    for (int64_t at = 0; at <= kCount; at += 10) offsets.push_back(at);
    const size_t all = static_cast<size_t>(kCount * dim) * 4;
    compare("lookup", dim, [&](const Executor* executor) {
      Bytes out(all);
      CHECK(cpu().lookup({executor}, {world.table(), ids_of(ids), BadIds::kZeros, out.data(), FloatType::kF32}).ok());
      return out;
    });
    compare("lookup_bag", dim, [&](const Executor* executor) {
      Bytes out((offsets.size() - 1) * static_cast<size_t>(dim) * 4);
      const Bags bags{ids_of(ids), ids_of(offsets), nullptr, BagMode::kMean, 6};
      CHECK(cpu().lookup_bag({executor}, {world.table(), bags, BadIds::kZeros, out.data(), FloatType::kF32}).ok());
      return out;
    });
    compare("unpack", dim, [&](const Executor* executor) {
      Bytes out(static_cast<size_t>(kRows * dim) * 2);
      CHECK(cpu().unpack({executor}, {world.table(), out.data()}).ok());
      return out;
    });
    compare("fewer_planes", dim, [&](const Executor* executor) {
      Bytes bits(static_cast<size_t>(kRows * ((dim + 7) / 8)));
      std::vector<float> scale(kRows);
      CHECK(cpu().fewer_planes({executor}, {world.table(), 1, bits.data(), scale.data()}).ok());
      const auto* raw = reinterpret_cast<const uint8_t*>(scale.data());
      bits.insert(bits.end(), raw, raw + scale.size() * 4);
      return bits;
    });
    std::vector<uint8_t> mask(ids.size() * static_cast<size_t>(world.table().row_bytes()), 0x5a);
    std::vector<int64_t> distinct;
    for (int64_t id = 0; id < kRows; id += 2) distinct.push_back(id);
    compare("xor_rows", dim, [&](const Executor* executor) {
      Bytes bits = world.bits;
      CHECK(cpu().xor_rows({executor}, {bits.data(), kRows, world.table().row_bytes(), ids_of(distinct), mask.data()}).ok());
      return bits;
    });
  }
}

TEST(sums_and_packing) {
  std::mt19937_64 random(32);
  for (const int64_t dim : kDims) {
    const std::vector<int64_t> ids = random_ids(kCount, kRows, random);
    const std::vector<char> dy = gradients(kCount, dim, FloatType::kF32, random);
    const Floats floats{dy.data(), FloatType::kF32};
    compare("segment_sum", dim, [&](const Executor* executor) {
      const Room room(Op::kSegmentSum, executor, kCount, kRows, dim);
      Bytes out(static_cast<size_t>(kRows * dim) * 4);
      CHECK(cpu().segment_sum(room.launch, {ids_of(ids), floats, kRows, dim, reinterpret_cast<float*>(out.data())}).ok());
      return out;
    });
    compare("reduce_rows", dim, [&](const Executor* executor) {
      const Room room(Op::kReduceRows, executor, kCount, kRows, dim);
      Bytes out(static_cast<size_t>(kRows * dim) * 4);
      std::vector<int64_t> rows(kRows);
      int64_t count = 0;
      const RowsOut to{rows.data(), IdType::kI64, reinterpret_cast<float*>(out.data()), &count, IdType::kI64, kRows};
      CHECK(cpu().reduce_rows(room.launch, {ids_of(ids), floats, kRows, dim, to}).ok());
      const auto* raw = reinterpret_cast<const uint8_t*>(rows.data());
      out.insert(out.end(), raw, raw + rows.size() * 8);
      return out;
    });
    std::vector<float> w(static_cast<size_t>(kCount * dim));
    for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(static_cast<int>(i * 2654435761u % 2001)) - 1000.0f;
    compare("pack", dim, [&](const Executor* executor) {
      Bytes bits(static_cast<size_t>(kCount * 3 * ((dim + 7) / 8)));
      std::vector<float> scale(kCount);
      CHECK(cpu().pack({executor}, {{w.data(), FloatType::kF32}, kCount, dim, 3, bits.data(), scale.data()}).ok());
      const auto* raw = reinterpret_cast<const uint8_t*>(scale.data());
      bits.insert(bits.end(), raw, raw + scale.size() * 4);
      return bits;
    });
  }
}

void train(World* world, const std::vector<int64_t>& ids, const std::vector<char>& dy, const Executor* executor) {
  const auto count = static_cast<int64_t>(ids.size());
  const Room room(Op::kUpdate, executor, count, world->rows, world->dim);
  for (uint32_t step = 0; step < 2; ++step) {
    const StepContext context{{123, 4}, {step, 0}, {0, 0}, 0.37f, world->recorded ? 3e-3f : 0.0f};
    Stats stats;
    const UpdateOut to{nullptr, nullptr, &stats};
    const Floats floats{dy.data(), FloatType::kF32};
    CHECK(cpu().update(room.launch, {world->table(), world->state(), world->rule, &context, ids_of(ids), floats, false, to}).ok());
    CHECK(stats.rows > 0);
  }
}

TEST(updates) {
  std::mt19937_64 random(33);
  for (const int64_t dim : kDims) {
    for (const bool bop : {false, true}) {
      Rule rule = counter(4);
      if (bop) rule = Rule{};
      if (bop) rule.kind = RuleKind::kBop;
      if (bop) rule.gamma = 0.1f;
      const World world(kRows, dim, 1, rule, true, random);
      const std::vector<int64_t> ids = random_ids(kCount, kRows, random);
      const std::vector<char> dy = gradients(kCount, dim, FloatType::kF32, random);
      compare(bop ? "Bop" : "Counter", dim, [&](const Executor* executor) {
        World mine = world;
        train(&mine, ids, dy, executor);
        Bytes out = mine.bits;
        out.insert(out.end(), mine.counter.begin(), mine.counter.end());
        for (const void* array : {static_cast<const void*>(mine.scale.data()), static_cast<const void*>(mine.record.data())}) {
          const auto* raw = static_cast<const uint8_t*>(array);
          out.insert(out.end(), raw, raw + kRows * 4);
        }
        CHECK(mine.bits != world.bits);
        return out;
      });
    }
  }
}

TEST(tables_in_threads_of_their_own) {
  std::mt19937_64 random(34);
  const int64_t dim = 100;
  std::vector<World> alone;
  std::vector<std::vector<int64_t>> ids;
  std::vector<std::vector<char>> dy;
  for (int table = 0; table < 4; ++table) {
    alone.emplace_back(kRows, dim, 2, counter(4), true, random);
    ids.push_back(random_ids(1000, kRows, random));
    dy.push_back(gradients(1000, dim, FloatType::kF32, random));
  }
  std::vector<World> together = alone;
  std::vector<std::thread> threads;
  for (size_t table = 0; table < 4; ++table) {
    threads.emplace_back([&, table] {
      ThreadExecutor executor;
      train(&together[table], ids[table], dy[table], table % 2 == 0 ? nullptr : &executor.executor);
    });
  }
  for (auto& thread : threads) thread.join();
  for (size_t table = 0; table < 4; ++table) {
    train(&alone[table], ids[table], dy[table], nullptr);
    CHECK(alone[table] == together[table]);
  }
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
