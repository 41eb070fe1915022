// The packed weights of a stack, and the calls that Python makes of them: it hands over arrays, the kernels get structs
// of pointers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "gil.h"
#include "kernel_table.h"
#include "network.h"
#include "plan.h"
#include "team.h"

namespace rnnkern {
namespace {

// A call expected to be shorter than this keeps the GIL: giving it up costs 0.1 us, and to get it back from a thread at
// work in Python may take its whole turn, 5 ms.
constexpr std::int64_t kKeepsGil = 10'000;  // ns

// Runs a kernel over a stack that says everything but how to give up.
void launch(Task task, Stack& stack, const Plan& plan) {
  std::int64_t stop = 0;
  stack.stop = &stop;
  if (plan.expected_ns < kKeepsGil) {
    stack.poll = nullptr;
    run_team(task, &stack, plan.threads, plan.expected_ns, Joining::at_places);
    return;
  }
  {
    WithoutGil gil;
    stack.poll = WithoutGil::poll;
    stack.poll_context = &gil;
    run_team(task, &stack, plan.threads, plan.expected_ns, Joining::at_places);
  }
  if (stop != 0) throw py::error_already_set();
}

// What a training forward leaves for backward; the arrays stay as they are.
struct Saved {
  std::uint64_t packed_id = 0;  // of the Packed that made it
  std::int64_t steps = 0, batch = 0;
  std::vector<py::array> inputs, outputs;  // of each layer; no outputs where there are no rows
  std::vector<py::array> initial;          // h, c: (L*D, B, ...)
  std::vector<Buffer> values;              // of each layer-direction
  std::vector<py::array> masks;
  std::optional<py::array> lengths, resets;

  std::int64_t nbytes() const {
    std::int64_t total = 0;
    for (const auto& value : values) total += value.owner.nbytes();
    return total;
  }
};

States bytes_of(const std::vector<py::array>& arrays) {
  States states{};
  for (std::size_t s = 0; s < arrays.size(); ++s) states[s] = bytes_of(arrays[s]);
  return states;
}

py::tuple tuple_of(const std::vector<py::array>& arrays) {
  py::tuple tuple(arrays.size());
  for (std::size_t i = 0; i < arrays.size(); ++i) tuple[i] = arrays[i];
  return tuple;
}

// Of the weights of a layer-direction, in the order of LayerWeights; none: not wanted.
using Gradients = std::vector<std::optional<py::array>>;

WeightFormat format_of(const std::string& name) {
  if (name == "float32") return WeightFormat::float32;
  if (name == "float64") return WeightFormat::float64;
  if (name == "bfloat16") return WeightFormat::bfloat16;
  throw py::value_error(std::string("format: expected float32, float64 or bfloat16, got ").append(name));
}

// The weights of a stack, packed for the ISA that was active when it was made.
class Packed : public Network {
 public:
  Packed(const std::string& cell, const std::string& format, std::int64_t input_size, std::int64_t hidden_size,
         std::int64_t proj_size, std::int64_t num_layers, std::vector<bool> directions, const py::tuple& names,
         const py::object& weights, bool training)
      : Network(active(), cell, format_of(format), input_size, hidden_size, proj_size, num_layers,
                std::move(directions)),
        dtype_(element_bytes() == 8 ? py::dtype::of<double>() : py::dtype::of<float>()),
        training_(training),
        names_(names),
        biased_(names.size() == weight_count(true)) {
    if (names.size() != weight_count(biased_) || !std::ranges::all_of(names, py::isinstance<py::str>))
      throw py::value_error("names: expected " + std::to_string(weight_count(biased_)) + " strings");
    if (training && format_of(format) == WeightFormat::bfloat16)
      throw py::value_error(std::string("format: expected float32 or float64 for training, got ").append(format));
    const auto given = elements(weights, "weights", layer_directions());
    for (std::size_t i = 0; i < given.size(); ++i) pack_next(i, given[i]);
  }

  // Fills y. Returns the final state, and what backward needs when the weights were packed for training, else None.
  py::tuple forward(const py::object& x, const py::object& state, const py::object& lengths, const py::object& resets,
                    const py::object& masks, const py::object& y) const {
    const auto state_objects = elements(state, "state", state_count());
    std::vector<py::object> mask_objects;
    if (!masks.is_none()) mask_objects = elements(masks, "masks", layer_count() - 1);
    if (!training_ && !mask_objects.empty())
      throw py::value_error("masks: expected None with weights that were not packed for training");
    Saved saved;
    saved.packed_id = id_;
    saved.inputs.push_back(checked_input(x, saved));
    const std::int64_t T = saved.steps, B = saved.batch;
    read_rows(saved, lengths, resets, mask_objects);
    saved.initial = checked_states(state_objects, "state", B);
    const py::array output = checked(y, "y", dtype_, {T, B, output_size()}, true);
    std::vector<py::array> last = new_states(B);
    if (T == 0 || B == 0) {
      for (std::size_t s = 0; s < last.size(); ++s) copy(saved.initial[s], last[s]);
    } else if (training_) {
      record(saved, output, bytes_of(last));
    } else {
      infer(rows_of(saved), bytes_of(saved.inputs[0]), bytes_of(output), bytes_of(saved.initial), bytes_of(last));
    }
    return py::make_tuple(tuple_of(last), training_ ? py::cast(std::move(saved)) : py::none());
  }

  // Which weights of each layer-direction, in the order of LayerWeights, are to get a gradient; none: all of them.
  using Wanted = std::optional<std::vector<std::vector<bool>>>;

  // Returns the gradients of x (None unless need_x), of the initial state, and of the wanted weights of each
  // layer-direction, in dicts like those they were packed from.
  py::tuple backward(const Saved& saved, const py::object& dy, const py::object& dlast, bool need_x,
                     const Wanted& wanted) const {
    if (saved.packed_id != id_) throw py::value_error("saved: expected what forward of these weights returned");
    const auto dlast_objects = elements(dlast, "dlast", state_count());
    const std::int64_t T = saved.steps, B = saved.batch;
    check_unchanged(saved);
    const std::vector<py::array> dfinal = checked_states(dlast_objects, "dlast", B);
    std::optional<py::array> output_gradient, input_gradient;
    if (!dy.is_none()) output_gradient = checked(dy, "dy", dtype_, {T, B, output_size()});
    if (need_x) input_gradient = new_array(dtype_, {T, B, input_size()});
    const std::vector<py::array> dinitial = new_states(B);
    if (wanted && wanted->size() != layer_directions())
      throw py::value_error("wanted: expected one for each of " + std::to_string(layer_directions()) +
                            " layer-directions");
    std::vector<Gradients> gradients;
    for (std::size_t i = 0; i < layer_directions(); ++i) gradients.push_back(zero_gradients(i, wanted));
    if (T == 0 || B == 0) {
      for (std::size_t s = 0; s < dinitial.size(); ++s) copy(dfinal[s], dinitial[s]);
    } else {
      go_back(saved, output_gradient ? bytes_of(*output_gradient) : nullptr,
              input_gradient ? bytes_of(*input_gradient) : nullptr, bytes_of(dfinal), bytes_of(dinitial), gradients);
    }
    py::list slopes;
    for (const auto& one : gradients) slopes.append(dict_of(one));
    return py::make_tuple(input_gradient ? py::object(*input_gradient) : py::none(), tuple_of(dinitial), slopes);
  }

  // How a training call of this size is divided, and the bytes that NumPy allocates in it beside states, y and
  // gradients: `kept` for as long as there is what it saves, `scratch` while it runs.
  py::dict plan(std::int64_t steps, std::int64_t batch, bool backward) const {
    if (!training_) throw py::value_error("plan: expected weights that were packed for training");
    check_size(steps, batch);
    Stack stack{};
    stack.steps = steps;
    stack.batch = batch;
    std::vector<Layer> layers = this->layers();
    std::int64_t kept = (static_cast<std::int64_t>(layer_count()) - 1) * output_bytes(steps, batch);
    for (Layer& one : layers) {
      const std::int64_t bytes = saved_bytes(one.sizes, steps, batch);
      if (bytes == 0) continue;
      kept += Buffer::with_room(bytes);
      one.saved = &one;  // only has to be there: forward works in it instead of in scratch
    }
    const Plan plan = complete(stack, layers, backward);
    py::dict described;
    described["threads"] = plan.threads;
    described["split"] = plan.split == Split::rows ? "rows" : "units";
    described["block_steps"] = plan.block_steps;
    described["kept"] = backward ? 0 : kept;
    described["scratch"] =
        Scratch::beside_stack(kernels().scratch_bytes(stack, backward)) + (backward ? between_bytes(stack) : 0);
    return described;
  }

  // Inference: the call has its steps and rows, the rest is added here. x (T, B, I), y (T, B, D*P).
  void infer(Stack stack, const void* x, void* y, const States& initial, const States& last) const {
    std::vector<Layer> layers = this->layers();
    const Plan plan = complete(stack, layers, false);
    const std::int64_t own = kernels().scratch_bytes(stack, false);
    const Scratch scratch(own + between_bytes(stack));
    stack.scratch = scratch.data();
    connect(layers, stack, x, y, initial, last, static_cast<char*>(scratch.data()) + own);
    launch(kernels().forward, stack, plan);
  }

  const py::dtype& dtype() const { return dtype_; }
  const py::tuple& names() const { return names_; }
  Shape state_shape(std::size_t s, std::int64_t B) const {
    return {static_cast<std::int64_t>(layer_directions()), B, state_size(s)};
  }
  std::vector<py::array> new_states(std::int64_t B) const {
    std::vector<py::array> arrays;
    arrays.reserve(state_count());
    for (std::size_t s = 0; s < state_count(); ++s) arrays.push_back(new_array(dtype_, state_shape(s, B)));
    return arrays;
  }
  std::vector<py::array> checked_states(const std::vector<py::object>& given, const char* name, std::int64_t B) const {
    std::vector<py::array> arrays;
    for (std::size_t s = 0; s < given.size(); ++s)
      arrays.push_back(checked(given[s], {name, s}, dtype_, state_shape(s, B)));
    return arrays;
  }

  std::int64_t nbytes() const {
    std::int64_t total = 0;
    for (const auto& one : packed_) total += one.owner.nbytes();
    return total;
  }

 private:
  void pack_next(std::size_t i, const py::object& weights) {
    const Name name{"weights", i};
    if (!py::isinstance<py::dict>(weights)) throw py::type_error(name.text() + ": expected a dict of arrays");
    const auto dict = py::reinterpret_borrow<py::dict>(weights);
    if (dict.size() != names_.size())
      throw py::value_error(name.text() + ": expected " + std::to_string(names_.size()) + " arrays");
    std::vector<py::object> given;
    for (const py::handle key : names_) {
      PyObject* object = in_python(PyDict_GetItemWithError, dict.ptr(), key.ptr());
      if (object == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (object == nullptr)
        throw py::value_error(name.text() + ": expected an array named '" + key.cast<std::string>() + "', got none");
      given.push_back(py::reinterpret_borrow<py::object>(object));
    }
    const std::vector<Shape> shapes = weight_shapes(i);
    std::vector<const void*> data;
    for (std::size_t k = 0; k < given.size(); ++k)
      data.push_back(bytes_of(checked(given[k], {"weights", i, k}, dtype_, shapes[k])));
    packed_.emplace_back(packed_bytes(i, training_));
    add(packed_.back().data);
    const auto pointers = weights_at(data.data(), biased_);
    if (packing_ns(i, training_) < kKeepsGil) {
      pack(i, pointers, training_, packed_.back().data);
    } else {
      const WithoutGil gil;
      pack(i, pointers, training_, packed_.back().data);
    }
  }

  // Of the weights of layer-direction i, in the order of LayerWeights.
  std::vector<Shape> weight_shapes(std::size_t i) const {
    const LayerSizes of = sizes(i);
    const std::int64_t rows = times(entry().gates, of.hidden);
    std::vector<Shape> shapes{{rows, of.inputs}, {rows, of.outputs}};
    shapes.reserve(weight_count(biased_));
    if (biased_) shapes.insert(shapes.end(), 2, Shape{rows});
    if (of.projected) shapes.push_back({of.outputs, of.hidden});
    shapes.insert(shapes.end(), static_cast<std::size_t>(entry().extras), Shape{of.hidden});
    return shapes;
  }

  // Zeros for the wanted gradients of layer-direction i.
  Gradients zero_gradients(std::size_t i, const Wanted& wanted) const {
    const std::vector<Shape> shapes = weight_shapes(i);
    if (wanted && (*wanted)[i].size() != shapes.size())
      throw py::value_error(Name{"wanted", i}.text() + ": expected " + std::to_string(shapes.size()) + " flags");
    Gradients gradients(shapes.size());
    for (std::size_t k = 0; k < shapes.size(); ++k) {
      if (wanted && !(*wanted)[i][k]) continue;
      gradients[k] = new_array(dtype_, shapes[k]);
      std::memset(bytes_of(*gradients[k]), 0, static_cast<std::size_t>(gradients[k]->nbytes()));
    }
    return gradients;
  }

  py::dict dict_of(const Gradients& gradients) const {
    py::dict dict;
    for (std::size_t k = 0; k < gradients.size(); ++k)
      if (gradients[k]) dict[names_[k]] = *gradients[k];
    return dict;
  }

  py::array checked_input(const py::object& x, Saved& saved) const {
    const std::int64_t I = input_size();
    if (!py::isinstance<py::array>(x))
      throw py::type_error("x: expected an array of shape (T, B, " + std::to_string(I) + ")");
    const auto array = py::reinterpret_borrow<py::array>(x);
    if (array.ndim() != 3)
      throw py::value_error("x: expected 3 dimensions (T, B, I), got " + std::to_string(array.ndim()));
    saved.steps = array.shape(0);
    saved.batch = array.shape(1);
    return checked(x, "x", dtype_, {saved.steps, saved.batch, I});
  }

  void read_rows(Saved& saved, const py::object& lengths, const py::object& resets,
                 const std::vector<py::object>& masks) const {
    const std::int64_t T = saved.steps, B = saved.batch;
    // Copies: what was checked is what runs.
    if (!lengths.is_none()) {
      const auto dtype = py::dtype::of<std::int64_t>();
      saved.lengths = copy_of(checked(lengths, "lengths", dtype, {B}), dtype, {B});
      check_lengths(static_cast<const std::int64_t*>(saved.lengths->data()), T, B);
    }
    if (!resets.is_none()) {
      const auto dtype = py::dtype::of<bool>();
      saved.resets = copy_of(checked(resets, "resets", dtype, {T, B}), dtype, {T, B});
    }
    for (std::size_t i = 0; i < masks.size(); ++i)
      saved.masks.push_back(checked(masks[i], {"masks", i}, dtype_, {T, B, output_size()}));
  }

  // What `saved` refers to and the caller holds too is still what it was: its shape may have been set since.
  void check_unchanged(const Saved& saved) const {
    const std::int64_t T = saved.steps, B = saved.batch;
    checked(saved.inputs[0], "x", dtype_, {T, B, input_size()});
    if (!saved.outputs.empty()) checked(saved.outputs.back(), "y", dtype_, {T, B, output_size()});
    for (std::size_t i = 0; i < saved.masks.size(); ++i)
      checked(saved.masks[i], {"masks", i}, dtype_, {T, B, output_size()});
  }

  // A call of the kernels without its layers, and where it has them lengths and resets.
  static Stack rows_of(const Saved& saved) {
    Stack stack{};
    stack.steps = saved.steps;
    stack.batch = saved.batch;
    stack.lengths = saved.lengths ? static_cast<const std::int64_t*>(saved.lengths->data()) : nullptr;
    stack.resets = saved.resets ? static_cast<const std::uint8_t*>(saved.resets->data()) : nullptr;
    return stack;
  }

  Record record_of(const Saved& saved) const {
    Record record;
    for (const auto& one : saved.inputs) record.inputs.push_back(bytes_of(one));
    for (const auto& one : saved.outputs) record.outputs.push_back(bytes_of(one));
    std::size_t value = 0;
    for (const Layer& one : layers())
      record.values.push_back(kernels().saved_elements(one.sizes, saved.batch) > 0 ? saved.values[value++].data
                                                                                   : nullptr);
    return record;
  }

  // The forward that backward can follow: every layer has an output of its own, and what its steps save.
  void record(Saved& saved, const py::array& y, const States& last) const {
    const std::int64_t T = saved.steps, B = saved.batch;
    // The tape must not see what the caller does to its state later.
    for (std::size_t s = 0; s < state_count(); ++s)
      saved.initial[s] = copy_of(saved.initial[s], dtype_, state_shape(s, B));
    std::vector<void*> masked;
    for (std::size_t layer = 0; layer + 1 < layer_count(); ++layer) {
      saved.outputs.push_back(new_array(dtype_, {T, B, output_size()}));
      saved.inputs.push_back(saved.masks.empty() ? saved.outputs.back() : new_array(dtype_, {T, B, output_size()}));
      masked.push_back(bytes_of(saved.inputs.back()));
    }
    saved.outputs.push_back(y);
    for (const Layer& one : layers()) {
      const std::int64_t bytes = saved_bytes(one.sizes, T, B);
      if (bytes > 0) saved.values.emplace_back(bytes);
    }
    run(saved, recorded(B, record_of(saved), bytes_of(saved.initial), last), false, masked.data());
  }

  // Backward through what `record` has left; dy and dx may be null.
  void go_back(const Saved& saved, void* dy, void* dx, const States& dlast, const States& dinitial,
               const std::vector<Gradients>& gradients) const {
    const std::int64_t T = saved.steps, B = saved.batch;
    std::vector<py::array> between;
    std::vector<void*> between_data;
    for (std::size_t i = 0; i < between_count(); ++i) {
      between.push_back(new_array(dtype_, {T, B, output_size()}));
      between_data.push_back(bytes_of(between.back()));
    }
    std::vector<LayerWeights<void*>> pointers;
    for (const auto& arrays : gradients) {
      std::vector<void*> data;
      for (const auto& one : arrays) data.push_back(one ? bytes_of(*one) : nullptr);
      pointers.push_back(weights_at(data.data(), biased_));
    }
    run(saved,
        retraced(B, record_of(saved), bytes_of(saved.initial), dy, dx, between_data.data(), dlast, dinitial, pointers),
        true, nullptr);
  }

  // A training call of the kernels.
  void run(const Saved& saved, const std::vector<Layer>& layers, bool backward, void* const* masked) const {
    Stack stack = rows_of(saved);
    std::vector<const void*> masks;
    for (const auto& mask : saved.masks) masks.push_back(bytes_of(mask));
    stack.masks = masks.empty() ? nullptr : masks.data();
    stack.masked = masked;
    const Plan plan = complete(stack, layers, backward);
    const Scratch scratch(kernels().scratch_bytes(stack, backward));
    stack.scratch = scratch.data();
    launch(backward ? kernels().backward : kernels().forward, stack, plan);
  }

  static inline std::atomic<std::uint64_t> next_id_ = 1;

  const std::uint64_t id_ = next_id_++;  // an address may be that of an earlier one
  py::dtype dtype_;
  bool training_;
  py::tuple names_;  // of the weights of a layer-direction, in the order of LayerWeights
  bool biased_;
  std::vector<Buffer> packed_;
};

}  // namespace
}  // namespace rnnkern
