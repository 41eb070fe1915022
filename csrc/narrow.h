// Layers with few units and many rows: a vector holds one unit of as many rows of the batch as it has lanes, where
// elsewhere (recurrence.h, bptt.h) it holds units of one row.
//
// Weights are as wide as states: those of a narrower format are stored so (network.h). Where rows are rounded before
// they are multiplied, their lanes are.
// States, gates and saved values are stored [vector of rows][unit][lane]; weights are read as pack.h leaves them, one
// scalar for all lanes. Each output is the same chain of multiply-adds as elsewhere, so that the results are the same
// bits. What belongs to a row past its end stays in its lane and is not taken over.
#pragma once

#include "bptt.h"

namespace rnnkern {
namespace {

// Up to so many columns are exchanged with rows one element at a time: a whole block of lanes by lanes takes longer.
constexpr std::int64_t kFewColumns = 4;

// to[k * lanes + l] = rows(b + l)[k] for k in [0, columns), of `count` rows from b on; lanes behind them repeat the
// last.
template <class T>
__attribute__((noinline)) void rows_to_lanes(const StepRows<const T>& rows, std::int64_t b, int count,
                                             std::int64_t columns, T* to) noexcept {
  constexpr int lanes = kLanes<T>;
  const auto row_at = [&](int l) RNNKERN_INLINE_LAMBDA { return rows(b + (l < count ? l : count - 1)); };
  if (columns > kFewColumns) {
    const T* row[lanes];
    for (int l = 0; l < lanes; ++l) row[l] = row_at(l);
    return transpose_rows<T>(lanes, row, 0, columns, to, lanes);
  }
  with_count<kFewColumns>(columns, [&]<int n>() RNNKERN_INLINE_LAMBDA {
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {
      const T* const row = row_at(l);
      for (int k = 0; k < n; ++k) to[k * lanes + l] = row[k];
    }
  });
}

// row(i)[k] = from[k * lanes + i] for k in [0, columns), of `count` rows from b on.
template <class T>
__attribute__((noinline)) void lanes_to_rows(const T* from, std::int64_t columns, int count, const StepRows<T>& rows,
                                             std::int64_t b) noexcept {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  if (columns <= kFewColumns)
    return with_count<kFewColumns>(columns, [&]<int n>() RNNKERN_INLINE_LAMBDA {
      for (int i = 0; i < count; ++i) {
        T* const row = rows(b + i);
        for (int k = 0; k < n; ++k) row[k] = from[k * lanes + i];
      }
    });
  for (std::int64_t first = 0; first < columns; first += lanes, from += lanes * lanes) {
    const int some = static_cast<int>(smaller(columns - first, lanes));
    V block[lanes];
    for (int k = 0; k < lanes; ++k) block[k] = k < some ? load<V>(from + k * lanes) : zero<V>();
    transpose(block);
    for (int i = 0; i < count; ++i) store_some<V>(rows(b + i) + first, block[i], some);
  }
}

// What both directions of time need of rows in lanes; on top of either loop.
template <class Loop, class Cell, class T>
class Narrow : public Loop {
 protected:
  using Loop::call, Loop::how, Loop::layer_, Loop::H_;
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;

  using Loop::Loop;

  static constexpr std::int64_t grain = lanes;

  // This worker's vectors with a row that has a step t.
  Range active_vectors(std::int64_t t) const noexcept {
    const Range rows = this->active_rows(t);
    return {rows.begin / lanes, divide_up(rows.end, lanes)};
  }
  // The rows of a vector that have a step t: its first lanes.
  int rows_of(std::int64_t vector, std::int64_t t) const noexcept {
    return static_cast<int>(smaller(this->active(t) - vector * lanes, lanes));
  }

  T* state(T* base, std::int64_t vector) const noexcept { return base + vector * H_ * lanes; }

  // [rows / lanes, saved, H, lanes]
  T* saved(std::int64_t t, std::int64_t vector) const noexcept {
    return static_cast<T*>(layer_.saved) + row_of(call.saved, t, vector * lanes) * Cell::saved * H_;
  }

  // Returns the lanes of the rows that have a step t and for which is_one(b).
  template <class IsOne>
  Mask<V> lanes_where(std::int64_t vector, std::int64_t t, IsOne&& is_one) const noexcept {
    Mask<V> mask{};
    for (int l = 0; l < rows_of(vector, t); ++l) mask[l] = is_one(vector * lanes + l) ? -1 : 0;
    return mask;
  }
  // Returns the lanes of the rows that have a step t.
  Mask<V> active_lanes(std::int64_t vector, std::int64_t t) const noexcept {
    if (!call.lengths) return V{} == V{};
    return lanes_where(vector, t, [](std::int64_t) { return true; });
  }

  // Returns elements as they are multiplied: themselves, or rounded ones in `room`.
  const T* multiplied(const T* elements, std::int64_t count, T* room) const noexcept {
    if (!how.operand) return elements;
    how.operand(elements, count, room);
    return room;
  }

  // sums[i] += w[k][i * step] right[k], k after k: w packed, its k `stride` elements apart; right [depth][lanes]
  template <int count>
  RNNKERN_INLINE static void add_products(const T* w, std::int64_t stride, std::int64_t step, std::int64_t depth,
                                          const T* right, V (&sums)[count]) noexcept {
    for (std::int64_t k = 0; k < depth; ++k, w += stride, right += lanes) {
      const V input = load<V>(right);
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) sums[i] = fma(set<V>(w[i * step]), input, sums[i]);
    }
  }
};

template <class Cell, class T>
class NarrowForward : public Narrow<ForwardLoop<NarrowForward<Cell, T>, Cell, T>, Cell, T> {
  using Loop = ForwardLoop<NarrowForward, Cell, T>;
  using Rows = Narrow<Loop, Cell, T>;
  using Loop::now_, Loop::s_, Loop::packed_, Loop::H_;
  using Rows::call, Rows::lanes, Rows::layer_, Rows::rows_of, Rows::state, Rows::grain;
  friend Loop;
  using V = Vec<T>;
  static constexpr int gates = Cell::gates;

 public:
  using Rows::Rows;

 private:
  void take_rows() const noexcept {}
  void list(Range) const noexcept {}
  void enter_block() const noexcept {}

  void step(std::int64_t t) noexcept {
    const Range own = this->active_vectors(t);
    const StepRows<T> y = this->y().of_step(t);
    for (std::int64_t vector = own.begin; vector < own.end; ++vector) {
      if (call.resets) cut_rows(vector, t);
      T* const saved = layer_.saved && Cell::saved > 0 ? this->saved(t, vector) : nullptr;
      rows_to_lanes(this->x().of_step(t), vector * lanes, rows_of(vector, t), layer_.sizes.inputs, s_.x);
      this->multiplied(s_.x, layer_.sizes.inputs * lanes, s_.x);
      step_units(vector, saved, this->active_lanes(vector, t));
      lanes_to_rows(state(s_.state[1 - now_][0], vector), H_, rows_of(vector, t), y, vector * lanes);
    }
  }

  // Clears the states of the rows that enter step t from zeros.
  void cut_rows(std::int64_t vector, std::int64_t t) const noexcept {
    for (int l = 0; l < rows_of(vector, t); ++l) {
      if (!this->cut(layer_.reverse, t, vector * lanes + l)) continue;
      for (T* const one : s_.state[now_]) copy_lane<T>(state(one, vector) + l, lanes, nullptr, 1, H_);
    }
  }

  RNNKERN_INLINE void step_units(std::int64_t vector, T* to_saved, Mask<V> active) const noexcept {
    const std::int64_t H = H_;
    T *before[Cell::states], *after[Cell::states];
    for (int s = 0; s < Cell::states; ++s)
      before[s] = state(s_.state[now_][s], vector), after[s] = state(s_.state[1 - now_][s], vector);
    T rounded[lanes * lanes];
    const T* const h = this->multiplied(before[0], H * lanes, rounded);
    for (std::int64_t unit = 0; unit < H; ++unit) {
      V x[gates], r[gates], extra[kMaxExtras], prev[kMaxStates], next[kMaxStates], saved[kSlots<Cell>];
      for (int gate = 0; gate < gates; ++gate) {
        x[gate] = set<V>(packed_.values(packed_.at.b_ih)[gate * lanes + unit]);
        r[gate] = set<V>(packed_.values(packed_.at.bias[0])[gate * lanes + unit]);
      }
      this->add_products(packed_.values(packed_.at.w_ih) + unit, gates * lanes, lanes, layer_.sizes.inputs, s_.x, x);
      this->add_products(packed_.values(packed_.at.weights[0]) + unit, gates * lanes, lanes, H, h, r);
      for (int e = 0; e < Cell::extras; ++e)
        extra[e] = set<V>(packed_.values(packed_.at.extras)[e * padded<T>(H) + unit]);
      for (int s = 0; s < Cell::states; ++s) prev[s] = load<V>(before[s] + unit * lanes);
      forward_part<Cell, 0>(x, r, extra, prev, next, saved);
      if (to_saved)
        for (int v = 0; v < Cell::saved; ++v) store(to_saved + (v * H + unit) * lanes, saved[v]);
      for (int s = 0; s < Cell::states; ++s) store(after[s] + unit * lanes, select<V>(active, next[s], prev[s]));
    }
  }
};

// Gate gradients go back to rows, for the sums over them.
template <class Cell, class T>
class NarrowBackward : public Narrow<BackwardLoop<NarrowBackward<Cell, T>, Cell, T>, Cell, T> {
  using Loop = BackwardLoop<NarrowBackward, Cell, T>;
  using Rows = Narrow<Loop, Cell, T>;
  using Loop::s_, Loop::packed_, Loop::H_, Loop::padded_h_;
  using Rows::call, Rows::lanes, Rows::layer_, Rows::rows_of, Rows::state, Rows::grain;
  friend Loop;
  using V = Vec<T>;
  static constexpr int gates = Cell::gates;

  // Of one vector of rows in a step, [.., lanes] each.
  struct Step {
    T dy[lanes * lanes], h[lanes * lanes], prev[Cell::states][lanes * lanes];  // [H]
    T dx[gates * lanes * lanes], dr[gates * lanes * lanes];                    // [G * H]
    T dextra[(Cell::extras ? Cell::extras : 1) * lanes * lanes];               // [extras * H]
  };

 public:
  using Rows::Rows;

 private:
  void take_rows(Range) const noexcept {}
  void enter_block(Range) const noexcept {}

  void step(std::int64_t t, std::int64_t) noexcept {
    const Range own = this->active_vectors(t);
    for (std::int64_t vector = own.begin; vector < own.end; ++vector) {
      Step s;
      load_step(s, t, vector);
      const Mask<V> active = this->active_lanes(vector, t);
      Mask<V> passes = V{} == V{};  // the gradient of the state to the step before
      if (call.resets)
        passes = this->lanes_where(vector, t, [&](std::int64_t b) { return !this->cut(layer_.reverse, t, b); });
      const std::int64_t row = this->row_in_block(t, vector * lanes);
      if (watches(call.watch)) watch(s, t, vector, row);
      add_elementwise(s, t, vector, active, passes);
      add_carry(Cell::separate_recurrent ? s.dr : s.dx, vector, active, passes);
      const auto leave = [&](const T* from, std::int64_t columns, T* rows, std::int64_t stride) {
        lanes_to_rows(from, columns, rows_of(vector, t), StepRows<T>{rows, stride, nullptr}, row);
      };
      constexpr int extras = Cell::extras;
      leave(s.dx, gates * H_, s_.dx_gates, s_.gate_stride);
      if constexpr (Cell::separate_recurrent) leave(s.dr, gates * H_, s_.dr_gates, s_.gate_stride);
      if constexpr (extras > 0) leave(s.dextra, extras * H_, s_.dextra, extras * H_);
    }
  }

  void load_step(Step& s, std::int64_t t, std::int64_t vector) const noexcept {
    const auto gather = [&](T* to, const StepRows<const T>& rows) {
      rows_to_lanes(rows, vector * lanes, rows_of(vector, t), H_, to);
    };
    if (layer_.dy) gather(s.dy, this->output_gradients().of_step(t));
    if constexpr (Cell::saved == 0) gather(s.h, this->after_steps(0).of_step(t));
    for (int state = Cell::Step::projects; state < Cell::states; ++state) load_entered(s.prev[state], state, t, vector);
  }

  // Loads a state before step t: that of all rows after the step before, where there is one, and then that of each row
  // which does not have it from there.
  void load_entered(T* to, int state, std::int64_t t, std::int64_t vector) const noexcept {
    const std::int64_t before = this->before(t);
    const int rows = rows_of(vector, t), there = before >= 0 && before < call.steps ? rows_of(vector, before) : 0;
    if (there > 0 && Cell::kept[state] == kInOutput)
      rows_to_lanes(this->after_steps(state).of_step(before), vector * lanes, there, H_, to);
    else if (there > 0)
      std::memcpy(to, this->saved(before, vector) + Cell::kept[state] * H_ * lanes,
                  static_cast<std::size_t>(H_) * lanes * sizeof(T));
    if (!call.resets && there >= rows) return;
    for (int l = 0; l < rows; ++l) {
      const std::int64_t b = vector * lanes + l;
      if (l < there && !this->cut(layer_.reverse, t, b)) continue;
      copy_lane(to + l, lanes, this->entered(state, t, b), 1, H_);
    }
    for (int l = rows; l < lanes; ++l) copy_lane(to + l, lanes, to + rows - 1, lanes, H_);
  }

  void add_elementwise(Step& s, std::int64_t t, std::int64_t vector, Mask<V> active, Mask<V> passes) const noexcept {
    T* carry[Cell::states];
    for (int one = 0; one < Cell::states; ++one) carry[one] = state(s_.carry[one], vector);
    const T* from_saved = Cell::saved > 0 ? this->saved(t, vector) : nullptr;
    for (std::int64_t unit = 0; unit < H_; ++unit) {
      const std::int64_t at = unit * lanes;
      V saved[kSlots<Cell>], extra[kMaxExtras], prev[kMaxStates], h = {}, dnew[kMaxStates];
      V dx[gates] = {}, dr[gates], dprev[kMaxStates] = {}, dextra[kMaxExtras] = {};
      for (int v = 0; v < Cell::saved; ++v) saved[v] = load<V>(from_saved + v * H_ * lanes + at);
      for (int e = 0; e < Cell::extras; ++e) extra[e] = set<V>(packed_.values(packed_.at.extras)[e * padded_h_ + unit]);
      for (int one = Cell::Step::projects; one < Cell::states; ++one) prev[one] = load<V>(s.prev[one] + at);
      if constexpr (Cell::saved == 0) h = load<V>(s.h + at);
      for (int one = 0; one < Cell::states; ++one) dnew[one] = load<V>(carry[one] + at);
      const V dh = dnew[0];
      if (this->adds_dy()) dnew[0] = dh + load<V>(s.dy + at);
      backward_part<Cell, 0>(saved, extra, prev, &h, dnew, dx, dr, dprev, dextra);

      for (int gate = 0; gate < gates; ++gate) store(s.dx + gate * H_ * lanes + at, dx[gate]);
      if constexpr (Cell::separate_recurrent)
        for (int gate = 0; gate < gates; ++gate) store(s.dr + gate * H_ * lanes + at, dr[gate]);
      for (int e = 0; e < Cell::extras; ++e) store(s.dextra + e * H_ * lanes + at, dextra[e]);
      store(carry[0] + at, select<V>(active, dprev[0], dh));
      for (int one = 1; one < Cell::states; ++one)
        store(carry[one] + at, select<V>(active, select<V>(passes, dprev[one], zero<V>()), dnew[one]));
    }
  }

  // Adds dy to the gradients of the states after the step, measures and bounds them; as of rows that stand alone.
  // `row`: number in the block of the first one.
  __attribute__((noinline)) void watch(const Step& s, std::int64_t t, std::int64_t vector,
                                       std::int64_t row) const noexcept {
    const Watch& asked = call.watch;
    const std::int64_t size = H_ * lanes;
    for (int l = 0; l < rows_of(vector, t); ++l, ++row) {
      for (int one = 0; one < Cell::states; ++one) {
        T* const gradient = state(s_.carry[one], vector) + l;
        double squares = 0;
        for (std::int64_t at = 0; at < size; at += lanes) {
          if (one == 0 && layer_.dy) gradient[at] += s.dy[at + l];
          squares += static_cast<double>(gradient[at]) * static_cast<double>(gradient[at]);
        }
        if (measures(asked)) *this->measured(row, one) = squares;
        if (asked.bound == Bound::nothing) continue;
        const T factor = asked.bound == Bound::norm ? factor_of<T>(asked, squares) : T{1};
        const T most = asked.bound == Bound::value ? static_cast<T>(asked.most) : T(__builtin_inf());
        for (std::int64_t at = 0; at < size; at += lanes)
          gradient[at] = max<T>(min<T>(gradient[at] * factor, most), -most);
      }
      const T* const values = Cell::saved > 0 ? this->saved(t, vector) : s.h;
      for (int gate = 0; asked.flow && gate < gates; ++gate)
        *this->measured(row, Cell::states + gate) =
            count_saturated(values + gate * size + l, H_, lanes, asked.low[gate], asked.high[gate]);
    }
  }

  // carry = dr W_hh + what came past the product
  void add_carry(const T* dr, std::int64_t vector, Mask<V> active, Mask<V> passes) const noexcept {
    constexpr int together = lanes < 4 ? lanes : 4;  // units, past the last of which weights are zero
    T rounded[gates * lanes * lanes];
    dr = this->multiplied(dr, gates * H_ * lanes, rounded);
    for (std::int64_t first = 0; first < H_; first += together) {
      V sums[together] = {};
      this->add_products(packed_.values(packed_.at.weights_t[0]) + first, lanes, 1, gates * H_, dr, sums);
      for (std::int64_t unit = first; unit < smaller(first + together, H_); ++unit) {
        T* const to = state(s_.carry[0], vector) + unit * lanes;
        const V past = load<V>(to);
        store(to, select<V>(active, select<V>(passes, sums[unit - first] + past, zero<V>()), past));
      }
    }
  }
};

}  // namespace
}  // namespace rnnkern
