// Plain data that crosses the interface. Pointers belong to the caller and live on the device of the back end that is called.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dualbin {

enum class FloatType : int { kF32 = 0, kF16 = 1, kBF16 = 2 };
enum class IdType : int { kI32 = 0, kI64 = 1 };
enum class BagMode : int { kSum = 0, kMean = 1, kMajority = 2 };
enum class RuleKind : int { kCounter = 0, kBop = 1, kSign = 2 };

// What a lookup does with an id outside [0, rows). kReport: an error on the CPU, a row of NaN and an entry in the error block on CUDA.
enum class BadIds : int { kReport = 0, kZeros = 1 };

struct Ids {
  const void* data = nullptr;
  IdType type = IdType::kI64;
  int64_t count = 0;
};

// Ids cut into bags: bag g is ids[offsets[g]] to ids[offsets[g + 1] - 1].
struct Bags {
  Ids ids;
  Ids offsets;                     // one more than there are bags
  const float* weights = nullptr;  // a factor for every id, or null; kSum only
  BagMode mode = BagMode::kSum;

  int64_t count() const { return offsets.count - 1; }
};

struct Floats {
  const void* data = nullptr;
  FloatType type = FloatType::kF32;
};

// bits: uint8 [rows, ceil(dim/8)], scale: float32 [rows]. A table that is a range of the rows of a larger one says where it starts there:
// random numbers belong to the rows of the whole table, so that sharding does not change them.
struct Table {
  uint8_t* bits = nullptr;
  float* scale = nullptr;
  int64_t rows = 0;
  int64_t dim = 0;
  int64_t first_row = 0;
  const uint32_t* shard_start = nullptr;  // on the device, two words, low first: added to first_row where only the device knows its shard

  int64_t width() const { return (dim + 7) / 8; }
};

// Optimizer state of a table; null where a rule needs none. Shapes: docs/design.md, "Data".
struct State {
  uint8_t* counter = nullptr;
  float* ema = nullptr;
  int32_t* count = nullptr;
  float* scale_m = nullptr;
  float* scale_v = nullptr;
};

struct Rule {
  RuleKind kind = RuleKind::kCounter;
  int bits = 8;          // counter: sign included, 1 to 8
  float eta = 0;         // counter: levels per unit of evidence at lr 1
  int dead_zone_q8 = 0;  // counter: dead zone in 1/256 of the row's rms
  int anneal_q8 = 0;     // counter: updates of a row, in 1/256, from which on its dead zone grows; 0: it does not grow
  bool center = false;   // counter: evidence is taken less its mean over the row
  float gamma = 0;       // bop: rate of the moving average at lr 1
  float tau = 0;         // bop: threshold
};

// What changes from step to step. It lives on the device so that a captured CUDA graph can be replayed with new values.
struct Clock {
  uint32_t seed[2];  // low word first
  uint32_t step[2];  // finished updates of the table, low word first
  float lr;
  float scale_lr;  // 0: the scale is frozen
};
static_assert(sizeof(Clock) == 24, "the frontends build this struct as six 32-bit words");

struct Stats {
  uint64_t flips;
  uint64_t rows;     // rows updated
  uint64_t skipped;  // rows left alone because their gradient or scale was not finite
  uint64_t clipped;  // counters at their maximum after the update
};

struct ErrorBlock {
  uint64_t count;
  int64_t first;
};

// Runs `task(context, i, worker)` for every i in [0, tasks), on the caller's threads; worker is below `workers` and never shared by two
// running tasks. The core owns no threads.
struct Executor {
  using Task = void (*)(void* context, int64_t index, int worker);
  void (*run)(void* self, int64_t tasks, Task task, void* context) = nullptr;
  void* self = nullptr;
  int workers = 1;
};

// Where a call runs and what it may use.
struct Launch {
  const Executor* executor = nullptr;  // CPU
  void* stream = nullptr;              // CUDA: a cudaStream_t
  void* workspace = nullptr;           // on the device, aligned to 256 bytes
  size_t workspace_bytes = 0;
  ErrorBlock* errors = nullptr;  // CUDA: on the device, may be null
};

}  // namespace dualbin
