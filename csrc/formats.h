// The formats of packed weights: the type of states and sums (T), the type weights are stored in (W), and how a product
// reads one. Inputs stand in groups side by side, so that a group of a unit fills a lane of T.
#pragma once

#include "simd.h"

namespace rnnkern {
namespace {

// Weights are stored as what they are multiplied with.
template <class Element>
struct AsStates {
  using T = Element;
  using W = Element;
  static constexpr int group = 1;
  static constexpr bool trains = true;

  // Reads the weights of input `i` of a group, for the units of a vector.
  template <int i>
  RNNKERN_INLINE static Vec<T> load_weights(const W* from) noexcept {
    return load<Vec<T>>(from);
  }
  // Stores the weights of a group of inputs, given by its first and last.
  RNNKERN_INLINE static void store_group(W* to, Vec<T> first, Vec<T>) noexcept { store(to, first); }
};

// The upper half of a float: 8 bits of mantissa, the range of a float.
struct BFloat16 {
  std::uint16_t bits;
};

// Weights that are bfloat16 numbers already, of which the upper halves are stored; products and sums are float. Two
// inputs make a group: a lane of 32 bits gives both by a shift and a mask, which costs less than to widen 16 bits.
struct BFloat16Weights {
  using T = float;
  using W = BFloat16;
  static constexpr int group = 2;
  static constexpr bool trains = false;

  template <int i>
  RNNKERN_INLINE static F32 load_weights(const W* from) noexcept {
    BitsOf<F32> pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return reinterpret_cast<F32>(i == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  RNNKERN_INLINE static void store_group(W* to, F32 first, F32 last) noexcept {
    const BitsOf<F32> pairs =
        reinterpret_cast<BitsOf<F32>>(first) >> 16 | (reinterpret_cast<BitsOf<F32>>(last) & 0xffff0000u);
    std::memcpy(to, &pairs, sizeof pairs);
  }
};

// Inputs as they are stored: whole groups.
template <class Format>
constexpr std::int64_t stored_inputs(std::int64_t inputs) noexcept {
  return (inputs + Format::group - 1) / Format::group * Format::group;
}

}  // namespace
}  // namespace rnnkern
