// What crosses the border between the binding and the code compiled per ISA: plain structs and function pointers.
#pragma once

#include <cstdint>

#include "worker.h"

namespace rnnkern {

constexpr int kMaxStates = 2, kMaxExtras = 4, kMaxGates = 4;

// I, H and P of a layer-direction; P = H without a projection.
struct LayerSizes {
  std::int64_t inputs, hidden, outputs;
  bool projected;
};

// The weights of a layer-direction as the user holds them, row-major; null where there is none.
// G = gates; w_ih [G*H, I]  w_hh [G*H, P]  b_ih, b_hh [G*H]  w_hr [P, H]  extra [H] each
template <class Pointer>
struct LayerWeights {
  Pointer w_ih, w_hh, b_ih, b_hh, w_hr, extra[kMaxExtras];
};

// How products are made, one of formats.h each: what packed weights are stored in, and whether the rows that are
// multiplied with them are rounded too. Sums are double with float64, else float.
enum class Products : int {
  float32,
  float64,
  bfloat16_weights,
  rounded,
  rounded_bfloat16_weights,
  bfloat16_pairs,
  bfloat16_tiles,
  emulated_bfloat16_tiles,
  sliced_tiles,
  emulated_sliced_tiles,
  sliced_tiles_of_both,
  emulated_sliced_tiles_of_both
};
constexpr int kProducts = 12;

struct PackCall {
  Products products;
  LayerSizes sizes;
  LayerWeights<const void*> weights;
  bool training;  // with what backward needs
  void* packed;   // packed_bytes() of these sizes, 64-byte aligned
};

// Where an array has the row of step t and batch b: at (steps ? steps[t] : t * stride) + (rows ? rows[b] : b).
struct RowMap {
  std::int64_t stride;
  const std::int64_t* steps;
  const std::int64_t* rows;
  std::int64_t padded;  // steps that each b has, past its length too, where results are zero; 0: there is no such row
};

// One layer-direction of a call. A row is one (t, b).
struct Layer {
  LayerSizes sizes;
  bool reverse;
  const void* packed;  // see pack.h
  const void* x;       // rows of I, x_stride elements apart
  void* y;             // rows of P, y_stride elements apart; forward writes, backward reads
  std::int64_t x_stride, y_stride;
  const void* initial[kMaxStates];  // h [B, P], others [B, H]
  void* last[kMaxStates];           // the same shapes; forward writes the states after the last step
  void* saved;                      // rows of saved_elements() of these sizes; null: keep nothing
  // Backward only.
  const void* dy;  // like y, dy_stride elements apart; null: zeros
  std::int64_t dy_stride;
  void* dx;                       // rows of I, like x, contiguous; null: not wanted
  bool add_to_dx;                 // to what is there: a second direction adds to what the first has written
  const void* dlast[kMaxStates];  // gradients of `last`
  void* dinitial[kMaxStates];     // null: not wanted
  LayerWeights<void*> gradients;  // null: not wanted; else zeroed by the caller
  void* flow;                     // [states + gates] of the caller's rows, see Watch; null: not wanted
  RowMap x_rows, y_rows;
};

// What forward keeps for backward of each step beside y: nothing, what the cell saves of its gates, or only the states
// that are not in y, from which backward computes the gates of a block again.
enum class Save : int { nothing, gates, outputs };

// What the threads of a call divide among them: the rows of the batch, the units of a layer, or the layer-directions,
// each of which is one thread's.
enum class Split : int { rows, units, layers };

// What bounds a row of the gradient of a state after a step, dy added: nothing, its norm, or each element.
enum class Bound : int { nothing, norm, value };

// What backward does with these gradients beside going on with them. It bounds them; and where `flow` is wanted it
// measures, of each row of a step, their norms before they are bounded and, for each gate, the share of the units where
// it is saturated: at most `low` or above `high`. What is past a row's end it leaves alone.
struct Watch {
  Bound bound;
  double most;
  bool flow;
  double low[kMaxGates], high[kMaxGates];
};

// A stack of L layers of D directions, one call; layer-direction (l, d) is layers[l * D + d]. Sequences of different
// lengths stand in the order of their lengths, the longest first: those that have a step are the first ones.
struct KernelCall {
  Products products;
  std::int64_t steps, batch;    // steps: of the longest
  const std::int64_t* lengths;  // [B], falling; null: all steps
  const std::uint8_t* resets;   // one for each of the caller's rows, or null
  int layer_count, directions;
  const Layer* layers;
  const void* const* masks;  // [L-1] of the caller's rows of D*P, dropout scale of each output; null: no dropout
  void* const* masked;       // [L-1] of kept rows of D*P: forward writes y * mask here, the input of the next layer
  Save save;
  Split split;
  Watch watch;               // of backward
  std::int64_t block_steps;  // steps whose gates are worked on while they are in cache
  std::int64_t part_steps;   // of a block of backward: steps after which dx is there for the layer below
  int max_threads;
  std::int64_t rows_together;  // of the batch, which stand together in working memory: those of one thread
  void* scratch;               // scratch_bytes() of this struct, 64-byte aligned
  bool (*poll)(void*);         // called by worker 0 between blocks; true: give up, the results are not wanted
  void* poll_context;
  std::int64_t* stop;      // 0 on entry; the number of the first block that is not worked on once poll says so
  std::int64_t* progress;  // where layers are divided, zeros on entry: the steps that each layer-direction has done,
                           // and behind them how many were begun; else null
  std::int64_t rows;       // that sequences have, over all steps
  const std::int64_t* starts;          // [T + 1] how many of them are before each step; with lengths
  const std::int64_t *order, *sorted;  // [B] which b is where in states, and the other way; null: in its place. Sums
                                       // over rows run in the order of the caller's batch
  RowMap given, kept, saved;           // of the caller's arrays, of those between layers, and of what layers save
};

// y = x W^T + b and its gradients for `rows` rows. weight [outputs, inputs]
struct Linear {
  Products products;
  std::int64_t rows, inputs, outputs;
  const void *x, *weight, *bias;  // bias null: none
  void* y;
  const void* dy;
  void *dx, *dweight, *dbias;  // null: not wanted; dweight, dbias are added to
  void* scratch;
};

// The functions of one cell for one type of states.
struct CellKernels {
  std::int64_t (*packed_bytes)(Products, const LayerSizes&, bool training) noexcept;
  Task pack;                                                                             // context: const PackCall*
  std::int64_t (*saved_elements)(const LayerSizes&, std::int64_t batch, Save) noexcept;  // of a row of Layer::saved
  std::int64_t (*scratch_bytes)(const KernelCall&, bool backward) noexcept;
  std::int64_t (*row_grain)(const LayerSizes&, std::int64_t batch, Save) noexcept;  // rows a thread works on together
  Task forward;                                                                     // context: const KernelCall*
  Task backward;                                                                    // the same
};

// The sum of the squares of each of `rows` rows of `columns` elements.
struct Squares {
  std::int64_t rows, columns;
  const void* values;
  double* sums;  // [rows]
};

struct LinearKernels {
  std::int64_t (*scratch_bytes)(const Linear&, int max_threads) noexcept;
  Task forward;  // context: const Linear*
  Task backward;
};

// One run of a loop of probes.h.
struct Probe {
  std::int64_t repeats;
  std::int64_t elements;  // of a row of data; whole vectors
  void* data;             // float32 [ProbeKernel::rows, elements], 64-byte aligned
  int threads;            // the loop writes how many take part
};
struct ProbeKernel {
  const char *name, *cell;  // cell empty: of no cell
  Task run;                 // context: Probe*
  std::int64_t work;        // of one repeat: multiply-adds, else 1
  int rows;                 // of data; 0: one for each thread
};

struct CellEntry {
  const char* name;
  int gates, states, saved, extras, late_gates;  // as in cells.py, late_gates those of the phases behind the first
  int kept[kMaxStates];                          // where backward finds each state: a slot of the saved values, -1: y
  bool projects, separate_recurrent, bounded;
  CellKernels f32, f64;
};

struct KernelTable {
  const CellEntry* cells;
  int cell_count;
  LinearKernels linear_f32, linear_f64;
  bool has_pairs, emulates_pairs;  // Products::bfloat16_pairs, and without an instruction for it; emulated tiles
  bool has_tiles;                  // Products::bfloat16_tiles
  std::int64_t (*weight_bytes)(Products) noexcept;  // of one packed weight
  Task squares_f32, squares_f64;                    // context: const Squares*
  const ProbeKernel* probes;
  int probe_count;
  int lanes_f32, lanes_f64;
};

}  // namespace rnnkern
