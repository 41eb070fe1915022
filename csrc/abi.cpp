// The calls of rnnkern_abi.h. Sizes are checked; what the pointers point to is the caller's promise.
#include <rnnkern_abi.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "kernel_table.h"
#include "network.h"
#include "team.h"

namespace rnnkern::abi {
namespace {

Network network_of(const Stack& stack) {
  const Isa* isa = find_isa(stack.isa);
  if (isa == nullptr || !isa->supported)
    throw std::invalid_argument(std::string("isa: expected one that this CPU runs, got '") + stack.isa + "'");
  if (stack.element_bytes != 4 && stack.element_bytes != 8)
    throw std::invalid_argument("element_bytes: expected 4 or 8, got " + std::to_string(stack.element_bytes));
  if (stack.directions < 1 || stack.directions > 2) throw std::invalid_argument("directions: expected one or two");
  return Network(*isa, stack.cell, stack.element_bytes == 8 ? WeightFormat::float64 : WeightFormat::float32,
                 stack.input_size, stack.hidden_size, stack.proj_size, stack.num_layers,
                 std::vector<bool>(stack.reverse, stack.reverse + stack.directions));
}

void expect(const char* name, const char* what, std::int64_t got, std::int64_t expected) {
  if (got != expected)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) + " " + what + ", got " +
                                std::to_string(got));
}

void expect_weights(const char* name, const Network& network, const Stack& stack, const Arrays& arrays) {
  expect(name, "arrays", arrays.count,
         static_cast<std::int64_t>(network.layer_directions() * network.weight_count(stack.biased)));
}

States states_of(const char* name, const Network& network, const Arrays& arrays) {
  expect(name, "arrays", arrays.count, static_cast<std::int64_t>(network.state_count()));
  States states{};
  std::copy_n(arrays.data, arrays.count, states.begin());
  return states;
}

void* advance(void* data, std::int64_t bytes) { return static_cast<char*>(data) + bytes; }

// Asks for huge pages where large memory is about to be filled, as NumPy does for its arrays: what is allocated anew
// for each call costs a page fault every 4 KiB else.
void prefer_huge_pages([[maybe_unused]] const Memory& memory) {
#ifdef MADV_HUGEPAGE
  constexpr std::int64_t large = std::int64_t{4} << 20, page = 4096;
  if (memory.bytes < large) return;
  const std::int64_t skipped = -reinterpret_cast<std::intptr_t>(memory.data) & (page - 1);
  madvise(advance(memory.data, skipped), static_cast<std::size_t>(memory.bytes - skipped), MADV_HUGEPAGE);
#endif
}

// Working memory of a call.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) : data_(::operator new(static_cast<std::size_t>(bytes), kAlignment)) {
    prefer_huge_pages({data_.get(), bytes});
  }
  void* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<void, Free> data_;
};

// Tells a network where its packed weights lie, one layer-direction after the other.
void use_packed(Network& network, const Memory& packed, bool training) {
  expect("packed", "bytes", packed.bytes, network.packed_bytes(training));
  std::int64_t at = 0;
  for (std::size_t i = 0; i < network.layer_directions(); ++i) {
    network.add(advance(packed.data, at));
    at += network.packed_bytes(i, training);
  }
}

rnnkern::Stack rows_of(const Forward& call) {
  rnnkern::Stack rows{};
  rows.steps = call.steps;
  rows.batch = call.batch;
  rows.lengths = call.lengths;
  rows.resets = call.resets;
  if (call.lengths) Network::check_lengths(call.lengths, call.steps, call.batch);
  return rows;
}

// `kept`: what the steps of each layer-direction save, and then the outputs of all layers but the last.
Record record_of(const Network& network, const Forward& call) {
  const std::int64_t T = call.steps, B = call.batch;
  expect("kept", "bytes", call.kept.bytes, network.kept_bytes(T, B));
  Record record;
  std::int64_t at = 0;
  const auto take = [&](std::int64_t bytes) { return advance(call.kept.data, std::exchange(at, at + bytes)); };
  for (const Layer& one : network.layers()) {
    const std::int64_t bytes = network.saved_bytes(one.sizes, T, B);
    record.values.push_back(bytes > 0 ? take(bytes) : nullptr);
  }
  record.inputs.push_back(const_cast<void*>(call.x));
  for (std::size_t layer = 0; layer + 1 < network.layer_count(); ++layer) {
    record.outputs.push_back(take(network.output_bytes(T, B)));
    record.inputs.push_back(record.outputs.back());
  }
  record.outputs.push_back(call.y);
  return record;
}

void run(const Network& network, rnnkern::Stack& rows, const std::vector<Layer>& layers, bool backward) {
  const Plan plan = network.complete(rows, layers, backward);
  const Scratch scratch(network.kernels().scratch_bytes(rows, backward));
  rows.scratch = scratch.data();
  std::int64_t stop = 0;  // nothing polls, so that nothing stops it
  rows.stop = &stop;
  run_team(backward ? network.kernels().backward : network.kernels().forward, &rows, plan.threads, plan.expected_ns,
           Joining::at_places);
}

void pack_all(const Stack& stack, const Pack& call) {
  const Network network = network_of(stack);
  expect_weights("weights", network, stack, call.weights);
  expect("packed", "bytes", call.packed.bytes, network.packed_bytes(call.training));
  const std::size_t count = network.weight_count(stack.biased);
  prefer_huge_pages(call.packed);
  std::int64_t at = 0;
  for (std::size_t i = 0; i < network.layer_directions(); ++i) {
    const std::vector<const void*> arrays(call.weights.data + i * count, call.weights.data + (i + 1) * count);
    const auto weights = network.weights_at(arrays.data(), stack.biased);
    network.pack(i, weights, call.training, advance(call.packed.data, at));
    at += network.packed_bytes(i, call.training);
  }
}

void run_forward(const Stack& stack, const Forward& call) {
  Network network = network_of(stack);
  network.check_size(call.steps, call.batch);
  use_packed(network, call.packed, call.training);
  rnnkern::Stack rows = rows_of(call);
  const States initial = states_of("initial", network, call.initial), last = states_of("last", network, call.last);
  prefer_huge_pages({call.y, network.output_bytes(call.steps, call.batch)});
  if (call.training) prefer_huge_pages(call.kept);
  const Scratch between(call.training ? 0 : network.between_bytes(rows));
  std::vector<Layer> layers;
  if (call.training) {
    layers = network.recorded(call.batch, record_of(network, call), initial, last);
  } else {
    layers = network.layers();
    network.connect(layers, rows, call.x, call.y, initial, last, between.data());
  }
  run(network, rows, layers, false);
}

void run_backward(const Stack& stack, const Backward& call) {
  const Forward& forward = *call.forward;
  Network network = network_of(stack);
  network.check_size(forward.steps, forward.batch);
  use_packed(network, forward.packed, true);
  expect_weights("gradients", network, stack, call.gradients);
  rnnkern::Stack rows = rows_of(forward);
  std::vector<LayerWeights<void*>> gradients;
  for (std::size_t i = 0; i < network.layer_directions(); ++i)
    gradients.push_back(network.weights_at(call.gradients.data + i * network.weight_count(stack.biased), stack.biased));
  const Scratch between(network.between_bytes(rows));
  void* const turns[2] = {between.data(), advance(between.data(), network.output_bytes(forward.steps, forward.batch))};
  const std::vector<Layer> layers =
      network.retraced(forward.batch, record_of(network, forward), states_of("initial", network, forward.initial),
                       const_cast<void*>(call.dy), call.dx, turns, states_of("dlast", network, call.dlast),
                       states_of("dinitial", network, call.dinitial), gradients);
  run(network, rows, layers, true);
}

template <class Call, void (*function)(const Stack&, const Call&)>
bool guarded(const Stack& stack, const Call& call, Message& message) noexcept {
  try {
    function(stack, call);
    return true;
  } catch (const std::bad_alloc&) {
    std::snprintf(message.text, sizeof message.text, "not enough memory");
  } catch (const std::exception& error) {
    std::snprintf(message.text, sizeof message.text, "%s", error.what());
  }
  return false;
}

constexpr Functions kFunctions{guarded<Pack, pack_all>, guarded<Forward, run_forward>, guarded<Backward, run_backward>};

}  // namespace
}  // namespace rnnkern::abi

extern "C" [[gnu::visibility("default")]] const rnnkern::abi::Functions* rnnkern_abi(int version) {
  return version == rnnkern::abi::kVersion ? &rnnkern::abi::kFunctions : nullptr;
}
