// The CUDA back end against the CPU back end, bit for bit, without Python. Exit status 77: there is no GPU. Sizes are kept moderate because
// compute-sanitizer runs this program too.
#include <algorithm>
#include <string>

#include "cuda_support.h"

using namespace dualbin;

namespace {

CUDA_TEST(pack) {
  Random random{1};
  for (const int64_t dim : {1, 7, 8, 16, 31, 32, 33, 100, 768, 1025}) {
    for (const FloatType type : kTypes) {
      const int64_t rows = 37;
      const int64_t width = (dim + 7) / 8;
      auto w = random_floats(random, static_cast<size_t>(rows * dim), type);
      std::fill(w.begin(), w.begin() + static_cast<int64_t>(element_bytes(type)) * dim, uint8_t{0});  // a row of zeros
      std::vector<uint8_t> bits(static_cast<size_t>(rows * width), 0xff);
      std::vector<float> scale(rows, -1.0f);
      std::vector<int8_t> signs(static_cast<size_t>(rows * dim));
      STATUS_OK(cpu().pack({}, {{w.data(), type}, rows, dim, 1, bits.data(), scale.data()}));
      STATUS_OK(cpu().unpack({}, {{bits.data(), nullptr, rows, dim}, signs.data()}));
      Device<uint8_t> device_w(w);
      Device<uint8_t> device_bits(bits.size(), 0xff);
      Device<float> device_scale(scale.size(), -1.0f);
      STATUS_OK(cuda()->pack(on(stream), {{device_w.get(), type}, rows, dim, 1, device_bits.get(), device_scale.get()}));
      CHECK(same(device_bits.read(), bits));
      CHECK(same(device_scale.read(), scale));
      for (const size_t shift : {0, 1}) {
        Device<int8_t> device_signs(signs.size(), 0, shift);
        STATUS_OK(cuda()->unpack(on(stream), {{device_bits.get(), nullptr, rows, dim}, device_signs.get()}));
        CHECK(same(device_signs.read(), signs));
      }
    }
  }
}

CUDA_TEST(lookup) {
  Random random{2};
  for (const int64_t dim : {1, 3, 4, 8, 12, 64, 100, 129, 768, 2048}) {
    TableData t = random_table(random, 50, dim, {RuleKind::kSign}, false);
    t.scale[1] = 1e-7f;  // subnormal in float16
    t.scale[2] = 65519.9f;
    t.scale[6] = -1e30f;  // infinite in float16
    t.scale[8] = 1e-40f;  // subnormal in float32
    DeviceTable device(t);
    const auto ids = random_ids(random, 333, t.rows, IdMix::kUniform);
    const std::vector<int32_t> narrow(ids.begin(), ids.end());
    Device<int64_t> device_ids(ids);
    Device<int32_t> device_narrow(narrow);
    for (const FloatType type : kTypes) {
      const size_t bytes = ids.size() * static_cast<size_t>(dim) * element_bytes(type);
      std::vector<uint8_t> want(bytes);
      STATUS_OK(cpu().lookup({}, {t.table(), {ids.data(), IdType::kI64, 333}, BadIds::kZeros, want.data(), type}));
      for (const size_t shift : {size_t{0}, element_bytes(type)}) {
        Device<uint8_t> out(bytes, 0xee, shift);
        STATUS_OK(cuda()->lookup(on(stream), {device.table(), {device_ids.get(), IdType::kI64, 333}, BadIds::kZeros, out.get(), type}));
        CHECK(same(out.read(), want));
        out.write(std::vector<uint8_t>(bytes, 0xee));
        STATUS_OK(cuda()->lookup(on(stream), {device.table(), {device_narrow.get(), IdType::kI32, 333}, BadIds::kZeros, out.get(), type}));
        CHECK(same(out.read(), want));
      }
    }
  }
}

CUDA_TEST(bad_ids) {
  Random random{3};
  for (const int64_t dim : {3, 16}) {
    const TableData t = random_table(random, 9, dim, {RuleKind::kSign}, false);
    DeviceTable device(t);
    const std::vector<int64_t> ids = {1, 9, -4, 2, int64_t{1} << 40};
    Device<int64_t> device_ids(ids);
    Device<ErrorBlock> errors(1, ErrorBlock{0, 0});
    Device<float> out(5 * static_cast<size_t>(dim), 7.0f);
    Launch launch = on(stream);
    launch.errors = errors.get();
    for (int round = 1; round <= 2; ++round) {
      STATUS_OK(cuda()->lookup(launch, {device.table(), {device_ids.get(), IdType::kI64, 5}, BadIds::kReport, out.get(), FloatType::kF32}));
      const ErrorBlock block = errors.read()[0];
      CHECK(block.count == static_cast<uint64_t>(3 * round));
      CHECK(block.first == 9 || block.first == -4 || block.first == int64_t{1} << 40);
    }
    const auto y = out.read();
    for (int64_t i = 0; i < 5 * dim; ++i) CHECK(std::isnan(y[static_cast<size_t>(i)]) == (i / dim != 0 && i / dim != 3));
    launch.errors = nullptr;  // nowhere to report to
    STATUS_OK(cuda()->lookup(launch, {device.table(), {device_ids.get(), IdType::kI64, 5}, BadIds::kReport, out.get(), FloatType::kF32}));
    CHECK(std::isnan(out.read()[static_cast<size_t>(dim)]));
  }
}

void compare_reduce(cudaStream_t stream, const std::vector<int64_t>& ids, const std::vector<uint8_t>& dy, FloatType type, int64_t rows,
                    int64_t dim, int64_t capacity, size_t shift) {
  const auto n = static_cast<int64_t>(ids.size());
  const auto slots = static_cast<size_t>(capacity);
  HostLaunch host(Op::kReduceRows, n, rows, dim);
  DeviceLaunch gpu(Op::kReduceRows, n, rows, dim, stream);
  std::vector<int64_t> out_ids(slots, 77), count(1, 77);
  std::vector<float> sums(slots * static_cast<size_t>(dim), 7.0f);
  Device<int64_t> device_ids(ids), device_out_ids(out_ids), device_count(count);
  Device<uint8_t> device_dy(dy);
  Device<float> device_sums(sums, shift);
  STATUS_OK(cpu().reduce_rows(host.launch, {{ids.data(), IdType::kI64, n},
                                            {dy.data(), type},
                                            rows,
                                            dim,
                                            {out_ids.data(), IdType::kI64, sums.data(), count.data(), IdType::kI64, capacity}}));
  STATUS_OK(cuda()->reduce_rows(gpu.launch,
                                {{device_ids.get(), IdType::kI64, n},
                                 {device_dy.get(), type},
                                 rows,
                                 dim,
                                 {device_out_ids.get(), IdType::kI64, device_sums.get(), device_count.get(), IdType::kI64, capacity}}));
  CHECK(same(device_count.read(), count));
  CHECK(same(device_out_ids.read(), out_ids));
  CHECK(same(device_sums.read(), sums));
}

CUDA_TEST(reduce) {
  Random random{4};
  for (const int64_t dim : {1, 5, 8, 100, 256, 300}) {
    for (const int64_t n : {0, 1, 64, 65, 130, 3000}) {
      for (const IdMix mix_of : kMixes) {
        const FloatType type = kTypes[random.below(3)];
        const auto ids = random_ids(random, n, 200, mix_of);
        const auto dy = random_floats(random, static_cast<size_t>(n * dim), type);
        compare_reduce(stream, ids, dy, type, 200, dim, std::min<int64_t>(n, 200) + 3, 0);
        compare_reduce(stream, ids, dy, type, 200, dim, 5, 1);
        compare_reduce(stream, ids, dy, type, 200, dim, 0, 0);
      }
    }
  }
  for (const int64_t rows : {int64_t{UINT32_MAX} - 1, int64_t{UINT32_MAX}, int64_t{1} << 40}) {  // rows that need 32 bits, and more
    const auto ids = random_ids(random, 2000, rows, IdMix::kHot);
    compare_reduce(stream, ids, random_floats(random, 2000 * 12, FloatType::kF32), FloatType::kF32, rows, 12, 2000, 0);
  }
}

// As many ids as each way of grouping takes: a block, a cluster, grids with few and many ids a thread, CUB.
CUDA_TEST(grouping) {
  Random random{14};
  for (const int64_t n : {512, 2049, 16385, 70001, 140003, 300007, 600011, 1100009}) {
    for (const int64_t rows : {int64_t{300}, int64_t{50304}, int64_t{10000000}}) {
      const auto ids = random_ids(random, n, rows, kMixes[random.below(4)]);
      const auto dy = random_floats(random, static_cast<size_t>(n), FloatType::kF32);
      compare_reduce(stream, ids, dy, FloatType::kF32, rows, 1, std::min(n, rows), 0);
    }
  }
}

CUDA_TEST(segment_sum) {
  Random random{5};
  for (const int64_t dim : {1, 8, 33, 512}) {
    for (const int64_t n : {0, 1, 700}) {
      for (const FloatType type : kTypes) {
        const int64_t segments = 90;
        const auto slots = random_ids(random, n, segments, kMixes[random.below(4)]);
        const std::vector<int32_t> narrow(slots.begin(), slots.end());
        const auto dy = random_floats(random, static_cast<size_t>(n * dim), type);
        std::vector<float> sums(static_cast<size_t>(segments * dim), 7.0f);
        Device<float> device_sums(sums);
        Device<int32_t> device_slots(narrow);
        Device<uint8_t> device_dy(dy);
        HostLaunch host(Op::kSegmentSum, n, segments, dim);
        DeviceLaunch gpu(Op::kSegmentSum, n, segments, dim, stream);
        STATUS_OK(cpu().segment_sum(host.launch, {{narrow.data(), IdType::kI32, n}, {dy.data(), type}, segments, dim, sums.data()}));
        STATUS_OK(cuda()->segment_sum(gpu.launch,
                                      {{device_slots.get(), IdType::kI32, n}, {device_dy.get(), type}, segments, dim, device_sums.get()}));
        CHECK(same(device_sums.read(), sums));
      }
    }
  }
}

void compare_update(cudaStream_t stream, TableData* host, DeviceTable* device, const Rule& rule, const Step& step, bool masks) {
  const int64_t n = step.count();
  const int64_t dim = host->dim;
  HostLaunch host_launch(Op::kUpdate, n, host->rows, dim);
  DeviceLaunch device_launch(Op::kUpdate, n, host->rows, dim, stream);
  std::vector<uint8_t> mask(masks ? static_cast<size_t>(n * host->planes * host->width()) : 0, 0xcc);
  std::vector<float> new_scale(masks ? static_cast<size_t>(n) : 0, 7.0f);
  std::vector<Stats> stats(1, Stats{9, 9, 9, 9});
  Device<uint8_t> device_mask(mask), device_dy(step.dy);
  Device<float> device_new_scale(new_scale);
  Device<Stats> device_stats(stats);
  Device<int64_t> device_ids(step.ids);
  Device<StepContext> device_context(1, step.context);
  STATUS_OK(cpu().update(host_launch.launch, {host->table(),
                                              host->state(),
                                              rule,
                                              &step.context,
                                              {step.ids.data(), IdType::kI64, n},
                                              {step.dy.data(), step.type},
                                              false,
                                              {masks ? mask.data() : nullptr, masks ? new_scale.data() : nullptr, stats.data()}}));
  StepContext passing = step.context;
  UpdateCall call{device->table(),
                  device->state(),
                  rule,
                  device_context.get(),
                  {device_ids.get(), IdType::kI64, n},
                  {device_dy.get(), step.type},
                  false,
                  {device_mask.get(), device_new_scale.get(), device_stats.get()}};
  if (step.context.step[0] % 2 != 0) {
    call.context = &passing;
    call.context_on_host = true;
  }
  STATUS_OK(cuda()->update(device_launch.launch, call));
  passing = {};  // it has been read
  CHECK(same_tables(device->read(), *host));
  CHECK(same(device_mask.read(), mask));
  CHECK(same(device_new_scale.read(), new_scale));
  CHECK(same(device_stats.read(), stats));
}

CUDA_TEST(update) {
  Random random{6};
  for (const int64_t dim : {1, 7, 8, 96, 100, 256, 257, 520, 2052, 2080}) {
    for (const Rule& rule : rules()) {
      for (const bool train_scale : {false, true}) {
        const bool counts = rule.kind == RuleKind::kCounter && !rule.center;
        TableData host = random_table(random, 60, dim, rule, train_scale, counts ? 1 + static_cast<int>(random.below(rule.bits)) : 1);
        DeviceTable device(host);
        for (uint32_t s = 0; s < 4; ++s) {
          Step step(random, s == 2 ? 7 : 400, 60, dim, kTypes[random.below(3)], kMixes[s], s);
          if (train_scale) step.context.first_row[0] = 5, step.context.first_row[1] = 2;  // a shard that starts at row 2^33 + 5
          compare_update(stream, &host, &device, rule, step, false);
          compare_update(stream, &host, &device, rule, step, true);
        }
      }
    }
  }
  Rule rule{RuleKind::kCounter, 8};  // rows that do not fit into shared memory; no ids at all
  rule.eta = 2.0f;
  TableData host = random_table(random, 12, 9001, rule, true);
  DeviceTable device(host);
  for (uint32_t s = 0; s < 2; ++s) {
    compare_update(stream, &host, &device, rule, Step(random, 100, 12, 9001, FloatType::kF32, IdMix::kHot, s), s == 1);
  }
  compare_update(stream, &host, &device, rule, Step(random, 0, 12, 9001, FloatType::kF32, IdMix::kHot, 9), false);
}

CUDA_TEST(xor) {
  Random random{7};
  for (const int64_t width : {1, 5, 8, 96, 1000}) {
    TableData t = random_table(random, 40, 8 * width, {RuleKind::kSign}, false);
    Device<uint8_t> bits(t.bits);
    const std::vector<int64_t> ids = {39, 40, 0, 7, -1, 21};
    Device<int64_t> device_ids(ids);
    std::vector<uint8_t> mask(6 * static_cast<size_t>(width));
    for (auto& m : mask) m = static_cast<uint8_t>(random());
    STATUS_OK(cpu().xor_rows({}, {t.bits.data(), 40, width, {ids.data(), IdType::kI64, 6}, mask.data()}));
    Device<uint8_t> device_mask(mask, static_cast<size_t>(width % 3));
    STATUS_OK(cuda()->xor_rows(on(stream), {bits.get(), 40, width, {device_ids.get(), IdType::kI64, 6}, device_mask.get()}));
    CHECK(same(bits.read(), t.bits));
  }
}

TEST(two_streams) {
  // The same updates of two copies, in flight at the same time with a workspace each.
  Random random{8};
  Rule rule{RuleKind::kCounter, 8};
  rule.eta = 3.0f;
  const int64_t rows = 500, dim = 384, n = 3000;
  TableData host = random_table(random, rows, dim, rule, true);
  DeviceTable first(host), second(host);
  cudaStream_t streams[2];
  for (auto& s : streams) CUDA_OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  const Step step(random, n, rows, dim, FloatType::kBF16, IdMix::kHot, 0);
  Device<int64_t> ids(step.ids);
  Device<uint8_t> dy(step.dy);
  Device<StepContext> context(1, step.context);
  DeviceLaunch launches[2] = {{Op::kUpdate, n, rows, dim, streams[0]}, {Op::kUpdate, n, rows, dim, streams[1]}};
  HostLaunch host_launch(Op::kUpdate, n, rows, dim);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 2; ++i) {
      DeviceTable& t = i == 0 ? first : second;
      STATUS_OK(cuda()->update(
          launches[i].launch, {t.table(), t.state(), rule, context.get(), {ids.get(), IdType::kI64, n}, {dy.get(), step.type}, false, {}}));
    }
    STATUS_OK(cpu().update(
        host_launch.launch,
        {host.table(), host.state(), rule, &step.context, {step.ids.data(), IdType::kI64, n}, {step.dy.data(), step.type}, false, {}}));
  }
  CHECK(same_tables(first.read(), host));
  CHECK(same_tables(second.read(), host));
  for (auto& s : streams) CUDA_OK(cudaStreamDestroy(s));
}

CUDA_TEST(graph) {
  // One captured update, replayed with new ids, gradients and step contexts.
  Random random{9};
  Rule rule{RuleKind::kCounter, 8};
  rule.bits = 4;
  rule.eta = 1.0f;
  const int64_t rows = 80, dim = 96, n = 600;
  TableData host = random_table(random, rows, dim, rule, true);
  DeviceTable device(host);
  Device<int64_t> ids(static_cast<size_t>(n), 0);
  Device<uint8_t> dy(static_cast<size_t>(n * dim * 2), 0);
  Device<StepContext> context(1, StepContext{});
  Device<Stats> stats(1, Stats{});
  HostLaunch host_launch(Op::kUpdate, n, rows, dim);
  DeviceLaunch launch(Op::kUpdate, n, rows, dim, stream);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  STATUS_OK(cuda()->update(launch.launch, {device.table(),
                                           device.state(),
                                           rule,
                                           context.get(),
                                           {ids.get(), IdType::kI64, n},
                                           {dy.get(), FloatType::kF16},
                                           false,
                                           {nullptr, nullptr, stats.get()}}));
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  for (uint32_t s = 0; s < 8; ++s) {
    const Step step(random, n, rows, dim, FloatType::kF16, kMixes[s % 4], s);
    ids.write(step.ids);
    dy.write(step.dy);
    context.write({step.context});
    CUDA_OK(cudaGraphLaunch(executable, stream));
    std::vector<Stats> want(1);
    STATUS_OK(cpu().update(host_launch.launch, {host.table(),
                                                host.state(),
                                                rule,
                                                &step.context,
                                                {step.ids.data(), IdType::kI64, n},
                                                {step.dy.data(), step.type},
                                                false,
                                                {nullptr, nullptr, want.data()}}));
    CHECK(same_tables(device.read(), host));
    CHECK(same(stats.read(), want));
  }
  CUDA_OK(cudaGraphExecDestroy(executable));
  CUDA_OK(cudaGraphDestroy(graph));
}

CUDA_TEST(large_indices) {
  // 400 million rows of 17 bytes: byte offsets beyond 2^32.
  const int64_t rows = 400'000'000, dim = 130;
  uint8_t* bits = nullptr;
  float* scale = nullptr;
  if (cudaMalloc(&bits, static_cast<size_t>(rows) * 17) != cudaSuccess ||
      cudaMalloc(&scale, static_cast<size_t>(rows) * 4) != cudaSuccess) {
    cudaGetLastError();
    std::printf("skipped: no memory for the large table\n");
  } else {
    const float two = 2.0f;
    CUDA_OK(cudaMemset(bits + (rows - 1) * 17, 0, 17));
    CUDA_OK(cudaMemset(bits + (rows - 1) * 17 + 16, 0b10, 1));
    CUDA_OK(cudaMemcpy(scale + rows - 1, &two, 4, cudaMemcpyHostToDevice));
    Device<int64_t> ids(std::vector<int64_t>{rows - 1});
    Device<float> out(static_cast<size_t>(dim), 0.0f);
    STATUS_OK(
        cuda()->lookup(on(stream), {{bits, scale, rows, dim}, {ids.get(), IdType::kI64, 1}, BadIds::kReport, out.get(), FloatType::kF32}));
    const auto y = out.read();
    CHECK(y[0] == -2.0f && y[127] == -2.0f && y[128] == -2.0f && y[129] == 2.0f);
  }
  cudaFree(bits);
  cudaFree(scale);
}

CUDA_TEST(bad_arguments) {
  Random random{10};
  Rule rule{RuleKind::kCounter, 8};
  const TableData host = random_table(random, 4, 16, rule, false);
  DeviceTable device(host);
  const Step step(random, 2, 4, 16, FloatType::kF32, IdMix::kUniform, 0);
  Device<int64_t> ids(step.ids);
  Device<uint8_t> dy(step.dy);
  Device<StepContext> context(1, step.context);
  const auto update = [&](const Launch& launch) {
    return cuda()->update(
        launch, {device.table(), device.state(), rule, context.get(), {ids.get(), IdType::kI64, 2}, {dy.get(), step.type}, false, {}});
  };
  const Status none = update(on(stream));
  CHECK(none.code == Code::kInvalidArgument && std::string(none.message).find("workspace") != std::string::npos);
  DeviceLaunch launch(Op::kUpdate, 2, 4, 16, stream);
  launch.launch.workspace_bytes -= 1;
  CHECK(update(launch.launch).code == Code::kInvalidArgument);
  launch.launch.workspace_bytes += 1;
  launch.launch.workspace = static_cast<char*>(launch.launch.workspace) + 8;
  CHECK(update(launch.launch).code == Code::kInvalidArgument);
  CHECK(same_tables(device.read(), host));
}

}  // namespace

int main(int argc, char** argv) { return run_cuda_tests(argc, argv); }
