// What the CUDA tests share: their streams, device arrays, random tables and gradients, one update on either back end.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/backend.h"
#include "rules/hash.h"

// A failed runtime call ends the test: nothing after it would mean anything.
#define CUDA_OK(call)                                                                                \
  do {                                                                                               \
    const cudaError_t code_ = (call);                                                                \
    if (code_ != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(code_)); \
      std::exit(1);                                                                                  \
    }                                                                                                \
  } while (false)

// A status that must be good; prints its message otherwise.
#define STATUS_OK(expression)                                           \
  do {                                                                  \
    const dualbin::Status status_ = (expression);                       \
    CHECK(status_.ok());                                                \
    if (!status_.ok()) std::fprintf(stderr, "  %s\n", status_.message); \
  } while (false)

// CUDA_TEST(name) { ... } is a TEST with a cudaStream_t `stream` of its own.
#define CUDA_TEST(name)                                  \
  void cuda_test_##name(cudaStream_t stream);            \
  TEST(name) { dualbin::with_stream(cuda_test_##name); } \
  void cuda_test_##name(cudaStream_t stream)

namespace dualbin {

inline void with_stream(void (*body)(cudaStream_t)) {
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  body(stream);
  CUDA_OK(cudaDeviceSynchronize());
  CUDA_OK(cudaStreamDestroy(stream));
}

// run_tests, or exit status 77, a skip, without a GPU.
inline int run_cuda_tests(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  return run_tests(argc, argv);
}

// An array on the device. `shift` elements before it keep it from being aligned.
template <typename T>
class Device {
 public:
  explicit Device(const std::vector<T>& host, size_t shift = 0) : count_(host.size()), shift_(shift) {
    CUDA_OK(cudaMalloc(&base_, (count_ + shift_) * sizeof(T) + 1));
    write(host);
  }
  explicit Device(size_t count, T value, size_t shift = 0) : Device(std::vector<T>(count, value), shift) {}
  ~Device() { cudaFree(base_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  T* get() { return count_ == 0 ? nullptr : base_ + shift_; }
  void write(const std::vector<T>& host) {
    if (!host.empty()) CUDA_OK(cudaMemcpy(base_ + shift_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
    CUDA_OK(cudaDeviceSynchronize());  // the copy may still be on its way, and the streams of the tests do not wait for it
  }
  std::vector<T> read() {
    std::vector<T> host(count_);
    CUDA_OK(cudaDeviceSynchronize());
    if (count_ > 0) CUDA_OK(cudaMemcpy(host.data(), base_ + shift_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  T* base_ = nullptr;
  size_t count_;
  size_t shift_;
};

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

struct Random {
  uint32_t state;

  uint32_t operator()() { return state = mix(state + 0x9E3779B9u); }
  uint32_t below(uint32_t n) { return (*this)() % n; }
  float normal() {  // roughly
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>((*this)() >> 8) * 0x1p-24f - 0.5f;
    return sum;
  }
};

enum class IdMix { kUniform, kHot, kPadding, kOneRow };

// Ids of a call: spread out, mostly a few rows, mostly padding, or one row only. All but kOneRow have some outside [0, rows).
inline std::vector<int64_t> random_ids(Random& random, int64_t count, int64_t rows, IdMix mix_of) {
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (auto& id : ids) {
    const auto any = static_cast<int64_t>((static_cast<uint64_t>(random()) << 32 | random()) % static_cast<uint64_t>(rows));
    id = any;
    const uint32_t dice = random.below(16);
    if (mix_of == IdMix::kHot && dice < 12) id = any % (rows < 3 ? rows : 3);
    if (mix_of == IdMix::kPadding && dice < 14) id = rows;
    if (mix_of == IdMix::kOneRow) id = rows - 1;
    if (mix_of != IdMix::kOneRow && random.below(50) == 0) id = dice < 8 ? rows + dice : -1 - static_cast<int64_t>(dice);
  }
  return ids;
}

// `count` finite values of `type` as raw bytes, over a wide range of magnitudes.
inline std::vector<uint8_t> random_floats(Random& random, size_t count, FloatType type) {
  std::vector<uint8_t> raw(count * (type == FloatType::kF32 ? 4 : 2));
  for (size_t i = 0; i < count; ++i) {
    if (type == FloatType::kF32) {
      const float x = std::ldexp(random.normal(), random.below(8) == 0 ? -static_cast<int>(random.below(140)) : 0);
      std::memcpy(raw.data() + 4 * i, &x, 4);
    } else {
      const uint32_t exponent_bits = type == FloatType::kF16 ? 5 : 8;
      const uint32_t mantissa_bits = 15 - exponent_bits;
      const uint32_t exponent = random.below(8) == 0 ? 0 : (1u << (exponent_bits - 1)) - 1 - random.below(6);  // subnormal, or up to 1
      const uint32_t value = (random.below(2) << 15) | (exponent << mantissa_bits) | random.below(1u << mantissa_bits);
      const auto half = static_cast<uint16_t>(value);
      std::memcpy(raw.data() + 2 * i, &half, 2);
    }
  }
  return raw;
}

// Host copy of a table and its state.
struct TableData {
  int64_t rows;
  int64_t dim;
  std::vector<uint8_t> bits;
  std::vector<float> scale;
  std::vector<uint8_t> counter;
  std::vector<float> ema;
  std::vector<int32_t> record;
  std::vector<int32_t> count;
  std::vector<float> squares;
  int planes = 1;

  int64_t width() const { return (dim + 7) / 8; }
  Table table() { return {bits.data(), scale.data(), rows, dim, planes}; }
  State state() {
    const auto or_null = [](auto& list) { return list.empty() ? nullptr : list.data(); };
    return {or_null(counter), or_null(ema), or_null(record), or_null(count), or_null(squares)};
  }
};

// Rows 0, 5, 10, ... have a scale of 0, some others one that is negative or not finite.
inline TableData random_table(Random& random, int64_t rows, int64_t dim, const Rule& rule, bool train_scale, int planes = 1) {
  TableData t{rows, dim, {}, {}, {}, {}, {}, {}, {}, planes};
  const auto cells = static_cast<size_t>(rows * planes * t.width());
  const auto n = static_cast<size_t>(rows);
  t.bits.resize(cells);
  for (size_t i = 0; i < cells; ++i) {
    t.bits[i] = static_cast<uint8_t>(random());
    if (dim % 8 != 0 && i % static_cast<size_t>(t.width()) == static_cast<size_t>(t.width() - 1)) t.bits[i] &= (1 << (dim % 8)) - 1;
  }
  t.scale.resize(n);
  for (size_t r = 0; r < n; ++r)
    t.scale[r] = r % 5 == 0 ? 0.0f : r % 7 == 3 ? -0.25f : r % 11 == 4 ? NAN : 0.01f + std::fabs(random.normal());
  if (rule.kind == RuleKind::kCounter) t.counter.assign(static_cast<size_t>(rows * t.width() * (rule.bits - planes)), 0);
  if (rule.kind == RuleKind::kBop) t.ema.assign(static_cast<size_t>(rows * dim), 0.0f);
  if (train_scale) {
    t.record.assign(4 * n, 0);
  } else {
    if (rule.kind == RuleKind::kBop || rule.anneal_q8 > 0) t.count.assign(n, 0);
    if (rule.norm == static_cast<int32_t>(Norm::kAdagrad)) t.squares.assign(n, 0.0f);
  }
  return t;
}

inline bool same_tables(const TableData& a, const TableData& b) {
  return same(a.bits, b.bits) && same(a.scale, b.scale) && same(a.counter, b.counter) && same(a.ema, b.ema) && same(a.record, b.record) &&
         same(a.count, b.count) && same(a.squares, b.squares);
}

// The same table on the device.
struct DeviceTable {
  explicit DeviceTable(const TableData& t)
      : host(t), bits(t.bits), scale(t.scale), counter(t.counter), ema(t.ema), record(t.record), count(t.count), squares(t.squares) {}

  Table table() { return {bits.get(), scale.get(), host.rows, host.dim, host.planes}; }
  State state() { return {counter.get(), ema.get(), record.get(), count.get(), squares.get()}; }
  TableData read() {
    return {host.rows,  host.dim,      bits.read(),  scale.read(),   counter.read(),
            ema.read(), record.read(), count.read(), squares.read(), host.planes};
  }

  TableData host;
  Device<uint8_t> bits;
  Device<float> scale;
  Device<uint8_t> counter;
  Device<float> ema;
  Device<int32_t> record;
  Device<int32_t> count;
  Device<float> squares;
};

// Workspace and launch of one operation on either back end.
class HostLaunch {
 public:
  HostLaunch(Op op, int64_t count, int64_t rows, int64_t dim) : memory_(cpu().workspace_bytes(op, nullptr, count, rows, dim) / 8 + 1) {
    launch.workspace = memory_.data();
    launch.workspace_bytes = memory_.size() * 8;
  }
  Launch launch;

 private:
  std::vector<int64_t> memory_;
};

class DeviceLaunch {
 public:
  // The workspace starts out as garbage: nothing may rely on zeros.
  DeviceLaunch(Op op, int64_t count, int64_t rows, int64_t dim, cudaStream_t stream)
      : memory_(cuda()->workspace_bytes(op, nullptr, count, rows, dim), 0xa5) {
    launch.stream = stream;
    launch.workspace = memory_.get();
    launch.workspace_bytes = cuda()->workspace_bytes(op, nullptr, count, rows, dim);
  }
  Launch launch;

 private:
  Device<uint8_t> memory_;
};

constexpr FloatType kTypes[] = {FloatType::kF32, FloatType::kF16, FloatType::kBF16};
constexpr IdMix kMixes[] = {IdMix::kUniform, IdMix::kHot, IdMix::kPadding, IdMix::kOneRow};

inline size_t element_bytes(FloatType type) { return type == FloatType::kF32 ? 4 : 2; }

// A launch without workspace.
inline Launch on(cudaStream_t stream) {
  Launch launch;
  launch.stream = stream;
  return launch;
}

// Every rule the library has, the counter in every width and by both norms.
inline std::vector<Rule> rules() {
  std::vector<Rule> list;
  for (int bits = 1; bits <= 8; ++bits) {
    Rule rule;
    rule.bits = bits;
    rule.eta = 0.4f * static_cast<float>(bits);
    rule.dead_zone_q8 = 64 * (bits % 3);
    rule.anneal_q8 = 640 * (bits % 2);
    rule.center = bits % 4 < 2;
    rule.norm = bits / 2 % 2;
    list.push_back(rule);
  }
  Rule bop;
  bop.kind = RuleKind::kBop;
  bop.gamma = 0.05f;
  bop.tau = 0.02f;
  list.push_back(bop);
  list.push_back({RuleKind::kSign});
  return list;
}

// One step's input, on both sides.
struct Step {
  Step(Random& random, int64_t n, int64_t rows, int64_t dim, FloatType t, IdMix mix_of, uint32_t number)
      : ids(random_ids(random, n, rows, mix_of)),
        dy(random_floats(random, static_cast<size_t>(n * dim), t)),
        type(t),
        context{{12345, 6}, {number, 0}, {0, 0}, 1.0f, 0.01f} {
    if (n > 3 && t == FloatType::kF32) {  // a row that must be skipped
      const float infinity = INFINITY;
      std::memcpy(dy.data() + 4 * (2 * dim), &infinity, 4);
    }
  }
  int64_t count() const { return static_cast<int64_t>(ids.size()); }

  std::vector<int64_t> ids;
  std::vector<uint8_t> dy;
  FloatType type;
  StepContext context;
};

}  // namespace dualbin
