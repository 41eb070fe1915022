"""`save="checkpoint"`: states between segments of steps; backward runs each segment's forward once more.

Chen et al. 2016, "Training deep nets with sublinear memory cost"; for recurrent networks Gruslys et al. 2016. With
segments of sqrt(T) steps what is kept between the calls and what backward works in grow as sqrt(T) does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .stack import Backward, Forward, GivenState, Stack, State, Weights

__all__ = ["Chain", "Checkpoints", "Masks", "backward", "chains_of", "forward", "segment_steps"]

Array = NDArray[Any]
Masks = Callable[[int, int | None], Sequence[Array]]  # of the steps [first, last), of each layer but the last


# Of a segment, whatever the steps: a sum of outer products over fewer rows takes its time for loading the sums.
FEWEST_ROWS = 64


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """What `forward` leaves for `backward`."""

    states: Sequence[Sequence[GivenState | None]]  # of each chain before each segment, in the order in which they run
    inputs: Sequence[Array]  # x of each layer of chains but the first
    masks: Masks | None  # draws those of dropout again


class Chain(NamedTuple):
    """What goes through the steps together, in one order."""

    stack: Stack
    own: slice  # its layer-directions among those of the whole stack
    columns: slice  # of y


def chains_of(stack: Stack) -> list[list[Chain]]:
    """The whole stack; of two directions, which meet the steps in opposite orders, each layer-direction, by layer."""
    if len(stack.directions) == 1:
        return [[Chain(stack, slice(None), slice(None))]]
    width, of_layers = stack.state_size, len(stack.directions)
    alone = [replace(stack, input_size=one.input_size, num_layers=1, directions=(one.reverse,)) for one in stack.layers]
    chains = [
        Chain(one, slice(i, i + 1), slice(i % of_layers * width, (i % of_layers + 1) * width))
        for i, one in enumerate(alone)
    ]
    return [chains[i : i + of_layers] for i in range(0, len(chains), of_layers)]


def segment_steps(steps: int, batch: int) -> int:
    """The steps of a segment, of which the last may have fewer."""
    return max(min(max(math.isqrt(steps), -(-FEWEST_ROWS // max(batch, 1))), steps), 1)


def forward(
    backend: ModuleType, stack: Stack, weights: Sequence[Weights], call: Forward, masks: Masks | None
) -> tuple[Any, State, Checkpoints]:
    """The packed weights of each chain, the final state, and what `backward` needs."""
    layers = chains_of(stack)
    masks_of_chain, between = (masks, None) if len(layers) == 1 else (None, masks)
    packed: list[Any] = []
    final: list[State] = []
    states: list[Sequence[GivenState | None]] = []
    inputs: list[Array] = []
    for number, chains in enumerate(layers):
        y = call.y if number == len(layers) - 1 else np.empty_like(call.y)
        for chain in chains:
            packed.append(backend.pack(chain.stack, weights[chain.own], True))
            of_chain = call._replace(state=_of(call.state, chain.own), y=y[..., chain.columns])
            last, kept = _forward(backend, chain, packed[-1], of_chain, masks_of_chain)
            final.append(last)
            states.append(kept)
        if y is not call.y:
            _drop_out(call, y, between, number)
            inputs.append(y)
            call = call._replace(x=y)
    return packed, _whole(final), Checkpoints(states, inputs, masks)


def _forward(
    backend: ModuleType, chain: Chain, packed: Any, call: Forward, masks: Masks | None
) -> tuple[State, list[GivenState | None]]:
    """The final state of a chain, and those before its segments; fills y."""
    states: list[GivenState | None] = []
    state: GivenState | None = call.state
    for first, last in _segments(chain.stack, call):
        state = _cut(chain.stack, call, state, last)
        states.append(state)
        # A backend that applies masks keeps what it has made with them, here until the next segment.
        part = _part(call, first, last, state, masks, None if masks is None else "outputs")
        if not part.y.flags.c_contiguous:
            part = part._replace(y=np.empty(part.y.shape, part.y.dtype))
        state = backend.forward(chain.stack, packed, part)[0]
        if not np.may_share_memory(part.y, call.y):
            call.y[_rows(call, first, last)] = part.y
    return chain.stack.filled(state, call.batch), states


def backward(
    backend: ModuleType, stack: Stack, packed: Any, saved: Checkpoints, call: Forward, asked: Backward
) -> tuple[Array | None, State, Any]:
    """As of a backend: gradients of x, of the initial state and of the wanted weights of each layer-direction."""
    layers = chains_of(stack)
    masks, between = (saved.masks, None) if len(layers) == 1 else (None, saved.masks)
    initial: list[State] = [()] * len(packed)
    gradients: list[dict[str, Array]] = [{} for _ in stack.layers]
    dy, dx = asked.dy, None
    for number, chains in reversed(list(enumerate(layers))):
        x = saved.inputs[number - 1] if number else call.x
        dx = np.empty_like(x) if number or asked.need_x else None
        for i, chain in enumerate(chains):
            at = number * len(chains) + i
            of_chain = call._replace(x=x, y=call.y[..., chain.columns])
            asked_of_chain = asked._replace(
                dy=None if dy is None else dy[..., chain.columns],
                dstate=_of(asked.dstate, chain.own),
                wanted=None if asked.wanted is None else asked.wanted[chain.own],
                flow=None if asked.flow is None else asked.flow[chain.own],
            )
            initial[at], gradients[chain.own] = _backward(
                backend, chain, packed[at], saved.states[at], masks, of_chain, asked_of_chain, dx, i > 0
            )
        if number and dx is not None:
            _drop_out(call, dx, between, number - 1)
        dy = dx
    return dx, _whole(initial), gradients


def _backward(
    backend: ModuleType,
    chain: Chain,
    packed: Any,
    states: Sequence[GivenState | None],
    masks: Masks | None,
    call: Forward,
    asked: Backward,
    dx: Array | None,
    add: bool,
) -> tuple[State, Any]:
    """The gradients of the initial state and of the weights of a chain; fills dx, or adds to it."""
    stack, dstate, sums = chain.stack, asked.dstate, None
    segments = list(_segments(stack, call))
    for (first, last), state in zip(reversed(segments), reversed(states), strict=True):
        part = _part(call, first, last, state, masks, "gates")
        rows = _rows(call, first, last)
        dy = None if asked.dy is None else np.ascontiguousarray(asked.dy[rows])
        of_segment = asked._replace(dy=dy, dstate=dstate, need_x=dx is not None, need_state=True, sums=sums)
        dstate, sums = _run_segment(backend, stack, packed, part, of_segment, dx, rows, add)
        dstate = _cut(stack, call, dstate, last)
    return stack.filled(dstate, call.batch), sums


def _run_segment(
    backend: ModuleType,
    stack: Stack,
    packed: Any,
    part: Forward,
    asked: Backward,
    dx: Array | None,
    rows: Any,
    add: bool,
) -> tuple[State, Any]:
    """The gradients of the state before a segment and of the weights; fills its rows of dx, or adds to them, and of
    flow. What is kept of the segment goes.
    """
    part = part._replace(y=np.empty(part.y.shape, part.y.dtype))  # the tape's is left alone
    kept = backend.forward(stack, packed, part)[1]
    flow = None if asked.flow is None else [one[:, rows].copy() for one in asked.flow]
    sum_of_dx = dx[rows] if add and dx is not None else None  # the backend adds as it does between directions
    dx_part, dstate, sums = backend.backward(stack, packed, kept, part, asked._replace(flow=flow, dx=sum_of_dx))
    if dx is not None and dx_part is not None and not np.may_share_memory(dx_part, dx):
        dx[rows] = dx_part
    for whole, of_part in zip(asked.flow or (), flow or (), strict=True):
        whole[:, rows] = of_part
    return dstate, sums


def _of(state: GivenState | None, own: slice) -> GivenState | None:
    """That of some layer-directions."""
    return None if state is None else tuple([None if one is None else one[own] for one in state])


def _whole(states: Sequence[State]) -> State:
    """One state from those of all chains."""
    return states[0] if len(states) == 1 else tuple(map(np.concatenate, zip(*states, strict=True)))


def _drop_out(call: Forward, y: Array, masks: Masks | None, layer: int) -> None:
    """Multiply, in place, what is between two layers, or its gradient, with its mask, which is never there at once."""
    if masks is None:
        return
    size = segment_steps(call.steps, call.batch)
    for first in range(0, call.steps, size):
        last = min(first + size, call.steps)
        y[_rows(call, first, last)] *= masks(first, last)[layer]


def _segments(stack: Stack, call: Forward) -> Iterator[tuple[int, int]]:
    """The first step of each segment and the one behind its last, in the order in which they run."""
    steps = call.steps
    size = segment_steps(steps, call.batch)
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
