// The calls of rnnkern_abi.h. Sizes are checked; what the pointers point to is the caller's promise.
#include <rnnkern_abi.h>
#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

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
#include "wiring.h"

namespace rnnkern {
namespace {

Network network_of(const rnnkern_stack& stack) {
  const Isa* isa = stack.isa ? find_isa(stack.isa) : &active();
  if (isa == nullptr || !isa->supported)
    throw std::invalid_argument(std::string("isa: expected one that this CPU runs, got '") + stack.isa + "'");
  if (stack.cell == nullptr) throw std::invalid_argument("cell: expected a name, got null");
  if (stack.element_bytes != 4 && stack.element_bytes != 8)
    throw std::invalid_argument("element_bytes: expected 4 or 8, got " + std::to_string(stack.element_bytes));
  if (stack.rounds && stack.element_bytes != 4)
    throw std::invalid_argument("rounds: expected false with element_bytes 8");
  if (stack.engines && (stack.element_bytes != 4 || stack.rounds))
    throw std::invalid_argument("engines: expected false with element_bytes 8, and with rounds");
  if (stack.directions < 1 || stack.directions > 2) throw std::invalid_argument("directions: expected one or two");
  return Network(*isa, {stack.cell, stack.element_bytes == 8 ? WeightFormat::float64 : WeightFormat::float32,
                        stack.rounds, stack.engines, stack.input_size, stack.hidden_size, stack.proj_size,
                        stack.num_layers, std::vector<bool>(stack.reverse, stack.reverse + stack.directions)});
}

void expect(const char* name, const char* what, std::int64_t got, std::int64_t expected) {
  if (got != expected)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) + " " + what + ", got " +
                                std::to_string(got));
}

std::int64_t weights_of(const Network& network, const rnnkern_stack& stack) {
  return static_cast<std::int64_t>(network.layer_directions() * network.weight_count(stack.biased));
}

States states_of(const char* name, const Network& network, const rnnkern_arrays& arrays) {
  expect(name, "arrays", arrays.count, static_cast<std::int64_t>(network.state_count()));
  States states{};
  std::copy_n(arrays.data, arrays.count, states.begin());
  return states;
}

void* advance(void* data, std::int64_t bytes) { return static_cast<char*>(data) + bytes; }

// Asks for huge pages where large memory is about to be filled, as NumPy does for its arrays: what is allocated anew
// for each call costs a page fault every 4 KiB else.
void prefer_huge_pages([[maybe_unused]] const rnnkern_memory& memory) {
#ifdef MADV_HUGEPAGE
  constexpr std::int64_t large = std::int64_t{4} << 20, page = 4096;
  if (memory.bytes < large) return;
  const std::int64_t skipped = -reinterpret_cast<std::intptr_t>(memory.data) & (page - 1);
  madvise(advance(memory.data, skipped), static_cast<std::size_t>(memory.bytes - skipped), MADV_HUGEPAGE);
#endif
}

// Runs calls in memory of its own. Nothing polls, so that nothing stops one.
struct Host {
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

  static void launch(Task task, KernelCall& call, const Plan& plan) {
    std::int64_t stop = 0;
    call.stop = &stop;
    run_team(task, &call, plan);
  }
};

// A forward that has been checked, with the network that it runs on.
struct Checked {
  Network network;
  Sequences rows{0, 0};
  ForwardCall call;

  Checked(const Checked&) = delete;
  Checked& operator=(const Checked&) = delete;

  Checked(const rnnkern_stack& stack, const rnnkern_forward& given) : network(network_of(stack)), call{} {
    network.check_size(given.steps, given.batch);
    const Save save = given.training ? Save::gates : Save::nothing;
    const std::int64_t together = network.saved_together(given.batch, save);
    const Sequences whole(given.steps, given.batch, together);
    rows = given.lengths ? Sequences::padded(given.lengths, given.steps, given.batch, together) : whole;
    expect("packed", "bytes", given.packed.bytes, network.packed_bytes(given.training));
    network.place(given.packed.data, given.training);
    if (given.masks && !given.training) throw std::invalid_argument("masks: expected null in inference");
    if (given.training)
      expect("kept", "bytes", given.kept.bytes, kept_bytes(network, whole, Save::gates, given.masks != nullptr));
    call.rows = &rows, call.resets = given.resets, call.masks = given.masks;
    call.x = given.x, call.y = given.y;
    call.initial = states_of("initial", network, given.initial);
    call.save = save, call.kept = given.kept.data;
  }
};

void find_sizes(const rnnkern_stack& stack, std::int64_t steps, std::int64_t batch, rnnkern_sizes* sizes) {
  const Network network = network_of(stack);
  sizes->states = static_cast<std::int64_t>(network.state_count());
  sizes->weights = weights_of(network, stack);
  sizes->packed_for_inference = network.packed_bytes(false);
  sizes->packed_for_training = network.packed_bytes(true);
  network.check_size(steps, batch);
  const Sequences rows(steps, batch, network.saved_together(batch, Save::gates));
  sizes->kept = kept_bytes(network, rows, Save::gates, false);
  sizes->kept_with_masks = kept_bytes(network, rows, Save::gates, true);
}

void pack_all(const rnnkern_stack& stack, const rnnkern_pack* call) {
  Network network = network_of(stack);
  expect("weights", "arrays", call->weights.count, weights_of(network, stack));
  expect("packed", "bytes", call->packed.bytes, network.packed_bytes(call->training));
  prefer_huge_pages(call->packed);
  const std::vector<const void*> arrays(call->weights.data, call->weights.data + call->weights.count);
  std::vector<LayerWeights<const void*>> weights;
  for (std::size_t i = 0; i < network.layer_directions(); ++i)
    weights.push_back(network.weights_at(arrays.data() + i * network.weight_count(stack.biased), stack.biased));
  network.pack(weights, call->training, call->packed.data);
}

void run_forward(const rnnkern_stack& stack, const rnnkern_forward* given) {
  Checked checked(stack, *given);
  checked.call.last = states_of("last", checked.network, given->last);
  prefer_huge_pages({given->y, checked.network.output_bytes(checked.rows.given_count())});
  if (given->training) prefer_huge_pages(given->kept);
  run<Host>(checked.network, checked.call);
}

void run_backward(const rnnkern_stack& stack, const rnnkern_backward* given) {
  if (given->forward == nullptr || !given->forward->training)
    throw std::invalid_argument("forward: expected one that ran in training");
  const Checked checked(stack, *given->forward);
  const Network& network = checked.network;
  expect("gradients", "arrays", given->gradients.count, weights_of(network, stack));
  BackwardCall call{};
  call.dy = given->dy, call.dx = given->dx;
  call.dlast = states_of("dlast", network, given->dlast);
  call.dinitial = states_of("dinitial", network, given->dinitial);
  const std::size_t count = network.weight_count(stack.biased);
  for (std::size_t i = 0; i < network.layer_directions(); ++i)
    call.gradients.push_back(network.weights_at(given->gradients.data + i * count, stack.biased));
  run<Host>(network, checked.call, &call);
}

// Makes of a function that may throw one that does not, but says in the message what was thrown.
template <auto function>
struct Guarded;
template <class... Arguments, void (*function)(const rnnkern_stack&, Arguments...)>
struct Guarded<function> {
  static bool call(const rnnkern_stack* stack, Arguments... arguments, rnnkern_message* message) noexcept {
    try {
      function(*stack, arguments...);
      return true;
    } catch (const std::bad_alloc&) {
      std::snprintf(message->text, sizeof message->text, "not enough memory");
    } catch (const std::exception& error) {
      std::snprintf(message->text, sizeof message->text, "%s", error.what());
    }
    return false;
  }
};

constexpr rnnkern_functions kFunctions{Guarded<find_sizes>::call, Guarded<pack_all>::call, Guarded<run_forward>::call,
                                       Guarded<run_backward>::call};

}  // namespace
}  // namespace rnnkern

extern "C" [[gnu::visibility("default")]] const rnnkern_functions* rnnkern_abi(int version) {
  return version == RNNKERN_ABI_VERSION ? &rnnkern::kFunctions : nullptr;
}
