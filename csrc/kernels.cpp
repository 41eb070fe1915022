// Compiled once per ISA; exports one constant table of all kernels for that ISA.

#include "narrow.h"
#include "probes.h"

namespace rnnkern {
namespace {

// to = a * b, elementwise, this worker's part of `count` elements; to may be a.
template <class T>
void multiply(const Worker& worker, std::int64_t count, const T* a, const T* b, T* to) noexcept {
  using V = Vec<T>;
  const Range own = share(count, worker.index, worker.count, kLanes<T>);
  for (std::int64_t i = own.begin; i < own.end; i += kLanes<T>) {
    const int some = own.end - i < kLanes<T> ? static_cast<int>(own.end - i) : kLanes<T>;
    store_some<V>(to + i, load_some<V>(a + i, some) * load_some<V>(b + i, some), some);
  }
}

// Runs all layer-directions of a call, from the first or from the last on.
template <class Cell, class T, class OneLayer, class Scratch>
void run_layers(const KernelCall& call, Worker& worker, bool backwards) noexcept {
  const FlushDenormals flush;
  Arena arena(call.scratch);
  const Scratch scratch(arena, call, worker.index);
  Context<Cell, T> loop{call, worker};
  for (int i = 0; i < call.layer_count; ++i) {
    const int l = backwards ? call.layer_count - 1 - i : i;
    const Layer* const layer = call.layers + l * call.directions;
    for (int direction = 0; direction < call.directions; ++direction)
      loop.advance(OneLayer(loop, layer[direction], scratch).run());
    if (!call.masks || i == call.layer_count - 1 || !loop.takes_part()) continue;
    const std::int64_t rows = call.steps * call.batch;
    if (backwards)
      multiply(worker, rows * layer->sizes.inputs, static_cast<const T*>(layer->dx),
               static_cast<const T*>(call.masks[l - 1]), static_cast<T*>(layer->dx));
    else
      multiply(worker, rows * layer->y_stride, static_cast<const T*>(layer->y), static_cast<const T*>(call.masks[l]),
               static_cast<T*>(call.masked[l]));
    loop.wait();
  }
}

template <class Cell, class Format, class T = typename Format::T>
void forward(void* context, Worker& worker) noexcept {
  const KernelCall& call = *static_cast<const KernelCall*>(context);
  if constexpr (kCanBeNarrow<Cell> && std::is_same_v<Format, AsStates<T>>)
    if (is_narrow<Cell, T>(call))
      return run_layers<Cell, T, NarrowForward<Cell, T>, NarrowScratch<Cell, T>>(call, worker, false);
  run_layers<Cell, T, ForwardLayer<Cell, Format>, ForwardScratch<Cell, T>>(call, worker, false);
}

template <class Cell, class T>
void backward(void* context, Worker& worker) noexcept {
  using Scratch = BackwardScratch<Cell, T>;
  const KernelCall& call = *static_cast<const KernelCall*>(context);
  if constexpr (kCanBeNarrow<Cell>)
    if (is_narrow<Cell, T>(call)) return run_layers<Cell, T, NarrowBackward<Cell, T>, Scratch>(call, worker, true);
  run_layers<Cell, T, BackwardLayer<Cell, T>, Scratch>(call, worker, true);
}

template <class Cell, class T>
std::int64_t scratch_bytes(const KernelCall& call, bool for_backward) noexcept {
  Arena arena(nullptr);
  if (for_backward)
    BackwardScratch<Cell, T>(arena, call, 0);
  else if (is_narrow<Cell, T>(call))
    NarrowScratch<Cell, T>(arena, call, 0);
  else
    ForwardScratch<Cell, T>(arena, call, 0);
  return arena.used();
}

template <class Cell, class T>
std::int64_t row_grain(const LayerSizes& sizes, std::int64_t batch) noexcept {
  return is_narrow<Cell, T>(sizes, batch) ? kLanes<T> : 1;
}

template <class Cell, class T>
std::int64_t saved_elements(const LayerSizes& sizes, std::int64_t batch) noexcept {
  const std::int64_t states =
      is_narrow<Cell, T>(sizes, batch) ? padded<T>(batch) * sizes.hidden : batch * padded<T>(sizes.hidden);
  return Cell::saved * states;
}

template <class T>
struct LinearScratch {
  T* packed;
  const T **left, **right;  // [rows] of one worker
  T** outputs;
  T* buffer;

  LinearScratch(Arena& arena, const Linear& call, int worker_index, int max_threads) noexcept {
    const std::int64_t forward_size =
        Plain::elements<AsStates<T>>(call.outputs, call.inputs) + Plain::elements<AsStates<T>>(call.outputs, 1);
    const std::int64_t backward_size = Plain::elements<AsStates<T>>(call.inputs, call.outputs);
    packed = arena.take<T>(forward_size > backward_size ? forward_size : backward_size);
    arena.take_for_workers(max_threads, worker_index, [&] {
      left = arena.take<const T*>(call.rows), right = arena.take<const T*>(call.rows);
      outputs = arena.take<T*>(call.rows), buffer = arena.take<T>(kOuterBuffer<T>);
    });
  }
};

template <class T>
std::int64_t linear_scratch_bytes(const Linear& call, int max_threads) noexcept {
  Arena arena(nullptr);
  LinearScratch<T>(arena, call, 0, max_threads);
  return arena.used();
}

template <class T>
void linear_forward(void* context, Worker& worker) noexcept {
  const FlushDenormals flush;
  const Linear& call = *static_cast<const Linear*>(context);
  Arena arena(call.scratch);
  const LinearScratch<T> s(arena, call, worker.index, worker.index + 1);
  const std::int64_t inputs = call.inputs, outputs = call.outputs;
  const T* bias = static_cast<const T*>(call.bias);
  T* packed_bias = s.packed + Plain::elements<AsStates<T>>(outputs, inputs);
  pack_panels<AsStates<T>, 1>(worker, static_cast<const T*>(call.weight), outputs, inputs, 0, inputs, 1, s.packed);
  if (bias) pack_panels<AsStates<T>, 1>(worker, bias, outputs, 1, 0, 1, 1, packed_bias);
  if (worker.count > 1) worker.wait(worker.team);
  const Range own = share(call.rows, worker.index, worker.count);
  for (std::int64_t i = own.begin; i < own.end; ++i) {
    s.left[i] = static_cast<const T*>(call.x) + i * inputs;
    s.outputs[i] = static_cast<T*>(call.y) + i * outputs;
  }
  plain_product<T>(own.end - own.begin, s.left + own.begin, inputs, s.packed, bias ? packed_bias : nullptr, outputs,
                   s.outputs + own.begin, false);
}

template <class T>
void linear_backward(void* context, Worker& worker) noexcept {
  const FlushDenormals flush;
  const Linear& call = *static_cast<const Linear*>(context);
  Arena arena(call.scratch);
  const LinearScratch<T> s(arena, call, worker.index, worker.index + 1);
  const std::int64_t inputs = call.inputs, outputs = call.outputs;
  if (call.dx)
    pack_panels<AsStates<T>, 1>(worker, static_cast<const T*>(call.weight), inputs, outputs, 0, 1, inputs, s.packed);
  for (std::int64_t i = 0; i < call.rows; ++i) {
    s.left[i] = static_cast<const T*>(call.dy) + i * outputs;
    s.right[i] = static_cast<const T*>(call.x) + i * inputs;
    s.outputs[i] = static_cast<T*>(call.dx) + (call.dx ? i * inputs : 0);
  }
  const Range own = share(outputs, worker.index, worker.count, kTileRows<Plain::vectors>);
  if (call.dweight)
    add_outer_products(call.rows, s.left, s.right, own.begin, own.end, inputs, static_cast<T*>(call.dweight), s.buffer);
  if (call.dbias) add_rows(call.rows, s.left, own.begin, own.end, static_cast<T*>(call.dbias));
  if (!call.dx) return;
  if (worker.count > 1) worker.wait(worker.team);
  const Range rows = share(call.rows, worker.index, worker.count);
  plain_product<T>(rows.end - rows.begin, s.left + rows.begin, outputs, s.packed, nullptr, inputs,
                   s.outputs + rows.begin, false);
}

template <class V, V (*function)(V) noexcept>
void apply(const Scalar<V>* x, Scalar<V>* y, std::int64_t n) noexcept {
  constexpr int lanes = kLanes<Scalar<V>>;
  for (std::int64_t i = 0; i < n; i += lanes) {
    const int some = n - i < lanes ? static_cast<int>(n - i) : lanes;
    store_some<V>(y + i, function(load_some<V>(x + i, some)), some);
  }
}

template <class Cell, class Format>
constexpr CellKernels kernels_of() noexcept {
  using T = typename Format::T;
  return {packed_bytes<Cell, Format>,
          pack_layer<Cell, Format>,
          saved_elements<Cell, T>,
          scratch_bytes<Cell, T>,
          row_grain<Cell, T>,
          forward<Cell, Format>,
          Format::trains ? backward<Cell, T> : nullptr};
}

template <class Cell>
constexpr CellEntry entry_of() noexcept {
  CellEntry entry{
      Cell::name,
      Cell::gates,
      Cell::states,
      Cell::saved,
      Cell::extras,
      Cell::gates - PhaseOf<Cell, 0>::gates,
      {},
      Cell::Step::projects,
      Cell::separate_recurrent,
      {kernels_of<Cell, AsStates<float>>(), kernels_of<Cell, AsStates<double>>(), kernels_of<Cell, BFloat16Weights>()}};
  for (int s = 0; s < Cell::states; ++s) entry.kept[s] = Cell::kept[s];
  return entry;
}

template <class List>
struct Entries;
template <class... C>
struct Entries<CellList<C...>> {
  static constexpr CellEntry all[] = {entry_of<C>()...};
};

constexpr ActivationKernel kActivations[] = {
    {"sigmoid", apply<F32, sigmoid<F32>>, apply<F64, sigmoid<F64>>},
    {"tanh", apply<F32, tanh<F32>>, apply<F64, tanh<F64>>},
    {"relu", apply<F32, relu<F32>>, apply<F64, relu<F64>>},
};

}  // namespace

namespace RNNKERN_ISA {

extern const KernelTable table;
constexpr LinearKernels kLinearF32{linear_scratch_bytes<float>, linear_forward<float>, linear_backward<float>};
constexpr LinearKernels kLinearF64{linear_scratch_bytes<double>, linear_forward<double>, linear_backward<double>};
const KernelTable table = {Entries<Cells>::all, Cells::count,         kLinearF32,
                           kLinearF64,          kActivations,         sizeof kActivations / sizeof *kActivations,
                           Probes<Cells>::all,  Probes<Cells>::count, kLanes<float>,
                           kLanes<double>};

}  // namespace RNNKERN_ISA
}  // namespace rnnkern
