// Products of pairs of bfloat16 numbers as the matrix engines of a CPU make them (Intel AMX): by the engine, and the
// same sums in vector code, for machines without one.
//
// An engine takes 32 inputs at a time, 16 pairs. It sums the products of the first of all pairs from zero, and those of
// the last, two chains of multiply-adds; adds these two sums; and adds that to the sum so far. Denormals count as zero.
// So every output element has one order of sums again, whatever the tile, which is another than that of `Rounded`.
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
// sums have the order of floats. All calls that must give the same gradients have the same batch.
template <bool emulated>
struct BFloat16TilesOfFewRows : BFloat16Tiles<emulated> {
  using Outer = Rounded;
  static constexpr bool sums_steps = false;
};
template <bool emulated>
constexpr const Arithmetic<float>* kOfFewRows<BFloat16Tiles<emulated>> = &kArithmetic<BFloat16TilesOfFewRows<emulated>>;

constexpr int kEngineRows = 16;   // of a tile, at most
constexpr int kEnginePairs = 16;  // of inputs, of a tile
static_assert(kSumRows == 2 * kEnginePairs);

// Does what tile_of_rows does, a row at a time.
template <int vectors>
__attribute__((noinline)) void emulated_tile(std::int64_t rows, const float* const* a, std::int64_t depth,
                                             const void* w, const float* from, std::int64_t from_stride,
                                             F32* sums) noexcept {
  constexpr int lanes = kLanes<float>;
  const std::int64_t pairs = divide_up(depth, 2);
  for (std::int64_t r = 0; r < rows; ++r, sums += vectors) {
    const auto* weights = static_cast<const BFloat16*>(w);
    for (int v = 0; v < vectors; ++v) sums[v] = load<F32>(from + r * from_stride + v * lanes);
    for (std::int64_t first = 0; first < pairs; first += kEnginePairs) {
      F32 upper[vectors] = {}, lower[vectors] = {};
      const std::int64_t end = smaller(first + kEnginePairs, pairs);
      for (std::int64_t i = first; i < end; ++i) {
        const F32 input = BFloat16Pairs::load_input(a[r] + i);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v, weights += 2 * lanes) {
          upper[v] = fma(upper_halves(input), BFloat16Weights::load_weights<0>(weights), upper[v]);
          lower[v] = fma(lower_halves(input), BFloat16Weights::load_weights<1>(weights), lower[v]);
        }
      }
      for (int v = 0; v < vectors; ++v) sums[v] += upper[v] + lower[v];
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

// Loads the shapes where those of this thread are others: that takes 200 cycles, and zeroes the tiles.
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
template <int left, int right, int vectors, int v = 0>
RNNKERN_INLINE void multiply_tiles(const char* weights) noexcept {
  if constexpr (v < vectors) {
    load_tile<right>(weights + v * 64, vectors * 64);
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(v), "i"(left), "i"(right));
    multiply_tiles<left, right, vectors, v + 1>(weights);
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
template <int vectors>
__attribute__((noinline, target("amx-tile,amx-bf16"))) void engine_tile(std::int64_t rows, const float* const* a,
                                                                        std::int64_t depth, const void* w,
                                                                        const float* from, std::int64_t from_stride,
                                                                        F32* sums) noexcept {
  const std::int64_t pairs = divide_up(depth, 2), tail = pairs % kEnginePairs;
  const std::int64_t apart = rows > 1 ? (a[1] - a[0]) * 4 : 0;
  shape_tiles(rows, tail);
  load_sums<vectors>(from, from_stride * 4);
  const auto* weights = static_cast<const char*>(w);
  const float* row = *a;
  for (const float* const end = row + pairs - tail; row != end; row += kEnginePairs) {
    load_tile<4>(row, apart);
    multiply_tiles<4, 5, vectors>(weights);
    weights += kEnginePairs * vectors * 64;
  }
  if (tail) {
    load_tile<6>(row, apart);
    multiply_tiles<6, 7, vectors>(weights);
  }
  store_sums<vectors>(sums);
}

#else
constexpr bool kHasEngine = false;
RNNKERN_INLINE void release_tiles() noexcept {}
template <int vectors>
constexpr auto engine_tile = emulated_tile<vectors>;
#endif

template <bool emulated, int vectors>
constexpr Tiles<float>::Tile kEngineTile = emulated ? emulated_tile<vectors> : engine_tile<vectors>;

template <bool emulated, int vectors>
constexpr Tiles<float> kTilesOf<BFloat16Tiles<emulated>, vectors>{
    vectors, kEngineRows, std::int64_t{1} << 62, kEngineTile<emulated, vectors>, kEngineTile<emulated, vectors>};

// One row and some panels, one after the other.
template <bool emulated, class Shape>
__attribute__((noinline)) void engine_panels(std::int64_t panels, std::int64_t tail_subs, const float* a,
                                             std::int64_t depth, const void* w, const float* start,
                                             F32* sums) noexcept {
  constexpr int vectors = Shape::vectors, gates = vectors / Shape::subs;
  const std::int64_t step = kStored<BFloat16Pairs>.inputs(depth) * vectors * kLanes<float>;
  const auto* weights = static_cast<const BFloat16*>(w);
  for (; panels > 0; --panels, weights += step, sums += vectors) {
    kEngineTile<emulated, vectors>(1, &a, depth, weights, start, 0, sums);
    start += vectors * kLanes<float>;
  }
  if (tail_subs > 0)
    kTiles<BFloat16Tiles<emulated>>[tail_subs * gates - 1].of_rows(1, &a, depth, weights, start, 0, sums);
}
template <bool emulated, class Shape>
constexpr Arithmetic<float>::PanelsTile kPanelsTile<BFloat16Tiles<emulated>, Shape> = engine_panels<emulated, Shape>;

// What a kernel call changes of its thread, and puts back.
struct KernelMode {
  const FlushDenormals flush;

  RNNKERN_INLINE ~KernelMode() { release_tiles(); }
};

}  // namespace
}  // namespace rnnkern
