// The functions of dualbin._native: what PyTorch, the tests and the shared Python code call. docs/design.md lists them.
#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "bindings/array_arg.h"
#include "bindings/executors.h"
#include "bindings/module.h"
#include "core/arrays.h"
#include "core/checks.h"

namespace py = pybind11;

namespace dualbin::bindings {

namespace {

void raise(const Status& status) {
  if (status.ok()) return;
  switch (status.code) {
    case Code::kInvalidArgument:
      throw py::value_error(status.message);
    case Code::kOutOfRange:
      throw py::index_error(status.message);
    case Code::kWrongType:
      throw py::type_error(status.message);
    default:
      throw std::runtime_error(std::string("dualbin: ") + status.message);
  }
}

const Backend& backend_of(int device) {
  const Backend* backend = device < 0 ? &cpu() : cuda();
  if (backend == nullptr) throw py::value_error("this dualbin was built without CUDA (DUALBIN_CUDA=OFF or no nvcc): it has no CUDA code");
  return *backend;
}

// The arrays of one call, all on one device, and how it runs there: on the CPU on `threads` threads, on CUDA on the current stream of the
// framework that the first array comes from.
class Call {
 public:
  explicit Call(int threads) : threads_(threads) {}

  // An array that the call reads or writes; None only where it is `optional`.
  const Array& read(const char* name, py::handle object) { return add(name, object, Access::kRead); }
  const Array& write(const char* name, py::handle object) { return add(name, object, Access::kWrite); }
  Array read_optional(const char* name, py::handle object) { return object.is_none() ? Array{} : read(name, object); }
  Array write_optional(const char* name, py::handle object) { return object.is_none() ? Array{} : write(name, object); }

  // Memory for the operation to work in: uint8 of any shape, as large as workspace_bytes says.
  void workspace(py::handle object) {
    const Array& memory = write("workspace", object);
    if (memory.type != ElementType::kU8) throw py::type_error(std::string("workspace must be uint8, got ") + type_name(memory.type));
    const size_t skip = (kWorkspaceAlignment - reinterpret_cast<uintptr_t>(memory.data) % kWorkspaceAlignment) % kWorkspaceAlignment;
    const auto size = static_cast<size_t>(memory.size);
    workspace_ = static_cast<char*>(memory.data) + skip;
    workspace_bytes_ = memory.data == nullptr || size < skip ? 0 : size - skip;
  }

  // body(backend, launch) without the interpreter lock; a failed status becomes an exception.
  template <typename Body>
  void run(Body&& body) const {
    const Backend& backend = backend_of(device());
    const OpenMpExecutor openmp(threads_);
    const DeviceGuard guard(device());
    Launch launch;
    if (device() < 0) {
      launch.executor = openmp.get();
    } else {
      launch.stream = arrays_[0].stream();
      launch.errors = error_block(device());
    }
    launch.workspace = workspace_bytes_ == 0 ? nullptr : workspace_;
    launch.workspace_bytes = workspace_bytes_;
    Status status;
    {
      const py::gil_scoped_release release;
      status = body(backend, launch);
    }
    raise(status);
  }

 private:
  static constexpr size_t kMostArrays = 16;

  int device() const { return arrays_[0].device(); }

  const Array& add(const char* name, py::handle object, Access access) {
    if (count_ == kMostArrays) throw std::logic_error("dualbin: a call has more arrays than there is room for");
    ArrayArg& added = arrays_[count_] = ArrayArg(name, object, access);
    const auto place = [](int device) { return device < 0 ? std::string("the CPU") : "cuda:" + std::to_string(device); };
    if (added.device() != device()) {
      throw py::value_error(std::string(name) + " must be on the device of " + arrays_[0].array().name + ", " + place(device()) + ", got " +
                            place(added.device()));
    }
    ++count_;
    return added.array();
  }

  std::array<ArrayArg, kMostArrays> arrays_;
  size_t count_ = 0;
  int threads_;
  char* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
};

// ---- names
// -------------------------------------------------------------------------------------------------------------------------------

template <size_t N>
int code_of(const char* name, const std::string& value, const char* const (&allowed)[N]) {
  std::string list;
  for (size_t i = 0; i < N; ++i) {
    if (value == allowed[i]) return static_cast<int>(i);
    list += std::string(i == 0 ? "'" : ", '") + allowed[i] + "'";
  }
  throw py::value_error(std::string(name) + " must be one of " + list + ", got '" + value + "'");
}

constexpr const char* kOps[] = {"reduce_rows", "segment_sum", "update"};
constexpr const char* kModes[] = {"sum", "mean", "majority"};

// ---- functions
// ---------------------------------------------------------------------------------------------------------------------------

void pack(py::handle w, py::handle bits, py::handle scale, int threads) {
  Call call(threads);
  PackCall core;
  const Array& rows = call.read("w", w);
  const Array& packed = call.write("bits", bits);
  raise(read_pack(rows, packed, call.write_optional("scale", scale), &core));
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.pack(launch, core.w, core.rows, core.dim, core.bits, core.scale);
  });
}

void unpack(py::handle bits, int64_t dim, py::handle out, int threads) {
  Call call(threads);
  UnpackCall core;
  const Array& packed = call.read("bits", bits);
  raise(read_unpack(packed, dim, call.write("out", out), &core));
  call.run([&](const Backend& backend, const Launch& launch) { return backend.unpack(launch, core.bits, core.rows, core.dim, core.out); });
}

void lookup(py::handle bits, py::handle scale, int64_t dim, py::handle ids, py::handle out, int threads) {
  Call call(threads);
  LookupCall core;
  const Array& packed = call.read("bits", bits);
  const Array& scales = call.read("scale", scale);
  const Array& rows = call.read("ids", ids);
  raise(read_lookup(packed, scales, dim, rows, call.write("out", out), &core));
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.lookup(launch, core.table, core.ids, BadIds::kReport, core.out, core.type);
  });
}

void lookup_bag(py::handle bits, py::handle scale, int64_t dim, py::handle ids, py::handle offsets, py::handle weights,
                const std::string& mode, py::handle out, int64_t padding_idx, int threads) {
  Call call(threads);
  BagCall core;
  const Array& packed = call.read("bits", bits);
  const Array& scales = call.read("scale", scale);
  const Array& rows = call.read("ids", ids);
  const Array& cuts = call.read("offsets", offsets);
  const Array factors = call.read_optional("weights", weights);
  raise(read_lookup_bag(packed, scales, dim, rows, cuts, factors, static_cast<BagMode>(code_of("mode", mode, kModes)), padding_idx,
                        call.write("out", out), &core));
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.lookup_bag(launch, core.table, core.bags, BadIds::kReport, core.out, core.type);
  });
}

void bag_counts(py::handle scale, py::handle ids, py::handle offsets, py::handle out, int64_t padding_idx, int threads) {
  Call call(threads);
  BagCountsCall core;
  const Array& scales = call.read("scale", scale);
  const Array& rows = call.read("ids", ids);
  const Array& cuts = call.read("offsets", offsets);
  raise(read_bag_counts(scales, rows, cuts, padding_idx, call.write("out", out), &core));
  call.run(
      [&](const Backend& backend, const Launch& launch) { return backend.bag_counts(launch, core.scale, core.rows, core.bags, core.out); });
}

void bag_gradient(py::handle ids, py::handle offsets, py::handle dy, const std::string& mode, py::handle out, py::handle counts,
                  py::handle weights, int64_t padding_idx, int threads) {
  Call call(threads);
  BagGradientCall core;
  const Array& rows = call.read("ids", ids);
  const Array& cuts = call.read("offsets", offsets);
  const Array& gradient = call.read("dy", dy);
  const Array divisors = call.read_optional("counts", counts);
  const Array factors = call.read_optional("weights", weights);
  raise(read_bag_gradient(rows, cuts, gradient, static_cast<BagMode>(code_of("mode", mode, kModes)), divisors, factors, padding_idx,
                          call.write("out", out), &core));
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.bag_gradient(launch, core.bags, core.dy, core.dim, core.counts, core.out);
  });
}

void bag_weight_gradient(py::handle bits, py::handle scale, py::handle ids, py::handle offsets, py::handle dy, py::handle out,
                         int64_t padding_idx, int threads) {
  Call call(threads);
  BagWeightGradientCall core;
  const Array& packed = call.read("bits", bits);
  const Array& scales = call.read("scale", scale);
  const Array& rows = call.read("ids", ids);
  const Array& cuts = call.read("offsets", offsets);
  const Array& gradient = call.read("dy", dy);
  raise(read_bag_weight_gradient(packed, scales, rows, cuts, gradient, padding_idx, call.write("out", out), &core));
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.bag_weight_gradient(launch, core.table, core.bags, core.dy, core.out);
  });
}

void average(py::handle bits_a, py::handle scale_a, py::handle bits_b, py::handle scale_b, int64_t dim, py::handle context, py::handle bits,
             py::handle scale, int threads) {
  Call call(threads);
  AverageCall core;
  const Array& packed_a = call.read("bits_a", bits_a);
  const Array& scales_a = call.read("scale_a", scale_a);
  const Array& packed_b = call.read("bits_b", bits_b);
  const Array& scales_b = call.read("scale_b", scale_b);
  const Array& step = call.read("context", context);
  const Array& packed = call.write("bits", bits);
  raise(read_average(packed_a, scales_a, packed_b, scales_b, dim, step, packed, call.write("scale", scale), &core));
  call.run([&](const Backend& backend, const Launch& launch) { return backend.average(launch, core.a, core.b, core.context, core.out); });
}

void reduce_rows(py::handle ids, py::handle dy, int64_t rows, py::handle out_ids, py::handle out_rows, py::handle out_count,
                 py::handle workspace, int threads) {
  Call call(threads);
  ReduceCall core;
  const Array& where = call.read("ids", ids);
  const Array& gradient = call.read("dy", dy);
  const Array& found = call.write("out_ids", out_ids);
  const Array& sums = call.write("out_rows", out_rows);
  raise(read_reduce_rows(where, gradient, rows, found, sums, call.write("out_count", out_count), &core));
  call.workspace(workspace);
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.reduce_rows(launch, core.ids, core.dy, core.rows, core.dim, core.out);
  });
}

void segment_sum(py::handle slots, py::handle dy, py::handle out, py::handle workspace, int threads) {
  Call call(threads);
  SegmentCall core;
  const Array& where = call.read("slots", slots);
  const Array& gradient = call.read("dy", dy);
  raise(read_segment_sum(where, gradient, call.write("out", out), &core));
  call.workspace(workspace);
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.segment_sum(launch, core.slots, core.dy, core.segments, core.dim, core.out);
  });
}

void xor_rows(py::handle bits, py::handle ids, py::handle mask, int threads) {
  Call call(threads);
  XorCall core;
  const Array& packed = call.write("bits", bits);
  const Array& rows = call.read("ids", ids);
  raise(read_xor_rows(packed, rows, call.read("mask", mask), &core));
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.xor_rows(launch, core.bits, core.rows, core.width, core.ids, core.mask);
  });
}

// An update whose arguments have been checked; it keeps its arrays alive.
class Update {
 public:
  Update(py::object bits, py::object scale, int64_t dim, py::dict state, const Rule& rule, py::object context, py::object ids,
         py::object dy, py::object workspace, bool strict, py::object mask, py::object new_scale, py::object stats, int threads)
      : call_(threads), strict_(strict) {
    UpdateArrays arrays;
    arrays.bits = call_.write("bits", bits);
    arrays.scale = call_.write("scale", scale);
    size_t found = 0;
    Array* array = arrays.state;
#define DUALBIN_TAKE(name, type, per_row)                                             \
  if (PyObject* value = PyDict_GetItemString(state.ptr(), #name); value != nullptr) { \
    *array = call_.write(#name, value);                                               \
    ++found;                                                                          \
  }                                                                                   \
  ++array;
    DUALBIN_STATE_ARRAYS(DUALBIN_TAKE)
#undef DUALBIN_TAKE
    if (found != state.size()) throw py::value_error("state must hold arrays of an optimizer state only, got " + keys(state));
    arrays.context = call_.read("context", context);
    arrays.ids = call_.read("ids", ids);
    arrays.dy = call_.read("dy", dy);
    arrays.mask = call_.write_optional("mask", mask);
    arrays.new_scale = call_.write_optional("new_scale", new_scale);
    arrays.stats = call_.write_optional("stats", stats);
    raise(read_update(arrays, rule, dim, &core_));
    call_.workspace(workspace);
    held_ = py::make_tuple(bits, scale, py::dict(state), context, ids, dy, workspace, mask, new_scale, stats);
  }

  // A count that the update advances where it runs. Its array stays alive with the update.
  void count_in(py::object step) {
    raise(read_step(call_.write("step", step), &step_));
    held_ = py::make_tuple(held_, step);
  }

  void run() const {
    call_.run([&](const Backend& backend, const Launch& launch) -> Status {
      DUALBIN_TRY(backend.update(launch, core_.table, core_.state, core_.rule, core_.context, core_.ids, core_.dy, strict_, core_.out));
      return step_ == nullptr ? Status{} : backend.advance(launch, step_);
    });
  }

 private:
  static std::string keys(const py::dict& state) {
    std::string list;
    for (const auto& entry : state) list += (list.empty() ? "" : ", ") + std::string(py::str(entry.first));
    return list;
  }

  Call call_;
  UpdateCall core_;
  bool strict_;
  int64_t* step_ = nullptr;
  py::tuple held_;
};

// A dict that takes what another one holds. With keys of type str nothing here runs Python code, so no signal handler can come between.
struct Commit {
  Commit(py::handle target, py::handle contents) : target_(target.ptr()), contents_(contents.ptr()) {
    for (PyObject* dict : {target_, contents_}) {
      if (!PyDict_CheckExact(dict)) throw py::type_error("steps must commit dicts, got " + std::string(Py_TYPE(dict)->tp_name));
      PyObject* key;
      Py_ssize_t at = 0;
      while (PyDict_Next(dict, &at, &key, nullptr)) {
        if (!PyUnicode_CheckExact(key)) throw py::type_error("steps must commit dicts with names as keys");
      }
    }
    before_ = py::reinterpret_steal<py::dict>(PyDict_Copy(target_));
    if (!before_) throw py::error_already_set();
  }

  void run() const {
    if (PyDict_Update(target_, contents_) != 0) throw py::error_already_set();
    PyObject* key;
    Py_ssize_t at = 0;
    while (PyDict_Next(before_.ptr(), &at, &key, nullptr)) {
      if (PyDict_Contains(contents_, key) == 0 && PyDict_DelItem(target_, key) != 0) throw py::error_already_set();
    }
  }

 private:
  PyObject* target_;
  PyObject* contents_;
  py::dict before_;  // keeps the old values: were the last one to go here, its finaliser would run Python code
};

// Runs the updates one after the other, each with its commits. An update that fails, and all after it, commits nothing.
void apply_steps(const py::list& steps) {
  std::vector<std::pair<const Update*, std::vector<Commit>>> checked;
  for (const py::handle step : steps) {
    const auto parts = py::cast<py::tuple>(step);
    if (parts.size() != 2) throw py::value_error("a step must be (update, [(dict, contents), ...]), got a tuple of another length");
    const auto* update = parts[0].is_none() ? nullptr : py::cast<const Update*>(parts[0]);
    std::vector<Commit> commits;
    for (const py::handle pair : py::cast<py::list>(parts[1])) {
      const auto commit = py::cast<py::tuple>(pair);
      if (commit.size() != 2) throw py::value_error("a commit must be (dict, contents), got a tuple of another length");
      commits.emplace_back(commit[0], commit[1]);
    }
    checked.emplace_back(update, std::move(commits));
  }
  for (const auto& [update, commits] : checked) {
    if (update != nullptr) update->run();
    for (const Commit& commit : commits) commit.run();
  }
}

void define_update(py::module_& m) {
  py::class_<Rule> rule(m, "Rule", "Hyper-parameters of an update rule, as dualbin.rules.Rule.native() gives them.");
  rule.def(py::init([](int kind, const py::kwargs& numbers) {
             Rule made;
             made.kind = static_cast<RuleKind>(kind);
             size_t found = 0;
#define DUALBIN_TAKE(name, type, value)         \
  if (numbers.contains(#name)) {                \
    made.name = py::cast<type>(numbers[#name]); \
    ++found;                                    \
  }
             DUALBIN_RULE_NUMBERS(DUALBIN_TAKE)
#undef DUALBIN_TAKE
             if (found != numbers.size()) throw py::type_error("Rule got a number that no rule has: " + std::string(py::str(numbers)));
             return made;
           }),
           py::arg("kind"));
  const auto arguments = [&](auto&& define) {
    define(py::arg("bits"), py::arg("scale"), py::arg("dim"), py::arg("state"), py::arg("rule"), py::arg("context"), py::arg("ids"),
           py::arg("dy"), py::arg("workspace"), py::arg("strict") = false, py::arg("mask") = py::none(), py::arg("new_scale") = py::none(),
           py::arg("stats") = py::none(), py::arg("threads") = 1);
  };
  using Object = py::object;
  py::class_<Update> update(m, "Update", "An update of the rows in ids by the gradient dy, checked and ready to run.");
  arguments([&](auto... names) {
    update.def(
        py::init<Object, Object, int64_t, py::dict, const Rule&, Object, Object, Object, Object, bool, Object, Object, Object, int>(),
        names...);
    m.def(
        "update",
        [](Object bits, Object scale, int64_t dim, py::dict state, const Rule& rule, Object context, Object ids, Object dy,
           Object workspace, bool strict, Object mask, Object new_scale, Object stats, int threads) {
          Update(bits, scale, dim, state, rule, context, ids, dy, workspace, strict, mask, new_scale, stats, threads).run();
        },
        "One update of the rows in ids by the gradient dy.", names...);
  });
  update.def("count_in", &Update::count_in, py::arg("step"), "Let the update advance a step count, int64 [], where it runs.");
  update.def("run", &Update::run, "Makes the update.");
  m.def("apply_steps", &apply_steps, py::arg("steps"),
        "Runs steps (update or None, [(dict, contents), ...]): each update, and then each dict takes the contents of the other. No Python "
        "code, and so no signal handler, runs between the first update and the last commit.");
}

size_t workspace_bytes(const std::string& op, int device, int threads, int64_t count, int64_t rows, int64_t dim) {
  const int code = code_of("op", op, kOps);
  if (device < -1) throw py::value_error("device must be -1 for the CPU or a CUDA ordinal, got " + std::to_string(device));
  if (count < 0) throw py::value_error("count must not be negative, got " + std::to_string(count));
  raise(check_rows("rows", rows));
  raise(check_dim(dim));
  const Backend& backend = backend_of(device);
  const OpenMpExecutor openmp(threads);
  const DeviceGuard guard(device);
  return backend.workspace_bytes(static_cast<Op>(code), device < 0 ? openmp.get() : nullptr, count, rows, dim) + kWorkspaceAlignment;
}

}  // namespace

void define_functions(py::module_& m) {
  using py::arg;
  m.def("pack", &pack, arg("w"), arg("bits"), arg("scale") = py::none(), arg("threads") = 1,
        "Packed signs of w [V, D], and where scale is given the mean magnitude of every row.");
  m.def("unpack", &unpack, arg("bits"), arg("dim"), arg("out"), arg("threads") = 1, "int8 +1/-1 of packed rows.");
  m.def("lookup", &lookup, arg("bits"), arg("scale"), arg("dim"), arg("ids"), arg("out"), arg("threads") = 1,
        "Rows of a table: out[n] = scale[ids[n]] * (+1 or -1).");
  m.def("lookup_bag", &lookup_bag, arg("bits"), arg("scale"), arg("dim"), arg("ids"), arg("offsets"), arg("weights"), arg("mode"),
        arg("out"), arg("padding_idx") = -1, arg("threads") = 1, "Sum, mean or majority of the rows of every bag.");
  m.def("bag_counts", &bag_counts, arg("scale"), arg("ids"), arg("offsets"), arg("out"), arg("padding_idx") = -1, arg("threads") = 1,
        "The number of rows of every bag that are in the table and not padding.");
  m.def("bag_gradient", &bag_gradient, arg("ids"), arg("offsets"), arg("dy"), arg("mode"), arg("out"), arg("counts") = py::none(),
        arg("weights") = py::none(), arg("padding_idx") = -1, arg("threads") = 1, "What every row of every bag gets of dy.");
  m.def("bag_weight_gradient", &bag_weight_gradient, arg("bits"), arg("scale"), arg("ids"), arg("offsets"), arg("dy"), arg("out"),
        arg("padding_idx") = -1, arg("threads") = 1, "What every weight of every bag gets of dy.");
  m.def("average", &average, arg("bits_a"), arg("scale_a"), arg("bits_b"), arg("scale_b"), arg("dim"), arg("context"), arg("bits"),
        arg("scale"), arg("threads") = 1, "The average of two tables in expectation; the weight of b is the lr of the context.");
  m.def("reduce_rows", &reduce_rows, arg("ids"), arg("dy"), arg("rows"), arg("out_ids"), arg("out_rows"), arg("out_count"),
        arg("workspace"), arg("threads") = 1, "Sums of dy by row: ascending distinct ids, float32 rows, their number.");
  m.def("segment_sum", &segment_sum, arg("slots"), arg("dy"), arg("out"), arg("workspace"), arg("threads") = 1,
        "Sums of dy by slot, at the slots' own places.");
  m.def("xor_rows", &xor_rows, arg("bits"), arg("ids"), arg("mask"), arg("threads") = 1, "bits[ids[n]] ^= mask[n] for distinct ids.");
  define_update(m);
  m.def("workspace_bytes", &workspace_bytes, arg("op"), arg("device"), arg("threads"), arg("count"), arg("rows"), arg("dim"),
        "Bytes of workspace that an operation wants, room to align it included. device: -1 for the CPU, or a CUDA ordinal.");
}

}  // namespace dualbin::bindings
