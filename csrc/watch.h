// What backward sees on its way of the gradients of the states: norms, bounds on them, and saturated gates.
//
// A sum over the units of a row is one of sums over panels, in double, so that the order of its terms follows from the
// sizes alone, and not from who does which part.
#pragma once

#include "gemm.h"

namespace rnnkern {
namespace {

constexpr bool watches(const Watch& watch) noexcept { return watch.flow || watch.bound != Bound::nothing; }
constexpr bool measures(const Watch& watch) noexcept { return watch.flow || watch.bound == Bound::norm; }

// Loads as many elements as a vector of double has.
template <class T>
RNNKERN_INLINE F64 load_wide(const T* from) noexcept {
  if constexpr (sizeof(T) == sizeof(double)) {
    return load<F64>(from);
  } else {
    typename Vector<T, kVectorBytes / 2>::Type narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    return __builtin_convertvector(narrow, F64);
  }
}

// Of fewer elements than a vector has they are added one after the other.
template <class T>
__attribute__((noinline)) double sum_of_squares(const T* values, std::int64_t count) noexcept {
  constexpr int lanes = kLanes<double>, chains = 4;
  F64 sums[chains] = {};
  std::int64_t i = 0;
  for (; i + chains * lanes <= count; i += chains * lanes)
    for (int c = 0; c < chains; ++c) {
      const F64 v = load_wide(values + i + c * lanes);
      sums[c] = fma(v, v, sums[c]);
    }
  for (; i + lanes <= count; i += lanes) {
    const F64 v = load_wide(values + i);
    sums[0] = fma(v, v, sums[0]);
  }
  const F64 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int l = 0; l < lanes; ++l) total += sum[l];
  for (; i < count; ++i) total += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return total;
}

// values[i] = function(values[i], other[i]); other null: zeros
template <class T, class Function>
RNNKERN_INLINE void change(T* values, const T* other, std::int64_t count, Function&& function) noexcept {
  using V = Vec<T>;
  for (std::int64_t i = 0; i < count; i += kLanes<T>) {
    const int some = static_cast<int>(smaller(count - i, kLanes<T>));
    const V b = other ? load_some<V>(other + i, some) : zero<V>();
    store_some<V>(values + i, function(load_some<V>(values + i, some), b), some);
  }
}

template <class T>
__attribute__((noinline)) void scale(T* values, std::int64_t count, T factor) noexcept {
  change<T>(values, nullptr, count, [=](auto a, auto) RNNKERN_INLINE_LAMBDA { return a * factor; });
}

// NaN stays NaN.
template <class V>
RNNKERN_INLINE V bounded(V values, Scalar<V> most) noexcept {
  return max<V>(min<V>(values, set<V>(most)), set<V>(-most));
}

// The factor that brings a row down to a bound of its norm. A norm that is not finite changes nothing.
template <class T>
RNNKERN_INLINE T factor_of(const Watch& watch, double squares) noexcept {
  const double norm = __builtin_sqrt(squares);
  return norm > watch.most && norm < __builtin_inf() ? static_cast<T>(watch.most / norm) : T{1};
}

// The units of a share of panels.
template <class T>
RNNKERN_INLINE Range units_of(Panels panels, std::int64_t units) noexcept {
  constexpr std::int64_t width = Plain::vectors * kLanes<T>;
  return {smaller(panels.begin * width, units), smaller(panels.end * width, units)};
}

// Adds dy (null: zeros) to some panels of a row of the gradient of a state, writes the sum of the squares of each to
// `squares`, and bounds the elements.
template <class T>
__attribute__((noinline)) void watch_row(T* gradient, const T* dy, Panels panels, std::int64_t units,
                                         const Watch& watch, double* squares) noexcept {
  constexpr std::int64_t width = Plain::vectors * kLanes<T>;
  const auto [begin, end] = units_of<T>(panels, units);
  if (dy) change(gradient + begin, dy + begin, end - begin, [](auto a, auto b) RNNKERN_INLINE_LAMBDA { return a + b; });
  if (measures(watch))
    for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
      squares[panel] = sum_of_squares(gradient + panel * width, smaller(width, units - panel * width));
  if (watch.bound != Bound::value) return;
  const T most = static_cast<T>(watch.most);
  change<T>(gradient + begin, nullptr, end - begin,
            [=](auto a, auto) RNNKERN_INLINE_LAMBDA { return bounded(a, most); });
}

// Counts the units of a gate, `stride` elements apart, that are saturated.
template <class T>
RNNKERN_INLINE double count_saturated(const T* gate, std::int64_t units, std::int64_t stride, double low,
                                      double high) noexcept {
  const T least = static_cast<T>(low), most = static_cast<T>(high);
  int found = 0;
  for (std::int64_t i = 0; i < units * stride; i += stride) found += gate[i] <= least || gate[i] > most;
  return found;
}

}  // namespace
}  // namespace rnnkern
