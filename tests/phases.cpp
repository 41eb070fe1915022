// Two cells that the package does not have, made of phases that its own do not use: means over the units of a row
// inside the step, and a step without a recurrent product. tests/test_phases.py compiles this file and calls `run`.

#include <barrier>
#include <thread>
#include <vector>

#include "bptt.h"
#include "sequences.h"

namespace rnnkern {
namespace {

// h' = tanh(gain n + shift), n the sum a = W x + b + U h + b' less its mean over the units, over its deviation.
struct NormRnn : CellDefaults {
  static constexpr int gates = 1, states = 1, saved = 4, extras = 2;  // saved: a n s h, s the inverse deviation

  struct Sum {
    static void forward(auto x, auto r, auto, auto, auto next, auto saved) noexcept {
      next[0] = saved[0] = x[0] + r[0];
      next[1] = saved[0] * saved[0];
    }
    static void backward(auto saved, auto, auto, auto, auto dmeans, auto dx, auto, auto, auto) noexcept {
      dx[0] = dx[0] + dmeans[0] + 2 * saved[0] * dmeans[1];
    }
  };
  struct Normalized {
    static void forward(auto, auto mean, auto extra, auto, auto next, auto saved) noexcept {
      auto s = mean[1] - mean[0] * mean[0] + 1e-5;
      for (std::size_t lane = 0; lane < sizeof s / sizeof s[0]; ++lane) s[lane] = 1 / __builtin_sqrt(s[lane]);
      saved[1] = (saved[0] - mean[0]) * s;
      saved[2] = s;
      next[0] = saved[3] = tanh(extra[0] * saved[1] + extra[1]);
    }
    static void backward(auto saved, auto extra, auto, auto, auto dnew, auto dx, auto dmean, auto,
                         auto dextra) noexcept {
      const auto n = saved[1], s = saved[2], mean = saved[0] - n / s;
      const auto dz = dnew[0] * (1 - saved[3] * saved[3]), dn = dz * extra[0];
      dx[0] = dn * s;
      dmean[0] = dn * (n * s * s * mean - s);
      dmean[1] = dn * n * s * s * -0.5;
      dextra[0] = dz * n;
      dextra[1] = dz;
    }
  };
  using Step = Phases<Product<From::h, 1, Sum>, Means<2, Normalized>>;
};

// Feng et al. 2024, minGRU with its tanh: gates z n of the input alone.
struct MinGru : CellDefaults {
  static constexpr int gates = 2, states = 1, saved = 2;  // saved: z n
  using Step = Phases<Each<2, MinGru>>;

  static void forward(auto x, auto, auto, auto prev, auto next, auto saved) noexcept {
    const auto z = saved[0] = sigmoid(x[0]), n = saved[1] = tanh(x[1]);
    next[0] = (1 - z) * prev[0] + z * n;
  }
  static void backward(auto saved, auto, auto prev, auto, auto dnew, auto dx, auto, auto dprev, auto) noexcept {
    const auto z = saved[0], n = saved[1];
    dx[0] = dnew[0] * (n - prev[0]) * (z * (1 - z));
    dx[1] = dnew[0] * z * (1 - n * n);
    dprev[0] = dnew[0] * (1 - z);
  }
};

using Format = AsStates<double>;
static_assert(check_laws<NormRnn>() && check_laws<MinGru>());

template <class Cell>
void pass(const KernelCall& call, Worker& worker, bool backward) {
  Arena arena(call.scratch);
  constexpr const auto& how = kArithmetic<Format>;
  Context<Cell, double> loop{call, worker, how};
  if (backward)
    BackwardLayer<Cell, double>(loop, *call.layers, BackwardScratch<Cell, double>(arena, call, how, worker.index))
        .run();
  else
    ForwardLayer<Cell, double>(loop, *call.layers, ForwardScratch<Cell, double>(arena, call, how, worker.index)).run();
}

struct Team {
  std::barrier<> all;
};

// Forward and backward of one layer by `threads` threads that share its units.
template <class Cell>
void run_cell(KernelCall call, Layer layer, LayerWeights<const void*> weights, int threads) {
  std::vector<double> packed(
      static_cast<std::size_t>(PackedLayout<Cell, double>(layer.sizes, true, kPacking<Format>).total) / 8 + 8);
  const auto aligned = [](std::vector<double>& room) {
    return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(room.data()) + 63) / 64 * 64);
  };
  Worker alone{0, 1, nullptr, nullptr, -1, nullptr};
  const PackCall pack{Products::float64, layer.sizes, weights, true, aligned(packed)};
  pack_layer<Cell, double>(pack, alone, kPacking<Format>);
  std::vector<double> saved(
      static_cast<std::size_t>(call.steps * call.batch * Cell::saved * padded<double>(layer.sizes.hidden)));
  layer.packed = pack.packed;
  layer.saved = saved.data();
  call.layers = &layer;
  for (const bool backward : {false, true}) {
    Arena count(nullptr);
    ForwardScratch<Cell, double>(count, call, kArithmetic<Format>, 0);
    BackwardScratch<Cell, double>(count, call, kArithmetic<Format>, 0);
    std::vector<double> scratch(static_cast<std::size_t>(count.used()) / 8 + 8, __builtin_nan(""));
    call.scratch = aligned(scratch);
    Team team{std::barrier<>(threads)};
    std::vector<std::jthread> helpers;
    for (int i = 0; i < threads; ++i)
      helpers.emplace_back([&, i] {
        const auto wait = [](void* of) noexcept { static_cast<Team*>(of)->all.arrive_and_wait(); };
        Worker worker{i, threads, &team, wait, -1, nullptr};
        pass<Cell>(call, worker, backward);
      });
  }
}

}  // namespace
}  // namespace rnnkern

// sizes: T B I H; arrays: x, initial, w_ih w_hh b_ih b_hh, two extras, dy, dlast; y, last, dx, dinitial, the gradients
// of the weights in the same order, of zeros.
extern "C" void run(int cell, const std::int64_t* sizes, double* const* arrays, const std::int64_t* lengths,
                    const std::uint8_t* resets, bool reverse, int threads) {
  using namespace rnnkern;
  const std::int64_t T = sizes[0], B = sizes[1], I = sizes[2], H = sizes[3];
  double* const* in = arrays;
  double* const* out = arrays + 10;
  std::int64_t stop = 0;
  KernelCall call{};
  const Sequences rows = Sequences::padded(lengths, T, B, 1);
  rows.describe(call);
  call.resets = resets, call.layer_count = call.directions = 1, call.save = Save::gates, call.split = Split::units;
  call.block_steps = call.part_steps = 2, call.max_threads = threads, call.rows_together = call.batch,
  call.stop = &stop;
  Layer layer{{I, H, H, false},
              reverse,
              nullptr,
              in[0],
              out[0],
              I,
              H,
              {in[1]},
              {out[1]},
              nullptr,
              in[8],
              H,
              out[2],
              false,
              {in[9]},
              {out[3]},
              {out[4], out[5], out[6], out[7], nullptr, {out[8], out[9]}},
              nullptr,
              rows.given(),
              rows.given()};
  const LayerWeights<const void*> weights{in[2], in[3], in[4], in[5], nullptr, {in[6], in[7]}};
  (cell == 0 ? run_cell<NormRnn> : run_cell<MinGru>)(call, layer, weights, threads);
}

// The rows of the batch that each of some threads gets of the steps [first, last), `grain` of them together; bounds:
// [threads, 2].
extern "C" void divide_rows(const std::int64_t* lengths, std::int64_t T, std::int64_t B, std::int64_t grain,
                            std::int64_t first, std::int64_t last, int threads, std::int64_t* bounds) {
  using namespace rnnkern;
  KernelCall call{};
  const Sequences rows = Sequences::padded(lengths, T, B, 1);
  rows.describe(call);
  for (int i = 0; i < threads; ++i) {
    const Worker worker{i, threads, nullptr, nullptr, -1, nullptr};
    const Range own = share_of_rows(call, worker, grain, {first, last});
    *bounds++ = own.begin, *bounds++ = own.end;
  }
}
