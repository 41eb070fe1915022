// The compiled module. Arguments are checked strictly, for what would crash; their meaning is checked in layers.py,
// with friendlier words. This file and the headers that only it includes are all that know Python.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "gil.h"
#include "kernel_table.h"
#include "network.h"
#include "packed.h"
#include "policy.h"
#include "pybind11_inside.h"
#include "system.h"
#include "team.h"
#include "wiring.h"

#if defined(__clang__)
#define RNNKERN_COMPILER "Clang " __clang_version__
#else
#define RNNKERN_COMPILER "GCC " __VERSION__
#endif

namespace rnnkern {
namespace {

constexpr std::string_view kEngines[] = {"none", "pairs", "emulated", "emulated-fp16", "amx", "amx-fp16"};

// Linear's kernels over the rows of x (rows, inputs): forward where there is y, else backward, which adds to dweight
// and dbias; None for what is not there or not wanted. With `rounds` the operands of products are rounded to bfloat16,
// with `engines` products of floats are a matrix engine's; without effect on float64.
void linear(const py::object& x, const py::object& weight, const py::object& bias, const py::object& y,
            const py::object& dy, const py::object& dx, const py::object& dweight, const py::object& dbias, bool rounds,
            bool engines) {
  if (!py::isinstance<py::array>(x) || !py::isinstance<py::array>(weight))
    throw py::type_error("x, weight: expected arrays");
  const auto &of_x = fields_of(x), &of_weight = fields_of(weight);
  if (of_x.nd != 2 || of_weight.nd != 2) throw py::value_error("x, weight: expected two dimensions");
  if (y.is_none() && dy.is_none()) throw py::value_error("y, dy: expected one of them");
  Linear call{};
  call.rows = of_x.dimensions[0], call.inputs = of_weight.dimensions[1], call.outputs = of_weight.dimensions[0];
  // An array without elements may have more rows than there is memory.
  if (call.inputs < 1 || call.outputs < 1) throw py::value_error("weight: expected at least one row and one column");
  const py::dtype dtype = float_dtype(py::reinterpret_borrow<py::array>(x).dtype());
  const auto data_of = [&](const py::object& array, const char* name, const Shape& shape, bool writable = false) {
    return array.is_none() ? nullptr : bytes_of(checked(array, name, dtype, shape, writable));
  };
  const Shape of_inputs{call.rows, call.inputs}, of_outputs{call.rows, call.outputs}, matrix{call.outputs, call.inputs};
  call.x = data_of(x, "x", of_inputs), call.weight = data_of(weight, "weight", matrix);
  call.bias = data_of(bias, "bias", {call.outputs}), call.y = data_of(y, "y", of_outputs, true);
  call.dy = data_of(dy, "dy", of_outputs), call.dx = data_of(dx, "dx", of_inputs, true);
  call.dweight = data_of(dweight, "dweight", matrix, true), call.dbias = data_of(dbias, "dbias", {call.outputs}, true);
  if (call.rows == 0) return;

  const KernelTable& table = *active().table;
  const bool is_double = dtype.itemsize() == 8, backward = y.is_none();
  const LinearKernels& kernels = is_double ? table.linear_f64 : table.linear_f32;
  call.products = products_of(table, is_double ? WeightFormat::float64 : WeightFormat::float32, rounds, engines, false);
  const double flops = 2.0 * static_cast<double>(call.rows) * static_cast<double>(call.inputs) *
                       static_cast<double>(call.outputs) * (backward ? 2 : 1);
  const Demand demand = divide_linear(flops, num_threads());
  const Scratch scratch(kernels.scratch_bytes(call, demand.threads));
  call.scratch = scratch.data();
  const WithoutGil gil;
  run_team(backward ? kernels.backward : kernels.forward, &call, demand);
}

// Of vectors and matrices. In float64, the elements of a row first and then the rows; the same on any number of
// threads.
double sum_of_squares(const py::list& arrays) {
  const KernelTable& table = *active().table;
  double total = 0;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    if (!py::isinstance<py::array>(arrays[i])) throw py::type_error(Name{"arrays", i}.text() + ": expected an array");
    const auto& fields = fields_of(arrays[i]);
    const py::dtype dtype = float_dtype(py::reinterpret_borrow<py::array>(arrays[i]).dtype());
    if (fields.nd != 1 && fields.nd != 2)
      throw py::value_error(Name{"arrays", i}.text() + ": expected one or two dimensions");
    const std::int64_t rows = fields.nd == 2 ? fields.dimensions[0] : 1, columns = fields.dimensions[fields.nd - 1];
    const Shape shape = fields.nd == 2 ? Shape{rows, columns} : Shape{columns};
    const py::array array = checked(arrays[i], {"arrays", i}, dtype, shape);  // kept while others have the GIL
    std::vector<double> squares(static_cast<std::size_t>(rows));
    Squares call{rows, columns, bytes_of(array), squares.data()};
    const Demand demand = divide_squares(static_cast<double>(rows) * static_cast<double>(columns), num_threads());
    std::optional<WithoutGil> gil;
    if (demand.expected_ns > kKeepsGil) gil.emplace();
    run_team(dtype.itemsize() == 4 ? table.squares_f32 : table.squares_f64, &call, demand);
    total = std::accumulate(squares.begin(), squares.end(), total);
  }
  return total;
}

// What stack.Stack.description has: cell, format, whether operands are rounded, whether engines multiply, input_size,
// hidden_size, proj_size, num_layers, directions.
using GivenStack = std::tuple<std::string, std::string, bool, bool, std::int64_t, std::int64_t, std::int64_t,
                              std::int64_t, std::vector<bool>>;

// Python owns the result from now on. Not a unique_ptr: pybind11 and it would both free the object where memory runs
// out while the Python object is made.
Packed* pack_into(const GivenStack& stack, const py::tuple& names, const py::object& weights, bool training,
                  const py::object& reserve) {
  const auto& [cell, format, rounds, engines, input_size, hidden_size, proj_size, num_layers, directions] = stack;
  return new Packed(
      {cell, format_of(format), rounds, engines, input_size, hidden_size, proj_size, num_layers, directions}, names,
      weights, training, reserve);
}

Packed* pack(const GivenStack& stack, const py::tuple& names, const py::object& weights, bool training) {
  return pack_into(stack, names, weights, training, py::none());
}

// Packs weights and runs a forward with them: what two calls would do, in one crossing. Returns the packed weights, the
// final state and, where something is saved, what backward needs.
py::tuple run_unpacked(const GivenStack& stack, const py::tuple& names, const py::object& weights,
                       const py::object& fields) {
  const Packed::Request request = Packed::request_of(fields);
  const auto& [x, state, y, save, lengths, resets, masks, reserve, offsets, sizes] = request;
  if (!reserve.is_none() && !py::isinstance<Reserve>(reserve))
    throw py::type_error("reserve: expected a Reserve or None");
  const py::object packed =
      py::cast(pack_into(stack, names, weights, !save.is_none(), reserve), py::return_value_policy::take_ownership);
  const py::tuple results = packed.cast<const Packed&>().forward(request);
  return py::make_tuple(packed, results[0], results[1]);
}

// Runs a loop of probes.h `runs` times on up to `threads` threads, on `elements` elements of data for each thread or
// each row of a cell. Returns the work of a run and, for each run, its seconds and the threads that took part.
std::pair<std::int64_t, std::vector<std::pair<double, int>>> measure(const std::string& name, const std::string& cell,
                                                                     std::int64_t repeats, std::int64_t elements,
                                                                     int threads, int runs) {
  using Clock = std::chrono::steady_clock;
  const auto probes = std::span(active().table->probes, static_cast<std::size_t>(active().table->probe_count));
  const auto probe =
      std::ranges::find_if(probes, [&](const ProbeKernel& one) { return name == one.name && cell == one.cell; });
  if (probe == probes.end())
    throw py::value_error("name: expected a measurement of the compiled module, got '" + name + "' of '" + cell + "'");
  const int lanes = active().table->lanes_f32;
  if (repeats < 1 || elements < 1 || elements % lanes != 0 || threads < 1 || runs < 1)
    throw py::value_error("repeats, elements, threads, runs: expected at least 1, elements a multiple of " +
                          std::to_string(lanes));
  const std::int64_t work = times(repeats, probe->work),
                     size = times(elements, probe->rows > 0 ? probe->rows : threads);
  const Buffer data(times(size, sizeof(float)));
  std::fill_n(static_cast<float*>(data.data), size, 0.25f);
  std::vector<std::pair<double, int>> results;
  const WithoutGil gil;
  for (int run = 0; run < runs; ++run) {
    Probe call{repeats, elements, data.data, 1};
    const auto start = Clock::now();
    run_team(probe->run, &call, {threads, 10'000'000});
    results.emplace_back(std::chrono::duration<double>(Clock::now() - start).count(), call.threads);
  }
  return {work, results};
}

py::list cell_descriptions() {
  using namespace py::literals;
  py::list cells;
  const KernelTable& table = *active().table;
  for (int i = 0; i < table.cell_count; ++i) {
    const CellEntry& cell = table.cells[i];
    cells.append(py::dict("name"_a = cell.name, "gates"_a = cell.gates, "states"_a = cell.states,
                          "saved"_a = cell.saved, "kept"_a = std::vector<int>(cell.kept, cell.kept + cell.states),
                          "extras"_a = cell.extras, "late_gates"_a = cell.late_gates, "projects"_a = cell.projects,
                          "separate_recurrent"_a = cell.separate_recurrent, "bounded"_a = cell.bounded));
  }
  return cells;
}

}  // namespace
}  // namespace rnnkern

PYBIND11_MODULE(_rnnkern_native, m, py::mod_gil_not_used()) {
  using namespace rnnkern;
  if (!active().supported) throw py::import_error("this CPU lacks the instructions rnnkern was compiled for");
  m.doc() = "The compiled kernels. Arguments are checked strictly; rnnkern.layers is the friendly side.";

  // Properties take references: a member function would be called on a null pointer for None.
  seal(py::class_<Saved>(m, "Saved", "What a training forward keeps for backward.", py::is_final())
           .def_property_readonly("nbytes", [](const Saved& self) { return self.nbytes(); }, "Bytes of saved gates."));

  seal(py::class_<Reserve>(m, "Reserve", "Memory that a layer keeps for its next call.", py::is_final())
           .def(
               "release", [](Reserve& self) { self.release(); }, "Gives up what no call is at work in.")
           .def_property_readonly("nbytes", [](const Reserve& self) { return self.nbytes(); }));
  m.def("reserve", [] { return new Reserve; });

  seal(py::class_<Packed>(m, "Packed", "The weights of a stack, packed for the ISA that was active when it was made.",
                          py::is_final())
           .def(
               "forward",
               [](const Packed& self, const py::object& request) { return self.forward(Packed::request_of(request)); },
               py::arg("request"))
           .def("backward", &Packed::backward, py::arg("saved"), py::arg("dy"), py::arg("dlast"), py::arg("need_x"),
                py::arg("need_state"), py::arg("gradients"), py::arg("bound"), py::arg("saturated"), py::arg("flow"),
                py::arg("dx"))
           .def("plan", &Packed::plan, py::arg("steps"), py::arg("batch"), py::arg("save"), py::arg("backward"),
                py::arg("offsets") = py::none())
           .def_property_readonly("names", [](const Packed& self) { return self.names(); })
           .def_property_readonly("isa", [](const Packed& self) { return self.isa(); })
           .def_property_readonly("nbytes", [](const Packed& self) { return self.nbytes(); }));

  add_calls(m);

  m.def("pack", &pack, py::arg("stack"), py::arg("names"), py::arg("weights"), py::arg("training"));

  m.def("run", &run_unpacked, py::arg("stack"), py::arg("names"), py::arg("weights"), py::arg("request"));

  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("dy"), py::arg("dx"),
        py::arg("dweight"), py::arg("dbias"), py::arg("rounds"), py::arg("engines"));
  m.def("sum_of_squares", &sum_of_squares, py::arg("arrays"),
        "In float64, the elements of a row first and then the rows; the same on any number of threads.");
  m.def("measure", &measure, py::arg("name"), py::arg("cell"), py::arg("repeats"), py::arg("elements"),
        py::arg("threads"), py::arg("runs"), "Times a loop that only the machine limits, for rnnkern.limits.");
  m.def("cells", &cell_descriptions, "What the compiled module knows of each cell.");
  m.def(
      "isas",
      [] {
        std::vector<std::pair<std::string, bool>> all;
        for (const Isa& isa : isas()) all.emplace_back(isa.name, isa.supported);
        return all;
      },
      "Compiled ISAs, best first, and whether this CPU runs each.");
  m.def("isa", [] { return std::string(active().name); }, "The ISA in use.");
  m.def(
      "use_isa",
      [](const std::string& name) {
        if (!use(name)) throw py::value_error("isa: expected one this CPU runs (see isas()), got '" + name + "'");
      },
      py::arg("name"), "Packs weights for another ISA from now on.");
  m.def(
      "engine", [] { return std::string(kEngines[static_cast<int>(engine(*active().table))]); },
      "What multiplies bfloat16 numbers: 'none', 'pairs', or a matrix engine, 'emulated' or 'amx', with '-fp16' if "
      "that multiplies float16 too.");
  m.def(
      "use_engine",
      [](const std::string& best) {
        const auto* const found = std::ranges::find(kEngines, best);
        if (found == std::end(kEngines)) throw py::value_error("best: expected one that engine() gives");
        return std::string(kEngines[static_cast<int>(use_engine(static_cast<Engine>(found - kEngines)))]);
      },
      py::arg("best"),
      "The best that may, where it is there, for what is packed from now on.\n\nReturns what was best "
      "before.");
  m.def("private_cache", &private_cache, "Bytes of a core's private cache, as the plans reckon with it.");
  m.def(
      "lanes",
      [](const py::object& dtype) {
        return float_dtype(dtype).itemsize() == 4 ? active().table->lanes_f32 : active().table->lanes_f64;
      },
      py::arg("dtype"), "Elements of a vector of the ISA in use.");
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", [](int count) { set_num_threads(count); }, py::arg("count"));
  m.def("limit_caller", &limit_caller, py::arg("count"));
  m.def(
      "decide",
      [](int threads, std::int64_t expected_ns, std::int64_t since_last, int cpus, int runnable, int awake) {
        const Decision decision = decide({threads, expected_ns, true, {}, since_last}, {cpus, runnable, awake});
        return std::pair(decision.helpers, decision.look_again);
      },
      py::arg("threads"), py::arg("expected_ns"), py::arg("since_last"), py::arg("cpus"), py::arg("runnable"),
      py::arg("awake"), "How many helpers a call asks for, and whether it asks again on its way, by policy.h.");
  m.def(
      "supply", [] { return std::pair(online_cpus(), runnable_threads()); },
      "The CPUs of this machine, and the threads on it that have one or wait for one now, 0 where that is not known.");
  m.def("wait_at_start", &wait_at_start, py::arg("helpers"), py::arg("woken"), py::arg("expected_ns"),
        "How many ns a call waits at its start for its helpers, some of which had to be woken.");
  py::class_<Worth>(m, "Worth", "Whether helpers are worth their barriers where steps are short, see policy.h; in ns.")
      .def(py::init<>())
      .def(
          "next",
          [](Worth& self, double step_ns, std::int64_t steps, int meetings, int threads) {
            return static_cast<int>(self.next({step_ns, step_ns, steps, meetings}, threads));
          },
          py::arg("step_ns"), py::arg("steps"), py::arg("meetings"), py::arg("threads"),
          "0: alone, 1: with helpers, 2: measured.")
      .def(
          "found",
          [](Worth& self, double step_ns, int threads, double alone_ns, double together_ns) {
            self.found({step_ns, step_ns}, threads, alone_ns, together_ns);
          },
          py::arg("step_ns"), py::arg("threads"), py::arg("alone_ns"), py::arg("together_ns"))
      .def("tried", &Worth::tried);
  m.def("next_retreat", &next_retreat, py::arg("before"), "How many calls do without helpers after a crowded one.");
  m.attr("compiler") = RNNKERN_COMPILER;
}
