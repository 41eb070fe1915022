"""What both Numba backends run: the time loops of a layer-direction, and a cell's functions on the units of a row.

The loops are plain Python over what they are given: `assign`, `product` and the functions of a cell. A CPU interprets
them, with NumPy's products and compiled functions that take all rows of a step; for a GPU they are compiled whole, with
functions that take the one row of a block, whose elements its threads share.

Functions of a cell work on a tile, which has a slot of as many units for each gate, state, extra and saved value, so
that LLVM sees that what they read and write does not overlap, and vectorises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..cells import Cell

__all__ = ["Arrays", "Function", "Target", "loop", "row_functions", "slots"]

Function = Callable[..., Any]


class Arrays(NamedTuple):
    """What a loop works on; G gates, S states, V saved values, E extras.

    In backward gates, recurrent, state, scaled and y are the gradients of those, and matrices are not transposed. What
    forward keeps for it has T = 1 where no backward follows.
    """

    gates: Any  # (T, B, G*H): W_ih x + b_ih
    recurrent: Any  # (B, G*H): W_hh h + b_hh of a step; in backward (T, B, G*H)
    state: Any  # (B, S*H); h is in the first P columns of its H
    before: Any  # kept (T, B, S*H): the state before each step
    values: Any  # kept (T, B, V*H): what the cell saves
    scaled: Any  # kept (T, B, H): what late gates multiply, no columns without them; in backward (B, H)
    hidden: Any  # kept (T, B, H): h before the projection; no columns without one
    y: Any  # (T, B, P); in backward the loop adds what comes from later steps, where there is a projection
    early: Any  # (P, gates without the late ones * H)
    late: Any  # (H, late gates * H)
    projection: Any  # (H, P)
    b_hh: Any  # (1, G*H)
    extra: Any  # (1, E*H)
    dextra: Any  # (T, B, E*H): its gradients
    zero: Any  # (1, S*H)
    active: Any  # bool (T, B): before the end of a row
    cut: Any  # bool (T, B): active and starts from zeros; (0, B) without resets


def loop(forward: bool, where: Function, assign: Function, product: Function, cell: Sequence[Function]) -> Function:
    """A loop of functions that do nothing in the rows where a mask, `where` of booleans (B,), is False:

    assign(out, source, mask, add)              out = source, or out += source; source may have one row for all
    product(out, source, weights, add, mask)    out = source @ weights + add; add may have one row for all
    cell: `step` and, where the cell has it, `prepare` (H, rows, inputs, outputs), on matrices; see `row_functions`
    """
    two_products, step, prepare = len(cell) > 1, cell[0], cell[-1]

    def forward_loop(H: Any, steps: Any, a: Any) -> None:
        """steps: first, last and stride."""
        P, E = a.early.shape
        h, early, late = a.state[:, :P], a.recurrent[:, :E], a.recurrent[:, E:]
        b_early, b_late, no_bias = a.b_hh[:, :E], a.b_hh[:, E:], a.zero[:, :P]
        for t in range(steps[0], steps[1], steps[2]):
            rows, kept = a.active[t], t if len(a.before) > 1 else 0
            mask, before, scaled, hidden = where(rows), a.before[kept], a.scaled[kept], a.hidden[kept]
            if len(a.cut) > 0:
                assign(a.state, a.zero, where(a.cut[t]), False)
            assign(before, a.state, mask, False)
            inputs, outputs = (a.gates[t], a.recurrent, a.extra, before), (scaled, a.state, a.values[kept])
            product(early, before[:, :P], a.early, b_early, mask)
            if two_products:
                prepare(H, rows, inputs, outputs)
                product(late, scaled, a.late, b_late, mask)
            step(H, rows, inputs, outputs)
            if hidden.shape[1] > 0:
                assign(hidden, a.state[:, :H], mask, False)
                product(h, hidden, a.projection, no_bias, mask)
            assign(a.y[t], h, mask, False)

    def backward_loop(H: Any, steps: Any, a: Any) -> None:
        E, P = a.early.shape
        h, units, nothing = a.state[:, :P], a.state[:, :H], a.zero[:, :H]
        for t in range(steps[0], steps[1], steps[2]):
            rows, recurrent = a.active[t], a.recurrent[t]
            mask = where(rows)
            assign(h, a.y[t], mask, True)
            if len(a.projection) > 0:
                assign(a.y[t], h, mask, False)
                product(units, a.y[t], a.projection, nothing, mask)
            inputs = (a.values[t], a.extra, a.before[t], a.state, a.scaled)
            outputs = (a.gates[t], recurrent, a.state, a.dextra[t])
            step(H, rows, inputs, outputs)
            if two_products:
                product(a.scaled, recurrent[:, E:], a.late, nothing, mask)
                prepare(H, rows, inputs, outputs)
            product(h, recurrent[:, :E], a.early, h, mask)
            if len(a.cut) > 0:
                assign(a.state, a.zero, where(a.cut[t]), False)

    return forward_loop if forward else backward_loop


@dataclass(frozen=True)
class Target:
    """What a CPU or a GPU has its own way of."""

    units: int  # of a slot
    compiled: Callable[[Function], Function]  # makes a function that compiled ones can call
    inlined: Callable[[Function], Function]  # for a function of one unit
    lanes: Function  # (tile, u, a, b, c) -> of unit u three vectors over slots, those from a, b and c on
    activations: Callable[[np.dtype[Any]], tuple[Function, Function]]  # sigmoid and tanh


def slots(cell: Cell) -> int:
    """Slots of a tile, for either direction."""
    return 2 * len(cell.gates) + 3 * len(cell.states) + 2 * len(cell.extras) + len(cell.saved) + 1


def row_functions(cell: Cell, dtype: np.dtype[Any], forward: bool, target: Target) -> list[Function]:
    """`step` and, where a cell has it, `prepare`, not compiled yet:

    function(tile, H, place, rows, inputs, outputs)

    place is (first row, last row, first unit, stride of units); inputs and outputs are matrices (B, n*H), or (1, n*H)
    where all rows have the same.
    """
    units, move, two_products = target.units, _move(target), cell.late_gates > 0

    def on_rows(tile_function: Function) -> Function:
        # Keep the names of all cells apart: a symbol of Numba is the name and a number, which another process gives to
        # another function, and of two from the cache with one symbol the first would run for both.
        name = f"{cell.name}_{'forward' if forward else 'backward'}_{tile_function.__name__}"
        tile_function.__qualname__ = name
        on_tile = target.compiled(tile_function)

        def function(tile: Any, H: Any, place: Any, rows: Any, inputs: Any, outputs: Any) -> None:
            for b in range(place[0], place[1]):
                for unit in range(place[2], H if rows[b] else 0, place[3]):
                    width, slot = H - unit if H - unit < units else units, 0
                    for matrix in inputs:
                        slot = move(tile, slot, matrix, H, b, unit, width, False)
                    first_output = slot
                    if two_products:  # each adds to what the other leaves
                        for matrix in outputs:
                            slot = move(tile, slot, matrix, H, b, unit, width, False)
                    on_tile(tile, width)
                    slot = first_output
                    for matrix in outputs:
                        slot = move(tile, slot, matrix, H, b, unit, width, True)

        function.__qualname__ = f"{name}_on_rows"
        return function

    tile_functions = (_forward if forward else _backward)(cell, dtype, target)
    return [on_rows(function) for function in tile_functions]


@lru_cache
def _move(target: Target) -> Function:
    units = target.units

    def move(tile: Any, slot: Any, matrix: Any, H: Any, b: Any, unit: Any, width: Any, store: Any) -> Any:
        """Loads units of a row into slots of the tile, or stores them; gives the slot after those."""
        row, count = matrix[b if len(matrix) > 1 else 0], matrix.shape[1] // H
        for i in range(count):
            first = i * H + unit
            vector, part = row[first : first + width], tile[(slot + i) * units : (slot + i) * units + width]
            if store:
                vector, part = part, vector
            for u in range(width):  # from 0, so that no index can be negative
                part[u] = vector[u]
        return slot + count

    return target.compiled(move)


def _math(cell: Cell, dtype: np.dtype[Any], target: Target) -> Any:
    """A `CellMath`: the functions of a cell on one unit, to be called by compiled ones."""
    one, zero = dtype.type(1), dtype.type(0)  # of the dtype, so that float32 does not widen

    def relu(a: Any) -> Any:
        return zero if a <= zero else a  # NaN stays NaN

    def relu_gradient(h: Any) -> Any:
        return one if h > zero else (zero if h <= zero else h)  # NaN stays NaN

    sigmoid, tanh = target.activations(dtype)
    functions: Any = {"relu": target.inlined(relu), "relu_gradient": target.inlined(relu_gradient)}
    elementwise: Any = SimpleNamespace(one=one, zero=zero, sigmoid=sigmoid, tanh=tanh, **functions)
    return SimpleNamespace(**{name: one and target.inlined(one) for name, one in vars(cell.math(elementwise)).items()})


def _offsets(target: Target, counts: Iterable[int]) -> list[int]:
    """Where in a tile those begin that have so many slots, one after the other."""
    return [slot * target.units for slot in accumulate(counts, initial=0)]


def _forward(cell: Cell, dtype: np.dtype[Any], target: Target) -> list[Function]:
    """`step` and `prepare` on the first units of a tile, with slots as `forward_loop` has inputs and outputs."""
    math, lanes, G, S = _math(cell, dtype, target), target.lanes, len(cell.gates), len(cell.states)
    counts = G, G, len(cell.extras), S, int(cell.late_gates > 0), S
    step_of_unit, prepare_unit = math.forward, math.prepare
    X, R, EXTRA, PREV, SCALED, NEW, SAVED = _offsets(target, counts)

    def step(tile: Any, width: int) -> None:
        for u in range(width):
            x, r, extra = lanes(tile, u, X, R, EXTRA)
            prev, new, saved = lanes(tile, u, PREV, NEW, SAVED)
            step_of_unit(x, r, extra, prev, new, saved)

    def prepare(tile: Any, width: int) -> None:
        for u in range(width):
            x, r, prev = lanes(tile, u, X, R, PREV)
            scaled, saved, _ = lanes(tile, u, SCALED, SAVED, SAVED)
            prepare_unit(x, r, prev, scaled, saved)

    return [step, prepare] if cell.late_gates else [step]


def _backward(cell: Cell, dtype: np.dtype[Any], target: Target) -> list[Function]:
    """The same for `backward_loop`."""
    math, lanes, G, S = _math(cell, dtype, target), target.lanes, len(cell.gates), len(cell.states)
    counts = len(cell.saved), len(cell.extras), S, S, int(cell.late_gates > 0), G, G, S
    step_of_unit, prepare_unit = math.backward, math.prepare_backward
    SAVED, EXTRA, PREV, DNEW, DSCALED, DX, DR, DPREV, DEXTRA = _offsets(target, counts)

    def step(tile: Any, width: int) -> None:
        for u in range(width):
            saved, extra, prev = lanes(tile, u, SAVED, EXTRA, PREV)
            dnew, dx, dr = lanes(tile, u, DNEW, DX, DR)
            dprev, dextra, _ = lanes(tile, u, DPREV, DEXTRA, DEXTRA)
            step_of_unit(saved, extra, prev, dnew, dx, dr, dprev, dextra)

    def prepare(tile: Any, width: int) -> None:
        for u in range(width):
            saved, prev, dscaled = lanes(tile, u, SAVED, PREV, DSCALED)
            dx, dr, dprev = lanes(tile, u, DX, DR, DPREV)
            prepare_unit(saved, prev, dscaled, dx, dr, dprev)

    return [step, prepare] if cell.late_gates else [step]
