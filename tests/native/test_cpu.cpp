// The CPU back end without Python: values worked out by hand, arguments that must be refused, large indices, threads, rounding modes.
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/floats.h"
#include "cpu_support.h"
#include "rules/row.h"

using namespace dualbin;

namespace {

TEST(pack_and_lookup) {
  const std::vector<float> w = {1, -2, 0, -0.0f, -1, 3, -4, 5, -6, /* row 1 */ 0, 0, 0, 0, 0, 0, 0, 0, 0};
  std::vector<uint8_t> bits(4, 0xff);
  std::vector<float> scale(2);
  CHECK(cpu().pack({}, {{w.data(), FloatType::kF32}, 2, 9, 1, bits.data(), scale.data()}).ok());
  CHECK(bits[0] == 0b10101101 && bits[1] == 0 && bits[2] == 0xff && bits[3] == 1);
  CHECK(scale[0] == static_cast<float>(22.0 / 9.0) && scale[1] == 1e-4f);

  scale[1] = 0.0f;  // padding
  const std::vector<int64_t> ids = {1, 0};
  std::vector<float> y(18, NAN);
  CHECK(cpu().lookup({}, {{bits.data(), scale.data(), 2, 9}, ids_of(ids), BadIds::kReport, y.data(), FloatType::kF32}).ok());
  for (int d = 0; d < 9; ++d) {
    CHECK(y[d] == 0.0f && !std::signbit(y[d]));
    CHECK(y[9 + d] == (w[d] >= 0 ? scale[0] : -scale[0]));
  }
  std::vector<int8_t> signs(18);
  CHECK(cpu().unpack({}, {{bits.data(), nullptr, 2, 9}, signs.data()}).ok());
  CHECK(signs[0] == 1 && signs[1] == -1 && signs[3] == 1 && signs[8] == -1);
}

TEST(bags) {
  std::vector<uint8_t> bits = {0b011, 0b101, 0b111};
  std::vector<float> scale = {1.0f, 0.5f, 0.0f};  // the last row is padding
  const Table table{bits.data(), scale.data(), 3, 3};
  const std::vector<int64_t> ids = {7, 0, 1, 2, 2, 1};
  const std::vector<int64_t> offsets = {1, 3, 5, 5, 6};
  const auto lookup = [&](const std::vector<int64_t>& cuts, BagMode mode, std::vector<float>* y) {
    return cpu().lookup_bag({}, {table, {ids_of(ids), ids_of(cuts), nullptr, mode}, BadIds::kReport, y->data(), FloatType::kF32});
  };
  std::vector<float> y(12, NAN);
  CHECK(lookup(offsets, BagMode::kSum, &y).ok());
  CHECK(y == std::vector<float>({1.5f, 0.5f, -0.5f, 0, 0, 0, 0, 0, 0, 0.5f, -0.5f, 0.5f}));
  CHECK(lookup(offsets, BagMode::kMean, &y).ok());
  CHECK(y == std::vector<float>({0.75f, 0.25f, -0.25f, 0, 0, 0, 0, 0, 0, 0.5f, -0.5f, 0.5f}));
  CHECK(lookup(offsets, BagMode::kMajority, &y).ok());
  CHECK(y == std::vector<float>({1, 1, 1, 0, 0, 0, 0, 0, 0, 1, -1, 1}));
  const std::vector<float> before = y;
  CHECK(says(lookup({0, 3}, BagMode::kSum, &y), Code::kOutOfRange, "id 7 at position 0 is outside [0, 3)"));
  CHECK(says(lookup({1, 3, 2}, BagMode::kSum, &y), Code::kInvalidArgument, "got 2 at position 2"));
  CHECK(says(lookup({1, 7}, BagMode::kSum, &y), Code::kInvalidArgument, "at most the 6 ids, got 7"));
  CHECK(says(lookup({}, BagMode::kSum, &y), Code::kInvalidArgument, "one element more"));
  CHECK(says(lookup(offsets, static_cast<BagMode>(3), &y), Code::kInvalidArgument, "mode must be"));
  const std::vector<float> weights(6, 2.0f);
  CHECK(says(cpu().lookup_bag(
                 {}, {table, {ids_of(ids), ids_of(offsets), weights.data(), BagMode::kMean}, BadIds::kReport, y.data(), FloatType::kF32}),
             Code::kInvalidArgument, "weights need the mode sum"));
  CHECK(y == before);
}

TEST(halves) {
  for (uint32_t h = 0; h < 0x10000; ++h) {  // every half survives the way to float32 and back
    const float f = detail::widen_f16(static_cast<uint16_t>(h));
    const bool nan = std::isnan(f);
    CHECK(nan ? (h & 0x7fff) > 0x7c00 : detail::narrow_f16(f) == h);
    const float b = detail::widen_bf16(static_cast<uint16_t>(h));
    CHECK(std::isnan(b) ? (h & 0x7fff) > 0x7f80 : detail::narrow_bf16(b) == h);
  }
  CHECK(detail::narrow_f16(65519.0f) == 0x7bff && detail::narrow_f16(65520.0f) == 0x7c00);
  CHECK(detail::narrow_f16(1.0f + 0.00048828125f) == 0x3c00);  // a tie goes to even
  CHECK(detail::narrow_bf16(1.00390625f) == 0x3f80 && detail::narrow_bf16(1.01171875f) == 0x3f82);
}

TEST(bad_arguments) {
  std::vector<uint8_t> bits(4, 0);
  std::vector<float> scale(2, 1.0f);
  std::vector<float> y(9, 7.0f);
  const Table table{bits.data(), scale.data(), 2, 9};
  const std::vector<int64_t> ids = {2};
  CHECK(says(cpu().lookup({}, {table, ids_of(ids), BadIds::kReport, y.data(), FloatType::kF32}), Code::kOutOfRange,
             "id 2 at position 0 is outside [0, 2)"));
  CHECK(y[0] == 7.0f);
  CHECK(cpu().lookup({}, {table, ids_of(ids), BadIds::kZeros, y.data(), FloatType::kF32}).ok() && y[0] == 0.0f);
  CHECK(says(cpu().lookup({}, {{bits.data(), scale.data(), 0, 9}, ids_of(ids), BadIds::kReport, y.data(), FloatType::kF32}),
             Code::kInvalidArgument, "rows must be at least 1"));
  CHECK(
      says(cpu().lookup({}, {table, ids_of(ids), BadIds::kReport, y.data(), static_cast<FloatType>(9)}), Code::kInvalidArgument, "code 9"));

  const StepContext context{{0, 0}, {0, 0}, {0, 0}, 1.0f, 0.0f};
  const std::vector<int64_t> row = {0};
  Rule rule;
  rule.bits = 8;
  CHECK(says(cpu().update({}, {table, {}, rule, &context, ids_of(row), {y.data()}, true, {}}), Code::kInvalidArgument, "needs counter"));
  rule.bits = 1;
  CHECK(says(cpu().update({}, {table, {}, rule, &context, ids_of(row), {y.data()}, true, {}}), Code::kInvalidArgument, "workspace"));
  rule.anneal_q8 = 256;
  CHECK(says(cpu().update({}, {table, {}, rule, &context, ids_of(row), {y.data()}, true, {}}), Code::kInvalidArgument, "needs count"));
  const std::vector<float> w = {1.0f, NAN};
  CHECK(says(cpu().pack({}, {{w.data(), FloatType::kF32}, 1, 2, 1, bits.data(), nullptr}), Code::kInvalidArgument, "row 0, column 1"));
}

TEST(update_by_hand) {
  // dim 2, weights +1 and -1, gradient (3, 1): evidence against the first bit, for the second. At lr*eta = 2, h/rms of the first is
  // 3/sqrt(5) = 1.34: the step is 2.68 levels, so the counter goes from 0 to -2 or -3 and the bit flips.
  uint8_t bits = 0b01;
  float scale = 0.5f;
  uint8_t counter[2] = {0, 0};
  const std::vector<float> dy = {3.0f, 1.0f};
  const std::vector<int64_t> ids = {0};
  const StepContext context{{1, 0}, {0, 0}, {0, 0}, 2.0f, 0.0f};
  Rule rule;
  rule.bits = 3;
  rule.eta = 1.0f;
  std::vector<char> workspace(cpu().workspace_bytes(Op::kUpdate, nullptr, 1, 1, 2));
  Launch launch;
  launch.workspace = workspace.data();
  launch.workspace_bytes = workspace.size();
  Stats stats{};
  UpdateOut out;
  out.stats = &stats;
  const State state{counter, nullptr, nullptr, nullptr, nullptr};
  CHECK(cpu().update(launch, {{&bits, &scale, 1, 2}, state, rule, &context, ids_of(ids), {dy.data()}, true, out}).ok());
  const int first = 2 * (counter[0] & 1) + (counter[1] & 1);
  const int second = 2 * (counter[0] >> 1 & 1) + (counter[1] >> 1 & 1);
  CHECK(first == 1 || first == 2);      // -a' - 1
  CHECK(bits == 0b10 || bits == 0b00);  // the first bit flipped; 0.89 levels for the second never flip it
  CHECK(bits == 0b00);
  CHECK(second == 0 || second == 1);
  CHECK(stats.flips == 1 && stats.rows == 1 && stats.skipped == 0 && scale == 0.5f);
}

TEST(shard) {
  // Rows 2^33 and 2^33 + 1 of a large table in an update of their own. Their gradients and old bits are equal: only the hash of the row
  // tells them apart, so the first row of a shard that starts one row later must become what the second row becomes here.
  const int64_t dim = 64;
  const std::vector<float> dy(2 * dim, 1.0f);
  const std::vector<int64_t> ids = {0, 1};
  Rule rule;
  rule.eta = 0.5f;
  const auto flipped = [&](uint64_t first_row) {
    const StepContext context{{1, 0}, {0, 0}, {static_cast<uint32_t>(first_row), static_cast<uint32_t>(first_row >> 32)}, 1.0f, 0.0f};
    std::vector<uint8_t> bits(16, 0xff);
    std::vector<float> scale(2, 0.5f);
    std::vector<char> workspace(cpu().workspace_bytes(Op::kUpdate, nullptr, 2, 2, dim));
    Launch launch;
    launch.workspace = workspace.data();
    launch.workspace_bytes = workspace.size();
    const Table table{bits.data(), scale.data(), 2, dim};
    CHECK(cpu().update(launch, {table, {}, rule, &context, ids_of(ids), {dy.data()}, true, {}}).ok());
    return bits;
  };
  const auto low = flipped(uint64_t{1} << 33), high = flipped((uint64_t{1} << 33) + 1);
  CHECK(std::memcmp(low.data() + 8, high.data(), 8) == 0);
  CHECK(std::memcmp(low.data(), high.data(), 8) != 0);
  CHECK(flipped(0) != low);
}

TEST(large_indices) {
  // 400 million rows of 17 bytes: byte offsets beyond 2^32. The memory comes from calloc and only three pages of it are ever touched.
  const int64_t rows = 400'000'000;
  const int64_t dim = 130;
  auto* bits = static_cast<uint8_t*>(std::calloc(static_cast<size_t>(rows), 17));
  auto* scale = static_cast<float*>(std::calloc(static_cast<size_t>(rows), sizeof(float)));
  if (bits == nullptr || scale == nullptr) {
    std::printf("skipped: no address space for the large table\n");
  } else {
    const int64_t last = rows - 1;
    bits[last * 17 + 16] = 0b10;
    scale[last] = 2.0f;
    const std::vector<int64_t> ids = {last, 0};
    std::vector<float> y(2 * dim);
    CHECK(cpu().lookup({}, {{bits, scale, rows, dim}, ids_of(ids), BadIds::kReport, y.data(), FloatType::kF32}).ok());
    CHECK(y[128] == -2.0f && y[129] == 2.0f && y[0] == -2.0f && y[dim] == 0.0f);
    const std::vector<uint8_t> mask(34, 0xff);
    CHECK(cpu().xor_rows({}, {bits, rows, 17, ids_of(ids), mask.data()}).ok());
    CHECK(bits[last * 17 + 16] == 0b11111101 && bits[last * 17 - 1] == 0 && bits[0] == 0xff && bits[17] == 0);
  }
  std::free(bits);
  std::free(scale);
}

std::vector<float> sums(const Launch& launch, const std::vector<int64_t>& ids, const std::vector<float>& dy, int64_t rows, int64_t dim) {
  std::vector<float> out(static_cast<size_t>(rows * dim), NAN);
  CHECK(cpu().segment_sum(launch, {ids_of(ids), {dy.data()}, rows, dim, out.data()}).ok());
  return out;
}

// The register of the floating-point environment, with its flags of what has happened left out.
#if defined(__aarch64__)
using Control = uint64_t;
constexpr Control kHostile = Control{1} << 24 | Control{3} << 22;  // flush to zero, round toward zero

Control control() {
  Control value = 0;
  __asm__ volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}

void set_control(Control value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
using Control = unsigned;
constexpr Control kHostile = 0x8040 | 0x6000;  // flush to zero, denormals are zero, round toward zero

Control control() { return _mm_getcsr() & ~0x3fu; }
void set_control(Control value) { _mm_setcsr(value); }
#endif

TEST(float_environment) {
  // A host that rounds toward zero and flushes subnormals, on one thread or on four, gets the same sums.
  const int64_t n = 1000, rows = 7, dim = 33;
  std::vector<int64_t> ids(n);
  std::vector<float> dy(static_cast<size_t>(n * dim));
  uint32_t x = 1;
  const auto next = [&x] { return x = mix(x + 1); };
  for (auto& id : ids) id = static_cast<int64_t>(next() % (rows + 2)) - 1;  // some outside
  for (auto& g : dy) {
    const auto value = static_cast<float>(static_cast<int32_t>(next()));
    g = std::ldexp(value, static_cast<int>(next() % 5) * -40);  // down to subnormals
  }
  ThreadExecutor threads;
  std::vector<char> workspace(cpu().workspace_bytes(Op::kSegmentSum, &threads.executor, n, rows, dim));
  Launch launch;
  launch.workspace = workspace.data();
  launch.workspace_bytes = workspace.size();
  const auto want = sums(launch, ids, dy, rows, dim);
  const Control saved = control();
  set_control(saved | kHostile);
  const auto got = sums(launch, ids, dy, rows, dim);
  launch.executor = &threads.executor;
  const auto parallel = sums(launch, ids, dy, rows, dim);
  const bool kept = control() == (saved | kHostile);
  set_control(saved);
  CHECK(kept);
  CHECK(std::memcmp(got.data(), want.data(), want.size() * 4) == 0);
  CHECK(std::memcmp(parallel.data(), want.data(), want.size() * 4) == 0);
}

TEST(float_exponent) {
  for (uint32_t bits : {1u, 2u, 3u, 0x7fffffu, 0x800000u, 0x3f800000u, 0x7f7fffffu, 0u}) {
    int want = 0;
    std::frexp(static_cast<double>(bits_float(bits)), &want);
    CHECK(float_exponent(bits) == want);
    const Quantiser quantise = make_quantiser(bits);
    CHECK(quantise(bits_float(bits)) ==
          static_cast<int32_t>(std::rint(std::ldexp(static_cast<double>(bits_float(bits)), kGradientBits - want))));
  }
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
