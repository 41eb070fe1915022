// The time loops: forward and backpropagation through time of one layer-direction, generic over cells.
//
// All workers of a call run these functions side by side. They divide either the rows of the batch (sequences do not
// depend on each other: no barrier) or the hidden units (a barrier a step and product). A block is as many steps as
// keep their gates in cache: forward makes the input's share of the gates for a block in one product and then runs
// its steps; backward runs the steps of a block and then adds its share of every gradient that is a sum over rows.
#pragma once

#include "amx.h"
#include "cells.h"
#include "patience.h"
#include "poison.h"

namespace rnnkern {
namespace {

// Hands out scratch memory from front to back, 64-byte aligned; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) noexcept : base_(static_cast<char*>(base)) {}
  template <class E>
  E* take(std::int64_t count) noexcept {
    const std::int64_t begin = used_, bytes = count * static_cast<std::int64_t>(sizeof(E));
    used_ += round_up(bytes, 64);
    if (base_) poison(base_ + used_);  // so that what is written past the end of an array is seen
    used_ += kBetweenArrays;
    return base_ ? reinterpret_cast<E*>(base_ + begin) : nullptr;
  }
  // Hands out several arrays of as many elements, one behind the other.
  template <class... E>
  void take_each(std::int64_t count, E*&... arrays) noexcept {
    char* to = reinterpret_cast<char*>(take<char>(count * static_cast<std::int64_t>((sizeof(E) + ...))));
    ((arrays = reinterpret_cast<E*>(to), to += to ? count * static_cast<std::int64_t>(sizeof(E)) : 0), ...);
  }
  std::int64_t used() const noexcept { return used_; }

  // Takes what body takes, once for each worker, and leaves what is worker `own`'s.
  template <class Body>
  RNNKERN_INLINE void take_for_workers(int workers, int own, Body&& body) noexcept {
    const std::int64_t begin = used_;
    body();
    const std::int64_t size = used_ - begin;
    if (own > 0) {
      used_ = begin + own * size;
      body();
    }
    used_ = begin + workers * size;
  }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

RNNKERN_INLINE std::int64_t first_row_of(const RowMap& map, std::int64_t t) noexcept {
  return map.steps ? map.steps[t] : t * map.stride;
}
RNNKERN_INLINE std::int64_t row_of(const RowMap& map, std::int64_t t, std::int64_t b) noexcept {
  return first_row_of(map, t) + (map.rows ? map.rows[b] : b);
}

RNNKERN_INLINE std::int64_t length_of(const KernelCall& call, std::int64_t b) noexcept {
  return call.lengths ? call.lengths[b] : call.steps;
}

// Says whether row b enters step t from zeros.
RNNKERN_INLINE bool is_cut(const KernelCall& call, bool reverse, std::int64_t t, std::int64_t b) noexcept {
  if (!call.resets) return false;
  const std::int64_t link = reverse ? t + 1 : t;
  return (!reverse || link < length_of(call, b)) && call.resets[row_of(call.given, link, b)] != 0;
}

// Where states of the user have row b.
RNNKERN_INLINE std::int64_t state_row_of(const KernelCall& call, std::int64_t b) noexcept {
  return call.order ? call.order[b] : b;
}

// Where an array has the rows of one step.
template <class E>
struct StepRows {
  E* first;
  std::int64_t stride;        // between rows, elements
  const std::int64_t* order;  // see RowMap::rows

  RNNKERN_INLINE E* operator()(std::int64_t b) const noexcept { return first + (order ? order[b] : b) * stride; }
};

// The rows of a call that have a step t: the first ones.
RNNKERN_INLINE std::int64_t active_rows_of(const KernelCall& call, std::int64_t t) noexcept {
  return call.lengths ? call.starts[t + 1] - call.starts[t] : call.batch;
}

// Where an array has its rows: those of `map`, of which it begins with row `origin`. The row of a step is asked for by
// the step `shift` behind it.
template <class E>
struct ArrayRows {
  E* array;
  std::int64_t stride;  // between rows, elements
  const RowMap& map;
  std::int64_t origin = 0, shift = 0;

  // What the map says of a step is asked once.
  RNNKERN_INLINE StepRows<E> of_step(std::int64_t t) const noexcept {
    return {array + (first_row_of(map, t + shift) - origin) * stride, stride, map.rows};
  }
};

// Which rows are listed: of so many steps from t on, or in the other direction, those of `own` that have the step; of
// all of them in the order of the caller's batch.
struct Listed {
  std::int64_t t, direction, count;
  Range own;
  const std::int64_t* sorted = nullptr;  // see KernelCall
};

// Lists where an array has some rows, one step behind the other. Returns the end of the list.
template <class E>
__attribute__((noinline)) E** list_mapped_rows(const KernelCall& call, const Listed& which, const ArrayRows<E>& from,
                                               E** rows) noexcept {
  for (std::int64_t t = which.t, i = 0; i < which.count; ++i, t += which.direction) {
    const std::int64_t active = active_rows_of(call, t);
    const StepRows<E> of_step = from.of_step(t);
    for (std::int64_t k = which.own.begin; k < which.own.end; ++k) {
      const std::int64_t b = which.sorted ? which.sorted[k] : k;
      if (b < active) *rows++ = of_step(b);
    }
  }
  return rows;
}
template <class E>
__attribute__((noinline)) E** list_rows(const KernelCall& call, const Listed& which, const ArrayRows<E>& from,
                                        E** rows) noexcept {
  if (call.lengths || from.map.steps || from.map.rows) return list_mapped_rows(call, which, from, rows);
  // Steps are as far apart as rows are. Pinned, since few rows take less time than it takes to make vectors of them.
  const std::int64_t step = which.direction * from.map.stride * from.stride, stride = from.stride;
  E* first = from.of_step(which.t)(which.own.begin);
  for (std::int64_t i = which.count; i > 0; --i, first += step) {
    E* row = first;
    for (std::int64_t b = which.own.end - which.own.begin; b > 0; --b, row += stride) {
      asm("" : "+r"(row));
      *rows++ = row;
    }
  }
  return rows;
}

// Returns a worker's share of the rows of the batch, so many together: about as many rows of some steps as others get.
[[gnu::noinline]] Range share_of_rows(const KernelCall& call, const Worker& worker, std::int64_t grain,
                                      Range steps) noexcept {
  if (!call.lengths) return share(call.batch, worker.index, worker.count, grain);
  const std::int64_t total = call.starts[steps.end] - call.starts[steps.begin];
  std::int64_t before = 0;
  Range own{call.batch, call.batch};
  for (std::int64_t b = 0; b < call.batch; b += grain) {
    std::int64_t rows = 0;
    for (std::int64_t i = b; i < smaller(b + grain, call.batch); ++i) {
      const std::int64_t end = smaller(call.lengths[i], steps.end);
      rows += end > steps.begin ? end - steps.begin : 0;
    }
    // The one in whose share the middle of these rows lies; the last has those without any step too.
    const std::int64_t middle = total ? (2 * before + rows) * worker.count / (2 * total) : 0;
    const std::int64_t owner = smaller(middle, worker.count - 1);
    if (owner >= worker.index && b < own.begin) own.begin = b;
    if (owner > worker.index && b < own.end) own.end = b;
    before += rows;
  }
  return own.begin < own.end ? own : Range{0, 0};  // {batch, batch} would be a vector, rounded up to whole ones
}

// Returns how many steps from t on, or in the other direction, have as many rows as there is room for in a block.
[[gnu::noinline]] std::int64_t steps_with_room(const KernelCall& call, std::int64_t t, std::int64_t direction,
                                               std::int64_t most) noexcept {
  if (!call.lengths) return smaller(call.block_steps, most);
  std::int64_t count = 0, room = call.block_steps * call.batch;
  for (; count < most && (room -= active_rows_of(call, t)) >= 0; t += direction) ++count;
  return count;
}

// Fills this worker's part of the rows of an array past the ends of the sequences with zeros.
template <class T>
__attribute__((noinline)) void clear_rows(const KernelCall& call, const Worker& worker, const RowMap& map, T* array,
                                          std::int64_t stride, std::int64_t count) noexcept {
  const Range own = share(map.padded, worker.index, worker.count);
  for (std::int64_t t = own.begin; t < own.end; ++t)
    for (std::int64_t b = t < call.steps ? active_rows_of(call, t) : 0; b < call.batch; ++b)
      std::memset(array + row_of(map, t, b) * stride, 0, static_cast<std::size_t>(count) * sizeof(T));
}

// What both directions of time need to know of a call, seen by one worker.
template <class Cell, class T>
struct Context {
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;

  const KernelCall& call;
  Worker& worker;
  const Arithmetic<T>& how;
  std::int64_t block = 0;  // blocks begun so far in this call; the same on all workers at the same place
  std::int64_t place = 0;  // blocks and steps

  // Says whether this worker takes part yet: a helper that joins a call on its way skips the steps already done.
  bool takes_part() const noexcept { return place > worker.joins_at; }
  // Begins a block or step; before it, helpers that have come meanwhile are let in. All rows and units are up to date.
  void begin() noexcept {
    if (worker.admit) [[unlikely]]
      worker.admit(worker, place);
    ++place;
  }

  bool by_units() const noexcept { return call.split == Split::units && worker.count > 1; }
  void wait() const noexcept {
    if (worker.count > 1) [[unlikely]]
      worker.wait(worker.team);
  }
  void wait_if_units() const noexcept {
    if (by_units()) [[unlikely]]
      worker.wait(worker.team);
  }
  Panels panels(std::int64_t count, bool backwards = false) const noexcept {
    if (!by_units()) [[likely]]
      return {0, count, backwards};
    const Range own = share(count, worker.index, worker.count);
    return {own.begin, own.end, backwards};
  }
  std::int64_t active(std::int64_t t) const noexcept { return active_rows_of(call, t); }

  bool cut(bool reverse, std::int64_t t, std::int64_t b) const noexcept { return is_cut(call, reverse, t, b); }

  // Resumes where a layer-direction has ended, once every worker has arrived.
  void advance(const Context& layer) noexcept {
    block = layer.block, place = layer.place;
    if (takes_part()) wait();
  }

  // Asks whether the call is given up, if that is this worker's to do. Returns the block from which on it is; 0: it is
  // not.
  std::int64_t stop() const noexcept {
    if (call.poll && worker.index == 0 && !__atomic_load_n(call.stop, __ATOMIC_RELAXED)) {
      release_tiles();  // anything may run in between
      if (call.poll(call.poll_context)) __atomic_store_n(call.stop, block + 1, __ATOMIC_RELEASE);
    }
    return __atomic_load_n(call.stop, __ATOMIC_ACQUIRE);
  }

  // Waits until layer-direction i has done so many steps. Returns false when the call was given up.
  bool await(std::int64_t i, std::int64_t steps) const noexcept {
    for (Patience patience(worker.yield); __atomic_load_n(call.progress + i, __ATOMIC_ACQUIRE) < steps; patience.wait())
      if (stop() != 0) return false;
    return true;
  }

  // Begins a block; returns false when the call was given up. Worker 0 says so a block ahead, and between two blocks
  // there is either a barrier or nothing that waits, so that no worker is left alone at a barrier. Workers that have
  // layers of their own meet at none.
  bool begin_block() noexcept {
    const std::int64_t last = stop();
    const bool goes_on = last == 0 || (block < last && !call.progress);
    ++block;
    begin();
    return goes_on;
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

// to[k * to_step] = from[k * step] for k in [0, count), or zeros
template <class T>
__attribute__((noinline)) void copy_lane(T* to, std::int64_t to_step, const T* from, std::int64_t step,
                                         std::int64_t count) noexcept {
  for (std::int64_t k = 0; k < count; ++k) to[k * to_step] = from ? from[k * step] : T{0};
}

// Rows that a thread works on stand together, two pages from those of the next thread: a prefetcher that runs on past
// the last of them would take lines away that the other is writing, which costs most where the two cores are far apart.
constexpr std::int64_t kApart = 8192;  // bytes

// One product of h suffices for a step.
template <class Cell>
constexpr bool kCanBeNarrow = Cell::Step::last == 0 && PhaseOf<Cell, 0>::multiplies;

// Says whether a layer is worked on with rows in lanes, as narrow.h says: where that takes fewer vectors. Measured on
// one core of a Zen 4 server, AVX-512, float32, I = 2, inference against rows one behind the other, for RNN, GRU and
// LSTM: 1.2x, 1.5x and 2.0x at B = 2, H = 1, 1.7x to 2.4x at B = 4, H = 2, 1.6x to 2.0x at B = 8, H = 6 or B = 16, H =
// 12, 5x to 9x at B = 16, H = 2.
template <class Cell, class T>
bool is_narrow(const LayerSizes& sizes, std::int64_t batch, Save save) noexcept {
  return kCanBeNarrow<Cell> && save != Save::outputs && !sizes.projected && sizes.hidden < kLanes<T> &&
         sizes.hidden * divide_up(batch, kLanes<T>) < batch;
}
template <class Cell, class T>
bool is_narrow(const KernelCall& call) noexcept {
  return is_narrow<Cell, T>(call.layers[0].sizes, call.batch, call.save);
}

// The states of a row: h, of as many units as y has, and others of H units.
template <class Cell, class T>
struct StateShape {
  std::int64_t units[Cell::states], stride[Cell::states];  // stride: between rows of working memory
  std::int64_t together;                                   // rows, see KernelCall
  bool in_lanes;  // [vector of rows][unit][lane], see narrow.h; lanes past the last row may hold anything

  StateShape(const LayerSizes& sizes, const KernelCall& call) noexcept
      : together(call.rows_together), in_lanes(is_narrow<Cell, T>(call)) {
    for (int s = 0; s < Cell::states; ++s) {
      units[s] = s == 0 ? sizes.outputs : sizes.hidden;
      stride[s] = scratch_stride<T>(units[s]);
    }
  }

  // Where row b of a state begins, and what `rows` of them take.
  std::int64_t row(int s, std::int64_t b) const noexcept {
    constexpr auto apart = kApart / static_cast<std::int64_t>(sizeof(T));
    if (in_lanes) [[unlikely]]
      return leader(b) * units[s] + b % kLanes<T>;
    return b * stride[s] + (b < together ? 0 : b / together * apart);
  }
  std::int64_t elements(int s, std::int64_t rows) const noexcept {
    if (in_lanes) return padded<T>(rows) * units[s];
    return rows > 0 ? row(s, rows - 1) + stride[s] : 0;
  }
  // The row with whose steps those of row b run.
  std::int64_t leader(std::int64_t b) const noexcept { return in_lanes ? b / kLanes<T> * kLanes<T> : b; }

  // Copy a row of a state from and to memory of the user, where null stands for zeros.
  void enter(int s, const T* from, T* row) const noexcept {
    if (in_lanes) [[unlikely]]
      return copy_lane(row, kLanes<T>, from, 1, units[s]);
    copy_row(row, from, units[s], stride[s]);
  }
  void leave(int s, const T* row, T* to) const noexcept {
    if (in_lanes) [[unlikely]]
      return copy_lane(to, 1, row, kLanes<T>, units[s]);
    copy_row(to, row, units[s], units[s]);
  }
};

// Vectors that phase p gives to the one behind it, if this layer has that.
template <class Cell, int p>
constexpr int given_in(const LayerSizes& sizes) noexcept {
  return !Cell::Step::projects || p < Cell::Step::last || sizes.projected ? PhaseOf<Cell, p>::given : 0;
}

// Returns the mean of a row of units, in each lane.
template <class V>
V mean_of_units(const Scalar<V>* row, std::int64_t units) noexcept {
  V total = zero<V>();
  for (std::int64_t unit = 0; unit < units; unit += kLanes<Scalar<V>>)
    total += load_some<V>(row + unit, static_cast<int>(smaller(units - unit, kLanes<Scalar<V>>)));
  Scalar<V> sum = 0;
  for (int l = 0; l < kLanes<Scalar<V>>; ++l) sum += total[l];
  return set<V>(sum / static_cast<Scalar<V>>(units));
}

// Values of a saved row while the step works: the input's share of the gates is overwritten by what is saved.
template <class Cell>
constexpr int kSlots = Cell::saved > Cell::gates ? Cell::saved : Cell::gates;

template <class Cell, class T>
struct ForwardScratch {
  T* state[2][Cell::states];    // [B, stride]: before and after a step; the same memory where no product reads it
  T* given[Cell::Step::count];  // [B, vectors, padded H]: what a phase gives to the one behind it
  T* zeros;                     // [padded H]
  T* gates;                     // [block_steps, B, slots, padded H]
  // Of one worker.
  T* x;                                            // [I, lanes]: of a vector of rows, see narrow.h
  const T** block_x;                               // [block rows]
  T** block_gates;                                 // the same
  T** rows[2][Cell::states];                       // [B]: of `state`
  std::int64_t* gate_rows;                         // [B], see gates()
  const T **entered[Cell::states], **step_inputs;  // [B]: of a step
  Operands<T> operands;

  ForwardScratch(Arena& arena, const KernelCall& call, const Arithmetic<T>& how, int worker_index) noexcept {
    const StateShape<Cell, T> shape(call.layers[0].sizes, call);
    const std::int64_t padded_h = padded<T>(call.layers[0].sizes.hidden);
    bool own_gates = false;
    std::int64_t widest = call.layers[0].sizes.hidden;
    for (int i = 0; i < call.layer_count * call.directions; ++i) {
      own_gates |= call.save != Save::gates || call.layers[i].saved == nullptr;
      if (call.layers[i].sizes.inputs > widest) widest = call.layers[i].sizes.inputs;
    }
    const std::int64_t B = call.batch, block_rows = call.block_steps * B;
    for (int s = 0; s < Cell::states; ++s) {
      state[0][s] = arena.take<T>(shape.elements(s, B));
      state[1][s] = s == 0 ? arena.take<T>(shape.elements(s, B)) : state[0][s];
    }
    for_each_phase<Cell>(
        [&]<int p>() { given[p] = arena.take<T>(B * given_in<Cell, p>(call.layers[0].sizes) * padded_h); });
    zeros = arena.take<T>(padded_h);
    const std::int64_t together = call.rows_together;
    const std::int64_t gate_count = call.block_steps * (together < B ? round_up(B, together) : B);
    gates = arena.take<T>(own_gates && !shape.in_lanes ? gate_count * kSlots<Cell> * padded_h : 0);
    arena.take_for_workers(call.max_threads, worker_index, [&]() RNNKERN_INLINE_LAMBDA {
      arena.take_each(block_rows, block_x, block_gates);
      arena.take_each(B, rows[1][0], step_inputs, gate_rows);
      for (int s = 0; s < Cell::states; ++s) {
        arena.take_each(B, rows[0][s], entered[s]);
        if (s > 0) rows[1][s] = rows[0][s];
      }
      x = arena.take<T>(shape.in_lanes ? widest * kLanes<T> : 0);
      operands.take(arena, how, block_rows, widest);
    });
  }
};

// A layer-direction of a call, seen by one worker.
template <class Cell, class T>
class LayerContext : protected Context<Cell, T> {
 protected:
  using Base = Context<Cell, T>;
  using Base::call;
  using V = Vec<T>;

  LayerContext(const Base& context, const Layer& layer, bool training) noexcept
      : Base(context), layer_(layer), packed_(layer, training, context.how.packing) {}

  std::int64_t time(std::int64_t step) const noexcept { return layer_.reverse ? call.steps - 1 - step : step; }

  ArrayRows<const T> x() const noexcept { return {static_cast<const T*>(layer_.x), layer_.x_stride, layer_.x_rows}; }
  ArrayRows<T> y() const noexcept { return {static_cast<T*>(layer_.y), layer_.y_stride, layer_.y_rows}; }
  // With Save::outputs: [rows, states - 1, padded H].
  ArrayRows<T> saved_states(int state) const noexcept {
    return {static_cast<T*>(layer_.saved) + (state - 1) * padded_h_, (Cell::states - 1) * padded_h_, call.saved};
  }
  // With Save::gates: [rows, saved, padded H].
  ArrayRows<T> saved_values() const noexcept {
    return {static_cast<T*>(layer_.saved), Cell::saved * padded_h_, call.saved};
  }

  // Rows of the batch that this worker works on, and those of them that have a step t. A worker that has a part of the
  // units works on all rows; what is done once for each row is divided all the same.
  Range rows() const noexcept { return rows_; }
  Range active_rows(std::int64_t t) const noexcept {
    if (!call.lengths) [[likely]]
      return rows_;
    const std::int64_t end = smaller(rows_.end, this->active(t));
    return {rows_.begin, rows_.begin < end ? end : rows_.begin};
  }

  // The rows that this worker works on in some steps, in their order or that of backward.
  Listed own_rows(Range steps, bool backward) const noexcept {
    return {time(backward ? steps.end - 1 : steps.begin), layer_.reverse == backward ? 1 : -1, steps.end - steps.begin,
            rows_};
  }

  // Divides the rows of the batch, so many together, among the workers, by what they have of the steps [first, last).
  void divide(std::int64_t grain, std::int64_t first, std::int64_t last) noexcept {
    divided_among_ = this->worker.count;
    own_ = {0, call.batch}, rows_ = {0, call.batch};  // not copied: a load of both halves would wait for their stores
    if (divided_among_ == 1) [[likely]]
      return;
    const std::int64_t begin = layer_.reverse ? call.steps - last : first;
    own_ = share_of_rows(call, this->worker, grain, {begin, begin + last - first});
    if (!this->by_units()) rows_ = own_;
  }
  // Says whether the rows are to be divided: no worker has a part yet where one begins to take part.
  bool is_to_divide() const noexcept { return divided_among_ != this->worker.count; }

  // Where layers are worked on side by side: waits until the layer `above` or below (-1), from which this one takes its
  // steps, has done so many, or of two directions all. Returns false when the call was given up.
  bool await_layer(int above, std::int64_t steps) const noexcept {
    if (!call.progress) [[likely]]
      return true;
    const std::int64_t D = call.directions, first = (number() / D + above) * D;
    if (first < 0 || first >= call.layer_count * D) return true;
    for (std::int64_t i = first; i < first + D; ++i)
      if (!this->await(i, D == 1 ? steps : call.steps)) return false;
    return true;
  }
  // Lets the layer above or below have the steps done so far.
  void hand_over(std::int64_t steps) const noexcept {
    if (call.progress && call.directions == 1) [[unlikely]]
      __atomic_store_n(call.progress + number(), steps, __ATOMIC_RELEASE);
  }
  std::int64_t number() const noexcept { return &layer_ - call.layers; }

  // Move this worker's rows of the states from and to memory of the user, and make zeros. Which of two places a row
  // begins and ends in follows from its steps.
  void enter_states(const void* const* given, T* const* even, T* const* odd, T* zeros,
                    std::int64_t zero_count) const noexcept {
    if (zero_count > 0 && this->worker.index == 0) [[unlikely]]
      copy_row<T>(zeros, nullptr, 0, zero_count);
    for_state_rows([&](int s, std::int64_t b) {
      const T* from = static_cast<const T*>(given[s]);
      if (from) from += state_row_of(call, b) * shape_.units[s];
      shape_.enter(s, from, (begins_odd(b) ? odd : even)[s] + shape_.row(s, b));
    });
    this->wait();
  }
  void leave_states(const T* const* even, const T* const* odd, void* const* to) const noexcept {
    for_state_rows([&](int s, std::int64_t b) {
      const T* row = (ends_odd(b) ? odd : even)[s] + shape_.row(s, b);
      if (to[s]) shape_.leave(s, row, static_cast<T*>(to[s]) + state_row_of(call, b) * shape_.units[s]);
    });
  }
  // The states take turns in two places with every step of the call; a row that has ended is where its last step left
  // it.
  bool begins_odd(std::int64_t b) const noexcept {
    return layer_.reverse && (call.steps - length_of(call, shape_.leader(b))) % 2 != 0;
  }
  bool ends_odd(std::int64_t b) const noexcept { return begins_odd(b) != (length_of(call, shape_.leader(b)) % 2 != 0); }
  template <class Body>
  RNNKERN_INLINE void for_state_rows(Body&& body) const noexcept {
    for (int s = 0; s < Cell::states; ++s)
      for (std::int64_t b = own_.begin; b < own_.end; ++b) body(s, b);
  }

  // gates = x W_ih^T + b_ih for some rows, in one product.
  void add_input_share(const Operands<T>& operands, std::int64_t rows, const T* const* x, T* const* gates,
                       Panels panels) const noexcept {
    using Shape = PanelShape<Cell::gates>;
    const std::int64_t H = H_, padded_h = padded_h_;
    product<Shape>(this->how, operands, rows, x, layer_.sizes.inputs, packed_.weights(packed_.at.w_ih),
                   packed_.values(packed_.at.b_ih), H, panels,
                   [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                     for_units<T, Shape>(panel, H, [&](int sub, std::int64_t unit, int) {
                       for (int gate = 0; gate < Cell::gates; ++gate)
                         store(gates[i] + gate * padded_h + unit, sum[sub * Cell::gates + gate]);
                     });
                   });
  }

  // Takes what phase p takes of some rows, of their h or of what the phase before it gives; done(i, unit, count,
  // results) goes on with a vector of units of a row.
  template <int p, class Done>
  RNNKERN_INLINE void take(const Operands<T>& operands, std::int64_t rows, const T* const* from, Panels panels,
                           Done&& done) const noexcept {
    using Phase = PhaseOf<Cell, p>;
    using Shape = PanelShape<Phase::outputs>;
    const ProductSizes of = product_of<Phase>(layer_.sizes);
    const auto each = [&](std::int64_t i, std::int64_t panel, const V* results, int step) RNNKERN_INLINE_LAMBDA {
      for_units<T, Shape>(panel, of.units, [&](int sub, std::int64_t unit, int count) RNNKERN_INLINE_LAMBDA {
        done(i, unit, count, results + sub * step);
      });
    };
    if constexpr (Phase::multiplies) {
      product<Shape>(this->how.of(of.bounded), operands, rows, from, of.depth, packed_.weights(packed_.at.weights[p]),
                     Phase::projects ? nullptr : packed_.values(packed_.at.bias[p]), of.units, panels,
                     [&](std::int64_t i, std::int64_t panel, const V* sum)
                         RNNKERN_INLINE_LAMBDA { each(i, panel, sum, Phase::outputs); });
    } else {
      for (std::int64_t i = 0; i < rows; ++i) {
        V means[Phase::means + 1];
        for (int k = 0; k < Phase::means; ++k) means[k] = mean_of_units<V>(from[i] + k * padded_h_, H_);
        for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) each(i, panel, means, 0);
      }
    }
  }

  // Runs the elementwise part of phase p for a vector of units, which is at row[v * stride] of each value v. While a
  // step works, the row holds what earlier phases have saved, and still the input's share of the gates of this phase
  // and later ones; with `save` it gets what this one saves. Of the states `before` so many lanes are there.
  template <int p, class Before>
  RNNKERN_INLINE void run_forward_part(T* row, std::int64_t stride, const V* r, Before&& before, std::int64_t unit,
                                       int there, V* next, bool save) const noexcept {
    using Phase = PhaseOf<Cell, p>;
    V x[Cell::gates], extra[kMaxExtras], prev[kMaxStates], saved[kSlots<Cell>];
    for (int e = 0; e < Cell::extras; ++e) extra[e] = load<V>(packed_.values(packed_.at.extras) + e * stride + unit);
    for (int s = Cell::Step::projects; s < Cell::states; ++s) prev[s] = load_some<V>(before(s) + unit, there);
    for (int v = 0; v < Phase::first; ++v) saved[v] = load<V>(row + v * stride + unit);
    for (int gate = 0; gate < Phase::gates; ++gate) x[gate] = load<V>(row + (Phase::first + gate) * stride + unit);
    forward_part<Cell, p>(x, r, extra, prev, next, saved);
    if (save)
      for (int v = 0; v < Phase::saves; ++v) store(row + v * stride + unit, saved[v]);
  }

  const Layer& layer_;
  const PackedWeights<Cell, T> packed_;
  const std::int64_t H_ = layer_.sizes.hidden, P_ = layer_.sizes.outputs, padded_h_ = padded<T>(H_);
  const StateShape<Cell, T> shape_{layer_.sizes, call};
  Range own_{0, 0}, rows_{0, 0};  // rows of the batch
  int divided_among_ = 0;         // workers
  std::int64_t block_first_ = 0;  // steps before the block at hand
};

// The time loop of forward. Steps says what a block and a step are: take_rows, list, enter_block, step.
template <class Steps, class Cell, class T>
class ForwardLoop : protected LayerContext<Cell, T> {
 public:
  using Base = Context<Cell, T>;
  using Loop = LayerContext<Cell, T>;
  using Loop::call, Loop::layer_, Loop::block_first_;

  ForwardLoop(const Base& context, const Layer& layer, const ForwardScratch<Cell, T>& scratch) noexcept
      : Loop(context, layer, false), s_(scratch) {}

  // Returns the context with the block and the place that were reached.
  const Base& run() noexcept {
    Steps& steps = static_cast<Steps&>(*this);
    if (this->takes_part()) {
      divide_from(0);
      this->enter_states(layer_.initial, s_.state[0], s_.state[1], s_.zeros, call.resets ? this->padded_h_ : 0);
      if (layer_.y_rows.padded) [[unlikely]]
        clear_rows(call, this->worker, layer_.y_rows, static_cast<T*>(layer_.y), layer_.y_stride, layer_.sizes.outputs);
    }
    for (std::int64_t first = 0; first < call.steps; first += call.block_steps) {
      const std::int64_t count = smaller(call.block_steps, call.steps - first);
      if (!this->begin_block() || !this->await_layer(-1, first + count)) break;
      block_first_ = first;
      if (this->takes_part()) {
        if (this->is_to_divide()) [[unlikely]]
          divide_from(first);
        steps.list({first, first + count});
        steps.enter_block();
        this->wait_if_units();
      }
      for (std::int64_t i = first; i < first + count; ++i, now_ = 1 - now_) {
        this->begin();
        if (!this->takes_part()) [[unlikely]]
          continue;
        if (this->is_to_divide()) [[unlikely]]
          divide_from(i), steps.list({i, first + count});
        steps.step(this->time(i));
        this->wait_if_units();
      }
      this->hand_over(first + count);
    }
    if (this->takes_part()) this->leave_states(s_.state[0], s_.state[1], layer_.last);
    return *this;
  }

 protected:
  const ForwardScratch<Cell, T>& s_;
  int now_ = 0;  // which of two states is the one before the step

 private:
  __attribute__((noinline)) void divide_from(std::int64_t first) noexcept {
    this->divide(Steps::grain, first, call.steps);
    static_cast<Steps&>(*this).take_rows();
  }
};

template <class Cell, class T>
class ForwardLayer : public ForwardLoop<ForwardLayer<Cell, T>, Cell, T> {
  using Loop = ForwardLoop<ForwardLayer, Cell, T>;
  using Base = Context<Cell, T>;
  using Base::call, Base::worker, Base::how, Base::lanes;
  using Loop::layer_, Loop::s_, Loop::H_, Loop::padded_h_, Loop::shape_, Loop::now_, Loop::block_first_, Loop::time;
  friend Loop;
  static constexpr std::int64_t grain = 1;
  using V = Vec<T>;
  static constexpr int slots = kSlots<Cell>;

 public:
  using Loop::Loop;

 private:
  // Lists the states of this worker's rows, and where steps that work in scratch memory have their gates.
  void take_rows() noexcept {
    const Range own = this->rows();
    const std::int64_t together = shape_.together;
    for (std::int64_t b = own.begin; b < own.end; ++b)
      for (int s = 0; s < Cell::states; ++s) {
        const std::int64_t row = shape_.row(s, b);
        s_.rows[0][s][b] = s_.state[0][s] + row;
        if (s == 0) s_.rows[1][s][b] = s_.state[1][s] + row;
      }
    gate_map_.stride = (layer_.reverse ? -1 : 1) * smaller(together, call.batch);
    if (together >= call.batch) [[likely]]
      return;
    gate_map_.rows = s_.gate_rows;
    for (std::int64_t b = own.begin; b < own.end; ++b)
      s_.gate_rows[b] = b + b / together * together * (call.block_steps - 1);
  }

  // Where the rows of the block at hand have their gates. In scratch memory the steps of the rows of one thread stand
  // together, and no two rows of the batch take turns in a place: nobody waits before the next block.
  ArrayRows<T> gates() const noexcept {
    if (keep_) return {static_cast<T*>(layer_.saved), Cell::saved * padded_h_, call.saved};
    return {s_.gates, slots * padded_h_, gate_map_, gate_map_.stride * time(block_first_)};
  }

  // Lists x and gates of the active rows of some steps of the block at hand.
  __attribute__((noinline)) void list(Range steps) noexcept {
    const Listed rows = this->own_rows(steps, false);
    list_rows(call, rows, this->x(), s_.block_x);
    listed_ = list_rows(call, rows, gates(), s_.block_gates) - s_.block_gates;
    next_ = 0;
  }

  // Makes the input's share of the gates for what is listed.
  void enter_block() noexcept {
    const Panels panels = this->panels(PanelShape<Cell::gates>::template panels<T>(H_));
    this->add_input_share(s_.operands, listed_, s_.block_x, s_.block_gates, panels);
  }

  // The rows of a step that this worker works on: `count` from b = first on.
  struct Rows {
    std::int64_t first, count;
    const T* const* prev[Cell::states];
    T* const* next[Cell::states];
    T* const* gates;
    StepRows<T> y;
    T* outputs;  // with Save::outputs, else null: what is saved of the first row
    std::int64_t padded_h;
  };

  void step(std::int64_t t) noexcept {
    const Range own = this->active_rows(t);
    Rows rows{own.begin, own.end - own.begin, {}, {}, s_.block_gates + next_, this->y().of_step(t), nullptr, padded_h_};
    if (call.resets) [[unlikely]]
      cut_rows(t, own);
    for (int s = 0; s < Cell::states; ++s) {
      rows.prev[s] = call.resets ? s_.entered[s] : s_.rows[now_][s] + own.begin;
      rows.next[s] = s_.rows[1 - now_][s] + own.begin;
    }
    next_ += rows.count;
    if (Cell::states > 1 && call.save == Save::outputs) rows.outputs = this->saved_states(1).of_step(t)(own.begin);
    for_each_phase<Cell>([&]<int p>() RNNKERN_INLINE_LAMBDA { run_phase<p>(rows); });
  }

  // Lists the states with which rows enter step t where some enter from zeros.
  __attribute__((noinline)) void cut_rows(std::int64_t t, Range own) const noexcept {
    for (std::int64_t b = own.begin; b < own.end; ++b) {
      const bool cut = this->cut(layer_.reverse, t, b);
      for (int s = 0; s < Cell::states; ++s) s_.entered[s][b - own.begin] = cut ? s_.zeros : s_.rows[now_][s][b];
    }
  }

  template <int p>
  RNNKERN_INLINE void run_phase(const Rows& rows) noexcept {
    using Phase = PhaseOf<Cell, p>;
    const ProductSizes of = product_of<Phase>(layer_.sizes);
    if (Phase::projects && !of.there) return;
    if constexpr (p > 0) this->wait_if_units();
    const T* const* from = rows.prev[0];
    if constexpr (p > 0) {
      for (std::int64_t i = 0; i < rows.count; ++i) s_.step_inputs[i] = given<p - 1>(rows, i);
      from = s_.step_inputs;
    }
    const Panels panels = this->panels(PanelShape<Phase::outputs>::template panels<T>(of.units), now_ == 1);
    this->template take<p>(s_.operands, rows.count, from, panels,
                           [&](std::int64_t i, std::int64_t unit, int count, const V* results) RNNKERN_INLINE_LAMBDA {
                             if constexpr (Phase::projects)
                               store_h(rows, i, unit, count, results[0]);
                             else
                               run_part<p>(rows, i, unit, count, results);
                           });
  }

  // What phase p gives for row i, [vectors, padded H].
  template <int p>
  T* given(const Rows& rows, std::int64_t i) const noexcept {
    return s_.given[p] + (rows.first + i) * PhaseOf<Cell, p>::given * rows.padded_h;
  }

  // Runs the elementwise part of phase p for a vector of units.
  template <int p>
  RNNKERN_INLINE void run_part(const Rows& rows, std::int64_t i, std::int64_t unit, int count,
                               const V* r) const noexcept {
    using Phase = PhaseOf<Cell, p>;
    const std::int64_t padded_h = rows.padded_h;
    V next[Phase::sets];
    this->template run_forward_part<p>(
        rows.gates[i], padded_h, r, [&](int s) RNNKERN_INLINE_LAMBDA { return rows.prev[s][i]; }, unit, lanes, next,
        keep_ || !Phase::is_last);
    if constexpr (Phase::is_last) {
      for (int s = 1; s < Cell::states; ++s) {
        store(rows.next[s][i] + unit, next[s]);
        if (rows.outputs) store(rows.outputs + (i * (Cell::states - 1) + s - 1) * padded_h + unit, next[s]);
      }
      if (Cell::Step::projects && layer_.sizes.projected)
        store(given<p>(rows, i) + unit, next[0]);
      else
        store_h(rows, i, unit, count, next[0]);
    } else {
      for (int v = 0; v < Phase::given; ++v) store(given<p>(rows, i) + v * padded_h + unit, next[v]);
    }
  }

  RNNKERN_INLINE void store_h(const Rows& rows, std::int64_t i, std::int64_t unit, int count, V h) const noexcept {
    store(rows.next[0][i] + unit, h);
    store_some<V>(rows.y(rows.first + i) + unit, h, count);
  }

  const bool keep_ = call.save == Save::gates && layer_.saved != nullptr && Cell::saved > 0;
  RowMap gate_map_{};                   // of the gates in scratch memory
  std::int64_t listed_ = 0, next_ = 0;  // rows that are listed, and the first of them that has not been worked on
};

}  // namespace
}  // namespace rnnkern
