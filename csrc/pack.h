// The layout of packed weights; the only file that knows it.
//
// A packed matrix is a row of panels. A panel holds a few vectors of outputs for every input k, one k after the other,
// so that a product reads it from front to back:
//
//   [panel][k][sub][gate][lane]    unit = (panel * subs + sub) * lanes + lane
//
// The gates of a unit stand side by side: the product that fills them leaves all that a cell's step needs in registers.
// The last panel has as many subs as are left; units past the end are zero.
#pragma once

#include "kernel_table.h"
#include "simd.h"

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
  template <class T>
  static constexpr std::int64_t elements(std::int64_t units, std::int64_t depth) noexcept {
    return padded<T>(units) * gates * depth;
  }
};

using Plain = PanelShape<1>;

// to [k][step] = vectors of `present` units, whose inputs stand side by side, unit_stride apart; zero past the end.
template <class T>
void pack_vector(const T* from, std::int64_t present, std::int64_t depth, std::int64_t unit_stride, T* to,
                 std::int64_t step) noexcept {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  for (std::int64_t k = 0; k < depth; k += lanes) {
    const int some = depth - k < lanes ? static_cast<int>(depth - k) : lanes;
    V block[lanes];
    for (int unit = 0; unit < lanes; ++unit)
      block[unit] = unit < present ? load_some<V>(from + unit * unit_stride + k, some) : zero<V>();
    transpose(block);
    for (int i = 0; i < some; ++i) store(to + (k + i) * step, block[i]);
  }
}

// weight(gate, unit, k) = source[gate * gate_stride + unit * unit_stride + k * k_stride]; one of the last two is 1.
// This worker's part of the panels. The source is read row by row: each row may be a page of its own.
template <int gates, class T>
void pack_panels(const Worker& worker, const T* source, std::int64_t units, std::int64_t depth,
                 std::int64_t gate_stride, std::int64_t unit_stride, std::int64_t k_stride, T* target) noexcept {
  using V = Vec<T>;
  using Shape = PanelShape<gates>;
  constexpr int lanes = kLanes<T>;
  const Range own = share(Shape::template panels<T>(units), worker.index, worker.count);
  const auto for_vectors = [&](auto&& body) {
    for (std::int64_t panel = own.begin; panel < own.end; ++panel) {
      const int subs = Shape::template subs_of<T>(panel, units);
      T* to = target + panel * depth * Shape::vectors * lanes;
      for (int sub = 0; sub < subs; ++sub)
        for (int gate = 0; gate < gates; ++gate, to += lanes) {
          const std::int64_t first = (panel * Shape::subs + sub) * lanes;
          body(source + gate * gate_stride + first * unit_stride, smaller(units - first, lanes), to,
               gates * subs * lanes);
        }
    }
  };
  if (unit_stride == 1) {
    for (std::int64_t k = 0; k < depth; ++k)
      for_vectors([&](const T* from, std::int64_t present, T* to, std::int64_t step) {
        store(to + k * step, load_some<V>(from + k * k_stride, static_cast<int>(present)));
      });
  } else {
    for_vectors([&](const T* from, std::int64_t present, T* to, std::int64_t step) {
      pack_vector(from, present, depth, unit_stride, to, step);
    });
  }
}

// Where the parts of a packed layer-direction begin, in elements; all are multiples of 64 bytes.
template <class Cell, class T>
struct PackedLayout {
  static constexpr int early = Cell::gates - Cell::late_gates, late = Cell::late_gates;
  using Input = PanelShape<Cell::gates>;
  using Early = PanelShape<early>;
  using Late = PanelShape<late == 0 ? 1 : late>;

  std::int64_t w_ih, b_ih, w_early, b_early, w_late, b_late, w_hr, extras;  // forward
  std::int64_t w_ih_t, w_early_t, w_late_t, w_hr_t;                         // backward: inputs and outputs exchanged
  std::int64_t total;

  PackedLayout(const LayerSizes& sizes, bool training) noexcept {
    const std::int64_t I = sizes.inputs, H = sizes.hidden, P = sizes.outputs;
    total = 0;
    w_ih = take(Input::template elements<T>(H, I));
    b_ih = take(Input::template elements<T>(H, 1));
    w_early = take(Early::template elements<T>(H, P));
    b_early = take(Early::template elements<T>(H, 1));
    w_late = take(late ? Late::template elements<T>(H, H) : 0);
    b_late = take(late ? Late::template elements<T>(H, 1) : 0);
    w_hr = take(sizes.projected ? Plain::elements<T>(P, H) : 0);
    extras = take(Cell::extras * padded<T>(H));
    w_ih_t = take(training ? Plain::elements<T>(I, Cell::gates * H) : 0);
    w_early_t = take(training ? Plain::elements<T>(P, early * H) : 0);
    w_late_t = take(training && late ? Plain::elements<T>(H, late * H) : 0);
    w_hr_t = take(training && sizes.projected ? Plain::elements<T>(H, P) : 0);
  }

 private:
  std::int64_t take(std::int64_t elements) noexcept {
    const std::int64_t begin = total;
    total += round_up(elements, 64 / static_cast<std::int64_t>(sizeof(T)));
    return begin;
  }
};

template <class Cell, class T>
std::int64_t packed_elements(const LayerSizes& sizes, bool training) noexcept {
  return PackedLayout<Cell, T>(sizes, training).total;
}

template <class T>
void zero_fill(T* begin, std::int64_t count) noexcept {
  std::memset(begin, 0, static_cast<std::size_t>(count) * sizeof(T));
}

template <class Cell, class T>
void pack_layer(void* context, Worker& worker) noexcept {
  using Layout = PackedLayout<Cell, T>;
  constexpr int gates = Cell::gates, early = Layout::early, late = Layout::late;
  const PackCall& call = *static_cast<const PackCall*>(context);
  const Layout at(call.sizes, call.training);
  const std::int64_t I = call.sizes.inputs, H = call.sizes.hidden, P = call.sizes.outputs;
  T* out = static_cast<T*>(call.packed);
  const T* w_ih = static_cast<const T*>(call.weights.w_ih);
  const T* w_hh = static_cast<const T*>(call.weights.w_hh);
  const T* b_ih = static_cast<const T*>(call.weights.b_ih);
  const T* b_hh = static_cast<const T*>(call.weights.b_hh);
  const T* w_hr = static_cast<const T*>(call.weights.w_hr);

  if (worker.index == 0) {
    const Worker alone{0, 1, nullptr, nullptr, -1, nullptr};
    zero_fill(out + at.b_ih, at.w_early - at.b_ih);
    zero_fill(out + at.b_early, at.w_late - at.b_early);
    if (b_ih) pack_panels<gates>(alone, b_ih, H, 1, H, 1, 1, out + at.b_ih);
    if (b_hh) pack_panels<early>(alone, b_hh, H, 1, H, 1, 1, out + at.b_early);
    if constexpr (late > 0) {
      zero_fill(out + at.b_late, at.w_hr - at.b_late);
      if (b_hh) pack_panels<late>(alone, b_hh + early * H, H, 1, H, 1, 1, out + at.b_late);
    }
    for (int extra = 0; extra < Cell::extras; ++extra) {
      T* to = out + at.extras + extra * padded<T>(H);
      zero_fill(to, padded<T>(H));
      std::memcpy(to, call.weights.extra[extra], static_cast<std::size_t>(H) * sizeof(T));
    }
  }
  pack_panels<gates>(worker, w_ih, H, I, H * I, I, 1, out + at.w_ih);
  pack_panels<early>(worker, w_hh, H, P, H * P, P, 1, out + at.w_early);
  if constexpr (late > 0) pack_panels<late>(worker, w_hh + early * H * P, H, H, H * P, P, 1, out + at.w_late);
  if (call.sizes.projected) pack_panels<1>(worker, w_hr, P, H, 0, H, 1, out + at.w_hr);
  if (!call.training) return;
  pack_panels<1>(worker, w_ih, I, gates * H, 0, 1, I, out + at.w_ih_t);
  pack_panels<1>(worker, w_hh, P, early * H, 0, 1, P, out + at.w_early_t);
  if constexpr (late > 0) pack_panels<1>(worker, w_hh + early * H * P, H, late * H, 0, 1, P, out + at.w_late_t);
  if (call.sizes.projected) pack_panels<1>(worker, w_hr, H, P, 0, 1, H, out + at.w_hr_t);
}

}  // namespace
}  // namespace rnnkern
