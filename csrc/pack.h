// The layout of packed weights; the only file that knows it.
//
// A packed matrix is a row of panels. A panel holds a few vectors of outputs for every input k, one k after the other,
// so that a product reads it from front to back:
//
//   [panel][k][sub][gate][lane]    unit = (panel * subs + sub) * lanes + lane
//
// A format whose inputs stand in groups of g has [panel][k / g][sub][gate][lane][k % g], the last group filled up with
// zeros.
//
// The gates of a unit stand side by side: the product that fills them leaves all that a cell's step needs in registers.
// The last panel has as many subs as are left; units past the end are zero.
#pragma once

#include "formats.h"
#include "kernel_table.h"

namespace rnnkern {
namespace {

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) noexcept { return (a + b - 1) / b; }
constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) noexcept { return a < b ? a : b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) noexcept { return divide_up(a, b) * b; }

struct Range {
  std::int64_t begin, end;
};

// Part `index` of [0, count) in `parts` parts of whole `grain`s.
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

// The shape of a panel of `gates` gates: about four vectors, so that three rows of accumulators, three broadcasts and
// a weight fill 16 registers; see kTileRows in gemm.h.
template <int gates>
struct PanelShape {
  static constexpr int subs = gates >= 3 ? 1 : 4 / gates;
  static constexpr int vectors = gates * subs;  // of a whole panel

  template <class T>
  static constexpr std::int64_t panels(std::int64_t units) noexcept {
    return divide_up(units, subs * kLanes<T>);
  }
  template <class T>
  static constexpr int subs_of(std::int64_t panel, std::int64_t units) noexcept {
    return static_cast<int>(smaller(divide_up(units, kLanes<T>) - panel * subs, subs));
  }
  template <class Format>
  static constexpr std::int64_t elements(std::int64_t units, std::int64_t depth) noexcept {
    return padded<typename Format::T>(units) * gates * stored_inputs<Format>(depth);
  }
};

using Plain = PanelShape<1>;

// to [k / group][step * group] = vectors of `present` units, whose inputs stand side by side, unit_stride apart; zero
// past the end.
template <class Format, class T = typename Format::T>
void pack_vector(const T* from, std::int64_t present, std::int64_t depth, std::int64_t unit_stride,
                 typename Format::W* to, std::int64_t step) noexcept {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  for (std::int64_t k = 0; k < depth; k += lanes) {
    const int some = depth - k < lanes ? static_cast<int>(depth - k) : lanes;
    V block[lanes];
    for (int unit = 0; unit < lanes; ++unit)
      block[unit] = unit < present ? load_some<V>(from + unit * unit_stride + k, some) : zero<V>();
    transpose(block);
    for (int i = 0; i < some; i += Format::group)
      Format::store_group(to + (k + i) * step, block[i], block[i + Format::group - 1]);
  }
}

// weight(gate, unit, k) = source[gate * gate_stride + unit * unit_stride + k * k_stride]; one of the last two is 1.
// This worker's part of the panels. The source is read row by row: each row may be a page of its own.
template <class Format, int gates, class T = typename Format::T>
void pack_panels(const Worker& worker, const T* source, std::int64_t units, std::int64_t depth,
                 std::int64_t gate_stride, std::int64_t unit_stride, std::int64_t k_stride,
                 typename Format::W* target) noexcept {
  using V = Vec<T>;
  using W = typename Format::W;
  using Shape = PanelShape<gates>;
  constexpr int lanes = kLanes<T>, group = Format::group;
  const Range own = share(Shape::template panels<T>(units), worker.index, worker.count);
  const auto for_vectors = [&](auto&& body) {
    for (std::int64_t panel = own.begin; panel < own.end; ++panel) {
      const int subs = Shape::template subs_of<T>(panel, units);
      W* to = target + panel * stored_inputs<Format>(depth) * Shape::vectors * lanes;
      for (int sub = 0; sub < subs; ++sub)
        for (int gate = 0; gate < gates; ++gate, to += lanes * group) {
          const std::int64_t first = (panel * Shape::subs + sub) * lanes;
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
          last = k + 1 < depth ? load_some<V>(from + (k + 1) * k_stride, static_cast<int>(present)) : zero<V>();
        Format::store_group(to + k * step, first, last);
      });
  } else {
    for_vectors([&](const T* from, std::int64_t present, W* to, std::int64_t step) {
      pack_vector<Format>(from, present, depth, unit_stride, to, step);
    });
  }
}

// Where the parts of a packed layer-direction begin, in bytes; all are multiples of 64. Biases and extras are of the
// type of states.
template <class Cell, class Format>
struct PackedLayout {
  using T = typename Format::T;
  using W = typename Format::W;
  static constexpr int early = Cell::gates - Cell::late_gates, late = Cell::late_gates;
  using Input = PanelShape<Cell::gates>;
  using Early = PanelShape<early>;
  using Late = PanelShape<late == 0 ? 1 : late>;

  std::int64_t w_ih, b_ih, w_early, b_early, w_late, b_late, w_hr, extras;  // forward
  std::int64_t w_ih_t, w_early_t, w_late_t, w_hr_t;                         // backward: inputs and outputs exchanged
  std::int64_t total;

  PackedLayout(const LayerSizes& sizes, bool training) noexcept {
    using Values = AsStates<T>;
    const std::int64_t I = sizes.inputs, H = sizes.hidden, P = sizes.outputs;
    total = 0;
    w_ih = take<W>(Input::template elements<Format>(H, I));
    b_ih = take<T>(Input::template elements<Values>(H, 1));
    w_early = take<W>(Early::template elements<Format>(H, P));
    b_early = take<T>(Early::template elements<Values>(H, 1));
    w_late = take<W>(late ? Late::template elements<Format>(H, H) : 0);
    b_late = take<T>(late ? Late::template elements<Values>(H, 1) : 0);
    w_hr = take<W>(sizes.projected ? Plain::elements<Format>(P, H) : 0);
    extras = take<T>(Cell::extras * padded<T>(H));
    w_ih_t = take<W>(training ? Plain::elements<Format>(I, Cell::gates * H) : 0);
    w_early_t = take<W>(training ? Plain::elements<Format>(P, early * H) : 0);
    w_late_t = take<W>(training && late ? Plain::elements<Format>(H, late * H) : 0);
    w_hr_t = take<W>(training && sizes.projected ? Plain::elements<Format>(H, P) : 0);
  }

 private:
  template <class Element>
  std::int64_t take(std::int64_t elements) noexcept {
    const std::int64_t begin = total;
    total += round_up(elements * static_cast<std::int64_t>(sizeof(Element)), 64);
    return begin;
  }
};

// The packed weights of a layer-direction, read.
template <class Cell, class Format>
struct PackedWeights {
  const PackedLayout<Cell, Format> at;
  const char* data;

  PackedWeights(const Layer& layer, bool training) noexcept
      : at(layer.sizes, training), data(static_cast<const char*>(layer.packed)) {}

  const typename Format::W* weights(std::int64_t part) const noexcept {
    return reinterpret_cast<const typename Format::W*>(data + part);
  }
  const typename Format::T* values(std::int64_t part) const noexcept {
    return reinterpret_cast<const typename Format::T*>(data + part);
  }
};

template <class Cell, class Format>
std::int64_t packed_bytes(const LayerSizes& sizes, bool training) noexcept {
  return PackedLayout<Cell, Format>(sizes, training).total;
}

template <class Cell, class Format>
void pack_layer(void* context, Worker& worker) noexcept {
  using T = typename Format::T;
  using W = typename Format::W;
  using Values = AsStates<T>;
  using Layout = PackedLayout<Cell, Format>;
  constexpr int gates = Cell::gates, early = Layout::early, late = Layout::late;
  const PackCall& call = *static_cast<const PackCall*>(context);
  const Layout at(call.sizes, call.training);
  const std::int64_t I = call.sizes.inputs, H = call.sizes.hidden, P = call.sizes.outputs;
  char* out = static_cast<char*>(call.packed);
  const auto weights = [&](std::int64_t part) { return reinterpret_cast<W*>(out + part); };
  const auto values = [&](std::int64_t part) { return reinterpret_cast<T*>(out + part); };
  const auto zero_fill = [&](std::int64_t begin, std::int64_t end) {
    std::memset(out + begin, 0, static_cast<std::size_t>(end - begin));
  };
  const T* w_ih = static_cast<const T*>(call.weights.w_ih);
  const T* w_hh = static_cast<const T*>(call.weights.w_hh);
  const T* b_ih = static_cast<const T*>(call.weights.b_ih);
  const T* b_hh = static_cast<const T*>(call.weights.b_hh);
  const T* w_hr = static_cast<const T*>(call.weights.w_hr);

  if (worker.index == 0) {
    const Worker alone{0, 1, nullptr, nullptr, -1, nullptr};
    zero_fill(at.b_ih, at.w_early);
    zero_fill(at.b_early, at.w_late);
    if (b_ih) pack_panels<Values, gates>(alone, b_ih, H, 1, H, 1, 1, values(at.b_ih));
    if (b_hh) pack_panels<Values, early>(alone, b_hh, H, 1, H, 1, 1, values(at.b_early));
    if constexpr (late > 0) {
      zero_fill(at.b_late, at.w_hr);
      if (b_hh) pack_panels<Values, late>(alone, b_hh + early * H, H, 1, H, 1, 1, values(at.b_late));
    }
    if constexpr (Cell::extras > 0) zero_fill(at.extras, at.w_ih_t);
    for (int extra = 0; extra < Cell::extras; ++extra)
      std::memcpy(values(at.extras) + extra * padded<T>(H), call.weights.extra[extra],
                  static_cast<std::size_t>(H) * sizeof(T));
  }
  pack_panels<Format, gates>(worker, w_ih, H, I, H * I, I, 1, weights(at.w_ih));
  pack_panels<Format, early>(worker, w_hh, H, P, H * P, P, 1, weights(at.w_early));
  if constexpr (late > 0)
    pack_panels<Format, late>(worker, w_hh + early * H * P, H, H, H * P, P, 1, weights(at.w_late));
  if (call.sizes.projected) pack_panels<Format, 1>(worker, w_hr, P, H, 0, H, 1, weights(at.w_hr));
  if (!call.training) return;
  pack_panels<Format, 1>(worker, w_ih, I, gates * H, 0, 1, I, weights(at.w_ih_t));
  pack_panels<Format, 1>(worker, w_hh, P, early * H, 0, 1, P, weights(at.w_early_t));
  if constexpr (late > 0)
    pack_panels<Format, 1>(worker, w_hh + early * H * P, H, late * H, 0, 1, P, weights(at.w_late_t));
  if (call.sizes.projected) pack_panels<Format, 1>(worker, w_hr, H, P, 0, 1, H, weights(at.w_hr_t));
}

}  // namespace
}  // namespace rnnkern
