// The calls of rnnkern_abi.h as handlers of XLA's foreign function interface. handlers.py compiles this on the
// user's machine, against the headers of the jaxlib that is installed there, and calls.py is the other side of
// every argument. The handlers run on XLA's threads, without Python.
#include <xla/ffi/api/ffi.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "rnnkern_abi.h"

namespace {

namespace ffi = xla::ffi;

using Numbers = ffi::Span<const std::int64_t>;
using Bytes = ffi::BufferR1<ffi::U8>;
using Lengths = ffi::BufferR1<ffi::S32>;  // [B], or [0] for none: JAX has 64-bit integers only on request
using Resets = ffi::BufferR2<ffi::PRED>;  // [T, B], or [0, 0] for none

const rnnkern_functions* functions = nullptr;  // set once, before any handler is registered

// What all handlers are told of their stack.
struct Stack {
  std::string isa, cell;
  rnnkern_stack value{};

  // sizes: input, hidden, proj, layers; reverse: one for each direction; flags: biased, rounds, engines
  Stack(std::string_view isa_name, std::string_view cell_name, Numbers sizes, Numbers reverse, Numbers flags,
        ffi::DataType type)
      : isa(isa_name), cell(cell_name) {
    value.isa = isa.c_str();
    value.cell = cell.c_str();
    value.element_bytes = static_cast<std::int64_t>(ffi::ByteWidth(type));
    value.input_size = sizes[0], value.hidden_size = sizes[1], value.proj_size = sizes[2], value.num_layers = sizes[3];
    value.directions = static_cast<std::int64_t>(reverse.size());
    for (std::size_t d = 0; d < reverse.size() && d < 2; ++d) value.reverse[d] = reverse[d] != 0;
    value.biased = flags[0] != 0, value.rounds = flags[1] != 0, value.engines = flags[2] != 0;
  }
};

std::vector<void*> data_of(ffi::RemainingArgs args) {
  std::vector<void*> data;
  for (std::size_t i = 0; i < args.size(); ++i) data.push_back(args.get<ffi::AnyBuffer>(i)->untyped_data());
  return data;
}

std::vector<ffi::AnyBuffer> buffers_of(ffi::RemainingRets rets) {
  std::vector<ffi::AnyBuffer> buffers;
  for (std::size_t i = 0; i < rets.size(); ++i) buffers.push_back(**rets.get<ffi::AnyBuffer>(i));
  return buffers;
}

std::vector<void*> data_of(const std::vector<ffi::AnyBuffer>& buffers) {
  std::vector<void*> data;
  for (const auto& one : buffers) data.push_back(one.untyped_data());
  return data;
}

rnnkern_arrays part(const std::vector<void*>& data, std::size_t begin, std::size_t end) {
  return {data.data() + begin, static_cast<std::int64_t>(end - begin)};
}

template <class Buffer>
rnnkern_memory memory(const Buffer& buffer) {
  return {buffer.untyped_data(), static_cast<std::int64_t>(buffer.size_bytes())};
}

template <class Call>
ffi::Error run(bool (*function)(const rnnkern_stack*, const Call*, rnnkern_message*), const Stack& stack,
               const Call& call) {
  rnnkern_message message{};
  if (function(&stack.value, &call, &message)) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string("rnnkern: ") + message.text);
}

// The arguments that forward and backward share.
struct Rows {
  std::vector<std::int64_t> lengths;
  rnnkern_forward call{};

  Rows(const ffi::AnyBuffer& x, const Lengths& given_lengths, const Resets& resets, const Bytes& packed)
      : lengths(given_lengths.typed_data(), given_lengths.typed_data() + given_lengths.element_count()) {
    call.steps = x.dimensions()[0];
    call.batch = x.dimensions()[1];
    call.lengths = lengths.empty() ? nullptr : lengths.data();
    call.resets = resets.element_count() == 0 ? nullptr : static_cast<const std::uint8_t*>(resets.untyped_data());
    call.x = x.untyped_data();
    call.packed = memory(packed);
  }
};

// weights -> packed
ffi::Error pack(ffi::RemainingArgs weights, ffi::Result<Bytes> packed, std::string_view isa, std::string_view cell,
                Numbers sizes, Numbers reverse, Numbers flags, bool training) {
  const std::vector<void*> data = data_of(weights);
  const Stack stack(isa, cell, sizes, reverse, flags, weights.get<ffi::AnyBuffer>(0)->element_type());
  return run(functions->pack, stack, rnnkern_pack{training, part(data, 0, data.size()), memory(*packed)});
}

// x, lengths, resets, packed, states -> y, last states, and in training what is kept
ffi::Error forward(ffi::AnyBuffer x, Lengths lengths, Resets resets, Bytes packed, ffi::RemainingArgs initial,
                   ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets rets, std::string_view isa, std::string_view cell,
                   Numbers sizes, Numbers reverse, Numbers flags) {
  const std::vector<void*> states = data_of(initial);
  const std::vector<ffi::AnyBuffer> results = buffers_of(rets);
  const std::vector<void*> data = data_of(results);
  Rows rows(x, lengths, resets, packed);
  rows.call.initial = part(states, 0, states.size());
  rows.call.y = y->untyped_data();
  rows.call.last = part(data, 0, states.size());
  rows.call.training = results.size() > states.size();
  if (rows.call.training) rows.call.kept = memory(results.back());
  return run(functions->forward, Stack(isa, cell, sizes, reverse, flags, x.element_type()), rows.call);
}

// x, lengths, resets, packed, y, kept, dy, initial states, gradients of the last states
// -> dx where wanted, gradients of the initial states, of the weights
ffi::Error backward(ffi::AnyBuffer x, Lengths lengths, Resets resets, Bytes packed, ffi::AnyBuffer y, Bytes kept,
                    ffi::AnyBuffer dy, ffi::RemainingArgs states, ffi::RemainingRets rets, std::string_view isa,
                    std::string_view cell, Numbers sizes, Numbers reverse, Numbers flags, bool need_x) {
  const std::vector<void*> given = data_of(states);
  const std::vector<ffi::AnyBuffer> results = buffers_of(rets);
  const std::vector<void*> data = data_of(results);
  const std::size_t count = given.size() / 2, first = need_x ? 1 : 0;
  for (std::size_t i = first + count; i < results.size(); ++i) std::memset(data[i], 0, results[i].size_bytes());
  Rows rows(x, lengths, resets, packed);
  rows.call.initial = part(given, 0, count);
  rows.call.y = y.untyped_data();
  rows.call.training = true;
  rows.call.kept = memory(kept);
  rnnkern_backward call{};
  call.forward = &rows.call;
  call.dy = dy.untyped_data();
  call.dlast = part(given, count, 2 * count);
  call.dx = need_x ? data[0] : nullptr;
  call.dinitial = part(data, first, first + count);
  call.gradients = part(data, first + count, data.size());
  return run(functions->backward, Stack(isa, cell, sizes, reverse, flags, x.element_type()), call);
}

template <class Binding>
auto with_stack(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Attr<std::string_view>("isa")
      .template Attr<std::string_view>("cell")
      .template Attr<Numbers>("sizes")
      .template Attr<Numbers>("reverse")
      .template Attr<Numbers>("flags");
}

auto rows_binding() { return ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<Lengths>().Arg<Resets>().Arg<Bytes>(); }

}  // namespace

// Takes the address of the module's rnnkern_abi. False where the module is of another version than this file.
extern "C" bool rnnkern_connect(decltype(rnnkern_abi)* lookup) {
  functions = lookup(RNNKERN_ABI_VERSION);
  return functions != nullptr;
}

// Asks for the bytes of the weights packed for inference and for training, and of what training keeps.
//   numbers: bytes of an element, the four sizes, directions, reverse for two of them, rounds, engines, steps and batch
extern "C" bool rnnkern_find_bytes(const char* isa, const char* cell, const std::int64_t* numbers, std::int64_t* bytes,
                                   rnnkern_message* message) {
  const std::int64_t* n = numbers;
  const rnnkern_stack stack{isa,   cell,      n[0],     n[1], n[2], n[3], n[4], n[5], {n[6] != 0, n[7] != 0},
                            false, n[8] != 0, n[9] != 0};
  rnnkern_sizes sizes{};
  if (!functions->sizes(&stack, n[10], n[11], &sizes, message)) return false;
  bytes[0] = sizes.packed_for_inference, bytes[1] = sizes.packed_for_training, bytes[2] = sizes.kept;
  return true;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnkern_xla_pack, pack,
                              with_stack(ffi::Ffi::Bind().RemainingArgs().Ret<Bytes>()).Attr<bool>("training"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnkern_xla_forward, forward,
                              with_stack(rows_binding().RemainingArgs().Ret<ffi::AnyBuffer>().RemainingRets()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    rnnkern_xla_backward, backward,
    with_stack(rows_binding().Arg<ffi::AnyBuffer>().Arg<Bytes>().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets())
        .Attr<bool>("need_x"));
