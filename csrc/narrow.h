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

// One product of h suffices for a step.
template <class Cell>
constexpr bool kCanBeNarrow = Cell::Step::last == 0 && PhaseOf<Cell, 0>::multiplies;

// Says whether a layer is worked on here: where that takes fewer vectors. Measured on one core of a Zen 4 server,
// AVX-512, float32, I = 2, inference against recurrence.h, for RNN, GRU and LSTM: 1.2x, 1.5x and 2.0x at B = 2, H =
// 1, 1.7x to 2.4x at B = 4, H = 2, 1.6x to 2.0x at B = 8, H = 6 or B = 16, H = 12, 5x to 9x at B = 16, H = 2.
template <class Cell, class T>
bool is_narrow(const LayerSizes& sizes, std::int64_t batch, Save save) noexcept {
  return kCanBeNarrow<Cell> && save != Save::outputs && !sizes.projected && sizes.hidden < kLanes<T> &&
         sizes.hidden * divide_up(batch, kLanes<T>) < batch;
}
template <class Cell, class T>
bool is_narrow(const KernelCall& call) noexcept {
  return is_narrow<Cell, T>(call.layers[0].sizes, call.batch, call.save);
}

// Up to so many columns are exchanged with rows one element at a time: a whole block of lanes by lanes takes longer.
constexpr std::int64_t kFewColumns = 4;

// to[k * stride + lane] = rows[lane][k] for k in [0, columns)
template <class T>
__attribute__((noinline)) void lanes_of(const T* const* rows, std::int64_t columns, T* to,
                                        std::int64_t stride) noexcept {
  if (columns > kFewColumns) return transpose_rows<T>(kLanes<T>, rows, 0, columns, to, stride);
  for (std::int64_t k = 0; k < columns; ++k)
    for (int l = 0; l < kLanes<T>; ++l) to[k * stride + l] = rows[l][k];
}
// The same for `count` rows of a step from b on; lanes behind them repeat the last.
template <class T>
__attribute__((noinline)) void rows_to_lanes(const StepRows<const T>& rows, std::int64_t b, int count,
                                             std::int64_t columns, T* to, std::int64_t stride) noexcept {
  if (columns > kFewColumns || rows.order) {
    const T* row[kLanes<T>];
    for (int l = 0; l < kLanes<T>; ++l) row[l] = rows(b + (l < count ? l : count - 1));
    return lanes_of(row, columns, to, stride);
  }
  const T* row = rows(b);
  with_count<kFewColumns>(columns, [&]<int n>() RNNKERN_INLINE_LAMBDA {
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<T>; ++l) {
      for (int k = 0; k < n; ++k) to[k * stride + l] = row[k];
      row += l + 1 < count ? rows.stride : 0;
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
  using Loop::call, Loop::worker, Loop::how, Loop::layer_, Loop::H_;
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;

  using Loop::Loop;

  static constexpr std::int64_t grain = lanes;

  // This worker's vectors, and those of them with a row that has a step t.
  static Range vectors_of(Range rows) noexcept { return {rows.begin / lanes, divide_up(rows.end, lanes)}; }
  Range vectors() const noexcept { return vectors_of(this->own_); }
  Range active_vectors(std::int64_t t) const noexcept { return vectors_of(this->active_rows(t)); }
  // The rows of a vector that have a step t: its first lanes.
  int rows_of(std::int64_t vector, std::int64_t t) const noexcept {
    return static_cast<int>(smaller(this->active(t) - vector * lanes, lanes));
  }

  T* state(T* base, std::int64_t vector) const noexcept { return base + vector * H_ * lanes; }

  // [rows / lanes, saved, H, lanes]
  T* saved(std::int64_t t, std::int64_t vector) const noexcept {
    return static_cast<T*>(layer_.saved) + row_of(call.saved, t, vector * lanes) * Cell::saved * H_;
  }

  // Move this worker's part of the states from and to rows of H.
  void enter_states(const void* const* given, T* const* states) const noexcept {
    for_elements(states, [&](int s, T& element, std::int64_t b, std::int64_t unit) {
      const T* from = static_cast<const T*>(given[s]);
      element = from && b < call.batch ? from[state_row_of(call, b) * H_ + unit] : T{0};
    });
  }
  void leave_states(T* const* states, void* const* to) const noexcept {
    for_elements(states, [&](int s, T& element, std::int64_t b, std::int64_t unit) {
      if (to[s] && b < call.batch) static_cast<T*>(to[s])[state_row_of(call, b) * H_ + unit] = element;
    });
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

  // sums[r][i] += w[k][r * step] right[k][i], k after k: w packed, its k `stride` elements apart; right
  // [depth][n][lanes].
  template <int rows, int n>
  RNNKERN_INLINE static void add_products(const T* w, std::int64_t stride, std::int64_t step, std::int64_t depth,
                                          const T* right, V (&sums)[rows][n]) noexcept {
    for (std::int64_t k = 0; k < depth; ++k, w += stride)
      add_outer<AsStates<T>>([&](int r) RNNKERN_INLINE_LAMBDA { return set<V>(w[r * step]); },
                             [&](int v) RNNKERN_INLINE_LAMBDA { return load<V>(right + (k * n + v) * lanes); }, sums);
  }

 private:
  template <class Body>
  void for_elements(T* const* states, Body&& body) const noexcept {
    const Range own = vectors();
    for (int s = 0; s < Cell::states; ++s)
      for (std::int64_t vector = own.begin; vector < own.end; ++vector)
        for (std::int64_t unit = 0; unit < H_; ++unit)
          for (int l = 0; l < lanes; ++l) body(s, state(states[s], vector)[unit * lanes + l], vector * lanes + l, unit);
  }
};

// Steps whose input share is made side by side: at least eight chains, as far as registers reach.
template <class Cell>
constexpr int kNarrowSteps = Cell::gates == 1   ? 8
                             : kRegisters == 32 ? 4
                                                : 2;

template <class Cell, class T>
struct NarrowScratch {
  T* state[2][Cell::states];  // [vectors, H, lanes]: before and after a step; the same memory where no product reads it
  T* gates;                   // [vectors, block_steps, G * H, lanes]: the input's share
  T* x;                       // of one worker: [I, kNarrowSteps, lanes]

  NarrowScratch(Arena& arena, const KernelCall& call, const Arithmetic<T>&, int worker_index) noexcept {
    std::int64_t inputs = 0;
    for (int i = 0; i < call.layer_count * call.directions; ++i)
      if (call.layers[i].sizes.inputs > inputs) inputs = call.layers[i].sizes.inputs;
    const std::int64_t elements = padded<T>(call.batch) * call.layers[0].sizes.hidden;
    for (int s = 0; s < Cell::states; ++s) {
      state[0][s] = arena.take<T>(elements);
      state[1][s] = s == 0 ? arena.take<T>(elements) : state[0][s];
    }
    gates = arena.take<T>(call.block_steps * Cell::gates * elements);
    arena.take_for_workers(call.max_threads, worker_index,
                           [&] { x = arena.take<T>(inputs * kNarrowSteps<Cell> * kLanes<T>); });
  }
};

template <class Cell, class T>
class NarrowForward : public Narrow<ForwardLoop<NarrowForward<Cell, T>, Cell, T>, Cell, T> {
  using Loop = ForwardLoop<NarrowForward, Cell, T>;
  using Rows = Narrow<Loop, Cell, T>;
  using Base = Context<Cell, T>;
  using Base::how, Rows::call, Rows::lanes, Rows::layer_, Rows::vectors, Rows::rows_of, Rows::state, Rows::grain;
  using Loop::now_, Loop::block_first_, Loop::time, Loop::H_;
  friend Loop;
  using V = Vec<T>;
  static constexpr int gates = Cell::gates;

 public:
  NarrowForward(const Base& context, const Layer& layer, const NarrowScratch<Cell, T>& scratch) noexcept
      : Rows(context, layer), s_(scratch), packed_(layer, false, how.packing.stored) {}

 private:
  void enter() noexcept {
    if (call.lengths) this->enter_states(layer_.initial, s_.state[1]);
    this->enter_states(layer_.initial, s_.state[0]);
    this->wait();
  }

  void leave() noexcept { this->leave_states(s_.state[now_], layer_.last); }
  void take_rows() const noexcept {}
  void list(Range) const noexcept {}

  T* gates_of(std::int64_t vector, std::int64_t step) const noexcept {
    return s_.gates + (vector * call.block_steps + step) * gates * H_ * lanes;
  }

  // gates = x W_ih^T + b_ih
  void add_input_share(std::int64_t count) noexcept {
    const Range own = vectors();
    for (std::int64_t vector = own.begin; vector < own.end; ++vector) {
      const Range has = steps_of(vector, count);
      for_parts(has.end - has.begin, kNarrowSteps<Cell>, [&](std::int64_t part, std::int64_t steps) {
        const std::int64_t first = has.begin + part;
        for (std::int64_t i = 0; i < steps; ++i) {
          const std::int64_t t = time(block_first_ + first + i);
          rows_to_lanes(this->x().of_step(t), vector * lanes, rows_of(vector, t), layer_.sizes.inputs, s_.x + i * lanes,
                        steps * lanes);
        }
        if (how.operand) how.operand(s_.x, layer_.sizes.inputs * steps * lanes, s_.x);
        with_count<kNarrowSteps<Cell>>(
            steps, [&]<int n>() RNNKERN_INLINE_LAMBDA { add_input_share_of<n>(gates_of(vector, first)); });
      });
    }
  }

  // Those of `count` steps of the block that a row of the vector has.
  Range steps_of(std::int64_t vector, std::int64_t count) const noexcept {
    if (!call.lengths) return {0, count};
    const auto has = [&](std::int64_t i) { return this->active(time(block_first_ + i)) > vector * lanes; };
    Range steps{0, count};
    while (steps.begin < count && !has(steps.begin)) ++steps.begin;
    while (steps.end > steps.begin && !has(steps.end - 1)) --steps.end;
    return steps;
  }

  template <int n>
  void add_input_share_of(T* to) const noexcept {
    const std::int64_t H = H_;
    for (std::int64_t unit = 0; unit < H; ++unit) {
      V sums[gates][n];
      for (int gate = 0; gate < gates; ++gate)
        for (int i = 0; i < n; ++i) sums[gate][i] = set<V>(packed_.values(packed_.at.b_ih)[gate * lanes + unit]);
      this->add_products(packed_.values(packed_.at.w_ih) + unit, gates * lanes, lanes, layer_.sizes.inputs, s_.x, sums);
      for (int gate = 0; gate < gates; ++gate)
        for (int i = 0; i < n; ++i) store(to + ((i * gates + gate) * H + unit) * lanes, sums[gate][i]);
    }
  }

  void step(std::int64_t t) noexcept {
    const Range own = this->active_vectors(t);
    if (call.lengths) keep_ended(t);
    const StepRows<T> y = this->y().of_step(t);
    for (std::int64_t vector = own.begin; vector < own.end; ++vector) {
      if (call.resets) cut_rows(vector, t);
      const T* x = gates_of(vector, time(t) - block_first_);
      T* const saved = layer_.saved && Cell::saved > 0 ? this->saved(t, vector) : nullptr;
      step_units(x, vector, saved, this->active_lanes(vector, t));
      lanes_to_rows(state(s_.state[1 - now_][0], vector), H_, rows_of(vector, t), y, vector * lanes);
    }
  }

  // Copies h of vectors that have ended before step t into both places, where it stays.
  __attribute__((noinline)) void keep_ended(std::int64_t t) const noexcept {
    const Range ended = this->rows_ended(t);
    for (std::int64_t vector = divide_up(ended.begin, lanes); vector < divide_up(ended.end, lanes); ++vector)
      std::memcpy(state(s_.state[1 - now_][0], vector), state(s_.state[now_][0], vector),
                  static_cast<std::size_t>(H_ * lanes) * sizeof(T));
  }

  // Returns the lanes of the rows that enter step t from zeros.
  void cut_rows(std::int64_t vector, std::int64_t t) const noexcept {
    for (int l = 0; l < rows_of(vector, t); ++l) {
      if (!this->cut(layer_.reverse, t, vector * lanes + l)) continue;
      for (T* const one : s_.state[now_])
        for (std::int64_t unit = 0; unit < H_; ++unit) state(one, vector)[unit * lanes + l] = 0;
    }
  }

  RNNKERN_INLINE void step_units(const T* x, std::int64_t vector, T* to_saved, Mask<V> active) const noexcept {
    const std::int64_t H = H_;
    T *before[Cell::states], *after[Cell::states];
    for (int s = 0; s < Cell::states; ++s)
      before[s] = state(s_.state[now_][s], vector), after[s] = state(s_.state[1 - now_][s], vector);
    T rounded[lanes * lanes];
    const T* const h = this->multiplied(before[0], H * lanes, rounded);
    for (std::int64_t unit = 0; unit < H; ++unit) {
      V r[gates][1], input[gates], extra[kMaxExtras], prev[kMaxStates], next[kMaxStates], saved[kSlots<Cell>];
      for (int gate = 0; gate < gates; ++gate) {
        r[gate][0] = set<V>(packed_.values(packed_.at.bias[0])[gate * lanes + unit]);
        input[gate] = load<V>(x + (gate * H + unit) * lanes);
      }
      this->add_products(packed_.values(packed_.at.weights[0]) + unit, gates * lanes, lanes, H, h, r);
      for (int e = 0; e < Cell::extras; ++e)
        extra[e] = set<V>(packed_.values(packed_.at.extras)[e * padded<T>(H) + unit]);
      for (int s = 0; s < Cell::states; ++s) prev[s] = load<V>(before[s] + unit * lanes);
      forward_part<Cell, 0>(input, &r[0][0], extra, prev, next, saved);
      if (to_saved)
        for (int v = 0; v < Cell::saved; ++v) store(to_saved + (v * H + unit) * lanes, saved[v]);
      for (int s = 0; s < Cell::states; ++s) store(after[s] + unit * lanes, select<V>(active, next[s], prev[s]));
    }
  }

  const NarrowScratch<Cell, T>& s_;
  const PackedWeights<Cell, T> packed_;
};

// The carries are [vectors, H, lanes], in the room that BackwardScratch has for rows of whole vectors of units; gate
// gradients go back to rows, for the sums over them.
template <class Cell, class T>
class NarrowBackward : public Narrow<BackwardLoop<NarrowBackward<Cell, T>, Cell, T>, Cell, T> {
  using Loop = BackwardLoop<NarrowBackward, Cell, T>;
  using Rows = Narrow<Loop, Cell, T>;
  using Loop::s_, Loop::packed_, Loop::H_, Loop::padded_h_;
  using Rows::call, Rows::worker, Rows::lanes, Rows::layer_, Rows::rows_of, Rows::state, Rows::grain;
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
  void enter() noexcept {
    this->enter_states(layer_.dlast, s_.carry);
    if (worker.index == 0) std::memset(s_.zeros, 0, static_cast<std::size_t>(padded_h_) * sizeof(T));
    this->wait();
  }

  void leave() noexcept { this->leave_states(s_.carry, layer_.dinitial); }
  void take_rows(Range) const noexcept {}

  void step(std::int64_t t, std::int64_t) noexcept {
    const Range own = this->active_vectors(t);
    for (std::int64_t vector = own.begin; vector < own.end; ++vector) {
      Step s;
      load_step(s, t, vector);
      const Mask<V> active = this->active_lanes(vector, t);
      Mask<V> passes = V{} == V{};  // the gradient of the state to the step before
      if (call.resets)
        passes = this->lanes_where(vector, t, [&](std::int64_t b) { return !this->cut(layer_.reverse, t, b); });
      if (watches(call.watch)) watch(s, t, vector, active, this->row_in_block(t, vector * lanes));
      add_elementwise(s, t, vector, active, passes);
      add_carry(Cell::separate_recurrent ? s.dr : s.dx, vector, active, passes);

      const std::int64_t row = this->row_in_block(t, vector * lanes);
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
      rows_to_lanes(rows, vector * lanes, rows_of(vector, t), H_, to, lanes);
    };
    if (layer_.dy) gather(s.dy, this->output_gradients().of_step(t));
    if constexpr (Cell::saved == 0) gather(s.h, this->after_steps(0).of_step(t));
    // All rows come from the same step, unless one begins in reverse where others do not.
    const bool before_all = !layer_.reverse || t + 1 == call.steps || rows_of(vector, t + 1) == rows_of(vector, t);
    const bool alike = !call.resets && before_all;
    for (int state = Cell::Step::projects; state < Cell::states; ++state) {
      T* const to = s.prev[state];
      const Entered<T> entered = this->entered(state);
      const bool before = alike && !entered.is_first(t, vector * lanes);
      if (Cell::kept[state] != kInOutput && before)
        std::memcpy(to, saved_state(state, entered.before(t), vector),
                    static_cast<std::size_t>(H_) * lanes * sizeof(T));
      else if (Cell::kept[state] != kInOutput)
        gather_saved(to, entered, state, t, vector);
      else if (before)
        gather(to, entered.after.of_step(entered.before(t)));
      else
        gather_entered(to, entered, t, vector, rows_of(vector, t), H_);
    }
  }

  __attribute__((noinline)) static void gather_entered(T* to, const Entered<T>& entered, std::int64_t t,
                                                       std::int64_t vector, int count, std::int64_t units) noexcept {
    const T* rows[lanes];
    for (int l = 0; l < lanes; ++l) rows[l] = entered(t, vector * lanes + (l < count ? l : count - 1));
    lanes_of(rows, units, to, lanes);
  }

  const T* saved_state(int state, std::int64_t t, std::int64_t vector) const noexcept {
    return this->saved(t, vector) + Cell::kept[state] * H_ * lanes;
  }

  void gather_saved(T* to, const Entered<T>& entered, int state, std::int64_t t, std::int64_t vector) const noexcept {
    for (int l = 0; l < lanes; ++l) {
      const std::int64_t b = vector * lanes + l;
      const T* from = s_.zeros;
      std::int64_t step = 1;
      if (l < rows_of(vector, t) && !this->cut(layer_.reverse, t, b)) {
        if (entered.is_first(t, b))
          from = entered.first_of(b);
        else
          from = saved_state(state, entered.before(t), vector) + l, step = lanes;
      }
      for (std::int64_t unit = 0; unit < H_; ++unit) to[unit * lanes + l] = from[unit * step];
    }
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
  __attribute__((noinline)) void watch(const Step& s, std::int64_t t, std::int64_t vector, Mask<V> active,
                                       std::int64_t row) const noexcept {
    const Watch& asked = call.watch;
    const int rows = rows_of(vector, t);
    for (int one = 0; one < Cell::states; ++one) {
      T* const gradient = state(s_.carry[one], vector);
      double squares[lanes] = {};
      V factor = set<V>(1);
      for (std::int64_t at = 0; at < H_ * lanes; at += lanes) {
        const V carry = load<V>(gradient + at), sum = one == 0 && layer_.dy ? carry + load<V>(s.dy + at) : carry;
        store(gradient + at, select<V>(active, sum, carry));
        for (int l = 0; l < lanes; ++l) squares[l] += static_cast<double>(sum[l]) * static_cast<double>(sum[l]);
      }
      for (int l = 0; l < rows; ++l) {
        if (measures(asked)) *this->measured(row + l, one) = squares[l];
        if (asked.bound == Bound::norm) factor[l] = factor_of<T>(asked, squares[l]);
      }
      if (asked.bound == Bound::nothing) continue;
      for (std::int64_t at = 0; at < H_ * lanes; at += lanes) {
        const V sum = load<V>(gradient + at);
        const V less = asked.bound == Bound::norm ? sum * factor : bounded<V>(sum, static_cast<T>(asked.most));
        store(gradient + at, select<V>(active, less, sum));
      }
    }
    for (int gate = 0; asked.flow && gate < gates; ++gate) {
      const T* const values = Cell::saved > 0 ? this->saved(t, vector) + gate * H_ * lanes : s.h;
      for (int l = 0; l < rows; ++l) {
        std::int64_t count = 0;
        for (std::int64_t at = l; at < H_ * lanes; at += lanes)
          count += values[at] <= static_cast<T>(asked.low[gate]) || values[at] > static_cast<T>(asked.high[gate]);
        *this->measured(row + l, Cell::states + gate) = static_cast<double>(count);
      }
    }
  }

  // carry = dr W_hh + what came past the product
  void add_carry(const T* dr, std::int64_t vector, Mask<V> active, Mask<V> passes) const noexcept {
    constexpr std::int64_t most = 4;
    T rounded[gates * lanes * lanes];
    dr = this->multiplied(dr, gates * H_ * lanes, rounded);
    for_parts(H_, most, [&](std::int64_t first, std::int64_t count) {
      with_count<most>(count, [&]<int n>() RNNKERN_INLINE_LAMBDA {
        V sums[n][1] = {};
        this->add_products(packed_.values(packed_.at.weights_t[0]) + first, lanes, 1, gates * H_, dr, sums);
        for (int i = 0; i < n; ++i) {
          T* to = state(s_.carry[0], vector) + (first + i) * lanes;
          const V past = load<V>(to);
          store(to, select<V>(active, select<V>(passes, sums[i][0] + past, zero<V>()), past));
        }
      });
    });
  }
};

}  // namespace
}  // namespace rnnkern
