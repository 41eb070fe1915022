// The calls that may come every microsecond: of a frozen layer, and the step of a stream. Their methods take positional
// arguments straight from the interpreter, past pybind11's dispatch. Arrays exactly as the kernels need them go there
// at once; whatever else comes goes first to a function of Python, which converts it or has the words for what is
// wrong.
#include "packed.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "gil.h"
#include "network.h"
#include "team.h"
#include "wiring.h"

namespace rnnkern {
namespace {

// Of contiguous arrays.
bool overlap(py::handle a, py::handle b) {
  const auto end = [](py::handle array) {
    return fields_of(array).data + py::reinterpret_borrow<py::array>(array).nbytes();
  };
  return fields_of(a).data < end(b) && fields_of(b).data < end(a);
}

// One thread's use of a stream. `holder` is 0 while there is none, else 1 + forks() of the process it is in: a thread
// of the parent's never ends its turn here.
class Turn {
 public:
  explicit Turn(std::atomic<unsigned>& holder, bool sets_state = false) : holder_(holder) {
    const unsigned mine = forks() + 1;
    unsigned before = 0;
    if (holder_.compare_exchange_strong(before, mine, std::memory_order_acquire)) return;
    if (before != mine && !sets_state)
      throw std::runtime_error(
          "stream: another thread used it when this process was forked; set its `state`, or take a new "
          "`frozen.stream()`");
    if (before == mine || !holder_.compare_exchange_strong(before, mine, std::memory_order_acquire))
      throw std::runtime_error("stream: used by two threads at once; give each thread its own `frozen.stream()`");
  }
  ~Turn() { holder_.store(0, std::memory_order_release); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  std::atomic<unsigned>& holder_;
};

// Inference with the weights of a frozen layer.
class FrozenCall {
 public:
  // friendly(x, state, lengths, offsets, resets, out) is the same call, from whatever a caller may pass.
  FrozenCall(const Packed& packed, py::object friendly, bool batch_first)
      : owner_(py::cast(packed, py::return_value_policy::reference)),
        packed_(packed),
        friendly_(std::move(friendly)),
        batch_first_(batch_first) {}

  // x, state, lengths, offsets, resets, out -> (y, final state)
  PyObject* run(PyObject* const* arguments, Py_ssize_t count) {
    const auto none = [&](int i) { return arguments[i] == Py_None; };
    if (count == 6 && none(2) && none(3) && none(4)) {
      py::object results = infer(arguments[0], arguments[1], arguments[5]);
      if (results) return results.release().ptr();
    }
    return in_python(PyObject_Vectorcall, friendly_.ptr(), arguments, static_cast<std::size_t>(count), nullptr);
  }

 private:
  // Null, and nothing done, where an argument is not exact.
  py::object infer(py::handle x, py::handle state, py::handle out) const {
    if (!py::isinstance<py::array>(x)) return {};
    const bool batched = fields_of(x).nd == 3;
    if (!batched && fields_of(x).nd != 2) return {};
    const std::int64_t first = fields_of(x).dimensions[0], second = fields_of(x).dimensions[1];
    // Rows of x lie one after the other in time only if one of T and B is 1, or if T comes first.
    if (batched && batch_first_ && first != 1 && second != 1) return {};
    const Sequences rows(batched && batch_first_ ? second : first, !batched ? 1 : batch_first_ ? first : second);
    ForwardCall call{};
    call.rows = &rows;

    const py::dtype& dtype = packed_.dtype();
    const auto rows_of = [&](std::int64_t size) { return batched ? Shape{first, second, size} : Shape{first, size}; };
    if (!is_exact(x, dtype, rows_of(packed_.input_size()))) return {};
    const std::size_t states = packed_.state_count();
    const auto state_shape = [&](std::size_t s) {
      return batched ? packed_.state_shape(s, rows.batch())
                     : Shape{static_cast<std::int64_t>(packed_.layers().size()), packed_.state_size(s)};
    };
    std::array<py::handle, kMaxStates> given{};
    if (!state.is_none()) {
      const bool counted = states == 1 || (PyTuple_CheckExact(state.ptr()) && py::len(state) == states);
      if (!counted) return {};
      for (std::size_t s = 0; s < states; ++s) {
        given[s] = states == 1 ? state : py::handle(PyTuple_GET_ITEM(state.ptr(), s));
        if (!is_exact(given[s], dtype, state_shape(s))) return {};
        call.initial[s] = bytes_of(given[s]);
      }
    }
    if (!out.is_none()) {
      if (!is_exact(out, dtype, rows_of(packed_.output_size()), true) || overlap(out, x)) return {};
      for (std::size_t s = 0; s < states; ++s)
        if (given[s] && overlap(out, given[s])) return {};
    }

    const py::object y =
        out.is_none() ? new_array(dtype, rows_of(packed_.output_size())) : py::reinterpret_borrow<py::object>(out);
    py::tuple last(states);
    for (std::size_t s = 0; s < states; ++s) {
      py::array array = new_array(dtype, state_shape(s));
      call.last[s] = bytes_of(array);
      PyTuple_SET_ITEM(last.ptr(), static_cast<Py_ssize_t>(s), array.release().ptr());
    }
    call.x = bytes_of(x), call.y = bytes_of(y);
    rnnkern::run<PythonHost>(packed_, call);
    return py::make_tuple(y, states > 1 ? py::object(last) : py::object(last[0]));
  }

  py::object owner_;  // keeps packed_
  const Packed& packed_;
  py::object friendly_;
  bool batch_first_;
};

// The states of B sequences that go on step by step, and everything a step needs but x and y. One thread at a time.
class Steps {
 public:
  // arguments(x_t, out) -> (x_t, y) makes exact arrays of those that are not.
  Steps(const Packed& packed, std::int64_t batch, py::object arguments)
      : owner_(py::cast(packed, py::return_value_policy::reference)),
        packed_(packed),
        batch_(batch),
        rows_(1, batch),
        arguments_(std::move(arguments)) {
    if (batch < 1) throw py::value_error("batch: expected at least 1, got " + std::to_string(batch));
    if (packed_.directions() != 1) throw py::value_error("packed: expected weights of one direction");
    rows_.describe(call_);
    between_.emplace(packed_.between_bytes(call_));
    for (auto& states : states_) states = packed_.new_states(batch);
    std::ranges::for_each(states_[0], fill_with_zeros);
    last_x_.emplace(times(times(batch, packed_.input_size()), packed_.element_bytes()));
    x_bytes_ = static_cast<std::size_t>(batch * packed_.input_size() * packed_.element_bytes());
    for (std::size_t i = 0; i < 2; ++i) {
      layers_[i] = packed_.layers();
      ForwardCall call{};
      call.rows = &rows_;
      call.initial = bytes_of(states_[i]), call.last = bytes_of(states_[1 - i]);
      connect(packed_, layers_[i], call, nullptr, between_->data);
    }
    divide();
  }

  // x_t (B, I), out (B, P) or None -> y_t
  PyObject* step(PyObject* const* arguments, Py_ssize_t count) {
    if (count != 2) throw py::type_error("step: expected x_t and out, got " + std::to_string(count) + " arguments");
    auto x = py::reinterpret_borrow<py::object>(arguments[0]), y = py::reinterpret_borrow<py::object>(arguments[1]);
    const py::dtype& dtype = packed_.dtype();
    const Shape x_shape{batch_, packed_.input_size()}, y_shape{batch_, packed_.output_size()};
    if (!is_exact(x, dtype, x_shape) || !(y.is_none() || (is_exact(y, dtype, y_shape, true) && !overlap(x, y)))) {
      const auto converted =
          elements(owned(in_python(PyObject_Vectorcall, arguments_.ptr(), arguments, 2, nullptr)), "arguments", 2);
      x = checked(converted[0], "x_t", dtype, x_shape);
      y = checked(converted[1], "out", dtype, y_shape, true);
    } else if (y.is_none()) {
      y = new_array(dtype, y_shape);
    }

    const Turn turn(holder_);
    if (threads_ != num_threads()) divide();
    std::vector<Layer>& layers = layers_[now_];
    layers.front().x = bytes_of(x);
    layers.back().y = bytes_of(y);
    call_.layers = layers.data();
    stepped_ = false;  // a step that is given up leaves neither the state after it nor that before
    PythonHost::launch(packed_.kernels().forward, call_, plan_);
    now_ = 1 - now_;  // not if the step was given up
    std::memcpy(last_x_->data, layers.front().x, x_bytes_);
    stepped_ = true;
    return y.release().ptr();
  }

  py::tuple state() {
    std::vector<py::array> copies = packed_.new_states(batch_);
    {
      const Turn turn(holder_);
      for (std::size_t s = 0; s < copies.size(); ++s) copy(states_[now_][s], copies[s]);
    }
    return tuple_of(copies);
  }

  // The x_t of the last step and the state before it; None before the first step.
  py::object last() {
    std::vector<py::array> copies = packed_.new_states(batch_);
    copies.push_back(new_array(packed_.dtype(), {batch_, packed_.input_size()}));
    {
      const Turn turn(holder_);
      if (!stepped_) return py::none();
      for (std::size_t s = 0; s + 1 < copies.size(); ++s) copy(states_[1 - now_][s], copies[s]);
      std::memcpy(bytes_of(copies.back()), last_x_->data, x_bytes_);
    }
    return tuple_of(copies);
  }

  void set_state(const py::object& state) {
    const auto given = elements(state, "state", packed_.state_count());
    std::vector<py::array> arrays;
    for (std::size_t s = 0; s < given.size(); ++s)
      arrays.push_back(checked(given[s], {"state", s}, packed_.dtype(), packed_.state_shape(s, batch_)));
    const Turn turn(holder_, true);
    for (std::size_t s = 0; s < given.size(); ++s) copy(arrays[s], states_[now_][s]);
  }

 private:
  // Divides the steps to come among as many threads as there may be now.
  void divide() {
    const int threads = num_threads();
    KernelCall call = call_;
    const Plan plan = packed_.complete(call, layers_[0], false);
    Buffer scratch(packed_.kernels().scratch_bytes(call, false));
    call.scratch = scratch.data;
    call_ = call, plan_ = plan, scratch_ = std::move(scratch), threads_ = threads;
  }

  py::object owner_;  // keeps packed_
  const Packed& packed_;
  const std::int64_t batch_;
  const Sequences rows_;
  py::object arguments_;
  std::vector<py::array> states_[2];  // a step reads those of now_ and writes the others
  std::vector<Layer> layers_[2];
  std::size_t now_ = 0;
  std::optional<Buffer> last_x_;  // of the last step
  std::size_t x_bytes_ = 0;
  bool stepped_ = false;  // there is one, and the states that are not now_'s are those before it
  std::optional<Buffer> between_, scratch_;
  KernelCall call_{};
  Plan plan_{};
  int threads_ = 0;
  std::atomic<unsigned> holder_ = 0;  // see Turn
};

}  // namespace

void add_calls(py::module_& m) {
  py::class_<FrozenCall> frozen_call(m, "FrozenCall", "Inference with the weights of a frozen layer.", py::is_final());
  add_method<FrozenCall, &FrozenCall::run>(frozen_call, "run",
                                           "run(self: rnnkern._rnnkern_native.FrozenCall, x: object, state: object, "
                                           "lengths: object, offsets: object, resets: object, out: object) -> object");
  seal(frozen_call);

  py::class_<Steps> steps(m, "Steps", "The states of sequences that go on step by step.", py::is_final());
  add_method<Steps, &Steps::step>(
      steps, "step", "step(self: rnnkern._rnnkern_native.Steps, x_t: object, out: object) -> numpy.ndarray");
  steps.def_property(
      "state", [](Steps& self) { return self.state(); },
      [](Steps& self, const py::object& state) { self.set_state(state); }, "Copied both ways.");
  steps.def_property_readonly(
      "last", [](Steps& self) { return self.last(); },
      "The states before the last step and its x_t, copied; None before the first step.");
  seal(steps);

  m.def(
      "frozen_call",
      [](const Packed& packed, py::object friendly, bool batch_first) {
        return new FrozenCall(packed, std::move(friendly), batch_first);
      },
      py::arg("packed"), py::arg("friendly"), py::arg("batch_first"));
  m.def(
      "stream",
      [](const Packed& packed, std::int64_t batch, py::object arguments) {
        return new Steps(packed, batch, std::move(arguments));
      },
      py::arg("packed"), py::arg("batch"), py::arg("arguments"));
}

}  // namespace rnnkern
