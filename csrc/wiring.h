// One call of a stack over plain memory, and where each of its layer-directions finds its rows, states and weights in
// it. The binding and abi.cpp share it: they differ in whose memory the kernels work in, and in how they are waited
// for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "kernel_table.h"
#include "network.h"
#include "policy.h"
#include "sequences.h"

namespace rnnkern {

// Shapes are those of docs/conventions.md.
struct ForwardCall {
  const Sequences* rows;       // where x, y and their gradients, resets and masks have the rows of the call
  const std::uint8_t* resets;  // one for each row, null: none
  const void* const* masks;    // [L-1] of rows of D*P, dropout scale of each output; null: no dropout
  const void* x;
  States initial;  // null in place of one: zeros
  void* y;
  States last;
  Save save;   // something only with weights that were packed for training
  void* kept;  // kept_bytes() for backward, best aligned to 64 bytes
};

struct BackwardCall {
  const void* dy;                              // null: zeros
  States dlast;                                // null in place of one: zeros
  void* dx;                                    // null: not wanted
  bool add_to_dx;                              // to what is there
  States dinitial;                             // null: not wanted, all or none
  std::vector<LayerWeights<void*>> gradients;  // of each layer-direction; null: not wanted; else zeroed by the caller
  Watch watch;
  std::vector<void*> flow;  // of each layer-direction, as watch.flow says
};

// Hands out the parts of `kept`: what the steps of each layer-direction save, the output of each layer but the last,
// and with dropout that output times its mask.
class Kept {
 public:
  Kept(const Network& network, const Sequences& rows, Save save, bool masked, void* data)
      : output_bytes_(aligned(network.output_bytes(rows.count()))), data_(static_cast<char*>(data)) {
    for (std::size_t i = 0; i < network.layer_directions(); ++i) {
      saved_.push_back(bytes_);
      bytes_ += aligned(network.saved_bytes(i, rows, save));
    }
    saved_.push_back(bytes_);
    outputs_ = bytes_, masked_ = bytes_ + between(network) * output_bytes_;
    bytes_ = masked ? masked_ + between(network) * output_bytes_ : masked_;
  }

  std::int64_t bytes() const { return bytes_; }
  void* saved(std::size_t i) const { return saved_[i] < saved_[i + 1] ? data_ + saved_[i] : nullptr; }
  void* output(std::size_t layer) const { return at(outputs_, layer); }
  void* masked(std::size_t layer) const { return at(masked_, layer); }

 private:
  static std::int64_t aligned(std::int64_t bytes) { return (bytes + 63) & ~std::int64_t{63}; }
  static std::int64_t between(const Network& network) { return static_cast<std::int64_t>(network.layer_count()) - 1; }
  void* at(std::int64_t start, std::size_t layer) const {
    return data_ + start + static_cast<std::int64_t>(layer) * output_bytes_;
  }

  std::int64_t output_bytes_, outputs_ = 0, masked_ = 0, bytes_ = 0;
  std::vector<std::int64_t> saved_;  // where what each layer-direction saves begins, and where the last ends
  char* data_;
};

// The bytes of what a training forward leaves for its backward.
inline std::int64_t kept_bytes(const Network& network, const Sequences& rows, Save save, bool masked) {
  return Kept(network, rows, save, masked, nullptr).bytes();
}

// Says where each layer-direction of a forward finds its rows and states: y of a layer is x of the one above. Without
// `kept` the outputs of the layers below the last take turns in `between`.
inline void connect(const Network& network, std::vector<Layer>& layers, const ForwardCall& call, const Kept* kept,
                    void* between) {
  const std::int64_t width = network.output_size();
  const auto output = [&](std::size_t layer) {
    if (layer + 1 == network.layer_count()) return call.y;
    if (kept) return kept->output(layer);
    return network.offset(between, layer % 2 ? call.rows->count() * width : 0);
  };
  const RowMap given = call.rows->given(), rows = call.rows->kept();
  for (std::size_t i = 0; i < layers.size(); ++i) {
    Layer& one = layers[i];
    const std::size_t layer = i / network.directions();
    one.x = layer == 0 ? call.x : call.masks ? kept->masked(layer - 1) : output(layer - 1);
    one.x_stride = one.sizes.inputs;
    one.x_rows = layer == 0 ? given : rows;
    one.y_rows = layer + 1 == network.layer_count() ? given : rows;
    one.y = network.columns(output(layer), i);
    one.y_stride = width;
    one.saved = kept ? kept->saved(i) : nullptr;
    for (std::size_t s = 0; s < network.state_count(); ++s) {
      one.initial[s] = network.state_of(call.initial, s, i, call.rows->batch());
      one.last[s] = network.state_of(call.last, s, i, call.rows->batch());
    }
  }
}

// Returns the lowest layer of which a gradient is wanted, or what is measured on its way, below which none takes part;
// the number of layers where none is.
inline std::size_t lowest_wanted(const Network& network, const BackwardCall& slopes) {
  if (slopes.dx || slopes.dinitial[0] || slopes.watch.flow) return 0;
  const auto found = std::ranges::find_if(slopes.gradients, [](const LayerWeights<void*>& to) {
    return to.w_ih || to.w_hh || to.b_ih || to.b_hh || to.w_hr || std::ranges::any_of(to.extra, std::identity{});
  });
  return static_cast<std::size_t>(found - slopes.gradients.begin()) / network.directions();
}

// Adds where each layer-direction of a backward, from the lowest layer on that takes part, finds its gradients. Between
// layers the gradient of one layer's input is that of the output below it; these take turns in `between`. Behind them,
// where directions are worked on side by side, is the second one's gradient, which is added to that of the first in the
// end.
inline void connect(const Network& network, std::vector<Layer>& layers, const ForwardCall& call,
                    const BackwardCall& slopes, std::size_t lowest, void* between, void* aside) {
  const std::int64_t width = network.output_size();
  const auto input_gradient = [&](std::size_t layer) {
    return layer == lowest ? slopes.dx : network.offset(between, layer % 2 ? 0 : call.rows->count() * width);
  };
  for (std::size_t i = lowest * network.directions(); i < layers.size(); ++i) {
    Layer& one = layers[i];
    const std::size_t layer = i / network.directions();
    const void* dy = layer + 1 == network.layer_count() ? slopes.dy : input_gradient(layer + 1);
    one.dy = dy ? network.columns(const_cast<void*>(dy), i) : nullptr;
    one.dy_stride = width;
    one.dx = input_gradient(layer);
    one.add_to_dx = i % network.directions() > 0 || (layer == lowest && slopes.add_to_dx);
    if (i % network.directions() > 0 && one.dx && aside) one.dx = aside, one.add_to_dx = false;
    one.gradients = slopes.gradients[i];
    one.flow = slopes.watch.flow ? slopes.flow[i] : nullptr;
    for (std::size_t s = 0; s < network.state_count(); ++s) {
      one.dlast[s] = network.state_of(slopes.dlast, s, i, call.rows->batch());
      one.dinitial[s] = network.state_of(slopes.dinitial, s, i, call.rows->batch());
    }
  }
}

// Runs a forward, or with `slopes` the backward of one that has run. A Host has the memory to work in, Scratch, and
// launch(task, stack, plan), which fills in who is asked whether to give up.
template <class Host>
void run(const Network& network, const ForwardCall& call, const BackwardCall* slopes = nullptr) {
  std::vector<Layer> layers = network.layers();
  std::optional<Kept> kept;
  std::vector<void*> masked;
  if (call.save != Save::nothing) {
    kept.emplace(network, *call.rows, call.save, call.masks != nullptr, call.kept);
    for (std::size_t i = 0; i < layers.size(); ++i) layers[i].saved = kept->saved(i);
    for (std::size_t layer = 0; call.masks && layer + 1 < network.layer_count(); ++layer)
      masked.push_back(kept->masked(layer));
  }
  const bool backward = slopes != nullptr;
  const std::size_t lowest = backward ? lowest_wanted(network, *slopes) : 0;
  if (lowest == network.layer_count()) return;
  KernelCall kernel_call{};
  call.rows->describe(kernel_call);
  kernel_call.resets = call.resets;
  kernel_call.masks = call.masks, kernel_call.masked = masked.data();
  kernel_call.save = call.save;
  if (backward) kernel_call.watch = slopes->watch;
  const Plan plan = network.complete(kernel_call, layers, backward, lowest);
  const std::int64_t own = network.kernels().scratch_bytes(kernel_call, backward);
  const std::int64_t between_bytes = kept && !backward ? 0 : network.between_bytes(kernel_call);
  const std::int64_t aside_bytes = backward ? network.aside_bytes(kernel_call, call.rows->given_count()) : 0;
  const typename Host::Scratch scratch(own + between_bytes + aside_bytes);
  char* const between = static_cast<char*>(scratch.data()) + own;
  connect(network, layers, call, kept ? &*kept : nullptr, between);
  if (backward)
    connect(network, layers, call, *slopes, lowest, between, aside_bytes ? between + between_bytes : nullptr);
  std::vector<std::int64_t> progress(plan.split == Split::layers ? layers.size() + 1 : 0);
  if (!progress.empty()) kernel_call.progress = progress.data();
  kernel_call.scratch = scratch.data();
  Host::launch(backward ? network.kernels().backward : network.kernels().forward, kernel_call, plan);
}

}  // namespace rnnkern
