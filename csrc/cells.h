// The math of every cell on vectors of units, forward and backward, one struct each, and the list of them.
//
// A cell says what it has: gates (rows of the weights, in order), states (h first), saved values a step (what backward
// needs beside y; 0: y alone suffices), kept (for each state where backward finds it), extras (vectors of H elements
// beside matrices and biases), separate_recurrent (dr is not dx), bounded (what a product takes of a step, h or a
// vector given, is within 1 of zero where h before the step is), and Step, the list of its phases (phases.h), each with
// a struct of its functions:
//
//   forward(x, r, extra, prev, next, saved)
//     sets `next`, the new states or what a phase before the last gives to the one behind it, and its `saved` values
//   backward(saved, extra, prev, h, dnew, dx, dr, dprev, dextra)
//     h is the new h, dnew the gradients of `next`; adds to dx, dprev and dextra, which the phases behind it have left
//     (at first zeros), and sets dr
//   given(saved, prev)
//     what it gave to the product behind it
//
// They mirror python/rnnkern/cells.py. A value that is not there in a phase cannot be used: it does not compile.
#pragma once

#include "phases.h"

namespace rnnkern {
namespace {

struct CellDefaults {
  static constexpr int extras = 0, kept[] = {kInOutput};
  static constexpr bool separate_recurrent = false, bounded = true;
};

// Elman 1990, for a function and its slope, which follows from y alone.
template <class Function>
struct Rnn : CellDefaults {
  static constexpr int gates = 1, states = 1, saved = 0;
  using Step = Phases<Product<From::h, 1, Rnn>>;

  RNNKERN_INLINE static void forward(auto x, auto r, auto, auto, auto next, auto) noexcept {
    next[0] = Function::of(x[0] + r[0]);
  }
  RNNKERN_INLINE static void backward(auto, auto, auto, auto h, auto dnew, auto dx, auto, auto, auto) noexcept {
    dx[0] = dnew[0] * Function::slope(h[0]);
  }
};

struct RnnTanh : Rnn<RnnTanh> {
  static constexpr const char* name = "rnn_tanh";

  RNNKERN_INLINE static auto of(auto a) noexcept { return tanh(a); }
  RNNKERN_INLINE static auto slope(auto h) noexcept { return 1 - h * h; }
};

struct RnnRelu : Rnn<RnnRelu> {
  static constexpr const char* name = "rnn_relu";
  static constexpr bool bounded = false;

  RNNKERN_INLINE static auto of(auto a) noexcept { return relu(a); }
  template <class V>
  RNNKERN_INLINE static V slope(V h) noexcept {
    return select<V>(h > zero<V>(), set<V>(1), select<V>(h == h, zero<V>(), h));  // NaN stays NaN
  }
};

struct RnnSigmoid : Rnn<RnnSigmoid> {
  static constexpr const char* name = "rnn_sigmoid";

  RNNKERN_INLINE static auto of(auto a) noexcept { return sigmoid(a); }
  RNNKERN_INLINE static auto slope(auto h) noexcept { return h * (1 - h); }
};

// Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; gates i f g o.
struct Lstm : CellDefaults {
  static constexpr const char* name = "lstm";
  static constexpr int gates = 4, states = 2, saved = 5, kept[] = {kInOutput, 4};  // saved: i f g o c
  using Step = Phases<Product<From::h, 4, Lstm>, Projection>;

  RNNKERN_INLINE static void forward(auto x, auto r, auto, auto prev, auto next, auto saved) noexcept {
    const auto i = sigmoid(x[0] + r[0]);
    const auto f = sigmoid(x[1] + r[1]);
    const auto g = tanh(x[2] + r[2]);
    const auto o = sigmoid(x[3] + r[3]);
    const auto c = f * prev[1] + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    next[0] = o * tanh(c);
    next[1] = c;
  }
  RNNKERN_INLINE static void backward(auto saved, auto, auto prev, auto, auto dnew, auto dx, auto, auto dprev,
                                      auto) noexcept {
    const auto i = saved[0], f = saved[1], g = saved[2], o = saved[3], tanh_c = tanh(saved[4]);
    const auto dc = dnew[1] + dnew[0] * o * (1 - tanh_c * tanh_c);
    dx[0] = dc * g * (i * (1 - i));
    dx[1] = dc * prev[1] * (f * (1 - f));
    dx[2] = dc * i * (1 - g * g);
    dx[3] = dnew[0] * tanh_c * (o * (1 - o));
    dprev[1] = dc * f;
  }
  RNNKERN_INLINE static auto given(auto saved, auto) noexcept { return saved[3] * tanh(saved[4]); }
};

// Gers and Schmidhuber 2000: the gates see the cell state through peepholes, o the new one; gates i f g o.
struct LstmPeephole : CellDefaults {
  static constexpr const char* name = "lstm_peephole";
  static constexpr int gates = 4, states = 2, saved = 5, kept[] = {kInOutput, 4};  // saved: i f g o c
  static constexpr int extras = 3;                                                 // p_i p_f p_o
  using Step = Phases<Product<From::h, 4, LstmPeephole>, Projection>;

  RNNKERN_INLINE static void forward(auto x, auto r, auto extra, auto prev, auto next, auto saved) noexcept {
    const auto i = sigmoid(x[0] + r[0] + extra[0] * prev[1]);
    const auto f = sigmoid(x[1] + r[1] + extra[1] * prev[1]);
    const auto g = tanh(x[2] + r[2]);
    const auto c = f * prev[1] + i * g;
    const auto o = sigmoid(x[3] + r[3] + extra[2] * c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    next[0] = o * tanh(c);
    next[1] = c;
  }
  RNNKERN_INLINE static void backward(auto saved, auto extra, auto prev, auto, auto dnew, auto dx, auto, auto dprev,
                                      auto dextra) noexcept {
    const auto i = saved[0], f = saved[1], g = saved[2], o = saved[3], c = saved[4], tanh_c = tanh(c);
    dx[3] = dnew[0] * tanh_c * (o * (1 - o));
    const auto dc = dnew[1] + dnew[0] * o * (1 - tanh_c * tanh_c) + dx[3] * extra[2];
    dx[0] = dc * g * (i * (1 - i));
    dx[1] = dc * prev[1] * (f * (1 - f));
    dx[2] = dc * i * (1 - g * g);
    dprev[1] = dc * f + dx[0] * extra[0] + dx[1] * extra[1];
    dextra[0] = dx[0] * prev[1];
    dextra[1] = dx[1] * prev[1];
    dextra[2] = dx[3] * c;
  }
  RNNKERN_INLINE static auto given(auto saved, auto prev) noexcept { return Lstm::given(saved, prev); }
};

// Cho et al. 2014 with the reset gate after the product (cuDNN, PyTorch); gates r z n.
struct Gru : CellDefaults {
  static constexpr const char* name = "gru";
  static constexpr int gates = 3, states = 1, saved = 4;  // saved: r z n m, m the recurrent share of n
  static constexpr bool separate_recurrent = true;
  using Step = Phases<Product<From::h, 3, Gru>>;

  RNNKERN_INLINE static void forward(auto x, auto r, auto, auto prev, auto next, auto saved) noexcept {
    const auto reset = sigmoid(x[0] + r[0]);
    const auto z = sigmoid(x[1] + r[1]);
    const auto n = tanh(x[2] + reset * r[2]);
    saved[0] = reset, saved[1] = z, saved[2] = n, saved[3] = r[2];
    next[0] = (1 - z) * n + z * prev[0];
  }
  RNNKERN_INLINE static void backward(auto saved, auto, auto prev, auto, auto dnew, auto dx, auto dr, auto dprev,
                                      auto) noexcept {
    const auto reset = saved[0], z = saved[1], n = saved[2], m = saved[3];
    const auto dn = dnew[0] * (1 - z) * (1 - n * n);
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
  static constexpr int gates = 3, states = 1, saved = 3;  // saved: r z n

  struct Reset {
    RNNKERN_INLINE static void forward(auto x, auto r, auto, auto prev, auto scaled, auto saved) noexcept {
      saved[0] = sigmoid(x[0] + r[0]);
      saved[1] = sigmoid(x[1] + r[1]);
      scaled[0] = saved[0] * prev[0];
    }
    RNNKERN_INLINE static void backward(auto saved, auto, auto prev, auto, auto dscaled, auto dx, auto, auto dprev,
                                        auto) noexcept {
      const auto reset = saved[0];
      dx[0] = dscaled[0] * prev[0] * (reset * (1 - reset));
      dprev[0] = dprev[0] + dscaled[0] * reset;
    }
    RNNKERN_INLINE static auto given(auto saved, auto prev) noexcept { return saved[0] * prev[0]; }
  };
  struct Candidate {
    RNNKERN_INLINE static void forward(auto x, auto r, auto, auto prev, auto next, auto saved) noexcept {
      const auto n = tanh(x[2] + r[2]), z = saved[1];
      saved[2] = n;
      next[0] = (1 - z) * n + z * prev[0];
    }
    RNNKERN_INLINE static void backward(auto saved, auto, auto prev, auto, auto dnew, auto dx, auto, auto dprev,
                                        auto) noexcept {
      const auto z = saved[1], n = saved[2];
      dx[1] = dnew[0] * (prev[0] - n) * (z * (1 - z));
      dx[2] = dnew[0] * (1 - z) * (1 - n * n);
      dprev[0] = dnew[0] * z;
    }
  };
  using Step = Phases<Product<From::h, 2, Reset>, Product<From::given, 1, Candidate>>;
};

// Zhou et al. 2016, the minimal gated unit: one gate forgets and resets; gates f n.
struct Mgu : CellDefaults {
  static constexpr const char* name = "mgu";
  static constexpr int gates = 2, states = 1, saved = 2;  // saved: f n

  struct Reset {
    RNNKERN_INLINE static void forward(auto x, auto r, auto, auto prev, auto scaled, auto saved) noexcept {
      saved[0] = sigmoid(x[0] + r[0]);
      scaled[0] = saved[0] * prev[0];
    }
    RNNKERN_INLINE static void backward(auto saved, auto, auto prev, auto, auto dscaled, auto dx, auto, auto dprev,
                                        auto) noexcept {
      const auto f = saved[0];
      dx[0] = (dx[0] + dscaled[0] * prev[0]) * (f * (1 - f));
      dprev[0] = dprev[0] + dscaled[0] * f;
    }
    RNNKERN_INLINE static auto given(auto saved, auto prev) noexcept { return saved[0] * prev[0]; }
  };
  struct Candidate {
    RNNKERN_INLINE static void forward(auto x, auto r, auto, auto prev, auto next, auto saved) noexcept {
      const auto n = tanh(x[1] + r[1]), f = saved[0];
      saved[1] = n;
      next[0] = (1 - f) * prev[0] + f * n;
    }
    RNNKERN_INLINE static void backward(auto saved, auto, auto prev, auto, auto dnew, auto dx, auto, auto dprev,
                                        auto) noexcept {
      const auto f = saved[0], n = saved[1];
      dx[0] = dnew[0] * (n - prev[0]);  // of f, until Reset makes it that of x
      dx[1] = dnew[0] * f * (1 - n * n);
      dprev[0] = dnew[0] * (1 - f);
    }
  };
  using Step = Phases<Product<From::h, 1, Reset>, Product<From::given, 1, Candidate>>;
};

template <class... C>
struct CellList {
  static constexpr int count = sizeof...(C);
  static_assert((check_laws<C>() && ...));
};

using Cells = CellList<RnnTanh, RnnRelu, RnnSigmoid, Lstm, LstmPeephole, Gru, GruResetBefore,
                       Mgu>;  // write the struct above, name it here

}  // namespace
}  // namespace rnnkern
