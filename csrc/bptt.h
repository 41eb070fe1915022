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
  T* carry[Cell::states];       // [B, stride]: gradients of the states after the step at hand, without dy
  T* dx_gates;                  // [block rows, gate_stride]: gradients of the gates, input side, unpadded [G, H]
  T* dr_gates;                  // the same, recurrent side; dx_gates where the cell has but one
  T* dextra;                    // [block rows, extras * H]
  T* dh;                        // [block rows, stride P]: gradient of the projected h
  T* given[Cell::Step::count];  // [block rows, vectors, padded H]: what a phase has given to the one behind it, a
                                // product or with Save::outputs another
  T* terms;                     // [B, vectors, padded H]: what the gradient of a mean over units is the sum of
  T* zeros;                     // [zero_count]
  std::int64_t zero_count;      // padded H, or of the longest row that is summed
  T* values;                    // [block rows, slots, padded H]: with Save::outputs what forward would have saved
  double* measured;             // [block rows, kMeasures, panels of H]: sums that are asked for, see watch.h
  std::int64_t gate_stride;
  // Of one worker.
  const T **left, **right;       // [block rows]: of a sum of outer products
  const T** filled[2];           // the same with those of a step filled up, where they are summed first
  T** outputs;                   // [block rows]
  T* buffer;                     // kOuterBuffer
  T** carry_rows[Cell::states];  // [B]: of `carry`
  const T** prev[Cell::states];  // [block rows]: states before each step
  const T** inputs;              // [B], of a step
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
    const std::int64_t again = call.save == Save::outputs && Cell::saved > 0 ? rows : 0;
    int most_means = 0;
    for_each_phase<Cell>([&]<int p>() {
      using Phase = PhaseOf<Cell, p>;
      given[p] = arena.take<T>((Phase::feeds_product ? rows : again) * given_in<Cell, p>(sizes) * padded_h);
      if (Phase::means > most_means) most_means = Phase::means;
    });
    terms = arena.take<T>(B * most_means * padded_h);
    std::int64_t widest = Cell::gates * H;
    for (int i = 0; i < call.layer_count * call.directions; ++i)
      if (call.layers[i].sizes.inputs > widest) widest = call.layers[i].sizes.inputs;
    zero_count = how.sums_steps ? padded<T>(widest) : padded_h;
    zeros = arena.take<T>(zero_count);
    values = arena.take<T>(again * kSlots<Cell> * padded_h);
    measured = arena.take<double>(measures(call.watch) ? rows * kMeasures<Cell> * Plain::panels<T>(H) : 0);
    arena.take_for_workers(call.max_threads, worker_index, [&] {
      left = arena.take<const T*>(rows), right = arena.take<const T*>(rows), outputs = arena.take<T*>(rows);
      // Where rows end, a block has as many steps as there is room for their rows, with a row each at worst.
      const std::int64_t most_steps = call.lengths ? smaller(rows, call.steps) : call.block_steps;
      const std::int64_t filled_rows = how.sums_steps ? rows + most_steps * (kSumRows - 1) : 0;
      for (const T**& one : filled) one = arena.take<const T*>(filled_rows);
      buffer = arena.take<T>(kOuterBuffer<T>);
      for (T**& one : carry_rows) one = arena.take<T*>(B);
      for (const T**& one : prev) one = arena.take<const T*>(rows);
      inputs = arena.take<const T*>(B);
      operands.take(arena, how, rows, widest);
    });
  }
};

// Lists rows again, with zeros behind those of each step up to a multiple of kSumRows. Returns how many.
template <class T>
__attribute__((noinline)) std::int64_t fill_steps(const KernelCall& call, const Listed& which, const T* const* rows,
                                                  const T* zeros, const T** filled) noexcept {
  std::int64_t count = 0;
  for (std::int64_t t = which.t, i = 0; i < which.count; ++i, t += which.direction) {
    for (std::int64_t b = active_rows_of(call, t); b > 0; --b) filled[count++] = *rows++;
    while (count % kSumRows != 0) filled[count++] = zeros;
  }
  return count;
}

// The loop of backpropagation through time, and what a block adds to the gradients. Steps says what a step is:
// take_rows, enter_block, step.
template <class Steps, class Cell, class T>
class BackwardLoop : protected LayerContext<Cell, T> {
 public:
  using Base = Context<Cell, T>;
  using Loop = LayerContext<Cell, T>;
  using Base::how, Loop::time;
  using Loop::block_first_;
  using Loop::call, Loop::worker, Loop::layer_, Loop::packed_, Loop::H_, Loop::P_, Loop::padded_h_, Loop::shape_;
  using V = Vec<T>;

  BackwardLoop(const Base& context, const Layer& layer, const BackwardScratch<Cell, T>& scratch) noexcept
      : Loop(context, layer, true), s_(scratch) {}

  // Returns the context with the block and the place that were reached.
  const Base& run() noexcept {
    Steps& steps = static_cast<Steps&>(*this);
    if (this->takes_part()) {
      Loop::divide(Steps::grain, 0, call.steps);
      // Ends in a barrier, behind which all read the zeros.
      this->enter_states(layer_.dlast, s_.carry, s_.carry, s_.zeros, s_.zero_count);
      if (layer_.x_rows.padded && layer_.dx && !layer_.add_to_dx)
        clear_rows(call, worker, layer_.x_rows, static_cast<T*>(layer_.dx), layer_.sizes.inputs, layer_.sizes.inputs);
    }
    for (std::int64_t end = call.steps; end > 0; end = block_first_) {
      if (!this->begin_block()) break;
      begin_rows(end);
      if (this->takes_part()) divide(end), steps.enter_block({block_first_, end});
      list_rows(call, all_rows({block_first_, end}), in_block<const T>(s_.dx_gates, s_.gate_stride), s_.left);
      if (!run_parts(steps, end)) break;
      if (!this->takes_part()) continue;
      add_gradients({block_first_, end});
      this->wait();
    }
    if (this->takes_part()) this->leave_states(s_.carry, s_.carry, layer_.dinitial);
    return *this;
  }

  // Runs the steps of a block and makes its rows of dx, a part after the other. Returns false when the call was given
  // up.
  bool run_parts(Steps& steps, std::int64_t end) noexcept {
    std::int64_t done = 0;  // rows
    for (std::int64_t first; end > block_first_; end = first) {
      first = end - block_first_ > call.part_steps ? end - call.part_steps : block_first_;
      if (!this->await_layer(1, call.steps - first)) return false;
      for (std::int64_t i = end - 1; i >= first; --i) {
        this->begin();
        if (!this->takes_part()) continue;
        if (this->is_to_divide()) divide(i + 1);
        steps.step(time(i), i - block_first_);
      }
      const std::int64_t rows = rows_of({first, end}), begin = done;
      done += rows;
      if (!this->takes_part()) continue;
      this->wait();
      if (layer_.dx) add_to_dx({first, end}, begin, rows);
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
  // Divides the rows that a block has before step `end`.
  __attribute__((noinline)) void divide(std::int64_t end) noexcept {
    Loop::divide(Steps::grain, block_first_, end);
    static_cast<Steps&>(*this).take_rows({block_first_, end});
  }
  // Counts the rows of some steps.
  std::int64_t rows_of(Range steps) const noexcept {
    const std::int64_t count = steps.end - steps.begin, begin = layer_.reverse ? call.steps - steps.end : steps.begin;
    return row_of(call.kept, begin + count, 0) - row_of(call.kept, begin, 0);
  }
  // Returns the number of a row among those of the block at hand.
  std::int64_t row_in_block(std::int64_t t, std::int64_t b) const noexcept {
    return row_of(call.kept, t, b) - block_row_;
  }
  // Rows that are `stride` apart in working memory.
  template <class E>
  ArrayRows<E> in_block(E* array, std::int64_t stride) const noexcept {
    return {array, stride, call.kept, block_row_};
  }
  // All rows of some steps, in the order of backward. That of the caller's batch is the same for every block size.
  Listed all_rows(Range steps) const noexcept {
    Listed rows = this->own_rows(steps, true);
    rows.own = {0, call.batch}, rows.sorted = call.sorted;
    return rows;
  }

  ArrayRows<const T> output_gradients() const noexcept {
    return {static_cast<const T*>(layer_.dy), layer_.dy_stride, layer_.y_rows};
  }

  // Where rows have a state after a step.
  ArrayRows<const T> after_steps(int state) const noexcept {
    const auto rows_of = [](const ArrayRows<T>& rows, std::int64_t offset) {
      return ArrayRows<const T>{rows.array + offset, rows.stride, rows.map};
    };
    if (Cell::kept[state] == kInOutput) return rows_of(this->y(), 0);
    if (call.save == Save::outputs) return rows_of(this->saved_states(state), 0);
    return rows_of(Loop::saved_values(), Cell::kept[state] * padded_h_);
  }
  // Says whether step t is the first of row b, and which one came before it.
  bool is_first(std::int64_t t, std::int64_t b) const noexcept {
    return layer_.reverse ? t + 1 >= length_of(call, b) : t == 0;
  }
  std::int64_t before(std::int64_t t) const noexcept { return layer_.reverse ? t + 1 : t - 1; }
  // Returns where row b has a state with which it enters step t.
  const T* entered(int state, std::int64_t t, std::int64_t b) const noexcept {
    const T* const initial = static_cast<const T*>(layer_.initial[state]);
    if (this->cut(layer_.reverse, t, b)) return s_.zeros;
    if (!is_first(t, b)) return after_steps(state).of_step(before(t))(b);
    return initial ? initial + state_row_of(call, b) * shape_.units[state] : s_.zeros;
  }
  // Lists it for some rows in the order of backward. Most often all of them but those of the first step have it from
  // the step before.
  __attribute__((noinline)) void list_entered(int state, const Listed& which, const T** rows) const noexcept {
    std::int64_t t = which.t, left = which.count;
    if (!call.resets && !(layer_.reverse && call.lengths)) {
      ArrayRows<const T> after = after_steps(state);
      after.shift = before(0);
      Listed alike = which;
      alike.count -= is_first(t + (left - 1) * which.direction, 0) ? 1 : 0;
      rows = list_rows(call, alike, after, rows);
      t += alike.count * which.direction, left -= alike.count;
    }
    for (; left > 0; --left, t += which.direction)
      for (std::int64_t k = which.own.begin; k < which.own.end; ++k) {
        const std::int64_t b = which.sorted ? which.sorted[k] : k;
        if (b < this->active(t)) *rows++ = entered(state, t, b);
      }
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
  ArrayRows<T> saved_values() const noexcept {
    if (call.save == Save::gates) return Loop::saved_values();
    return in_block(s_.values, kSlots<Cell> * padded_h_);
  }

  // Adds a block's part of every gradient that is a sum over rows and asked for, divided by output elements.
  void add_gradients(Range steps) noexcept {
    const std::int64_t I = layer_.sizes.inputs, gates = Cell::gates * H_;
    const LayerWeights<void*>& to = layer_.gradients;
    const Range own = share(gates, worker.index, worker.count, kTileRows<Plain::vectors>);
    const std::int64_t rows = rows_of(steps);  // listed on the left
    const Listed which = all_rows(steps);
    if (to.w_ih) {
      list_rows(call, which, this->x(), s_.right);
      add_outer_products(rows, which, own, I, static_cast<T*>(to.w_ih));
    }
    if (to.b_ih) add_rows(rows, s_.left, own.begin, own.end, static_cast<T*>(to.b_ih));
    if constexpr (Cell::separate_recurrent)
      list_rows(call, which, in_block<const T>(s_.dr_gates, s_.gate_stride), s_.left);
    for_each_phase<Cell>([&]<int p>() {
      if constexpr (PhaseOf<Cell, p>::multiplies) add_gradients_of<p>(rows, which, own);
    });
    for (int e = 0; e < Cell::extras; ++e) {
      if (!to.extra[e]) continue;
      list_rows(call, which, in_block<const T>(s_.dextra + e * H_, Cell::extras * H_), s_.left);
      const Range units = share(H_, worker.index, worker.count);
      add_rows(rows, s_.left, units.begin, units.end, static_cast<T*>(to.extra[e]));
    }
  }

  // Adds the gradients of the weights and biases of a phase; left: the gradients of the gates, recurrent side. The rows
  // of the gates are divided alike for all phases: `own` of them.
  template <int p>
  void add_gradients_of(std::int64_t rows, const Listed& which, Range own) noexcept {
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
    if constexpr (Phase::projects) list_rows(call, which, in_block<const T>(s_.dh, shape_.stride[0]), s_.left);
    if constexpr (p > 0)
      list_rows(call, which, in_block<const T>(s_.given[p - 1], padded_h_), s_.right);
    else
      list_entered(0, which, s_.right);
    add_outer_products(rows, which, own, of.depth, weights);
  }

  // Adds to `own` rows of a matrix the products of what is listed on the left and on the right.
  void add_outer_products(std::int64_t rows, const Listed& which, Range own, std::int64_t columns,
                          T* to) const noexcept {
    const T *const *left = s_.left, *const *right = s_.right;
    if (how.sums_steps) {
      rows = fill_steps(call, which, left, s_.zeros, s_.filled[0]);
      fill_steps(call, which, right, s_.zeros, s_.filled[1]);
      left = s_.filled[0], right = s_.filled[1];
    }
    how.add_outer_products(rows, left, right, own.begin, own.end, columns, to, s_.buffer);
  }

  // dx = dx_gates W_ih for this worker's part of the rows of some steps: `count` from `first` on of those on the left.
  void add_to_dx(Range steps, std::int64_t first, std::int64_t count) noexcept {
    const std::int64_t I = layer_.sizes.inputs;
    list_rows(call, all_rows(steps), ArrayRows<T>{static_cast<T*>(layer_.dx), I, layer_.x_rows}, s_.outputs);
    const Range own = share(count, worker.index, worker.count);
    plain_product<T>(how, s_.operands, own.end - own.begin, s_.left + first + own.begin, Cell::gates * H_,
                     packed_.weights(packed_.at.w_ih_t), nullptr, I, s_.outputs + own.begin, layer_.add_to_dx);
  }

  const BackwardScratch<Cell, T>& s_;
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
  // Lists the carries of this worker's rows, and the states with which they enter some steps.
  void take_rows(Range steps) noexcept {
    const Range own = this->rows();
    for (int s = 0; s < Cell::states; ++s)
      for (std::int64_t b = own.begin; b < own.end; ++b) s_.carry_rows[s][b] = s_.carry[s] + shape_.row(s, b);
    for (int s = call.save == Save::outputs ? 0 : Cell::Step::projects; s < Cell::states; ++s)
      this->list_entered(s, this->own_rows(steps, true), s_.prev[s]);
    next_ = 0;
  }

  // With Save::outputs computes what forward saves for the steps of a block, a product over all their rows for each one
  // of forward's: a state before a step is there already. Workers divide the rows, or the steps where each has all
  // rows.
  void enter_block(Range steps) noexcept {
    if (Cell::saved == 0 || call.save != Save::outputs) return;
    const Range own = this->by_units() ? share(steps.end - steps.begin, worker.index, worker.count)
                                       : Range{0, steps.end - steps.begin};
    const Range part{steps.begin + own.begin, steps.begin + own.end};
    const Listed which = this->own_rows(part, true);
    const std::int64_t rows = list_rows(call, which, this->x(), s_.left) - s_.left;
    list_rows(call, which, this->saved_values(), s_.outputs);
    for (int s = 0; s < Cell::states; ++s) prev_[s] = s_.prev[s] + this->rows_of({part.end, steps.end});
    this->add_input_share(s_.operands, rows, s_.left, s_.outputs,
                          Panels{0, PanelShape<Cell::gates>::template panels<T>(H_)});
    for_each_phase<Cell>([&]<int p>() {
      if constexpr (!PhaseOf<Cell, p>::projects) recompute_phase<p>(rows);
    });
    this->wait();
  }

  template <int p>
  void recompute_phase(std::int64_t rows) noexcept {
    using Phase = PhaseOf<Cell, p>;
    const auto given = [&](int phase, std::int64_t i, std::int64_t vectors) {
      return s_.given[phase] + (s_.outputs[i] - s_.values) / kSlots<Cell> * vectors;
    };
    const T* const* from = prev_[0];
    if constexpr (p > 0) {
      for (std::int64_t i = 0; i < rows; ++i) s_.right[i] = given(p - 1, i, PhaseOf<Cell, p - 1>::given);
      from = s_.right;
    }
    const Panels panels{0, PanelShape<Phase::outputs>::template panels<T>(H_)};
    this->template take<p>(
        s_.operands, rows, from, panels, [&](std::int64_t i, std::int64_t unit, int count, const V* results) {
          V next[Phase::sets];
          const auto before = [&](int s) { return prev_[s][i]; };
          this->template run_forward_part<p>(s_.outputs[i], padded_h_, results, before, unit, count, next, true);
          if constexpr (!Phase::is_last)
            for (int v = 0; v < Phase::given; ++v) store(given(p, i, Phase::given) + v * padded_h_ + unit, next[v]);
        });
  }

  void step(std::int64_t t, std::int64_t step_in_block) noexcept {
    const Range own = this->active_rows(t);
    const std::int64_t rows = own.end - own.begin;
    t_ = t, first_ = own.begin;
    row_ = this->row_in_block(t, first_);
    dx_ = s_.dx_gates + row_ * s_.gate_stride, dr_ = s_.dr_gates + row_ * s_.gate_stride;
    saved_ = Cell::saved > 0 ? this->saved_values().of_step(t) : this->y().of_step(t);
    if (layer_.dy) dy_ = this->output_gradients().of_step(t);
    for (int s = 0; s < Cell::states; ++s) carry_[s] = s_.carry_rows[s] + first_, prev_[s] = s_.prev[s] + next_;
    next_ += rows;
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
        for (std::int64_t i = 0; i < rows; ++i) body(s, i, panels, shape_.units[s]);
      }
    };
    for_rows([&](int s, std::int64_t i, Panels panels, std::int64_t units) {
      const T* const dy = s == 0 && layer_.dy ? dy_(first_ + i) : nullptr;
      watch_row(carry_[s][i], dy, panels, units, asked, this->measured(row_ + i, s));
    });
    if (asked.flow) {
      const Panels panels = this->panels(Plain::panels<T>(H_));
      for (std::int64_t i = 0; i < rows; ++i)
        for (int gate = 0; gate < Cell::gates; ++gate)
          for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) {
            const Range own = units_of<T>({panel, panel + 1}, H_);
            this->measured(row_ + i, Cell::states + gate)[panel] =
                count_saturated(saved_(first_ + i) + gate * padded_h_ + own.begin, own.end - own.begin, 1,
                                asked.low[gate], asked.high[gate]);
          }
    }
    if (asked.bound != Bound::norm) return;
    this->wait_if_units();  // for the sums of the others
    for_rows([&](int s, std::int64_t i, Panels panels, std::int64_t units) {
      const T factor = factor_of<T>(asked, this->total(row_ + i, s));
      const Range own = units_of<T>(panels, units);
      if (factor != T{1}) scale(carry_[s][i] + own.begin, own.end - own.begin, factor);
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
        s_.inputs[i] = Phase::projects ? dh(i) : gate_row(dr_, i) + Phase::first * H_;
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
          const V gradient = output_gradient(i, unit, count);
          if constexpr (PhaseOf<Cell, p>::projects)
            store(dh(i) + unit, gradient);
          else
            run_part<p>(i, unit, count, &gradient);
        });
  }

  void add_to_carry(std::int64_t i, std::int64_t unit, V sum) const noexcept {
    T* to = carry_[0][i] + unit;
    const V before = layer_.sizes.projected ? sum : sum + load<V>(to);
    store(to, this->cut(layer_.reverse, t_, first_ + i) ? zero<V>() : before);
  }

  T* dh(std::int64_t i) const noexcept { return s_.dh + (row_ + i) * shape_.stride[0]; }
  template <int p>
  T* terms(std::int64_t i) const noexcept {
    return s_.terms + (first_ + i) * PhaseOf<Cell, p>::means * padded_h_;
  }
  T* gate_row(T* gates, std::int64_t i) const noexcept { return gates + i * s_.gate_stride; }

  // dh of a row: what the later steps and the output ask of h.
  RNNKERN_INLINE V output_gradient(std::int64_t i, std::int64_t unit, int count) const noexcept {
    const V later = load<V>(carry_[0][i] + unit);
    return adds_dy_ ? later + load_some<V>(dy_(first_ + i) + unit, count) : later;
  }

  // Runs the elementwise part of phase p for a vector of units, from the gradients of what it has given. It adds to
  // what the parts of later phases have left for the gates and the states before the step.
  template <int p>
  void run_part(std::int64_t i, std::int64_t unit, int count, const V* dgiven) const noexcept {
    using Phase = PhaseOf<Cell, p>;
    const bool projected = Phase::Step::projects && layer_.sizes.projected;
    const std::int64_t H = H_, padded_h = padded_h_;
    V saved[kSlots<Cell>], extra[kMaxExtras], prev[kMaxStates], h = {}, dnew[Phase::sets];
    V dx[Cell::gates] = {}, dr[Cell::gates + Phase::means], dprev[kMaxStates] = {}, dextra[kMaxExtras] = {};
    T* const gates = gate_row(dx_, i) + unit;
    T* const to_extra = s_.dextra + (row_ + i) * Cell::extras * H + unit;
    const T* const row = saved_(first_ + i) + unit;
    for (int v = 0; v < Cell::saved; ++v) saved[v] = load<V>(row + v * padded_h);
    for (int e = 0; e < Cell::extras; ++e) extra[e] = load<V>(packed_.values(packed_.at.extras) + e * padded_h + unit);
    for (int s = Phase::Step::projects; s < Cell::states; ++s) prev[s] = load_some<V>(prev_[s][i] + unit, count);
    if constexpr (Phase::is_last && Cell::saved == 0) h = load_some<V>(row, count);
    if constexpr (Phase::is_last) {
      dnew[0] = dgiven[0];
      for (int s = 1; s < Cell::states; ++s) dnew[s] = load<V>(carry_[s][i] + unit);
    } else {
      for (int v = 0; v < Phase::sets; ++v) dnew[v] = dgiven[v];
      for (int gate = 0; gate < Phase::end; ++gate) dx[gate] = load_some<V>(gates + gate * H, count);
      for (int s = 0; s < Cell::states; ++s) dprev[s] = load<V>(carry_[s][i] + unit);
      for (int e = 0; e < Cell::extras; ++e) dextra[e] = load_some<V>(to_extra + e * H, count);
    }
    backward_part<Cell, p>(saved, extra, prev, &h, dnew, dx, dr, dprev, dextra);

    for (int gate = 0; gate < Phase::end; ++gate) store_some<V>(gates + gate * H, dx[gate], count);
    if constexpr (Cell::separate_recurrent)
      for (int gate = 0; gate < Phase::gates; ++gate)
        store_some<V>(gate_row(dr_, i) + (Phase::first + gate) * H + unit, dr[gate], count);
    for (int k = 0; k < Phase::means; ++k) store(terms<p>(i) + k * padded_h + unit, dr[k]);
    for (int e = 0; e < Cell::extras; ++e) store_some<V>(to_extra + e * H, dextra[e], count);
    if constexpr (Phase::feeds_product)
      if (Phase::Step::last > p || projected)
        store(s_.given[p] + (row_ + i) * padded_h + unit, given_by_part<Cell, p>(saved, prev));
    // Past a reset nothing goes to the step before; what a product adds to the gradient of h, it cuts.
    const bool cut = p == 0 && this->cut(layer_.reverse, t_, first_ + i);
    for (int s = projected; s < Cell::states; ++s)
      store(carry_[s][i] + unit, cut && (s > 0 || Phase::from == From::nothing) ? zero<V>() : dprev[s]);
  }

  // Of the step at hand.
  std::int64_t t_ = 0, first_ = 0, row_ = 0;  // row_: number in the block of the first row
  T *dx_ = nullptr, *dr_ = nullptr;           // gradients of the gates from the first row on
  StepRows<T> saved_{};                       // what forward has saved, or where that is nothing y
  StepRows<const T> dy_{};
  T* const* carry_[Cell::states] = {};
  const T* const* prev_[Cell::states] = {};
  std::int64_t next_ = 0;  // rows whose states before the step are listed, and which have been worked on
  const bool adds_dy_ = this->adds_dy();
};

}  // namespace
}  // namespace rnnkern
