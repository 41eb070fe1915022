// Holds the tiles of the matrix engine to their emulation, bit for bit; for machines with one:
//   g++ -std=c++20 -O3 -mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -ffp-contract=off -Wno-psabi -Icsrc
//       tests/amx.cpp -o amx && ./amx
// Prints how many sums were compared and the rates of both; leaves with 1 where a bit differs, with 2 without an
// engine. What needs one for float16 too is left out without it, and a line says so.
#include "amx.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

using namespace rnnkern;

namespace {

std::mt19937_64 generator(0);

// Numbers of some kind: ordinary ones, small ones whose products are below the smallest normal number, denormals,
// large ones whose sums overflow, zeros of both signs, and infinities and NaN among ordinary ones.
float draw(int kind) {
  std::normal_distribution<float> normal;
  const float x = normal(generator);
  const auto rare = generator() % 64;
  switch (kind) {
    case 0:
      return x;
    case 1:
      return x * 1e-19f;
    case 2:
      return rare < 32 ? x * 1e-39f : x;
    case 3:
      return x * 1.5e19f;
    case 4:
      return rare < 16 ? 0.0f : rare < 32 ? -0.0f : x;
    case 5:
      return x * std::ldexp(1.0f, static_cast<int>(generator() % 60) - 30);
    default:
      return rare == 0 ? INFINITY : rare == 1 ? NAN : x;
  }
}

using Tile = Tiles<float>::Tile;

std::int64_t compared = 0, different = 0;

void compare_sums(const char* what, std::int64_t rows, std::int64_t depth, int vectors, const F32* found,
                  const F32* emulated) {
  for (std::int64_t r = 0; r < rows * vectors; ++r)
    for (int lane = 0; lane < 16; ++lane) {
      const float x = found[r][lane], y = emulated[r][lane];
      std::uint32_t bits[2];
      std::memcpy(bits, &x, 4), std::memcpy(bits + 1, &y, 4);
      ++compared;
      if (bits[0] == bits[1] || (x != x && y != y)) continue;
      if (different++ < 10)
        std::printf("%s, %d rows, %d inputs, %d vectors: %a, emulated %a\n", what, static_cast<int>(rows),
                    static_cast<int>(depth), vectors, static_cast<double>(x), static_cast<double>(y));
    }
}

// Tiles of any finite float16 numbers, as they stand: denormals, too, and sums that cancel.
template <int vectors>
void compare_float16(std::int64_t rows, std::int64_t depth) {
  constexpr int slices = Scaled::slices;
  const std::int64_t pairs = divide_up(depth, 2), stride = slices * slice_stride(depth), width = vectors * 16;
  const auto draw_pairs = [](std::vector<float>& to) {
    for (float& one : to) {
      std::uint32_t pair = static_cast<std::uint32_t>(generator()) & (generator() % 2 ? ~0u : 0x83ff83ffu);
      if ((pair & 0x7c00u) == 0x7c00u) pair &= ~0x0400u;
      if ((pair >> 16 & 0x7c00u) == 0x7c00u) pair &= ~0x04000000u;
      std::memcpy(&one, &pair, 4);
    }
  };
  std::vector<float> left(static_cast<std::size_t>(rows * stride)),
      right(static_cast<std::size_t>((Scaled::head + pairs * slices) * width));
  draw_pairs(left), draw_pairs(right);
  std::vector<const float*> a;
  for (std::int64_t r = 0; r < rows; ++r) a.push_back(left.data() + r * stride);
  F32 sums[2][16 * vectors];
  tile_of_engine<ScaledTiles<false>, vectors>()(rows, a.data(), depth, right.data(), kZeros<float>, 0, sums[0]);
  tile_of_engine<ScaledTiles<true>, vectors>()(rows, a.data(), depth, right.data(), kZeros<float>, 0, sums[1]);
  compare_sums("float16", rows, depth, vectors, sums[0], sums[1]);
}

template <template <bool> class Format, int vectors>
void compare(int kind, std::int64_t rows, std::int64_t depth, bool same_start) {
  using Kind = Format<true>;
  constexpr int group_floats = sizeof(typename Kind::W) * 2 / 4;
  const std::int64_t pairs = divide_up(depth, 2), width = vectors * 16;
  const std::int64_t stride = Kind::slices * scratch_stride<float>(pairs);
  std::vector<float> given(static_cast<std::size_t>(depth) + 64), left(static_cast<std::size_t>(rows * stride));
  std::vector<float> from(static_cast<std::size_t>(rows * (width + 16)));
  std::vector<float> weights(static_cast<std::size_t>((Kind::head + pairs * group_floats) * width));
  std::vector<const float*> a;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (float& one : given) one = draw(kind);
    Kind::operand(given.data(), depth, left.data() + r * stride);
    a.push_back(left.data() + r * stride);
  }
  for (float& one : from) one = draw(kind);
  for (std::int64_t k = 0; k < pairs; ++k)
    for (int v = 0; v < vectors; ++v) {
      F32 first, last;
      for (int lane = 0; lane < 16; ++lane) first[lane] = draw(kind), last[lane] = draw(kind);
      if (2 * k + 1 == depth) last = set<F32>(Kind::padding);
      float* const to = weights.data() + Kind::head * width + (k * width + v * 16) * group_floats;
      Kind::store_group(reinterpret_cast<typename Kind::W*>(to), first, last);
    }
  if constexpr (Kind::head > 0)
    for (int v = 0; v < vectors; ++v)
      Kind::finish(weights.data() + Kind::head * width + v * 16 * group_floats, depth, width);
  F32 sums[2][16 * vectors];
  const Tile tiles[2] = {kEngineTile<Format<false>, vectors>, kEngineTile<Format<true>, vectors>};
  for (int i = 0; i < 2; ++i)
    tiles[i](rows, a.data(), depth, weights.data(), from.data(), same_start ? 0 : width + 16, sums[i]);
  compare_sums(("kind " + std::to_string(kind)).c_str(), rows, depth, vectors, sums[0], sums[1]);
}

template <int vectors>
void rate(const char* name, Tile tile, std::int64_t rows, std::int64_t depth, bool released) {
  std::vector<float> data(static_cast<std::size_t>((2 * depth + 64) * (rows + vectors * 16)) + 64, 0.5f);
  const auto start_of = (64 - reinterpret_cast<std::uintptr_t>(data.data()) % 64) / 4 % 16;
  float* const base = data.data() + start_of;
  std::vector<const float*> a;
  const std::int64_t apart = 3 * scratch_stride<float>(depth / 2);
  for (std::int64_t r = 0; r < rows; ++r) a.push_back(base + r * apart);
  F32 sums[16 * vectors];
  double best = 1e9;
  for (int i = 0; i < 20; ++i) {
    constexpr int repeats = 200;
    const auto start = std::chrono::steady_clock::now();
    for (int j = 0; j < repeats; ++j) {
      tile(rows, a.data(), depth, base + rows * apart, kZeros<float>, 0, sums);
      if (released) release_tiles();
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / repeats);
  }
  std::printf("%-10s %2d rows, %4d inputs, %d vectors%s: %8.0f GFLOP/s, %7.0f ns\n", name, static_cast<int>(rows),
              static_cast<int>(depth), vectors, released ? ", shaped each time" : "",
              2e-9 * static_cast<double>(rows * depth * vectors * 16) / best, best * 1e9);
}

}  // namespace

int main() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return std::puts("this machine has no matrix engine"), 2;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool float16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 21 & 1) != 0;
  if (!float16) std::puts("this machine's engine multiplies no float16 numbers: those tiles are left out");
  {
    const KernelMode mode;
    for (int repeat = 0; repeat < 20; ++repeat)
      for (int kind = 0; kind < 7; ++kind)
        for (const std::int64_t depth : {1, 2, 7, 16, 31, 32, 33, 64, 70, 97, 128, 300}) {
          const auto rows = static_cast<std::int64_t>(repeat < 16 ? repeat + 1 : generator() % 16 + 1);
          const bool same = generator() % 2;
          compare<BFloat16Tiles, 1>(kind, rows, depth, same), compare<BFloat16Tiles, 2>(kind, rows, depth, same);
          compare<BFloat16Tiles, 3>(kind, rows, depth, same), compare<BFloat16Tiles, 4>(kind, rows, depth, same);
          compare<SlicedTiles, 1>(kind, rows, depth, same), compare<SlicedTiles, 2>(kind, rows, depth, same);
          compare<SlicedTiles, 3>(kind, rows, depth, same), compare<SlicedTiles, 4>(kind, rows, depth, same);
          if (!float16) continue;
          compare<ScaledTiles, 1>(kind, rows, depth, same), compare<ScaledTiles, 2>(kind, rows, depth, same);
          compare<ScaledTiles, 3>(kind, rows, depth, same), compare<ScaledTiles, 4>(kind, rows, depth, same);
          compare_float16<1>(rows, depth), compare_float16<4>(rows, depth);
        }
    std::printf("%lld sums compared, %lld differ\n", static_cast<long long>(compared),
                static_cast<long long>(different));
    for (const std::int64_t rows : {1, 2, 4, 8, 16})
      for (const std::int64_t depth : {64, 256, 512, 2048}) {
        rate<4>("bfloat16", kEngineTile<BFloat16Tiles<false>, 4>, rows, depth, false);
        rate<4>("slices", kEngineTile<SlicedTiles<false>, 4>, rows, depth, false);
        if (float16) rate<4>("float16", kEngineTile<ScaledTiles<false>, 4>, rows, depth, false);
        if (depth != 256) continue;
        rate<4>("bfloat16", kEngineTile<BFloat16Tiles<false>, 4>, rows, depth, true);
        rate<3>("bfloat16", kEngineTile<BFloat16Tiles<false>, 3>, rows, depth, false);
        rate<4>("emulated", kEngineTile<BFloat16Tiles<true>, 4>, rows, depth, false);
        const std::int64_t most = rows < 6 ? rows : 6;
        rate<4>("rounded", tile_of_rows<Rounded, 4>, most, depth, false);
        rate<4>("stored", tile_of_rows<BFloat16Weights, 4>, most, depth, false);
        rate<4>("vdpbf16ps", tile_of_rows<BFloat16Pairs, 4>, most, depth, false);
      }
  }
  return different != 0;
}
