// The register tile and the two products made of it: rows times packed weights, and sums of outer products over rows.
//
// Every output element is one chain of multiply-adds in the order of its inputs (or rows), whatever the tile, the block
// or the number of threads: that is what makes results equal to the last bit however a call is cut up.
#pragma once

#include "pack.h"

namespace rnnkern {
namespace {

// Rows of a tile of `vectors` vectors: what the registers hold beside one weight vector and a broadcast per row.
// 16 registers: 3 rows of 4 (12 + 3 + 1) or 4 of 3 (12 + 4, the weight from memory); 32: 6 of 4 (24 + 6 + 1), 8 of 3.
// 6 rows of 2, with 16, load as much per multiply-add but repeat the loop for each half: 10 % slower. Of one or two
// vectors, as the last panel may have, 8 rows are enough chains (below).
template <int vectors>
constexpr int kTileRows =
    vectors < 3 ? (kRegisters == 32 ? 8 : 8 - 2 * (vectors - 1)) : (kRegisters == 32 ? 24 : 12) / vectors;

// Panels side by side when there is one row: FMA has 4 cycles latency and two ports, so 8 chains keep it busy.
template <int vectors>
constexpr int kSingleRowPanels = kRegisters == 32                ? 1
                                 : vectors * 3 <= kRegisters - 4 ? 3
                                                                 : 2;

// sums[r][v] += left(r) * right(v). The shorter side waits in registers, the longer one passes through a single one:
// with the other order GCC spills an accumulator of 4 rows by 3 vectors, and the tile runs at half speed. Pinned,
// because GCC likes to load an operand again for each multiply-add of two: then loads are what 2 rows by 4 wait for.
template <class Format, int rows, int vectors, class Left, class Right, class V = Vec<typename Format::T>>
RNNKERN_INLINE void add_outer(Left&& left, Right&& right, V (&sums)[rows][vectors]) noexcept {
  if constexpr (rows < vectors) {
    V input[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) input[r] = left(r);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      V weight = right(v);
      if constexpr (rows > 1) pin(weight);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sums[r][v] = Format::multiply(input[r], weight, sums[r][v]);
    }
  } else {
    V weight[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) weight[v] = right(v);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V input = left(r);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = Format::multiply(input, weight[v], sums[r][v]);
    }
  }
}

// Calls body.template operator()<i>(k, w) for the k-th multiplication of a row of `depth` inputs, the i-th of its
// group, whose weights are at w; `width` units and gates.
template <class Format, class Body>
RNNKERN_INLINE void for_inputs(std::int64_t depth, const typename Format::W* w, std::int64_t width,
                               Body&& body) noexcept {
  constexpr int several = Format::group / Format::step;
  const std::int64_t count = divide_up(depth, Format::step);
  std::int64_t k = 0;
  for (; k + several <= count; k += several, w += Format::group * width) {
    body.template operator()<0>(k, w);
    if constexpr (several > 1) body.template operator()<1>(k + 1, w);
  }
  if constexpr (several > 1)
    if (k < count) body.template operator()<0>(k, w);
}

// sums [rows][vectors] = from + a w; a: `rows` pointers to `depth` inputs; w: a panel; from: `vectors` vectors for
// each row, from_stride elements apart (0: the same for all).
template <class Format, int vectors, int rows, class T = typename Format::T>
RNNKERN_INLINE void accumulate(const T* const* a, std::int64_t depth, const typename Format::W* w, const T* from,
                               std::int64_t from_stride, Vec<T>* sums) noexcept {
  using V = Vec<T>;
  using W = typename Format::W;
  V s[rows][vectors];
  const T* row[rows];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) s[r][v] = load<V>(from + v * kLanes<T> + r * from_stride);
  for (int r = 0; r < rows; ++r) row[r] = a[r];
  for_inputs<Format>(depth, w, vectors * kLanes<T>, [&]<int i>(std::int64_t k, const W* weights) RNNKERN_INLINE_LAMBDA {
    add_outer<Format>([&](int r) RNNKERN_INLINE_LAMBDA { return Format::load_input(row[r] + k); },
                      [&](int v) RNNKERN_INLINE_LAMBDA {
                        return Format::template load_weights<i>(weights + v * Format::group * kLanes<T>);
                      },
                      s);
  });
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) *sums++ = s[r][v];
}

// The same for one row and several panels: whole ones, and a last one of `tail` vectors.
template <class Format, int vectors, int panels, int tail, class T = typename Format::T>
RNNKERN_INLINE void accumulate_panels(const T* a, std::int64_t depth, const typename Format::W* w, const T* from,
                                      Vec<T>* sums) noexcept {
  using V = Vec<T>;
  using W = typename Format::W;
  constexpr int count = panels * vectors + tail, lanes = Format::group * kLanes<T>;
  const std::int64_t stride = kStored<Format>.inputs(depth) * vectors * kLanes<T>;
  const W* last = w + panels * stride;
  V s[count];
  for (int v = 0; v < count; ++v) s[v] = load<V>(from + v * kLanes<T>);
  for_inputs<Format>(depth, w, vectors * kLanes<T>, [&]<int i>(std::int64_t k, const W* weights) RNNKERN_INLINE_LAMBDA {
    const V input = Format::load_input(a + k);
#pragma GCC unroll 16
    for (int v = 0; v < count; ++v) {
      const W* weight = v < panels * vectors ? weights + v / vectors * stride + v % vectors * lanes
                                             : last + (v - panels * vectors) * lanes;
      s[v] = Format::multiply(input, Format::template load_weights<i>(weight), s[v]);
    }
    if ((i + 1) * Format::step == Format::group) last += Format::group * tail * kLanes<T>;
  });
  for (int v = 0; v < count; ++v) sums[v] = s[v];
}

// Calls body.template operator()<n>() for a count that is known only now, 1 <= count <= limit <= 8.
template <int limit, class Body>
RNNKERN_INLINE void with_count(std::int64_t count, Body&& body) noexcept {
  switch (count) {
#define RNNKERN_COUNT(n)                                            \
  case n:                                                           \
    if constexpr (n <= limit) return body.template operator()<n>(); \
    break;
    RNNKERN_COUNT(1)
    RNNKERN_COUNT(2)
    RNNKERN_COUNT(3)
    RNNKERN_COUNT(4)
    RNNKERN_COUNT(5)
    RNNKERN_COUNT(6)
    RNNKERN_COUNT(7)
    RNNKERN_COUNT(8)
#undef RNNKERN_COUNT
  }
}

// The tile for any number of rows it can have; one function for all cells, so that its loops are compiled once.
template <class Format, int vectors, class T = typename Format::T>
__attribute__((noinline)) void tile_of_rows(std::int64_t rows, const T* const* a, std::int64_t depth, const void* w,
                                            const T* from, std::int64_t from_stride, Vec<T>* sums) noexcept {
  const auto* const weights = static_cast<const typename Format::W*>(w);
  with_count<kTileRows<vectors>>(rows, [&]<int n>() RNNKERN_INLINE_LAMBDA {
    accumulate<Format, vectors, n>(a, depth, weights, from, from_stride, sums);
  });
}

// Computes the tile of one row and up to kSingleRowPanels panels, with a last one of fewer subs behind them.
template <class Format, class Shape, class T = typename Format::T>
__attribute__((noinline)) void tile_of_panels(std::int64_t panels, std::int64_t tail_subs, const T* a,
                                              std::int64_t depth, const void* w, const T* start,
                                              Vec<T>* sums) noexcept {
  constexpr int vectors = Shape::vectors, gates = vectors / Shape::subs;
  const auto* const weights = static_cast<const typename Format::W*>(w);
  with_count<kSingleRowPanels<vectors> + 1>(panels + 1, [&]<int n>() RNNKERN_INLINE_LAMBDA {
    with_count<Shape::subs>(tail_subs + 1, [&]<int t>() RNNKERN_INLINE_LAMBDA {
      if constexpr (n + t > 2)
        accumulate_panels<Format, vectors, n - 1, (t - 1) * gates>(a, depth, weights, start, sums);
    });
  });
}

// Calls body(first, count) so that it covers [0, total) in parts of at most `limit`, as equal as they can be: a last
// tile of one row would leave the multiply-adds waiting for each other.
template <class Body>
RNNKERN_INLINE void for_parts(std::int64_t total, std::int64_t limit, Body&& body) noexcept {
  std::int64_t first = 0;
  for (std::int64_t parts = total <= limit ? total > 0 : divide_up(total, limit); parts > 0; --parts) {
    const std::int64_t count = divide_up(total - first, parts);
    body(first, count);
    first += count;
  }
}

template <class T>
alignas(64) constexpr T kZeros[kRegisters * kLanes<T>] = {};  // at least as many as a tile has sums

// Inputs of which a panel fills an eighth of a small L2 (64 KiB), and the rows whose sums wait between two such parts.
template <class Format, int vectors>
constexpr std::int64_t kPartDepth = 64 * 1024 / (vectors * kLanes<typename Format::T> * sizeof(typename Format::W));
constexpr std::int64_t kPartRows = 24;

// Does what tile_of_rows does, for up to kPartRows rows and any depth: all rows use a part of the panel while it is in
// L2. The next part is fetched meanwhile, with each tile at most as many lines as a core can wait for at a time.
template <class Format, int vectors, class T = typename Format::T>
__attribute__((noinline)) void tiles_of_parts(std::int64_t rows, const T* const* a, std::int64_t depth, const void* w,
                                              const T* from, std::int64_t from_stride, Vec<T>* sums) noexcept {
  using W = typename Format::W;
  constexpr int width = vectors * kLanes<T>;
  constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(W)), group = Format::group;
  const std::int64_t tiles = divide_up(rows, kTileRows<vectors>);
  const T* inputs[kTileRows<vectors>];
  for_parts(
      divide_up(depth, group), kPartDepth<Format, vectors> / group, [&](std::int64_t first_group, std::int64_t groups) {
        const std::int64_t k = first_group * group, part = smaller(groups * group, depth - k);
        const W *weights = static_cast<const W*>(w) + k * width, *next = weights + part * width;
        const std::int64_t fetched = smaller(divide_up(part * width, tiles * line), 16);
        for_parts(rows, kTileRows<vectors>, [&](std::int64_t first, std::int64_t count) {
          for (std::int64_t i = 0; i < fetched; ++i, next += line) __builtin_prefetch(next, 0, 2);
          for (std::int64_t r = 0; r < count; ++r) inputs[r] = a[first + r] + k / Format::step;
          Vec<T>* tile = sums + first * vectors;
          if (k == 0)
            tile_of_rows<Format, vectors>(count, inputs, part, weights, from + first * from_stride, from_stride, tile);
          else
            tile_of_rows<Format, vectors>(count, inputs, part, weights, reinterpret_cast<const T*>(tile), width, tile);
        });
      });
}

// The tile functions for panels of some number of vectors.
template <class T>
struct Tiles {
  using Tile = void (*)(std::int64_t, const T* const*, std::int64_t, const void*, const T*, std::int64_t,
                        Vec<T>*) noexcept;

  int vectors, max_rows;
  std::int64_t part_depth;
  Tile of_rows, of_parts;
};
template <class Format, int vectors>
constexpr Tiles<typename Format::T> kTilesOf{vectors, kTileRows<vectors>, kPartDepth<Format, vectors>,
                                             tile_of_rows<Format, vectors>, tiles_of_parts<Format, vectors>};
template <class Format>
constexpr Tiles<typename Format::T> kTiles[] = {kTilesOf<Format, 1>, kTilesOf<Format, 2>, kTilesOf<Format, 3>,
                                                kTilesOf<Format, 4>};

// A part of sums over rows begins at a multiple of so many: of those that an engine sums first (amx.h).
constexpr std::int64_t kSumRows = 32;

// What the kernels know of a format: how products are made. One constant for each, so that cells are compiled once.
template <class T>
struct Arithmetic {
  using PanelsTile = void (*)(std::int64_t, std::int64_t, const T*, std::int64_t, const void*, const T*,
                              Vec<T>*) noexcept;

  Packing<T> packing;
  int step, slices;  // inputs that one multiplication takes, and numbers that each becomes
  // Makes of `count` inputs what is multiplied: of as many elements, or fewer where pairs share one; writes whole
  // vectors, and each slice Operands::stride / slices behind the one before. Null: they are it.
  void (*operand)(const T* from, std::int64_t count, T* to) noexcept;
  const Tiles<T>* tiles;    // of 1 to 4 vectors
  PanelsTile of_panels[4];  // for shapes of 1 to 4 gates
  void (*add_outer)(const Tiles<T>* tiles, std::int64_t rows, const T* const* left, const T* const* right,
                    std::int64_t begin, std::int64_t end, std::int64_t columns, T* target, T* buffer) noexcept;
  const Tiles<T>* outer_tiles;
  bool sums_steps;                // kSumRows rows of a step are summed first, the last ones with rows of zeros
  const Arithmetic* of_few_rows;  // to be taken for batches of less than half of that, or null
  const Arithmetic* of_bounded;   // to be taken for what product_of calls bounded, or null

  const Arithmetic& of(bool bounded) const noexcept { return bounded && of_bounded ? *of_bounded : *this; }

  // target[j][k] += sum over rows i of left[i][j] * right[i][k], for j in [begin, end) and k in [0, columns).
  // target: row-major, `columns` columns. buffer: kOuterBuffer elements, 64-byte aligned.
  void add_outer_products(std::int64_t rows, const T* const* left, const T* const* right, std::int64_t begin,
                          std::int64_t end, std::int64_t columns, T* target, T* buffer) const noexcept {
    add_outer(outer_tiles, rows, left, right, begin, end, columns, target, buffer);
  }
};

// Rows as they are multiplied, where that is not what they are: room of one worker for some rows at a time.
template <class T>
struct Operands {
  static constexpr std::int64_t size = 512 * 1024 / std::int64_t{sizeof(T)};  // elements, unless a few rows need more

  std::int64_t elements;
  T* data;
  const T** rows;

  // For products of up to so many rows and inputs.
  template <class Arena>
  void take(Arena& arena, const Arithmetic<T>& how, std::int64_t most_rows, std::int64_t most_inputs) noexcept {
    const std::int64_t row = stride(how, most_inputs), least = smaller(most_rows, kPartRows) * row;
    elements = !how.operand ? 0 : least > size ? least : smaller(most_rows * row, size);
    data = arena.template take<T>(elements);
    rows = arena.template take<const T*>(how.operand ? most_rows : 0);
  }

  static std::int64_t stride(const Arithmetic<T>& how, std::int64_t inputs) noexcept {
    return how.slices * scratch_stride<T>(divide_up(inputs, how.step));
  }
  std::int64_t rows_at_a_time(const Arithmetic<T>& how, std::int64_t inputs) const noexcept {
    return elements / stride(how, inputs);
  }
  __attribute__((noinline)) const T* const* make(const Arithmetic<T>& how, std::int64_t count, const T* const* from,
                                                 std::int64_t inputs) const noexcept {
    T* to = data;
    for (std::int64_t i = 0; i < count; ++i, to += stride(how, inputs)) {
      how.operand(from[i], inputs, to);
      rows[i] = to;
    }
    return rows;
  }
};

// Which panels a product visits. Every other step backwards, so that it begins with what the step before has left in
// the nearer caches: in the same order, weights that exceed a cache would evict themselves just before they are read
// again.
struct Panels {
  std::int64_t begin, end;
  bool backwards = false;
};

// For rows i in [0, rows) and the given panels of `units` units: sums of start and the product of inputs[i] (depth
// elements) with the packed weights; done(i, p, sums) takes the sums of a row and a panel, [sub][gate]: at once,
// so that the divisions of a cell's step run beside the multiply-adds of the next tile.
// start: packed like one input of the weights, or null for zeros.
template <class Shape, class T, class Done>
RNNKERN_INLINE void product(const Arithmetic<T>& how, const Operands<T>& operands, std::int64_t rows,
                            const T* const* inputs, std::int64_t depth, const char* packed, const T* start,
                            std::int64_t units, Panels panels, Done&& done) noexcept {
  constexpr int width = Shape::vectors * kLanes<T>, gates = Shape::vectors / Shape::subs;
  const std::int64_t panel_bytes = how.packing.stored.inputs(depth) * width * how.packing.stored.bytes;
  Vec<T> sums[kPartRows * Shape::vectors];
  const std::int64_t begin = panels.begin, end = panels.end;
  if (begin == end) return;
  if (rows == 1) {
    const T* const row = how.operand ? *operands.make(how, 1, inputs, depth) : *inputs;
    const int last_subs = Shape::template subs_of<T>(end - 1, units);
    const std::int64_t tail_subs = last_subs < Shape::subs ? last_subs : 0, whole = end - begin - (tail_subs ? 1 : 0);
    const int parts = whole ? static_cast<int>(divide_up(whole, kSingleRowPanels<Shape::vectors>)) : 1;
    for (int i = 0; i < parts; ++i) {
      const int part = panels.backwards ? parts - 1 - i : i;
      // Without a division, which a short step would feel.
      const Range own =
          kSingleRowPanels<Shape::vectors> == 1 ? Range{part, smaller(part + 1, whole)} : share(whole, part, parts);
      const std::int64_t panel = begin + own.begin, count = own.end - own.begin;
      const std::int64_t tail = part == parts - 1 ? tail_subs : 0;
      how.of_panels[gates - 1](count, tail, row, depth, packed + panel * panel_bytes,
                               start ? start + panel * width : kZeros<T>, sums);
      const std::int64_t visited = count + (tail > 0);
      for (std::int64_t p = 0; p < visited; ++p) done(0, panel + p, sums + p * Shape::vectors);
    }
    return;
  }
  const std::int64_t most = how.operand ? operands.rows_at_a_time(how, depth) : rows;
  for (std::int64_t row0 = 0; row0 < rows; row0 += most, inputs += most) {
    const std::int64_t row_count = smaller(most, rows - row0);
    const T* const* const row = how.operand ? operands.make(how, row_count, inputs, depth) : inputs;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t panel = panels.backwards ? begin + end - 1 - i : i;
      const Tiles<T>& tiles = how.tiles[gates * Shape::template subs_of<T>(panel, units) - 1];
      const bool deep = row_count > tiles.max_rows && depth > tiles.part_depth;
      const auto tile = deep ? tiles.of_parts : tiles.of_rows;
      for_parts(row_count, deep ? kPartRows : tiles.max_rows,
                [&](std::int64_t first, std::int64_t count) RNNKERN_INLINE_LAMBDA {
                  tile(count, row + first, depth, packed + panel * panel_bytes,
                       start ? start + panel * width : kZeros<T>, 0, sums);
#pragma GCC unroll 1
                  for (std::int64_t r = 0; r < count; ++r) done(row0 + first + r, panel, sums + r * tiles.vectors);
                });
    }
  }
}

// Calls done(sub, unit, count): that part of a panel begins at `unit` and has `count` valid lanes.
template <class T, class Shape = Plain, class Done>
RNNKERN_INLINE void for_units(std::int64_t panel, std::int64_t units, Done&& done) noexcept {
  for (int sub = 0; sub < Shape::subs; ++sub) {
    const std::int64_t unit = (panel * Shape::subs + sub) * kLanes<T>;
    if (unit >= units) return;
    done(sub, unit, static_cast<int>(smaller(units - unit, kLanes<T>)));
  }
}

// outputs[i][0..units) = inputs[i] W, added to what is there if `add`.
template <class T>
void plain_product(const Arithmetic<T>& how, const Operands<T>& operands, std::int64_t rows, const T* const* inputs,
                   std::int64_t depth, const char* packed, const T* start, std::int64_t units, T* const* outputs,
                   bool add) noexcept {
  using V = Vec<T>;
  product<Plain>(how, operands, rows, inputs, depth, packed, start, units, Panels{0, Plain::panels<T>(units)},
                 [&](std::int64_t i, std::int64_t panel, const V* sum) RNNKERN_INLINE_LAMBDA {
                   for_units<T>(panel, units, [&](int v, std::int64_t unit, int count) {
                     T* to = outputs[i] + unit;
                     store_some<V>(to, add ? load_some<V>(to, count) + sum[v] : sum[v], count);
                   });
                 });
}

// A sum of outer products is a product too: of the left side transposed and the right side packed. It goes through its
// rows in parts of which a panel takes 32 KiB, so that targets are read and written seldom; through the outputs on the
// left in blocks that stay in L2 once transposed (100 KiB), and through those on the right in blocks of 256 KiB.
template <class T>
constexpr std::int64_t kOuterRows = 32 * 1024 / (Plain::vectors * kVectorBytes);
constexpr std::int64_t kOuterLeft = 96, kOuterPanels = 8;
template <class T>  // a cache line more, so that the rows of a tile do not share cache sets
constexpr std::int64_t kOuterStride = kOuterRows<T> + 64 / std::int64_t{sizeof(T)};
template <class T>
constexpr std::int64_t kOuterBuffer =
    kOuterRows<T> * kOuterPanels * Plain::vectors * kLanes<T> + kOuterLeft * kOuterStride<T>;

// to[j * stride + i] = from[i][j] for i in [0, count) and j in [0, columns); writes whole vectors of i.
template <class T>
__attribute__((noinline)) void transpose_rows(std::int64_t count, const T* const* from, std::int64_t begin,
                                              std::int64_t columns, T* to, std::int64_t stride) noexcept {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  for (std::int64_t i = 0; i < count; i += lanes)
    for (std::int64_t j = 0; j < columns; j += lanes) {
      const int some = columns - j < lanes ? static_cast<int>(columns - j) : lanes;
      V block[lanes];
      for (int l = 0; l < lanes; ++l)
        block[l] = i + l < count ? load_some<V>(from[i + l] + begin + j, some) : zero<V>();
      transpose(block);
      for (int l = 0; l < some; ++l) store(to + (j + l) * stride + i, block[l]);
    }
}

// Packs the columns of one panel with rows as inputs, zero past the last column.
template <class Format, class T = typename Format::T>
RNNKERN_INLINE void pack_panel(std::int64_t count, const T* const* from, std::int64_t panel, std::int64_t columns,
                               typename Format::W* to) noexcept {
  using V = Vec<T>;
  constexpr int group = Format::group;
  for (std::int64_t i = 0; i < count; i += group)
    for_units<T>(panel, columns, [&](int, std::int64_t k, int some) {
      const V first = load_some<V>(from[i] + k, some);
      V last = first;
      if constexpr (group > 1) last = i + 1 < count ? load_some<V>(from[i + 1] + k, some) : set<V>(Format::padding);
      Format::store_group(to, first, last);
      to += group * kLanes<T>;
    });
}

// target[r][k] += sum over i < depth of left[r][i] * right[i][k] for the k of one panel.
template <class T>
RNNKERN_INLINE void add_outer_tile(const Tiles<T>& tiles, std::int64_t tile_rows, const T* left, std::int64_t depth,
                                   const void* right, std::int64_t panel, std::int64_t columns, T* target) noexcept {
  using V = Vec<T>;
  constexpr int most_rows = 16;
  const T* inputs[most_rows];
  V sums[most_rows * Plain::vectors];
  for (std::int64_t r = 0; r < tile_rows; ++r) inputs[r] = left + r * kOuterStride<T>;
  const std::int64_t first = panel * Plain::vectors * kLanes<T>, vectors = tiles.vectors;
  if (first + vectors * kLanes<T> <= columns) {
    target += first;
    tiles.of_rows(tile_rows, inputs, depth, right, target, columns, sums);
    for (std::int64_t r = 0; r < tile_rows; ++r)
      for (std::int64_t v = 0; v < vectors; ++v) store(target + r * columns + v * kLanes<T>, sums[r * vectors + v]);
    return;
  }
  V before[most_rows * Plain::vectors];
  const auto for_targets = [&](V* all, auto&& body) RNNKERN_INLINE_LAMBDA {
    for (std::int64_t r = 0; r < tile_rows; ++r)
      for_units<T>(panel, columns, [&](int v, std::int64_t k, int some) RNNKERN_INLINE_LAMBDA {
        body(target + r * columns + k, all[r * vectors + v], some);
      });
  };
  for_targets(before, [](const T* from, V& sum, int some) RNNKERN_INLINE_LAMBDA { sum = load_some<V>(from, some); });
  tiles.of_rows(tile_rows, inputs, depth, right, reinterpret_cast<const T*>(before), vectors * kLanes<T>, sums);
  for_targets(sums, [](T* to, const V& sum, int some) RNNKERN_INLINE_LAMBDA { store_some<V>(to, sum, some); });
}

// Arithmetic::add_outer_products of rows that are packed as a format has weights.
template <class Format, class T = typename Format::T>
void add_outer_products(const Tiles<T>* tiles_of, std::int64_t rows, const T* const* left, const T* const* right,
                        std::int64_t begin, std::int64_t end, std::int64_t columns, T* target, T* buffer) noexcept {
  using W = typename Format::W;
  constexpr int width = Plain::vectors * kLanes<T>;
  W* const packed_right = reinterpret_cast<W*>(buffer);
  T* const packed_left = buffer + kOuterRows<T> * kOuterPanels * width;
  constexpr std::int64_t most = (Format::slices > 1 ? kOuterRows<T> / 2 : kOuterRows<T>) / kSumRows;
  for_parts(divide_up(rows, kSumRows), most, [&](std::int64_t first, std::int64_t count) {
    const std::int64_t i = first * kSumRows, depth = smaller(count * kSumRows, rows - i);
    const std::int64_t panel_size = kStored<Format>.inputs(depth) * width;
    for_parts(Plain::panels<T>(columns), kOuterPanels, [&](std::int64_t panel0, std::int64_t panels) {
      for (std::int64_t p = 0; p < panels; ++p)
        pack_panel<Format>(depth, right + i, panel0 + p, columns, packed_right + p * panel_size);
      for_parts(end - begin, kOuterLeft, [&](std::int64_t j0, std::int64_t outputs) {
        transpose_rows(depth, left + i, begin + j0, outputs, packed_left, kOuterStride<T>);
        if constexpr (Format::operand != nullptr)
          for (std::int64_t j = 0; j < outputs; ++j) {
            T* const row = packed_left + j * kOuterStride<T>;
            T copy[Format::slices > 1 ? most * kSumRows : 1];  // slices are longer than a row, and cover it
            if constexpr (Format::slices > 1) std::memcpy(copy, row, static_cast<std::size_t>(depth) * sizeof(T));
            Format::operand(Format::slices > 1 ? copy : row, depth, row);
          }
        for (std::int64_t p = 0; p < panels; ++p) {
          const Tiles<T>& tiles = tiles_of[Plain::subs_of<T>(panel0 + p, columns) - 1];
          for_parts(outputs, tiles.max_rows, [&](std::int64_t j, std::int64_t tile_rows) RNNKERN_INLINE_LAMBDA {
            add_outer_tile(tiles, tile_rows, packed_left + j * kOuterStride<T>, depth, packed_right + p * panel_size,
                           panel0 + p, columns, target + (begin + j0 + j) * columns);
          });
        }
      });
    });
  });
}

template <class Format, class Shape>
constexpr typename Arithmetic<typename Format::T>::PanelsTile kPanelsTile = tile_of_panels<Format, Shape>;

// That of a format, null of none.
template <class T, class Format>
constexpr const Arithmetic<T>* arithmetic_if_there() noexcept;

template <class Format, class Tiled = typename Format::Tiled, class T = typename Format::T>
constexpr Arithmetic<T> kArithmetic{
    kPacking<typename Format::PackedAs, typename Format::Bounded>,
    Tiled::step,
    Tiled::slices,
    Format::operand,
    kTiles<Tiled>,
    {kPanelsTile<Tiled, PanelShape<1>>, kPanelsTile<Tiled, PanelShape<2>>, kPanelsTile<Tiled, PanelShape<3>>,
     kPanelsTile<Tiled, PanelShape<4>>},
    add_outer_products<typename Format::Outer>,
    kTiles<typename std::conditional_t<Format::sums_steps, Format, typename Format::Outer>::Tiled>,
    Format::sums_steps,
    arithmetic_if_there<T, typename Format::FewRows>(),
    arithmetic_if_there<T, typename Format::Bounded>()};

template <class T, class Format>
constexpr const Arithmetic<T>* arithmetic_if_there() noexcept {
  if constexpr (std::is_void_v<Format>)
    return nullptr;
  else
    return &kArithmetic<Format>;
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
