// The calls that may come every microsecond: of a frozen layer, and the step of a stream. Their methods take positional
// arguments straight from the interpreter, past pybind11's dispatch. Arrays exactly as the kernels need them go there
// at once; whatever else comes goes first to a function of Python, which converts it or has the words for what is
// wrong.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "packed.h"

namespace rnnkern {

// Inference with the weights of a frozen layer.
class FrozenCall {
 public:
  // friendly(x, state, lengths, resets, out) is the same call, from whatever a caller may pass.
  FrozenCall(const py::object& packed, py::object friendly, bool batch_first);

  // x, state, lengths, resets, out -> (y, final state)
  PyObject* run(PyObject* const* arguments, Py_ssize_t count);

 private:
  py::object infer(py::handle x, py::handle state, py::handle out) const;

  py::object owner_;  // keeps packed_
  const Packed& packed_;
  py::object friendly_;
  bool batch_first_;
};

// The states of B sequences that go on step by step, and everything a step needs but x and y. One thread at a time.
class Steps {
 public:
  // arguments(x_t, out) -> (x_t, y) makes exact arrays of those that are not.
  Steps(const py::object& packed, std::int64_t batch, py::object arguments);

  // x_t (B, I), out (B, P) or None -> y_t
  PyObject* step(PyObject* const* arguments, Py_ssize_t count);

  py::tuple state();
  void set_state(const py::object& state);

 private:
  void divide();

  py::object owner_;  // keeps packed_
  const Packed& packed_;
  const std::int64_t batch_;
  py::object arguments_;
  std::vector<py::array> states_[2];  // a step reads those of now_ and writes the others
  std::vector<Layer> layers_[2];
  std::size_t now_ = 0;
  std::optional<Buffer> between_, scratch_;
  KernelCall call_{};
  Plan plan_{};
  int threads_ = 0;
  std::atomic<unsigned> holder_ = 0;  // see Turn
};

}  // namespace rnnkern
