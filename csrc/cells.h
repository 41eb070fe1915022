// The math of every cell on vectors of units, forward and backward, one struct each, and the list of them.
//
// A cell's constants: gates (rows of the weights, in order), states (h first), saved values a step (what backward
// needs beside y; 0: y alone suffices), extras (vectors of H elements beside matrices and biases), late_gates (last
// gates whose recurrent product waits for `prepare`), projects (a projection may follow), separate_recurrent (dr is
// not dx), kept (for each state where backward finds it: in y, or in a slot of the saved values). The functions mirror
// python/rnnkern/cells.py argument by argument; `h` in backward is the new h.
#pragma once

#include "activations.h"

namespace rnnkern {
namespace {

constexpr int kInOutput = -1;

struct CellDefaults {
  static constexpr int extras = 0, late_gates = 0, kept[] = {kInOutput};
  static constexpr bool projects = false, separate_recurrent = false;
};

// Elman 1990. dh/da follows from y alone.
struct RnnTanh : CellDefaults {
  static constexpr const char* name = "rnn_tanh";
  static constexpr int gates = 1, states = 1, saved = 0;

  template <class V>
  RNNKERN_INLINE static void forward(const V* x, const V* r, const V*, const V*, V* next, V*) noexcept {
    next[0] = tanh(x[0] + r[0]);
  }
  template <class V>
  RNNKERN_INLINE static void backward(const V*, const V*, const V*, V h, const V* dnew, V* dx, V*, V* dprev,
                                      V*) noexcept {
    dx[0] = dnew[0] * (1 - h * h);
    dprev[0] = zero<V>();
  }
};

struct RnnRelu : CellDefaults {
  static constexpr const char* name = "rnn_relu";
  static constexpr int gates = 1, states = 1, saved = 0;

  template <class V>
  RNNKERN_INLINE static void forward(const V* x, const V* r, const V*, const V*, V* next, V*) noexcept {
    next[0] = relu(x[0] + r[0]);
  }
  template <class V>
  RNNKERN_INLINE static void backward(const V*, const V*, const V*, V h, const V* dnew, V* dx, V*, V* dprev,
                                      V*) noexcept {
    const V slope = select<V>(h > zero<V>(), set<V>(1), select<V>(h == h, zero<V>(), h));  // NaN stays NaN
    dx[0] = dnew[0] * slope;
    dprev[0] = zero<V>();
  }
};

struct RnnSigmoid : CellDefaults {
  static constexpr const char* name = "rnn_sigmoid";
  static constexpr int gates = 1, states = 1, saved = 0;

  template <class V>
  RNNKERN_INLINE static void forward(const V* x, const V* r, const V*, const V*, V* next, V*) noexcept {
    next[0] = sigmoid(x[0] + r[0]);
  }
  template <class V>
  RNNKERN_INLINE static void backward(const V*, const V*, const V*, V h, const V* dnew, V* dx, V*, V* dprev,
                                      V*) noexcept {
    dx[0] = dnew[0] * (h * (1 - h));
    dprev[0] = zero<V>();
  }
};

// Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; gates i f g o.
struct Lstm : CellDefaults {
  static constexpr const char* name = "lstm";
  static constexpr int gates = 4, states = 2, saved = 5, kept[] = {kInOutput, 4};  // saved: i f g o c
  static constexpr bool projects = true;

  template <class V>
  RNNKERN_INLINE static void forward(const V* x, const V* r, const V*, const V* prev, V* next, V* saved) noexcept {
    const V i = sigmoid(x[0] + r[0]);
    const V f = sigmoid(x[1] + r[1]);
    const V g = tanh(x[2] + r[2]);
    const V o = sigmoid(x[3] + r[3]);
    const V c = f * prev[1] + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    next[0] = o * tanh(c);
    next[1] = c;
  }
  template <class V>
  RNNKERN_INLINE static void backward(const V* saved, const V*, const V* prev, V, const V* dnew, V* dx, V*, V* dprev,
                                      V*) noexcept {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], tanh_c = tanh(saved[4]);
    const V dc = dnew[1] + dnew[0] * o * (1 - tanh_c * tanh_c);
    dx[0] = dc * g * (i * (1 - i));
    dx[1] = dc * prev[1] * (f * (1 - f));
    dx[2] = dc * i * (1 - g * g);
    dx[3] = dnew[0] * tanh_c * (o * (1 - o));
    dprev[0] = zero<V>();
    dprev[1] = dc * f;
  }
  // h before the projection.
  template <class V>
  RNNKERN_INLINE static V hidden(const V* saved) noexcept {
    return saved[3] * tanh(saved[4]);
  }
};

// Gers and Schmidhuber 2000: the gates see the cell state through peepholes, o the new one; gates i f g o.
struct LstmPeephole : CellDefaults {
  static constexpr const char* name = "lstm_peephole";
  static constexpr int gates = 4, states = 2, saved = 5, kept[] = {kInOutput, 4};  // saved: i f g o c
  static constexpr int extras = 3;                                                 // p_i p_f p_o
  static constexpr bool projects = true;

  template <class V>
  RNNKERN_INLINE static void forward(const V* x, const V* r, const V* extra, const V* prev, V* next,
                                     V* saved) noexcept {
    const V i = sigmoid(x[0] + r[0] + extra[0] * prev[1]);
    const V f = sigmoid(x[1] + r[1] + extra[1] * prev[1]);
    const V g = tanh(x[2] + r[2]);
    const V c = f * prev[1] + i * g;
    const V o = sigmoid(x[3] + r[3] + extra[2] * c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    next[0] = o * tanh(c);
    next[1] = c;
  }
  template <class V>
  RNNKERN_INLINE static void backward(const V* saved, const V* extra, const V* prev, V, const V* dnew, V* dx, V*,
                                      V* dprev, V* dextra) noexcept {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], c = saved[4], tanh_c = tanh(c);
    dx[3] = dnew[0] * tanh_c * (o * (1 - o));
    const V dc = dnew[1] + dnew[0] * o * (1 - tanh_c * tanh_c) + dx[3] * extra[2];
    dx[0] = dc * g * (i * (1 - i));
    dx[1] = dc * prev[1] * (f * (1 - f));
    dx[2] = dc * i * (1 - g * g);
    dprev[0] = zero<V>();
    dprev[1] = dc * f + dx[0] * extra[0] + dx[1] * extra[1];
    dextra[0] = dx[0] * prev[1];
    dextra[1] = dx[1] * prev[1];
    dextra[2] = dx[3] * c;
  }
  template <class V>
  RNNKERN_INLINE static V hidden(const V* saved) noexcept {
    return Lstm::hidden(saved);
  }
};

// Cho et al. 2014 with the reset gate after the product (cuDNN, PyTorch); gates r z n.
struct Gru : CellDefaults {
  static constexpr const char* name = "gru";
  static constexpr int gates = 3, states = 1, saved = 4;  // saved: r z n m, m the recurrent share of n
  static constexpr bool separate_recurrent = true;

  template <class V>
  RNNKERN_INLINE static void forward(const V* x, const V* r, const V*, const V* prev, V* next, V* saved) noexcept {
    const V reset = sigmoid(x[0] + r[0]);
    const V z = sigmoid(x[1] + r[1]);
    const V n = tanh(x[2] + reset * r[2]);
    saved[0] = reset, saved[1] = z, saved[2] = n, saved[3] = r[2];
    next[0] = (1 - z) * n + z * prev[0];
  }
  template <class V>
  RNNKERN_INLINE static void backward(const V* saved, const V*, const V* prev, V, const V* dnew, V* dx, V* dr, V* dprev,
                                      V*) noexcept {
    const V reset = saved[0], z = saved[1], n = saved[2], m = saved[3];
    const V dn = dnew[0] * (1 - z) * (1 - n * n);
    dx[0] = dr[0] = dn * m * (reset * (1 - reset));
    dx[1] = dr[1] = dnew[0] * (prev[0] - n) * (z * (1 - z));
    dx[2] = dn;
    dr[2] = dn * reset;
    dprev[0] = dnew[0] * z;
  }
};

// Cho et al. 2014, equations 5 to 8: the reset gate scales h before the candidate's product; gates r z n.
struct GruResetBefore : CellDefaults {
  static constexpr const char* name = "gru_reset_before";
  static constexpr int gates = 3, states = 1, saved = 3, late_gates = 1;  // saved: r z n

  template <class V>
  RNNKERN_INLINE static void prepare(const V* x, const V* r, const V* prev, V* scaled, V* saved) noexcept {
    saved[0] = sigmoid(x[0] + r[0]);
    saved[1] = sigmoid(x[1] + r[1]);
    scaled[0] = saved[0] * prev[0];
  }
  template <class V>
  RNNKERN_INLINE static void forward(const V* x, const V* r, const V*, const V* prev, V* next, V* saved) noexcept {
    const V n = tanh(x[2] + r[2]), z = saved[1];
    saved[2] = n;
    next[0] = (1 - z) * n + z * prev[0];
  }
  template <class V>
  RNNKERN_INLINE static void backward(const V* saved, const V*, const V* prev, V, const V* dnew, V* dx, V*, V* dprev,
                                      V*) noexcept {
    const V z = saved[1], n = saved[2];
    dx[0] = zero<V>();
    dx[1] = dnew[0] * (prev[0] - n) * (z * (1 - z));
    dx[2] = dnew[0] * (1 - z) * (1 - n * n);
    dprev[0] = dnew[0] * z;
  }
  template <class V>
  RNNKERN_INLINE static void prepare_backward(const V* saved, const V* prev, const V* dscaled, V* dx,
                                              V* dprev) noexcept {
    const V reset = saved[0];
    dx[0] = dscaled[0] * prev[0] * (reset * (1 - reset));
    dprev[0] = dprev[0] + dscaled[0] * reset;
  }
  template <class V>
  RNNKERN_INLINE static V scaled(const V* saved, const V* prev) noexcept {
    return saved[0] * prev[0];
  }
};

// Zhou et al. 2016, the minimal gated unit: one gate forgets and resets; gates f n.
struct Mgu : CellDefaults {
  static constexpr const char* name = "mgu";
  static constexpr int gates = 2, states = 1, saved = 2, late_gates = 1;  // saved: f n

  template <class V>
  RNNKERN_INLINE static void prepare(const V* x, const V* r, const V* prev, V* scaled, V* saved) noexcept {
    saved[0] = sigmoid(x[0] + r[0]);
    scaled[0] = saved[0] * prev[0];
  }
  template <class V>
  RNNKERN_INLINE static void forward(const V* x, const V* r, const V*, const V* prev, V* next, V* saved) noexcept {
    const V n = tanh(x[1] + r[1]), f = saved[0];
    saved[1] = n;
    next[0] = (1 - f) * prev[0] + f * n;
  }
  template <class V>
  RNNKERN_INLINE static void backward(const V* saved, const V*, const V* prev, V, const V* dnew, V* dx, V*, V* dprev,
                                      V*) noexcept {
    const V f = saved[0], n = saved[1];
    dx[0] = dnew[0] * (n - prev[0]);  // of f, until prepare_backward makes it that of x
    dx[1] = dnew[0] * f * (1 - n * n);
    dprev[0] = dnew[0] * (1 - f);
  }
  template <class V>
  RNNKERN_INLINE static void prepare_backward(const V* saved, const V* prev, const V* dscaled, V* dx,
                                              V* dprev) noexcept {
    const V f = saved[0];
    dx[0] = (dx[0] + dscaled[0] * prev[0]) * (f * (1 - f));
    dprev[0] = dprev[0] + dscaled[0] * f;
  }
  template <class V>
  RNNKERN_INLINE static V scaled(const V* saved, const V* prev) noexcept {
    return saved[0] * prev[0];
  }
};

template <class... C>
struct CellList {
  static constexpr int count = sizeof...(C);
};

using Cells = CellList<RnnTanh, RnnRelu, RnnSigmoid, Lstm, LstmPeephole, Gru, GruResetBefore,
                       Mgu>;  // write the struct above, name it here

}  // namespace
}  // namespace rnnkern
