// The packed weights of a stack, and the calls that Python makes of them: it hands over arrays, the kernels get structs
// of pointers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "network.h"
#include "policy.h"
#include "sequences.h"
#include "wiring.h"

namespace rnnkern {

// What a training forward leaves for backward; the arrays stay as they are.
struct Saved {
  std::uint64_t packed_id = 0;  // of the Packed that made it
  Sequences rows{0, 0};
  std::vector<std::int64_t> leading;  // the sizes of x but the last: T, B or the number of rows
  Save save = Save::nothing;
  py::object x, resets = py::none(), y;
  std::vector<py::object> masks;    // of each layer but the last; none: no dropout
  std::vector<py::object> initial;  // h, c: (L*D, B, ...), or None for zeros
  std::optional<Borrowed> kept;     // absent where that is nothing

  std::int64_t nbytes() const { return kept ? kept->buffer().owner.nbytes() : 0; }
};

// Of arrays, or None in place of one.
template <class Array>
States bytes_of(const std::vector<Array>& arrays) {
  States states{};
  for (std::size_t s = 0; s < arrays.size(); ++s) states[s] = arrays[s].is_none() ? nullptr : bytes_of(arrays[s]);
  return states;
}

py::tuple tuple_of(const std::vector<py::array>& arrays);

// Runs calls in memory that NumPy owns, see run() of wiring.h; without the GIL, unless the call is short.
struct PythonHost {
  using Scratch = rnnkern::Scratch;
  static void launch(Task task, KernelCall& call, const Plan& plan);
};

WeightFormat format_of(const std::string& name);

// The weights of a stack, packed for the ISA that was active when it was made.
class Packed : public Network {
 public:
  Packed(const Description& of, const py::tuple& names, const py::object& weights, bool training,
         const py::object& reserve);

  // The fields of Forward of python/rnnkern/stack.py, in their order.
  using Request = std::array<py::object, 10>;
  static Request request_of(const py::object& fields);

  // Fills y. Returns the final state, and what backward needs, None where `save` is. At most one of lengths, offsets
  // and sizes is given; see Sequences. Resets are read again by backward.
  py::tuple forward(const Request& request) const;

  using GivenBound = std::optional<std::pair<std::string, double>>;              // "norm" or "value", and how much
  using GivenSaturated = std::optional<std::vector<std::pair<double, double>>>;  // of each gate: at most, or above

  // Returns the gradients of x (None unless need_x), of the initial state (() unless need_state), and of the weights of
  // each layer-direction, in dicts like those they were packed from: of those that the dicts of `gradients` have, added
  // to what is there, None: to zeros. None for dy, dlast, or in place of a state, is zeros. The gradients of the states
  // after each step are bounded by `bound`, and where `saturated` has two bounds for each gate the arrays
  // (states + gates, T, B) of `flow`, one for each layer-direction, are filled: see Watch.
  // The gradient of x is added to `dx` where that is not None.
  py::tuple backward(const Saved& saved, const py::object& dy, const py::object& dlast, bool need_x, bool need_state,
                     const py::object& gradients, const GivenBound& bound, const GivenSaturated& saturated,
                     const py::object& flow, const py::object& dx) const;

  // How a training call of this size is divided, and the bytes that NumPy allocates in it beside states, y and
  // gradients: `kept` for as long as there is what it saves, `scratch` while it runs.
  // Of sequences without padding where offsets (B + 1,) are given.
  py::dict plan(std::int64_t steps, std::int64_t batch, const py::object& save, bool backward,
                const py::object& offsets) const;

  const py::dtype& dtype() const { return dtype_; }
  const py::tuple& names() const { return names_; }
  Shape state_shape(std::size_t s, std::int64_t B) const {
    return {static_cast<std::int64_t>(layer_directions()), B, state_size(s)};
  }
  std::vector<py::array> new_states(std::int64_t B) const;
  // None for the state, or in place of one array, stays None.
  std::vector<py::object> checked_states(const std::vector<py::object>& given, const char* name, std::int64_t B) const;

  std::int64_t nbytes() const { return packed_.buffer().owner.nbytes(); }

 private:
  std::vector<std::vector<py::object>> elements_of(const py::object& dicts, const char* name) const;
  std::vector<Shape> weight_shapes(std::size_t i) const;
  LayerWeights<void*> gradients_of(std::vector<py::object>& arrays, std::size_t i) const;
  Watch watch_of(const GivenBound& bound, const GivenSaturated& saturated) const;
  Sequences rows_of(const std::vector<std::int64_t>& leading, const py::object& lengths, const py::object& offsets,
                    const py::object& sizes, Save save) const;
  void check(const Saved& saved) const;
  ForwardCall call_of(const Saved& saved, std::vector<const void*>& masks) const;

  static inline std::atomic<std::uint64_t> next_id_ = 1;

  const std::uint64_t id_ = next_id_++;  // an address may be that of an earlier one
  py::dtype dtype_;
  bool training_;
  py::tuple names_;  // of the weights of a layer-direction, in the order of LayerWeights
  bool biased_;
  py::object reserve_;  // a Reserve or None
  Borrowed packed_;     // of all layer-directions, one after the other
};

// Adds the frozen call and the step of a stream to the module, see calls.cpp.
void add_calls(py::module_& m);

}  // namespace rnnkern
