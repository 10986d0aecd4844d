// Plain data that crosses the interface. Pointers belong to the caller and live on the device of the back end that is called.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dualbin {

enum class FloatType : int { kF32 = 0, kF16 = 1, kBF16 = 2 };
enum class IdType : int { kI32 = 0, kI64 = 1 };
enum class BagMode : int { kSum = 0, kMean = 1, kMajority = 2 };
enum class RuleKind : int { kCounter = 0, kBop = 1, kSign = 2 };

// What the gradient of a row is divided by: its root mean square in this update, or the root of the sum of its mean squares so far.
enum class Norm : int { kRms = 0, kAdagrad = 1 };

constexpr int kMaxPlanes = 8;

// What a lookup does with an id outside [0, rows). kReport: an error on the CPU, a row of NaN and an entry in the error block on CUDA.
enum class BadIds : int { kReport = 0, kZeros = 1 };

// Operations that need a workspace.
enum class Op : int { kReduceRows = 0, kSegmentSum = 1, kUpdate = 2 };

// Occurrences of a row that are summed in one go; the sums of the blocks are added afterwards.
constexpr int64_t kSumBlock = 64;

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
  int64_t padding_idx = -1;  // an id that is a padding row whatever its scale; -1: none

  constexpr int64_t count() const { return offsets.count - 1; }
};

struct Floats {
  const void* data = nullptr;
  FloatType type = FloatType::kF32;
};

// bits: uint8 [rows, planes * ceil(dim/8)], the sign plane of a row and then its magnitude planes, most significant first; scale: float32
// [rows].
struct Table {
  uint8_t* bits = nullptr;
  float* scale = nullptr;
  int64_t rows = 0;
  int64_t dim = 0;
  int planes = 1;  // at most kMaxPlanes

  constexpr int64_t width() const { return (dim + 7) / 8; }  // bytes of a plane of a row
  constexpr int64_t row_bytes() const { return planes * width(); }
};

// What a row of a state array is: one number (the array is [rows]), a number for every column, the bit-planes of its counters, or a record
// of four numbers.
enum class PerRow : int { kOne = 0, kColumns = 1, kPlanes = 2, kRecord = 3 };

// The arrays of the optimizer state of a table: name, type of an element, form of a row. docs/design.md, "Data", says what they hold. A
// trained scale has a record of the bits of count, squares and the two moments, in one cache line; else count and squares are arrays.
#define DUALBIN_STATE_ARRAYS(X)        \
  X(counter, uint8_t, PerRow::kPlanes) \
  X(ema, float, PerRow::kColumns)      \
  X(record, int32_t, PerRow::kRecord)  \
  X(count, int32_t, PerRow::kOne)      \
  X(squares, float, PerRow::kOne)

// The numbers of a row that a record holds.
#define DUALBIN_RECORD(X) X(count, int32_t) X(squares, float) X(scale_m, float) X(scale_v, float)

struct Record {
#define DUALBIN_MEMBER(name, type) type name;
  DUALBIN_RECORD(DUALBIN_MEMBER)
#undef DUALBIN_MEMBER
};
static_assert(sizeof(Record) == 16, "the frontends have records as four 32-bit words");

// Null where a rule needs none.
struct State {
#define DUALBIN_MEMBER(name, type, per_row) type* name = nullptr;
  DUALBIN_STATE_ARRAYS(DUALBIN_MEMBER)
#undef DUALBIN_MEMBER
};

constexpr int kStateArrays = 0
#define DUALBIN_COUNT(name, type, per_row) +1
    DUALBIN_STATE_ARRAYS(DUALBIN_COUNT)
#undef DUALBIN_COUNT
    ;

// The numbers of a rule beside its kind: name, type, value where a rule does not have it.
//   bits          counter: sign included, 1 to 8
//   eta           counter: levels per unit of evidence at lr 1
//   dead_zone_q8  counter: dead zone in 1/256 of the row's rms
//   anneal_q8     counter: updates of a row, in 1/256, from which on its dead zone grows; 0: it does not grow
//   center        counter: evidence is taken less its mean over the row
//   norm          counter: a Norm
//   gamma         bop: rate of the moving average at lr 1
//   tau           bop: threshold
#define DUALBIN_RULE_NUMBERS(X) \
  X(bits, int32_t, 1)           \
  X(eta, float, 0)              \
  X(dead_zone_q8, int32_t, 0)   \
  X(anneal_q8, int32_t, 0)      \
  X(center, bool, false)        \
  X(norm, int32_t, 0)           \
  X(gamma, float, 0)            \
  X(tau, float, 0)

struct Rule {
  RuleKind kind = RuleKind::kCounter;
#define DUALBIN_MEMBER(name, type, value) type name = value;
  DUALBIN_RULE_NUMBERS(DUALBIN_MEMBER)
#undef DUALBIN_MEMBER
};

// Of the numbers of a counter rule, what they may be for a table of so many `planes`: name, condition, words.
#define DUALBIN_COUNTER_LIMITS(X)                                                                                                 \
  X(bits, rule.bits >= planes && rule.bits <= 8, "between the planes of the table and 8")                                         \
  X(dead_zone_q8, rule.dead_zone_q8 >= 0 && rule.dead_zone_q8 <= 65536, "0 to 65536")                                             \
  X(anneal_q8, rule.anneal_q8 == 0 || rule.anneal_q8 >= 4, "0 or at least 4")                                                     \
  X(norm, rule.norm == static_cast<int>(Norm::kRms) || rule.norm == static_cast<int>(Norm::kAdagrad), "0 for rms, 1 for adagrad") \
  X(center, !rule.center || planes == 1, "0 for a table of more than one plane")

// Which rules need a state array that is not there (`state` has a record or arrays of its own): name, condition, words.
#define DUALBIN_STATE_NEEDS(X)                                                                                               \
  X(counter, rule.kind == RuleKind::kCounter && rule.bits > planes, "a counter rule of more bits than the table has planes") \
  X(ema, rule.kind == RuleKind::kBop, "the rule Bop")                                                                        \
  X(count, state.record == nullptr && rule.kind == RuleKind::kBop, "the rule Bop")                                           \
  X(count, state.record == nullptr && rule.anneal_q8 != 0, "a dead zone that grows")                                         \
  X(squares, state.record == nullptr && rule.norm == static_cast<int>(Norm::kAdagrad), "the norm adagrad")

// What changes from step to step. It lives on the device so that a captured CUDA graph can be replayed with new values. A table that is a
// range of the rows of a larger one says by `first_row` where it starts there: random numbers belong to the rows of the whole table, so
// that sharding does not change them.
struct StepContext {
  uint32_t seed[2];       // low word first, as all pairs
  uint32_t step[2];       // finished updates of the table
  uint32_t first_row[2];  // of the shard; 0 for a whole table
  float lr;
  float scale_lr;  // 0: the scale is frozen
};
static_assert(sizeof(StepContext) == 32, "the frontends build this struct as eight 32-bit words");

// What an update counts.
//   flips    bits flipped
//   rows     rows updated
//   skipped  rows left alone because their gradient or scale was not finite
//   clipped  counters at their maximum after the update
#define DUALBIN_STATS(X) X(flips) X(rows) X(skipped) X(clipped)

struct Stats {
#define DUALBIN_MEMBER(name) uint64_t name;
  DUALBIN_STATS(DUALBIN_MEMBER)
#undef DUALBIN_MEMBER
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

constexpr size_t kWorkspaceAlignment = 256;

// Where a call runs and what it may use.
struct Launch {
  const Executor* executor = nullptr;  // CPU
  void* stream = nullptr;              // CUDA: a cudaStream_t
  void* workspace = nullptr;           // on the device, aligned to kWorkspaceAlignment
  size_t workspace_bytes = 0;
  ErrorBlock* errors = nullptr;  // CUDA: on the device, may be null
};

}  // namespace dualbin
