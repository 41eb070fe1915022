// A stack of layers: its sizes, its packed weights and the kernels that run it. No Python: the binding and abi.cpp
// share it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "kernel_table.h"
#include "policy.h"
#include "sequences.h"
#include "system.h"
#include "team.h"

namespace rnnkern {

inline std::int64_t times(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) throw std::length_error("sizes: their product exceeds 2^63");
  return product;
}

inline const CellEntry& find_cell(const KernelTable& table, std::string_view name) {
  for (int i = 0; i < table.cell_count; ++i)
    if (name == table.cells[i].name) return table.cells[i];
  throw std::invalid_argument("cell: the compiled module has none named '" + std::string(name) + "'");
}

// One array for each state of the cell, h first; null where there is none.
using States = std::array<void*, kMaxStates>;

// What packed weights are stored in; states and sums are double with float64, else float.
enum class WeightFormat { float32, float64, bfloat16 };

// What a stack is, beside its weights.
struct Description {
  std::string_view cell;
  WeightFormat format;
  bool rounds;   // the operands of products to bfloat16
  bool engines;  // whether products of floats are a matrix engine's
  std::int64_t input_size, hidden_size, proj_size, num_layers;
  std::vector<bool> directions;  // of each: does it run in reverse?
};

// How products are made of weights of that format. `few`: layers of fewer units than lanes are the few kilobytes that
// narrow.h works on, as wide as states.
inline Products products_of(const KernelTable& table, WeightFormat format, bool rounds, bool engines, bool few) {
  if (format == WeightFormat::float64) return Products::float64;
  const bool narrow = format == WeightFormat::bfloat16 && !few;
  const Engine multiplies = few ? Engine::none : engine(table);
  if (!rounds) {
    if (narrow) return Products::bfloat16_weights;
    constexpr Products of_slices[] = {Products::float32,
                                      Products::float32,
                                      Products::emulated_sliced_tiles,
                                      Products::emulated_sliced_tiles_of_both,
                                      Products::sliced_tiles,
                                      Products::sliced_tiles_of_both};
    return engines ? of_slices[static_cast<int>(multiplies)] : Products::float32;
  }
  constexpr Products of_engines[] = {Products::rounded,
                                     Products::bfloat16_pairs,
                                     Products::emulated_bfloat16_tiles,
                                     Products::emulated_bfloat16_tiles,
                                     Products::bfloat16_tiles,
                                     Products::bfloat16_tiles};
  if (narrow && multiplies == Engine::none) return Products::rounded_bfloat16_weights;
  return of_engines[static_cast<int>(multiplies)];
}

class Network {
 public:
  Network(const Isa& isa, const Description& of)
      : entry_(find_cell(*isa.table, of.cell)),
        bytes_(of.format == WeightFormat::float64 ? 8 : 4),
        products_(products_of(*isa.table, of.format, of.rounds, of.engines,
                              of.hidden_size < isa.table->lanes_f32 && of.proj_size == 0)),
        kernels_(bytes_ == 8 ? entry_.f64 : entry_.f32),
        weight_bytes_(isa.table->weight_bytes(products_)),
        isa_(isa.name),
        inputs_(of.input_size),
        hidden_(of.hidden_size),
        outputs_(of.proj_size ? of.proj_size : of.hidden_size),
        projected_(of.proj_size != 0),
        layer_count_(static_cast<std::size_t>(of.num_layers)),
        reverse_(of.directions) {
    const auto limit = std::int64_t{1} << 31;
    const auto sizes = {inputs_, hidden_, outputs_, of.num_layers};
    if (std::ranges::any_of(sizes, [&](std::int64_t size) { return size < 1 || size >= limit; }))
      throw std::invalid_argument(
          "sizes: expected input_size, hidden_size, num_layers >= 1, proj_size >= 0, all < 2^31");
    if (projected_ && !entry_.projects)
      throw std::invalid_argument("proj_size: expected 0, since cell '" + std::string(of.cell) +
                                  "' takes no projection");
    if (projected_ && outputs_ >= hidden_)
      throw std::invalid_argument("proj_size: expected less than hidden_size " + std::to_string(hidden_) + ", got " +
                                  std::to_string(outputs_));
    if (reverse_.empty() || reverse_.size() > 2) throw std::invalid_argument("directions: expected one or two");
    width_ = outputs_ * static_cast<std::int64_t>(reverse_.size());
  }

  // Says where the packed weights lie, those of one layer-direction after the other. A call needs them.
  void place(void* packed, bool training) {
    for (std::size_t i = 0; i < layer_directions(); ++i) {
      Layer layer{};
      layer.sizes = sizes(i);
      layer.reverse = reverse_[i % reverse_.size()];
      layer.packed = packed;
      layers_.push_back(layer);
      packed = static_cast<char*>(packed) + packed_bytes(i, training);
    }
  }

  const CellEntry& entry() const { return entry_; }
  const CellKernels& kernels() const { return kernels_; }
  const char* isa() const { return isa_; }
  std::int64_t element_bytes() const { return bytes_; }
  const std::vector<Layer>& layers() const { return layers_; }  // with sizes, direction and packed weights alone
  LayerSizes sizes(std::size_t i) const {
    return {i < reverse_.size() ? inputs_ : width_, hidden_, outputs_, projected_};
  }
  std::int64_t input_size() const { return inputs_; }
  std::int64_t output_size() const { return width_; }
  std::size_t directions() const { return reverse_.size(); }
  std::size_t layer_count() const { return layer_count_; }
  std::size_t layer_directions() const { return layer_count_ * reverse_.size(); }
  std::size_t state_count() const { return static_cast<std::size_t>(entry_.states); }
  std::int64_t state_size(std::size_t s) const { return s == 0 ? outputs_ : hidden_; }

  // The packed weights of layer-direction i.
  std::int64_t packed_bytes(std::size_t i, bool training) const {
    return kernels_.packed_bytes(products_, sizes(i), training);
  }
  std::int64_t packed_bytes(bool training) const {
    std::int64_t total = 0;
    for (std::size_t i = 0; i < layer_directions(); ++i) total += packed_bytes(i, training);
    return total;
  }
  // Packs the weights of all layer-directions to where they are then placed.
  void pack(const std::vector<LayerWeights<const void*>>& weights, bool training, void* to) {
    place(to, training);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const std::int64_t bytes = packed_bytes(i, training);
      PackCall call{products_, sizes(i), weights[i], training, to};
      run_team(kernels_.pack, &call, divide_packing(bytes, num_threads()));
      to = static_cast<char*>(to) + bytes;
    }
  }

  // Arrays of the weights of a layer-direction: w_ih, w_hh, b_ih, b_hh, w_hr, extras, without those it does not have.
  std::size_t weight_count(bool biased) const {
    return 2 + (biased ? 2 : 0) + (projected_ ? 1 : 0) + static_cast<std::size_t>(entry_.extras);
  }
  template <class Pointer>
  LayerWeights<Pointer> weights_at(const Pointer* arrays, bool biased) const {
    LayerWeights<Pointer> weights{};
    weights.w_ih = *arrays++;
    weights.w_hh = *arrays++;
    if (biased) {
      weights.b_ih = *arrays++;
      weights.b_hh = *arrays++;
    }
    if (projected_) weights.w_hr = *arrays++;
    std::copy_n(arrays, entry_.extras, weights.extra);
    return weights;
  }

  // Of the output of a layer.
  std::int64_t output_bytes(std::int64_t rows) const { return times(times(rows, width_), bytes_); }

  // Arrays between the layers where nothing is kept: two take turns.
  std::size_t between_count() const { return std::min<std::size_t>(layer_count() - 1, 2); }
  std::int64_t between_bytes(const KernelCall& call) const {
    return times(static_cast<std::int64_t>(between_count()), output_bytes(call.rows));
  }
  // The second direction's gradient of a layer's input, where the two are worked on side by side in backward.
  std::int64_t aside_bytes(const KernelCall& call, std::int64_t given_rows) const {
    if (call.split != Split::layers || reverse_.size() == 1) return 0;
    const std::int64_t widest = layer_count() > 1 ? std::max(inputs_, width_) : inputs_;
    return times(times(given_rows, widest), bytes_);
  }

  // Of what layer-direction i saves for backward.
  std::int64_t saved_bytes(std::size_t i, const Sequences& rows, Save save) const {
    return times(times(rows.saved_count(), kernels_.saved_elements(sizes(i), rows.batch(), save)), bytes_);
  }
  // The rows of a step that lie together in it.
  std::int64_t saved_together(std::int64_t batch, Save save) const {
    return save == Save::nothing ? 1 : kernels_.row_grain(sizes(0), batch, save);
  }

  // Throws unless every sum of sizes of a call fits into 64 bits.
  void check_size(std::int64_t steps, std::int64_t batch) const {
    if (steps < 0 || batch < 0) throw std::invalid_argument("steps, batch: expected at least 0");
    times(times(steps, batch), times(times(1024, static_cast<std::int64_t>(layer_directions())),
                                     input_size() + hidden_ + width_ + std::int64_t{num_threads()}));
  }

  // Adds to a call its layers, from the lowest on that takes part, and how it is divided.
  Plan complete(KernelCall& call, const std::vector<Layer>& layers, bool backward, std::size_t lowest = 0) const {
    const std::size_t first = lowest * directions();
    const auto count = static_cast<std::int64_t>(layer_count() - lowest);
    if (call.masks) call.masks += lowest;
    const Plan plan = make_plan(
        {call.steps, call.batch, call.rows, sizes(first).inputs, hidden_, outputs_, count,
         static_cast<std::int64_t>(directions()), kernels_.row_grain(sizes(0), call.batch, call.save), entry_.gates,
         entry_.saved, num_threads(), bytes_, weight_bytes_, private_cache(), backward, call.masks != nullptr});
    call.products = products_;
    call.layer_count = static_cast<int>(count);
    call.directions = static_cast<int>(directions());
    call.layers = layers.data() + first;
    call.split = plan.split;
    call.block_steps = plan.block_steps;
    call.part_steps = plan.part_steps;
    call.max_threads = plan.threads;
    call.rows_together = plan.rows_together;
    return plan;
  }

  void* offset(void* data, std::int64_t elements) const { return static_cast<char*>(data) + elements * bytes_; }

  // In a (T, B, D*P): the columns of the direction of layer-direction i.
  void* columns(void* data, std::size_t i) const {
    return offset(data, static_cast<std::int64_t>(i % reverse_.size()) * outputs_);
  }

  // In states (L*D, B, ...): that of layer-direction i; null where there is none.
  void* state_of(const States& states, std::size_t s, std::size_t i, std::int64_t B) const {
    return states[s] ? offset(states[s], static_cast<std::int64_t>(i) * B * state_size(s)) : nullptr;
  }

 private:
  const CellEntry& entry_;
  const std::int64_t bytes_;  // of an element of a state
  const Products products_;
  const CellKernels& kernels_;
  const std::int64_t weight_bytes_;  // of a packed one
  const char* isa_;
  std::int64_t inputs_, hidden_, outputs_;
  bool projected_;
  std::size_t layer_count_;
  std::vector<bool> reverse_;  // of each direction
  std::int64_t width_ = 0;     // of y: D * P
  std::vector<Layer> layers_;
};

}  // namespace rnnkern
