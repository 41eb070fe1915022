// Compiled once per ISA; exports one constant table of all kernels for that ISA.

#include "narrow.h"
#include "probes.h"

namespace rnnkern {
namespace {

// to = combine(a, b), elementwise, some of the elements; to may be a.
template <class T, class Combine>
void combine_elements(Range own, const void* a, const void* b, void* to, Combine&& combine) noexcept {
  using V = Vec<T>;
  for (std::int64_t i = own.begin; i < own.end; i += kLanes<T>) {
    const int some = static_cast<int>(smaller(own.end - i, kLanes<T>));
    store_some<V>(
        static_cast<T*>(to) + i,
        combine(load_some<V>(static_cast<const T*>(a) + i, some), load_some<V>(static_cast<const T*>(b) + i, some)),
        some);
  }
}

constexpr auto kMultiply = [](auto a, auto b) RNNKERN_INLINE_LAMBDA { return a * b; };
constexpr auto kAdd = [](auto a, auto b) RNNKERN_INLINE_LAMBDA { return a + b; };

// to = a * mask, this worker's part of the rows; to may be a. a, to: kept rows of `width` elements; mask: given ones
template <class T>
void apply_mask(const KernelCall& call, const Worker& worker, std::int64_t width, const void* a, const void* mask,
                void* to) noexcept {
  if (!call.lengths) {
    const Range own = share(call.rows * width, worker.index, worker.count, kLanes<T>);
    return combine_elements<T>(own, a, mask, to, kMultiply);
  }
  const Range steps = share(call.steps, worker.index, worker.count);
  for (std::int64_t t = steps.begin; t < steps.end; ++t)
    for (std::int64_t b = 0; b < active_rows_of(call, t); ++b) {
      const std::int64_t kept = row_of(call.kept, t, b) * width, given = row_of(call.given, t, b) * width;
      combine_elements<T>({0, width}, static_cast<const T*>(a) + kept, static_cast<const T*>(mask) + given,
                          static_cast<T*>(to) + kept, kMultiply);
    }
}

// Runs all layer-directions of a call, from the first or from the last on.
template <class Cell, class T, class OneLayer, class Scratch>
void run_layers(const KernelCall& call, Worker& worker, const Arithmetic<T>& how, bool backwards) noexcept {
  const KernelMode mode;
  Arena arena(call.scratch);
  const Scratch scratch(arena, call, how, worker.index);
  Context<Cell, T> loop{call, worker, how};
  for (int i = 0; i < call.layer_count; ++i) {
    const int l = backwards ? call.layer_count - 1 - i : i;
    const Layer* const layer = call.layers + l * call.directions;
    for (int direction = 0; direction < call.directions; ++direction)
      loop.advance(OneLayer(loop, layer[direction], scratch).run());
    if (!call.masks || i == call.layer_count - 1 || !loop.takes_part()) continue;
    if (backwards)
      apply_mask<T>(call, worker, layer->sizes.inputs, layer->dx, call.masks[l - 1], layer->dx);
    else
      apply_mask<T>(call, worker, layer->y_stride, layer->y, call.masks[l], call.masked[l]);
    loop.wait();
  }
}

// A call whose layer-directions are divided, as one of its workers runs its own of them: alone.
KernelCall alone_in(const KernelCall& call) noexcept {
  KernelCall one = call;
  one.split = Split::rows, one.max_threads = 1, one.rows_together = call.batch;
  return one;
}

// Flattened, since a short call waits for it: with no base but to count, little of it is left.
template <class Scratch, class T>
__attribute__((flatten)) std::int64_t scratch_of(const KernelCall& call, const Arithmetic<T>& how) noexcept {
  if (call.split == Split::layers) return call.max_threads * scratch_of<Scratch>(alone_in(call), how);
  Arena arena(nullptr);
  Scratch(arena, call, how, 0);
  return arena.used();
}

// Runs the layer-directions of a call side by side. Each worker takes the next one that nobody has taken and runs it
// alone; it waits for what that one takes from others, which were taken before it and so are at work or done.
template <class Cell, class T, class OneLayer, class Scratch>
void run_side_by_side(const KernelCall& call, Worker& worker, const Arithmetic<T>& how, bool backwards) noexcept {
  const KernelMode mode;
  KernelCall own = alone_in(call);
  if (worker.index > 0) own.poll = nullptr;
  Worker alone{0, 1, &worker, nullptr, -1, nullptr, worker.yield};
  if (worker.admit)
    alone.admit = [](Worker& self, std::int64_t place) noexcept {
      Worker& outer = *static_cast<Worker*>(self.team);
      if (outer.admit) outer.admit(outer, place);
    };
  Arena arena(static_cast<char*>(call.scratch) + worker.index * scratch_of<Scratch>(own, how));
  const Scratch scratch(arena, own, how, 0);
  Context<Cell, T> loop{own, alone, how};
  const int D = call.directions, count = call.layer_count * D;
  std::int64_t* const begun = call.progress + count;
  for (;;) {
    const auto next = static_cast<int>(__atomic_fetch_add(begun, 1, __ATOMIC_RELAXED));
    if (next >= count) break;
    const int i = backwards ? (call.layer_count - 1 - next / D) * D + next % D : next;
    const Layer& layer = call.layers[i];
    OneLayer(loop, layer, scratch).run();
    if (backwards && layer.dx && i % D > 0) {
      if (!loop.await(i - 1, call.steps)) break;
      void* const sum = call.layers[i - 1].dx;
      const std::int64_t rows = layer.x_rows.padded ? layer.x_rows.padded * call.batch : call.rows;
      combine_elements<T>({0, rows * layer.sizes.inputs}, sum, layer.dx, sum, kAdd);
    }
    __atomic_store_n(call.progress + i, call.steps, __ATOMIC_RELEASE);
  }
  // The others are waited for here, where it is seen that the call is given up.
  for (int i = 0; worker.index == 0 && i < count; ++i)
    if (!loop.await(i, call.steps)) break;
}

template <class Cell, class T, class OneLayer, class Scratch>
void run_all(const KernelCall& call, Worker& worker, const Arithmetic<T>& how, bool backwards) noexcept {
  if (call.split == Split::layers)
    run_side_by_side<Cell, T, OneLayer, Scratch>(call, worker, how, backwards);
  else
    run_layers<Cell, T, OneLayer, Scratch>(call, worker, how, backwards);
}

template <bool has, class Format>
constexpr const Arithmetic<float>* if_has() noexcept {
  return arithmetic_if_there<float, std::conditional_t<has, Format, void>>();
}

// How each of Products is made. The functions of a cell are compiled for the type of states; these tell them the rest.
constexpr const Arithmetic<float>* kFloatArithmetics[kProducts] = {&kArithmetic<AsStates<float>>,
                                                                   nullptr,
                                                                   &kArithmetic<BFloat16Weights>,
                                                                   &kArithmetic<Rounded>,
                                                                   &kArithmetic<RoundedBFloat16Weights>,
                                                                   if_has<kHasPairs, BFloat16Pairs>(),
                                                                   if_has<kHasEngine, BFloat16Tiles<false>>(),
                                                                   if_has<kHasPairs, BFloat16Tiles<true>>(),
                                                                   if_has<kHasEngine, SlicedTiles<false>>(),
                                                                   if_has<kHasPairs, SlicedTiles<true>>(),
                                                                   if_has<kHasEngine, SlicedTilesOfBoth<false>>(),
                                                                   if_has<kHasPairs, SlicedTilesOfBoth<true>>()};

template <class T>
const Arithmetic<T>& arithmetic_of(Products products) noexcept {
  if constexpr (std::is_same_v<T, double>)
    return kArithmetic<AsStates<double>>;
  else
    return *kFloatArithmetics[static_cast<int>(products)];
}
template <class T>
const Arithmetic<T>& arithmetic_of(const KernelCall& call) noexcept {
  const Arithmetic<T>& how = arithmetic_of<T>(call.products);
  return how.of_few_rows && call.batch < kSumRows / 2 ? *how.of_few_rows : how;
}

std::int64_t weight_bytes(Products products) noexcept {
  return products == Products::float64 ? arithmetic_of<double>(products).packing.stored.bytes
                                       : arithmetic_of<float>(products).packing.stored.bytes;
}

template <class Cell, class T>
std::int64_t packed_bytes(Products products, const LayerSizes& sizes, bool training) noexcept {
  return PackedLayout<Cell, T>(sizes, training, arithmetic_of<T>(products).packing).total;
}

template <class Cell, class T>
void run_packing(void* context, Worker& worker) noexcept {
  const PackCall& call = *static_cast<const PackCall*>(context);
  pack_layer<Cell, T>(call, worker, arithmetic_of<T>(call.products).packing);
}

template <class Cell, class T>
void run_forward(void* context, Worker& worker) noexcept {
  const KernelCall& call = *static_cast<const KernelCall*>(context);
  const Arithmetic<T>& how = arithmetic_of<T>(call);
  if constexpr (kCanBeNarrow<Cell>)
    if (is_narrow<Cell, T>(call))
      return run_all<Cell, T, NarrowForward<Cell, T>, ForwardScratch<Cell, T>>(call, worker, how, false);
  run_all<Cell, T, ForwardLayer<Cell, T>, ForwardScratch<Cell, T>>(call, worker, how, false);
}

template <class Cell, class T>
void run_backward(void* context, Worker& worker) noexcept {
  using Scratch = BackwardScratch<Cell, T>;
  const KernelCall& call = *static_cast<const KernelCall*>(context);
  const Arithmetic<T>& how = arithmetic_of<T>(call);
  if constexpr (kCanBeNarrow<Cell>)
    if (is_narrow<Cell, T>(call)) return run_all<Cell, T, NarrowBackward<Cell, T>, Scratch>(call, worker, how, true);
  run_all<Cell, T, BackwardLayer<Cell, T>, Scratch>(call, worker, how, true);
}

template <class Cell, class T>
std::int64_t scratch_bytes(const KernelCall& call, bool for_backward) noexcept {
  const Arithmetic<T>& how = arithmetic_of<T>(call);
  if (for_backward) return scratch_of<BackwardScratch<Cell, T>>(call, how);
  return scratch_of<ForwardScratch<Cell, T>>(call, how);
}

template <class Cell, class T>
std::int64_t row_grain(const LayerSizes& sizes, std::int64_t batch, Save save) noexcept {
  return is_narrow<Cell, T>(sizes, batch, save) ? kLanes<T> : 1;
}

template <class Cell, class T>
std::int64_t saved_elements(const LayerSizes& sizes, std::int64_t batch, Save save) noexcept {
  const std::int64_t values = save == Save::nothing ? 0 : save == Save::gates ? Cell::saved : Cell::states - 1;
  return values * (is_narrow<Cell, T>(sizes, batch, save) ? sizes.hidden : padded<T>(sizes.hidden));
}

template <class T>
struct LinearScratch {
  char* packed;
  T* packed_bias;
  const T **left, **right;  // [rows] of one worker
  T** outputs;
  T* buffer;
  Operands<T> operands;

  LinearScratch(Arena& arena, const Linear& call, const Arithmetic<T>& how, int worker_index,
                int max_threads) noexcept {
    const std::int64_t forward_size = Plain::bytes<T>(call.outputs, call.inputs, how.packing.stored);
    const std::int64_t backward_size = Plain::bytes<T>(call.inputs, call.outputs, how.packing.stored);
    packed = arena.take<char>(forward_size > backward_size ? forward_size : backward_size);
    packed_bias = arena.take<T>(padded<T>(call.outputs));
    arena.take_for_workers(max_threads, worker_index, [&] {
      left = arena.take<const T*>(call.rows), right = arena.take<const T*>(call.rows);
      outputs = arena.take<T*>(call.rows), buffer = arena.take<T>(kOuterBuffer<T>);
      operands.take(arena, how, call.rows, call.inputs > call.outputs ? call.inputs : call.outputs);
    });
  }
};

template <class T>
std::int64_t linear_scratch_bytes(const Linear& call, int max_threads) noexcept {
  Arena arena(nullptr);
  LinearScratch<T>(arena, call, arithmetic_of<T>(call.products), 0, max_threads);
  return arena.used();
}

template <class T>
void linear_forward(void* context, Worker& worker) noexcept {
  const KernelMode mode;
  const Linear& call = *static_cast<const Linear*>(context);
  const Arithmetic<T>& how = arithmetic_of<T>(call.products);
  Arena arena(call.scratch);
  const LinearScratch<T> s(arena, call, how, worker.index, worker.index + 1);
  const std::int64_t inputs = call.inputs, outputs = call.outputs;
  const T* bias = static_cast<const T*>(call.bias);
  how.packing.panels(worker, static_cast<const T*>(call.weight), 1, outputs, inputs, 0, inputs, 1, s.packed);
  if (bias) pack_panels<AsStates<T>>(worker, bias, 1, outputs, 1, 0, 1, 1, reinterpret_cast<char*>(s.packed_bias));
  if (worker.count > 1) worker.wait(worker.team);
  const Range own = share(call.rows, worker.index, worker.count);
  for (std::int64_t i = own.begin; i < own.end; ++i) {
    s.left[i] = static_cast<const T*>(call.x) + i * inputs;
    s.outputs[i] = static_cast<T*>(call.y) + i * outputs;
  }
  plain_product<T>(how, s.operands, own.end - own.begin, s.left + own.begin, inputs, s.packed,
                   bias ? s.packed_bias : nullptr, outputs, s.outputs + own.begin, false);
}

template <class T>
void linear_backward(void* context, Worker& worker) noexcept {
  const KernelMode mode;
  const Linear& call = *static_cast<const Linear*>(context);
  const Arithmetic<T>& how = arithmetic_of<T>(call.products);
  Arena arena(call.scratch);
  const LinearScratch<T> s(arena, call, how, worker.index, worker.index + 1);
  const std::int64_t inputs = call.inputs, outputs = call.outputs;
  if (call.dx)
    how.packing.panels(worker, static_cast<const T*>(call.weight), 1, inputs, outputs, 0, 1, inputs, s.packed);
  for (std::int64_t i = 0; i < call.rows; ++i) {
    s.left[i] = static_cast<const T*>(call.dy) + i * outputs;
    s.right[i] = static_cast<const T*>(call.x) + i * inputs;
    s.outputs[i] = static_cast<T*>(call.dx) + (call.dx ? i * inputs : 0);
  }
  const Range own = share(outputs, worker.index, worker.count, kTileRows<Plain::vectors>);
  if (call.dweight)
    how.add_outer_products(call.rows, s.left, s.right, own.begin, own.end, inputs, static_cast<T*>(call.dweight),
                           s.buffer);
  if (call.dbias) add_rows(call.rows, s.left, own.begin, own.end, static_cast<T*>(call.dbias));
  if (!call.dx) return;
  if (worker.count > 1) worker.wait(worker.team);
  const Range rows = share(call.rows, worker.index, worker.count);
  plain_product<T>(how, s.operands, rows.end - rows.begin, s.left + rows.begin, outputs, s.packed, nullptr, inputs,
                   s.outputs + rows.begin, false);
}

template <class T>
void run_squares(void* context, Worker& worker) noexcept {
  const Squares& call = *static_cast<const Squares*>(context);
  const Range own = share(call.rows, worker.index, worker.count);
  for (std::int64_t row = own.begin; row < own.end; ++row)
    call.sums[row] = sum_of_squares(static_cast<const T*>(call.values) + row * call.columns, call.columns);
}

template <class Cell, class T>
constexpr CellKernels kKernels{packed_bytes<Cell, T>,  run_packing<Cell, T>, saved_elements<Cell, T>,
                               scratch_bytes<Cell, T>, row_grain<Cell, T>,   run_forward<Cell, T>,
                               run_backward<Cell, T>};

template <class Cell>
constexpr CellEntry entry_of() noexcept {
  CellEntry entry{Cell::name,
                  Cell::gates,
                  Cell::states,
                  Cell::saved,
                  Cell::extras,
                  Cell::gates - PhaseOf<Cell, 0>::gates,
                  {},
                  Cell::Step::projects,
                  Cell::separate_recurrent,
                  Cell::bounded,
                  kKernels<Cell, float>,
                  kKernels<Cell, double>};
  for (int s = 0; s < Cell::states; ++s) entry.kept[s] = Cell::kept[s];
  return entry;
}

template <class List>
struct Entries;
template <class... C>
struct Entries<CellList<C...>> {
  static constexpr CellEntry all[] = {entry_of<C>()...};
};

template <class T>
constexpr LinearKernels kLinear{linear_scratch_bytes<T>, linear_forward<T>, linear_backward<T>};

}  // namespace

namespace RNNKERN_ISA {

extern const KernelTable table;
const KernelTable table = {Entries<Cells>::all, Cells::count,        kLinear<float>,     kLinear<double>,
                           kHasPairs,           kEmulatesPairs,      kHasEngine,         weight_bytes,
                           run_squares<float>,  run_squares<double>, Probes<Cells>::all, Probes<Cells>::count,
                           kLanes<float>,       kLanes<double>};

}  // namespace RNNKERN_ISA
}  // namespace rnnkern
