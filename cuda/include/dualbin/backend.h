// The operations on packed tables. One declaration, two back ends: cpu() and cuda(). docs/design.md defines the results to the last bit.
//
// No call allocates, synchronises with a device, or keeps state; CUDA work is ordered by Launch::stream. Arguments are checked before
// anything is written, and a call that returns an error has changed nothing (on CUDA: unless the error came from the device itself).
#pragma once

#include "dualbin/status.h"
#include "dualbin/types.h"

namespace dualbin {

// Operations that need a workspace.
enum class Op : int { kReduceRows = 0, kSegmentSum = 1, kUpdate = 2 };

// Occurrences of a row that are summed in one go; the sums of the blocks are added afterwards.
constexpr int64_t kSumBlock = 64;

// Sorted distinct rows of a gradient. `ids` has the type of the input ids; slots past `count` hold id `rows` and zeros.
struct RowsOut {
  void* ids = nullptr;
  IdType ids_type = IdType::kI64;
  float* rows = nullptr;
  void* count = nullptr;  // number of distinct rows, also when that exceeds the capacity
  IdType count_type = IdType::kI64;
  int64_t capacity = 0;
};

// Where an update puts its flips. All null: they are applied to the table at once.
struct UpdateOut {
  uint8_t* mask = nullptr;     // uint8 [ids.count, width]: flips of row ids[n], at the row's first occurrence; zero elsewhere
  float* new_scale = nullptr;  // float32 [ids.count]: the row's scale after the update
  Stats* stats = nullptr;      // may be null
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Bytes of workspace that `op` wants for `count` ids, a table of `rows` rows (or that many segments) and `dim` columns.
  virtual size_t workspace_bytes(Op op, const Executor* executor, int64_t count, int64_t rows, int64_t dim) const = 0;

  // w [rows, dim] -> bits, and scale where it is not null. NaN (with a scale or more than one plane: infinity too) is an error on the CPU
  // and undefined on CUDA.
  virtual Status pack(const Launch& launch, Floats w, int64_t rows, int64_t dim, int planes, uint8_t* bits, float* scale) const = 0;

  // Bits of a table -> int8 +1/-1 [rows, dim]; of more than one plane int16 s * (2m + 1).
  virtual Status unpack(const Launch& launch, const Table& table, void* out) const = 0;

  // The top `fewer` planes of a table into bits [rows, fewer * width], and where `scale` is not null the scales of least squared error.
  virtual Status fewer_planes(const Launch& launch, const Table& table, int fewer, uint8_t* bits, float* scale) const = 0;

  // out [ids.count, dim] of type `type`.
  virtual Status lookup(const Launch& launch, const Table& table, Ids ids, BadIds bad_ids, void* out, FloatType type) const = 0;

  // out [bags.count(), dim] of type `type`.
  virtual Status lookup_bag(const Launch& launch, const Table& table, const Bags& bags, BadIds bad_ids, void* out,
                            FloatType type) const = 0;

  // scale [rows] -> out [bags.count()]: the rows of every bag that are in the table and not padding.
  virtual Status bag_counts(const Launch& launch, const float* scale, int64_t rows, const Bags& bags, int32_t* out) const = 0;

  // The gradient of lookup_bag: dy [bags.count(), dim] -> rows [bags.ids.count, dim] of the type of dy. `counts` [bags.count()] with the
  // mode mean, else null.
  virtual Status bag_gradient(const Launch& launch, const Bags& bags, Floats dy, int64_t dim, const int32_t* counts, void* rows) const = 0;

  // The gradient of lookup_bag with respect to its weights: dy [bags.count(), table.dim] -> out [bags.ids.count].
  virtual Status bag_weight_gradient(const Launch& launch, const Table& table, const Bags& bags, Floats dy, float* out) const = 0;

  // dy [ids.count, dim] -> sums by row. Ids outside [0, rows) are dropped.
  virtual Status reduce_rows(const Launch& launch, Ids ids, Floats dy, int64_t rows, int64_t dim, const RowsOut& out) const = 0;

  // dy [slots.count, dim] -> out [segments, dim], the same sums at the slots' own places. Slots outside [0, segments) are dropped.
  virtual Status segment_sum(const Launch& launch, Ids slots, Floats dy, int64_t segments, int64_t dim, float* out) const = 0;

  // One update of the rows in `ids` by the gradient dy [ids.count, dim]. `context` is on the device. With `strict`, an id outside
  // [0, rows) is an error on the CPU; otherwise such ids are padding.
  virtual Status update(const Launch& launch, const Table& table, const State& state, const Rule& rule, const StepContext* context, Ids ids,
                        Floats dy, bool strict, const UpdateOut& out) const = 0;

  // ++*step, a count that lives on the device.
  virtual Status advance(const Launch& launch, int64_t* step) const = 0;

  // bits[ids[n]] ^= mask[n]. Ids must be distinct; those outside [0, rows) are padding.
  virtual Status xor_rows(const Launch& launch, uint8_t* bits, int64_t rows, int64_t width, Ids ids, const uint8_t* mask) const = 0;

  // (1 - weight) * a + weight * b in expectation; `out` may be a or b. `context` is on the device: its lr is the weight. One outside [0, 1]
  // is an error on the CPU and gives scales of NaN on CUDA.
  virtual Status average(const Launch& launch, const Table& a, const Table& b, const StepContext* context, const Table& out) const = 0;
};

const Backend& cpu();
const Backend* cuda();  // null when the library was built without CUDA

// Instruction set that the CPU back end uses: the best one that this build and this processor have, until use_simd() chooses another.
const char* simd_level();

// Those that there are to choose from, "portable" first, the best last; null behind them.
const char* simd_level(int index);

// From the next call of cpu() on; null: the best. Results are the same with each.
Status use_simd(const char* name);

}  // namespace dualbin
