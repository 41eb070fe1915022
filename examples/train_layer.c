/* Trains an LSTM from C, through rnnkern_abi.h: from 2 to 20 noisy values, it recalls the sign of the first.
 *
 * The kernels are in the compiled module of the package, which needs the symbols of Python, so that this is a library
 * that a Python process loads:
 *
 *     folder=$(python -c "import rnnkern, pathlib; print(pathlib.Path(rnnkern.__file__).parent)")
 *     cc -O2 -shared -fPIC -I "$folder/include" examples/train_layer.c -lm -o train_layer.so
 *     python examples/train_layer.py ./train_layer.so */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rnnkern_abi.h"

enum { T = 20, B = 32, I = 1, H = 8, GATES = 4 * H, WEIGHTS = 4, STATES = 2 };

static float uniform(unsigned* seed) { /* in [-1, 1) */
  *seed = *seed * 1664525u + 1013904223u;
  return (float)(*seed >> 8) / 8388608.0f - 1;
}

/* Fills x (T, B, I) and the lengths, and says in `wanted` which sign each row begins with. */
static void draw(unsigned* seed, float* x, int64_t* lengths, float* wanted) {
  for (int i = 0; i < T * B * I; ++i) x[i] = 0.3f * uniform(seed);
  for (int b = 0; b < B; ++b) {
    lengths[b] = 2 + (int64_t)((uniform(seed) + 1) / 2 * (T - 1));
    wanted[b] = uniform(seed) < 0 ? -0.7f : 0.7f;
    x[b * I] += wanted[b];
  }
}

/* Sets dy to the gradient of the mean squared error of the first unit at the last step of each row; returns the error.
 */
static float error_of(const float* y, const int64_t* lengths, const float* wanted, float* dy) {
  float error = 0;
  memset(dy, 0, sizeof(float) * T * B * H);
  for (int b = 0; b < B; ++b) {
    const int64_t last = ((lengths[b] - 1) * B + b) * H;
    const float off = y[last] - wanted[b];
    error += off * off / B;
    dy[last] = 2 * off / B;
  }
  return error;
}

/* One step of Adam (Kingma and Ba 2015) on n weights. */
static void adam(float* weight, const float* gradient, float* mean, float* square, int64_t n, int step) {
  const float rate = 0.02f * sqrtf(1 - powf(0.999f, (float)step)) / (1 - powf(0.9f, (float)step));
  for (int64_t i = 0; i < n; ++i) {
    mean[i] = 0.9f * mean[i] + 0.1f * gradient[i];
    square[i] = 0.999f * square[i] + 0.001f * gradient[i] * gradient[i];
    weight[i] -= rate * mean[i] / (sqrtf(square[i]) + 1e-8f);
  }
}

/* Runs `updates` steps of training and stores the error of each; returns whether all went well. */
bool train(const rnnkern_functions* kernels, int updates, float* errors) {
  static float x[T * B * I], y[T * B * H], dy[T * B * H], last[STATES][B * H], dinitial[STATES][B * H];
  static float weights[WEIGHTS][GATES * H], gradients[WEIGHTS][GATES * H];
  static float means[WEIGHTS][GATES * H], squares[WEIGHTS][GATES * H], wanted[B];
  static int64_t lengths[B];
  const int64_t counts[WEIGHTS] = {GATES * I, GATES * H, GATES, GATES}; /* of w_ih, w_hh, b_ih, b_hh */
  const rnnkern_stack stack = {.cell = "lstm",
                               .element_bytes = sizeof(float),
                               .input_size = I,
                               .hidden_size = H,
                               .num_layers = 1,
                               .directions = 1,
                               .biased = true};
  rnnkern_message why;
  rnnkern_sizes sizes;
  if (!kernels->sizes(&stack, T, B, &sizes, &why)) return fprintf(stderr, "sizes: %s\n", why.text), false;
  void* packed = aligned_alloc(64, (size_t)(sizes.packed_for_training + 63) / 64 * 64);
  void* kept = aligned_alloc(64, (size_t)(sizes.kept + 63) / 64 * 64);
  void *zeros[STATES] = {NULL, NULL}, *to_last[STATES] = {last[0], last[1]};
  void *to_initial[STATES] = {dinitial[0], dinitial[1]}, *from[WEIGHTS], *slopes[WEIGHTS];
  unsigned seed = 1;
  for (int k = 0; k < WEIGHTS; ++k) {
    for (int64_t i = 0; i < counts[k]; ++i) weights[k][i] = uniform(&seed) / sqrtf(H);
    from[k] = weights[k], slopes[k] = gradients[k];
  }
  const rnnkern_pack pack = {true, {from, WEIGHTS}, {packed, sizes.packed_for_training}};
  const rnnkern_forward forward = {.steps = T,
                                   .batch = B,
                                   .lengths = lengths,
                                   .x = x,
                                   .initial = {zeros, STATES},
                                   .packed = {packed, sizes.packed_for_training},
                                   .y = y,
                                   .last = {to_last, STATES},
                                   .training = true,
                                   .kept = {kept, sizes.kept}};
  const rnnkern_backward backward = {.forward = &forward,
                                     .dy = dy,
                                     .dlast = {zeros, STATES},
                                     .dinitial = {to_initial, STATES},
                                     .gradients = {slopes, WEIGHTS}};
  bool ran = packed && kept;
  for (int step = 1; ran && step <= updates; ++step) {
    draw(&seed, x, lengths, wanted);
    memset(gradients, 0, sizeof gradients); /* backward adds to them */
    ran = kernels->pack(&stack, &pack, &why) && kernels->forward(&stack, &forward, &why);
    errors[step - 1] = ran ? error_of(y, lengths, wanted, dy) : NAN;
    ran = ran && kernels->backward(&stack, &backward, &why);
    if (!ran) fprintf(stderr, "step %d: %s\n", step, why.text);
    for (int k = 0; ran && k < WEIGHTS; ++k) adam(weights[k], gradients[k], means[k], squares[k], counts[k], step);
  }
  free(packed), free(kept);
  return ran;
}
