// Backpropagation through time of one layer-direction, generic over cells; the mirror of recurrence.h.
//
// A step: gate gradients of every active row from dh = carry + dy (elementwise), then the carry for the step before it
// as their product with W_hh. dy is added after that product, so that a sequence cut in two gives the same bits.
#pragma once

#include "recurrence.h"
#include "watch.h"

namespace rnnkern {
namespace {

// What is measured of a row: the square of the norm of each state's gradient, and the saturated units of each gate.
template <class Cell>
constexpr int kMeasures = Cell::states + Cell::gates;

template <class Cell, class T>
struct BackwardScratch {
  T* carry[Cell::states];             // [B, stride]: gradients of the states after the step at hand, without dy
  T* dx_gates;                        // [block rows, gate_stride]: gradients of the gates, input side, unpadded [G, H]
  T* dr_gates;                        // the same, recurrent side; dx_gates where the cell has but one
  T* dextra;                          // [block rows, extras * H]
  T* dh;                              // [block rows, stride P]: gradient of the projected h
  T* given[Cell::Step::count];        // [block rows, padded H]: what a phase has given to the product behind it
  T* terms;                           // [B, vectors, padded H]: what the gradient of a mean over units is the sum of
  T* zeros;                           // [padded H]
  T* values;                          // [block rows, slots, padded H]: with Save::outputs what forward would have saved
  T* given_again[Cell::Step::count];  // [block rows, vectors, padded H]: and given
  double* measured;                   // [block rows, kMeasures, panels of H]: sums that are asked for, see watch.h
  std::int64_t gate_stride;
  // Of one worker.
  const T **left, **right;                 // [block rows]: of a sum of outer products
  T** outputs;                             // [block rows]
  T* buffer;                               // kOuterBuffer
  const T** before[Cell::states];          // [block rows]: states before each step; with Save::outputs
  const T **prev[Cell::states], **inputs;  // [B], of a step
  std::int64_t* batch_index;
  Operands<T> operands;

  BackwardScratch(Arena& arena, const KernelCall& call, const Arithmetic<T>& how, int worker_index) noexcept {
    const LayerSizes& sizes = call.layers[0].sizes;  // inputs apart those of all
    const StateShape<Cell, T> shape(sizes, call);
    const std::int64_t H = sizes.hidden, padded_h = padded<T>(H);
    const std::int64_t B = call.batch, rows = call.block_steps * B;
    gate_stride = scratch_stride<T>(Cell::gates * H);
    for (int s = 0; s < Cell::states; ++s) carry[s] = arena.take<T>(shape.elements(s, B));
    dx_gates = arena.take<T>(rows * gate_stride);
    dr_gates = Cell::separate_recurrent ? arena.take<T>(rows * gate_stride) : dx_gates;
    dextra = arena.take<T>(rows * Cell::extras * H);
    dh = arena.take<T>(sizes.projected ? rows * shape.stride[0] : 0);
    int most_means = 0;
    for_each_phase<Cell>([&]<int p>() {
      using Phase = PhaseOf<Cell, p>;
      given[p] = arena.take<T>(Phase::feeds_product && given_in<Cell, p>(sizes) ? rows * padded_h : 0);
      if (Phase::means > most_means) most_means = Phase::means;
    });
    terms = arena.take<T>(B * most_means * padded_h);
    zeros = arena.take<T>(padded_h);
    std::int64_t widest = Cell::gates * H;
    for (int i = 0; i < call.layer_count * call.directions; ++i)
      if (call.layers[i].sizes.inputs > widest) widest = call.layers[i].sizes.inputs;
    const std::int64_t again = call.save == Save::outputs && Cell::saved > 0 ? rows : 0;
    values = arena.take<T>(again * kSlots<Cell> * padded_h);
    for_each_phase<Cell>([&]<int p>() {
      given_again[p] = arena.take<T>(p < Cell::Step::last ? again * given_in<Cell, p>(sizes) * padded_h : 0);
    });
    measured = arena.take<double>(measures(call.watch) ? rows * kMeasures<Cell> * Plain::panels<T>(H) : 0);
    arena.take_for_workers(call.max_threads, worker_index, [&] {
      for (const T**& one : before) one = arena.take<const T*>(again);
      left = arena.take<const T*>(rows), right = arena.take<const T*>(rows), outputs = arena.take<T*>(rows);
      buffer = arena.take<T>(kOuterBuffer<T>);
      for (const T**& one : prev) one = arena.take<const T*>(B);
      inputs = arena.take<const T*>(B), batch_index = arena.take<std::int64_t>(B);
      operands.take(arena, how, rows, widest);
    });
  }
};

// The loop of backpropagation through time, and what a block adds to the gradients. Steps says what a step is: enter,
// step, leave.
template <class Steps, class Cell, class T>
class BackwardLoop : protected LayerContext<Cell, T> {
 public:
  using Base = Context<Cell, T>;
  using Loop = LayerContext<Cell, T>;
  using Base::how, Loop::time, Loop::output;
  using Loop::call, Loop::worker, Loop::layer_, Loop::H_, Loop::P_, Loop::padded_h_, Loop::shape_, Loop::block_first_;
  using V = Vec<T>;

  BackwardLoop(const Base& context, const Layer& layer, const BackwardScratch<Cell, T>& scratch) noexcept
      : Loop(context, layer), s_(scratch), packed_(layer, true, how.stored) {}

  // Returns the context with the block and the place that were reached.
  const Base& run() noexcept {
    Steps& steps = static_cast<Steps&>(*this);
    this->divide(Steps::grain, 0, call.steps);
    if (this->takes_part()) {
      steps.enter();
      if (layer_.dx && !layer_.add_to_dx)
        this->clear_past_ends(layer_.dx, layer_.x_rows, layer_.sizes.inputs, layer_.sizes.inputs);
    }
    for (std::int64_t end = call.steps; end > 0; end = block_first_) {
      if (!this->begin_block()) break;
      begin_rows(end);
      this->divide(Steps::grain, block_first_, end);
      if (Cell::saved > 0 && call.save == Save::outputs && this->takes_part()) {
        recompute_gates(end);
        this->wait();
      }
      if (!run_parts(steps, end)) break;
      if (!this->takes_part()) continue;
      add_gradients({block_first_, end});
      this->wait();
    }
    if (this->takes_part()) steps.leave();
    return *this;
  }

  // Runs the steps of a block and makes its rows of dx, a part after the other. Returns false when the call was given
  // up.
  bool run_parts(Steps& steps, std::int64_t end) noexcept {
    for (std::int64_t first; end > block_first_; end = first) {
      first = end - block_first_ > call.part_steps ? end - call.part_steps : block_first_;
      if (!this->await_layer(1, call.steps - first)) return false;
      for (std::int64_t i = end - 1; i >= first; --i) {
        this->begin();
        if (!this->takes_part()) continue;
        this->divide_again(Steps::grain, block_first_, i + 1);
        steps.step(time(i), i - block_first_);
      }
      if (!this->takes_part()) continue;
      this->wait();
      if (layer_.dx) add_to_dx({first, end});
      if (layer_.flow) report({first, end});
      this->hand_over(call.steps - first);
    }
    return true;
  }

 protected:
  // Begins a block: as many steps before `end` as there is room for their rows.
  void begin_rows(std::int64_t end) noexcept {
    block_first_ = end - steps_with_room(call, time(end - 1), layer_.reverse ? 1 : -1, end);
    block_row_ = row_of(call.kept, layer_.reverse ? time(end - 1) : block_first_, 0);
  }
  // The number of a row among those of the block at hand.
  std::int64_t row_in_block(std::int64_t t, std::int64_t b) const noexcept {
    return row_of(call.kept, t, b) - block_row_;
  }

  // Says whether step t is the first of row b, and which one came before it.
  bool is_first(std::int64_t t, std::int64_t b) const noexcept {
    return layer_.reverse ? t + 1 >= this->length(b) : t == 0;
  }
  std::int64_t before(std::int64_t t) const noexcept { return layer_.reverse ? t + 1 : t - 1; }

  const T* initial(int state, std::int64_t b) const noexcept {
    const T* from = static_cast<const T*>(layer_.initial[state]);
    return from ? from + this->state_row(b) * shape_.units[state] : s_.zeros;
  }
  const T* output_gradient_row(std::int64_t t, std::int64_t b) const noexcept {
    return static_cast<const T*>(layer_.dy) + row_of(layer_.y_rows, t, b) * layer_.dy_stride;
  }

  // Returns a state of row b when it entered step t.
  const T* previous(int state, std::int64_t t, std::int64_t b) const noexcept {
    if (this->cut(layer_.reverse, t, b)) return s_.zeros;
    if (is_first(t, b)) return initial(state, b);
    if (Cell::kept[state] == kInOutput) return output(before(t), b);
    if (call.save == Save::outputs) return this->saved_state(state, before(t), b);
    return Loop::saved_row(before(t), b) + Cell::kept[state] * padded_h_;
  }

  // Says whether dy is added where the gradient is used; else `watch` of a step has added it to the carry.
  bool adds_dy() const noexcept { return layer_.dy && !watches(call.watch); }

  // What is measured of a row of a block, by panels.
  double* measured(std::int64_t row, int measure) const noexcept {
    return s_.measured + (row * kMeasures<Cell> + measure) * Plain::panels<T>(H_);
  }
  double total(std::int64_t row, int measure) const noexcept {
    const double* const parts = measured(row, measure);
    const std::int64_t units = measure < Cell::states ? shape_.units[measure] : H_;
    double sum = 0;
    for (std::int64_t panel = 0; panel < Plain::panels<T>(units); ++panel) sum += parts[panel];
    return sum;
  }

  // Writes what was measured of some steps, for this worker's part of their rows.
  void report(Range steps) const noexcept {
    const std::int64_t B = call.batch, rows = call.given.padded ? call.given.padded * B : call.rows;
    const Range own = share((steps.end - steps.begin) * B, worker.index, worker.count);
    for (std::int64_t row = own.begin; row < own.end; ++row) {
      const std::int64_t t = time(steps.begin + row / B), b = row % B;
      if (b >= this->active(t)) continue;
      T* const to = static_cast<T*>(layer_.flow) + row_of(call.given, t, b);
      for (int m = 0; m < kMeasures<Cell>; ++m) {
        const double sum = total(row_in_block(t, b), m);
        to[m * rows] = static_cast<T>(m < Cell::states ? __builtin_sqrt(sum) : sum / static_cast<double>(H_));
      }
    }
  }

  // What forward has saved of row b in step t of the block at hand.
  const T* saved_row(std::int64_t t, std::int64_t b) const noexcept {
    if (call.save == Save::gates) return Loop::saved_row(t, b);
    return s_.values + row_in_block(t, b) * kSlots<Cell> * padded_h_;
  }

  // Computes what forward saves for the steps of a block, a product over all their rows for each one of forward's: a
  // state before a step is there already. Workers divide the rows, or the steps where each has all rows.
  void recompute_gates(std::int64_t end) noexcept {
    const Range steps{block_first_, end};
    const Range part =
        this->by_units() ? share(end - block_first_, worker.index, worker.count) : Range{0, end - block_first_};
    std::int64_t rows = 0;
    for (std::int64_t i = steps.begin + part.begin; i < steps.begin + part.end; ++i) {
      const Range own = this->active_rows(time(i));
      for (std::int64_t b = own.begin; b < own.end; ++b) {
        s_.left[rows] = this->x_row(time(i), b);
        s_.outputs[rows] = const_cast<T*>(saved_row(time(i), b));
        for (int s = 0; s < Cell::states; ++s) s_.before[s][rows] = previous(s, time(i), b);
        ++rows;
      }
    }
    using Input = PanelShape<Cell::gates>;
    product<Input>(how, s_.operands, rows, s_.left, layer_.sizes.inputs, packed_.weights(packed_.at.w_ih),
                   packed_.values(packed_.at.b_ih), H_, Panels{0, Input::template panels<T>(H_)},
                   [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                     for_units<T, Input>(panel, H_, [&](int sub, std::int64_t unit, int) {
                       for (int gate = 0; gate < Cell::gates; ++gate)
                         store(s_.outputs[i] + gate * padded_h_ + unit, sum[sub * Cell::gates + gate]);
                     });
                   });
    for_each_phase<Cell>([&]<int p>() {
      if constexpr (!PhaseOf<Cell, p>::projects) recompute_phase<p>(rows);
    });
  }

  template <int p>
  void recompute_phase(std::int64_t rows) noexcept {
    using Phase = PhaseOf<Cell, p>;
    using Shape = PanelShape<Phase::outputs>;
    const auto given = [&](int phase, std::int64_t i, std::int64_t vectors) {
      return s_.given_again[phase] + (s_.outputs[i] - s_.values) / kSlots<Cell> * vectors;
    };
    const auto done = [&](std::int64_t i, std::int64_t panel, const V* results, int step) {
      for_units<T, Shape>(panel, H_, [&](int sub, std::int64_t unit, int count) {
        V extra[kMaxExtras], prev[kMaxStates], next[Phase::sets];
        for (int e = 0; e < Cell::extras; ++e)
          extra[e] = load<V>(packed_.values(packed_.at.extras) + e * padded_h_ + unit);
        for (int s = Cell::Step::projects; s < Cell::states; ++s) prev[s] = load_some<V>(s_.before[s][i] + unit, count);
        part_of_row<Cell, p>(s_.outputs[i] + unit, padded_h_, results + sub * step, extra, prev, next, true);
        if constexpr (!Phase::is_last)
          for (int v = 0; v < Phase::given; ++v) store(given(p, i, Phase::given) + v * padded_h_ + unit, next[v]);
      });
    };
    const Panels panels{0, Shape::template panels<T>(H_)};
    if constexpr (Phase::multiplies) {
      const T* const* inputs = s_.before[0];
      if constexpr (p > 0) {
        for (std::int64_t i = 0; i < rows; ++i) s_.right[i] = given(p - 1, i, 1);
        inputs = s_.right;
      }
      product<Shape>(how, s_.operands, rows, inputs, product_of<Phase>(layer_.sizes).depth,
                     packed_.weights(packed_.at.weights[p]), packed_.values(packed_.at.bias[p]), H_, panels,
                     [&](std::int64_t i, std::int64_t panel, const V* sum)
                         RNNKERN_INLINE_LAMBDA { done(i, panel, sum, Phase::outputs); });
    } else {
      for (std::int64_t i = 0; i < rows; ++i) {
        V means[Phase::means + 1];
        if constexpr (p > 0)
          for (int k = 0; k < Phase::means; ++k)
            means[k] = mean_of_units<V>(given(p - 1, i, Phase::means) + k * padded_h_, H_);
        for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) done(i, panel, means, 0);
      }
    }
  }

  // Lists the active rows of some steps of a block in the order of backward and of the caller's batch, the same for
  // every block size; row(t, b, index in block).
  template <class Pointer, class Row>
  std::int64_t list(Range steps, Pointer* rows, Row&& row) const noexcept {
    std::int64_t count = 0;
    for (std::int64_t i = steps.end - 1; i >= steps.begin; --i) {
      const std::int64_t t = time(i), active = this->active(t), first = row_in_block(t, 0);
      for (std::int64_t k = 0; k < call.batch; ++k) {
        const std::int64_t b = call.sorted ? call.sorted[k] : k;
        if (b < active) rows[count++] = row(t, b, first + b);
      }
    }
    return count;
  }

  // The same for rows that are `stride` apart in working memory.
  __attribute__((noinline)) std::int64_t list(Range steps, const T** rows, const T* first,
                                              std::int64_t stride) const noexcept {
    return list(steps, rows, [&](std::int64_t, std::int64_t, std::int64_t row) { return first + row * stride; });
  }

  // Adds a block's part of every gradient that is a sum over rows and asked for, divided by output elements.
  void add_gradients(Range steps) noexcept {
    const std::int64_t I = layer_.sizes.inputs, gates = Cell::gates * H_;
    const LayerWeights<void*>& to = layer_.gradients;
    const Range own = share(gates, worker.index, worker.count, kTileRows<Plain::vectors>);
    const std::int64_t rows = list(steps, s_.left, s_.dx_gates, s_.gate_stride);
    if (to.w_ih) {
      list(steps, s_.right, [&](std::int64_t t, std::int64_t b, std::int64_t) { return this->x_row(t, b); });
      how.add_outer_products(rows, s_.left, s_.right, own.begin, own.end, I, static_cast<T*>(to.w_ih), s_.buffer);
    }
    if (to.b_ih) add_rows(rows, s_.left, own.begin, own.end, static_cast<T*>(to.b_ih));
    if constexpr (Cell::separate_recurrent) list(steps, s_.left, s_.dr_gates, s_.gate_stride);
    for_each_phase<Cell>([&]<int p>() {
      if constexpr (PhaseOf<Cell, p>::multiplies) add_gradients_of<p>(rows, steps, own);
    });
    for (int e = 0; e < Cell::extras; ++e) {
      if (!to.extra[e]) continue;
      list(steps, s_.left, s_.dextra + e * H_, Cell::extras * H_);
      const Range units = share(H_, worker.index, worker.count);
      add_rows(rows, s_.left, units.begin, units.end, static_cast<T*>(to.extra[e]));
    }
  }

  // Adds the gradients of the weights and biases of a phase; left: the gradients of the gates, recurrent side. The rows
  // of the gates are divided alike for all phases: `own` of them.
  template <int p>
  void add_gradients_of(std::int64_t rows, Range steps, Range own) noexcept {
    using Phase = PhaseOf<Cell, p>;
    const ProductSizes of = product_of<Phase>(layer_.sizes);
    const LayerWeights<void*>& to = layer_.gradients;
    T* const weights = static_cast<T*>(Phase::projects ? to.w_hr : to.w_hh);
    const std::int64_t first = Phase::first * H_, last = Phase::end * H_;
    if (Phase::projects)
      own = share(P_, worker.index, worker.count);
    else
      own = {own.begin < first ? first : own.begin, own.end < last ? own.end : last};
    if (!Phase::projects && to.b_hh) add_rows(rows, s_.left, own.begin, own.end, static_cast<T*>(to.b_hh));
    if (!weights) return;
    if constexpr (Phase::projects) list(steps, s_.left, s_.dh, shape_.stride[0]);
    if constexpr (p > 0)
      list(steps, s_.right, s_.given[p - 1], padded_h_);
    else
      list(steps, s_.right, [&](std::int64_t t, std::int64_t b, std::int64_t) { return previous(0, t, b); });
    how.add_outer_products(rows, s_.left, s_.right, own.begin, own.end, of.depth, weights, s_.buffer);
  }

  // dx = dx_gates W_ih for this worker's part of the rows of some steps.
  void add_to_dx(Range steps) noexcept {
    const std::int64_t I = layer_.sizes.inputs;
    const std::int64_t rows = list(steps, s_.left, s_.dx_gates, s_.gate_stride);
    list(steps, s_.outputs, [&](std::int64_t t, std::int64_t b, std::int64_t) {
      return static_cast<T*>(layer_.dx) + row_of(layer_.x_rows, t, b) * I;
    });
    const Range own = share(rows, worker.index, worker.count);
    plain_product<T>(how, s_.operands, own.end - own.begin, s_.left + own.begin, Cell::gates * H_,
                     packed_.weights(packed_.at.w_ih_t), nullptr, I, s_.outputs + own.begin, layer_.add_to_dx);
  }

  const BackwardScratch<Cell, T>& s_;
  const PackedWeights<Cell, T> packed_;
  std::int64_t block_row_ = 0;  // kept rows before those of the block
};

template <class Cell, class T>
class BackwardLayer : public BackwardLoop<BackwardLayer<Cell, T>, Cell, T> {
  using Loop = BackwardLoop<BackwardLayer, Cell, T>;
  using Base = Context<Cell, T>;
  using Base::call, Base::worker, Base::how, Base::lanes;
  using Loop::layer_, Loop::s_, Loop::packed_, Loop::H_, Loop::P_, Loop::padded_h_, Loop::shape_;
  friend Loop;
  static constexpr std::int64_t grain = 1;
  using V = Vec<T>;

 public:
  using Loop::Loop;

 private:
  void enter() noexcept { this->enter_states(layer_.dlast, s_.carry, s_.zeros); }
  void leave() noexcept { this->leave_states(s_.carry, layer_.dinitial); }

  // `row0`: number in the block of the step's first row.
  void step(std::int64_t t, std::int64_t step_in_block) noexcept {
    t_ = t;
    row0_ = this->row_in_block(t, 0);
    const Range own = this->active_rows(t);
    std::int64_t rows = 0;
    for (std::int64_t b = own.begin; b < own.end; ++b) {
      for (int s = Cell::Step::projects; s < Cell::states; ++s) s_.prev[s][rows] = this->previous(s, t, b);
      s_.batch_index[rows++] = b;
    }
    if (watches(call.watch)) watch(rows);
    for_each_phase_backwards<Cell>([&]<int p>() RNNKERN_INLINE_LAMBDA { run_phase<p>(rows, step_in_block % 2 == 1); });
    if constexpr (PhaseOf<Cell, 0>::from == From::nothing) this->wait_if_units();
  }

  // Adds dy to the gradients of the states after the step, measures and bounds them.
  __attribute__((noinline)) void watch(std::int64_t rows) noexcept {
    const Watch& asked = call.watch;
    const auto for_rows = [&](auto&& body) {
      for (int s = 0; s < Cell::states; ++s) {
        const Panels panels = this->panels(Plain::panels<T>(shape_.units[s]));
        for (std::int64_t i = 0; i < rows; ++i) body(s, s_.batch_index[i], panels, shape_.units[s]);
      }
    };
    for_rows([&](int s, std::int64_t b, Panels panels, std::int64_t units) {
      const T* const dy = s == 0 && layer_.dy ? this->output_gradient_row(t_, b) : nullptr;
      watch_row(carry(s, b), dy, panels, units, asked, this->measured(row0_ + b, s));
    });
    if (asked.flow) {
      const Panels panels = this->panels(Plain::panels<T>(H_));
      for (std::int64_t i = 0; i < rows; ++i) {
        const std::int64_t b = s_.batch_index[i];
        const T* const gates = Cell::saved > 0 ? this->saved_row(t_, b) : this->output(t_, b);
        for (int gate = 0; gate < Cell::gates; ++gate)
          count_saturated(gates + gate * padded_h_, panels, H_, asked.low[gate], asked.high[gate],
                          this->measured(row0_ + b, Cell::states + gate));
      }
    }
    if (asked.bound != Bound::norm) return;
    this->wait_if_units();  // for the sums of the others
    for_rows([&](int s, std::int64_t b, Panels panels, std::int64_t units) {
      const T factor = factor_of<T>(asked, this->total(row0_ + b, s));
      const Range own = units_of<T>(panels, units);
      if (factor != T{1}) scale(carry(s, b) + own.begin, own.end - own.begin, factor);
    });
  }

  // Takes the gradients of the results of phase p back to what it has taken: to the part of the phase before it, or to
  // the step before.
  template <int p>
  RNNKERN_INLINE void run_phase(std::int64_t rows, bool backwards) noexcept {
    using Phase = PhaseOf<Cell, p>;
    const ProductSizes of = product_of<Phase>(layer_.sizes);
    const bool projected = layer_.sizes.projected;
    if (Phase::projects && !projected) return;
    if (Phase::projects || (Phase::is_last && !(Phase::Step::projects && projected))) run_last<p>(rows, of.units);
    if constexpr (Phase::from == From::nothing) return;
    if (p == 0 && !layer_.dinitial[0] && t_ == this->time(0)) return;  // nobody wants what it carries on
    this->wait_if_units();
    const Panels panels = this->panels(Plain::panels<T>(of.depth), backwards);
    if constexpr (Phase::multiplies) {
      for (std::int64_t i = 0; i < rows; ++i)
        s_.inputs[i] = Phase::projects ? dh(i) : gate_row(s_.dr_gates, i) + Phase::first * H_;
      const T* const none = nullptr;
      product<Plain>(how, s_.operands, rows, s_.inputs, of.rows, packed_.weights(packed_.at.weights_t[p]), none,
                     of.depth, panels, [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                       for_units<T>(panel, of.depth, [&](int v, std::int64_t unit, int count) {
                         if constexpr (p > 0)
                           run_part<p - 1>(i, unit, count, sum + v);
                         else
                           add_to_carry(i, unit, sum[v]);
                       });
                     });
    } else if constexpr (Phase::means > 0) {
      for (std::int64_t i = 0; i < rows; ++i) {
        V means[Phase::means];
        for (int k = 0; k < Phase::means; ++k) means[k] = mean_of_units<V>(terms<p>(i) + k * padded_h_, H_);
        for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
          for_units<T>(panel, H_, [&](int, std::int64_t unit, int count) { run_part<p - 1>(i, unit, count, means); });
      }
    }
  }

  // The last phase gets its gradient from the later steps and the output.
  template <int p>
  void run_last(std::int64_t rows, std::int64_t units) noexcept {
    const Panels panels = this->panels(Plain::panels<T>(units));
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
        for_units<T>(panel, units, [&](int, std::int64_t unit, int count) {
          const V gradient = output_gradient(s_.batch_index[i], unit, count);
          if constexpr (PhaseOf<Cell, p>::projects)
            store(dh(i) + unit, gradient);
          else
            run_part<p>(i, unit, count, &gradient);
        });
  }

  void add_to_carry(std::int64_t i, std::int64_t unit, V sum) const noexcept {
    const std::int64_t b = s_.batch_index[i];
    T* to = carry(0, b) + unit;
    const V before = layer_.sizes.projected ? sum : sum + load<V>(to);
    store(to, this->cut(layer_.reverse, t_, b) ? zero<V>() : before);
  }

  T* dh(std::int64_t i) const noexcept { return s_.dh + (row0_ + s_.batch_index[i]) * shape_.stride[0]; }
  template <int p>
  T* terms(std::int64_t i) const noexcept {
    return s_.terms + s_.batch_index[i] * PhaseOf<Cell, p>::means * padded_h_;
  }
  T* carry(int state, std::int64_t b) const noexcept { return s_.carry[state] + shape_.row(state, b); }
  T* gate_row(T* gates, std::int64_t i) const noexcept { return gates + (row0_ + s_.batch_index[i]) * s_.gate_stride; }

  // dh of a row: what the later steps and the output ask of h.
  RNNKERN_INLINE V output_gradient(std::int64_t b, std::int64_t unit, int count) const noexcept {
    const V later = load<V>(carry(0, b) + unit);
    return adds_dy_ ? later + load_some<V>(this->output_gradient_row(t_, b) + unit, count) : later;
  }

  // Runs the elementwise part of phase p for a vector of units, from the gradients of what it has given. It adds to
  // what the parts of later phases have left for the gates and the states before the step.
  template <int p>
  void run_part(std::int64_t i, std::int64_t unit, int count, const V* dgiven) const noexcept {
    using Phase = PhaseOf<Cell, p>;
    const std::int64_t b = s_.batch_index[i];
    const bool projected = Phase::Step::projects && layer_.sizes.projected;
    V saved[kSlots<Cell>], extra[kMaxExtras], prev[kMaxStates], h = {}, dnew[Phase::sets];
    V dx[Cell::gates] = {}, dr[Cell::gates + Phase::means], dprev[kMaxStates] = {}, dextra[kMaxExtras] = {};
    T* const gates = gate_row(s_.dx_gates, i) + unit;
    T* const to_extra = s_.dextra + (row0_ + b) * Cell::extras * H_ + unit;
    const T* const row = this->saved_row(t_, b) + unit;
    for (int v = 0; v < Cell::saved; ++v) saved[v] = load<V>(row + v * padded_h_);
    for (int e = 0; e < Cell::extras; ++e) extra[e] = load<V>(packed_.values(packed_.at.extras) + e * padded_h_ + unit);
    for (int s = Phase::Step::projects; s < Cell::states; ++s) prev[s] = load_some<V>(s_.prev[s][i] + unit, count);
    if constexpr (Phase::is_last && Cell::saved == 0) h = load_some<V>(this->output(t_, b) + unit, count);
    if constexpr (Phase::is_last) {
      dnew[0] = dgiven[0];
      for (int s = 1; s < Cell::states; ++s) dnew[s] = load<V>(carry(s, b) + unit);
    } else {
      for (int v = 0; v < Phase::sets; ++v) dnew[v] = dgiven[v];
      for (int gate = 0; gate < Phase::end; ++gate) dx[gate] = load_some<V>(gates + gate * H_, count);
      for (int s = 0; s < Cell::states; ++s) dprev[s] = load<V>(carry(s, b) + unit);
      for (int e = 0; e < Cell::extras; ++e) dextra[e] = load_some<V>(to_extra + e * H_, count);
    }
    backward_part<Cell, p>(saved, extra, prev, &h, dnew, dx, dr, dprev, dextra);

    for (int gate = 0; gate < Phase::end; ++gate) store_some<V>(gates + gate * H_, dx[gate], count);
    if constexpr (Cell::separate_recurrent)
      for (int gate = 0; gate < Phase::gates; ++gate)
        store_some<V>(gate_row(s_.dr_gates, i) + (Phase::first + gate) * H_ + unit, dr[gate], count);
    for (int k = 0; k < Phase::means; ++k) store(terms<p>(i) + k * padded_h_ + unit, dr[k]);
    for (int e = 0; e < Cell::extras; ++e) store_some<V>(to_extra + e * H_, dextra[e], count);
    if constexpr (Phase::feeds_product)
      if (Phase::Step::last > p || projected)
        store(s_.given[p] + (row0_ + b) * padded_h_ + unit, given_by_part<Cell, p>(saved, prev));
    // Past a reset nothing goes to the step before; what a product adds to the gradient of h, it cuts.
    const bool cut = p == 0 && this->cut(layer_.reverse, t_, b);
    for (int s = projected; s < Cell::states; ++s)
      store(carry(s, b) + unit, cut && (s > 0 || Phase::from == From::nothing) ? zero<V>() : dprev[s]);
  }

  std::int64_t t_ = 0, row0_ = 0;
  const bool adds_dy_ = this->adds_dy();
};

}  // namespace
}  // namespace rnnkern
