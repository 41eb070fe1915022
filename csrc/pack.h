// The layout of packed weights; the only file that knows it.
//
// A packed matrix is a row of panels. A panel holds a few vectors of outputs for every input k, one k after the other,
// so that a product reads it from front to back:
//
//   [panel][k][sub][gate][lane]    unit = (panel * subs + sub) * lanes + lane
//
// A format whose inputs stand in groups of g has [panel][k / g][sub][gate][lane][k % g], the last group filled up with
// its padding.
//
// The gates of a unit stand side by side: the product that fills them leaves all that a cell's step needs in registers.
// The last panel has as many subs as are left; units past the end are zero.
#pragma once

#include "formats.h"
#include "phases.h"

namespace rnnkern {
namespace {

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) noexcept { return (a + b - 1) / b; }
constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) noexcept { return a < b ? a : b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) noexcept { return divide_up(a, b) * b; }

struct Range {
  std::int64_t begin, end;
};

// Returns part `index` of [0, count) in `parts` parts of whole `grain`s.
RNNKERN_INLINE Range share(std::int64_t count, int index, int parts, std::int64_t grain = 1) noexcept {
  const std::int64_t grains = divide_up(count, grain);
  const std::int64_t begin = grains * index / parts * grain, end = grains * (index + 1) / parts * grain;
  return {begin < count ? begin : count, end < count ? end : count};
}

// Units padded to whole vectors, as states and saved values are stored.
template <class T>
constexpr std::int64_t padded(std::int64_t units) noexcept {
  return round_up(units, kLanes<T>);
}

// Between rows of working memory: a cache line more than whole lines, so that rows of 2^n bytes do not fall into the
// same few sets of the cache.
template <class T>
constexpr std::int64_t scratch_stride(std::int64_t count) noexcept {
  constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
  return round_up(count, line) + line;
}

// Vectors of units of a panel of `gates` gates: about four in all, so that three rows of accumulators, three broadcasts
// and a weight fill 16 registers; see kTileRows in gemm.h.
constexpr int subs_of_panel(int gates) noexcept { return gates >= 3 ? 1 : 4 / gates; }

// The shape of such a panel.
template <int gates>
struct PanelShape {
  static constexpr int subs = subs_of_panel(gates);
  static constexpr int vectors = gates * subs;  // of a whole panel

  template <class T>
  static constexpr std::int64_t panels(std::int64_t units) noexcept {
    return divide_up(units, subs * kLanes<T>);
  }
  template <class T>
  static constexpr int subs_of(std::int64_t panel, std::int64_t units) noexcept {
    return static_cast<int>(smaller(divide_up(units, kLanes<T>) - panel * subs, subs));
  }
  // Bytes of the weights of `depth` inputs.
  template <class T>
  static constexpr std::int64_t bytes(std::int64_t units, std::int64_t depth, Stored stored) noexcept {
    return padded<T>(units) * gates * stored.inputs(depth) * stored.bytes;
  }
};

using Plain = PanelShape<1>;

// block[k] = element k of `present` units, unit_stride apart, for `some` k; zero past the last unit. One function for
// all formats, since it is long.
template <class T>
__attribute__((noinline)) void load_transposed(const T* from, std::int64_t present, std::int64_t unit_stride, int some,
                                               Vec<T>* block) noexcept {
  using V = Vec<T>;
  V rows[kLanes<T>];
  for (int unit = 0; unit < kLanes<T>; ++unit)
    rows[unit] = unit < present ? load_some<V>(from + unit * unit_stride, some) : zero<V>();
  transpose(rows);
  for (int k = 0; k < kLanes<T>; ++k) block[k] = rows[k];
}

// to [k / group][step * group] = vectors of `present` units, whose inputs stand side by side, unit_stride apart; zero
// past the last unit.
template <class Format, class T = typename Format::T>
void pack_vector(const T* from, std::int64_t present, std::int64_t depth, std::int64_t unit_stride,
                 typename Format::W* to, std::int64_t step) noexcept {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  for (std::int64_t k = 0; k < depth; k += lanes) {
    const int some = depth - k < lanes ? static_cast<int>(depth - k) : lanes;
    V block[lanes];
    load_transposed<T>(from + k, present, unit_stride, some, block);
    for (int i = 0; i < some; i += Format::group) {
      const int last = i + Format::group - 1;
      Format::store_group(to + (k + i) * step, block[i], last < some ? block[last] : set<V>(Format::padding));
    }
  }
}

// weight(gate, unit, k) = source[gate * gate_stride + unit * unit_stride + k * k_stride]; one of the last two is 1.
// Packs this worker's part of the panels. The source is read row by row: each row may be a page of its own.
template <class Format, class T = typename Format::T>
void pack_panels(const Worker& worker, const T* source, int gates, std::int64_t units, std::int64_t depth,
                 std::int64_t gate_stride, std::int64_t unit_stride, std::int64_t k_stride, char* target) noexcept {
  using V = Vec<T>;
  using W = typename Format::W;
  constexpr int lanes = kLanes<T>, group = Format::group;
  const int whole = subs_of_panel(gates);  // vectors of units of a panel
  const std::int64_t vectors = divide_up(units, lanes);
  const Range own = share(divide_up(vectors, whole), worker.index, worker.count);
  if constexpr (std::is_same_v<Format, Rounded>) {  // behind the ordinary packing, which is compiled once
    pack_panels<AsStates<T>>(worker, source, gates, units, depth, gate_stride, unit_stride, k_stride, target);
    const std::int64_t first = own.begin * whole, last = smaller(own.end * whole, vectors);
    T* const begin = reinterpret_cast<T*>(target) + first * lanes * gates * depth;
    return round_row(begin, (last - first) * lanes * gates * depth, begin);
  }
  const auto for_vectors = [&](auto&& body) {
    for (std::int64_t panel = own.begin; panel < own.end; ++panel) {
      const std::int64_t subs = smaller(vectors - panel * whole, whole);
      W* to = reinterpret_cast<W*>(target) +
              (panel * kStored<Format>.inputs(depth) * whole + Format::head * subs) * gates * lanes;
      for (std::int64_t sub = 0; sub < subs; ++sub)
        for (int gate = 0; gate < gates; ++gate, to += lanes * group) {
          const std::int64_t first = (panel * whole + sub) * lanes;
          body(source + gate * gate_stride + first * unit_stride, smaller(units - first, lanes), to,
               gates * subs * lanes);
        }
    }
  };
  if (unit_stride == 1) {
    for (std::int64_t k = 0; k < depth; k += group)
      for_vectors([&](const T* from, std::int64_t present, W* to, std::int64_t step) {
        const V first = load_some<V>(from + k * k_stride, static_cast<int>(present));
        V last = first;
        if constexpr (group > 1)
          last = k + 1 < depth ? load_some<V>(from + (k + 1) * k_stride, static_cast<int>(present))
                               : set<V>(Format::padding);
        Format::store_group(to + k * step, first, last);
      });
  } else {
    for_vectors([&](const T* from, std::int64_t present, W* to, std::int64_t step) {
      pack_vector<Format>(from, present, depth, unit_stride, to, step);
    });
  }
  if constexpr (Format::head > 0)
    for_vectors([&](const T*, std::int64_t, W* to, std::int64_t step) { Format::finish(to, depth, step); });
}

// How a format packs weights.
template <class T>
struct Packing {
  Stored stored;
  void (*panels)(const Worker&, const T* source, int gates, std::int64_t units, std::int64_t depth,
                 std::int64_t gate_stride, std::int64_t unit_stride, std::int64_t k_stride, char* target) noexcept;
  const Packing* of_bounded;  // those of products of bounded rows, or null

  const Packing& of(bool bounded) const noexcept { return bounded && of_bounded ? *of_bounded : *this; }
};
template <class Format, class OfBounded = void>
constexpr Packing<typename Format::T> kPacking{kStored<Format>, pack_panels<Format>,
                                               &kPacking<typename OfBounded::PackedAs>};
template <class Format>
constexpr Packing<typename Format::T> kPacking<Format, void>{kStored<Format>, pack_panels<Format>, nullptr};

// The product of a phase: of `depth` inputs, for `units` of as many outputs each as the phase has, `rows` in all;
// bounded where its rows are, since the cell says so of h and what it gives: not of the h that a projection makes.
struct ProductSizes {
  bool there, bounded;
  std::int64_t depth, units, rows;
};
template <class Phase>
constexpr ProductSizes product_of(const LayerSizes& sizes) noexcept {
  const std::int64_t units = Phase::projects ? sizes.outputs : sizes.hidden;
  return {Phase::multiplies && (!Phase::projects || sizes.projected), Phase::bounded && !sizes.projected,
          Phase::from == From::h ? sizes.outputs : sizes.hidden, units, units * Phase::outputs};
}

// Where the parts of a packed layer-direction begin, in bytes; all are multiples of 64. Biases and extras are of the
// type of states.
template <class Cell, class T>
struct PackedLayout {
  using Input = PanelShape<Cell::gates>;

  std::int64_t b_ih, bias[Cell::Step::count], extras, w_ih, weights[Cell::Step::count];  // forward
  std::int64_t w_ih_t, weights_t[Cell::Step::count];  // backward: inputs and outputs exchanged; behind the others,
                                                      // which forward reads alike
  std::int64_t total = 0;

  // Compiled once: in every place that needs it, it would take a tenth of the wheel.
  __attribute__((noinline)) PackedLayout(const LayerSizes& sizes, bool training, const Packing<T>& packing) noexcept {
    constexpr Stored values = kStored<AsStates<T>>;
    const Stored stored = packing.stored;
    const std::int64_t I = sizes.inputs, H = sizes.hidden;
    b_ih = take(Input::template bytes<T>(H, 1, values));
    for_each_phase<Cell>([&]<int p>() {
      using Phase = PhaseOf<Cell, p>;
      using Shape = PanelShape<Phase::outputs>;
      bias[p] = take(Phase::multiplies && !Phase::projects ? Shape::template bytes<T>(H, 1, values) : 0);
    });
    extras = take(Cell::extras * padded<T>(H) * values.bytes);
    w_ih = take(Input::template bytes<T>(H, I, stored));
    for_each_phase<Cell>([&]<int p>() {
      using Phase = PhaseOf<Cell, p>;
      const ProductSizes of = product_of<Phase>(sizes);
      using Shape = PanelShape<Phase::outputs>;
      weights[p] = take(of.there ? Shape::template bytes<T>(of.units, of.depth, packing.of(of.bounded).stored) : 0);
    });
    w_ih_t = take(training ? Plain::bytes<T>(I, Cell::gates * H, stored) : 0);
    for_each_phase<Cell>([&]<int p>() {
      const ProductSizes of = product_of<PhaseOf<Cell, p>>(sizes);
      weights_t[p] = take(of.there && training ? Plain::bytes<T>(of.depth, of.rows, stored) : 0);
    });
  }

 private:
  std::int64_t take(std::int64_t bytes) noexcept {
    const std::int64_t begin = total;
    total += round_up(bytes, 64);
    return begin;
  }
};

// The packed weights of a layer-direction, read.
template <class Cell, class T>
struct PackedWeights {
  const PackedLayout<Cell, T> at;
  const char* data;

  PackedWeights(const Layer& layer, bool training, const Packing<T>& packing) noexcept
      : at(layer.sizes, training, packing), data(static_cast<const char*>(layer.packed)) {}

  const char* weights(std::int64_t part) const noexcept { return data + part; }
  const T* values(std::int64_t part) const noexcept { return reinterpret_cast<const T*>(data + part); }
};

// Biases and extras: little, and with zeros past the last unit.
template <class Cell, class T>
void pack_values(const PackCall& call, const PackedLayout<Cell, T>& at) noexcept {
  const Worker alone{0, 1, nullptr, nullptr, -1, nullptr};
  const std::int64_t H = call.sizes.hidden;
  char* out = static_cast<char*>(call.packed);
  std::memset(out, 0, static_cast<std::size_t>(at.w_ih));
  const T* b_ih = static_cast<const T*>(call.weights.b_ih);
  const T* b_hh = static_cast<const T*>(call.weights.b_hh);
  if (b_ih) pack_panels<AsStates<T>>(alone, b_ih, Cell::gates, H, 1, H, 1, 1, out + at.b_ih);
  for_each_phase<Cell>([&]<int p>() {
    using Phase = PhaseOf<Cell, p>;
    if constexpr (Phase::multiplies && !Phase::projects)
      if (b_hh)
        pack_panels<AsStates<T>>(alone, b_hh + Phase::first * H, Phase::outputs, H, 1, H, 1, 1, out + at.bias[p]);
  });
  for (int extra = 0; extra < Cell::extras; ++extra)
    std::memcpy(out + at.extras + extra * padded<T>(H) * std::int64_t{sizeof(T)}, call.weights.extra[extra],
                static_cast<std::size_t>(H) * sizeof(T));
}

// Packs this worker's part of a layer-direction.
template <class Cell, class T>
void pack_layer(const PackCall& call, const Worker& worker, const Packing<T>& packing) noexcept {
  constexpr int gates = Cell::gates;
  const PackedLayout<Cell, T> at(call.sizes, call.training, packing);
  const std::int64_t I = call.sizes.inputs, H = call.sizes.hidden;
  char* const out = static_cast<char*>(call.packed);
  const T* w_ih = static_cast<const T*>(call.weights.w_ih);
  if (worker.index == 0) pack_values(call, at);
  packing.panels(worker, w_ih, gates, H, I, H * I, I, 1, out + at.w_ih);
  if (call.training) packing.panels(worker, w_ih, 1, I, gates * H, 0, 1, I, out + at.w_ih_t);
  for_each_phase<Cell>([&]<int p>() {
    using Phase = PhaseOf<Cell, p>;
    if constexpr (Phase::multiplies) {
      const ProductSizes of = product_of<Phase>(call.sizes);
      if (!of.there) return;
      const T* w = static_cast<const T*>(Phase::projects ? call.weights.w_hr : call.weights.w_hh);
      if constexpr (!Phase::projects) w += Phase::first * H * of.depth;
      packing.of(of.bounded)
          .panels(worker, w, Phase::outputs, of.units, of.depth, of.units * of.depth, of.depth, 1, out + at.weights[p]);
      if (call.training) packing.panels(worker, w, 1, of.depth, of.rows, 0, 1, of.depth, out + at.weights_t[p]);
    }
  });
}

}  // namespace
}  // namespace rnnkern
