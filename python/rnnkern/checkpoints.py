"""`save="checkpoint"`: states between segments of steps; backward runs each segment's forward once more.

Chen et al. 2016, "Training deep nets with sublinear memory cost"; for recurrent networks Gruslys et al. 2016. With
segments of sqrt(T) steps what is kept between the calls and what backward works in grow as sqrt(T) does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .stack import Backward, Forward, GivenState, Stack, State, Weights

__all__ = ["Checkpoints", "Masks", "backward", "forward", "segment_steps"]

Array = NDArray[Any]
Masks = Callable[[int, int | None], Sequence[Array]]  # of the steps [first, last), of each layer but the last


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """What `forward` leaves for `backward`: the states before each segment, in the order in which they run."""

    states: Sequence[GivenState | None]
    masks: Masks | None  # draws those of dropout again


def segment_steps(steps: int) -> int:
    """The steps of a segment, of which the last may have fewer."""
    return max(math.isqrt(steps), 1)


def forward(
    backend: ModuleType, stack: Stack, weights: Sequence[Weights], call: Forward, masks: Masks | None
) -> tuple[Any, State, Checkpoints]:
    """The packed weights, the final state, and what `backward` needs."""
    packed = backend.pack(stack, weights, True)
    states: list[GivenState | None] = []
    state: GivenState | None = call.state
    for first, last in _segments(stack, call.steps):
        state = _cut(stack, call, state, last)
        states.append(state)
        # A backend that applies masks keeps what it has made with them, here until the next segment.
        part = _part(call, first, last, state, masks, None if masks is None else "outputs")
        state = backend.forward(stack, packed, part)[0]
        if call.offsets is not None:
            call.y[_rows(call, first, last)] = part.y
    return packed, stack.filled(state, call.batch), Checkpoints(states, masks)


def backward(
    backend: ModuleType, stack: Stack, packed: Any, saved: Checkpoints, call: Forward, asked: Backward
) -> tuple[Array | None, State, Any]:
    """As of a backend: gradients of x, of the initial state and of the wanted weights of each layer-direction."""
    dx = np.empty_like(call.x) if asked.need_x else None
    dstate = asked.dstate
    sums = None
    segments = list(_segments(stack, call.steps))
    for (first, last), state in zip(reversed(segments), reversed(saved.states), strict=True):
        part = _part(call, first, last, state, saved.masks, "gates")
        rows = _rows(call, first, last)
        dy = None if asked.dy is None else asked.dy[rows]
        of_part = asked._replace(dy=dy, dstate=dstate, sums=sums, need_state=True)
        dstate, sums = _run_segment(backend, stack, packed, part, of_part, dx, rows)
        dstate = _cut(stack, call, dstate, last)
    return dx, stack.filled(dstate, call.batch), sums


def _run_segment(
    backend: ModuleType, stack: Stack, packed: Any, part: Forward, asked: Backward, dx: Array | None, rows: Any
) -> tuple[State, Any]:
    """The gradients of the state before a segment and of the weights; fills its rows of dx and flow. What is kept of
    the segment goes.
    """
    part = part._replace(y=np.empty_like(part.y))  # the tape's is left alone
    flow = asked.flow
    if flow is not None:
        asked = asked._replace(flow=[one[:, rows].copy() for one in flow])
    kept = backend.forward(stack, packed, part)[1]
    dx_part, dstate, sums = backend.backward(stack, packed, kept, part, asked)
    if dx is not None:
        dx[rows] = dx_part
    for whole, of_part in zip(flow or (), asked.flow or (), strict=True):
        whole[:, rows] = of_part
    return dstate, sums


def _segments(stack: Stack, steps: int) -> Iterator[tuple[int, int]]:
    """The first step of each segment and the one behind its last, in the order in which they run."""
    size = segment_steps(steps)
    firsts = range(0, steps, size)
    for first in reversed(firsts) if stack.directions[0] else firsts:
        yield first, min(first + size, steps)


def _part(
    call: Forward, first: int, last: int, state: GivenState | None, masks: Masks | None, save: str | None
) -> Forward:
    """The part of a forward that has the steps [first, last)."""
    rows, lengths, offsets = _rows(call, first, last), None, None
    if call.lengths is not None:
        lengths = np.clip(call.lengths - first, 0, last - first)
    if call.offsets is not None:
        offsets = np.cumsum([0, *np.clip(np.diff(call.offsets) - first, 0, last - first)])
    resets = None if call.resets is None else call.resets[rows]
    drawn = None if masks is None else masks(first, last)
    return Forward(call.x[rows], state, call.y[rows], save, lengths, resets, drawn, offsets=offsets)


def _rows(call: Forward, first: int, last: int) -> Any:
    """Which rows of x and y are those of the steps [first, last): of sequences without padding each by its number."""
    packing = call.packing
    if packing is None:
        return slice(first, last)
    return np.flatnonzero((packing.of_step >= first) & (packing.of_step < last))


def _cut(stack: Stack, call: Forward, state: Any, last: int) -> Any:
    """A state, or its gradient, between step `last` and the one before, in reverse: zero where a reset cuts that link.

    Forward a segment meets that reset itself, at its first step.
    """
    if not stack.directions[0] or call.resets is None or state is None or last == call.steps:
        return state
    packing = call.packing
    if packing is not None:
        cut = packing.spread(call.resets)[last]
    else:
        cut = call.resets[last] if call.lengths is None else call.resets[last] & (last < call.lengths)
    return tuple(None if one is None else np.where(cut[:, None], one.dtype.type(0), one) for one in state)
