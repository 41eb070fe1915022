// The formats of a product: the type of states and sums (T), the type that packed weights are stored in (W), what the
// rows that are multiplied with them become, and one multiplication. Inputs stand in groups side by side, so that a
// group of a unit fills a lane of T.
#pragma once

#include "simd.h"

namespace rnnkern {
namespace {

// Weights are stored as what they are multiplied with.
template <class Element>
struct AsStates {
  using T = Element;
  using W = Element;
  using Tiled = AsStates;     // the format whose tiles it runs on,
  using PackedAs = AsStates;  // whose layout its weights have,
  using Outer = AsStates;     // and by which sums of outer products over rows are made
  using FewRows = void;       // formats that take its place, where there are such: see Arithmetic
  using Bounded = void;
  static constexpr int group = 1;            // inputs side by side in packed weights
  static constexpr int step = 1;             // inputs that one multiplication takes
  static constexpr int slices = 1;           // that an element of rows becomes
  static constexpr int head = 0;             // inputs for which a panel has room before the first
  static constexpr bool sums_steps = false;  // outer products by its own tiles, see Arithmetic
  static constexpr T padding = T{0};         // weight of an input that fills up a group
  static constexpr void (*operand)(const T* from, std::int64_t count, T* to) noexcept = nullptr;  // see Arithmetic

  // Reads the weights of multiplication `i` of a group, for the units of a vector.
  template <int i>
  RNNKERN_INLINE static Vec<T> load_weights(const W* from) noexcept {
    return load<Vec<T>>(from);
  }
  // Reads what a multiplication takes of a row.
  RNNKERN_INLINE static Vec<T> load_input(const T* from) noexcept { return set<Vec<T>>(*from); }
  RNNKERN_INLINE static Vec<T> multiply(Vec<T> input, Vec<T> weight, Vec<T> sum) noexcept {
    return fma(input, weight, sum);
  }
  // Stores the weights of a group of inputs, given by its first and last.
  RNNKERN_INLINE static void store_group(W* to, Vec<T> first, Vec<T>) noexcept { store(to, first); }
};

// The upper half of a float: 8 bits of mantissa, the range of a float.
struct BFloat16 {
  std::uint16_t bits;
};

// Two numbers of 16 bits, which are the upper halves of their lanes, in one lane: the first in its upper half.
RNNKERN_INLINE F32 pair_of(F32 first, F32 last) noexcept {
  return reinterpret_cast<F32>(reinterpret_cast<BitsOf<F32>>(first) | reinterpret_cast<BitsOf<F32>>(last) >> 16);
}

template <std::size_t odd, std::size_t... lane>
RNNKERN_INLINE F32 every_other(F32 a, F32 b, std::index_sequence<lane...>) noexcept {
  return __builtin_shufflevector(a, b, static_cast<int>(2 * lane + odd)...);
}
// Calls body(first, last) for the inputs of a row, two that stand side by side in the same lane of both; zeros past the
// end.
template <class Body>
RNNKERN_INLINE void for_pairs(const float* from, std::int64_t count, Body&& body) noexcept {
  constexpr int lanes = kLanes<float>;
  constexpr std::make_index_sequence<lanes> each{};
  const auto vector_at = [&](std::int64_t i) RNNKERN_INLINE_LAMBDA {
    return i < count ? load_some<F32>(from + i, static_cast<int>(count - i < lanes ? count - i : lanes)) : zero<F32>();
  };
  for (std::int64_t i = 0; i < count; i += 2 * lanes) {
    const F32 a = vector_at(i), b = vector_at(i + lanes);
    body(every_other<0>(a, b, each), every_other<1>(a, b, each));
  }
}

// Rounds to the nearest bfloat16 number, ties to even. NaN stays NaN; what is too large becomes infinite.
RNNKERN_INLINE F32 round_to_bfloat16(F32 v) noexcept {
  using Bits = BitsOf<F32>;
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u, quiet = (bits & 0xffff0000u) | 0x00400000u;
  return select<F32>(v == v, reinterpret_cast<F32>(rounded), reinterpret_cast<F32>(quiet));
}

// to = the nearest bfloat16 numbers; writes whole vectors. to may be from.
__attribute__((noinline)) void round_row(const float* from, std::int64_t count, float* to) noexcept {
  constexpr int lanes = kLanes<float>;
  for (std::int64_t i = 0; i < count; i += lanes)
    store(to + i, round_to_bfloat16(load_some<F32>(from + i, static_cast<int>(count - i < lanes ? count - i : lanes))));
}

// Weights and rows are rounded to bfloat16 and multiplied as floats: what the instructions for bfloat16 compute, which
// add the exact products one after the other.
struct Rounded : AsStates<float> {
  using PackedAs = Rounded;
  using Outer = Rounded;
  static constexpr auto operand = round_row;
  RNNKERN_INLINE static void store_group(W* to, F32 first, F32) noexcept { store(to, round_to_bfloat16(first)); }
};

// Weights are rounded to bfloat16, of which the upper halves are stored; products and sums are float. Two inputs make a
// group, the first in the upper half of 32 bits: a lane gives both by a mask and a shift, which costs less than to
// widen 16 bits.
struct BFloat16Weights : AsStates<float> {
  using W = BFloat16;
  using Tiled = BFloat16Weights;
  using PackedAs = BFloat16Weights;
  static constexpr int group = 2;
  static constexpr float padding = -0.0f;  // times 0 it adds -0, which changes no sum

  template <int i>
  RNNKERN_INLINE static F32 load_weights(const W* from) noexcept {
    BitsOf<F32> pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return reinterpret_cast<F32>(i == 0 ? pairs & 0xffff0000u : pairs << 16);
  }
  RNNKERN_INLINE static void store_group(W* to, F32 first, F32 last) noexcept {
    const F32 pairs = pair_of(round_to_bfloat16(first), round_to_bfloat16(last));
    std::memcpy(to, &pairs, sizeof pairs);
  }
};

// The same with rows that are rounded too.
struct RoundedBFloat16Weights : BFloat16Weights {
  using Outer = Rounded;
  static constexpr auto operand = round_row;
};

// Rows become such pairs too, and one instruction multiplies two inputs: bit for bit what Rounded computes.
struct BFloat16Pairs : BFloat16Weights {
  using Tiled = BFloat16Pairs;
  using Outer = BFloat16Pairs;
  static constexpr int step = 2;

  // to [ceil(count / 2)], writes whole vectors. to may be from.
  static void make_pairs(const float* from, std::int64_t count, float* to) noexcept {
    for_pairs(from, count, [&](F32 first, F32 last) RNNKERN_INLINE_LAMBDA {
      store(to, pair_of(round_to_bfloat16(first), round_to_bfloat16(last)));
      to += kLanes<float>;
    });
  }
  static constexpr auto operand = make_pairs;

  template <int>
  RNNKERN_INLINE static F32 load_weights(const W* from) noexcept {
    F32 pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return pairs;
  }
  RNNKERN_INLINE static F32 load_input(const float* from) noexcept {
    std::uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return reinterpret_cast<F32>(pair + BitsOf<F32>{});
  }
  RNNKERN_INLINE static F32 multiply(F32 inputs, F32 weights, F32 sum) noexcept {
    return add_pairs(inputs, weights, sum);
  }
};

// How a format stores weights: inputs side by side, a power of two, bytes of one, and inputs before the first.
struct Stored {
  std::int64_t group, bytes, head;

  // Inputs as they are stored: whole groups; without a division, which a short step would feel.
  constexpr std::int64_t inputs(std::int64_t count) const noexcept { return ((count + group - 1) & -group) + head; }
};
template <class Format>
constexpr Stored kStored{Format::group, sizeof(typename Format::W), Format::head};

}  // namespace
}  // namespace rnnkern
