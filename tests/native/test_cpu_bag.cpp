// Gradients of bags and the average of tables on the CPU: values worked out by hand, arguments that must be refused.
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_support.h"

using namespace dualbin;

namespace {

// Three rows of three columns, the last one padding; bags of one bad id, of three rows, of none and of one row, and an id in no bag.
struct Example {
  std::vector<uint8_t> bits = {0b011, 0b101, 0b111};
  std::vector<float> scale = {2.0f, -0.5f, 0.0f};
  std::vector<int64_t> ids = {7, 0, 2, 1, 1, 0};
  std::vector<int64_t> offsets = {0, 1, 4, 4, 5};
  std::vector<float> dy = {1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -2, NAN};

  Table table() { return {bits.data(), scale.data(), 3, 3}; }
  Bags bags(BagMode mode = BagMode::kSum, const float* weights = nullptr, int64_t padding_idx = -1) {
    return {ids_of(ids), ids_of(offsets), weights, mode, padding_idx};
  }
};

TEST(padding_idx) {
  Example e;
  e.ids[0] = 0;
  std::vector<float> y(12, NAN);
  CHECK(cpu().lookup_bag({}, {e.table(), e.bags(BagMode::kMean, nullptr, 1), BadIds::kReport, y.data(), FloatType::kF32}).ok());
  CHECK(y == std::vector<float>({2, 2, -2, 2, 2, -2, 0, 0, 0, 0, 0, 0}));  // row 1 is left out and not counted
}

TEST(counts) {
  Example e;
  std::vector<int32_t> counts(4, -1);
  CHECK(cpu().bag_counts({}, {e.scale.data(), 3, e.bags(), counts.data()}).ok());
  CHECK(counts == std::vector<int32_t>({0, 2, 0, 1}));
  CHECK(cpu().bag_counts({}, {e.scale.data(), 3, e.bags(BagMode::kSum, nullptr, 1), counts.data()}).ok());
  CHECK(counts == std::vector<int32_t>({0, 1, 0, 0}));
  CHECK(says(cpu().bag_counts({}, {e.scale.data(), 3, e.bags(), nullptr}), Code::kInvalidArgument, "out"));
  CHECK(says(cpu().bag_counts({}, {nullptr, 3, e.bags(), counts.data()}), Code::kInvalidArgument, "scale"));
  CHECK(says(cpu().bag_counts({}, {e.scale.data(), 3, e.bags(BagMode::kSum, nullptr, -2), counts.data()}), Code::kInvalidArgument,
             "padding_idx must be an id, or -1 for none, got -2"));
}

TEST(gradient) {
  Example e;
  std::vector<float> rows(18, 7.0f);
  CHECK(cpu().bag_gradient({}, {e.bags(), {e.dy.data()}, 3, nullptr, rows.data()}).ok());
  CHECK(std::isnan(rows[14]));
  rows[14] = 0;
  CHECK(rows == std::vector<float>({1, 2, 3, 4, 5, 6, 4, 5, 6, 4, 5, 6, -1, -2, 0, 0, 0, 0}));

  const std::vector<int32_t> counts = {0, 2, 0, 1};
  CHECK(cpu().bag_gradient({}, {e.bags(BagMode::kMean, nullptr, 2), {e.dy.data()}, 3, counts.data(), rows.data()}).ok());
  CHECK(std::vector<float>(rows.begin(), rows.begin() + 12) == std::vector<float>({1, 2, 3, 2, 2.5f, 3, 0, 0, 0, 2, 2.5f, 3}));

  const std::vector<float> weights = {2, -1, 0.5f, 3, 1, 1};
  CHECK(cpu().bag_gradient({}, {e.bags(BagMode::kSum, weights.data()), {e.dy.data()}, 3, nullptr, rows.data()}).ok());
  CHECK(std::vector<float>(rows.begin(), rows.begin() + 12) == std::vector<float>({2, 4, 6, -4, -5, -6, 2, 2.5f, 3, 12, 15, 18}));

  const std::vector<float> before = rows;
  const auto refused = [&](const Bags& bags, int64_t dim, const int32_t* some, const char* text) {
    CHECK(says(cpu().bag_gradient({}, {bags, {e.dy.data()}, dim, some, rows.data()}), Code::kInvalidArgument, text));
  };
  refused(e.bags(BagMode::kMean), 3, nullptr, "counts");
  refused(e.bags(), 3, counts.data(), "counts");
  refused(e.bags(), 0, nullptr, "dim");
  e.offsets[1] = 7;
  refused(e.bags(), 3, nullptr, "at most the 6 ids, got 7 at position 1");
  CHECK(std::memcmp(rows.data(), before.data(), 4 * rows.size()) == 0);
}

TEST(weight_gradient) {
  Example e;
  std::vector<float> out(6, 7.0f);
  CHECK(cpu().bag_weight_gradient({}, {e.table(), e.bags(), {e.dy.data()}, out.data()}).ok());
  CHECK(std::isnan(out[4]) && !std::signbit(out[4]));
  out[4] = 0;
  CHECK(out == std::vector<float>({0, 6, 0, -2.5f, 0, 0}));  // 2 * (4 + 5 - 6), -0.5 * (4 - 5 + 6)
  CHECK(cpu().bag_weight_gradient({}, {e.table(), e.bags(BagMode::kSum, nullptr, 0), {e.dy.data()}, out.data()}).ok());
  CHECK(out[1] == 0.0f && out[3] == -2.5f);
  CHECK(says(cpu().bag_weight_gradient({}, {e.table(), e.bags(), {nullptr}, out.data()}), Code::kInvalidArgument, "dy"));
}

TEST(average) {
  std::vector<uint8_t> a = {0b0011, 0b1111, 0b0101}, b = {0b0110, 0b1001, 0b1111};
  std::vector<float> scale_a = {1.0f, 0.0f, -1.0f}, scale_b = {3.0f, 2.0f, 0.5f};
  Table ta{a.data(), scale_a.data(), 3, 4}, tb{b.data(), scale_b.data(), 3, 4};
  StepContext context{{1, 0}, {2, 0}, {0, 0}, 0.25f, 0.0f};
  std::vector<uint8_t> bits(3, 0xff);
  std::vector<float> scale(3, NAN);
  const Table out{bits.data(), scale.data(), 3, 4};
  CHECK(cpu().average({}, {ta, tb, &context, out}).ok());
  CHECK(scale == std::vector<float>({1.5f, 0.5f, -0.875f}));
  CHECK((bits[0] & 0b1010) == 0b0010 && bits[0] < 16);  // where both agree, so does their average
  CHECK(bits[1] == 0b1001);                             // a is padding: the row of b
  CHECK((bits[2] & 0b1010) == 0 && bits[2] < 16);       // scales of two signs: the bits of b count inverted

  // b has 6 sevenths of the average: about that share of the columns that differ
  const int64_t dim = 70000;
  std::vector<uint8_t> zeros(static_cast<size_t>(dim / 8), 0), ones(static_cast<size_t>(dim / 8), 0xff);
  float one = 1.0f, two = 2.0f;
  context.lr = 0.75f;
  CHECK(cpu().average({}, {{zeros.data(), &one, 1, dim}, {ones.data(), &two, 1, dim}, &context, {zeros.data(), &one, 1, dim}}).ok());
  int64_t taken = 0;
  for (uint8_t byte : zeros) {
    for (int k = 0; k < 8; ++k) taken += byte >> k & 1;
  }
  CHECK(one == 1.75f && std::llabs(taken - 60000) < 400);

  context.lr = 1.5f;
  const std::vector<uint8_t> before = bits;
  CHECK(says(cpu().average({}, {ta, tb, &context, out}), Code::kInvalidArgument, "weight must be between 0 and 1, got 1.5"));
  tb.rows = 2;
  CHECK(says(cpu().average({}, {ta, tb, &context, out}), Code::kInvalidArgument, "one shape, got 3 x 4 of 1 planes and 2 x 4 of 1 planes"));
  CHECK(bits == before);
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
