// The packed weights of a stack, and the calls that Python makes of them: it hands over arrays, the kernels get structs
// of pointers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
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
#include "plan.h"
#include "threads.h"

namespace rnnkern {
namespace {

const CellEntry& find_cell(const KernelTable& table, const std::string& name) {
  for (int i = 0; i < table.cell_count; ++i)
    if (name == table.cells[i].name) return table.cells[i];
  throw py::value_error("cell: the compiled module has none named '" + name + "'");
}

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

// One array for each state of the cell, h first; null where there is none.
using States = std::array<void*, kMaxStates>;

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

// The weights of a stack, packed for the ISA that was active when it was made.
class Packed {
 public:
  Packed(const std::string& cell, const py::object& dtype, std::int64_t input_size, std::int64_t hidden_size,
         std::int64_t proj_size, std::int64_t num_layers, std::vector<bool> directions, const py::object& weights,
         bool training)
      : entry_(find_cell(*active().table, cell)),
        dtype_(float_dtype(dtype)),
        bytes_(dtype_.itemsize()),
        kernels_(bytes_ == 4 ? entry_.f32 : entry_.f64),
        isa_(active().name),
        hidden_(hidden_size),
        outputs_(proj_size ? proj_size : hidden_size),
        projected_(proj_size != 0),
        training_(training),
        reverse_(std::move(directions)) {
    const auto limit = std::int64_t{1} << 31;
    if (input_size < 1 || hidden_size < 1 || num_layers < 1 || proj_size < 0 || input_size >= limit ||
        hidden_size >= limit || proj_size >= limit || num_layers >= limit)
      throw py::value_error("sizes: expected input_size, hidden_size, num_layers >= 1, proj_size >= 0, all < 2^31");
    if (projected_ && !entry_.projects)
      throw py::value_error("proj_size: expected 0, since cell '" + cell + "' takes no projection");
    if (reverse_.empty() || reverse_.size() > 2) throw py::value_error("directions: expected one or two");
    width_ = outputs_ * static_cast<std::int64_t>(reverse_.size());
    const auto count = static_cast<std::size_t>(num_layers) * reverse_.size();
    const auto given = elements(weights, "weights", count);
    for (std::size_t i = 0; i < count; ++i) add(i < reverse_.size() ? input_size : width_, given[i]);
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
    const py::array output = checked(y, "y", dtype_, {T, B, width_}, true);
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

  // Returns the gradients of x (None unless need_x), of the initial state, and of the weights of each layer-direction,
  // in dicts like those they were packed from.
  py::tuple backward(const Saved& saved, const py::object& dy, const py::object& dlast, bool need_x) const {
    if (saved.packed_id != id_) throw py::value_error("saved: expected what forward of these weights returned");
    const auto dlast_objects = elements(dlast, "dlast", state_count());
    const std::int64_t T = saved.steps, B = saved.batch;
    check_unchanged(saved);
    const std::vector<py::array> dfinal = checked_states(dlast_objects, "dlast", B);
    std::optional<py::array> output_gradient, input_gradient;
    if (!dy.is_none()) output_gradient = checked(dy, "dy", dtype_, {T, B, width_});
    if (need_x) input_gradient = new_array(dtype_, {T, B, layers_[0].sizes.inputs});
    const std::vector<py::array> dinitial = new_states(B);
    std::vector<std::vector<py::array>> gradients;
    for (const auto& layer : layers_) gradients.push_back(zero_gradients(layer.sizes));
    if (T == 0 || B == 0) {
      for (std::size_t s = 0; s < dinitial.size(); ++s) copy(dfinal[s], dinitial[s]);
    } else {
      go_back(saved, output_gradient ? bytes_of(*output_gradient) : nullptr,
              input_gradient ? bytes_of(*input_gradient) : nullptr, bytes_of(dfinal), bytes_of(dinitial), gradients);
    }
    py::list dicts;
    for (const auto& one : gradients) dicts.append(dict_of(one));
    return py::make_tuple(input_gradient ? py::object(*input_gradient) : py::none(), tuple_of(dinitial), dicts);
  }

  // How a training call of this size is divided, and the bytes that NumPy allocates in it beside states, y and
  // gradients: `kept` for as long as there is what it saves, `scratch` while it runs.
  py::dict plan(std::int64_t steps, std::int64_t batch, bool backward) const {
    if (!training_) throw py::value_error("plan: expected weights that were packed for training");
    if (steps < 1 || batch < 1) throw py::value_error("steps, batch: expected at least 1");
    const auto count = static_cast<std::int64_t>(layers_.size());
    // Larger than every sum of sizes that follows, so that none of them overflows.
    times(times(steps, batch),
          times(times(1024, count), layers_[0].sizes.inputs + hidden_ + width_ + std::int64_t{num_threads()}));
    Stack stack{};
    stack.steps = steps;
    stack.batch = batch;
    std::vector<Layer> layers = layers_;
    std::int64_t kept = (static_cast<std::int64_t>(layer_count()) - 1) * output_bytes(stack);
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
        Scratch::beside_stack(kernels_.scratch_bytes(stack, backward)) + (backward ? between_bytes(stack) : 0);
    return described;
  }

  // Inference: the call has its steps and rows, the rest is added here. x (T, B, I), y (T, B, D*P).
  void infer(Stack stack, const void* x, void* y, const States& initial, const States& last) const {
    std::vector<Layer> layers = layers_;
    const Plan plan = complete(stack, layers, false);
    const std::int64_t own = kernels_.scratch_bytes(stack, false);
    const Scratch scratch(own + between_bytes(stack));
    stack.scratch = scratch.data();
    connect(layers, stack, x, y, initial, last, static_cast<char*>(scratch.data()) + own);
    launch(kernels_.forward, stack, plan);
  }

  // Its parts, for a stream that keeps them from step to step.

  // Adds to a call its layers and how it is divided.
  Plan complete(Stack& stack, const std::vector<Layer>& layers, bool backward) const {
    const LayerSizes& sizes = layers_[0].sizes;
    const Plan plan = make_plan({stack.steps, stack.batch, sizes.inputs, hidden_, outputs_,
                                 static_cast<std::int64_t>(layers_.size()), kernels_.row_grain(sizes, stack.batch),
                                 entry_.gates, entry_.saved, num_threads(), bytes_, backward});
    stack.layer_count = static_cast<int>(layer_count());
    stack.directions = static_cast<int>(reverse_.size());
    stack.layers = layers.data();
    stack.split = plan.split;
    stack.block_steps = plan.block_steps;
    stack.max_threads = plan.threads;
    return plan;
  }

  // Of the outputs between the layers, or of their gradients.
  std::int64_t between_bytes(const Stack& stack) const {
    return times(static_cast<std::int64_t>(between_count()), output_bytes(stack));
  }

  // Says where each layer-direction finds its rows and states; y of a layer is x of the one above.
  void connect(std::vector<Layer>& layers, const Stack& stack, const void* x, void* y, const States& initial,
               const States& last, void* between) const {
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const std::size_t layer = i / reverse_.size();
      const auto output = [&](std::size_t l) {
        return l + 1 == layer_count() ? y : offset(between, l % 2 ? stack.steps * stack.batch * width_ : 0);
      };
      place(layers[i], i, stack.batch, layer == 0 ? x : output(layer - 1), output(layer), initial);
      for (std::size_t s = 0; s < state_count(); ++s) layers[i].last[s] = row(last, s, i, stack.batch);
    }
  }

  const CellKernels& kernels() const { return kernels_; }
  const std::vector<Layer>& layers() const { return layers_; }
  const py::dtype& dtype() const { return dtype_; }
  std::int64_t input_size() const { return layers_[0].sizes.inputs; }
  std::int64_t output_size() const { return width_; }
  std::size_t directions() const { return reverse_.size(); }
  std::size_t state_count() const { return static_cast<std::size_t>(entry_.states); }
  std::int64_t state_size(std::size_t s) const { return s == 0 ? outputs_ : hidden_; }
  Shape state_shape(std::size_t s, std::int64_t B) const {
    return {static_cast<std::int64_t>(layers_.size()), B, state_size(s)};
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

  const char* isa() const { return isa_; }
  std::int64_t nbytes() const {
    std::int64_t total = 0;
    for (const auto& one : packed_) total += one.owner.nbytes();
    return total;
  }

 private:
  // What an error calls the weights of layer-direction i, or one of them.
  static Name weights_name(std::size_t i, const char* key = nullptr) { return {"weights", i, key}; }

  std::size_t layer_count() const { return layers_.size() / reverse_.size(); }

  // Arrays between the layers where nothing is kept: two take turns.
  std::size_t between_count() const { return std::min<std::size_t>(layer_count() - 1, 2); }

  // Of the output of a layer.
  std::int64_t output_bytes(const Stack& stack) const {
    return times(times(times(stack.steps, stack.batch), width_), bytes_);
  }

  // Of what the steps of a layer-direction save for backward.
  std::int64_t saved_bytes(const LayerSizes& sizes, std::int64_t T, std::int64_t B) const {
    return times(times(T, kernels_.saved_elements(sizes, B)), bytes_);
  }

  void add(std::int64_t inputs, const py::object& weights) {
    const std::size_t i = layers_.size();
    Layer layer{};
    layer.sizes = {inputs, hidden_, outputs_, projected_};
    layer.reverse = reverse_[i % reverse_.size()];
    if (!py::isinstance<py::dict>(weights))
      throw py::type_error(weights_name(i).text() + ": expected a dict of arrays");
    const auto dict = py::reinterpret_borrow<py::dict>(weights);
    const bool biased = dict.contains("b_ih");
    if (i == 0) biased_ = biased;
    if (biased != biased_)
      throw py::value_error(weights_name(i).text() + ": expected biases in all layer-directions or in none");
    const std::vector<py::array> arrays = checked_weights(dict, i, layer.sizes);
    const std::int64_t packed_bytes = times(kernels_.packed_elements(layer.sizes, training_), bytes_);
    packed_.emplace_back(packed_bytes);
    layer.packed = packed_.back().data;
    PackCall call{layer.sizes, weight_pointers<const void*>(arrays, layer.sizes), training_, packed_.back().data};
    const std::int64_t expected_ns = packed_bytes / 4;
    if (expected_ns < kKeepsGil) {
      run_team(kernels_.pack, &call, 1, expected_ns, Joining::at_start);
    } else {
      const WithoutGil gil;
      run_team(kernels_.pack, &call, num_threads(), expected_ns / num_threads(), Joining::at_start);
    }
    layers_.push_back(layer);
  }

  // The names and shapes of the weights of a layer-direction, in the order of LayerWeights, but for the extras: those
  // are in a tuple by the name "extras".
  std::vector<std::pair<const char*, Shape>> matrices(const LayerSizes& sizes) const {
    const std::int64_t rows = times(entry_.gates, sizes.hidden);
    std::vector<std::pair<const char*, Shape>> all;
    all.reserve(5);
    all.emplace_back("w_ih", Shape{rows, sizes.inputs});
    all.emplace_back("w_hh", Shape{rows, sizes.outputs});
    if (biased_) {
      all.emplace_back("b_ih", Shape{rows});
      all.emplace_back("b_hh", Shape{rows});
    }
    if (sizes.projected) all.emplace_back("w_hr", Shape{sizes.outputs, sizes.hidden});
    return all;
  }

  // What a dict of weights holds, in the order of LayerWeights.
  std::vector<py::array> checked_weights(const py::dict& dict, std::size_t i, const LayerSizes& sizes) const {
    const auto take = [&](const char* key) {
      const py::str name(key);
      PyObject* object = PyDict_GetItemWithError(dict.ptr(), name.ptr());
      if (object == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (object == nullptr)
        throw py::value_error(weights_name(i).text() + ": expected an array named '" + key + "', got none");
      return py::reinterpret_borrow<py::object>(object);
    };
    const auto known = matrices(sizes);
    std::vector<py::object> objects;
    for (const auto& [key, shape] : known) objects.push_back(take(key));
    if (dict.size() != known.size() + (entry_.extras > 0))
      throw py::value_error(weights_name(i).text() + ": has an array that the cell does not know");
    std::vector<py::object> extras;
    if (entry_.extras > 0)
      extras = elements(take("extras"), weights_name(i, "extras"), static_cast<std::size_t>(entry_.extras));
    std::vector<py::array> arrays;
    for (std::size_t k = 0; k < known.size(); ++k)
      arrays.push_back(checked(objects[k], weights_name(i, known[k].first), dtype_, known[k].second));
    for (std::size_t e = 0; e < extras.size(); ++e)
      arrays.push_back(checked(extras[e], {"weights", i, "extras", e}, dtype_, {sizes.hidden}));
    return arrays;
  }

  // Arrays for the gradients of the weights of a layer-direction, in the order of LayerWeights.
  std::vector<py::array> zero_gradients(const LayerSizes& sizes) const {
    std::vector<py::array> arrays;
    for (const auto& [key, shape] : matrices(sizes)) arrays.push_back(new_array(dtype_, shape));
    for (int e = 0; e < entry_.extras; ++e) arrays.push_back(new_array(dtype_, {sizes.hidden}));
    for (const auto& one : arrays) std::memset(bytes_of(one), 0, static_cast<std::size_t>(one.nbytes()));
    return arrays;
  }

  template <class Pointer>
  LayerWeights<Pointer> weight_pointers(const std::vector<py::array>& arrays, const LayerSizes& sizes) const {
    std::size_t next = 0;
    LayerWeights<Pointer> pointers{};
    pointers.w_ih = bytes_of(arrays[next++]);
    pointers.w_hh = bytes_of(arrays[next++]);
    if (biased_) {
      pointers.b_ih = bytes_of(arrays[next++]);
      pointers.b_hh = bytes_of(arrays[next++]);
    }
    if (sizes.projected) pointers.w_hr = bytes_of(arrays[next++]);
    for (int e = 0; e < entry_.extras; ++e) pointers.extra[e] = bytes_of(arrays[next++]);
    return pointers;
  }

  py::dict dict_of(const std::vector<py::array>& arrays) const {
    py::dict dict;
    std::size_t next = 0;
    for (const auto& [key, shape] : matrices(layers_[0].sizes)) dict[key] = arrays[next++];
    if (entry_.extras > 0)
      dict["extras"] = tuple_of({arrays.begin() + static_cast<std::ptrdiff_t>(next), arrays.end()});
    return dict;
  }

  py::array checked_input(const py::object& x, Saved& saved) const {
    const std::int64_t I = layers_[0].sizes.inputs;
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
      const auto* values = static_cast<const std::int64_t*>(saved.lengths->data());
      for (std::int64_t b = 0; b < B; ++b)
        if (values[b] < 0 || values[b] > T)
          throw py::value_error("lengths: expected 0 <= length <= " + std::to_string(T) + ", got " +
                                std::to_string(values[b]));
    }
    if (!resets.is_none()) {
      const auto dtype = py::dtype::of<bool>();
      saved.resets = copy_of(checked(resets, "resets", dtype, {T, B}), dtype, {T, B});
    }
    for (std::size_t i = 0; i < masks.size(); ++i)
      saved.masks.push_back(checked(masks[i], {"masks", i}, dtype_, {T, B, width_}));
  }

  // What `saved` refers to and the caller holds too is still what it was: its shape may have been set since.
  void check_unchanged(const Saved& saved) const {
    const std::int64_t T = saved.steps, B = saved.batch;
    checked(saved.inputs[0], "x", dtype_, {T, B, layers_[0].sizes.inputs});
    if (!saved.outputs.empty()) checked(saved.outputs.back(), "y", dtype_, {T, B, width_});
    for (std::size_t i = 0; i < saved.masks.size(); ++i) checked(saved.masks[i], {"masks", i}, dtype_, {T, B, width_});
  }

  void* offset(void* data, std::int64_t elements) const { return static_cast<char*>(data) + elements * bytes_; }

  // In a (T, B, D*P): the columns of the direction of layer-direction i.
  void* columns(void* data, std::size_t i) const {
    return offset(data, static_cast<std::int64_t>(i % reverse_.size()) * outputs_);
  }

  // In states (L*D, B, ...): those of layer-direction i.
  void* row(const States& states, std::size_t s, std::size_t i, std::int64_t B) const {
    return states[s] ? offset(states[s], static_cast<std::int64_t>(i) * B * state_size(s)) : nullptr;
  }

  // Says where layer-direction i finds its rows.
  void place(Layer& layer, std::size_t i, std::int64_t B, const void* x, void* y, const States& initial) const {
    layer.x = x;
    layer.x_stride = layer.sizes.inputs;
    layer.y = columns(y, i);
    layer.y_stride = width_;
    for (std::size_t s = 0; s < state_count(); ++s) layer.initial[s] = row(initial, s, i, B);
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

  std::vector<Layer> layers_with_rows(const Saved& saved) const {
    const States initial = bytes_of(saved.initial);
    std::vector<Layer> layers = layers_;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const std::size_t layer = i / reverse_.size();
      place(layers[i], i, saved.batch, bytes_of(saved.inputs[layer]), bytes_of(saved.outputs[layer]), initial);
    }
    return layers;
  }

  // The forward that backward can follow: every layer has an output of its own, and what its steps save.
  void record(Saved& saved, const py::array& y, const States& last) const {
    const std::int64_t T = saved.steps, B = saved.batch;
    // The tape must not see what the caller does to its state later.
    for (std::size_t s = 0; s < state_count(); ++s)
      saved.initial[s] = copy_of(saved.initial[s], dtype_, state_shape(s, B));
    std::vector<void*> masked;
    for (std::size_t layer = 0; layer + 1 < layer_count(); ++layer) {
      saved.outputs.push_back(new_array(dtype_, {T, B, width_}));
      saved.inputs.push_back(saved.masks.empty() ? saved.outputs.back() : new_array(dtype_, {T, B, width_}));
      masked.push_back(bytes_of(saved.inputs.back()));
    }
    saved.outputs.push_back(y);
    std::vector<Layer> layers = layers_with_rows(saved);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      for (std::size_t s = 0; s < state_count(); ++s) layers[i].last[s] = row(last, s, i, B);
      const std::int64_t bytes = saved_bytes(layers[i].sizes, T, B);
      if (bytes == 0) continue;
      saved.values.emplace_back(bytes);
      layers[i].saved = saved.values.back().data;
    }
    run(saved, layers, false, masked.data());
  }

  // Backward through what `record` has left; dy and dx may be null.
  void go_back(const Saved& saved, void* dy, void* dx, const States& dlast, const States& dinitial,
               const std::vector<std::vector<py::array>>& gradients) const {
    const std::int64_t T = saved.steps, B = saved.batch;
    // Between layers the gradient of one layer's input is that of the output below it.
    std::vector<py::array> between;
    for (std::size_t i = 0; i < between_count(); ++i) between.push_back(new_array(dtype_, {T, B, width_}));
    std::vector<Layer> layers = layers_with_rows(saved);
    std::size_t value = 0;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const std::size_t layer = i / reverse_.size();
      Layer& one = layers[i];
      one.gradients = weight_pointers<void*>(gradients[i], one.sizes);
      if (kernels_.saved_elements(one.sizes, B) > 0) one.saved = saved.values[value++].data;
      for (std::size_t s = 0; s < state_count(); ++s) {
        one.dlast[s] = row(dlast, s, i, B);
        one.dinitial[s] = row(dinitial, s, i, B);
      }
      void* const above = layer + 1 == layer_count() ? dy : bytes_of(between[layer % 2]);
      one.dy = above ? columns(above, i) : nullptr;
      one.dy_stride = width_;
      one.dx = layer == 0 ? dx : bytes_of(between[(layer - 1) % 2]);
      one.add_to_dx = i % reverse_.size() > 0;
    }
    run(saved, layers, true, nullptr);
  }

  // A training call of the kernels.
  void run(const Saved& saved, const std::vector<Layer>& layers, bool backward, void* const* masked) const {
    Stack stack = rows_of(saved);
    std::vector<const void*> masks;
    for (const auto& mask : saved.masks) masks.push_back(bytes_of(mask));
    stack.masks = masks.empty() ? nullptr : masks.data();
    stack.masked = masked;
    const Plan plan = complete(stack, layers, backward);
    const Scratch scratch(kernels_.scratch_bytes(stack, backward));
    stack.scratch = scratch.data();
    launch(backward ? kernels_.backward : kernels_.forward, stack, plan);
  }

  static inline std::atomic<std::uint64_t> next_id_ = 1;

  const std::uint64_t id_ = next_id_++;  // an address may be that of an earlier one
  const CellEntry& entry_;
  py::dtype dtype_;
  const std::int64_t bytes_;  // of an element
  const CellKernels& kernels_;
  const char* isa_;
  std::int64_t hidden_, outputs_;
  bool projected_, training_;
  bool biased_ = false;
  std::vector<bool> reverse_;  // of each direction
  std::int64_t width_ = 0;     // of y: D * P
  std::vector<Layer> layers_;
  std::vector<Buffer> packed_;
};

}  // namespace
}  // namespace rnnkern
