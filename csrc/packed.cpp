#include "packed.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "dispatch.h"
#include "gil.h"
#include "kernel_table.h"
#include "team.h"

namespace rnnkern {
namespace {

// The elements of a state; None is None for each.
std::vector<py::object> state_elements(const py::object& state, const char* name, std::size_t count) {
  return state.is_none() ? std::vector<py::object>(count, py::none()) : elements(state, name, count);
}

Save save_of(const py::object& name) {
  if (name.is_none()) return Save::nothing;
  if (!py::isinstance<py::str>(name)) throw py::type_error("save: expected None or a string");
  if (PyUnicode_CompareWithASCIIString(name.ptr(), "gates") == 0) return Save::gates;
  if (PyUnicode_CompareWithASCIIString(name.ptr(), "outputs") == 0) return Save::outputs;
  throw py::value_error("save: expected None, 'gates' or 'outputs'");
}

// The shape of an array of a call, of its rows with `width` elements each, or 0: of one number; and of several such.
Shape shape_of(const Saved& saved, std::int64_t width = 0, std::int64_t several = 0) {
  Shape shape{};
  if (several > 0) shape.sizes[shape.count++] = several;
  for (const std::int64_t size : saved.leading) shape.sizes[shape.count++] = size;
  if (width > 0) shape.sizes[shape.count++] = width;
  return shape;
}

}  // namespace

void PythonHost::launch(Task task, KernelCall& call, const Plan& plan) {
  std::int64_t stop = 0;
  call.stop = &stop;
  if (plan.expected_ns < kKeepsGil) {
    call.poll = nullptr;
    run_team(task, &call, plan);
    return;
  }
  {
    WithoutGil gil;
    call.poll = WithoutGil::poll;
    call.poll_context = &gil;
    run_team(task, &call, plan);
  }
  if (stop != 0) throw py::error_already_set();
}

py::tuple tuple_of(const std::vector<py::array>& arrays) {
  py::tuple tuple(arrays.size());
  for (std::size_t i = 0; i < arrays.size(); ++i) tuple[i] = arrays[i];
  return tuple;
}

WeightFormat format_of(const std::string& name) {
  if (name == "float32") return WeightFormat::float32;
  if (name == "float64") return WeightFormat::float64;
  if (name == "bfloat16") return WeightFormat::bfloat16;
  throw py::value_error(std::string("format: expected float32, float64 or bfloat16, got ").append(name));
}

Packed::Packed(const Description& of, const py::tuple& names, const py::object& weights, bool training,
               const py::object& reserve)
    : Network(active(), of),
      dtype_(element_bytes() == 8 ? py::dtype::of<double>() : py::dtype::of<float>()),
      training_(training),
      names_(names),
      biased_(names.size() == weight_count(true)),
      reserve_(reserve),
      packed_(reserve, Reserve::packed, Network::packed_bytes(training)) {
  if (names.size() != weight_count(biased_) || !std::ranges::all_of(names, py::isinstance<py::str>))
    throw py::value_error("names: expected " + std::to_string(weight_count(biased_)) + " strings");
  if (training && of.format == WeightFormat::bfloat16)
    throw py::value_error("format: expected float32 or float64 for training, got bfloat16");
  const auto arrays = elements_of(weights, "weights");
  std::vector<LayerWeights<const void*>> given;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    const std::vector<Shape> shapes = weight_shapes(i);
    std::vector<const void*> data;
    for (std::size_t k = 0; k < shapes.size(); ++k) {
      if (!arrays[i][k])
        throw py::value_error(Name{"weights", i}.text() + ": expected an array named " +
                              std::string(py::repr(names_[k])) + ", got none");
      data.push_back(bytes_of(checked(arrays[i][k], {"weights", i, k}, dtype_, shapes[k])));
    }
    given.push_back(weights_at(data.data(), biased_));
  }
  std::optional<WithoutGil> gil;
  if (packing_ns(Network::packed_bytes(training)) >= kKeepsGil) gil.emplace();
  pack(given, training, packed_.buffer().data);
}

// The arrays of a dict for each layer-direction, in the order of names_; null where a dict has none.
std::vector<std::vector<py::object>> Packed::elements_of(const py::object& dicts, const char* name) const {
  std::vector<std::vector<py::object>> all;
  for (const py::object& one : elements(dicts, name, layer_directions())) {
    if (!py::isinstance<py::dict>(one))
      throw py::type_error(Name{name, all.size()}.text() + ": expected a dict of arrays");
    const auto dict = py::reinterpret_borrow<py::dict>(one);
    if (dict.size() > names_.size())
      throw py::value_error(Name{name, all.size()}.text() + ": expected at most " + std::to_string(names_.size()) +
                            " arrays");
    auto& arrays = all.emplace_back();
    for (const py::handle key : names_) arrays.push_back(value_of(dict, key));
  }
  return all;
}

// Of the weights of layer-direction i, in the order of LayerWeights.
std::vector<Shape> Packed::weight_shapes(std::size_t i) const {
  const LayerSizes of = sizes(i);
  const std::int64_t rows = times(entry().gates, of.hidden);
  std::vector<Shape> shapes{{rows, of.inputs}, {rows, of.outputs}};
  shapes.reserve(weight_count(biased_));
  if (biased_) shapes.insert(shapes.end(), 2, Shape{rows});
  if (of.projected) shapes.push_back({of.outputs, of.hidden});
  shapes.insert(shapes.end(), static_cast<std::size_t>(entry().extras), Shape{of.hidden});
  return shapes;
}

std::vector<py::array> Packed::new_states(std::int64_t B) const {
  std::vector<py::array> arrays;
  arrays.reserve(state_count());
  for (std::size_t s = 0; s < state_count(); ++s) arrays.push_back(new_array(dtype_, state_shape(s, B)));
  return arrays;
}

std::vector<py::object> Packed::checked_states(const std::vector<py::object>& given, const char* name,
                                               std::int64_t B) const {
  std::vector<py::object> arrays;
  arrays.reserve(given.size());
  for (std::size_t s = 0; s < given.size(); ++s)
    arrays.push_back(given[s].is_none() ? given[s] : checked(given[s], {name, s}, dtype_, state_shape(s, B)));
  return arrays;
}

// The rows of a call on x with these sizes but the last, of what is given.
Sequences Packed::rows_of(const std::vector<std::int64_t>& leading, const py::object& lengths,
                          const py::object& offsets, const py::object& sizes, Save save) const {
  const auto integers = [](const py::object& array, const char* name, std::int64_t count) {
    return static_cast<const std::int64_t*>(bytes_of(checked(array, name, py::dtype::of<std::int64_t>(), {count})));
  };
  const auto count_of = [](const py::object& array) -> std::int64_t {
    return py::isinstance<py::array>(array) && fields_of(array).nd == 1 ? fields_of(array).dimensions[0] : 1;
  };
  const std::int64_t first = leading[0];
  if (leading.size() == 2) {
    const std::int64_t batch = leading[1], together = saved_together(batch, save);
    if (!offsets.is_none() || !sizes.is_none()) throw py::value_error("x: expected 2 dimensions with offsets or sizes");
    if (lengths.is_none()) return {first, batch, together};
    return Sequences::padded(integers(lengths, "lengths", batch), first, batch, together);
  }
  if (!lengths.is_none() || offsets.is_none() == sizes.is_none())
    throw py::value_error("x: expected 3 dimensions (T, B, I), or 2 with either offsets or sizes");
  if (offsets.is_none()) {
    const std::int64_t steps = count_of(sizes);
    const std::int64_t* const given = integers(sizes, "sizes", steps);
    return Sequences::sorted(given, steps, first, saved_together(steps ? given[0] : 0, save));
  }
  const std::int64_t batch = std::max<std::int64_t>(count_of(offsets) - 1, 0);
  return Sequences::packed(integers(offsets, "offsets", batch + 1), batch, first, saved_together(batch, save));
}

// What `saved` refers to and the caller holds too is what the kernels need: its shape may be set at any time.
void Packed::check(const Saved& saved) const {
  checked(saved.x, "x", dtype_, shape_of(saved, input_size()));
  checked(saved.y, "y", dtype_, shape_of(saved, output_size()));
  if (!saved.resets.is_none()) checked(saved.resets, "resets", py::dtype::of<bool>(), shape_of(saved));
  for (std::size_t i = 0; i < saved.masks.size(); ++i)
    checked(saved.masks[i], {"masks", i}, dtype_, shape_of(saved, output_size()));
}

ForwardCall Packed::call_of(const Saved& saved, std::vector<const void*>& masks) const {
  for (const auto& one : saved.masks) masks.push_back(bytes_of(one));
  ForwardCall call{};
  call.rows = &saved.rows;
  if (!saved.resets.is_none()) call.resets = static_cast<const std::uint8_t*>(bytes_of(saved.resets));
  if (!masks.empty()) call.masks = masks.data();
  call.x = bytes_of(saved.x), call.y = bytes_of(saved.y);
  call.initial = bytes_of(saved.initial);
  call.save = saved.save;
  if (saved.kept) call.kept = saved.kept->buffer().data;
  return call;
}

Packed::Request Packed::request_of(const py::object& fields) {
  Request request;
  std::ranges::move(elements(fields, "request", request.size()), request.begin());
  return request;
}

py::tuple Packed::forward(const Request& request) const {
  const auto& [x, state, y, save, lengths, resets, masks, reserve, offsets, sizes] = request;
  const auto initial = state_elements(state, "state", state_count());
  Saved saved;
  saved.packed_id = id_;
  saved.save = save_of(save);
  const bool keeps = saved.save != Save::nothing;
  if (!masks.is_none()) saved.masks = elements(masks, "masks", layer_count() - 1);
  if (!training_ && keeps) throw py::value_error("save: expected None with weights that were not packed for training");
  if (!keeps && !saved.masks.empty()) throw py::value_error("masks: expected None where nothing is saved");
  if (!py::isinstance<py::array>(x))
    throw py::type_error("x: expected an array of shape (T, B, " + std::to_string(input_size()) + ")");
  const auto& given = fields_of(x);
  if (given.nd != 3 && given.nd != 2)
    throw py::value_error("x: expected 3 dimensions (T, B, I), got " + std::to_string(given.nd));
  saved.leading.assign(given.dimensions, given.dimensions + given.nd - 1);
  saved.x = x, saved.resets = resets, saved.y = y;
  check(saved);
  checked(y, "y", dtype_, shape_of(saved, output_size()), true);
  saved.rows = rows_of(saved.leading, lengths, offsets, sizes, saved.save);
  const std::int64_t B = saved.rows.batch();
  saved.initial = checked_states(initial, "state", B);
  const std::vector<py::array> last = new_states(B);
  if (keeps) {
    // The tape must not see what the caller does to its state later.
    for (std::size_t s = 0; s < state_count(); ++s)
      if (!saved.initial[s].is_none()) saved.initial[s] = copy_of(saved.initial[s], dtype_, state_shape(s, B));
    if (const std::int64_t bytes = kept_bytes(*this, saved.rows, saved.save, !saved.masks.empty()); bytes > 0)
      saved.kept.emplace(reserve_, Reserve::saved, bytes);
  }
  std::vector<const void*> mask_data;
  ForwardCall call = call_of(saved, mask_data);
  call.last = bytes_of(last);
  run<PythonHost>(*this, call);
  return py::make_tuple(tuple_of(last), keeps ? py::cast(std::move(saved)) : py::none());
}

py::tuple Packed::backward(const Saved& saved, const py::object& dy, const py::object& dlast, bool need_x,
                           bool need_state, const py::object& gradients, const GivenBound& bound,
                           const GivenSaturated& saturated, const py::object& flow, const py::object& dx_sum) const {
  if (saved.packed_id != id_) throw py::value_error("saved: expected what forward of these weights returned");
  BackwardCall slopes{};
  slopes.watch = watch_of(bound, saturated);
  const auto given_dlast = state_elements(dlast, "dlast", state_count());
  auto arrays = elements_of(gradients, "gradients");
  const auto flows = slopes.watch.flow ? elements(flow, "flow", layer_directions()) : std::vector<py::object>();
  check(saved);
  const std::int64_t B = saved.rows.batch();
  slopes.dy = dy.is_none() ? nullptr : bytes_of(checked(dy, "dy", dtype_, shape_of(saved, output_size())));
  slopes.dlast = bytes_of(checked_states(given_dlast, "dlast", B));
  const Shape dx_shape = shape_of(saved, input_size());
  py::object dx = py::none();
  if (need_x) dx = dx_sum.is_none() ? new_array(dtype_, dx_shape) : checked(dx_sum, "dx", dtype_, dx_shape, true);
  slopes.dx = need_x ? bytes_of(dx) : nullptr, slopes.add_to_dx = !dx_sum.is_none();
  const std::vector<py::array> dinitial = need_state ? new_states(B) : std::vector<py::array>{};
  slopes.dinitial = bytes_of(dinitial);
  for (std::size_t i = 0; i < flows.size(); ++i)
    slopes.flow.push_back(
        bytes_of(checked(flows[i], {"flow", i}, dtype_, shape_of(saved, 0, entry().states + entry().gates), true)));
  for (std::size_t i = 0; i < arrays.size(); ++i) slopes.gradients.push_back(gradients_of(arrays[i], i));
  std::vector<const void*> mask_data;
  run<PythonHost>(*this, call_of(saved, mask_data), &slopes);
  py::list found;
  for (const auto& of_layer : arrays) {
    py::dict dict;
    for (std::size_t k = 0; k < of_layer.size(); ++k)
      if (of_layer[k]) dict[names_[k]] = of_layer[k];
    found.append(std::move(dict));
  }
  return py::make_tuple(dx, tuple_of(dinitial), found);
}

// Where the gradients of layer-direction i are added; puts zeros in place of None.
LayerWeights<void*> Packed::gradients_of(std::vector<py::object>& arrays, std::size_t i) const {
  const std::vector<Shape> shapes = weight_shapes(i);
  std::vector<void*> data;
  for (std::size_t k = 0; k < arrays.size(); ++k) {
    if (arrays[k] && arrays[k].is_none()) {
      arrays[k] = new_array(dtype_, shapes[k]);
      fill_with_zeros(arrays[k]);
    }
    data.push_back(arrays[k] ? bytes_of(checked(arrays[k], {"gradients", i, k}, dtype_, shapes[k], true)) : nullptr);
  }
  return weights_at(data.data(), biased_);
}

Watch Packed::watch_of(const GivenBound& bound, const GivenSaturated& saturated) const {
  Watch watch{};
  if (bound) {
    if (bound->first != "norm" && bound->first != "value")
      throw py::value_error("bound: expected 'norm' or 'value', got '" + bound->first + "'");
    watch.bound = bound->first == "norm" ? Bound::norm : Bound::value, watch.most = bound->second;
  }
  if (!saturated) return watch;
  if (saturated->size() != static_cast<std::size_t>(entry().gates))
    throw py::value_error("saturated: expected two bounds for each of " + std::to_string(entry().gates) + " gates");
  watch.flow = true;
  for (std::size_t gate = 0; gate < saturated->size(); ++gate)
    std::tie(watch.low[gate], watch.high[gate]) = (*saturated)[gate];
  return watch;
}

py::dict Packed::plan(std::int64_t steps, std::int64_t batch, const py::object& save, bool backward,
                      const py::object& offsets) const {
  if (!training_) throw py::value_error("plan: expected weights that were packed for training");
  KernelCall call{};
  call.save = save_of(save);
  check_size(steps, batch);
  const Sequences rows = offsets.is_none() ? Sequences(steps, batch, saved_together(batch, call.save))
                                           : rows_of({steps}, py::none(), offsets, py::none(), call.save);
  const std::int64_t kept = kept_bytes(*this, rows, call.save, false);
  rows.describe(call);
  std::vector<Layer> layers = this->layers();
  for (std::size_t i = 0; i < layers.size(); ++i)
    if (saved_bytes(i, rows, call.save) > 0) layers[i].saved = &layers[i];  // forward works in it instead of in scratch
  const Plan plan = complete(call, layers, backward);
  std::int64_t scratch = kernels().scratch_bytes(call, backward);
  if (backward || call.save == Save::nothing) scratch += between_bytes(call);
  if (backward) scratch += aside_bytes(call, rows.given_count());
  constexpr const char *splits[] = {"rows", "units", "layers"},
                       *reasons[] = {"cache", "weights", "gradients", "joining", "layers", "call"};
  using namespace py::literals;
  return py::dict("threads"_a = plan.threads, "split"_a = splits[static_cast<int>(plan.split)],
                  "block_steps"_a = plan.block_steps, "block_reason"_a = reasons[static_cast<int>(plan.reason)],
                  "kept"_a = backward || kept == 0 ? 0 : Buffer::with_room(kept),
                  "scratch"_a = Scratch::beside_stack(scratch));
}

}  // namespace rnnkern
