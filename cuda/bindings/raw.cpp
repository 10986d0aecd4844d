// Raw-pointer functions of dualbin._native: what PyTorch, the tests and the shared Python code call. docs/design.md lists them.
#include "bindings/raw.h"

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/executors.h"
#include "dualbin/backend.h"

namespace py = pybind11;

namespace dualbin::bindings {

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Where a call runs: `device` -1 is the CPU with `lane` threads, others are CUDA ordinals with `lane` the raw stream.
class Place {
 public:
  Place(int device, uintptr_t lane, uintptr_t workspace = 0, size_t workspace_bytes = 0, uintptr_t errors = 0)
      : openmp_(device < 0 ? static_cast<int>(lane) : 1), guard_(device) {
    launch_.executor = device < 0 ? openmp_.get() : nullptr;
    launch_.stream = device < 0 ? nullptr : pointer<void>(lane);
    launch_.workspace = pointer<void>(workspace);
    launch_.workspace_bytes = workspace_bytes;
    launch_.errors = pointer<ErrorBlock>(errors);
    backend_ = device < 0 ? &cpu() : cuda();
    if (backend_ == nullptr)
      throw py::value_error("this dualbin was built without CUDA (DUALBIN_CUDA=OFF or no nvcc): it has no CUDA code");
  }

  const Backend& operator*() const { return *backend_; }
  const Backend* operator->() const { return backend_; }
  const Launch& launch() const { return launch_; }

 private:
  OpenMpExecutor openmp_;
  DeviceGuard guard_;
  Launch launch_;
  const Backend* backend_;
};

void raise(const Status& status) {
  if (status.ok()) return;
  const std::string message = status.message;
  switch (status.code) {
    case Code::kInvalidArgument:
      throw py::value_error(message);
    case Code::kOutOfRange:
      throw py::index_error(message);
    default:
      throw std::runtime_error("dualbin: " + message);
  }
}

// Runs `body` without the interpreter lock and turns a failed status into a Python exception.
template <typename Body>
void run(Body&& body) {
  Status status;
  {
    const py::gil_scoped_release release;
    status = body();
  }
  raise(status);
}

Ids ids_of(uintptr_t data, int type, int64_t count) { return {pointer<const void>(data), static_cast<IdType>(type), count}; }
Floats floats_of(uintptr_t data, int type) { return {pointer<const void>(data), static_cast<FloatType>(type)}; }

Op op_of(const std::string& name) {
  if (name == "reduce_rows") return Op::kReduceRows;
  if (name == "segment_sum") return Op::kSegmentSum;
  if (name == "update") return Op::kUpdate;
  throw py::value_error("op must be 'reduce_rows', 'segment_sum' or 'update', got '" + name + "'");
}

void lookup(int device, uintptr_t lane, uintptr_t bits, uintptr_t scale, int64_t rows, int64_t dim, uintptr_t ids, int ids_type,
            int64_t count, uintptr_t out, int out_type, uintptr_t errors) {
  const Place place(device, lane, 0, 0, errors);
  const Table table{pointer<uint8_t>(bits), pointer<float>(scale), rows, dim};
  run([&] {
    return place->lookup(place.launch(), table, ids_of(ids, ids_type, count), BadIds::kReport, pointer<void>(out),
                         static_cast<FloatType>(out_type));
  });
}

void lookup_bag(int device, uintptr_t lane, uintptr_t bits, uintptr_t scale, int64_t rows, int64_t dim, uintptr_t ids, int ids_type,
                int64_t count, uintptr_t offsets, int offsets_type, int64_t bags, uintptr_t weights, int mode, uintptr_t out, int out_type,
                uintptr_t errors) {
  const Place place(device, lane, 0, 0, errors);
  const Table table{pointer<uint8_t>(bits), pointer<float>(scale), rows, dim};
  const Bags all{ids_of(ids, ids_type, count), ids_of(offsets, offsets_type, bags + 1), pointer<const float>(weights),
                 static_cast<BagMode>(mode)};
  run([&] { return place->lookup_bag(place.launch(), table, all, BadIds::kReport, pointer<void>(out), static_cast<FloatType>(out_type)); });
}

void update(int device, uintptr_t lane, uintptr_t workspace, size_t workspace_bytes, const Table& table, const State& state,
            const Rule& rule, uintptr_t clock, uintptr_t ids, int ids_type, int64_t count, uintptr_t dy, int dy_type, bool strict,
            uintptr_t mask, uintptr_t new_scale, uintptr_t stats) {
  const Place place(device, lane, workspace, workspace_bytes);
  const UpdateOut out{pointer<uint8_t>(mask), pointer<float>(new_scale), pointer<Stats>(stats)};
  run([&] {
    return place->update(place.launch(), table, state, rule, pointer<const Clock>(clock), ids_of(ids, ids_type, count),
                         floats_of(dy, dy_type), strict, out);
  });
}

void define_structs(py::module_& m) {
  py::class_<Table>(
      m, "Table",
      "Pointers of a table: bits uint8 [V, ceil(D/8)], scale float32 [V]; first_row is the row of the whole table at which a shard starts.")
      .def(py::init([](uintptr_t bits, uintptr_t scale, int64_t rows, int64_t dim, int64_t first_row) {
             return Table{pointer<uint8_t>(bits), pointer<float>(scale), rows, dim, first_row};
           }),
           py::arg("bits"), py::arg("scale"), py::arg("rows"), py::arg("dim"), py::arg("first_row") = 0);
  py::class_<State>(m, "State", "Pointers of a table's optimizer state; 0 where there is none.")
      .def(py::init([](uintptr_t counter, uintptr_t ema, uintptr_t count, uintptr_t scale_m, uintptr_t scale_v) {
             return State{pointer<uint8_t>(counter), pointer<float>(ema), pointer<int32_t>(count), pointer<float>(scale_m),
                          pointer<float>(scale_v)};
           }),
           py::arg("counter") = 0, py::arg("ema") = 0, py::arg("count") = 0, py::arg("scale_m") = 0, py::arg("scale_v") = 0);
  py::class_<Rule>(m, "Rule", "Hyper-parameters of an update rule, as dualbin.rules.Rule.native() gives them.")
      .def(py::init([](int kind, int bits, float eta, int dead_zone_q8, int anneal_q8, bool center, float gamma, float tau) {
             return Rule{static_cast<RuleKind>(kind), bits, eta, dead_zone_q8, anneal_q8, center, gamma, tau};
           }),
           py::arg("kind"), py::arg("bits") = 1, py::arg("eta") = 0.0f, py::arg("dead_zone_q8") = 0, py::arg("anneal_q8") = 0,
           py::arg("center") = false, py::arg("gamma") = 0.0f, py::arg("tau") = 0.0f);
}

}  // namespace

void define_raw(py::module_& m) {
  define_structs(m);
  m.def("lookup", &lookup, "Rows of a table: out[n] = scale[ids[n]] * (+1 or -1).");
  m.def("lookup_bag", &lookup_bag, "Sum, mean or majority of the rows of every bag.");
  m.def("update", &update, "One update of the rows in ids by the gradient dy.");
  m.def(
      "pack",
      [](int device, uintptr_t lane, uintptr_t w, int w_type, int64_t rows, int64_t dim, uintptr_t bits, uintptr_t scale) {
        const Place place(device, lane);
        run([&] { return place->pack(place.launch(), floats_of(w, w_type), rows, dim, pointer<uint8_t>(bits), pointer<float>(scale)); });
      },
      "Packed signs of w [rows, dim], and with scale != 0 the mean magnitude of every row.");
  m.def(
      "unpack",
      [](int device, uintptr_t lane, uintptr_t bits, int64_t rows, int64_t dim, uintptr_t out) {
        const Place place(device, lane);
        run([&] { return place->unpack(place.launch(), pointer<const uint8_t>(bits), rows, dim, pointer<int8_t>(out)); });
      },
      "int8 +1/-1 of packed rows.");
  m.def(
      "reduce_rows",
      [](int device, uintptr_t lane, uintptr_t workspace, size_t workspace_bytes, uintptr_t ids, int ids_type, int64_t count, uintptr_t dy,
         int dy_type, int64_t rows, int64_t dim, int64_t capacity, uintptr_t out_ids, uintptr_t out_rows, uintptr_t out_count) {
        const Place place(device, lane, workspace, workspace_bytes);
        const RowsOut out{pointer<void>(out_ids), IdType::kI64, pointer<float>(out_rows), pointer<void>(out_count), IdType::kI64, capacity};
        run([&] { return place->reduce_rows(place.launch(), ids_of(ids, ids_type, count), floats_of(dy, dy_type), rows, dim, out); });
      },
      "Sums of dy by row: ascending distinct ids, float32 rows, their number.");
  m.def(
      "segment_sum",
      [](int device, uintptr_t lane, uintptr_t workspace, size_t workspace_bytes, uintptr_t slots, int slots_type, int64_t count,
         uintptr_t dy, int dy_type, int64_t segments, int64_t dim, uintptr_t out) {
        const Place place(device, lane, workspace, workspace_bytes);
        run([&] {
          return place->segment_sum(place.launch(), ids_of(slots, slots_type, count), floats_of(dy, dy_type), segments, dim,
                                    pointer<float>(out));
        });
      },
      "Sums of dy by slot, at the slots' own places.");
  m.def(
      "xor_rows",
      [](int device, uintptr_t lane, uintptr_t bits, int64_t rows, int64_t width, uintptr_t ids, int ids_type, int64_t count,
         uintptr_t mask) {
        const Place place(device, lane);
        run([&] {
          return place->xor_rows(place.launch(), pointer<uint8_t>(bits), rows, width, ids_of(ids, ids_type, count),
                                 pointer<const uint8_t>(mask));
        });
      },
      "bits[ids[n]] ^= mask[n] for distinct ids.");
  m.def(
      "workspace_bytes",
      [](const std::string& op, int device, uintptr_t lane, int64_t count, int64_t rows, int64_t dim) {
        const Place place(device, lane);
        return place->workspace_bytes(op_of(op), place.launch().executor, count, rows, dim);
      },
      "Bytes of workspace that an operation wants.");
}

}  // namespace dualbin::bindings
