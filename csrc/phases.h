// What a step is made of: the list of phases that a cell declares, and what each phase may read and write.
//
// A phase takes something of all units of a row - a product with recurrent weights, means over the units, or nothing -
// and goes on with an elementwise part, a struct of the cell's, while that is in registers. The last part sets the new
// states. An earlier one gives vectors of units to the phase behind it; in between the units are exchanged, so that
// threads which share the units of a row wait for each other. recurrence.h walks the list, bptt.h walks its mirror,
// and pack.h packs the weights of each product. Phases share the gates among them in order.
#pragma once

#include "activations.h"
#include "kernel_table.h"

namespace rnnkern {
namespace {

constexpr int kInOutput = -1;  // a state that backward finds in y; others are in a slot of the saved values

// What a phase takes of a row: nothing, h before the step, or what the phase before it gives.
enum class From { nothing, h, given };

template <class Elementwise, From taken, int gate_count, int mean_count = 0, bool projection = false>
struct Phase {
  using Part = Elementwise;
  static constexpr From from = taken;
  static constexpr int gates = gate_count;  // whose share of the input this phase uses
  static constexpr int means = mean_count;  // over the units, of as many vectors
  static constexpr bool projects = projection;
  static constexpr bool multiplies = from != From::nothing && means == 0;
  static constexpr int outputs = projects || !multiplies ? 1 : gates;  // of a unit
};

// The product of h, or of the vector given, with the recurrent weights of the next `gates` gates.
template <From from, int gates, class Part>
using Product = Phase<Part, from, gates>;
// No more than an elementwise part, with the next `gates` gates of the input's share.
template <int gates, class Part>
using Each = Phase<Part, From::nothing, gates>;
// The means of `count` given vectors over the units of a row.
template <int count, class Part>
using Means = Phase<Part, From::given, 0, count>;
// The projection, in layers that have one: h is the product of the given vector with W_hr.
using Projection = Phase<void, From::given, 0, 0, true>;

template <int n, class First, class... Rest>
struct Nth : Nth<n - 1, Rest...> {};
template <class First, class... Rest>
struct Nth<0, First, Rest...> {
  using Type = First;
};

template <class... P>
struct Phases {
  static constexpr int count = sizeof...(P);
  template <int p>
  using At = typename Nth<p, P...>::Type;
  static constexpr bool projects = At<count - 1>::projects;
  static constexpr int last = count - 1 - projects;  // the phase whose part sets the states

  static constexpr int gates[] = {P::gates...}, means[] = {P::means..., 0};
  static constexpr bool multiplies[] = {P::multiplies..., false};

  static constexpr int gates_before(int p) noexcept {
    int total = 0;
    for (int i = 0; i < p; ++i) total += gates[i];
    return total;
  }
};

// Phase p of a cell in its place.
template <class Cell, int p>
struct PhaseOf : Cell::Step::template At<p> {
  using Step = typename Cell::Step;
  static constexpr bool is_last = p == Step::last;
  static constexpr int first = Step::gates_before(p), end = Step::gates_before(p + 1);
  static constexpr int saves = is_last ? Cell::saved : end;  // slots of the saved row that are filled behind it
  // Vectors that the phase behind it takes, and whether for a product.
  static constexpr int given = Step::means[p + 1] > 0 ? Step::means[p + 1] : p + 1 < Step::count;
  static constexpr bool feeds_product = Step::multiplies[p + 1];
  static constexpr int sets = is_last ? Cell::states : given;  // the `next` of its part
  static constexpr bool bounded = Cell::bounded && !Step::template At<p>::projects;
};

// Calls body.template operator()<p>() for each phase p in order, or from the last to the first.
template <class Cell, class Body>
RNNKERN_INLINE constexpr void for_each_phase(Body&& body) noexcept {
  [&]<int... p>(std::integer_sequence<int, p...>) RNNKERN_INLINE_LAMBDA {
    (body.template operator()<p>(), ...);
  }(std::make_integer_sequence<int, Cell::Step::count>());
}
template <class Cell, class Body>
RNNKERN_INLINE void for_each_phase_backwards(Body&& body) noexcept {
  for_each_phase<Cell>([&]<int p>() RNNKERN_INLINE_LAMBDA { body.template operator()<Cell::Step::count - 1 - p>(); });
}

// Is called where the compiler evaluates, which it cannot: its name says in the error what is wrong.
RNNKERN_INLINE void not_there_for_this_phase() noexcept {}

// The number of a value, written down in a cell's math; one outside [begin, end) is an error of the compiler.
template <int begin, int end>
struct Number {
  int value;
  consteval Number(int number) noexcept : value(number) {
    if (number < begin || number >= end) not_there_for_this_phase();
  }
};

// What a part may read (V const) or write: values [begin, end) of a kind, stored one after the other.
template <class V, int end, int begin = 0>
struct Values {
  V* stored;
  RNNKERN_INLINE V& operator[](Number<begin, end> number) const noexcept { return stored[number.value - begin]; }
};

// The part of phase p forward: x of the gates of the phase, r its results; next holds what it gives.
template <class Cell, int p, class V>
RNNKERN_INLINE void forward_part(const V* x, const V* r, const V* extra, const V* prev, V* next, V* saved) noexcept {
  using P = PhaseOf<Cell, p>;
  constexpr int from = P::means ? 0 : P::first, to = P::means ? P::means : P::multiplies ? P::end : P::first;
  P::Part::forward(Values<const V, P::end, P::first>{x}, Values<const V, to, from>{r},
                   Values<const V, Cell::extras>{extra},
                   Values<const V, Cell::states, P::Step::projects>{prev + P::Step::projects}, Values<V, P::sets>{next},
                   Values<V, P::saves>{saved});
}

// And backward: dnew are the gradients of what it gives; it sets dr, and adds to what the phases behind it have left in
// dx, dprev and dextra.
template <class Cell, int p, class V>
RNNKERN_INLINE void backward_part(const V* saved, const V* extra, const V* prev, const V* h, const V* dnew, V* dx,
                                  V* dr, V* dprev, V* dextra) noexcept {
  using P = PhaseOf<Cell, p>;
  constexpr int from = P::means ? 0 : P::first, to = P::means ? P::means : Cell::separate_recurrent ? P::end : P::first;
  constexpr int outputs = P::is_last && Cell::saved == 0;  // h, for parts that have it from y alone
  using Previous = Values<const V, Cell::states, P::Step::projects>;
  P::Part::backward(
      Values<const V, Cell::saved>{saved}, Values<const V, Cell::extras>{extra}, Previous{prev + P::Step::projects},
      Values<const V, outputs>{h}, Values<const V, P::sets>{dnew}, Values<V, P::end>{dx}, Values<V, to, from>{dr},
      Values<V, Cell::states, P::Step::projects>{dprev + P::Step::projects}, Values<V, Cell::extras>{dextra});
}

// What phase p gave to the product behind it.
template <class Cell, int p, class V>
RNNKERN_INLINE V given_by_part(const V* saved, const V* prev) noexcept {
  using P = PhaseOf<Cell, p>;
  return P::Part::given(Values<const V, Cell::saved>{saved},
                        Values<const V, Cell::states, P::Step::projects>{prev + P::Step::projects});
}

// What every cell keeps to, since the loops rely on it.
template <class Cell>
constexpr bool check_laws() noexcept {
  using Step = typename Cell::Step;
  static_assert(Cell::states >= 1 && Cell::states <= kMaxStates && Cell::extras >= 0 && Cell::extras <= kMaxExtras &&
                Cell::gates <= kMaxGates);
  static_assert(sizeof Cell::kept == Cell::states * sizeof(int) && Cell::kept[0] == kInOutput, "y is h");
  static_assert(
      [] {
        for (int s = 1; s < Cell::states; ++s)
          if (Cell::kept[s] < 0 || Cell::kept[s] >= Cell::saved) return false;
        return true;
      }(),
      "backward finds each state but h in a slot of the saved values");
  static_assert(Step::gates_before(Step::count) == Cell::gates, "each gate belongs to a phase");
  static_assert(Cell::saved >= Cell::gates || (Cell::saved == 0 && Step::last == 0),
                "the saved row holds the input's share of a gate until its phase");
  static_assert(!Step::projects || Step::last == 0, "the product of a given vector takes H units");
  for_each_phase<Cell>([]<int p>() {
    using P = PhaseOf<Cell, p>;
    static_assert((P::from == From::given) == (p > 0), "the first phase, and no other, takes h or nothing");
    static_assert(!P::projects || p == Step::count - 1, "nothing follows a projection");
  });
  return true;
}

}  // namespace
}  // namespace rnnkern
