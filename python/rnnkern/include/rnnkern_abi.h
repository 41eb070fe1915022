/* The kernels of rnnkern for other compiled code, in C: plain structs over plain memory, no Python, no exceptions.
 *
 * The compiled module exports `rnnkern_abi`; whoever has loaded it looks that up with dlsym. Calls use as many threads
 * as Python has set, which is done on `import rnnkern`, or `rnnkern_set_num_threads(int)`; else one. Arrays are
 * C-contiguous, of one element type, shaped as in docs/conventions.md: T steps, B rows, L layers of D directions. A
 * struct that is zeroed before its fields are set stands for the defaults, but for its rnnkern_arrays, which have as
 * many elements as their stack says. examples/train_layer.c trains a layer with it. */
#ifndef RNNKERN_ABI_H
#define RNNKERN_ABI_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RNNKERN_ABI_VERSION 4

typedef struct {
  const char* isa;       /* null: the one in use; the layout of packed weights and of what is kept depends on it */
  const char* cell;      /* such as "lstm" */
  int64_t element_bytes; /* 4: float, 8: double */
  int64_t input_size, hidden_size, proj_size, num_layers;
  int64_t directions; /* 1 or 2 */
  bool reverse[2];    /* of each direction: does it run from the last step to the first? */
  bool biased;
  bool rounds;  /* the operands of products to bfloat16; with element_bytes 4 */
  bool engines; /* makes products of floats on a matrix engine where there is one; with element_bytes 4, not rounds */
} rnnkern_stack;

typedef struct {
  void* const* data;
  int64_t count; /* as rnnkern_sizes has it, so that none is left out by mistake; also where all are null */
} rnnkern_arrays;

typedef struct {
  void* data; /* best aligned to 64 bytes */
  int64_t bytes;
} rnnkern_memory;

/* How many arrays a stack has, and the bytes of the memory that a caller provides for calls of T steps and B rows. */
typedef struct {
  int64_t states;  /* arrays: h (L*D, B, P), the others (L*D, B, H) */
  int64_t weights; /* arrays: for each layer-direction w_ih, w_hh, b_ih, b_hh, w_hr and extras, those that it has */
  int64_t packed_for_inference, packed_for_training;
  int64_t kept, kept_with_masks; /* what a training forward leaves for its backward */
} rnnkern_sizes;

typedef struct {
  bool training;          /* with what backward needs */
  rnnkern_arrays weights; /* in the order of rnnkern_sizes, only read */
  rnnkern_memory packed;
} rnnkern_pack;

typedef struct {
  int64_t steps, batch;
  const int64_t* lengths;   /* [B], from 0 to T; null: none. Sequences without padding are not taken here */
  const uint8_t* resets;    /* [T, B], 0 or 1; null: none */
  const void* const* masks; /* [L-1] of [T, B, D*P], the scaled dropout of each output; null: none; training only */
  const void* x;            /* [T, B, I] */
  rnnkern_arrays initial;   /* states, h first, only read; null in place of one: zeros */
  rnnkern_memory packed;
  void* y; /* [T, B, D*P] */
  rnnkern_arrays last;
  bool training;       /* as the weights were packed */
  rnnkern_memory kept; /* in training only; best aligned to 64 bytes */
} rnnkern_forward;

typedef struct {
  const rnnkern_forward* forward; /* that has run; its `last` is not read */
  const void* dy;                 /* null: zeros */
  rnnkern_arrays dlast;           /* only read; null in place of one: zeros */
  void* dx;                       /* null: not wanted */
  rnnkern_arrays dinitial;        /* null in place of all: not wanted */
  rnnkern_arrays gradients;       /* of the weights; null in place of one: not wanted; else zeroed by the caller */
} rnnkern_backward;

/* Why a call did nothing. */
typedef struct {
  char text[240];
} rnnkern_message;

/* Each returns whether it ran, and else says why in the message. They may be called from any thread. */
typedef struct {
  bool (*sizes)(const rnnkern_stack*, int64_t steps, int64_t batch, rnnkern_sizes*, rnnkern_message*);
  bool (*pack)(const rnnkern_stack*, const rnnkern_pack*, rnnkern_message*);
  bool (*forward)(const rnnkern_stack*, const rnnkern_forward*, rnnkern_message*);
  bool (*backward)(const rnnkern_stack*, const rnnkern_backward*, rnnkern_message*);
} rnnkern_functions;

/* Null where the module has another version of these structs. */
const rnnkern_functions* rnnkern_abi(int version);

#ifdef __cplusplus
}
#endif

#endif
