// Backpropagation through time of one layer-direction, generic over cells; the mirror of recurrence.h.
//
// A step: gate gradients of every active row from dh = carry + dy (elementwise), then the carry for the step before it
// as their product with W_hh. dy is added after that product, so that a sequence cut in two gives the same bits.
#pragma once

#include "recurrence.h"

namespace rnnkern {
namespace {

template <class Cell, class T>
struct BackwardScratch {
  T* carry[Cell::states];  // [B, stride]: gradients of the states after the step at hand, without dy
  T* dx_gates;             // [block rows, gate_stride]: gradients of the gates, input side, unpadded [G, H]
  T* dr_gates;             // the same, recurrent side; dx_gates where the cell has but one
  T* dextra;               // [block rows, extras * H]
  T* dh;                   // [block rows, stride P]: gradient of the projected h
  T* hidden;               // [block rows, padded H]: h before the projection, or the scaled h of a late product
  T* zeros;                // [padded H]
  std::int64_t gate_stride;
  // Of one worker.
  const T **left, **right;                 // [block rows]: of a sum of outer products
  T** outputs;                             // [block rows]
  T* buffer;                               // kOuterBuffer
  const T **prev[Cell::states], **inputs;  // [B], of a step
  std::int64_t* batch_index;

  BackwardScratch(Arena& arena, const Stack& stack, int worker_index) noexcept {
    const LayerSizes& sizes = stack.layers[0].sizes;  // inputs apart those of all
    const StateShape<Cell, T> shape(sizes);
    const std::int64_t H = sizes.hidden, padded_h = padded<T>(H);
    const std::int64_t B = stack.batch, rows = stack.block_steps * B;
    gate_stride = scratch_stride<T>(Cell::gates * H);
    for (int s = 0; s < Cell::states; ++s) carry[s] = arena.take<T>(B * shape.stride[s]);
    dx_gates = arena.take<T>(rows * gate_stride);
    dr_gates = Cell::separate_recurrent ? arena.take<T>(rows * gate_stride) : dx_gates;
    dextra = arena.take<T>(rows * Cell::extras * H);
    dh = arena.take<T>(sizes.projected ? rows * shape.stride[0] : 0);
    hidden = arena.take<T>(sizes.projected || Cell::late_gates > 0 ? rows * padded_h : 0);
    zeros = arena.take<T>(padded_h);
    for (int i = 0; i < stack.max_threads; ++i) {
      const auto left_rows = arena.take<const T*>(rows), right_rows = arena.take<const T*>(rows);
      const auto output_rows = arena.take<T*>(rows);
      const auto columns = arena.take<T>(kOuterBuffer<T>);
      const T** prev_rows[Cell::states];
      for (auto& one : prev_rows) one = arena.take<const T*>(B);
      const auto step = arena.take<const T*>(B);
      const auto indices = arena.take<std::int64_t>(B);
      if (i != worker_index) continue;
      left = left_rows, right = right_rows, outputs = output_rows, buffer = columns;
      inputs = step, batch_index = indices;
      for (int s = 0; s < Cell::states; ++s) prev[s] = prev_rows[s];
    }
  }
};

// The loop of backpropagation through time, and what a block adds to the gradients. Steps says what a step is: enter,
// step, leave.
template <class Steps, class Cell, class T>
class BackwardLoop : protected Context<Cell, T> {
 public:
  using Base = Context<Cell, T>;
  using Base::stack, Base::worker;
  using Layout = PackedLayout<Cell, AsStates<T>>;

  BackwardLoop(const Base& context, const Layer& layer, const BackwardScratch<Cell, T>& scratch) noexcept
      : Base(context),
        layer_(layer),
        s_(scratch),
        packed_(layer, true),
        H_(layer.sizes.hidden),
        P_(layer.sizes.outputs),
        padded_h_(padded<T>(H_)),
        shape_(layer.sizes) {}

  // Returns where the call has come to.
  const Base& run() noexcept {
    Steps& steps = static_cast<Steps&>(*this);
    if (this->takes_part()) steps.enter();
    for (std::int64_t end = stack.steps; end > 0; end -= stack.block_steps) {
      if (this->give_up()) break;
      block_first_ = end > stack.block_steps ? end - stack.block_steps : 0;
      for (std::int64_t i = end - 1; i >= block_first_; --i) {
        this->begin();
        if (this->takes_part()) steps.step(time(i), i - block_first_);
      }
      if (!this->takes_part()) continue;
      this->wait();
      add_gradients(end);
      this->wait();
    }
    if (this->takes_part()) steps.leave();
    return *this;
  }

 protected:
  std::int64_t time(std::int64_t step) const noexcept { return layer_.reverse ? stack.steps - 1 - step : step; }

  // Is step t the first of row b, and which one came before it?
  bool is_first(std::int64_t t, std::int64_t b) const noexcept {
    return layer_.reverse ? t + 1 >= this->length(b) : t == 0;
  }
  std::int64_t before(std::int64_t t) const noexcept { return layer_.reverse ? t + 1 : t - 1; }

  const T* initial(int state, std::int64_t b) const noexcept {
    const T* from = static_cast<const T*>(layer_.initial[state]);
    return from ? from + b * shape_.units[state] : s_.zeros;
  }
  const T* output(std::int64_t t, std::int64_t b) const noexcept {
    return static_cast<const T*>(layer_.y) + (t * stack.batch + b) * layer_.y_stride;
  }
  const T* output_gradient_row(std::int64_t t, std::int64_t b) const noexcept {
    return static_cast<const T*>(layer_.dy) + (t * stack.batch + b) * layer_.dy_stride;
  }

  // Saved values are [T, B, saved, padded H].
  const T* saved_row(std::int64_t t, std::int64_t b) const noexcept {
    return static_cast<const T*>(layer_.saved) + (t * stack.batch + b) * Cell::saved * padded_h_;
  }

  // A state of row b when it entered step t.
  const T* previous(int state, std::int64_t t, std::int64_t b) const noexcept {
    if (this->cut(layer_.reverse, t, b)) return s_.zeros;
    if (is_first(t, b)) return initial(state, b);
    if (Cell::kept[state] == kInOutput) return output(before(t), b);
    return saved_row(before(t), b) + Cell::kept[state] * padded_h_;
  }

  // Lists the block's active rows in the order of backward, the same for every block size; row(t, b, index in block).
  template <class Row>
  std::int64_t list(std::int64_t end, const T** rows, Row&& row) const noexcept {
    std::int64_t count = 0;
    for (std::int64_t i = end - 1; i >= block_first_; --i)
      for (std::int64_t b = 0; b < stack.batch; ++b)
        if (time(i) < this->length(b)) rows[count++] = row(time(i), b, (i - block_first_) * stack.batch + b);
    return count;
  }

  // The block's part of every gradient that is a sum over rows and asked for, divided by output elements, and its rows
  // of dx.
  void add_gradients(std::int64_t end) noexcept {
    const std::int64_t I = layer_.sizes.inputs, gates = Cell::gates * H_, early = Layout::early * H_;
    const LayerWeights<void*>& to = layer_.gradients;
    const Range own = share(gates, worker.index, worker.count, kTileRows<Plain::vectors>);
    const Range own_early{own.begin < early ? own.begin : early, own.end < early ? own.end : early};
    const auto in_gates = [&](T* base) {
      return [this, base](std::int64_t, std::int64_t, std::int64_t row) -> const T* {
        return base + row * s_.gate_stride;
      };
    };

    const std::int64_t rows = list(end, s_.left, in_gates(s_.dx_gates));
    if (to.w_ih) {
      list(end, s_.right, [&](std::int64_t t, std::int64_t b, std::int64_t) {
        return static_cast<const T*>(layer_.x) + (t * stack.batch + b) * layer_.x_stride;
      });
      add_outer_products(rows, s_.left, s_.right, own.begin, own.end, I, static_cast<T*>(to.w_ih), s_.buffer);
    }
    if (to.b_ih) add_rows(rows, s_.left, own.begin, own.end, static_cast<T*>(to.b_ih));
    if (layer_.dx) add_to_dx(rows, end);

    if constexpr (Cell::separate_recurrent) list(end, s_.left, in_gates(s_.dr_gates));
    if (to.w_hh) {
      list(end, s_.right, [&](std::int64_t t, std::int64_t b, std::int64_t) { return previous(0, t, b); });
      add_outer_products(rows, s_.left, s_.right, own_early.begin, own_early.end, P_, static_cast<T*>(to.w_hh),
                         s_.buffer);
    }
    if (to.b_hh) add_rows(rows, s_.left, own.begin, own.end, static_cast<T*>(to.b_hh));

    const auto hidden = [&](std::int64_t, std::int64_t, std::int64_t row) -> const T* {
      return s_.hidden + row * padded_h_;
    };
    if constexpr (Cell::late_gates > 0) {
      if (to.w_hh) {
        list(end, s_.right, hidden);
        const std::int64_t begin = own.begin > early ? own.begin : early;
        add_outer_products(rows, s_.left, s_.right, begin, own.end, H_, static_cast<T*>(to.w_hh), s_.buffer);
      }
    }
    if (to.w_hr) {
      list(end, s_.left,
           [&](std::int64_t, std::int64_t, std::int64_t row) -> const T* { return s_.dh + row * shape_.stride[0]; });
      list(end, s_.right, hidden);
      const Range projected = share(P_, worker.index, worker.count);
      add_outer_products(rows, s_.left, s_.right, projected.begin, projected.end, H_, static_cast<T*>(to.w_hr),
                         s_.buffer);
    }
    for (int e = 0; e < Cell::extras; ++e) {
      if (!to.extra[e]) continue;
      list(end, s_.left, [&](std::int64_t, std::int64_t, std::int64_t row) -> const T* {
        return s_.dextra + row * Cell::extras * H_ + e * H_;
      });
      const Range units = share(H_, worker.index, worker.count);
      add_rows(rows, s_.left, units.begin, units.end, static_cast<T*>(to.extra[e]));
    }
  }

  // dx = dx_gates W_ih for this worker's part of the `rows` listed in left; zero in rows past their end.
  void add_to_dx(std::int64_t rows, std::int64_t end) noexcept {
    const std::int64_t I = layer_.sizes.inputs;
    std::int64_t count = 0;
    const auto at = [&](std::int64_t t, std::int64_t b) {
      return static_cast<T*>(layer_.dx) + (t * stack.batch + b) * I;
    };
    for (std::int64_t i = end - 1; i >= block_first_; --i)
      for (std::int64_t b = 0; b < stack.batch; ++b) {
        T* row = at(time(i), b);
        if (time(i) < this->length(b))
          s_.outputs[count++] = row;
        else if (!layer_.add_to_dx && b % worker.count == worker.index)
          std::memset(row, 0, static_cast<std::size_t>(I) * sizeof(T));
      }
    const Range own = share(rows, worker.index, worker.count);
    plain_product<T>(own.end - own.begin, s_.left + own.begin, Cell::gates * H_, packed_.weights(packed_.at.w_ih_t),
                     nullptr, I, s_.outputs + own.begin, layer_.add_to_dx);
  }

  const Layer& layer_;
  const BackwardScratch<Cell, T>& s_;
  const PackedWeights<Cell, AsStates<T>> packed_;
  const std::int64_t H_, P_, padded_h_;
  const StateShape<Cell, T> shape_;
  std::int64_t block_first_ = 0;
};

template <class Cell, class T>
class BackwardLayer : public BackwardLoop<BackwardLayer<Cell, T>, Cell, T> {
  using Loop = BackwardLoop<BackwardLayer, Cell, T>;
  using Base = Context<Cell, T>;
  using Base::stack, Base::worker, Base::lanes;
  using Loop::layer_, Loop::s_, Loop::packed_, Loop::H_, Loop::P_, Loop::padded_h_, Loop::shape_;
  friend Loop;
  using V = Vec<T>;
  using Layout = PackedLayout<Cell, AsStates<T>>;

 public:
  using Loop::Loop;

 private:
  void enter() noexcept {
    enter_states<Cell, T>(this->rows_to_own(), shape_, layer_.dlast, s_.carry);
    if (worker.index == 0) std::memset(s_.zeros, 0, static_cast<std::size_t>(padded_h_) * sizeof(T));
    this->wait();
  }

  void leave() noexcept { leave_states<Cell, T>(this->rows_to_own(), shape_, s_.carry, layer_.dinitial); }

  int valid(std::int64_t unit, std::int64_t units) const noexcept {
    return units - unit < lanes ? static_cast<int>(units - unit) : lanes;
  }

  // `row0`: number in the block of the step's first row.
  void step(std::int64_t t, std::int64_t step_in_block) noexcept {
    t_ = t;
    row0_ = step_in_block * stack.batch;
    const Range own = this->rows();
    std::int64_t rows = 0;
    for (std::int64_t b = own.begin; b < own.end; ++b) {
      if (t >= this->length(b)) continue;
      for (int s = Cell::projects; s < Cell::states; ++s) s_.prev[s][rows] = this->previous(s, t, b);
      s_.batch_index[rows++] = b;
    }
    add_elementwise(rows);
    this->wait_if_units();
    if constexpr (Cell::late_gates > 0) {
      for (std::int64_t i = 0; i < rows; ++i) s_.inputs[i] = gate_row(s_.dr_gates, i) + Layout::early * H_;
      const Panels panels = this->panels(Plain::panels<T>(H_), step_in_block % 2 == 1);
      product<AsStates<T>, Plain>(
          rows, s_.inputs, Cell::late_gates * H_, packed_.weights(packed_.at.w_late_t), nullptr, H_, panels,
          [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
            for_plain_vectors<T>(panel, H_,
                                 [&](int v, std::int64_t unit, int count) { finish_late(i, unit, count, sum[v]); });
          });
      this->wait_if_units();
    }
    for (std::int64_t i = 0; i < rows; ++i) s_.inputs[i] = gate_row(s_.dr_gates, i);
    const Panels panels = this->panels(Plain::panels<T>(P_), step_in_block % 2 == 1);
    product<AsStates<T>, Plain>(rows, s_.inputs, Layout::early * H_, packed_.weights(packed_.at.w_early_t), nullptr, P_,
                                panels, [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                                  for_plain_vectors<T>(panel, P_, [&](int v, std::int64_t unit, int) {
                                    const std::int64_t b = s_.batch_index[i];
                                    T* to = carry(0, b) + unit;
                                    const V before = layer_.sizes.projected ? sum[v] : sum[v] + load<V>(to);
                                    store(to, this->cut(layer_.reverse, t, b) ? zero<V>() : before);
                                  });
                                });
    if (layer_.sizes.projected) this->wait_if_units();
  }

  T* carry(int state, std::int64_t b) const noexcept { return s_.carry[state] + b * shape_.stride[state]; }
  T* gate_row(T* gates, std::int64_t i) const noexcept { return gates + (row0_ + s_.batch_index[i]) * s_.gate_stride; }

  // dh of a row: what the later steps and the output ask of h.
  RNNKERN_INLINE V output_gradient(std::int64_t b, std::int64_t unit, int count) const noexcept {
    const V later = load<V>(carry(0, b) + unit);
    return layer_.dy ? later + load_some<V>(this->output_gradient_row(t_, b) + unit, count) : later;
  }

  void add_elementwise(std::int64_t rows) noexcept {
    const Panels panels = this->panels(Plain::panels<T>(H_));
    if (layer_.sizes.projected) {
      const Range own = this->by_units() ? share(rows, worker.index, worker.count) : Range{0, rows};
      for (std::int64_t i = own.begin; i < own.end; ++i) {
        const std::int64_t b = s_.batch_index[i];
        for (std::int64_t unit = 0; unit < P_; unit += lanes)
          store(s_.dh + (row0_ + b) * shape_.stride[0] + unit, output_gradient(b, unit, valid(unit, P_)));
      }
      this->wait_if_units();
      for (std::int64_t i = 0; i < rows; ++i) s_.inputs[i] = s_.dh + (row0_ + s_.batch_index[i]) * shape_.stride[0];
      product<AsStates<T>, Plain>(rows, s_.inputs, P_, packed_.weights(packed_.at.w_hr_t), nullptr, H_, panels,
                                  [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                                    for_plain_vectors<T>(panel, H_, [&](int v, std::int64_t unit, int count) {
                                      backward_vector(i, unit, count, sum[v]);
                                    });
                                  });
      return;
    }
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
        for_plain_vectors<T>(panel, H_, [&](int, std::int64_t unit, int count) {
          backward_vector(i, unit, count, output_gradient(s_.batch_index[i], unit, count));
        });
  }

  RNNKERN_INLINE void load_step(std::int64_t i, std::int64_t unit, int count, V* saved, V* prev) const noexcept {
    const T* row = this->saved_row(t_, s_.batch_index[i]) + unit;
    for (int v = 0; v < Cell::saved; ++v) saved[v] = load<V>(row + v * padded_h_);
    for (int s = Cell::projects; s < Cell::states; ++s) prev[s] = load_some<V>(s_.prev[s][i] + unit, count);
  }

  void backward_vector(std::int64_t i, std::int64_t unit, int count, V dh) const noexcept {
    const std::int64_t b = s_.batch_index[i];
    V saved[kSlots<Cell>], extra[kMaxExtras], prev[kMaxStates], h = {}, dnew[kMaxStates];
    V dx[Cell::gates], separate[Cell::gates], dprev[kMaxStates], dextra[kMaxExtras];
    V* dr = Cell::separate_recurrent ? separate : dx;
    load_step(i, unit, count, saved, prev);
    for (int e = 0; e < Cell::extras; ++e) extra[e] = load<V>(packed_.values(packed_.at.extras) + e * padded_h_ + unit);
    if constexpr (Cell::saved == 0) h = load_some<V>(this->output(t_, b) + unit, count);
    dnew[0] = dh;
    for (int s = 1; s < Cell::states; ++s) dnew[s] = load<V>(carry(s, b) + unit);
    Cell::backward(saved, extra, prev, h, dnew, dx, dr, dprev, dextra);

    store_gates(gate_row(s_.dx_gates, i) + unit, dx, count);
    if constexpr (Cell::separate_recurrent) store_gates(gate_row(s_.dr_gates, i) + unit, dr, count);
    for (int e = 0; e < Cell::extras; ++e)
      store_some<V>(s_.dextra + (row0_ + b) * Cell::extras * H_ + e * H_ + unit, dextra[e], count);
    if (!layer_.sizes.projected) store(carry(0, b) + unit, dprev[0]);
    for (int s = 1; s < Cell::states; ++s)
      store(carry(s, b) + unit, this->cut(layer_.reverse, t_, b) ? zero<V>() : dprev[s]);
    T* hidden = s_.hidden + (row0_ + b) * padded_h_ + unit;
    if constexpr (Cell::late_gates > 0) store(hidden, Cell::scaled(saved, prev));
    if constexpr (Cell::projects)
      if (layer_.sizes.projected) store(hidden, Cell::hidden(saved));
  }

  // The early gates and the rest of dprev, once the gradient of the scaled h is known.
  RNNKERN_INLINE void finish_late(std::int64_t i, std::int64_t unit, int count, V dscaled) const noexcept {
    if constexpr (Cell::late_gates > 0) {
      V saved[kSlots<Cell>], prev[kMaxStates], dx[Cell::gates];
      load_step(i, unit, count, saved, prev);
      T* dh = carry(0, s_.batch_index[i]) + unit;
      T* gates = gate_row(s_.dx_gates, i) + unit;
      V dprev = load<V>(dh);
      for (int gate = 0; gate < Layout::early; ++gate) dx[gate] = load_some<V>(gates + gate * H_, count);
      Cell::prepare_backward(saved, prev, &dscaled, dx, &dprev);
      store(dh, dprev);
      for (int gate = 0; gate < Layout::early; ++gate) store_some<V>(gates + gate * H_, dx[gate], count);
    }
  }

  RNNKERN_INLINE void store_gates(T* row, const V* gates, int count) const noexcept {
    for (int gate = 0; gate < Cell::gates; ++gate) store_some<V>(row + gate * H_, gates[gate], count);
  }

  std::int64_t t_ = 0, row0_ = 0;
};

}  // namespace
}  // namespace rnnkern
