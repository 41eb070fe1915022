// The time loops: forward and backpropagation through time of one layer-direction, generic over cells.
//
// All workers of a call run these functions side by side. They divide either the rows of the batch (sequences do not
// depend on each other: no barrier) or the hidden units (a barrier a step and product). A block is as many steps as
// keep their gates in cache: forward makes the input's share of the gates for a block in one product and then runs
// its steps; backward runs the steps of a block and then adds its share of every gradient that is a sum over rows.
#pragma once

#include "cells.h"
#include "gemm.h"

namespace rnnkern {
namespace {

// Hands out scratch memory from front to back, 64-byte aligned; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) noexcept : base_(static_cast<char*>(base)) {}
  template <class E>
  E* take(std::int64_t count) noexcept {
    const std::int64_t begin = used_;
    used_ += round_up(count * static_cast<std::int64_t>(sizeof(E)), 64);
    return base_ ? reinterpret_cast<E*>(base_ + begin) : nullptr;
  }
  std::int64_t used() const noexcept { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

// What both directions of time need to know of a call, seen by one worker.
template <class Cell, class T>
struct Context {
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;

  const Stack& stack;
  Worker& worker;
  std::int64_t block = 0;  // blocks begun so far in this call; the same on all workers at the same place
  std::int64_t place = 0;  // blocks and steps

  // Does this worker take part yet? A helper that joins a call on its way passes by what was done before.
  bool takes_part() const noexcept { return place > worker.joins_at; }
  // Begins a block or step; before it, helpers that have come meanwhile are let in. All rows and units are up to date.
  void begin() noexcept {
    if (worker.admit) {
      worker.count = worker.admit(worker.team, place);
      if (worker.count > 1) worker.admit = nullptr;
    }
    ++place;
  }

  bool by_units() const noexcept { return stack.split == Split::units && worker.count > 1; }
  void wait() const noexcept {
    if (worker.count > 1) worker.wait(worker.team);
  }
  void wait_if_units() const noexcept {
    if (by_units()) worker.wait(worker.team);
  }
  Range rows() const noexcept { return by_units() ? Range{0, stack.batch} : rows_to_own(); }
  Range rows_to_own() const noexcept { return share(stack.batch, worker.index, worker.count); }
  Panels panels(std::int64_t count, bool backwards = false) const noexcept {
    const Range own = by_units() ? share(count, worker.index, worker.count) : Range{0, count};
    return {own.begin, own.end, backwards};
  }
  std::int64_t length(std::int64_t b) const noexcept { return stack.lengths ? stack.lengths[b] : stack.steps; }

  // Does row b enter step t from zeros?
  bool cut(bool reverse, std::int64_t t, std::int64_t b) const noexcept {
    if (!stack.resets) return false;
    const std::int64_t link = reverse ? t + 1 : t;
    return (!reverse || link < length(b)) && stack.resets[link * stack.batch + b] != 0;
  }

  // Goes on from where a layer-direction has come to, once all are there.
  void advance(const Context& layer) noexcept {
    block = layer.block, place = layer.place;
    if (takes_part()) wait();
  }

  // Begins a block; true when the call was given up. Worker 0 says so a block ahead, and between two blocks there is
  // either a barrier or nothing that waits, so that no worker is left alone at a barrier.
  bool give_up() noexcept {
    if (worker.index == 0 && stack.poll && !__atomic_load_n(stack.stop, __ATOMIC_RELAXED) &&
        stack.poll(stack.poll_context))
      __atomic_store_n(stack.stop, block + 1, __ATOMIC_RELEASE);
    const std::int64_t stop = __atomic_load_n(stack.stop, __ATOMIC_ACQUIRE);
    const bool over = stop != 0 && block >= stop;
    ++block;
    begin();
    return over;
  }
};

template <class T>
void copy_row(T* to, const T* from, std::int64_t count, std::int64_t padded_count) noexcept {
  if (from)
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(T));
  else
    std::memset(to, 0, static_cast<std::size_t>(count) * sizeof(T));
  std::memset(to + count, 0, static_cast<std::size_t>(padded_count - count) * sizeof(T));
}

// The states of a row: h, of as many units as y has, and others of H units.
template <class Cell, class T>
struct StateShape {
  std::int64_t units[Cell::states], stride[Cell::states];  // stride: between rows of working memory

  explicit StateShape(const LayerSizes& sizes) noexcept {
    for (int s = 0; s < Cell::states; ++s) {
      units[s] = s == 0 ? sizes.outputs : sizes.hidden;
      stride[s] = scratch_stride<T>(units[s]);
    }
  }
};

// Values of a saved row while the step works: the input's share of the gates is overwritten by what is saved.
template <class Cell>
constexpr int kSlots = Cell::saved > Cell::gates ? Cell::saved : Cell::gates;

// Rows of the states from or to memory of the user, where null stands for zeros.
template <class Cell, class T>
void enter_states(Range own, const StateShape<Cell, T>& shape, const void* const* given, T* const* states) noexcept {
  for (int s = 0; s < Cell::states; ++s)
    for (std::int64_t b = own.begin; b < own.end; ++b) {
      const T* from = static_cast<const T*>(given[s]);
      copy_row(states[s] + b * shape.stride[s], from ? from + b * shape.units[s] : nullptr, shape.units[s],
               shape.stride[s]);
    }
}
template <class Cell, class T>
void leave_states(Range own, const StateShape<Cell, T>& shape, const T* const* states, void* const* to) noexcept {
  for (int s = 0; s < Cell::states; ++s)
    for (std::int64_t b = own.begin; b < own.end; ++b)
      copy_row(static_cast<T*>(to[s]) + b * shape.units[s], states[s] + b * shape.stride[s], shape.units[s],
               shape.units[s]);
}

template <class Cell, class T>
struct ForwardScratch {
  T* state[2][Cell::states];  // [B, stride]: before and after a step; the same memory where no product reads it
  T* hidden;                  // [B, padded H]: h before the projection, or the scaled h of a late product
  T* zeros;                   // [padded H]
  T* gates;                   // [block_steps, B, slots, padded H]
  // Of one worker: rows of a block, rows of a step.
  const T** block_inputs;
  T** block_gates;
  const T **prev[Cell::states], **hidden_rows;
  T** step_gates;
  std::int64_t* batch_index;

  ForwardScratch(Arena& arena, const Stack& stack, int worker_index) noexcept {
    const StateShape<Cell, T> shape(stack.layers[0].sizes);
    const std::int64_t padded_h = padded<T>(stack.layers[0].sizes.hidden);
    bool own_gates = false, two_products = Cell::late_gates > 0;
    for (int i = 0; i < stack.layer_count * stack.directions; ++i) {
      const Layer& layer = stack.layers[i];
      own_gates |= layer.saved == nullptr;
      two_products |= layer.sizes.projected;
    }
    const std::int64_t B = stack.batch, rows = stack.block_steps * B;
    for (int s = 0; s < Cell::states; ++s) {
      state[0][s] = arena.take<T>(B * shape.stride[s]);
      state[1][s] = s == 0 ? arena.take<T>(B * shape.stride[s]) : state[0][s];
    }
    hidden = arena.take<T>(two_products ? B * padded_h : 0);
    zeros = arena.take<T>(padded_h);
    gates = arena.take<T>(own_gates ? rows * kSlots<Cell> * padded_h : 0);
    for (int i = 0; i < stack.max_threads; ++i) {
      const auto inputs = arena.take<const T*>(rows);
      const auto gate_rows = arena.take<T*>(rows);
      const T** prev_rows[Cell::states];
      for (auto& one : prev_rows) one = arena.take<const T*>(B);
      const auto hidden_of_rows = arena.take<const T*>(B);
      const auto step_rows = arena.take<T*>(B);
      const auto indices = arena.take<std::int64_t>(B);
      if (i != worker_index) continue;
      block_inputs = inputs, block_gates = gate_rows;
      for (int s = 0; s < Cell::states; ++s) prev[s] = prev_rows[s];
      hidden_rows = hidden_of_rows, step_gates = step_rows, batch_index = indices;
    }
  }
};

// The time loop of forward. Steps says what a block and a step are: enter, add_input_share, step, leave.
template <class Steps, class Cell, class T>
class ForwardLoop : protected Context<Cell, T> {
 public:
  using Base = Context<Cell, T>;
  using Base::stack;

  ForwardLoop(const Base& context, const Layer& layer) noexcept : Base(context), layer_(layer) {}

  // Returns where the call has come to.
  const Base& run() noexcept {
    Steps& steps = static_cast<Steps&>(*this);
    if (this->takes_part()) steps.enter();
    for (std::int64_t first = 0; first < stack.steps; first += stack.block_steps) {
      if (this->give_up()) break;
      const std::int64_t count = first + stack.block_steps < stack.steps ? stack.block_steps : stack.steps - first;
      block_first_ = first;
      if (this->takes_part()) {
        steps.add_input_share(count);
        this->wait_if_units();
      }
      for (std::int64_t i = first; i < first + count; ++i, now_ = 1 - now_) {
        this->begin();
        if (!this->takes_part()) continue;
        steps.step(time(i));
        this->wait_if_units();
      }
    }
    if (this->takes_part()) steps.leave();
    return *this;
  }

 protected:
  std::int64_t time(std::int64_t step) const noexcept { return layer_.reverse ? stack.steps - 1 - step : step; }

  T* output(std::int64_t t, std::int64_t b) const noexcept {
    return static_cast<T*>(layer_.y) + (t * stack.batch + b) * layer_.y_stride;
  }

  const T* input(std::int64_t t, std::int64_t b) const noexcept {
    return static_cast<const T*>(layer_.x) + (t * stack.batch + b) * layer_.x_stride;
  }

  const Layer& layer_;
  int now_ = 0;                   // which of two states is the one before the step
  std::int64_t block_first_ = 0;  // steps done before this block
};

template <class Cell, class Format>
class ForwardLayer : public ForwardLoop<ForwardLayer<Cell, Format>, Cell, typename Format::T> {
  using T = typename Format::T;
  using Loop = ForwardLoop<ForwardLayer, Cell, T>;
  using Base = Context<Cell, T>;
  using Base::stack, Base::worker, Base::lanes;
  using Loop::layer_, Loop::now_, Loop::block_first_, Loop::time, Loop::input, Loop::output;
  friend Loop;
  using V = Vec<T>;
  using Layout = PackedLayout<Cell, Format>;
  static constexpr int slots = kSlots<Cell>;
  static_assert(Cell::saved == 0 || Cell::saved >= Cell::gates, "the gates' input share needs the saved row");

 public:
  ForwardLayer(const Base& context, const Layer& layer, const ForwardScratch<Cell, T>& scratch) noexcept
      : Loop(context, layer),
        s_(scratch),
        packed_(layer, false),
        H_(layer.sizes.hidden),
        P_(layer.sizes.outputs),
        padded_h_(padded<T>(H_)),
        shape_(layer.sizes),
        keep_(layer.saved != nullptr && Cell::saved > 0) {}

 private:
  void enter() noexcept {
    enter_states<Cell, T>(this->rows_to_own(), shape_, layer_.initial, s_.state[0]);
    if (worker.index == 0) std::memset(s_.zeros, 0, static_cast<std::size_t>(padded_h_) * sizeof(T));
    this->wait();
  }

  void leave() noexcept { leave_states<Cell, T>(this->rows_to_own(), shape_, s_.state[now_], layer_.last); }

  T* gates(std::int64_t t, std::int64_t b) const noexcept {
    if (keep_) return static_cast<T*>(layer_.saved) + (t * stack.batch + b) * Cell::saved * padded_h_;
    const std::int64_t step = time(t) - block_first_;
    return s_.gates + (step * stack.batch + b) * slots * padded_h_;
  }

  // gates = x W_ih^T + b_ih for the active rows of `count` steps, in one product.
  void add_input_share(std::int64_t count) noexcept {
    using Shape = typename Layout::Input;
    const Range own = this->rows();
    std::int64_t rows = 0;
    for (std::int64_t i = block_first_; i < block_first_ + count; ++i) {
      const std::int64_t t = time(i);
      for (std::int64_t b = own.begin; b < own.end; ++b) {
        if (t >= this->length(b)) continue;
        s_.block_inputs[rows] = input(t, b);
        s_.block_gates[rows++] = gates(t, b);
      }
    }
    const Panels panels = this->panels(Shape::template panels<T>(H_));
    product<Format, Shape>(rows, s_.block_inputs, layer_.sizes.inputs, packed_.weights(packed_.at.w_ih),
                           packed_.values(packed_.at.b_ih), H_, panels,
                           [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                             for (int sub = 0; sub < Shape::subs; ++sub) {
                               const std::int64_t unit = (panel * Shape::subs + sub) * lanes;
                               if (unit >= padded_h_) break;
                               for (int gate = 0; gate < Cell::gates; ++gate)
                                 store(s_.block_gates[i] + gate * padded_h_ + unit, sum[sub * Cell::gates + gate]);
                             }
                           });
  }

  void step(std::int64_t t) noexcept {
    const std::int64_t rows = list_rows(t);
    using Early = typename Layout::Early;
    const Panels panels = this->panels(Early::template panels<T>(H_), now_ == 1);
    product<Format, Early>(rows, s_.prev[0], P_, packed_.weights(packed_.at.w_early),
                           packed_.values(packed_.at.b_early), H_, panels,
                           [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                             for (int sub = 0; sub < Early::subs; ++sub) {
                               const std::int64_t unit = (panel * Early::subs + sub) * lanes;
                               if (unit >= padded_h_) break;
                               V r[Cell::gates];
                               for (int gate = 0; gate < Layout::early; ++gate)
                                 r[gate] = sum[sub * Layout::early + gate];
                               if constexpr (Cell::late_gates > 0)
                                 prepare(i, unit, r);
                               else
                                 finish(t, i, unit, r);
                             }
                           });
    if constexpr (Cell::late_gates > 0) {
      using Late = typename Layout::Late;
      this->wait_if_units();
      const Panels late = this->panels(Late::template panels<T>(H_), now_ == 1);
      product<Format, Late>(rows, s_.hidden_rows, H_, packed_.weights(packed_.at.w_late),
                            packed_.values(packed_.at.b_late), H_, late,
                            [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                              for (int sub = 0; sub < Late::subs; ++sub) {
                                const std::int64_t unit = (panel * Late::subs + sub) * lanes;
                                if (unit >= padded_h_) break;
                                V r[Cell::gates] = {};
                                for (int gate = 0; gate < Cell::late_gates; ++gate)
                                  r[Layout::early + gate] = sum[sub * Cell::late_gates + gate];
                                finish(t, i, unit, r);
                              }
                            });
    }
    if (layer_.sizes.projected) {
      this->wait_if_units();
      const Panels plain = this->panels(Plain::panels<T>(P_), now_ == 1);
      product<Format, Plain>(rows, s_.hidden_rows, H_, packed_.weights(packed_.at.w_hr), nullptr, P_, plain,
                             [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                               for_plain_vectors<T>(
                                   panel, P_, [&](int v, std::int64_t unit, int) { store_h(t, i, unit, sum[v]); });
                             });
    }
  }

  // Lists the active rows of step t and carries the state of the others over it; their y is zero.
  std::int64_t list_rows(std::int64_t t) noexcept {
    const Range own = this->rows();
    std::int64_t rows = 0;
    for (std::int64_t b = own.begin; b < own.end; ++b) {
      if (t >= this->length(b)) {
        if (this->by_units() && b % worker.count != worker.index) continue;
        const std::int64_t row = b * shape_.stride[0];  // of h, the others stay where they are
        std::memcpy(s_.state[1 - now_][0] + row, s_.state[now_][0] + row, static_cast<std::size_t>(P_) * sizeof(T));
        std::memset(output(t, b), 0, static_cast<std::size_t>(P_) * sizeof(T));
        continue;
      }
      const bool cut = this->cut(layer_.reverse, t, b);
      for (int s = 0; s < Cell::states; ++s)
        s_.prev[s][rows] = cut ? s_.zeros : s_.state[now_][s] + b * shape_.stride[s];
      s_.hidden_rows[rows] = s_.hidden + b * padded_h_;
      s_.step_gates[rows] = gates(t, b);
      s_.batch_index[rows++] = b;
    }
    return rows;
  }

  // In a cell with late gates the saved row holds, while the step works, what `prepare` has saved of the early gates
  // and still the input's share of the late ones.
  RNNKERN_INLINE void prepare(std::int64_t i, std::int64_t unit, const V* r) const noexcept {
    if constexpr (Cell::late_gates > 0) {
      T* row = s_.step_gates[i] + unit;
      V x[Cell::gates], saved[slots], scaled;
      for (int gate = 0; gate < Layout::early; ++gate) x[gate] = load<V>(row + gate * padded_h_);
      const V prev = load<V>(s_.prev[0][i] + unit);
      Cell::prepare(x, r, &prev, &scaled, saved);
      for (int gate = 0; gate < Layout::early; ++gate) store(row + gate * padded_h_, saved[gate]);
      store(s_.hidden + s_.batch_index[i] * padded_h_ + unit, scaled);
    }
  }

  RNNKERN_INLINE void finish(std::int64_t t, std::int64_t i, std::int64_t unit, const V* r) const noexcept {
    T* row = s_.step_gates[i] + unit;
    V x[Cell::gates], extra[kMaxExtras], prev[kMaxStates], next[kMaxStates], saved[slots];
    for (int gate = 0; gate < Cell::gates; ++gate) saved[gate] = x[gate] = load<V>(row + gate * padded_h_);
    for (int e = 0; e < Cell::extras; ++e) extra[e] = load<V>(packed_.values(packed_.at.extras) + e * padded_h_ + unit);
    for (int s = Cell::projects; s < Cell::states; ++s) prev[s] = load<V>(s_.prev[s][i] + unit);
    Cell::forward(x, r, extra, prev, next, saved);
    if (keep_)
      for (int v = 0; v < Cell::saved; ++v) store(row + v * padded_h_, saved[v]);
    for (int s = 1; s < Cell::states; ++s)
      store(s_.state[1 - now_][s] + s_.batch_index[i] * shape_.stride[s] + unit, next[s]);
    if (layer_.sizes.projected)
      store(s_.hidden + s_.batch_index[i] * padded_h_ + unit, next[0]);
    else
      store_h(t, i, unit, next[0]);
  }

  RNNKERN_INLINE void store_h(std::int64_t t, std::int64_t i, std::int64_t unit, V h) const noexcept {
    const std::int64_t b = s_.batch_index[i];
    store(s_.state[1 - now_][0] + b * shape_.stride[0] + unit, h);
    store_some<V>(output(t, b) + unit, h, P_ - unit < lanes ? static_cast<int>(P_ - unit) : lanes);
  }

  const ForwardScratch<Cell, T>& s_;
  const PackedWeights<Cell, Format> packed_;
  const std::int64_t H_, P_, padded_h_;
  const StateShape<Cell, T> shape_;
  const bool keep_;
};

}  // namespace
}  // namespace rnnkern
