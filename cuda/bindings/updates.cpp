// Updates as objects that are checked and ready, and the call that makes the updates of an optimizer's step and commits them.
#include <pybind11/pybind11.h>

#include <cmath>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bindings/call.h"
#include "bindings/module.h"

namespace py = pybind11;

namespace dualbin::bindings {

namespace {

// An update whose arguments have been checked; it keeps its arrays alive.
class Update {
 public:
  Update(py::object bits, py::object scale, int64_t dim, py::dict state, const Rule& rule, py::object context, py::object ids,
         py::object dy, py::object workspace, bool strict, py::object mask, py::object new_scale, py::object stats, int threads)
      : call_(threads) {
    UpdateCall::Given given;
    given.dim = dim;
    given.rule = rule;
    given.strict = strict;
    given.bits = call_.write("bits", bits);
    given.scale = call_.write("scale", scale);
    size_t found = 0;
    Array* array = given.state;
#define DUALBIN_TAKE(name, type, per_row)                                             \
  if (PyObject* value = PyDict_GetItemString(state.ptr(), #name); value != nullptr) { \
    *array = call_.write(#name, value);                                               \
    ++found;                                                                          \
  }                                                                                   \
  ++array;
    DUALBIN_STATE_ARRAYS(DUALBIN_TAKE)
#undef DUALBIN_TAKE
    if (found != state.size()) throw py::value_error("state must hold arrays of an optimizer state only, got " + keys(state));
    from_host_ = PyTuple_Check(context.ptr()) != 0;
    given.context = from_host_ ? take(context) : call_.read("context", context);
    given.ids = call_.read("ids", ids);
    given.dy = call_.read("dy", dy);
    given.mask = call_.write_optional("mask", mask);
    given.new_scale = call_.write_optional("new_scale", new_scale);
    given.stats = call_.write_optional("stats", stats);
    raise(core_.read(given));
    call_.workspace(workspace);
    held_ = py::make_tuple(bits, scale, py::dict(state), context, ids, dy, workspace, mask, new_scale, stats);
  }

  // A count that the update advances where it runs. Its array stays alive with the update.
  void count_in(py::object step) {
    raise(advance_.read({call_.write("step", step)}));
    held_ = py::make_tuple(held_, step);
  }

  void run() const {
    UpdateCall core = core_;
    if (from_host_) {  // this object may have moved since it was made
      core.context = &context_;
      core.context_on_host = true;
    }
    call_.run([&](const Backend& backend, const Launch& launch) -> Status {
      if (from_host_ && !call_.on_cpu()) DUALBIN_TRY(check_not_captured(launch));
      DUALBIN_TRY(backend.update(launch, core));
      return advance_.step == nullptr ? Status{} : backend.advance(launch, advance_);
    });
  }

 private:
  // The step context that the host knows, a tuple of its numbers. On CUDA it goes with the launch.
  Array take(const py::object& numbers) {
    const auto tuple = py::reinterpret_borrow<py::tuple>(numbers);
    if (tuple.size() != 5)
      throw py::value_error("context must be (seed, step, first_row, lr, scale_lr), got " + std::string(py::str(tuple)));
    uint32_t* const words[] = {context_.seed, context_.step, context_.first_row};
    for (size_t i = 0; i < 3; ++i) {
      const uint64_t number = whole(tuple[i]);
      words[i][0] = static_cast<uint32_t>(number);
      words[i][1] = static_cast<uint32_t>(number >> 32);
    }
    context_.lr = rate("lr", tuple[3]);
    context_.scale_lr = rate("scale_lr", tuple[4]);
    static constexpr int64_t kShape[] = {sizeof(StepContext) / sizeof(uint32_t)};
    return {"context", &context_, ElementType::kU32, 1, kShape, kShape[0]};
  }

  static uint64_t whole(py::handle number) {
    const uint64_t value = PyLong_Check(number.ptr()) != 0 ? PyLong_AsUnsignedLongLong(number.ptr()) : 0;
    if (PyLong_Check(number.ptr()) == 0 || PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      throw py::value_error("context must have a seed, a step and a first_row of 0 to 2^64 - 1, got " + std::string(py::str(number)));
    }
    return value;
  }

  static float rate(const char* name, py::handle number) {
    const double value = PyFloat_AsDouble(number.ptr());
    if (PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      throw py::type_error(std::string(name) + " must be a number, got " + std::string(py::str(number)));
    }
    const auto rounded = static_cast<float>(value);
    if (!std::isfinite(rounded)) throw py::value_error(std::string(name) + " must fit a float32, got " + std::string(py::str(number)));
    return rounded;
  }

  static std::string keys(const py::dict& state) {
    std::string list;
    for (const auto& entry : state) list += (list.empty() ? "" : ", ") + std::string(py::str(entry.first));
    return list;
  }

  Call call_;
  UpdateCall core_;
  AdvanceCall advance_;  // without a step: none
  StepContext context_{};
  bool from_host_ = false;
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
  std::set<PyObject*> targets;
  for (const py::handle step : steps) {
    const auto parts = py::cast<py::tuple>(step);
    if (parts.size() != 2) throw py::value_error("a step must be (update, [(dict, contents), ...]), got a tuple of another length");
    const auto* update = parts[0].is_none() ? nullptr : py::cast<const Update*>(parts[0]);
    std::vector<Commit> commits;
    for (const py::handle pair : py::cast<py::list>(parts[1])) {
      const auto commit = py::cast<py::tuple>(pair);
      if (commit.size() != 2) throw py::value_error("a commit must be (dict, contents), got a tuple of another length");
      commits.emplace_back(commit[0], commit[1]);
      if (!targets.insert(commit[0].ptr()).second) throw py::value_error("steps must commit to different dicts, got one twice");
    }
    checked.emplace_back(update, std::move(commits));
  }
  for (const auto& [update, commits] : checked) {
    if (update != nullptr) update->run();
    for (const Commit& commit : commits) commit.run();
  }
}

}  // namespace

void define_updates(py::module_& m) {
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

}  // namespace dualbin::bindings
