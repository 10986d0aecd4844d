// The functions of dualbin._native, which PyTorch, the tests and the shared Python code call: made of what the operations say of their
// arguments (core/arguments.h). docs/design.md lists them.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <type_traits>

#include "bindings/call.h"
#include "bindings/module.h"

namespace py = pybind11;

namespace dualbin::bindings {

namespace {

template <size_t N>
int code_of(const char* name, const std::string& value, const char* const (&allowed)[N]) {
  std::string list;
  for (size_t i = 0; i < N; ++i) {
    if (value == allowed[i]) return static_cast<int>(i);
    list += std::string(i == 0 ? "'" : ", '") + allowed[i] + "'";
  }
  throw py::value_error(std::string(name) + " must be one of " + list + ", got '" + value + "'");
}

// ---- arguments: their type in Python, their name there, and how a value is taken -------------------------------------------------------

template <typename Argument>
struct InPython;

template <typename Given, Use use, bool optional>
struct InPython<ArrayArgument<Given, use, optional>> {
  using Argument = ArrayArgument<Given, use, optional>;
  using Type = py::handle;

  static auto named(const Argument& argument) {
    if constexpr (optional) {
      return py::arg(argument.name) = py::none();
    } else {
      return py::arg(argument.name);
    }
  }

  static void take(const Argument& argument, py::handle value, Call* call, Given* given) {
    if (optional && value.is_none()) return;
    given->*argument.member = use == Use::kIn ? call->read(argument.name, value) : call->write(argument.name, value);
  }
};

template <typename Given, typename T, Numbers kind>
struct InPython<NumberArgument<Given, T, kind>> {
  using Argument = NumberArgument<Given, T, kind>;
  using Type = std::conditional_t<std::is_same_v<T, BagMode>, std::string, T>;

  static auto named(const Argument& argument) {
    if constexpr (kind == Numbers::kDefault) {
      return py::arg(argument.name) = Given{}.*argument.member;
    } else {
      return py::arg(argument.name);
    }
  }

  static void take(const Argument& argument, const Type& value, Call*, Given* given) {
    if constexpr (std::is_same_v<T, BagMode>) {
      given->*argument.member = static_cast<BagMode>(code_of(argument.name, value, kModes));
    } else {
      given->*argument.member = value;
    }
  }
};

// Those that Python has, as a tuple of one; the others, as an empty one.
template <typename Argument>
constexpr auto for_python(const Argument& argument) {
  return std::make_tuple(argument);
}
template <typename Given, typename T>
constexpr auto for_python(const NumberArgument<Given, T, Numbers::kAttribute>&) {
  return std::make_tuple();
}

// ---- functions --------------------------------------------------------------------------------------------------------------------------

// The function `name`, which makes the call of `run` that its arguments describe. A workspace, where one is needed, comes after them.
template <typename Operation, typename... Arguments>
void define(py::module_& m, const char* name, Status (Backend::*run)(const Launch&, const Operation&) const,
            const std::tuple<Arguments...>& arguments) {
  const auto body = [arguments, run](py::handle workspace, int threads, const typename InPython<Arguments>::Type&... values) {
    Call call(threads);
    typename Operation::Given given;
    std::apply([&](const auto&... argument) { (InPython<Arguments>::take(argument, values, &call, &given), ...); }, arguments);
    Operation core;
    raise(core.read(given));
    if constexpr (has_work<Operation>) call.workspace(workspace);
    call.run([&](const Backend& backend, const Launch& launch) { return (backend.*run)(launch, core); });
  };
  const py::arg_v threads_argument = py::arg("threads") = 1;
  std::apply(
      [&](const auto&... argument) {
        if constexpr (has_work<Operation>) {
          m.def(
              name,
              [body](const typename InPython<Arguments>::Type&... values, py::handle workspace, int threads) {
                body(workspace, threads, values...);
              },
              InPython<Arguments>::named(argument)..., py::arg("workspace"), threads_argument, Operation::kDoc);
        } else {
          m.def(
              name, [body](const typename InPython<Arguments>::Type&... values, int threads) { body({}, threads, values...); },
              InPython<Arguments>::named(argument)..., threads_argument, Operation::kDoc);
        }
      },
      arguments);
}

template <typename Operation>
constexpr auto python_arguments() {
  return std::apply([](const auto&... argument) { return std::tuple_cat(for_python(argument)...); }, Operation::arguments());
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

py::tuple workspace_bound(const std::string& op, int64_t dim) {
  const auto code = static_cast<Op>(code_of("op", op, kOps));
  raise(check_dim(dim));
  backend_of(0);  // raises without CUDA
  const WorkspaceBound bound = cuda_workspace_bound(code, dim);
  return py::make_tuple(bound.fixed, bound.per_id);
}

}  // namespace

void define_functions(py::module_& m) {
  using py::arg;
#define DUALBIN_DEFINE(name, Call) define<Call>(m, #name, &Backend::name, python_arguments<Call>());
  DUALBIN_PYTHON_OPERATIONS(DUALBIN_DEFINE)
  DUALBIN_SHARED_OPERATIONS(DUALBIN_DEFINE)
#undef DUALBIN_DEFINE
  define_updates(m);
  m.def("workspace_bytes", &workspace_bytes, arg("op"), arg("device"), arg("threads"), arg("count"), arg("rows"), arg("dim"),
        "Bytes of workspace that an operation wants, room to align it included. device: -1 for the CPU, or a CUDA ordinal.");
  m.def("workspace_bound", &workspace_bound, arg("op"), arg("dim"),
        "(fixed, per_id): bytes of workspace that are enough for an operation on every GPU, as fixed + per_id for every id.");
}

}  // namespace dualbin::bindings
