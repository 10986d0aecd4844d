// What tables over several ranks exchange, on the GPU against the CPU: routes, sums, rows that travel.
#include <algorithm>

#include "cuda_support.h"

using namespace dualbin;

namespace {

void compare_route(cudaStream_t stream, const std::vector<int64_t>& ids, int64_t rows, int64_t world, int64_t capacity) {
  const auto n = static_cast<int64_t>(ids.size());
  const int64_t share = (rows + world - 1) / world;
  const int64_t places = capacity > 0 ? world * capacity : std::min(n, rows);
  HostLaunch host(Op::kReduceRows, n, rows, 1);
  DeviceLaunch gpu(Op::kReduceRows, n, rows, 1, stream);
  std::vector<int64_t> local(static_cast<size_t>(places), 7), numbers(static_cast<size_t>(world + 1), 7);
  std::vector<int64_t> missed(static_cast<size_t>(world + 3), 1);
  std::vector<int32_t> slots(ids.size(), 7);
  Device<int64_t> device_ids(ids), device_local(local), device_numbers(numbers), device_missed(missed);
  Device<int32_t> device_slots(slots);
  RouteCall call;
  call.ids = {ids.data(), IdType::kI64, n};
  call.rows = rows;
  call.share = share;
  call.world = world;
  call.capacity = capacity;
  call.spare = capacity > 0 ? 4 : 0;
  call.local = local.data();
  call.places = places;
  call.slots = slots.data();
  call.slots_type = IdType::kI32;
  call.numbers = numbers.data();
  call.missed = capacity > 0 ? missed.data() : nullptr;
  STATUS_OK(cpu().route(host.launch, call));
  call.ids.data = device_ids.get();
  call.local = device_local.get();
  call.slots = device_slots.get();
  call.numbers = device_numbers.get();
  call.missed = capacity > 0 ? device_missed.get() : nullptr;
  STATUS_OK(cuda()->route(gpu.launch, call));
  CHECK(same(device_local.read(), local));
  CHECK(same(device_slots.read(), slots));
  CHECK(same(device_numbers.read(), numbers));
  CHECK(same(device_missed.read(), missed));
}

CUDA_TEST(route) {
  Random random{6};
  for (const int64_t n : {0, 1, 700, 5000}) {
    for (const IdMix mix_of : kMixes) {
      for (const int64_t capacity : {0, 3, 900}) compare_route(stream, random_ids(random, n, 3001, mix_of), 3001, 3, capacity);
    }
  }
  compare_route(stream, random_ids(random, 2000, int64_t{1} << 40, IdMix::kHot), int64_t{1} << 40, 8, 0);
}

CUDA_TEST(slot_means) {
  Random random{7};
  for (const int64_t dim : {1, 33, 128}) {
    for (const FloatType type : kTypes) {
      const int64_t n = 700;
      const int64_t segments = 90;
      const auto slots = random_ids(random, n, segments, kMixes[random.below(4)]);
      const auto dy = random_floats(random, static_cast<size_t>(n * dim), FloatType::kF32);
      std::vector<uint8_t> means(static_cast<size_t>(segments * dim) * (type == FloatType::kF32 ? 4 : 2), 7);
      Device<uint8_t> device_means(means), device_dy(dy);
      Device<int64_t> device_slots(slots);
      HostLaunch host(Op::kSegmentSum, n, segments, dim);
      DeviceLaunch gpu(Op::kSegmentSum, n, segments, dim, stream);
      SlotMeansCall call{{{slots.data(), IdType::kI64, n}, {dy.data(), FloatType::kF32}, segments, dim}, 3.0f, means.data(), type};
      STATUS_OK(cpu().slot_means(host.launch, call));
      call.sums.slots.data = device_slots.get();
      call.sums.dy.data = device_dy.get();
      call.out = device_means.get();
      STATUS_OK(cuda()->slot_means(gpu.launch, call));
      CHECK(same(device_means.read(), means));
    }
  }
}

CUDA_TEST(rows_that_travel) {
  Random random{8};
  for (const int64_t width : {1, 7, 16, 96}) {
    for (const size_t shift : {size_t{0}, size_t{1}}) {
      const int64_t rows = 200;
      const int64_t n = 150;
      const auto ids = random_ids(random, n, rows, IdMix::kUniform);
      std::vector<uint8_t> bits(static_cast<size_t>(rows * width)), packed(static_cast<size_t>(n * (width + kScaleBytes)), 7);
      for (auto& byte : bits) byte = static_cast<uint8_t>(random.below(256));
      std::vector<float> scale(static_cast<size_t>(rows), 0.5f);
      HostLaunch host(Op::kReduceRows, 0, rows, 1);
      DeviceLaunch gpu(Op::kReduceRows, 0, rows, 1, stream);
      Device<uint8_t> device_bits(bits, shift), device_packed(packed, shift);
      Device<float> device_scale(scale);
      Device<int64_t> device_ids(ids);
      STATUS_OK(cpu().take_rows(host.launch, {bits.data(), scale.data(), rows, width, {ids.data(), IdType::kI64, n}, packed.data()}));
      STATUS_OK(cuda()->take_rows(
          gpu.launch, {device_bits.get(), device_scale.get(), rows, width, {device_ids.get(), IdType::kI64, n}, device_packed.get()}));
      CHECK(same(device_packed.read(), packed));
      std::vector<uint8_t> new_bits(static_cast<size_t>(n * width), 9);
      std::vector<float> new_scale(static_cast<size_t>(n), 9.0f);
      Device<uint8_t> device_new_bits(new_bits, shift);
      Device<float> device_new_scale(new_scale);
      STATUS_OK(cpu().put_rows(host.launch, {packed.data(), {nullptr, IdType::kI64, n}, new_bits.data(), new_scale.data(), n, width}));
      STATUS_OK(cuda()->put_rows(
          gpu.launch, {device_packed.get(), {nullptr, IdType::kI64, n}, device_new_bits.get(), device_new_scale.get(), n, width}));
      CHECK(same(device_new_bits.read(), new_bits));
      CHECK(same(device_new_scale.read(), new_scale));
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cuda_tests(argc, argv); }
