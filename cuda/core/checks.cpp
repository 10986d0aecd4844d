#include "core/checks.h"

#include <initializer_list>

namespace dualbin {

namespace {

Status check_code(const char* name, int code, int count, const char* allowed) {
  DUALBIN_REQUIRE(code >= 0 && code < count, Code::kInvalidArgument, "%s must be %s, got code %d", name, allowed, code);
  return {};
}

Status check_lists(const Bags& bags) {
  DUALBIN_TRY(check_ids("ids", bags.ids));
  DUALBIN_REQUIRE(bags.offsets.count >= 1, Code::kInvalidArgument, "offsets must have one element more than there are bags, got %" PRId64,
                  bags.offsets.count);
  DUALBIN_TRY(check_ids("offsets", bags.offsets));
  DUALBIN_TRY(check_code("mode", static_cast<int>(bags.mode), 3, "sum, mean or majority"));
  DUALBIN_REQUIRE(bags.weights == nullptr || bags.mode == BagMode::kSum, Code::kInvalidArgument, "weights need the mode sum");
  DUALBIN_REQUIRE(bags.padding_idx >= -1, Code::kInvalidArgument, "padding_idx must be an id, or -1 for none, got %" PRId64,
                  bags.padding_idx);
  return {};
}

}  // namespace

Status check_data(const char* name, const void* data, int64_t count) {
  DUALBIN_REQUIRE(count == 0 || data != nullptr, Code::kInvalidArgument, "%s must not be null", name);
  return {};
}

Status check_rows(const char* name, int64_t rows) {
  DUALBIN_REQUIRE(rows >= 1, Code::kInvalidArgument, "%s must be at least 1, got %" PRId64, name, rows);
  return {};
}

Status check_dim(int64_t dim) {
  DUALBIN_REQUIRE(dim >= 1 && dim <= kMaxDim, Code::kInvalidArgument, "dim must be between 1 and 2^28, got %" PRId64, dim);
  return {};
}

Status check_planes(int planes) {
  DUALBIN_REQUIRE(planes >= 1 && planes <= kMaxPlanes, Code::kInvalidArgument, "planes must be 1 to %d, got %d", kMaxPlanes, planes);
  return {};
}

Status check_table(const Table& table) {
  DUALBIN_TRY(check_rows("rows", table.rows));
  DUALBIN_TRY(check_dim(table.dim));
  DUALBIN_TRY(check_planes(table.planes));
  DUALBIN_TRY(check_data("bits", table.bits));
  return check_data("scale", table.scale);
}

Status check_ids(const char* name, const Ids& ids) {
  DUALBIN_REQUIRE(ids.count >= 0, Code::kInvalidArgument, "%s must not be a negative number of ids, got %" PRId64, name, ids.count);
  DUALBIN_TRY(check_code(name, static_cast<int>(ids.type), 2, "int32 or int64"));
  return check_data(name, ids.data, ids.count);
}

Status check_floats(const char* name, const void* data, FloatType type, int64_t count) {
  DUALBIN_TRY(check_code(name, static_cast<int>(type), 3, "float32, float16 or bfloat16"));
  return check_data(name, data, count);
}

Status check_pack(Floats w, int64_t rows, int64_t dim, int planes, const uint8_t* bits) {
  DUALBIN_TRY(check_rows("rows", rows));
  DUALBIN_TRY(check_dim(dim));
  DUALBIN_TRY(check_planes(planes));
  DUALBIN_TRY(check_floats("w", w.data, w.type, 1));
  return check_data("bits", bits);
}

Status check_unpack(const Table& table, const void* out) {
  DUALBIN_TRY(check_rows("rows", table.rows));
  DUALBIN_TRY(check_dim(table.dim));
  DUALBIN_TRY(check_planes(table.planes));
  DUALBIN_TRY(check_data("bits", table.bits));
  return check_data("out", out);
}

Status check_fewer_planes(const Table& table, int fewer, const uint8_t* bits) {
  DUALBIN_TRY(check_table(table));
  DUALBIN_REQUIRE(fewer >= 1 && fewer <= table.planes, Code::kInvalidArgument, "fewer must be 1 to the planes of the table, %d, got %d",
                  table.planes, fewer);
  return check_data("out_bits", bits);
}

Status check_lookup(const Table& table, const Ids& ids, const void* out, FloatType type) {
  DUALBIN_TRY(check_table(table));
  DUALBIN_TRY(check_ids("ids", ids));
  return check_floats("out", out, type, ids.count);
}

Status check_bags(const Table& table, const Bags& bags, const void* out, FloatType type) {
  DUALBIN_TRY(check_table(table));
  DUALBIN_TRY(check_lists(bags));
  DUALBIN_REQUIRE(bags.mode != BagMode::kMajority || table.planes == 1, Code::kInvalidArgument,
                  "mode must be sum or mean for a table of %d planes: majority votes by one plane", table.planes);
  return check_floats("out", out, type, bags.count());
}

Status check_bag_counts(const float* scale, int64_t rows, const Bags& bags, const int32_t* out) {
  DUALBIN_TRY(check_rows("rows", rows));
  DUALBIN_TRY(check_data("scale", scale));
  DUALBIN_TRY(check_lists(bags));
  return check_data("out", out, bags.count());
}

Status check_bag_gradient(const Bags& bags, const Floats& dy, int64_t dim, const int32_t* counts, const void* out) {
  DUALBIN_TRY(check_dim(dim));
  DUALBIN_TRY(check_lists(bags));
  DUALBIN_TRY(check_floats("dy", dy.data, dy.type, bags.count()));
  DUALBIN_REQUIRE(bags.count() == 0 || (counts != nullptr) == (bags.mode == BagMode::kMean), Code::kInvalidArgument,
                  "counts are given with the mode mean, and with no other");
  return check_data("out", out, bags.ids.count);
}

Status check_bag_weight_gradient(const Table& table, const Bags& bags, const Floats& dy, const float* out) {
  DUALBIN_TRY(check_table(table));
  DUALBIN_TRY(check_lists(bags));
  DUALBIN_TRY(check_floats("dy", dy.data, dy.type, bags.count()));
  return check_data("out", out, bags.ids.count);
}

Status check_offsets(const Bags& bags) {
  int64_t before = 0;
  for (int64_t g = 0; g <= bags.count(); ++g) {
    const int64_t offset = id_at(bags.offsets, g);
    DUALBIN_REQUIRE(offset >= before && offset <= bags.ids.count, Code::kInvalidArgument,
                    "offsets must ascend from 0 to at most the %" PRId64 " ids, got %" PRId64 " at position %" PRId64, bags.ids.count,
                    offset, g);
    before = offset;
  }
  return {};
}

Status check_reduce_rows(const Ids& ids, const Floats& dy, int64_t rows, int64_t dim, const RowsOut& out) {
  DUALBIN_TRY(check_rows("rows", rows));
  DUALBIN_TRY(check_dim(dim));
  DUALBIN_TRY(check_ids("ids", ids));
  DUALBIN_TRY(check_floats("dy", dy.data, dy.type, ids.count));
  DUALBIN_REQUIRE(out.capacity >= 0, Code::kInvalidArgument, "capacity must not be negative, got %" PRId64, out.capacity);
  DUALBIN_TRY(check_data("out_ids", out.ids, out.capacity));
  DUALBIN_TRY(check_data("out_rows", out.rows, out.capacity));
  return check_data("out_count", out.count);
}

Status check_segment_sum(const Ids& slots, const Floats& dy, int64_t segments, int64_t dim, const float* out) {
  DUALBIN_REQUIRE(segments >= 0, Code::kInvalidArgument, "segments must not be negative, got %" PRId64, segments);
  DUALBIN_TRY(check_dim(dim));
  DUALBIN_TRY(check_ids("slots", slots));
  DUALBIN_TRY(check_floats("dy", dy.data, dy.type, slots.count));
  return check_data("out", out, segments);
}

Status check_rule(const Rule& rule, const State& state, int planes) {
  DUALBIN_TRY(check_code("kind", static_cast<int>(rule.kind), 3, "counter, bop or sign"));
  DUALBIN_REQUIRE(state.record == nullptr || (state.count == nullptr && state.squares == nullptr), Code::kInvalidArgument,
                  "count and squares are in record where there is one");
  const bool counts = state.record != nullptr || state.count != nullptr;
  if (rule.kind == RuleKind::kCounter) {
    DUALBIN_REQUIRE(rule.bits >= planes && rule.bits <= 8, Code::kInvalidArgument,
                    "rule bits must be between the planes of the table, %d, and 8, got %d", planes, rule.bits);
    DUALBIN_REQUIRE(rule.bits == planes || state.counter != nullptr, Code::kInvalidArgument,
                    "a counter rule of %d bits needs counter for a table of %d planes", rule.bits, planes);
    DUALBIN_REQUIRE(rule.dead_zone_q8 >= 0 && rule.dead_zone_q8 <= 65536, Code::kInvalidArgument, "dead_zone_q8 must be 0 to 65536, got %d",
                    rule.dead_zone_q8);
    DUALBIN_REQUIRE(rule.anneal_q8 == 0 || rule.anneal_q8 >= 4, Code::kInvalidArgument, "anneal_q8 must be 0 or at least 4, got %d",
                    rule.anneal_q8);
    DUALBIN_REQUIRE(rule.anneal_q8 == 0 || counts, Code::kInvalidArgument, "a dead zone that grows needs count");
    DUALBIN_TRY(check_code("norm", rule.norm, 2, "rms or adagrad"));
    DUALBIN_REQUIRE(rule.norm == static_cast<int>(Norm::kRms) || state.record != nullptr || state.squares != nullptr,
                    Code::kInvalidArgument, "the norm adagrad needs squares");
    DUALBIN_REQUIRE(!rule.center || planes == 1, Code::kInvalidArgument, "center must be false for a table of %d planes", planes);
    return {};
  }
  DUALBIN_REQUIRE(planes == 1, Code::kInvalidArgument, "a table of %d planes needs a counter rule", planes);
  DUALBIN_REQUIRE(rule.kind != RuleKind::kBop || (state.ema != nullptr && counts), Code::kInvalidArgument,
                  "the Bop rule needs ema and count");
  return {};
}

Status check_update(const Table& table, const State& state, const Rule& rule, const StepContext* context, const Ids& ids, const Floats& dy,
                    const UpdateOut& out) {
  DUALBIN_TRY(check_table(table));
  DUALBIN_TRY(check_rule(rule, state, table.planes));
  DUALBIN_TRY(check_data("context", context));
  DUALBIN_TRY(check_ids("ids", ids));
  DUALBIN_TRY(check_floats("dy", dy.data, dy.type, ids.count));
  DUALBIN_REQUIRE((out.mask == nullptr) == (out.new_scale == nullptr) || ids.count == 0, Code::kInvalidArgument,
                  "mask and new_scale are given together or not at all");
  return {};
}

Status check_xor_rows(const uint8_t* bits, int64_t rows, int64_t width, const Ids& ids, const uint8_t* mask) {
  DUALBIN_TRY(check_rows("rows", rows));
  DUALBIN_REQUIRE(width >= 1 && width <= kMaxPlanes * (kMaxDim / 8), Code::kInvalidArgument,
                  "width must be between 1 and 2^28, got %" PRId64, width);
  DUALBIN_TRY(check_data("bits", bits));
  DUALBIN_TRY(check_ids("ids", ids));
  return check_data("mask", mask, ids.count);
}

Status check_average(const Table& a, const Table& b, const StepContext* context, const Table& out) {
  for (const Table* table : {&a, &b, &out}) {
    DUALBIN_TRY(check_table(*table));
    DUALBIN_REQUIRE(table->rows == a.rows && table->dim == a.dim && table->planes == a.planes, Code::kInvalidArgument,
                    "the tables must have one shape, got %" PRId64 " x %" PRId64 " of %d planes and %" PRId64 " x %" PRId64 " of %d planes",
                    a.rows, a.dim, a.planes, table->rows, table->dim, table->planes);
  }
  return check_data("context", context);
}

Status check_workspace(const Launch& launch, size_t needed) {
  DUALBIN_REQUIRE(needed == 0 || (launch.workspace != nullptr && launch.workspace_bytes >= needed), Code::kInvalidArgument,
                  "the workspace has %zu bytes, %zu are needed", launch.workspace == nullptr ? size_t{0} : launch.workspace_bytes, needed);
  return {};
}

}  // namespace dualbin
