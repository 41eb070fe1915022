// The compiled module: checks memory (dtype, shape, contiguity), strictly, and hands plain structs to the kernels.
// The only file that knows Python. Meaning is checked in layers.py, with friendlier words.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "kernel_table.h"
#include "plan.h"
#include "threads.h"

#if defined(__clang__)
#define RNNKERN_COMPILER "Clang " __clang_version__
#else
#define RNNKERN_COMPILER "GCC " __VERSION__
#endif

namespace py = pybind11;

namespace rnnkern {
namespace {

using Shape = std::vector<std::int64_t>;

std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// An array exactly as the kernels need it, or an error that names it.
py::array checked(const py::handle& object, const std::string& name, const py::dtype& dtype, const Shape& shape,
                  bool writable = false) {
  const auto expected = [&] {
    return name + ": expected C-contiguous " + py::str(py::handle(dtype)).cast<std::string>() + " of shape " +
           text_of(shape) + ", got ";
  };
  if (!py::isinstance<py::array>(object)) throw py::type_error(expected() + Py_TYPE(object.ptr())->tp_name);
  auto array = py::reinterpret_borrow<py::array>(object);
  const Shape got(array.shape(), array.shape() + array.ndim());
  if (!array.dtype().equal(dtype))
    throw py::type_error(expected() + py::str(py::handle(array.dtype())).cast<std::string>() + " of shape " +
                         text_of(got));
  if (got != shape) throw py::value_error(expected() + "shape " + text_of(got));
  constexpr int c_contiguous = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_;
  constexpr int aligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (!(array.flags() & c_contiguous) || !(array.flags() & aligned))
    throw py::value_error(expected() + "other strides or a misaligned buffer");
  if (writable && !array.writeable()) throw py::value_error(expected() + "a read-only array");
  return array;
}

// The `count` elements of a sequence. A class of the caller's may run any code when it is asked for one, and change
// arrays with it: so whoever takes elements takes all of them before the first array is checked.
std::vector<py::object> elements(const py::object& object, const std::string& name, std::size_t count) {
  const std::string expected = name + ": expected a sequence of " + std::to_string(count) + " elements, got ";
  if (!py::isinstance<py::sequence>(object)) throw py::type_error(expected + Py_TYPE(object.ptr())->tp_name);
  const auto sequence = py::reinterpret_borrow<py::sequence>(object);
  const std::size_t size = sequence.size();
  if (size != count) throw py::value_error(expected + std::to_string(size));
  std::vector<py::object> all;
  for (std::size_t i = 0; i < count; ++i) all.emplace_back(sequence[i]);
  return all;
}

std::int64_t times(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) throw py::value_error("sizes: their product exceeds 2^63");
  return product;
}

// Memory for `bytes` bytes, aligned to 64, owned by NumPy.
struct Buffer {
  py::array owner;
  void* data = nullptr;

  explicit Buffer(std::int64_t bytes) {
    if (bytes > std::numeric_limits<std::int64_t>::max() - 64) throw std::bad_alloc();
    owner = py::array(py::dtype::of<std::uint8_t>(), Shape{bytes + 64});
    const auto address = reinterpret_cast<std::uintptr_t>(owner.mutable_data());
    data = reinterpret_cast<void*>((address + 63) & ~std::uintptr_t{63});
  }
};

// While one lives, other Python threads run; but for a look for Ctrl-C once 0.1 s have passed, and every 0.05 s from
// then on.
class WithoutGil {
 public:
  WithoutGil() noexcept : thread_(PyEval_SaveThread()) {}
  ~WithoutGil() { take(); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  static bool poll(void* context) noexcept {
    auto& self = *static_cast<WithoutGil*>(context);
    const auto now = Clock::now();
    if (now < self.next_) return false;
    self.next_ = now + std::chrono::milliseconds(50);
    self.take();
    const bool interrupted = PyErr_CheckSignals() != 0;
    self.thread_ = PyEval_SaveThread();
    return interrupted;
  }

 private:
  using Clock = std::chrono::steady_clock;

  // Python before 3.14 unwinds a daemon thread that wants the GIL while the interpreter shuts down. Here that would
  // abort the process in the first noexcept function: the thread sleeps instead until the process is gone, as in 3.14.
  void take() noexcept {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {
      for (;;) pause();
    }
  }

  PyThreadState* thread_;
  Clock::time_point next_ = Clock::now() + std::chrono::milliseconds(100);
};

const CellEntry& find_cell(const KernelTable& table, const std::string& name) {
  for (int i = 0; i < table.cell_count; ++i)
    if (name == table.cells[i].name) return table.cells[i];
  throw py::value_error("cell: the compiled module has none named '" + name + "'");
}

py::dtype float_dtype(const py::object& object) {
  const py::dtype dtype = py::dtype::from_args(object);
  if (!dtype.equal(py::dtype::of<float>()) && !dtype.equal(py::dtype::of<double>()))
    throw py::value_error("dtype: expected float32 or float64, got " + py::str(py::handle(dtype)).cast<std::string>());
  return dtype;
}

// What a training forward leaves for backward; the arrays stay as they are.
struct Saved {
  std::uint64_t packed_id = 0;  // of the Packed that made it
  std::int64_t steps = 0, batch = 0;
  std::vector<py::array> inputs, outputs;  // of each layer
  std::vector<py::array> initial;          // h, c: (L*D, B, ...)
  std::vector<Buffer> values;              // of each layer-direction
  std::vector<py::array> masks;
  std::optional<py::array> lengths, resets;

  std::int64_t nbytes() const {
    std::int64_t total = 0;
    for (const auto& value : values) total += value.owner.nbytes();
    return total;
  }
  py::tuple input_shape() const { return inputs.at(0).attr("shape"); }
};

// The weights of a stack, packed for the ISA that was active when it was made.
class Packed {
 public:
  Packed(const std::string& cell, const py::object& dtype, std::int64_t input_size, std::int64_t hidden_size,
         std::int64_t proj_size, std::int64_t num_layers, std::vector<bool> directions, const py::object& weights,
         bool training)
      : entry_(find_cell(*active().table, cell)),
        dtype_(float_dtype(dtype)),
        kernels_(dtype_.itemsize() == 4 ? entry_.f32 : entry_.f64),
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
    const auto count = static_cast<std::size_t>(num_layers) * reverse_.size();
    const auto given = elements(weights, "weights", count);
    for (std::size_t i = 0; i < count; ++i)
      add(i < reverse_.size() ? input_size : times(outputs_, static_cast<std::int64_t>(reverse_.size())), given[i],
          "weights[" + std::to_string(i) + "]");
  }

  // Fills y and last; returns what backward needs when the weights were packed for training, else None.
  py::object forward(const py::object& x, const py::object& state, const py::object& lengths, const py::object& resets,
                     const py::object& masks, const py::object& y, const py::object& last) const {
    const auto state_objects = elements(state, "state", state_count()),
               last_objects = elements(last, "last", state_count());
    std::vector<py::object> mask_objects;
    if (!masks.is_none()) mask_objects = elements(masks, "masks", static_cast<std::size_t>(layer_count()) - 1);
    Saved saved;
    saved.packed_id = id_;
    const py::array input = checked_input(x, saved);
    const std::int64_t T = saved.steps, B = saved.batch;
    read_rows(saved, lengths, resets, mask_objects);
    saved.initial = states(state_objects, "state", B, false);
    const std::vector<py::array> finals = states(last_objects, "last", B, true);
    const py::array output = checked(y, "y", dtype_, {T, B, width()}, true);
    if (T == 0 || B == 0) {
      for (std::size_t i = 0; i < finals.size(); ++i) copy(saved.initial[i], finals[i]);
      saved.inputs = {input};
      return training_ ? py::cast(std::move(saved)) : py::object(py::none());
    }
    // The tape must not see what the caller does to its state later.
    if (training_)
      for (auto& one : saved.initial) one = py::array(dtype_, Shape(one.shape(), one.shape() + 3), one.data());

    std::vector<py::array> masked;
    saved.inputs.push_back(input);
    for (std::int64_t layer = 0; layer < layer_count(); ++layer) {
      const bool is_last = layer + 1 == layer_count();
      // Without training nothing is kept: two buffers take turns.
      saved.outputs.push_back(is_last                  ? output
                              : training_ || layer < 2 ? py::array(dtype_, Shape{T, B, width()})
                                                       : saved.outputs[static_cast<std::size_t>(layer) - 2]);
      if (is_last) break;
      if (!saved.masks.empty()) {
        masked.emplace_back(dtype_, Shape{T, B, width()});
        saved.inputs.push_back(masked.back());
      } else {
        saved.inputs.push_back(saved.outputs.back());
      }
    }
    std::vector<Layer> layers = describe(saved);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      for (std::size_t s = 0; s < finals.size(); ++s) layers[i].last[s] = row(finals[s], i);
      const std::int64_t row_elements = kernels_.saved_elements(layers[i].sizes);
      if (!training_ || row_elements == 0) continue;
      saved.values.emplace_back(times(times(times(T, B), row_elements), dtype_.itemsize()));
      layers[i].saved = saved.values.back().data;
    }
    std::vector<void*> masked_pointers;
    for (auto& one : masked) masked_pointers.push_back(one.mutable_data());
    run(saved, layers, false, masked_pointers.data());
    return training_ ? py::cast(std::move(saved)) : py::object(py::none());
  }

  // Fills dx (unless None), dinitial and gradients (a mapping like weights for each layer-direction).
  void backward(const Saved& saved, const py::object& dy, const py::object& dlast, const py::object& dx,
                const py::object& dinitial, const py::object& gradients) const {
    if (saved.packed_id != id_) throw py::value_error("saved: expected what forward of these weights returned");
    const auto dlast_objects = elements(dlast, "dlast", state_count()),
               dinitial_objects = elements(dinitial, "dinitial", state_count()),
               dicts = elements(gradients, "gradients", layers_.size());
    std::vector<std::vector<py::object>> gradient_objects;
    for (std::size_t i = 0; i < dicts.size(); ++i)
      gradient_objects.push_back(weight_objects(dicts[i], gradient_name(i), layers_[i].sizes, biased_[i]));
    const std::int64_t T = saved.steps, B = saved.batch, I = layers_[0].sizes.inputs;
    check_unchanged(saved);
    const std::vector<py::array> dfinal = states(dlast_objects, "dlast", B, false),
                                 dstart = states(dinitial_objects, "dinitial", B, true);
    std::optional<py::array> output_gradient, input_gradient;
    if (!dy.is_none()) output_gradient = checked(dy, "dy", dtype_, {T, B, width()});
    if (!dx.is_none()) input_gradient = checked(dx, "dx", dtype_, {T, B, I}, true);
    std::vector<Layer> layers = T > 0 && B > 0 ? describe(saved) : layers_;
    std::vector<py::array> keep;
    for (std::size_t i = 0; i < layers.size(); ++i)
      layers[i].gradients =
          weight_pointers<void*>(gradient_objects[i], gradient_name(i), layers[i].sizes, biased_[i], true, keep);
    for (auto& one : keep) std::memset(one.mutable_data(), 0, static_cast<std::size_t>(one.nbytes()));
    if (T == 0 || B == 0) {
      for (std::size_t i = 0; i < dstart.size(); ++i) copy(dfinal[i], dstart[i]);
      return;
    }
    // Between layers the gradient of one layer's input is that of the output below it; two buffers take turns.
    std::vector<py::array> between;
    for (std::int64_t i = 0; i < std::min<std::int64_t>(layer_count() - 1, 2); ++i)
      between.emplace_back(dtype_, Shape{T, B, width()});
    std::size_t value = 0;
    const std::size_t D = reverse_.size();
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const std::size_t layer = i / D, direction = i % D;
      Layer& one = layers[i];
      if (kernels_.saved_elements(one.sizes) > 0) one.saved = saved.values[value++].data;
      for (std::size_t s = 0; s < dfinal.size(); ++s) {
        one.dlast[s] = row(dfinal[s], i);
        one.dinitial[s] = row(dstart[s], i);
      }
      if (layer + 1 == static_cast<std::size_t>(layer_count()))
        one.dy = output_gradient ? offset(output_gradient->data(), static_cast<std::int64_t>(direction) * outputs_)
                                 : nullptr;
      else
        one.dy = offset(between[layer % 2].data(), static_cast<std::int64_t>(direction) * outputs_);
      one.dy_stride = width();
      if (layer > 0)
        one.dx = between[(layer - 1) % 2].mutable_data();
      else
        one.dx = input_gradient ? input_gradient->mutable_data() : nullptr;
      one.add_to_dx = direction > 0;
    }
    run(saved, layers, true);
  }

  const char* isa() const { return isa_; }
  bool bias() const { return biased_[0]; }
  std::int64_t nbytes() const {
    std::int64_t total = 0;
    for (const auto& one : packed_) total += one.owner.nbytes();
    return total;
  }

 private:
  std::int64_t width() const { return times(outputs_, static_cast<std::int64_t>(reverse_.size())); }
  std::size_t state_count() const { return static_cast<std::size_t>(entry_.states); }
  static std::string gradient_name(std::size_t i) { return "gradients[" + std::to_string(i) + "]"; }
  std::int64_t layer_count() const { return static_cast<std::int64_t>(layers_.size() / reverse_.size()); }
  const void* offset(const void* data, std::int64_t elements) const {
    return static_cast<const char*>(data) + elements * dtype_.itemsize();
  }
  void* row(const py::array& array, std::size_t i) const {  // array (L*D, B, n): its part of layer-direction i
    return static_cast<char*>(const_cast<void*>(array.data())) + static_cast<std::int64_t>(i) * array.strides(0);
  }
  static void copy(const py::array& from, const py::array& to) {  // the caller's arrays: they may be the same
    std::memmove(const_cast<void*>(to.data()), from.data(), static_cast<std::size_t>(from.nbytes()));
  }

  void add(std::int64_t inputs, const py::object& weights, const std::string& name) {
    Layer layer{};
    layer.sizes = {inputs, hidden_, outputs_, projected_};
    layer.reverse = reverse_[layers_.size() % reverse_.size()];
    const bool biased = checked_dict(weights, name).contains("b_ih");
    if (!biased_.empty() && biased != biased_[0])
      throw py::value_error(name + ": expected biases in all layer-directions or in none");
    const auto objects = weight_objects(weights, name, layer.sizes, biased);
    std::vector<py::array> keep;
    const auto pointers = weight_pointers<const void*>(objects, name, layer.sizes, biased, false, keep);
    packed_.emplace_back(times(kernels_.packed_elements(layer.sizes, training_), dtype_.itemsize()));
    kernels_.pack(layer.sizes, pointers, training_, packed_.back().data);
    layer.packed = packed_.back().data;
    layers_.push_back(layer);
    biased_.push_back(biased);
  }

  static py::dict checked_dict(const py::object& object, const std::string& name) {
    if (!py::isinstance<py::dict>(object)) throw py::type_error(name + ": expected a dict of arrays");
    return py::reinterpret_borrow<py::dict>(object);
  }

  // What a dict of weights holds, in the order of LayerWeights; bias says whether b_ih and b_hh must be there.
  std::vector<py::object> weight_objects(const py::object& object, const std::string& name, const LayerSizes& sizes,
                                         bool bias) const {
    const py::dict dict = checked_dict(object, name);
    std::vector<std::string> keys{"w_ih", "w_hh"};
    if (bias) keys.insert(keys.end(), {"b_ih", "b_hh"});
    if (sizes.projected) keys.emplace_back("w_hr");
    if (entry_.extras > 0) keys.emplace_back("extras");
    std::vector<py::object> objects;
    for (const auto& key : keys) {
      if (!dict.contains(key)) throw py::value_error(name + ": expected an array named '" + key + "', got none");
      objects.emplace_back(dict[py::str(key)]);
    }
    if (dict.size() != keys.size()) throw py::value_error(name + ": has an array that the cell does not know");
    if (entry_.extras > 0) {
      const auto extras = elements(objects.back(), name + "['extras']", static_cast<std::size_t>(entry_.extras));
      objects.pop_back();
      objects.insert(objects.end(), extras.begin(), extras.end());
    }
    return objects;
  }

  // Pointers into `weight_objects`, checked.
  template <class Pointer>
  LayerWeights<Pointer> weight_pointers(const std::vector<py::object>& objects, const std::string& name,
                                        const LayerSizes& sizes, bool bias, bool writable,
                                        std::vector<py::array>& keep) const {
    std::size_t next = 0;
    const auto take = [&](const std::string& key, const Shape& shape) -> Pointer {
      keep.push_back(checked(objects[next++], name + "[" + key + "]", dtype_, shape, writable));
      return const_cast<void*>(keep.back().data());
    };
    const std::int64_t rows = times(entry_.gates, sizes.hidden);
    LayerWeights<Pointer> pointers{};
    pointers.w_ih = take("'w_ih'", {rows, sizes.inputs});
    pointers.w_hh = take("'w_hh'", {rows, sizes.outputs});
    if (bias) {
      pointers.b_ih = take("'b_ih'", {rows});
      pointers.b_hh = take("'b_hh'", {rows});
    }
    if (sizes.projected) pointers.w_hr = take("'w_hr'", {sizes.outputs, sizes.hidden});
    for (int e = 0; e < entry_.extras; ++e) pointers.extra[e] = take("'extras'][" + std::to_string(e), {sizes.hidden});
    return pointers;
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
    if (!lengths.is_none()) {
      const py::array given = checked(lengths, "lengths", py::dtype::of<std::int64_t>(), {B});
      saved.lengths =
          py::array(py::dtype::of<std::int64_t>(), Shape{B}, given.data());  // what was checked is what runs
      const auto* values = static_cast<const std::int64_t*>(saved.lengths->data());
      for (std::int64_t b = 0; b < B; ++b)
        if (values[b] < 0 || values[b] > T)
          throw py::value_error("lengths: expected 0 <= length <= " + std::to_string(T) + ", got " +
                                std::to_string(values[b]));
    }
    if (!resets.is_none()) {
      const py::array given = checked(resets, "resets", py::dtype::of<bool>(), {T, B});
      saved.resets = py::array(py::dtype::of<bool>(), Shape{T, B}, given.data());
    }
    for (std::size_t i = 0; i < masks.size(); ++i)
      saved.masks.push_back(checked(masks[i], "masks[" + std::to_string(i) + "]", dtype_, {T, B, width()}));
  }

  // What `saved` refers to and the caller holds too is still what it was: its shape may have been set since.
  void check_unchanged(const Saved& saved) const {
    const std::int64_t T = saved.steps, B = saved.batch;
    checked(saved.inputs[0], "x", dtype_, {T, B, layers_[0].sizes.inputs});
    if (!saved.outputs.empty()) checked(saved.outputs.back(), "y", dtype_, {T, B, width()});
    for (std::size_t i = 0; i < saved.masks.size(); ++i)
      checked(saved.masks[i], "masks[" + std::to_string(i) + "]", dtype_, {T, B, width()});
  }

  std::vector<py::array> states(const std::vector<py::object>& given, const std::string& name, std::int64_t B,
                                bool writable) const {
    std::vector<py::array> arrays;
    for (std::size_t i = 0; i < given.size(); ++i)
      arrays.push_back(checked(given[i], name + "[" + std::to_string(i) + "]", dtype_,
                               {static_cast<std::int64_t>(layers_.size()), B, i == 0 ? outputs_ : hidden_}, writable));
    return arrays;
  }

  // The layer-directions with the pointers that forward and backward share.
  std::vector<Layer> describe(const Saved& saved) const {
    std::vector<Layer> layers = layers_;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const std::size_t layer = i / reverse_.size(), direction = i % reverse_.size();
      layers[i].x = saved.inputs[layer].data();
      layers[i].x_stride = layers[i].sizes.inputs;
      layers[i].y =
          const_cast<void*>(offset(saved.outputs[layer].data(), static_cast<std::int64_t>(direction) * outputs_));
      layers[i].y_stride = width();
      for (std::size_t s = 0; s < saved.initial.size(); ++s) layers[i].initial[s] = row(saved.initial[s], i);
    }
    return layers;
  }

  // One call of the kernels; `layers` and `saved` must outlive it.
  void run(const Saved& saved, const std::vector<Layer>& layers, bool backward, void* const* masked = nullptr) const {
    const Plan plan = make_plan({saved.steps, saved.batch, layers[0].sizes.inputs, hidden_, outputs_,
                                 static_cast<std::int64_t>(layers.size()), entry_.gates, entry_.saved, num_threads(),
                                 dtype_.itemsize(), backward});
    std::vector<const void*> masks;
    for (const auto& mask : saved.masks) masks.push_back(mask.data());
    std::int64_t stop = 0;
    Stack stack{};
    stack.steps = saved.steps;
    stack.batch = saved.batch;
    stack.lengths = saved.lengths ? static_cast<const std::int64_t*>(saved.lengths->data()) : nullptr;
    stack.resets = saved.resets ? static_cast<const std::uint8_t*>(saved.resets->data()) : nullptr;
    stack.layer_count = static_cast<int>(layer_count());
    stack.directions = static_cast<int>(reverse_.size());
    stack.layers = layers.data();
    stack.masks = masks.empty() ? nullptr : masks.data();
    stack.masked = masked;
    stack.split = plan.split;
    stack.block_steps = plan.block_steps;
    stack.max_threads = plan.threads;
    stack.poll = WithoutGil::poll;
    stack.stop = &stop;
    const Buffer scratch(kernels_.scratch_bytes(stack, backward));
    stack.scratch = scratch.data;
    {
      WithoutGil gil;
      stack.poll_context = &gil;
      run_team(backward ? kernels_.backward : kernels_.forward, &stack, plan.threads, plan.expected_ns);
    }
    if (stop != 0) throw py::error_already_set();
  }

  static inline std::atomic<std::uint64_t> next_id_ = 1;

  const std::uint64_t id_ = next_id_++;  // an address may be that of an earlier one
  const CellEntry& entry_;
  py::dtype dtype_;
  const CellKernels& kernels_;
  const char* isa_;
  std::int64_t hidden_, outputs_;
  bool projected_, training_;
  std::vector<bool> reverse_;
  std::vector<Layer> layers_;
  std::vector<bool> biased_;
  std::vector<Buffer> packed_;
};

// A call of Linear's kernels over rows of x (rows, inputs).
void run_linear(Linear& call, const py::dtype& dtype, bool backward) {
  const KernelTable& table = *active().table;
  const LinearKernels& kernels = dtype.itemsize() == 4 ? table.linear_f32 : table.linear_f64;
  const double flops = 2.0 * static_cast<double>(call.rows) * static_cast<double>(call.inputs) *
                       static_cast<double>(call.outputs) * (backward ? 2 : 1);
  const int threads = flops < 1e6 ? 1 : num_threads();
  const Buffer scratch(kernels.scratch_bytes(call, threads));
  call.scratch = scratch.data;
  const WithoutGil gil;
  run_team(backward ? kernels.backward : kernels.forward, &call, threads,
           static_cast<std::int64_t>(flops / 30 / threads));
}

struct LinearArrays {
  py::dtype dtype;
  py::array x, weight;
  Linear call{};

  LinearArrays(const py::object& x_object, const py::object& weight_object) : dtype(py::dtype::of<float>()) {
    if (!py::isinstance<py::array>(x_object) || !py::isinstance<py::array>(weight_object))
      throw py::type_error("x, weight: expected arrays");
    x = py::reinterpret_borrow<py::array>(x_object);
    weight = py::reinterpret_borrow<py::array>(weight_object);
    if (x.ndim() != 2 || weight.ndim() != 2) throw py::value_error("x, weight: expected two dimensions");
    dtype = float_dtype(x.dtype());
    call.rows = x.shape(0), call.inputs = weight.shape(1), call.outputs = weight.shape(0);
    // An array without elements may have more rows than there is memory.
    if (call.inputs < 1 || call.outputs < 1) throw py::value_error("weight: expected at least one row and one column");
    checked(x, "x", dtype, {call.rows, call.inputs});
    checked(weight, "weight", dtype, {call.outputs, call.inputs});
    call.x = x.data(), call.weight = weight.data();
  }
};

void linear_forward(const py::object& x, const py::object& weight, const py::object& bias, const py::object& y) {
  LinearArrays arrays(x, weight);
  Linear& call = arrays.call;
  call.y = checked(y, "y", arrays.dtype, {call.rows, call.outputs}, true).mutable_data();
  if (!bias.is_none()) call.bias = checked(bias, "bias", arrays.dtype, {call.outputs}).data();
  if (call.rows > 0) run_linear(call, arrays.dtype, false);
}

void linear_backward(const py::object& x, const py::object& weight, const py::object& dy, const py::object& dx,
                     const py::object& dweight, const py::object& dbias) {
  LinearArrays arrays(x, weight);
  Linear& call = arrays.call;
  call.dy = checked(dy, "dy", arrays.dtype, {call.rows, call.outputs}).data();
  if (!dx.is_none()) call.dx = checked(dx, "dx", arrays.dtype, {call.rows, call.inputs}, true).mutable_data();
  py::array to_weight = checked(dweight, "dweight", arrays.dtype, {call.outputs, call.inputs}, true);
  std::memset(call.dweight = to_weight.mutable_data(), 0, static_cast<std::size_t>(to_weight.nbytes()));
  if (!dbias.is_none()) {
    py::array to_bias = checked(dbias, "dbias", arrays.dtype, {call.outputs}, true);
    std::memset(call.dbias = to_bias.mutable_data(), 0, static_cast<std::size_t>(to_bias.nbytes()));
  }
  if (call.rows > 0) run_linear(call, arrays.dtype, true);
}

py::array activation(const std::string& name, const py::array& x) {
  const KernelTable& table = *active().table;
  const py::dtype dtype = float_dtype(x.dtype());
  const Shape shape(x.shape(), x.shape() + x.ndim());
  const py::array from = checked(x, "x", dtype, shape);
  py::array y(dtype, shape);
  for (int i = 0; i < table.activation_count; ++i) {
    const ActivationKernel& kernel = table.activations[i];
    if (name != kernel.name) continue;
    if (dtype.itemsize() == 4)
      kernel.f32(static_cast<const float*>(from.data()), static_cast<float*>(y.mutable_data()), from.size());
    else
      kernel.f64(static_cast<const double*>(from.data()), static_cast<double*>(y.mutable_data()), from.size());
    return y;
  }
  throw py::value_error("name: the compiled module has no activation '" + name + "'");
}

std::unique_ptr<Packed> pack(const std::string& cell, const py::object& dtype, std::int64_t input_size,
                             std::int64_t hidden_size, std::int64_t proj_size, std::int64_t num_layers,
                             std::vector<bool> directions, const py::object& weights, bool training) {
  return std::make_unique<Packed>(cell, dtype, input_size, hidden_size, proj_size, num_layers, std::move(directions),
                                  weights, training);
}

// Forbids what would make an instance of a type without a constructor having run, or take one for another: `__new__`,
// subclasses, assignment to `__class__`. Members can no longer be added to the type afterwards.
void seal(const py::object& type) {
  auto* object = reinterpret_cast<PyTypeObject*>(type.ptr());
  object->tp_new = nullptr;
  object->tp_flags |= Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE;
  PyType_Modified(object);
}

// Runs a loop of limits.h `runs` times on up to `threads` threads, on `elements` elements of data for each thread or
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
    run_team(probe->run, &call, threads, std::int64_t{10'000'000});
    results.emplace_back(std::chrono::duration<double>(Clock::now() - start).count(), call.threads);
  }
  return {work, results};
}

py::list cell_descriptions() {
  py::list cells;
  const KernelTable& table = *active().table;
  for (int i = 0; i < table.cell_count; ++i) {
    const CellEntry& cell = table.cells[i];
    py::dict one;
    one["name"] = cell.name;
    one["gates"] = cell.gates;
    one["states"] = cell.states;
    one["extras"] = cell.extras;
    one["projects"] = cell.projects;
    one["two_products"] = cell.two_products;
    cells.append(one);
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
           .def_property_readonly(
               "nbytes", [](const Saved& self) { return self.nbytes(); }, "Bytes of saved gates.")
           .def_property_readonly(
               "input_shape", [](const Saved& self) { return self.input_shape(); }, "Shape (T, B, I) of x."));

  seal(py::class_<Packed>(m, "Packed", "The weights of a stack, packed for the ISA that was active when it was made.",
                          py::is_final())
           .def("forward", &Packed::forward, py::arg("x"), py::arg("state"), py::arg("lengths"), py::arg("resets"),
                py::arg("masks"), py::arg("y"), py::arg("last"))
           .def("backward", &Packed::backward, py::arg("saved"), py::arg("dy"), py::arg("dlast"), py::arg("dx"),
                py::arg("dinitial"), py::arg("gradients"))
           .def_property_readonly("isa", [](const Packed& self) { return self.isa(); })
           .def_property_readonly("bias", [](const Packed& self) { return self.bias(); })
           .def_property_readonly("nbytes", [](const Packed& self) { return self.nbytes(); }));

  m.def("pack", &pack, py::arg("cell"), py::arg("dtype"), py::arg("input_size"), py::arg("hidden_size"),
        py::arg("proj_size"), py::arg("num_layers"), py::arg("directions"), py::arg("weights"), py::arg("training"));

  m.def("linear_forward", &linear_forward, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"));
  m.def("linear_backward", &linear_backward, py::arg("x"), py::arg("weight"), py::arg("dy"), py::arg("dx"),
        py::arg("dweight"), py::arg("dbias"));
  m.def("activation", &activation, py::arg("name"), py::arg("x"), "One of the kernels' activations, for tests.");
  m.def("measure", &measure, py::arg("name"), py::arg("cell"), py::arg("repeats"), py::arg("elements"),
        py::arg("threads"), py::arg("runs"), "Times a loop that only the machine limits, for rnnkern.bench.limits.");
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
      "lanes",
      [](const py::object& dtype) {
        return float_dtype(dtype).itemsize() == 4 ? active().table->lanes_f32 : active().table->lanes_f64;
      },
      py::arg("dtype"), "Elements of a vector of the ISA in use.");
  m.def("unknown_max_isa", &unknown_max_isa, "RNNKERN_MAX_ISA where it names no compiled ISA, else empty.");
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", [](int count) { set_num_threads(count); }, py::arg("count"));
  m.attr("compiler") = RNNKERN_COMPILER;
}
