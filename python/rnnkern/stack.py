"""A stack of layers and directions: its sizes, its order, and the walk over it for backends that run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cells import Cell

__all__ = [
    "BIASES",
    "Backward",
    "Forward",
    "GivenState",
    "LayerSizes",
    "Stack",
    "State",
    "Weights",
    "backward_by_layer",
    "cuts",
    "forward_by_layer",
]

BIASES = ("b_ih", "b_hh")

Array = NDArray[Any]
Wanted = Collection[str]  # the names of the weights of a layer-direction that get a gradient
Weights = Mapping[str, Array]  # of one layer-direction: w_ih, w_hh and, where it has them, b_ih, b_hh, w_hr, extras
State = tuple[Array, ...]  # one array a state, h first
GivenState = tuple[Array | None, ...]  # None in place of one: zeros


class Forward(NamedTuple):
    """What a forward is asked for. Only y is written to."""

    x: Array  # (T, B, I), with offsets or sizes (N, I)
    state: GivenState | None  # of `Stack.state_shapes(B)`; None: zeros
    y: Array  # like x, (.., D*P), to be filled
    save: str | None = None  # what to keep for backward: "gates" or "outputs"; None: nothing
    lengths: Array | None = None  # int64 (B,)
    resets: Array | None = None  # bool, like x without its last dimension
    masks: Sequence[Array] | None = None  # one scaled array like y for each layer but the last; only with `save`
    reserve: Any = None  # what the backend's `reserve` made: memory that calls leave for those after them
    offsets: Array | None = None  # int64 (B + 1,): sequence b has the rows offsets[b] to offsets[b + 1] of x
    sizes: Array | None = None  # int64 (T,): so many sequences, the longest first, have step t; its rows come together

    @property
    def batch(self) -> int:
        """B."""
        if self.offsets is not None:
            return len(self.offsets) - 1
        if self.sizes is not None:
            return int(self.sizes[0]) if len(self.sizes) else 0
        batch: int = self.x.shape[1]
        return batch

    @property
    def packing(self) -> Packing | None:
        """Where rows stand that have no padding between them; None where x is (T, B, I)."""
        if self.offsets is not None:
            return Packing.of_offsets(self.offsets)
        return None if self.sizes is None else Packing.of_sizes(self.sizes)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.x) if self.packing is None else self.packing.steps


class Packing(NamedTuple):
    """Rows of sequences of different lengths, without padding, as they stand in arrays of N rows."""

    lengths: Array  # int64 (B,)
    of_step: Array  # int64 (N,): t of each row
    of_batch: Array  # int64 (N,): b

    @classmethod
    def of_offsets(cls, offsets: Array) -> Packing:
        """Sequence after sequence."""
        lengths = np.diff(offsets)
        of_step = np.arange(lengths.sum()) - np.repeat(offsets[:-1], lengths)
        return cls(lengths, of_step, np.repeat(np.arange(len(lengths)), lengths))

    @classmethod
    def of_sizes(cls, sizes: Array) -> Packing:
        """Step after step, the longest sequences first."""
        of_batch = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        lengths = np.bincount(of_batch, minlength=int(sizes[0]) if len(sizes) else 0)
        return cls(lengths, np.repeat(np.arange(len(sizes)), sizes), of_batch)

    @property
    def steps(self) -> int:
        """T, of the longest."""
        return int(self.lengths.max(initial=0))

    def spread(self, rows: Array) -> Array:
        """A copy (T, B, .) with zeros past the ends."""
        array = np.zeros((self.steps, len(self.lengths), *rows.shape[1:]), rows.dtype)
        array[self.of_step, self.of_batch] = rows
        return array

    def gather(self, array: Array) -> Array:
        """The way back, a copy."""
        rows: Array = array[self.of_step, self.of_batch]
        return rows

    def padded(self, call: Forward) -> Forward:
        """The same request with lengths, for loops that know no other rows; a new y."""
        return call._replace(
            x=self.spread(call.x),
            y=self.spread(call.y),
            lengths=self.lengths,
            resets=None if call.resets is None else self.spread(call.resets),
            masks=None if call.masks is None else [self.spread(one) for one in call.masks],
            offsets=None,
            sizes=None,
        )


class Backward(NamedTuple):
    """What a backward is asked for."""

    dy: Array | None  # like y; None: zeros
    dstate: GivenState | None  # of the final state; None: zeros
    need_x: bool = True
    wanted: Sequence[Wanted] | None = None  # for each layer-direction the weights that get a gradient; None: all
    sums: Sequence[dict[str, Array]] | None = None  # what an earlier backward returned of the weights: to be added to
    need_state: bool = True  # where not, and not x, layers below the lowest with wanted weights take no part
    # What bounds each row of the gradients of the states after each step, dy added: its "norm" or each "value".
    bound: tuple[str, float] | None = None
    # For each layer-direction (states + gates, T, B), to be filled with the norms of these, before they
    # are bounded, and with the share of the units where each gate is saturated; zero past a row's end.
    flow: Sequence[Array] | None = None
    dx: Array | None = None  # what the gradient of x is added to; None: a new array

    def added(self, dx: Array) -> Array:
        """A gradient of x, with what it is to be added to."""
        return dx if self.dx is None else np.add(self.dx, dx, out=self.dx)

    def lowest(self, stack: Stack) -> int:
        """The lowest layer of which a gradient is wanted, or the flow; L where none is."""
        if self.need_x or self.need_state or self.wanted is None or self.flow is not None:
            return 0
        asked = (index for index, names in enumerate(self.wanted) if names)
        return next(asked, len(stack.layers)) // len(stack.directions)


@dataclass(frozen=True)
class LayerSizes:
    """One layer-direction of a stack: I inputs, H hidden units, P elements of h, and which way it runs."""

    cell: Cell
    input_size: int
    hidden_size: int
    state_size: int
    reverse: bool

    def weight_shapes(self, bias: bool, projection: bool) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights, in the order in which initial values are drawn."""
        rows = len(self.cell.gates) * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "w_ih": (rows, self.input_size),
            "w_hh": (rows, self.state_size),
        }
        if bias:
            shapes |= dict.fromkeys(BIASES, (rows,))
        if projection:
            shapes["w_hr"] = (self.state_size, self.hidden_size)
        return shapes | dict.fromkeys(self.cell.extras, (self.hidden_size,))


@dataclass(frozen=True)
class Stack:
    """L layers of D directions of one cell. Index of a layer-direction: l * D + d."""

    cell: Cell
    input_size: int
    hidden_size: int
    proj_size: int = 0  # P where positive; 0: no projection
    num_layers: int = 1
    directions: tuple[bool, ...] = (False,)  # of each direction: does it run in reverse?
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    stored: str = ""  # what packed weights are stored in where that is not dtype: "bfloat16", whose values they are
    precision: str = "float32"  # "bfloat16": what the operands of every product are rounded to
    arithmetic: str = "fma"  # "amx": products of floats are a matrix engine's

    @cached_property
    def format(self) -> str:
        """The name of the format of packed weights."""
        return self.stored or self.dtype.name

    @property
    def rounds(self) -> bool:
        """Whether the operands of products are rounded to bfloat16."""
        return self.precision == "bfloat16"

    @property
    def engines(self) -> bool:
        """Whether products of floats are a matrix engine's."""
        return self.arithmetic == "amx"

    @cached_property
    def description(self) -> tuple[str, str, bool, bool, int, int, int, int, tuple[bool, ...]]:
        """What compiled code is told: cell, format, whether operands are rounded, whether engines multiply, sizes and
        directions."""
        sizes = self.input_size, self.hidden_size, self.proj_size, self.num_layers
        return self.cell.name, self.format, self.rounds, self.engines, *sizes, self.directions

    @cached_property
    def weight_shapes(self) -> tuple[list[dict[str, tuple[int, ...]]], ...]:
        """Those of each layer-direction: without biases, and with them."""
        return tuple([one.weight_shapes(bias, self.proj_size > 0) for one in self.layers] for bias in (False, True))

    @cached_property
    def weight_names(self) -> tuple[tuple[str, ...], ...]:
        """Of a layer-direction, in the order of `LayerSizes.weight_shapes`: without biases, and with them."""
        return tuple(tuple(shapes[0]) for shapes in self.weight_shapes)

    @property
    def state_size(self) -> int:
        """P, the elements of h."""
        return self.proj_size or self.hidden_size

    @property
    def output_size(self) -> int:
        """D * P, the elements of y at a step."""
        return len(self.directions) * self.state_size

    @cached_property
    def layers(self) -> list[LayerSizes]:
        """The layer-directions in the order of their index."""
        return [
            LayerSizes(
                self.cell,
                self.input_size if layer == 0 else self.output_size,
                self.hidden_size,
                self.state_size,
                reverse,
            )
            for layer in range(self.num_layers)
            for reverse in self.directions
        ]

    @property
    def flops(self) -> int:
        """Additions and multiplications of forward's products in a row of one step; backward has twice as many."""
        matrices = [
            shape
            for sizes in self.layers
            for shape in sizes.weight_shapes(False, self.proj_size > 0).values()
            if len(shape) == 2
        ]
        return sum(2 * rows * columns for rows, columns in matrices)

    def state_shapes(self, batch: int) -> tuple[tuple[int, int, int], ...]:
        """Shape of each state: (L*D, B, P) for h, (L*D, B, H) for the others."""
        count = self.num_layers * len(self.directions)
        sizes = [self.state_size] + [self.hidden_size] * (len(self.cell.states) - 1)
        return tuple((count, batch, size) for size in sizes)

    def filled(self, state: GivenState | None, batch: int, dtype: np.dtype[Any] | None = None) -> State:
        """A state with zeros for what is None; in `dtype`, by default that of the stack."""
        shapes = self.state_shapes(batch)
        given = state or (None,) * len(shapes)
        dtype = dtype or self.dtype
        return tuple([np.zeros(shape, dtype) if one is None else one for one, shape in zip(given, shapes, strict=True)])


def cuts(resets: Array | None, lengths: Array | None, reverse: bool) -> Array | None:
    """Where a direction starts from zeros instead of the state that reaches it, bool (T, B).

    A reset at t cuts the link t-1 -> t. Forward meets the cut when it enters t, reverse when it enters t-1 coming from
    t; there it counts only if t still belongs to the row.
    """
    if resets is None or not reverse:
        return resets
    cut = np.zeros_like(resets)
    cut[:-1] = resets[1:]
    if lengths is not None and len(cut):
        cut &= np.arange(1, len(cut) + 1)[:, None] < lengths
    return cut


ForwardLayer = Callable[..., tuple[State, Any]]
BackwardLayer = Callable[..., tuple[Array | None, State, dict[str, Array]]]


def forward_by_layer(
    forward_layer: ForwardLayer, stack: Stack, weights: Sequence[Weights], call: Forward
) -> tuple[State, list[Any]]:
    """Run a stack with `forward_layer(sizes, weights, x, state, lengths, cut, y) -> (state, saved)`.

    `forward_layer` writes its direction's columns of its own y (T, B, P), zeros past a row's end. Returns the final
    state and what `backward_by_layer` wants.
    """
    packing = call.packing
    if packing is not None:
        padded = packing.padded(call)
        found = forward_by_layer(forward_layer, stack, weights, padded)
        call.y[...] = packing.gather(padded.y)
        return found
    x = call.x
    state = stack.filled(call.state, x.shape[1], x.dtype)
    final = tuple(np.empty_like(s) for s in state)
    saved: list[Any] = []
    directions = len(stack.directions)
    sizes = stack.layers
    for layer in range(stack.num_layers):
        last = layer == stack.num_layers - 1
        output = call.y if last else np.empty((*x.shape[:2], stack.output_size), x.dtype)
        for direction, reverse in enumerate(stack.directions):
            index = layer * directions + direction
            columns = output[:, :, direction * stack.state_size : (direction + 1) * stack.state_size]
            new, kept = forward_layer(
                sizes[index],
                weights[index],
                x,
                tuple(s[index] for s in state),
                call.lengths,
                cuts(call.resets, call.lengths, reverse),
                columns,
            )
            saved.append((x, kept))
            for all_layers, one in zip(final, new, strict=True):
                all_layers[index] = one
        x = output * call.masks[layer] if call.masks is not None and not last else output
    return final, saved


def backward_by_layer(
    backward_layer: BackwardLayer,
    stack: Stack,
    weights: Sequence[Weights],
    saved: Sequence[Any],
    call: Forward,
    asked: Backward,
) -> tuple[Array | None, State, list[dict[str, Array]]]:
    """Mirror of `forward_by_layer`, with

    `backward_layer(sizes, weights, x, saved, lengths, cut, dy, dstate, wanted, need_x) -> (dx, dstate, gradients)`,
    which is also given `bound` and its array of `flow` where these are asked for.

    Returns dx like x, None unless asked for, the gradients of the initial state, () unless asked for, and those of
    the wanted weights of each layer-direction.
    """
    dy, packing = asked.dy, call.packing
    if packing is not None:
        padded, places = packing.padded(call), (slice(None), packing.of_step, packing.of_batch)
        flow = (
            None if asked.flow is None else [np.zeros((len(one), *padded.x.shape[:2]), one.dtype) for one in asked.flow]
        )
        spread = asked._replace(dy=None if dy is None else packing.spread(dy), flow=flow, dx=None)
        dx, initial, gradients = backward_by_layer(backward_layer, stack, weights, saved, padded, spread)
        for one, of_padded in zip(asked.flow or (), flow or (), strict=True):
            one[...] = of_padded[places]
        return None if dx is None else asked.added(packing.gather(dx)), initial, gradients
    dstate = stack.filled(asked.dstate, call.x.shape[1], call.x.dtype)
    initial = tuple(np.empty_like(s) for s in dstate)
    directions = len(stack.directions)
    sizes = stack.layers
    gradients = [{} for _ in sizes]
    dx = None
    lowest = asked.lowest(stack)
    for layer in reversed(range(lowest, stack.num_layers)):
        dx = None
        for direction, reverse in enumerate(stack.directions):
            index = layer * directions + direction
            x, kept = saved[index]
            watch: dict[str, Any] = {} if asked.bound is None else {"bound": asked.bound}
            if asked.flow is not None:
                watch["flow"] = asked.flow[index]
            part, new, gradients[index] = backward_layer(
                sizes[index],
                weights[index],
                x,
                kept,
                call.lengths,
                cuts(call.resets, call.lengths, reverse),
                None if dy is None else dy[:, :, direction * stack.state_size : (direction + 1) * stack.state_size],
                tuple(s[index] for s in dstate),
                None if asked.wanted is None else asked.wanted[index],
                asked.need_x or layer > lowest,
                **watch,
            )
            dx = part if dx is None or part is None else dx + part
            for all_layers, one in zip(initial, new, strict=True):
                all_layers[index] = one
        dy = dx * call.masks[layer - 1] if call.masks is not None and layer > 0 and dx is not None else dx
    if asked.sums is not None:
        for sums, added in zip(asked.sums, gradients, strict=True):
            for name, gradient in added.items():
                sums[name] += gradient
        gradients = list(asked.sums)
    return None if dx is None else asked.added(dx), initial if asked.need_state else (), gradients
