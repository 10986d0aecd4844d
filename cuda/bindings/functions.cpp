// The functions of dualbin._native: what PyTorch, the tests and the shared Python code call. docs/design.md lists them.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/call.h"
#include "bindings/module.h"
#include "core/checks.h"

namespace py = pybind11;

namespace dualbin::bindings {

namespace {

// ---- names ------------------------------------------------------------------------------------------------------------------------------

template <size_t N>
int code_of(const char* name, const std::string& value, const char* const (&allowed)[N]) {
  std::string list;
  for (size_t i = 0; i < N; ++i) {
    if (value == allowed[i]) return static_cast<int>(i);
    list += std::string(i == 0 ? "'" : ", '") + allowed[i] + "'";
  }
  throw py::value_error(std::string(name) + " must be one of " + list + ", got '" + value + "'");
}

// ---- functions --------------------------------------------------------------------------------------------------------------------------

void pack(py::handle w, py::handle bits, py::handle scale, int threads) {
  Call call(threads);
  PackCall core;
  const Array& rows = call.read("w", w);
  const Array& packed = call.write("bits", bits);
  raise(read_pack(rows, packed, call.write_optional("scale", scale), &core));
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.pack(launch, core.w, core.rows, core.dim, core.planes, core.bits, core.scale);
  });
}

void unpack(py::handle bits, int64_t dim, py::handle out, int threads) {
  Call call(threads);
  UnpackCall core;
  const Array& packed = call.read("bits", bits);
  raise(read_unpack(packed, dim, call.write("out", out), &core));
  call.run([&](const Backend& backend, const Launch& launch) { return backend.unpack(launch, core.table, core.out); });
}

void fewer_planes(py::handle bits, py::handle scale, int64_t dim, py::handle out_bits, py::handle out_scale, int threads) {
  Call call(threads);
  FewerCall core;
  const Array& packed = call.read("bits", bits);
  const Array& scales = call.read("scale", scale);
  const Array& kept = call.write("out_bits", out_bits);
  raise(read_fewer_planes(packed, scales, dim, kept, call.write_optional("out_scale", out_scale), &core));
  call.run([&](const Backend& backend, const Launch& launch) {
    return backend.fewer_planes(launch, core.table, core.fewer, core.bits, core.scale);
  });
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
        "Packed planes of w [V, D], as many as bits has room for, and where scale is given the scale of every row.");
  m.def("unpack", &unpack, arg("bits"), arg("dim"), arg("out"), arg("threads") = 1,
        "int8 +1/-1 of packed rows; int16 s * (2m + 1) of rows of more than one plane.");
  m.def("fewer_planes", &fewer_planes, arg("bits"), arg("scale"), arg("dim"), arg("out_bits"), arg("out_scale") = py::none(),
        arg("threads") = 1, "The top planes of a table, and where out_scale is given their scales of least squared error.");
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
  define_updates(m);
  m.def("workspace_bytes", &workspace_bytes, arg("op"), arg("device"), arg("threads"), arg("count"), arg("rows"), arg("dim"),
        "Bytes of workspace that an operation wants, room to align it included. device: -1 for the CPU, or a CUDA ordinal.");
}

}  // namespace dualbin::bindings
