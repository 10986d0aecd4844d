// Lookup of bags: the CUDA back end against the CPU back end, bit for bit. Exit status 77: there is no GPU.
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

void compare_bags(cudaStream_t stream, TableData& t, const std::vector<int64_t>& ids, const std::vector<int64_t>& offsets, BagMode mode,
                  FloatType type, const float* weights, size_t shift) {
  DeviceTable device(t);
  const auto count = static_cast<int64_t>(ids.size());
  const auto bags = static_cast<int64_t>(offsets.size());
  const std::vector<int32_t> narrow(offsets.begin(), offsets.end());
  std::vector<uint8_t> want(static_cast<size_t>((bags - 1) * t.dim) * element_bytes(type));
  STATUS_OK(cpu().lookup_bag({}, t.table(), {{ids.data(), IdType::kI64, count}, {narrow.data(), IdType::kI32, bags}, weights, mode},
                             BadIds::kZeros, want.data(), type));
  Device<int64_t> device_ids(ids);
  Device<int32_t> device_offsets(narrow);
  Device<float> device_weights(weights == nullptr ? std::vector<float>() : std::vector<float>(weights, weights + count));
  Device<uint8_t> out(want.size(), 0xee, shift);
  STATUS_OK(
      cuda()->lookup_bag(on(stream), device.table(),
                         {{device_ids.get(), IdType::kI64, count}, {device_offsets.get(), IdType::kI32, bags}, device_weights.get(), mode},
                         BadIds::kZeros, out.get(), type));
  CHECK(same(out.read(), want));
}

void test_bags(cudaStream_t stream) {
  Random random{11};
  for (const int64_t dim : {1, 7, 8, 64, 100, 129, 768, 4100}) {
    TableData t = random_table(random, 50, dim, {RuleKind::kSign}, false);
    t.scale[1] = 1e-40f;
    t.scale[2] = 3e38f;  // sums overflow
    for (const int64_t count : {0, 5, 900}) {
      const auto ids = random_ids(random, count, t.rows, kMixes[random.below(4)]);
      const auto offsets = random_offsets(random, count);
      const auto raw = random_floats(random, static_cast<size_t>(count), FloatType::kF32);
      std::vector<float> weights(static_cast<size_t>(count) + 1);
      if (count > 0) std::memcpy(weights.data(), raw.data(), raw.size());
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

void test_bad_bags(cudaStream_t stream) {
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
    STATUS_OK(cuda()->lookup_bag(launch, device.table(), bags, BadIds::kReport, out.get(), FloatType::kF32));
    CHECK(errors.read()[0].count == 5);
    const auto y = out.read();
    for (int64_t i = 0; i < 7 * dim; ++i) {
      const int64_t bag = i / dim;
      CHECK(std::isnan(y[static_cast<size_t>(i)]) == (bag == 1 || bag == 3 || bag == 4 || bag == 5));
    }
  }
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  test_bags(stream);
  test_bad_bags(stream);
  CUDA_OK(cudaDeviceSynchronize());
  CUDA_OK(cudaStreamDestroy(stream));
  return finish();
}
