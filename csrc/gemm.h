// The register tile and the two products made of it: rows times packed weights, and sums of outer products over rows.
//
// Every output element is one chain of multiply-adds in the order of its inputs (or rows), whatever the tile, the block
// or the number of threads: that is what makes results equal to the last bit however a call is cut up.
#pragma once

#include "pack.h"

#define RNNKERN_INLINE_LAMBDA __attribute__((always_inline))

namespace rnnkern {
namespace {

// Rows of a tile of `vectors` vectors: what the registers hold beside one weight vector and a broadcast per row.
// 16 registers: 3 rows of 4 (12 + 3 + 1) or 4 of 3 (12 + 4, the weight from memory); 32: 6 of 4 (24 + 6 + 1), 8 of 3.
template <int vectors>
constexpr int kTileRows = (kRegisters == 32 ? 24 : 12) / vectors;

// Panels side by side when there is one row: FMA has 4 cycles latency and two ports, so 8 chains keep it busy.
template <int vectors>
constexpr int kSingleRowPanels = vectors * 3 <= kRegisters - 4 ? 3 : 2;

template <int vectors>
constexpr int kTileSums =
    kTileRows<vectors> * vectors > kSingleRowPanels<vectors>* vectors ? kTileRows<vectors> * vectors
                                                                      : kSingleRowPanels<vectors> * vectors;

// sums[r][v] += left(r) * right[v]. The shorter side waits in registers, the longer one passes through a single one:
// with the other order GCC spills an accumulator of 4 rows by 3 vectors, and the tile runs at half speed.
template <class T, int rows, int vectors, class Left>
RNNKERN_INLINE void add_outer(Left&& left, const T* right, Vec<T> (&sums)[rows][vectors]) noexcept {
  using V = Vec<T>;
  if constexpr (rows < vectors) {
    V input[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) input[r] = set<V>(left(r));
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const V weight = load<V>(right + v * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sums[r][v] = fma(input[r], weight, sums[r][v]);
    }
  } else {
    V weight[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) weight[v] = load<V>(right + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V input = set<V>(left(r));
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = fma(input, weight[v], sums[r][v]);
    }
  }
}

// sums [panels][rows][vectors] = start + a w; a: `rows` pointers to `depth` elements; w: `panels` panels
// `panel_stride` elements apart; start [panels][vectors * lanes] or null for zeros.
template <class T, int vectors, int rows, int panels>
RNNKERN_INLINE void accumulate(const T* const* a, std::int64_t depth, const T* w, std::int64_t panel_stride,
                               const T* start, Vec<T>* sums) noexcept {
  using V = Vec<T>;
  V s[panels][rows][vectors];
  const T* row[rows];
  for (int p = 0; p < panels; ++p)
    for (int v = 0; v < vectors; ++v) {
      const V first = start ? load<V>(start + (p * vectors + v) * kLanes<T>) : zero<V>();
      for (int r = 0; r < rows; ++r) s[p][r][v] = first;
    }
  for (int r = 0; r < rows; ++r) row[r] = a[r];
  for (std::int64_t k = 0; k < depth; ++k, w += vectors * kLanes<T>)
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p)
      add_outer<T, rows, vectors>([&](int r) RNNKERN_INLINE_LAMBDA { return row[r][k]; }, w + p * panel_stride, s[p]);
  for (int p = 0; p < panels; ++p)
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) *sums++ = s[p][r][v];
}

// Calls body.template operator()<rows>() for a number of rows that is known only now, 1 <= rows <= limit <= 8.
template <int limit, class Body>
RNNKERN_INLINE void with_rows(std::int64_t rows, Body&& body) noexcept {
  switch (rows) {
#define RNNKERN_ROWS(n)                                             \
  case n:                                                           \
    if constexpr (n <= limit) return body.template operator()<n>(); \
    break;
    RNNKERN_ROWS(1)
    RNNKERN_ROWS(2)
    RNNKERN_ROWS(3)
    RNNKERN_ROWS(4)
    RNNKERN_ROWS(5)
    RNNKERN_ROWS(6)
    RNNKERN_ROWS(7)
    RNNKERN_ROWS(8)
#undef RNNKERN_ROWS
  }
}

// The tile for any number of rows it can have; one function for all cells, so that its loops are compiled once.
template <class T, int vectors>
__attribute__((noinline)) void tile_of_rows(std::int64_t rows, const T* const* a, std::int64_t depth, const T* w,
                                            const T* start, Vec<T>* sums) noexcept {
  with_rows<kTileRows<vectors>>(
      rows, [&]<int n>() RNNKERN_INLINE_LAMBDA { accumulate<T, vectors, n, 1>(a, depth, w, 0, start, sums); });
}

template <class T, int vectors>
__attribute__((noinline)) void tile_of_panels(const T* const* a, std::int64_t depth, const T* w, const T* start,
                                              Vec<T>* sums) noexcept {
  accumulate<T, vectors, 1, kSingleRowPanels<vectors>>(a, depth, w, depth * vectors * kLanes<T>, start, sums);
}

// Calls body(first, rows) so that it covers [0, count) in tiles of at most `limit` rows, as equal as they can be: a
// last tile of one row would leave the multiply-adds waiting for each other.
template <int limit, class Body>
RNNKERN_INLINE void for_row_tiles(std::int64_t count, Body&& body) noexcept {
  std::int64_t first = 0;
  for (std::int64_t tiles = divide_up(count, limit); tiles > 0; --tiles) {
    const std::int64_t rows = divide_up(count - first, tiles);
    body(first, rows);
    first += rows;
  }
}

// For rows i in [0, rows) and panels p in [begin, end): sums of start and the product of inputs[i] (depth elements)
// with the packed weights; done(i, p, sums) takes the `vectors` sums of a row and a panel.
// start: [panel][vectors * lanes] or null for zeros.
template <class T, int vectors, class Done>
RNNKERN_INLINE void product(std::int64_t rows, const T* const* inputs, std::int64_t depth, const T* packed,
                            const T* start, std::int64_t begin, std::int64_t end, Done&& done) noexcept {
  constexpr int width = vectors * kLanes<T>, group = kSingleRowPanels<vectors>;
  Vec<T> sums[kTileSums<vectors>];
  std::int64_t panel = begin;
  if (rows == 1)
    for (; panel + group <= end; panel += group) {
      tile_of_panels<T, vectors>(inputs, depth, packed + panel * depth * width, start ? start + panel * width : nullptr,
                                 sums);
#pragma GCC unroll 1
      for (int p = 0; p < group; ++p) done(0, panel + p, sums + p * vectors);
    }
  for (; panel < end; ++panel)
    for_row_tiles<kTileRows<vectors>>(rows, [&](std::int64_t first, std::int64_t count) RNNKERN_INLINE_LAMBDA {
      tile_of_rows<T, vectors>(count, inputs + first, depth, packed + panel * depth * width,
                               start ? start + panel * width : nullptr, sums);
#pragma GCC unroll 1
      for (std::int64_t r = 0; r < count; ++r) done(first + r, panel, sums + r * vectors);
    });
}

// Calls done(v, unit, count): vector v of a plain panel begins at `unit` and has `count` valid lanes.
template <class T, class Done>
RNNKERN_INLINE void for_plain_vectors(std::int64_t panel, std::int64_t units, Done&& done) noexcept {
  for (int v = 0; v < Plain::vectors; ++v) {
    const std::int64_t unit = (panel * Plain::vectors + v) * kLanes<T>;
    if (unit >= units) return;
    const std::int64_t left = units - unit;
    done(v, unit, left < kLanes<T> ? static_cast<int>(left) : kLanes<T>);
  }
}

template <class V>
RNNKERN_INLINE V load_some(const Scalar<V>* source, int count) noexcept {
  return count == kLanes<Scalar<V>> ? load<V>(source) : load<V>(source, count);
}
template <class V>
RNNKERN_INLINE void store_some(Scalar<V>* target, V v, int count) noexcept {
  if (count == kLanes<Scalar<V>>)
    store(target, v);
  else
    store(target, v, count);
}

// outputs[i][0..units) = inputs[i] W, added to what is there if `add`. Columns: panels [begin, end).
template <class T>
void plain_product(std::int64_t rows, const T* const* inputs, std::int64_t depth, const T* packed, const T* start,
                   std::int64_t units, std::int64_t begin, std::int64_t end, T* const* outputs, bool add) noexcept {
  using V = Vec<T>;
  product<T, Plain::vectors>(rows, inputs, depth, packed, start, begin, end,
                             [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                               for_plain_vectors<T>(panel, units, [&](int v, std::int64_t unit, int count) {
                                 T* to = outputs[i] + unit;
                                 store_some<V>(to, add ? load_some<V>(to, count) + sum[v] : sum[v], count);
                               });
                             });
}

// Rows of an outer product that are worked on while the packed columns (rows x 4 vectors) stay in half of L1.
template <class T>
constexpr std::int64_t kOuterRows = 16 * 1024 / (Plain::vectors * kVectorBytes);
template <class T>
constexpr std::int64_t kOuterBuffer = kOuterRows<T> * Plain::vectors * kLanes<T>;

// target[r][k] += sum over i < count of left[i][j + r] * right[i][k] for the k of one panel of right.
template <class T, int tile_rows>
RNNKERN_INLINE void add_outer_tile(std::int64_t count, const T* const* left, std::int64_t j, const T* right,
                                   std::int64_t panel, std::int64_t columns, T* target) noexcept {
  using V = Vec<T>;
  constexpr int vectors = Plain::vectors;
  V sums[tile_rows][vectors] = {}, s[tile_rows][vectors];
  for (int r = 0; r < tile_rows; ++r)
    for_plain_vectors<T>(panel, columns, [&](int v, std::int64_t k, int some) {
      sums[r][v] = load_some<V>(target + r * columns + k, some);
    });
  for (int r = 0; r < tile_rows; ++r)
    for (int v = 0; v < vectors; ++v) s[r][v] = sums[r][v];
  for (std::int64_t i = 0; i < count; ++i, right += vectors * kLanes<T>) {
    const T* row = left[i] + j;
    add_outer<T, tile_rows, vectors>([&](int r) RNNKERN_INLINE_LAMBDA { return row[r]; }, right, s);
  }
  for (int r = 0; r < tile_rows; ++r)
    for (int v = 0; v < vectors; ++v) sums[r][v] = s[r][v];
  for (int r = 0; r < tile_rows; ++r)
    for_plain_vectors<T>(panel, columns, [&](int v, std::int64_t k, int some) {
      store_some<V>(target + r * columns + k, sums[r][v], some);
    });
}

// target[j][k] += sum over rows i of left[i][j] * right[i][k], for j in [begin, end) and k in [0, columns).
// target: row-major, `columns` columns. buffer: kOuterBuffer elements, 64-byte aligned.
template <class T>
void add_outer_products(std::int64_t rows, const T* const* left, const T* const* right, std::int64_t begin,
                        std::int64_t end, std::int64_t columns, T* target, T* buffer) noexcept {
  using V = Vec<T>;
  constexpr int vectors = Plain::vectors, width = vectors * kLanes<T>;
  if (begin >= end) return;
  for (std::int64_t first = 0; first < rows; first += kOuterRows<T>) {
    const std::int64_t some = rows - first < kOuterRows<T> ? rows - first : kOuterRows<T>;
    for (std::int64_t panel = 0; panel < Plain::panels<T>(columns); ++panel) {
      for (std::int64_t i = 0; i < some; ++i) {
        for (int v = 0; v < vectors; ++v) store(buffer + i * width + v * kLanes<T>, zero<V>());
        for_plain_vectors<T>(panel, columns, [&](int v, std::int64_t k, int count) {
          store(buffer + i * width + v * kLanes<T>, load_some<V>(right[first + i] + k, count));
        });
      }
      for_row_tiles<kTileRows<vectors>>(end - begin, [&](std::int64_t tile, std::int64_t tile_rows) {
        const std::int64_t j = begin + tile;
        with_rows<kTileRows<vectors>>(tile_rows, [&]<int n>() RNNKERN_INLINE_LAMBDA {
          add_outer_tile<T, n>(some, left + first, j, buffer, panel, columns, target + j * columns);
        });
      });
    }
  }
}

// target[j] += sum over rows i of left[i][j], for j in [begin, end).
template <class T>
void add_rows(std::int64_t rows, const T* const* left, std::int64_t begin, std::int64_t end, T* target) noexcept {
  using V = Vec<T>;
  for (std::int64_t j = begin; j < end; j += kLanes<T>) {
    const int count = end - j < kLanes<T> ? static_cast<int>(end - j) : kLanes<T>;
    V sum = load_some<V>(target + j, count);
    for (std::int64_t i = 0; i < rows; ++i) sum += load_some<V>(left[i] + j, count);
    store_some<V>(target + j, sum, count);
  }
}

}  // namespace
}  // namespace rnnkern
