// Products as the matrix engines of a CPU make them (Intel AMX), which multiply bfloat16 numbers: by the engine, and
// the same sums in vector code, for machines without one.
//
// An engine takes 32 inputs at a time, 16 pairs. It sums the products of the first of all pairs from zero, and those of
// the last, two chains of multiply-adds; adds these two sums; and adds that to the sum so far. Denormals count as zero.
// So every output element has one order of sums again, whatever the tile, which is another than that of `Rounded`.
//
// A float is the sum of three bfloat16 numbers. Six of the nine products of two such sums, the smallest first, give the
// digits of a float32 product.
#pragma once

#include "gemm.h"

namespace rnnkern {
namespace {

// Packed like pairs: a tile's right side is those of 16 pairs of inputs for a vector of units, as they stand.
template <bool emulated>
struct BFloat16Tiles : BFloat16Pairs {
  using Tiled = BFloat16Tiles;
  static constexpr bool sums_steps = true;
};

// The same for batches of few rows, which would fill a small part of the tiles that sum over the rows of a step: these
// sums are those of Sums, in the order of floats. All calls that must give the same gradients have the same batch.
template <class Tiles, class Sums>
struct OfFewRows : Tiles {
  using Outer = Sums;
  static constexpr bool sums_steps = false;
};
template <bool emulated>
constexpr const Arithmetic<float>* kOfFewRows<BFloat16Tiles<emulated>> =
    &kArithmetic<OfFewRows<BFloat16Tiles<emulated>, Rounded>>;

// Both sides as three slices: 8 bits each, cut off and not rounded, so that the largest floats stay finite. Numbers
// that are not finite are their first slice.
struct Sliced : AsStates<float> {
  struct Slices {
    std::uint16_t parts[3];
  };
  using W = Slices;  // a group is three vectors of pairs, one for each slice
  using PackedAs = Sliced;
  using Outer = Sliced;
  static constexpr int group = 2, step = 2, slices = 3;

  // Elements from a slice of a row to the next.
  static constexpr std::int64_t stride(std::int64_t depth) noexcept {
    return scratch_stride<float>(divide_up(depth, 2));
  }

  // Takes the next slice off v. The third leaves nothing.
  RNNKERN_INLINE static F32 slice_of(F32& v) noexcept {
    const F32 none = v - v;  // NaN where v is not finite
    const F32 slice = select<F32>(none == none, upper_halves(v), round_to_bfloat16(v));
    v = select<F32>(none == none, v - slice, zero<F32>());
    return slice;
  }
  RNNKERN_INLINE static void store_group(W* to, F32 first, F32 last) noexcept {
    for (int s = 0; s < slices; ++s)
      BFloat16Weights::store_group(reinterpret_cast<BFloat16*>(to) + s * 2 * kLanes<float>, slice_of(first),
                                   slice_of(last));
  }
  // to [slices][stride(count)]
  __attribute__((noinline)) static void make_slices(const float* from, std::int64_t count, float* to) noexcept {
    constexpr int lanes = kLanes<float>;
    const auto vector_at = [&](std::int64_t i) RNNKERN_INLINE_LAMBDA {
      return i < count ? load_some<F32>(from + i, static_cast<int>(smaller(count - i, lanes))) : zero<F32>();
    };
    for (std::int64_t i = 0; i < count; i += 2 * lanes, to += lanes) {
      F32 first = vector_at(i), second = vector_at(i + lanes);
      for (int s = 0; s < slices; ++s) {
        const F32 a = slice_of(first), b = slice_of(second);
        store(to + s * stride(count), BFloat16Pairs::pairs_of(a, b, std::make_index_sequence<lanes>()));
      }
    }
  }
  static constexpr auto operand = make_slices;
};

template <bool emulated>
struct SlicedTiles : Sliced {
  using Tiled = SlicedTiles;
  static constexpr bool sums_steps = true;
};
template <bool emulated>
constexpr const Arithmetic<float>* kOfFewRows<SlicedTiles<emulated>> =
    &kArithmetic<OfFewRows<SlicedTiles<emulated>, AsStates<float>>>;

// The slices of rows and of weights that are multiplied, one after the other.
struct Term {
  int left, right;
};
template <int slices>
constexpr Term kTerms[slices * (slices + 1) / 2] = {};
template <>
constexpr Term kTerms<3>[6] = {{0, 2}, {1, 1}, {2, 0}, {0, 1}, {1, 0}, {0, 0}};

constexpr int kEngineRows = 16;   // of a tile, at most
constexpr int kEnginePairs = 16;  // of inputs, of a tile
static_assert(kSumRows == 2 * kEnginePairs);

// Does what tile_of_rows does, a row at a time; for rows that are equally far apart, like those of an engine.
template <int vectors, int slices>
__attribute__((noinline)) void emulated_tile(std::int64_t rows, const float* const* a, std::int64_t depth,
                                             const void* w, const float* from, std::int64_t from_stride,
                                             F32* sums) noexcept {
  constexpr int lanes = kLanes<float>;
  const std::int64_t pairs = divide_up(depth, 2), apart = rows > 1 ? a[1] - a[0] : 0;
  const float* row = *a;
  for (std::int64_t r = 0; r < rows; ++r, row += apart, sums += vectors) {
    for (int v = 0; v < vectors; ++v) sums[v] = load<F32>(from + r * from_stride + v * lanes);
    for (std::int64_t first = 0; first < pairs; first += kEnginePairs) {
      const std::int64_t end = smaller(first + kEnginePairs, pairs);
      for (const Term term : kTerms<slices>) {
        F32 upper[vectors] = {}, lower[vectors] = {};
        for (std::int64_t i = first; i < end; ++i) {
          const F32 input = BFloat16Pairs::load_input(row + term.left * Sliced::stride(depth) + i);
          const auto* weights = static_cast<const BFloat16*>(w) + (i * vectors * slices + term.right) * 2 * lanes;
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v, weights += slices * 2 * lanes) {
            upper[v] = fma(upper_halves(input), BFloat16Weights::load_weights<0>(weights), upper[v]);
            lower[v] = fma(lower_halves(input), BFloat16Weights::load_weights<1>(weights), lower[v]);
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

// Adds to the sums the products of the pairs in tile `left` with those of each vector, through tile `right`.
template <int left, int right, int vectors, int slices, int v = 0>
RNNKERN_INLINE void multiply_tiles(const char* weights) noexcept {
  if constexpr (v < vectors) {
    load_tile<right>(weights + v * slices * 64, vectors * slices * 64);
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(v), "i"(left), "i"(right));
    multiply_tiles<left, right, vectors, slices, v + 1>(weights);
  }
}
// The same for each pair of slices; the rows are `apart` bytes from each other, their slices `slice` elements.
template <int left, int right, int vectors, int slices>
RNNKERN_INLINE void multiply_slices(const float* row, std::int64_t apart, std::int64_t slice,
                                    const char* weights) noexcept {
  for (const Term term : kTerms<slices>) {
    load_tile<left>(row + term.left * slice, apart);
    multiply_tiles<left, right, vectors, slices>(weights + term.right * 64);
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
template <int vectors, int slices>
__attribute__((noinline, target("amx-tile,amx-bf16"))) void engine_tile(std::int64_t rows, const float* const* a,
                                                                        std::int64_t depth, const void* w,
                                                                        const float* from, std::int64_t from_stride,
                                                                        F32* sums) noexcept {
  const std::int64_t pairs = divide_up(depth, 2), tail = pairs % kEnginePairs, slice = Sliced::stride(depth);
  const std::int64_t apart = rows > 1 ? (a[1] - a[0]) * 4 : 0;
  shape_tiles(rows, tail);
  load_sums<vectors>(from, from_stride * 4);
  const auto* weights = static_cast<const char*>(w);
  const float* row = *a;
  for (const float* const end = row + pairs - tail; row != end; row += kEnginePairs) {
    multiply_slices<4, 5, vectors, slices>(row, apart, slice, weights);
    weights += kEnginePairs * vectors * slices * 64;
  }
  if (tail) multiply_slices<6, 7, vectors, slices>(row, apart, slice, weights);
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
template <int vectors, int slices>
constexpr auto engine_tile = emulated_tile<vectors, slices>;
#endif

// Makes the sums of a row that are not finite again, by multiply-adds: slices make NaN of what is infinite.
template <int vectors>
__attribute__((noinline)) void mend_sums(const float* row, std::int64_t depth, const void* w, const float* from,
                                         F32* sums) noexcept {
  constexpr int lanes = kLanes<float>;
  const auto* weights = static_cast<const BFloat16*>(w);
  F32 exact[vectors];
  for (int v = 0; v < vectors; ++v) exact[v] = load<F32>(from + v * lanes);
  for (std::int64_t i = 0; i < divide_up(depth, 2); ++i)
    for (int v = 0; v < vectors; ++v) {
      F32 input[2] = {}, weight[2] = {};
      for (int s = 0; s < Sliced::slices; ++s, weights += 2 * lanes) {
        const F32 pair = BFloat16Pairs::load_input(row + s * Sliced::stride(depth) + i);
        input[0] += upper_halves(pair), input[1] += lower_halves(pair);
        weight[0] += BFloat16Weights::load_weights<0>(weights), weight[1] += BFloat16Weights::load_weights<1>(weights);
      }
      exact[v] = fma(input[1], weight[1], fma(input[0], weight[0], exact[v]));
    }
  for (int v = 0; v < vectors; ++v) sums[v] = select<F32>(sums[v] - sums[v] == zero<F32>(), sums[v], exact[v]);
}

// Does what tile_of_rows does with sliced rows and weights. sums must not be from.
template <bool emulated, int vectors>
__attribute__((noinline)) void sliced_tile(std::int64_t rows, const float* const* a, std::int64_t depth, const void* w,
                                           const float* from, std::int64_t from_stride, F32* sums) noexcept {
  if constexpr (emulated)
    emulated_tile<vectors, Sliced::slices>(rows, a, depth, w, from, from_stride, sums);
  else
    engine_tile<vectors, Sliced::slices>(rows, a, depth, w, from, from_stride, sums);
  F32 nothing = {};  // NaN where a sum is not finite
  for (std::int64_t i = 0; i < rows * vectors; ++i) nothing += sums[i] - sums[i];
  bool finite = true;
  for (int lane = 0; lane < kLanes<float>; ++lane) finite &= nothing[lane] == 0;
  for (std::int64_t r = 0; !finite && r < rows; ++r)
    mend_sums<vectors>(a[r], depth, w, from + r * from_stride, sums + r * vectors);
}

template <class Format, int vectors>
constexpr Tiles<float>::Tile kEngineTile = nullptr;
template <bool emulated, int vectors>
constexpr Tiles<float>::Tile kEngineTile<BFloat16Tiles<emulated>, vectors> =
    emulated ? emulated_tile<vectors, 1> : engine_tile<vectors, 1>;
template <bool emulated, int vectors>
constexpr Tiles<float>::Tile kEngineTile<SlicedTiles<emulated>, vectors> = sliced_tile<emulated, vectors>;

template <class Format, int vectors>
constexpr Tiles<float> kEngineTiles{vectors, kEngineRows, std::int64_t{1} << 62, kEngineTile<Format, vectors>,
                                    kEngineTile<Format, vectors>};
template <bool emulated, int vectors>
constexpr Tiles<float> kTilesOf<BFloat16Tiles<emulated>, vectors> = kEngineTiles<BFloat16Tiles<emulated>, vectors>;
template <bool emulated, int vectors>
constexpr Tiles<float> kTilesOf<SlicedTiles<emulated>, vectors> = kEngineTiles<SlicedTiles<emulated>, vectors>;

// One row and some panels, one after the other.
template <class Format, class Shape>
__attribute__((noinline)) void engine_panels(std::int64_t panels, std::int64_t tail_subs, const float* a,
                                             std::int64_t depth, const void* w, const float* start,
                                             F32* sums) noexcept {
  constexpr int vectors = Shape::vectors, gates = vectors / Shape::subs;
  const std::int64_t step = kStored<Format>.inputs(depth) * vectors * kLanes<float>;
  const auto* weights = static_cast<const typename Format::W*>(w);
  for (; panels > 0; --panels, weights += step, sums += vectors, start += vectors * kLanes<float>)
    kEngineTile<Format, vectors>(1, &a, depth, weights, start, 0, sums);
  if (tail_subs > 0) kTiles<Format>[tail_subs * gates - 1].of_rows(1, &a, depth, weights, start, 0, sums);
}
template <bool emulated, class Shape>
constexpr Arithmetic<float>::PanelsTile kPanelsTile<BFloat16Tiles<emulated>, Shape> =
    engine_panels<BFloat16Tiles<emulated>, Shape>;
template <bool emulated, class Shape>
constexpr Arithmetic<float>::PanelsTile kPanelsTile<SlicedTiles<emulated>, Shape> =
    engine_panels<SlicedTiles<emulated>, Shape>;

// What a kernel call changes of its thread, and puts back.
struct KernelMode {
  const FlushDenormals flush;

  RNNKERN_INLINE ~KernelMode() { release_tiles(); }
};

}  // namespace
}  // namespace rnnkern
