// Loops that one limit of the machine alone slows down: multiply-adds, reads, a step that waits for the one before, the
// barrier. `rnnkern bench` times them to know how fast a workload could be at best; see python/rnnkern/limits.py.
#pragma once

#include "amx.h"
#include "cells.h"
#include "kernel_table.h"

namespace rnnkern {
namespace {

// Makes the compiler believe that a value is used, at the price of storing it.
template <class V>
RNNKERN_INLINE void use(V value) noexcept {
  __asm__ volatile("" : : "m"(value));
}

// Returns the probe of a task; every thread begins when all are there.
RNNKERN_INLINE Probe& begin(void* context, const Worker& worker) noexcept {
  Probe& probe = *static_cast<Probe*>(context);
  if (worker.index == 0) probe.threads = worker.count;
  if (worker.count > 1) worker.wait(worker.team);
  return probe;
}

// `chains` multiply-adds a repeat, or sums of products of pairs, independent of each other; each waits for its own of
// the repeat before.
template <int chains, bool pairs = false>
void multiply_add(void* context, Worker& worker) noexcept {
  const Probe& probe = begin(context, worker);
  const F32 half = set<F32>(0.5f), one = set<F32>(1);
  F32 sums[chains];
  for (int chain = 0; chain < chains; ++chain) sums[chain] = set<F32>(static_cast<const float*>(probe.data)[chain]);
  for (std::int64_t repeat = 0; repeat < probe.repeats; ++repeat)
#pragma GCC unroll 24
    for (int chain = 0; chain < chains; ++chain)
      sums[chain] = pairs ? add_pairs(half, one, sums[chain]) : fma(sums[chain], half, one);
#pragma GCC unroll 24
  for (int chain = 0; chain < chains; ++chain) use(sums[chain]);
}

// Products of tiles on a matrix engine, `kTilesWork` multiply-adds a repeat.
inline void multiply_tiles(void* context, Worker& worker) noexcept {
  const KernelMode mode;
  const Probe& probe = begin(context, worker);
  multiply_again(static_cast<const float*>(probe.data), probe.repeats);
}
constexpr std::int64_t kTilesWork = 4 * kEngineRows * 16 * 2 * kEnginePairs;

// More chains than latency times ports need (8 to 10), and as many as registers hold beside the two constants.
constexpr int kChains = kRegisters == 32 ? 24 : 12;

// Reads the data once a repeat: each thread a part of its own, or all threads the same.
template <bool same>
void read(void* context, Worker& worker) noexcept {
  using Bits = BitsOf<F32>;
  const Probe& probe = begin(context, worker);
  const float* data = static_cast<const float*>(probe.data) + (same ? 0 : worker.index * probe.elements);
  constexpr int vectors = 8, step = vectors * kLanes<float>;
  Bits sums[vectors] = {};
  for (std::int64_t repeat = 0; repeat < probe.repeats; ++repeat) {
    for (std::int64_t i = 0; i + step <= probe.elements; i += step)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[v] ^= reinterpret_cast<Bits>(load<F32>(data + i + v * kLanes<float>));
    __asm__ volatile("" : : : "memory");  // the next repeat reads again
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) use(sums[v]);
}

// Nothing but the barrier of the team; no time at all on one thread.
void barrier(void* context, Worker& worker) noexcept {
  const Probe& probe = begin(context, worker);
  for (std::int64_t repeat = 0; repeat < probe.repeats; ++repeat) worker.wait(worker.team);
}

// Steps of a cell, each waiting for the one before: the new h, taken through memory as a product takes it, one
// multiply-add in place of the product, the cell's elementwise part. With one vector of units that is the latency of a
// step, with many the time of their elementwise part.
//   data: [states + gates][elements]: the states, which the steps keep as small as they begin, and the input's share
template <class Cell>
void forward_steps(void* context, Worker& worker) noexcept {
  const FlushDenormals flush;
  const Probe& probe = begin(context, worker);
  float* state = static_cast<float*>(probe.data);
  const float* input = state + Cell::states * probe.elements;
  const F32 weight = set<F32>(0.25f);
  F32 extra[kMaxExtras];
  for (F32& one : extra) one = weight;
  for (std::int64_t repeat = 0; repeat < probe.repeats; ++repeat)
    for (std::int64_t unit = 0; unit < probe.elements; unit += kLanes<float>) {
      F32 x[Cell::gates], r[Cell::gates], prev[kMaxStates], next[kMaxStates] = {}, saved[Cell::saved + 1];
      const F32 h = set<F32>(state[unit]);
      for (int s = 0; s < Cell::states; ++s) prev[s] = load<F32>(state + s * probe.elements + unit);
      for (int gate = 0; gate < Cell::gates; ++gate) x[gate] = load<F32>(input + gate * probe.elements + unit);
      for_each_phase<Cell>([&]<int p>() RNNKERN_INLINE_LAMBDA {
        using Phase = PhaseOf<Cell, p>;
        if constexpr (!Phase::projects) {
          const F32 taken = p == 0 ? h : set<F32>(next[0][0]);
          for (F32& result : r) result = fma(taken, weight, weight);
          forward_part<Cell, p>(x + Phase::first, r, extra, prev, next, saved);
          if constexpr (!Phase::is_last) use(next[0]);
        }
      });
      for (int s = 0; s < Cell::states; ++s) store(state + s * probe.elements + unit, next[s]);
      __asm__ volatile("" : : : "memory");  // the next step loads what this one has stored
    }
}

// The same in backward, from the gradients of the new states to those of the old ones.
//   data: [states + saved][elements]: the gradients, which shrink, and what forward has saved
template <class Cell>
void backward_steps(void* context, Worker& worker) noexcept {
  const FlushDenormals flush;
  const Probe& probe = begin(context, worker);
  float* gradient = static_cast<float*>(probe.data);
  const float* kept = gradient + Cell::states * probe.elements;
  const F32 weight = set<F32>(0.25f);
  F32 extra[kMaxExtras], prev[kMaxStates];
  for (F32& one : extra) one = weight;
  for (F32& one : prev) one = weight;
  for (std::int64_t repeat = 0; repeat < probe.repeats; ++repeat)
    for (std::int64_t unit = 0; unit < probe.elements; unit += kLanes<float>) {
      F32 saved[Cell::saved + 1], dnew[kMaxStates], dx[Cell::gates] = {}, dr[Cell::gates], dprev[kMaxStates] = {},
                                                    dextra[kMaxExtras] = {};
      for (int v = 0; v < Cell::saved; ++v) saved[v] = load<F32>(kept + v * probe.elements + unit);
      for (int s = 0; s < Cell::states; ++s) dnew[s] = load<F32>(gradient + s * probe.elements + unit);
      for_each_phase_backwards<Cell>([&]<int p>() RNNKERN_INLINE_LAMBDA {
        using Phase = PhaseOf<Cell, p>;
        if constexpr (!Phase::projects) {
          if constexpr (!Phase::is_last) dnew[0] = set<F32>(dx[Phase::end][0]) * weight;
          backward_part<Cell, p>(saved, extra, prev, &weight, dnew, dx, dr, dprev, dextra);
        }
      });
      // The shortest chain through the sum over the gates: products first, then pairs.
      F32 carry[Cell::gates];
      for (int gate = 0; gate < Cell::gates; ++gate) {
        const F32 d = Cell::separate_recurrent ? dr[gate] : dx[gate];
        use(d);
        carry[gate] = set<F32>(d[0]) * weight;
      }
      for (int left = Cell::gates; left > 1; left = (left + 1) / 2)
        for (int gate = 0; gate < left / 2; ++gate) carry[gate] += carry[left - 1 - gate];
      dprev[0] += carry[0];
      for (int s = 0; s < Cell::states; ++s) store(gradient + s * probe.elements + unit, dprev[s]);
      __asm__ volatile("" : : : "memory");
    }
}

template <class List>
struct Probes;
template <class... Cell>
struct Probes<CellList<Cell...>> {
  static constexpr ProbeKernel all[] = {
      {"multiply_add", "", multiply_add<kChains>, kChains * kLanes<float>, kChains},
      {"multiply_pairs", "", multiply_add<kChains, true>, 2 * kChains * kLanes<float>, kChains},
      {"multiply_tiles", "", multiply_tiles, kTilesWork, kEngineRows},
      {"multiply_add_latency", "", multiply_add<1>, 1, 1},
      {"read", "", read<false>, 1, 0},
      {"read_same", "", read<true>, 1, 1},
      {"barrier", "", barrier, 1, 1},
      {"forward", Cell::name, forward_steps<Cell>, 1, Cell::states + Cell::gates}...,
      {"backward", Cell::name, backward_steps<Cell>, 1, Cell::states + Cell::saved}...};
  static constexpr int count = sizeof all / sizeof all[0];
};

}  // namespace
}  // namespace rnnkern
