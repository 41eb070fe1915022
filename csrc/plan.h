// How a call is divided: among how many threads, by rows or by units, and in blocks of how many steps.
// A pure function of sizes; results do not depend on it, only the time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernel_table.h"

namespace rnnkern {

struct Plan {
  Split split;
  int threads;
  std::int64_t block_steps;
  std::int64_t expected_ns;
};

struct PlanInput {
  std::int64_t steps, batch, inputs, hidden, outputs, layers;  // layers: layer-directions
  std::int64_t row_grain;                                      // rows that one thread works on together
  int gates, saved, max_threads;
  std::int64_t element_bytes;
  bool backward;
};

inline Plan make_plan(const PlanInput& in) {
  // Rates of one core, within a factor of two: they only weigh work against the cost of waking and waiting.
  constexpr double flops_per_ns = 30, wake_ns = 15'000;
  const double rows = static_cast<double>(in.steps) * static_cast<double>(in.batch);
  const double weights = static_cast<double>(in.gates) * static_cast<double>(in.hidden) *
                         static_cast<double>(in.inputs + in.outputs) * static_cast<double>(in.layers);
  const double total_ns = rows * (weights * (in.backward ? 4 : 2) / flops_per_ns + static_cast<double>(in.layers) * 20);
  const double step_ns = total_ns / static_cast<double>(std::max<std::int64_t>(in.steps * in.layers, 1));

  Plan plan{Split::rows, in.max_threads, 1, 0};
  if (in.row_grain > 1) {
    // Backward divides its sums over rows whatever the steps divide.
    if (!in.backward)
      plan.threads = static_cast<int>(std::clamp<std::int64_t>(in.batch / in.row_grain, 1, plan.threads));
  } else if (in.batch < plan.threads) {
    // Sharing units costs a barrier a step and the other half of h from another core. Measured on two cores of a Zen 4
    // server, B = 1, AVX2 and AVX-512, against one thread, by the step of this estimate: RNN 64 loses a tenth (0.6 us
    // forward, 1.1 backward), GRU 32 a fifth (0.4); GRU 64 gains 1.15x to 1.7x (1.7, 3.3), LSTM 64 1.2x to 1.6x (2.2,
    // 4.4), GRU 128 1.7x (6.5, 13), LSTM 256 2.0x.
    plan.split = Split::units;
    if (step_ns < (in.backward ? 3'000 : 1'500)) plan.threads = 1;
  }
  if (total_ns < 2 * wake_ns) plan.threads = 1;
  plan.expected_ns = static_cast<std::int64_t>(std::min(total_ns / plan.threads, 1e15));

  // A thread's part of a block stays in half of a small L2 (512 KiB).
  constexpr std::int64_t block_bytes = 256 * 1024;
  const std::int64_t values = in.backward ? in.gates : std::max(in.gates, in.saved);
  const std::int64_t row_bytes = values * in.hidden * in.element_bytes;
  std::int64_t block_rows = block_bytes * plan.threads / std::max<std::int64_t>(row_bytes, 1);
  // A block of backward reads and writes the whole gradient of the weights: at least enough rows to pay for that.
  block_rows = std::clamp<std::int64_t>(block_rows, in.backward ? 256 : 1, 4096);
  // A helper that was asleep comes some 30 to 100 us late. It can join forward at each block, so that the first one
  // must not be half of the call; backward spends more time in steps.
  if (!in.backward && plan.threads > 1)
    block_rows = std::min(block_rows, std::max<std::int64_t>(in.steps * in.batch / 8, 48));
  plan.block_steps = std::clamp<std::int64_t>(block_rows / std::max<std::int64_t>(in.batch, 1), 1,
                                              std::max<std::int64_t>(in.steps, 1));
  return plan;
}

}  // namespace rnnkern
