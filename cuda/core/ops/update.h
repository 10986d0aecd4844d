// Updates of a table and of the state of its optimizer. Their bindings are their own: the arrays of a state are of a variable number.
#pragma once

#include <algorithm>

#include "core/arguments.h"

namespace dualbin {

inline Status check_rule(const Rule& rule, const State& state, int planes) {
  DUALBIN_TRY(check_code("kind", static_cast<int>(rule.kind), 3, "counter, bop or sign"));
  DUALBIN_REQUIRE(state.record == nullptr || (state.count == nullptr && state.squares == nullptr), Code::kInvalidArgument,
                  "count and squares are in record where there is one");
  DUALBIN_REQUIRE(rule.kind == RuleKind::kCounter || planes == 1, Code::kInvalidArgument, "a table of %d planes needs a counter rule",
                  planes);
#define DUALBIN_LIMIT(name, condition, words)                                             \
  DUALBIN_REQUIRE(rule.kind != RuleKind::kCounter || (condition), Code::kInvalidArgument, \
                  #name " must be " words ", got %d for a table of %d planes", static_cast<int>(rule.name), planes);
  DUALBIN_COUNTER_LIMITS(DUALBIN_LIMIT)
#undef DUALBIN_LIMIT
#define DUALBIN_NEED(name, condition, words) \
  DUALBIN_REQUIRE(state.name != nullptr || !(condition), Code::kInvalidArgument, "%s needs " #name, words);
  DUALBIN_STATE_NEEDS(DUALBIN_NEED)
#undef DUALBIN_NEED
  return {};
}

template <typename T>
Status read_state(const Array& array, PerRow per_row, const Table& table, const Rule& rule, T** out) {
  if (!array.present()) return {};
  switch (per_row) {
    case PerRow::kOne:
      return read(array, {table.rows}, out);
    case PerRow::kColumns:
      return read(array, {table.rows, table.dim}, out);
    case PerRow::kPlanes:
      return read(array, {table.rows, rule.kind == RuleKind::kCounter ? std::max(0, rule.bits - table.planes) * table.width() : 0}, out);
    case PerRow::kRecord:
      return read(array, {table.rows, 4}, out);
  }
  return {};
}

// Where an update puts its flips. All null: they are applied to the table at once.
struct UpdateOut {
  uint8_t* mask = nullptr;     // uint8 [ids.count, width]: flips of row ids[n], at the row's first occurrence; zero elsewhere
  float* new_scale = nullptr;  // float32 [ids.count]: the row's scale after the update, there, too
  Stats* stats = nullptr;      // may be null
};

// One update of the rows in `ids` by the gradient dy [ids.count, dim]. `context` is on the device, or, with `context_on_host`, in memory
// that is read before the call returns. With `strict`, an id outside [0, rows) is an error on the CPU; otherwise such ids are padding.
struct UpdateCall {
  Table table;
  State state;
  Rule rule;
  const StepContext* context = nullptr;
  Ids ids;
  Floats dy;
  bool strict = false;
  UpdateOut out;
  bool context_on_host = false;

  Status check() const {
    DUALBIN_TRY(check_table(table));
    DUALBIN_TRY(check_rule(rule, state, table.planes));
    DUALBIN_TRY(check_data("context", context));
    DUALBIN_TRY(check_ids("ids", ids));
    DUALBIN_TRY(check_floats("dy", dy.data, dy.type, ids.count));
    DUALBIN_REQUIRE((out.mask == nullptr) == (out.new_scale == nullptr) || ids.count == 0, Code::kInvalidArgument,
                    "mask and new_scale are given together or not at all");
    return {};
  }

  struct Given {
    Array bits;                 // uint8 [V, planes * B], B = ceil(D/8)
    Array scale;                // float32 [V, 1]
    Array state[kStateArrays];  // as DUALBIN_STATE_ARRAYS says; absent where the rule needs none
    Array context;              // StepContext: 8 words of 32 bits or 4 of 64
    Array ids;                  // int32 or int64 [N]
    Array dy;                   // float32, float16 or bfloat16 [N, D]
    Array mask;                 // uint8 [N, planes * B], or absent
    Array new_scale;            // float32 [N, 1], or absent
    Array stats;                // Stats: 8 words of 32 bits or 4 of 64; or absent
    int64_t dim = 0;
    Rule rule;
    bool strict = false;
  };

  Work work() const { return {Op::kUpdate, ids.count, table.rows, table.dim}; }

  Status read(const Given& given) {
    rule = given.rule;
    strict = given.strict;
    DUALBIN_TRY(read_table(given.bits, given.scale, given.dim, &table));
    const Array* array = given.state;
#define DUALBIN_READ(name, type, per_row) DUALBIN_TRY(read_state(*array++, per_row, table, rule, &state.name));
    DUALBIN_STATE_ARRAYS(DUALBIN_READ)
#undef DUALBIN_READ
    DUALBIN_TRY(read_words(given.context, &context));
    DUALBIN_TRY(read_id_list(given.ids, &ids));
    DUALBIN_TRY(read_gradient(given.dy, ids.count, table.dim, &dy));
    DUALBIN_REQUIRE(given.mask.present() == given.new_scale.present(), Code::kInvalidArgument,
                    "mask and new_scale are given together or not at all");
    if (given.mask.present()) {
      DUALBIN_TRY(dualbin::read(given.mask, {ids.count, table.row_bytes()}, &out.mask));
      DUALBIN_TRY(read_column(given.new_scale, ids.count, &out.new_scale));
    }
    if (given.stats.present()) DUALBIN_TRY(read_words(given.stats, &out.stats));
    return check();
  }
};

// ++*step, a count that lives on the device.
struct AdvanceCall {
  int64_t* step = nullptr;

  Status check() const { return check_data("step", step); }

  struct Given {
    Array step;  // int64 []
  };

  Status read(const Given& given) { return dualbin::read(given.step, {}, &step); }
};

}  // namespace dualbin
