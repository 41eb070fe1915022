// Products as the matrix engines of a CPU make them (Intel AMX), which multiply numbers of 16 bits: by the engine, and
// the same sums in vector code, for machines without one.
//
// An engine takes 32 inputs at a time, 16 pairs. It sums the products of the first of all pairs from zero, and those of
// the last, two chains of multiply-adds; adds these two sums; and adds that to the sum so far. Floats that are denormal
// count as zero, bfloat16 numbers too, float16 numbers do not. So every output element has one order of sums again,
// whatever the tile, which is another than that of `Rounded`.
//
// A float is the sum of three bfloat16 numbers. Six of the nine products of two such sums, the smallest first, give the
// digits of a float32 product. Scaled, it is the sum of two float16 numbers but for its last bit, and three products
// do; docs/precision.md has the bound.
#pragma once

#include "gemm.h"

namespace rnnkern {
namespace {

// A kind of numbers that engines multiply: the bits of VEX.pp in the instruction for it, and as floats those in the
// upper and in the lower half of each lane.
struct BFloat16Numbers {
  static constexpr int prefix = 2;
  RNNKERN_INLINE static F32 upper(F32 pairs) noexcept { return upper_halves(pairs); }
  RNNKERN_INLINE static F32 lower(F32 pairs) noexcept { return lower_halves(pairs); }
};
struct Float16Numbers {
  static constexpr int prefix = 3;
  RNNKERN_INLINE static F32 upper(F32 pairs) noexcept {
    return from_float16(reinterpret_cast<BitsOf<F32>>(pairs) >> 16);
  }
  RNNKERN_INLINE static F32 lower(F32 pairs) noexcept {
    return from_float16(reinterpret_cast<BitsOf<F32>>(pairs) & 0xffffu);
  }
};

// Elements from a slice of a row to the next.
constexpr std::int64_t slice_stride(std::int64_t depth) noexcept { return scratch_stride<float>(divide_up(depth, 2)); }

// Makes the slices of a row, to [slices][slice_stride(count)], with the factor of scaled ones in the last element.
template <class Format>
__attribute__((noinline)) void make_slices(const float* from, std::int64_t count, float* to) noexcept {
  const std::int64_t stride = slice_stride(count);
  F32 up = set<F32>(1);
  if constexpr (Format::head > 0) up = Format::scale_row(from, count, to[Format::slices * stride - 1]);
  for_pairs(from, count, [&](F32 first, F32 last) RNNKERN_INLINE_LAMBDA {
    F32 pairs[Format::slices];
    Format::slice(first, last, up, pairs);
    for (int s = 0; s < Format::slices; ++s) store(to + s * stride, pairs[s]);
    to += kLanes<float>;
  });
}

// Packed like pairs: a tile's right side is those of 16 pairs of inputs for a vector of units, as they stand.
struct Pairs : BFloat16Pairs {
  using Numbers = BFloat16Numbers;
  using OuterOfFew = Rounded;
};

// Both sides as three slices: 8 bits each, cut off and not rounded, so that the largest floats stay finite. Numbers
// that are not finite are their first slice.
struct Sliced : AsStates<float> {
  struct Slices {
    std::uint16_t parts[3];
  };
  using W = Slices;  // a group is three vectors of pairs, one for each slice
  using PackedAs = Sliced;
  using Outer = Sliced;
  using OuterOfFew = AsStates<float>;
  using Numbers = BFloat16Numbers;
  static constexpr int group = 2, step = 2, slices = 3;
  static constexpr auto operand = make_slices<Sliced>;

  // Takes the next slice off v. The third leaves nothing.
  RNNKERN_INLINE static F32 slice_of(F32& v) noexcept {
    const F32 none = v - v;  // NaN where v is not finite
    const F32 slice = select<F32>(none == none, upper_halves(v), round_to_bfloat16(v));
    v = select<F32>(none == none, v - slice, zero<F32>());
    return slice;
  }
  RNNKERN_INLINE static void slice(F32 first, F32 last, F32, F32 (&pairs)[slices]) noexcept {
    for (F32& pair : pairs) {
      const F32 a = slice_of(first);
      pair = pair_of(a, slice_of(last));
    }
  }
  RNNKERN_INLINE static void store_group(W* to, F32 first, F32 last) noexcept {
    F32 pairs[slices];
    slice(first, last, first, pairs);
    std::memcpy(to, pairs, sizeof pairs);
  }
  // The two numbers of which these are slices.
  RNNKERN_INLINE static void join(const F32 (&pairs)[slices], F32, F32& first, F32& last) noexcept {
    first = last = zero<F32>();
    for (const F32 pair : pairs) first += upper_halves(pair), last += lower_halves(pair);
  }
};

// Both sides as two slices of float16, rounded, of 2^n times the numbers: each row has its n, and so have the weights
// of each unit; the largest of them is then between 2^14 and 2^15. Where that is beyond 2^64 or below 2^-64, and where
// more than a sixteenth are so small beside it that they would lose 2^-19 of themselves, numbers stay floats in the
// place of the slices: their factor is NaN, and so are their sums, which are then made again. A row has the factor that
// undoes its scale behind its slices, a panel those of its units in its head.
struct Scaled : AsStates<float> {
  using PackedAs = Scaled;
  using OuterOfFew = Outer;
  using Numbers = Float16Numbers;
  static constexpr int group = 2, step = 2, slices = 2, head = 2;
  static constexpr auto operand = make_slices<Scaled>;

  RNNKERN_INLINE static void slice(F32 first, F32 last, F32 up, F32 (&pairs)[slices]) noexcept {
    const Mask<F32> fits = up == up;
    F32 rest[] = {first * up, last * up};
    for (F32& pair : pairs) {
      BitsOf<F32> halves[2];
      for (int i = 0; i < 2; ++i) halves[i] = to_float16(rest[i]), rest[i] -= from_float16(halves[i]);
      pair = select<F32>(fits, reinterpret_cast<F32>(halves[0] << 16 | halves[1]), &pair == pairs ? first : last);
    }
  }
  RNNKERN_INLINE static void join(const F32 (&pairs)[slices], F32 down, F32& first, F32& last) noexcept {
    const Mask<F32> fits = down == down;
    first = select<F32>(fits, (Numbers::upper(pairs[0]) + Numbers::upper(pairs[1])) * down, pairs[0]);
    last = select<F32>(fits, (Numbers::lower(pairs[0]) + Numbers::lower(pairs[1])) * down, pairs[1]);
  }

  RNNKERN_INLINE static F32 scale_row(const float* from, std::int64_t count, float& down) noexcept {
    const Scale found = scale<true>(divide_up(count, kLanes<float>), count, [&](std::int64_t i) RNNKERN_INLINE_LAMBDA {
      const std::int64_t first = i * kLanes<float>;
      return load_some<F32>(from + first, static_cast<int>(smaller(count - first, kLanes<float>)));
    });
    down = found.down[0];
    return found.up;
  }
  RNNKERN_INLINE static void store_group(W* to, F32 first, F32 last) noexcept {
    store(to, first);
    store(to + kLanes<float>, last);
  }
  // Makes slices of the weights of a vector of units, whose groups are `step` inputs apart.
  __attribute__((noinline)) static void finish(W* to, std::int64_t depth, std::int64_t step) noexcept {
    const auto group = [&](std::int64_t i) RNNKERN_INLINE_LAMBDA { return to + i / 2 * 2 * step; };
    const auto input = [&](std::int64_t i)
                           RNNKERN_INLINE_LAMBDA { return load<F32>(group(i) + i % 2 * kLanes<float>); };
    const Scale found = scale<false>(depth, depth, input);
    store(to - head * step, found.down);
    for (std::int64_t i = 0; i < depth; i += 2) {
      F32 pairs[slices];
      slice(input(i), input(i + 1), found.up, pairs);
      std::memcpy(group(i), pairs, sizeof pairs);
    }
  }

 private:
  struct Scale {
    F32 up, down;
  };

  // Of `count` numbers of each lane, or with of_row of all lanes; vectors(i): some of them.
  template <bool of_row, class Vectors>
  RNNKERN_INLINE static Scale scale(std::int64_t vector_count, std::int64_t count, Vectors&& vectors) noexcept {
    using Bits = BitsOf<F32>;
    const auto magnitude = [&](std::int64_t i) RNNKERN_INLINE_LAMBDA {
      return reinterpret_cast<Bits>(vectors(i)) & 0x7fffffffu;  // in the order of floats, NaN behind them
    };
    Bits most{}, lost{};
    for (std::int64_t i = 0; i < vector_count; ++i) {
      const Bits some = magnitude(i);
      most = some > most ? some : most;
    }
    if constexpr (of_row) {
      std::uint32_t largest = 0;
      for (int lane = 0; lane < kLanes<float>; ++lane) largest = most[lane] > largest ? most[lane] : largest;
      most = Bits{} + largest;
    }
    for (std::int64_t i = 0; i < vector_count; ++i) {
      const Bits some = magnitude(i);
      lost -= reinterpret_cast<Bits>((some != 0) & (some < most - (20u << 23)));
    }
    if constexpr (of_row) {
      std::uint32_t all = 0;
      for (int lane = 0; lane < kLanes<float>; ++lane) all += lost[lane];
      lost = Bits{} + all;
    }
    const Bits exponent = most == 0 ? Bits{} + 127 : most >> 23;
    const auto fits = (exponent - 63 < 128) & (lost <= static_cast<std::uint32_t>(count / 16));
    const Bits none = Bits{} + 0x7fc00000u;
    return {reinterpret_cast<F32>(fits ? (127 + 14 + 127 - exponent) << 23 : none),
            reinterpret_cast<F32>(fits ? (exponent - 14) << 23 : none)};
  }
};

// Pairs or slices, multiplied by the engine or its emulation.
template <class Tiles, class Sums>
struct OfFewRows;
template <class Slices, bool emulate>
struct OnEngine : Slices {
  using Tiled = OnEngine;
  using FewRows = OfFewRows<OnEngine, typename Slices::OuterOfFew>;
  static constexpr bool emulated = emulate, sums_steps = true;
};
// The same for batches of few rows, which would fill a small part of the tiles that sum over the rows of a step: these
// sums are those of Sums, in the order of floats. All calls that must give the same gradients have the same batch.
template <class Tiles, class Sums>
struct OfFewRows : Tiles {
  using Outer = Sums;
  using FewRows = void;
  static constexpr bool sums_steps = false;
};
template <bool emulate>
using BFloat16Tiles = OnEngine<Pairs, emulate>;
template <bool emulate>
using SlicedTiles = OnEngine<Sliced, emulate>;
template <bool emulate>
using ScaledTiles = OnEngine<Scaled, emulate>;
// Slices of float16 for rows bounded by 1, of bfloat16 for all others.
template <bool emulate>
struct SlicedTilesOfBoth : SlicedTiles<emulate> {
  using FewRows = OfFewRows<SlicedTilesOfBoth, AsStates<float>>;
  using Bounded = ScaledTiles<emulate>;
};

// The slices of rows and of weights that are multiplied, one after the other.
struct Term {
  int left, right;
};
template <int slices>
constexpr Term kTerms[slices * (slices + 1) / 2] = {};
template <>
constexpr Term kTerms<2>[3] = {{0, 1}, {1, 0}, {0, 0}};
template <>
constexpr Term kTerms<3>[6] = {{0, 2}, {1, 1}, {2, 0}, {0, 1}, {1, 0}, {0, 0}};

constexpr int kEngineRows = 16;   // of a tile, at most
constexpr int kEnginePairs = 16;  // of inputs, of a tile
static_assert(kSumRows == 2 * kEnginePairs);

// Where a panel has the first slice of its first inputs.
template <class Format>
RNNKERN_INLINE const float* weights_of(const void* panel, std::int64_t vectors) noexcept {
  return static_cast<const float*>(panel) + Format::head * vectors * kLanes<float>;
}

// Does what tile_of_rows does, a row at a time; for rows that are equally far apart, like those of an engine.
template <class Format, int vectors>
__attribute__((noinline)) void emulated_tile(std::int64_t rows, const float* const* a, std::int64_t depth,
                                             const void* w, const float* from, std::int64_t from_stride,
                                             F32* sums) noexcept {
  using Numbers = typename Format::Numbers;
  constexpr int lanes = kLanes<float>, slices = Format::slices;
  const std::int64_t pairs = divide_up(depth, 2), apart = rows > 1 ? a[1] - a[0] : 0;
  const float* row = *a;
  for (std::int64_t r = 0; r < rows; ++r, row += apart, sums += vectors) {
    for (int v = 0; v < vectors; ++v) sums[v] = load<F32>(from + r * from_stride + v * lanes);
    for (std::int64_t first = 0; first < pairs; first += kEnginePairs) {
      const std::int64_t end = smaller(first + kEnginePairs, pairs);
      for (const Term term : kTerms<slices>) {
        F32 upper[vectors] = {}, lower[vectors] = {};
        for (std::int64_t i = first; i < end; ++i) {
          const F32 input = BFloat16Pairs::load_input(row + term.left * slice_stride(depth) + i);
          const float* weights = weights_of<Format>(w, vectors) + (i * vectors * slices + term.right) * lanes;
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v, weights += slices * lanes) {
            const F32 pair = load<F32>(weights);
            upper[v] = fma(Numbers::upper(input), Numbers::upper(pair), upper[v]);
            lower[v] = fma(Numbers::lower(input), Numbers::lower(pair), lower[v]);
          }
        }
        for (int v = 0; v < vectors; ++v) sums[v] += upper[v] + lower[v];
      }
    }
  }
}

#if defined(__AVX512F__) && defined(__linux__)
constexpr bool kHasEngine = true;

// How a thread's tiles are shaped: sums of `vectors` vectors in tiles 0 to 3; 16 pairs of the rows and of a vector of
// weights in 4 and 5; the pairs that are left over, 1 to 16, in 6 and 7. The compiler knows nothing of tiles: the
// instructions are written by hand, like that for pairs, and none of it runs before dispatch.cpp has asked for them.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
struct ShapedTiles {
  std::int64_t rows, tail;  // rows 0: none
};
thread_local ShapedTiles shaped_tiles{};

// Loads the shapes where those of this thread are others: that takes about 100 ns, and zeroes the tiles.
RNNKERN_INLINE void shape_tiles(std::int64_t rows, std::int64_t tail) noexcept {
  ShapedTiles& now = shaped_tiles;
  if (now.rows == rows && (tail == 0 || now.tail == tail)) return;
  now = {rows, tail ? tail : kEnginePairs};
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    const bool weights = tile == 5 || tile == 7;
    shapes.rows[tile] = static_cast<std::uint8_t>(!weights ? rows : tile == 7 ? now.tail : kEnginePairs);
    shapes.row_bytes[tile] = static_cast<std::uint16_t>(tile == 6 ? 4 * now.tail : 64);
  }
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

// Gives the tiles of this thread back: other code may use them then, and they need no room where threads change.
__attribute__((noinline)) void release_tiles() noexcept {
  if (shaped_tiles.rows == 0) return;
  shaped_tiles.rows = 0;
  asm volatile("tilerelease");
}

template <int tile>
RNNKERN_INLINE void load_tile(const void* from, std::int64_t row_bytes) noexcept {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
RNNKERN_INLINE void store_tile(void* to, std::int64_t row_bytes) noexcept {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(tile) : "memory");
}

// Adds to the sums the products of the pairs in tile `left` with those of each vector, through tile `right`: tdpbf16ps
// or tdpfp16ps, which older assemblers do not know.
template <class Format, int left, int right, int vectors, int v = 0>
RNNKERN_INLINE void multiply_tiles(const float* weights) noexcept {
  if constexpr (v < vectors) {
    load_tile<right>(weights + v * Format::slices * 16, vectors * Format::slices * 64);
    asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((~right & 15) << 3 | Format::Numbers::prefix),
                 "i"(0xc0 | v << 3 | left));
    multiply_tiles<Format, left, right, vectors, v + 1>(weights);
  }
}
// The same for each pair of slices; the rows are `apart` bytes from each other, their slices `slice` elements.
template <class Format, int left, int right, int vectors>
RNNKERN_INLINE void multiply_slices(const float* row, std::int64_t apart, std::int64_t slice,
                                    const float* weights) noexcept {
  for (const Term term : kTerms<Format::slices>) {
    load_tile<left>(row + term.left * slice, apart);
    multiply_tiles<Format, left, right, vectors>(weights + term.right * 16);
  }
}
template <int vectors, int v = 0>
RNNKERN_INLINE void load_sums(const float* from, std::int64_t row_bytes) noexcept {
  if constexpr (v < vectors) {
    load_tile<v>(from + v * 16, row_bytes);
    load_sums<vectors, v + 1>(from, row_bytes);
  }
}
template <int vectors, int v = 0>
RNNKERN_INLINE void store_sums(F32* sums) noexcept {
  if constexpr (v < vectors) {
    store_tile<v>(sums + v, vectors * 64);
    store_sums<vectors, v + 1>(sums);
  }
}

// Does what tile_of_rows does for up to 16 rows, which are equally far apart.
template <class Format, int vectors>
__attribute__((noinline, target("amx-tile,amx-bf16"))) void engine_tile(std::int64_t rows, const float* const* a,
                                                                        std::int64_t depth, const void* w,
                                                                        const float* from, std::int64_t from_stride,
                                                                        F32* sums) noexcept {
  const std::int64_t pairs = divide_up(depth, 2), tail = pairs % kEnginePairs, slice = slice_stride(depth);
  const std::int64_t apart = rows > 1 ? (a[1] - a[0]) * 4 : 0;
  shape_tiles(rows, tail);
  load_sums<vectors>(from, from_stride * 4);
  const float* weights = weights_of<Format>(w, vectors);
  const float* row = *a;
  for (const float* const end = row + pairs - tail; row != end; row += kEnginePairs) {
    multiply_slices<Format, 4, 5, vectors>(row, apart, slice, weights);
    weights += kEnginePairs * vectors * Format::slices * 16;
  }
  if (tail) multiply_slices<Format, 6, 7, vectors>(row, apart, slice, weights);
  store_sums<vectors>(sums);
}

// Multiplies tiles that stay where they are, four sums at a time: for probes.h.
inline void multiply_again(const float* tile, std::int64_t repeats) noexcept {
  shape_tiles(kEngineRows, 0);
  load_tile<4>(tile, 64);
  load_tile<5>(tile, 64);
  for (std::int64_t repeat = 0; repeat < repeats; ++repeat)
    asm volatile(
        "tdpbf16ps %tmm5, %tmm4, %tmm0\n\ttdpbf16ps %tmm5, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm5, %tmm4, %tmm2\n\ttdpbf16ps %tmm5, %tmm4, %tmm3");
}

#else
constexpr bool kHasEngine = false;
inline void multiply_again(const float*, std::int64_t) noexcept {}
RNNKERN_INLINE void release_tiles() noexcept {}
template <class Format, int vectors>
constexpr auto engine_tile = emulated_tile<Format, vectors>;
#endif

template <class Format, int vectors>
constexpr Tiles<float>::Tile tile_of_engine() noexcept {
  if constexpr (Format::emulated)
    return emulated_tile<Format, vectors>;
  else
    return engine_tile<Format, vectors>;
}

// Makes the sums of a row that are not finite again, by multiply-adds: slices make NaN of what is infinite. down: the
// factor of the row, that of the units is in the head of the panel.
template <class Slices>
__attribute__((noinline)) void mend_sums(const float* row, std::int64_t depth, const void* w, const float* from,
                                         std::int64_t vectors, F32 down, F32* sums) noexcept {
  constexpr int lanes = kLanes<float>, slices = Slices::slices;
  const auto* heads = static_cast<const float*>(w);
  for (std::int64_t v = 0; v < vectors; ++v, ++sums, from += lanes, heads += Slices::head * lanes) {
    F32 exact = load<F32>(from);
    const F32 down_of_unit = Slices::head > 0 ? load<F32>(heads) : down;
    const float* weights = weights_of<Slices>(w, vectors) + v * slices * lanes;
    for (std::int64_t i = 0; i < divide_up(depth, 2); ++i, weights += vectors * slices * lanes) {
      F32 inputs[slices], units[slices], input[2], weight[2];
      for (int s = 0; s < slices; ++s) {
        inputs[s] = BFloat16Pairs::load_input(row + s * slice_stride(depth) + i);
        units[s] = load<F32>(weights + s * lanes);
      }
      Slices::join(inputs, down, input[0], input[1]);
      Slices::join(units, down_of_unit, weight[0], weight[1]);
      exact = fma(input[1], weight[1], fma(input[0], weight[0], exact));
    }
    *sums = select<F32>(*sums - *sums == zero<F32>(), *sums, exact);
  }
}

// Makes of the sums of slices those of the numbers, and of `from` where slices are scaled. sums must not be from.
template <class Slices>
__attribute__((noinline)) void finish_sums(std::int64_t rows, const float* const* a, std::int64_t depth, const void* w,
                                           const float* from, std::int64_t from_stride, std::int64_t vectors,
                                           F32* sums) noexcept {
  constexpr bool scaled = Slices::head > 0;
  constexpr int lanes = kLanes<float>;
  const auto down_of = [&](std::int64_t r) RNNKERN_INLINE_LAMBDA {
    return set<F32>(scaled ? a[r][Slices::slices * slice_stride(depth) - 1] : 1);
  };
  F32 nothing = {};  // NaN where a sum is not finite
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t v = 0; v < vectors; ++v) {
      F32& sum = sums[r * vectors + v];
      if constexpr (scaled)
        sum = fma(sum * down_of(r), load<F32>(static_cast<const float*>(w) + v * Slices::head * lanes),
                  load<F32>(from + r * from_stride + v * lanes));
      nothing += sum - sum;
    }
  bool finite = true;
  for (int lane = 0; lane < lanes; ++lane) finite &= nothing[lane] == 0;
  for (std::int64_t r = 0; !finite && r < rows; ++r)
    mend_sums<Slices>(a[r], depth, w, from + r * from_stride, vectors, down_of(r), sums + r * vectors);
}

// Does what tile_of_rows does with sliced rows and weights.
template <class Format, int vectors>
void sliced_tile(std::int64_t rows, const float* const* a, std::int64_t depth, const void* w, const float* from,
                 std::int64_t from_stride, F32* sums) noexcept {
  constexpr bool scaled = Format::head > 0;
  tile_of_engine<Format, vectors>()(rows, a, depth, w, scaled ? kZeros<float> : from, scaled ? 0 : from_stride, sums);
  finish_sums<typename Format::PackedAs>(rows, a, depth, w, from, from_stride, vectors, sums);
}

// Products of numbers that are one slice need no look at their sums.
template <class Format, int vectors>
constexpr Tiles<float>::Tile kEngineTile = [] {
  if constexpr (Format::slices == 1)
    return tile_of_engine<Format, vectors>();
  else
    return sliced_tile<Format, vectors>;
}();

template <class Slices, bool emulate, int vectors>
constexpr Tiles<float> kTilesOf<OnEngine<Slices, emulate>, vectors>{vectors, kEngineRows, std::int64_t{1} << 62,
                                                                    kEngineTile<OnEngine<Slices, emulate>, vectors>,
                                                                    kEngineTile<OnEngine<Slices, emulate>, vectors>};

// One row and some panels, one after the other.
[[maybe_unused, gnu::noinline]] void engine_panels(const Tiles<float>* tiles, Stored stored, std::int64_t vectors,
                                                   std::int64_t tail_vectors, std::int64_t panels, const float* a,
                                                   std::int64_t depth, const void* w, const float* start,
                                                   F32* sums) noexcept {
  const std::int64_t width = vectors * kLanes<float>;
  const auto* weights = static_cast<const char*>(w);
  for (; panels > 0; --panels, weights += stored.inputs(depth) * width * stored.bytes, sums += vectors, start += width)
    tiles[vectors - 1].of_rows(1, &a, depth, weights, start, 0, sums);
  if (tail_vectors > 0) tiles[tail_vectors - 1].of_rows(1, &a, depth, weights, start, 0, sums);
}
template <class Slices, bool emulate, class Shape>
constexpr Arithmetic<float>::PanelsTile kPanelsTile<OnEngine<Slices, emulate>, Shape> =
    [](std::int64_t panels, std::int64_t tail_subs, const float* a, std::int64_t depth, const void* w,
       const float* start, F32* sums) noexcept {
      engine_panels(kTiles<OnEngine<Slices, emulate>>, kStored<Slices>, Shape::vectors,
                    tail_subs * Shape::vectors / Shape::subs, panels, a, depth, w, start, sums);
    };

// What a kernel call changes of its thread, and puts back.
struct KernelMode {
  const FlushDenormals flush;

  RNNKERN_INLINE ~KernelMode() { release_tiles(); }
};

}  // namespace
}  // namespace rnnkern
