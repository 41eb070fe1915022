"""Truncated backpropagation through time over a long sequence, a chunk of steps after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import describe, integer, refuse_sequences, resets_of_shape, row_lengths, seed_or_none
from .functional import Grads, Limits, Tape
from .layers import Recurrent

__all__ = ["tbptt"]

Array = NDArray[Any]
Backward = Callable[..., Grads]


def tbptt(
    layer: Recurrent[Any],
    x: Any,
    state: Any = None,
    *,
    k1: int,
    k2: int | None = None,
    lengths: Any = None,
    resets: Any = None,
    save: str | int = "gates",
    seed: int | None = None,
) -> Iterator[tuple[slice, Array, Backward]]:
    """Go through a sequence in chunks of `k1` steps, each with gradients through the last `k2` steps.

    The state goes on from chunk to chunk, the gradient goes back as far as `k2` steps and no farther: memory does not
    grow with the steps, and an optimizer may step after each chunk. What is kept of earlier chunks has the weights they
    ran with. Williams and Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories", BPTT(h; h').

    Parameters
    ----------
    layer
        Of one direction.
    x, state, lengths, resets
        As for `layer.forward`. x needs no more of memory than a slice of its steps at a time: a `numpy.memmap` will do.
    k1
        Steps of a chunk, of which the last may have fewer.
    k2
        A multiple of `k1`; None is `k1` itself.
    save
        What is kept of a chunk, as for `layer.forward`.
    seed
        Of the dropout masks; chunk n draws with `seed + n`. None draws from the layer's own generator.

    Yields
    ------
    steps, y, backward
        The slice of the steps, their y as of `layer.forward`, and a function of the gradient of y, which returns
        `Grads`: of x in these steps, of the state before the earliest step reached, and of the parameters. Call it
        before the next chunk is asked for, as often as wanted. It takes `dstate`, `need_x`, `parameters`, `max_norm`,
        `clip_value`, `clip_state` and `into` as `layer.backward` does.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> layer, x = rk.GRU(3, 4, seed=0), np.ones((1_000, 2, 3), np.float32)
    >>> optimizer = rk.SGD(layer.parameters, lr=0.01)
    >>> for steps, y, backward in rk.tbptt(layer, x, k1=50, k2=100):
    ...     grads = backward(2 * y / y.size)
    ...     optimizer.step(grads)
    >>> steps, y.shape
    (slice(950, 1000, None), (50, 2, 4))
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer: expected an RNN, LSTM, GRU or Recurrent, got {describe(layer)}")
    if layer.bidirectional:
        raise ValueError(f"layer: expected one direction, since the reverse one begins at the last step, got {layer!r}")
    k1 = integer("k1", k1, 1)
    k2 = k1 if k2 is None else integer("k2", k2, k1)
    if k2 % k1:
        raise ValueError(f"k2: expected a multiple of k1={k1}, got {k2}")
    refuse_sequences(x)
    return _chunks(layer, x, state, k1, k2 // k1, lengths, resets, save, seed_or_none(seed))


def _chunks(
    layer: Recurrent[Any], x: Any, state: Any, k1: int, reach: int, lengths: Any, resets: Any, save: Any, seed: Any
) -> Iterator[tuple[slice, Array, Backward]]:
    x = x if hasattr(x, "shape") else np.asarray(x)
    shape = x.shape
    axis = 1 if layer.batch_first and len(shape) == 3 else 0
    steps_of_all = shape[axis] if len(shape) in (2, 3) else 0
    # Look at lengths and resets whole: a part of what is too long, or of an unsigned dtype, would pass for right.
    if lengths is not None:  # which a layer refuses with unbatched x
        lengths = row_lengths(lengths, shape[axis], shape[1 - axis]) if len(shape) == 3 else np.asarray(lengths)
    if resets is not None and len(shape) in (2, 3):
        resets = resets_of_shape(resets, tuple(shape[:-1]))
    tapes: deque[Tape] = deque(maxlen=reach)
    for number, first in enumerate(range(0, steps_of_all, k1) or [0]):
        steps = slice(first, min(first + k1, steps_of_all))
        place = (slice(None),) * axis + (steps,)
        y, state, tape = layer.forward(
            x[place] if steps_of_all else x,
            state,
            lengths=None if lengths is None else np.clip(lengths - first, 0, steps.stop - first),
            resets=None if resets is None else resets[place],
            save=save,
            seed=None if seed is None else seed + number,
        )
        tapes.append(tape)
        yield steps, y, partial(_backward, layer, tuple(tapes))


def _backward(
    layer: Recurrent[Any],
    tapes: tuple[Tape, ...],
    dy: Any = None,
    dstate: Any = None,
    *,
    need_x: bool = True,
    parameters: Any = True,
    max_norm: float | None = None,
    clip_value: float | None = None,
    clip_state: tuple[str, float] | None = None,
    into: Grads | None = None,
) -> Grads:
    """Gradients of the last of these chunks, through those before it."""
    limits = Limits(max_norm, clip_value, into)
    *earlier, last = tapes
    grads = layer.backward(last, dy, dstate, need_x=need_x, parameters=parameters, clip_state=clip_state)
    for tape in reversed(earlier):
        before = layer.backward(tape, None, grads.state, need_x=False, parameters=parameters, clip_state=clip_state)
        for name, gradient in before.parameters.items():
            gradient += grads.parameters[name]
        grads = Grads(grads.x, before.state, before.parameters)
    return limits.finish(grads)
