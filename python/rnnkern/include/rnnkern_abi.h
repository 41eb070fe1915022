// The kernels of rnnkern for other compiled code: plain structs over plain memory, no Python, no exceptions.
//
// The compiled module exports `rnnkern_abi`; whoever has loaded it looks that up with dlsym. Arrays are C-contiguous,
// of one element type, shaped as in docs/conventions.md: T steps, B rows, L layers of D directions.
#pragma once

#include <cstdint>

namespace rnnkern::abi {

constexpr int kVersion = 1;

struct Stack {
  const char* isa;             // one this CPU runs; the layout of packed weights and of `kept` depends on it
  const char* cell;            // such as "lstm"
  std::int64_t element_bytes;  // 4: float, 8: double
  std::int64_t input_size, hidden_size, proj_size, num_layers;
  std::int64_t directions;  // 1 or 2
  bool reverse[2];          // of each direction: does it run from the last step to the first?
  bool biased;
};

struct Arrays {
  void* const* data;
  std::int64_t count;
};

struct Memory {
  void* data;  // best aligned to 64 bytes
  std::int64_t bytes;
};

// Weights, and their gradients: for each layer-direction w_ih, w_hh, b_ih, b_hh, w_hr and extras, those that it has.
struct Pack {
  bool training;  // with what backward needs
  Arrays weights;
  Memory packed;
};

// T and B at least 1.
struct Forward {
  std::int64_t steps, batch;
  const std::int64_t* lengths;  // [B], null: none
  const std::uint8_t* resets;   // [T, B], null: none
  const void* x;
  Arrays initial;  // states, h first
  Memory packed;
  void* y;
  Arrays last;
  bool training;  // as the weights were packed
  Memory kept;    // what backward needs; in training only
};

struct Backward {
  const Forward* forward;  // that has run; its `last` is not read
  const void* dy;          // null: zeros
  Arrays dlast;
  void* dx;  // null: not wanted
  Arrays dinitial;
  Arrays gradients;  // of the weights; null in place of one: not wanted; else zeroed by the caller
};

// Why a call did nothing.
struct Message {
  char text[240];
};

// Each returns whether it ran, and else says why in the message. They may be called from any thread.
struct Functions {
  bool (*pack)(const Stack&, const Pack&, Message&) noexcept;
  bool (*forward)(const Stack&, const Forward&, Message&) noexcept;
  bool (*backward)(const Stack&, const Backward&, Message&) noexcept;
};

}  // namespace rnnkern::abi

// Null where the module has another version of these structs.
extern "C" const rnnkern::abi::Functions* rnnkern_abi(int version);
