// exp, sigmoid, tanh and relu on vectors: the only approximations in the project.
//
// All rest on one identity, e^(2h) = 2^n (c + r) / (c - r) with h = n ln2/2 + r, |r| <= ln2/4 and c = r coth r. c is
// even in r and nearly 1, so a short polynomial in r^2 gives it, and tanh and sigmoid cost one division in all. The
// coefficients come from a Remez exchange in 50 digits for the relative error of c, each rounded in turn and the later
// ones fitted again.
#pragma once

#include "simd.h"

namespace rnnkern {
namespace {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2_e = 0x1.715476p+0f, half_ln2 = 0x1.62e43p-2f;
  static constexpr float half_ln2_high = 0x1.62e4p-2f;  // 15 bits: times n is exact
  static constexpr float half_ln2_low = 0x1.7f7d1cp-21f;
  static constexpr float coth[] = {0x1.55551ep-2f, -0x1.6aa3b6p-6f};  // relative error of c 2^-28.7
  static constexpr float overflow = 89, underflow = 88;               // e^x is inf at overflow, zero at -underflow
  static constexpr float tanh_is_one = 10;
};

template <>
struct ExpConstants<double> {
  static constexpr double log2_e = 0x1.71547652b82fep+0, half_ln2 = 0x1.62e42fefa39efp-2;
  static constexpr double half_ln2_high = 0x1.62e42fefa3p-2;  // 41 bits: times n is exact
  static constexpr double half_ln2_low = 0x1.3de6af278ece6p-43;
  static constexpr double coth[] = {0x1.555555555553ep-2, -0x1.6c16c16bebb09p-6, 0x1.1566aaf1bbb06p-9,
                                    -0x1.bbd41a70e86c2p-13, 0x1.63759dbac754dp-16};  // 2^-60.0
  static constexpr double overflow = 710, underflow = 709;
  static constexpr double tanh_is_one = 20;
};

// c = r coth r for |r| <= ln2/4
template <class V>
RNNKERN_INLINE V r_coth_r(V r) noexcept {
  constexpr auto& coefficients = ExpConstants<Scalar<V>>::coth;
  constexpr int terms = static_cast<int>(sizeof coefficients / sizeof coefficients[0]);
  const V square = r * r;
  V sum = set<V>(coefficients[terms - 1]);
  for (int i = terms - 2; i >= 0; --i) sum = fma(sum, square, set<V>(coefficients[i]));
  return fma(sum, square, set<V>(1));
}

// e^x = scale * numerator / denominator, for -underflow <= x <= overflow
template <class V>
struct ExpFraction {
  V scale, numerator, denominator;
};

template <class V>
RNNKERN_INLINE ExpFraction<V> exp_fraction(V x) noexcept {
  using K = ExpConstants<Scalar<V>>;
  const V n = round_product(x, set<V>(K::log2_e));
  const V r = fnma(n, set<V>(K::half_ln2_low), fnma(n, set<V>(K::half_ln2_high), Scalar<V>(0.5) * x));
  const V c = r_coth_r(r);
  return {pow2n(n), c + r, c - r};
}

// e^x within 1.7 ulp. Ends half a binade early: zero below 2^-126.5 (float), 2^-1022.5 (double), inf above 2^127.5,
// 2^1023.5.
template <class V>
RNNKERN_INLINE V exp(V x) noexcept {
  using K = ExpConstants<Scalar<V>>;
  const auto e = exp_fraction(max(min(x, set<V>(K::overflow)), set<V>(-K::underflow)));
  return e.scale * (e.numerator / e.denominator);
}

// 1 / (1 + e^-x), within 2.5 ulp where that is normal
template <class V>
RNNKERN_INLINE V sigmoid(V x) noexcept {
  using K = ExpConstants<Scalar<V>>;
  const auto e = exp_fraction(-max(min(x, set<V>(K::underflow)), set<V>(-K::overflow)));
  return e.denominator / fma(e.scale, e.numerator, e.denominator);
}

// (e^2x - 1) / (e^2x + 1), within 2.5 ulp, 2.7 without FMA. ln2/2 in one piece will do: where n is large, tanh is flat.
template <class V>
RNNKERN_INLINE V tanh(V x) noexcept {
  using K = ExpConstants<Scalar<V>>;
  x = max(min(x, set<V>(K::tanh_is_one)), set<V>(-K::tanh_is_one));
  const V n = round_product(x, set<V>(2 * K::log2_e));
  const V r = fnma(n, set<V>(K::half_ln2), x);
  const V c = r_coth_r(r), scale = pow2n(n);
  const V sum = scale + 1, difference = 1 - scale;  // this way round tanh(-0) is -0
  if constexpr (kHasFma) {
    return fnma(difference, c, sum * r) / fma(sum, c, -(difference * r));
  } else {  // products with c would round once more; those with c - 1, which is exact, are small
    const V excess = c - 1;
    return ((sum * r - difference * excess) - difference) / ((sum * excess - difference * r) + sum);
  }
}

template <class V>
RNNKERN_INLINE V relu(V x) noexcept {
  return select(x <= zero<V>(), zero<V>(), x);  // NaN compares false and stays, -0 becomes +0
}

}  // namespace
}  // namespace rnnkern
