// Bags, their gradients and the average of tables: the CUDA back end against the CPU back end, bit for bit. Exit status 77: there is no
// GPU.
#include <algorithm>

#include "cuda_support.h"

using namespace dualbin;

namespace {

// Offsets of bags of 0 to about 150 ids that leave a few ids out at both ends.
std::vector<int64_t> random_offsets(Random& random, int64_t count) {
  std::vector<int64_t> offsets{std::min<int64_t>(count, random.below(4))};
  while (offsets.back() + 3 < count) {
    const uint32_t dice = random.below(4);
    offsets.push_back(std::min<int64_t>(count, offsets.back() + (dice == 0 ? 0 : dice == 1 ? random.below(150) : random.below(9))));
  }
  return offsets;
}

std::vector<float> random_weights(Random& random, int64_t count) {
  const auto raw = random_floats(random, static_cast<size_t>(count), FloatType::kF32);
  std::vector<float> weights(static_cast<size_t>(count));
  if (count > 0) std::memcpy(weights.data(), raw.data(), raw.size());
  return weights;
}

void compare_bags(cudaStream_t stream, TableData& t, const std::vector<int64_t>& ids, const std::vector<int64_t>& offsets, BagMode mode,
                  FloatType type, const float* weights, size_t shift) {
  DeviceTable device(t);
  const auto count = static_cast<int64_t>(ids.size());
  const auto bags = static_cast<int64_t>(offsets.size());
  const std::vector<int32_t> narrow(offsets.begin(), offsets.end());
  std::vector<uint8_t> want(static_cast<size_t>((bags - 1) * t.dim) * element_bytes(type));
  STATUS_OK(cpu().lookup_bag({}, {t.table(),
                                  {{ids.data(), IdType::kI64, count}, {narrow.data(), IdType::kI32, bags}, weights, mode},
                                  BadIds::kZeros,
                                  want.data(),
                                  type}));
  Device<int64_t> device_ids(ids);
  Device<int32_t> device_offsets(narrow);
  Device<float> device_weights(weights == nullptr ? std::vector<float>() : std::vector<float>(weights, weights + count));
  Device<uint8_t> out(want.size(), 0xee, shift);
  STATUS_OK(cuda()->lookup_bag(
      on(stream), {device.table(),
                   {{device_ids.get(), IdType::kI64, count}, {device_offsets.get(), IdType::kI32, bags}, device_weights.get(), mode},
                   BadIds::kZeros,
                   out.get(),
                   type}));
  CHECK(same(out.read(), want));
}

CUDA_TEST(bags) {
  Random random{11};
  for (const int64_t dim : {1, 7, 8, 32, 64, 96, 100, 129, 768, 2080, 4100}) {
    TableData t = random_table(random, 50, dim, {RuleKind::kSign}, false);
    t.scale[1] = 1e-40f;
    t.scale[2] = 3e38f;  // sums overflow
    for (const int64_t count : {0, 5, 900}) {
      const auto ids = random_ids(random, count, t.rows, kMixes[random.below(4)]);
      const auto offsets = random_offsets(random, count);
      const auto weights = random_weights(random, count);
      for (const FloatType type : kTypes) {
        for (const size_t shift : {size_t{0}, element_bytes(type)}) {
          for (const BagMode mode : {BagMode::kSum, BagMode::kMean, BagMode::kMajority}) {
            compare_bags(stream, t, ids, offsets, mode, type, nullptr, shift);
          }
          if (count > 0) compare_bags(stream, t, ids, offsets, BagMode::kSum, type, weights.data(), shift);
        }
      }
    }
  }
}

CUDA_TEST(bags_of_planes) {
  Random random{12};
  for (const int64_t dim : {7, 32, 64, 96, 1056}) {
    for (int planes = 2; planes <= kMaxPlanes; ++planes) {
      TableData t = random_table(random, 50, dim, {RuleKind::kSign}, false, planes);
      t.scale[1] = 1e-40f;
      const auto ids = random_ids(random, 700, t.rows, kMixes[random.below(4)]);
      const auto offsets = random_offsets(random, 700);
      const auto weights = random_weights(random, 700);
      for (const FloatType type : kTypes) {
        compare_bags(stream, t, ids, offsets, BagMode::kSum, type, nullptr, 0);
        compare_bags(stream, t, ids, offsets, BagMode::kMean, type, nullptr, element_bytes(type));
        compare_bags(stream, t, ids, offsets, BagMode::kSum, type, weights.data(), 0);
      }
    }
  }
}

// Tables whose bits are more than Tuning::BagWords keeps in the caches.
CUDA_TEST(bags_of_large_tables) {
  Random random{16};
  for (const int planes : {1, 2, 3, 8}) {
    TableData t = random_table(random, (int64_t{32} << 20) / (128 * planes) + 1, 1024, {RuleKind::kSign}, false, planes);
    const auto ids = random_ids(random, 700, t.rows, kMixes[planes % 4]);
    const auto offsets = random_offsets(random, 700);
    const auto weights = random_weights(random, 700);
    compare_bags(stream, t, ids, offsets, BagMode::kMean, FloatType::kBF16, nullptr, 0);
    compare_bags(stream, t, ids, offsets, BagMode::kSum, FloatType::kF32, weights.data(), 0);
  }
}

struct Gradient {
  int64_t dim;
  BagMode mode;
  FloatType type;
  const float* weights;
  int64_t padding_idx;
  size_t shift;
};

void compare_gradients(cudaStream_t stream, TableData& t, const std::vector<int64_t>& ids, const std::vector<int64_t>& offsets,
                       const std::vector<uint8_t>& dy, const Gradient& g) {
  DeviceTable device(t);
  const auto count = static_cast<int64_t>(ids.size());
  const auto cuts = static_cast<int64_t>(offsets.size());
  const std::vector<int32_t> narrow(ids.begin(), ids.end());
  Device<int32_t> device_ids(narrow);
  Device<int64_t> device_offsets(offsets);
  Device<float> device_weights(g.weights == nullptr ? std::vector<float>() : std::vector<float>(g.weights, g.weights + count));
  Device<uint8_t> device_dy(dy, g.shift);
  const Bags host{{narrow.data(), IdType::kI32, count}, {offsets.data(), IdType::kI64, cuts}, g.weights, g.mode, g.padding_idx};
  const Bags bags{
      {device_ids.get(), IdType::kI32, count}, {device_offsets.get(), IdType::kI64, cuts}, device_weights.get(), g.mode, g.padding_idx};

  std::vector<int32_t> counts(static_cast<size_t>(cuts - 1), -1);
  STATUS_OK(cpu().bag_counts({}, {t.scale.data(), t.rows, host, counts.data()}));
  Device<int32_t> device_counts(counts.size(), -2);
  STATUS_OK(cuda()->bag_counts(on(stream), {device.scale.get(), t.rows, bags, device_counts.get()}));
  CHECK(same(device_counts.read(), counts));

  const bool mean = g.mode == BagMode::kMean;
  std::vector<uint8_t> rows(static_cast<size_t>(count * g.dim) * element_bytes(g.type));
  STATUS_OK(cpu().bag_gradient({}, {host, {dy.data(), g.type}, g.dim, mean ? counts.data() : nullptr, rows.data()}));
  Device<uint8_t> device_rows(rows.size(), 0xee, g.shift);
  STATUS_OK(
      cuda()->bag_gradient(on(stream), {bags, {device_dy.get(), g.type}, g.dim, mean ? device_counts.get() : nullptr, device_rows.get()}));
  CHECK(same(device_rows.read(), rows));

  std::vector<float> slopes(static_cast<size_t>(count), 7.0f);
  STATUS_OK(cpu().bag_weight_gradient({}, {t.table(), host, {dy.data(), g.type}, slopes.data()}));
  Device<float> device_slopes(slopes.size(), 8.0f);
  STATUS_OK(cuda()->bag_weight_gradient(on(stream), {device.table(), bags, {device_dy.get(), g.type}, device_slopes.get()}));
  CHECK(same(device_slopes.read(), slopes));
}

CUDA_TEST(gradients) {
  Random random{13};
  for (const int64_t dim : {1, 7, 8, 31, 33, 64, 100, 768, 2052, 4100}) {
    TableData t = random_table(random, 50, dim, {RuleKind::kSign}, false);
    t.scale[1] = 1e-40f;
    t.scale[2] = 3e38f;  // products overflow
    for (const int64_t count : {0, 5, 900}) {
      const auto ids = random_ids(random, count, t.rows, kMixes[random.below(4)]);
      const auto offsets = random_offsets(random, count);
      const auto weights = random_weights(random, count);
      for (const FloatType type : kTypes) {
        auto dy = random_floats(random, (offsets.size() - 1) * static_cast<size_t>(dim), type);
        if (!dy.empty()) std::memset(dy.data(), 0xff, element_bytes(type));  // a NaN that is negative and has bits of its own
        for (const size_t shift : {size_t{0}, element_bytes(type)}) {
          const int64_t padding_idx = static_cast<int64_t>(random.below(4)) - 1;
          for (const BagMode mode : {BagMode::kSum, BagMode::kMean, BagMode::kMajority}) {
            compare_gradients(stream, t, ids, offsets, dy, {dim, mode, type, nullptr, padding_idx, shift});
          }
          if (count > 0) compare_gradients(stream, t, ids, offsets, dy, {dim, BagMode::kSum, type, weights.data(), padding_idx, shift});
        }
      }
    }
  }
}

// Offsets that descend or leave the ids: nothing is read or written out of bounds, and bags that are cut well are right.
CUDA_TEST(gradients_of_bad_bags) {
  const std::vector<int64_t> ids = {0, 9, -3, 1, 1, 0}, offsets = {0, 2, -5, 3, 99, 4, 6};
  const std::vector<float> dy = {1, 2, 3, 4, 5, 6};
  std::vector<uint8_t> bits = {1, 0};
  std::vector<float> scale = {1.0f, 2.0f};
  Device<int64_t> device_ids(ids), device_offsets(offsets);
  Device<uint8_t> device_bits(bits);
  Device<float> device_scale(scale), device_dy(dy), rows(6, 7.0f), slopes(6, 7.0f);
  Device<int32_t> counts(6, -1);
  const Bags bags{{device_ids.get(), IdType::kI64, 6}, {device_offsets.get(), IdType::kI64, 7}};
  STATUS_OK(cuda()->bag_counts(on(stream), {device_scale.get(), 2, bags, counts.get()}));
  const auto found = counts.read();
  CHECK(found[0] == 1 && found[1] == 0 && found[2] == 0 && found[3] == 0 && found[4] == 0 && found[5] == 2);
  STATUS_OK(cuda()->bag_gradient(on(stream), {bags, {device_dy.get()}, 1, nullptr, rows.get()}));
  for (const float x : rows.read()) CHECK(x >= 0.0f && x <= 6.0f);
  STATUS_OK(
      cuda()->bag_weight_gradient(on(stream), {{device_bits.get(), device_scale.get(), 2, 1}, bags, {device_dy.get()}, slopes.get()}));
  for (const float x : slopes.read()) CHECK(std::fabs(x) <= 12.0f);
}

CUDA_TEST(average) {
  Random random{14};
  for (const int64_t dim : {1, 7, 8, 9, 100, 256, 767, 4096}) {
    for (const float weight : {0.0f, 0.001f, 0.4f, 1.0f}) {
      TableData a = random_table(random, 301, dim, {RuleKind::kSign}, false);
      TableData b = random_table(random, 301, dim, {RuleKind::kSign}, false);
      for (size_t r = 0; r < b.scale.size(); r += 2) b.scale[r] = 0.5f;  // rows that are padding in a alone
      a.scale[1] = 1e-44f;
      const StepContext context{{123, 4}, {random(), 1}, {0xffffff9cu, 0}, weight, 0.0f};  // the first row is 2^32 - 100
      Device<StepContext> device_context({context});
      DeviceTable device_a(a), device_b(b), device_out(a);
      TableData want = a;
      STATUS_OK(cpu().average({}, {a.table(), b.table(), &context, want.table()}));
      STATUS_OK(cuda()->average(on(stream), {device_a.table(), device_b.table(), device_context.get(), device_out.table()}));
      CHECK(same(device_out.bits.read(), want.bits) && same(device_out.scale.read(), want.scale));
      STATUS_OK(cuda()->average(on(stream), {device_a.table(), device_b.table(), device_context.get(), device_b.table()}));  // in place
      CHECK(same(device_b.bits.read(), want.bits) && same(device_b.scale.read(), want.scale));
    }
  }
}

CUDA_TEST(bad_bags) {
  Random random{12};
  const int64_t dim = 2049;  // more bytes than a team has threads: an id is still reported once
  TableData t = random_table(random, 9, dim, {RuleKind::kSign}, false);
  DeviceTable device(t);
  const std::vector<int64_t> ids = {1, 9, 2, -3, 9, 4};
  const std::vector<int64_t> offsets = {0, 1, 3, 3, 5, 7, 2, 3};  // good, one bad id, empty, two, past the end, descending, good
  Device<int64_t> device_ids(ids), device_offsets(offsets);
  for (const BagMode mode : {BagMode::kSum, BagMode::kMean, BagMode::kMajority}) {
    Device<ErrorBlock> errors(1, ErrorBlock{0, 0});
    Device<float> out(7 * static_cast<size_t>(dim), 7.0f);
    Launch launch = on(stream);
    launch.errors = errors.get();
    const Bags bags{{device_ids.get(), IdType::kI64, 6}, {device_offsets.get(), IdType::kI64, 8}, nullptr, mode};
    STATUS_OK(cuda()->lookup_bag(launch, {device.table(), bags, BadIds::kReport, out.get(), FloatType::kF32}));
    CHECK(errors.read()[0].count == 5);
    const auto y = out.read();
    for (int64_t i = 0; i < 7 * dim; ++i) {
      const int64_t bag = i / dim;
      CHECK(std::isnan(y[static_cast<size_t>(i)]) == (bag == 1 || bag == 3 || bag == 4 || bag == 5));
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cuda_tests(argc, argv); }
