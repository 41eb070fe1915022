"""The time loop of both Numba backends: plain Python that a `Target` compiles, and a step as a list of phases for it.

Every array is a matrix: step t and row b have its row t*B + b, or row b where only one step is kept. A row holds the
gates, saved values or extras one after the other, H columns each; of states the P columns of h and then the others. A
CPU runs all rows of a batch in one loop, a block of a GPU one row, whose elements its threads share.

A phase assigns rows, adds a product to them, or loads units into a tile, calls a function of the cell and stores them.
A tile has a slot of `units` elements for each gate, state, extra and saved value, so that LLVM sees arguments that do
not overlap, and vectorises. The loop knows neither cell nor direction: a CPU compiles it once a dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cells import Cell
from ..stack import LayerSizes

__all__ = ["ALL", "EACH", "Function", "Target", "backward_phases", "encode", "forward_phases", "loop", "tile_functions"]

Function = Callable[..., Any]
ONE, EACH, ALL = range(3)  # the row of an array for step t and batch row b: 0, b, t*B + b
ASSIGN, ADD, ASSIGN_UNLESS_CUT, PRODUCT, CALL = range(5)  # kinds of a phase, see `encode`
KIND, OUT, OUT_ROW, OUT_COLUMN, IN, IN_ROW, IN_COLUMN, MORE, STORES = range(9)  # columns of what it gives


def encode(names: Iterable[str], phases: Iterable[tuple[Any, ...]]) -> NDArray[np.int64]:
    """Phases for the loop, a line each. Rows are (name of an array, which of its rows, first column); a phase is

    (ASSIGN, ADD or ASSIGN_UNLESS_CUT, out rows, source rows, columns)
    (PRODUCT, out rows, source rows, weights): out += source @ weights, as many columns as these have
    (CALL, 0 or 1, loads, stores): of units in slots of a tile, (first slot, slots, rows), which are lines of their own
    """
    index: dict[Any, int] = {name: i for i, name in enumerate(names)}
    lines: list[tuple[int, ...]] = []
    for kind, out, source, more in phases:
        if kind == CALL:
            lines.append((CALL, out, 0, 0, 0, 0, 0, len(source), len(more)))
            lines += [(CALL, index[rows[0]], *rows[1:], slot, slots, 0, 0, 0) for slot, slots, rows in source + more]
        else:
            lines.append((kind, index[out[0]], *out[1:], index[source[0]], *source[1:], index.get(more, more), 0))
    return np.array(lines, np.int64)


@dataclass(frozen=True)
class Target:
    """What a CPU or a GPU has its own way of; functions are compiled ones, or what `compiled` makes of plain ones.

    place is (first row, last row, a thread, the number of threads that share the elements of a row).
    """

    units: int  # of a slot
    compiled: Callable[[Function], Function]  # to be called by compiled functions
    lane: Function  # (tile, offset) -> what has the elements at the offset and every `units` after it by their number
    assign: Function  # (place, out, source, add): out = source or out += source, vectors
    product: Function  # (place, t, lengths, out, row, column, source, row, column, weights), in rows before their end
    call: Function  # (first, second, which, tile, width): one of two functions of a cell on units of a tile
    wait: Function  # until all threads of a row have come here
    activations: Callable[[np.dtype[Any]], tuple[Function, Function]]  # sigmoid and tanh


def forward_slots(cell: Cell) -> list[int]:
    """Slots of x, r, extra, prev, new, saved and scaled in the tile of forward, and their number."""
    G, S, E, V = len(cell.gates), len(cell.states), len(cell.extras), len(cell.saved)
    return list(accumulate([G, G, E, S, S, V, 1], initial=0))


def backward_slots(cell: Cell) -> list[int]:
    """Slots of saved, extra, prev, dnew, dx, dr, dprev, dextra and dscaled, and their number."""
    G, S, E, V = len(cell.gates), len(cell.states), len(cell.extras), len(cell.saved)
    return list(accumulate([V, E, S, S, G, G, S, E, 1], initial=0))


def forward_phases(sizes: LayerSizes, projects: bool, kept: int) -> list[tuple[Any, ...]]:
    """A step; `kept` rows are those of what forward leaves for backward."""
    cell, H, P = sizes.cell, sizes.hidden_size, sizes.state_size
    G, S, E, V, L = len(cell.gates), len(cell.states), len(cell.extras), len(cell.saved), cell.late_gates
    X, R, EXTRA, PREV, NEW, SAVED, SCALED, _ = forward_slots(cell)
    h = int(projects)  # the first state in vectors of units; with a projection h is none, and no cell reads it
    state, recurrent, gates, y = ("state", EACH, 0), ("recurrent", EACH, 0), ("gates", ALL, 0), ("y", ALL, 0)
    before, scaled, hidden = ("before", kept, 0), ("scaled", kept, 0), ("hidden", kept, 0)
    loads = [(X, G, gates), (R, G, recurrent), (EXTRA, E, ("extra", ONE, 0))]
    loads.append((PREV + h, S - h, ("before", kept, h * P)))
    saved = [(SAVED, V, ("values", kept, 0))]
    late = (CALL, 1, loads, [*saved, (SCALED, 1, scaled)]), (PRODUCT, ("recurrent", EACH, (G - L) * H), scaled, "late")
    stores = [*saved, (NEW, 1, hidden if projects else y), (NEW + 1, S - 1, ("state", EACH, P))]
    return [
        (ASSIGN_UNLESS_CUT, before, state, P + (S - 1) * H),
        (ASSIGN, recurrent, ("b_hh", ONE, 0), G * H),
        (ADD, gates, ("b_ih", ONE, 0), G * H),
        (PRODUCT, recurrent, before, "early"),
        *(late if L else []),
        (CALL, 0, loads + (saved if L else []), stores),
        *([(PRODUCT, y, hidden, "projection")] if projects else []),
        (ASSIGN, state, y, P),
    ]


def backward_phases(sizes: LayerSizes, projects: bool) -> list[tuple[Any, ...]]:
    """A step; y and state are the gradients of those."""
    cell, H, P = sizes.cell, sizes.hidden_size, sizes.state_size
    G, S, E, V, L = len(cell.gates), len(cell.states), len(cell.extras), len(cell.saved), cell.late_gates
    SAVED, EXTRA, PREV, DNEW, DX, DR, DPREV, DEXTRA, DSCALED, _ = backward_slots(cell)
    h = int(projects)  # as in forward
    dh, dstate, dr, zero = ("y", ALL, 0), ("state", EACH, 0), ("dr", ALL, 0), ("zero", ONE, 0)
    units = ("units", EACH, 0)  # the gradient of h before a projection, or of the scaled h
    loads = [(SAVED, V, ("values", ALL, 0)), (PREV + h, S - h, ("before", ALL, h * P))]
    dnew = [(DNEW, 1, units if projects else dh), (DNEW + 1, S - 1, ("state", EACH, P))]
    gates = [(DX, G, ("dx", ALL, 0)), (DR, G, dr), (DPREV + h, S - h, ("state", EACH, h * P))]
    late = [
        (ASSIGN, units, zero, H),
        (PRODUCT, units, ("dr", ALL, (G - L) * H), "late"),
        (CALL, 1, [*loads, *gates, (DSCALED, 1, units)], gates),
    ]
    return [
        (ADD, dh, dstate, P),
        (ASSIGN, dstate, zero, P),
        *([(ASSIGN, units, zero, H), (PRODUCT, units, dh, "projection")] if projects else []),
        (CALL, 0, [*loads, *dnew, (EXTRA, E, ("extra", ONE, 0))], [*gates, (DEXTRA, E, ("dextra", ALL, 0))]),
        *(late if L else []),
        (PRODUCT, dstate, dr, "early"),
        (ASSIGN_UNLESS_CUT, dstate, dstate, P + (S - 1) * H),
    ]


def tile_functions(cell: Cell, dtype: np.dtype[Any], target: Target) -> tuple[Function, ...]:
    """What a cell does to the first `width` units of a tile: forward, prepare, backward, prepare_backward.

    They are not compiled yet; those of `prepare` are not to be where a cell has none.
    """
    one, zero = dtype.type(1), dtype.type(0)  # of the dtype, so that float32 does not widen
    units, lane, compiled = target.units, target.lane, target.compiled

    def relu(a: Any) -> Any:
        return zero if a <= zero else a  # NaN stays NaN

    def relu_gradient(h: Any) -> Any:
        return one if h > zero else (zero if h <= zero else h)  # NaN stays NaN

    sigmoid, tanh = target.activations(dtype)
    functions: Any = {
        "sigmoid": sigmoid,
        "tanh": tanh,
        "relu": compiled(relu),
        "relu_gradient": compiled(relu_gradient),
    }
    elementwise: Any = SimpleNamespace(one=one, zero=zero, **functions)
    math = cell.math(elementwise)
    forward_step, backward_step = compiled(math.forward), compiled(math.backward)
    prepare_step = compiled(math.prepare or math.forward)
    prepare_backward_step = compiled(math.prepare_backward or math.backward)
    X, R, EXTRA, PREV, NEW, SAVED, SCALED = (slot * units for slot in forward_slots(cell)[:-1])
    VALUES, VECTORS, BEFORE, DNEW, DX, DR, DPREV, DEXTRA, DSCALED = (slot * units for slot in backward_slots(cell)[:-1])

    def forward(tile: Any, width: int) -> None:
        for u in range(width):
            x, r, saved = lane(tile, X + u), lane(tile, R + u), lane(tile, SAVED + u)
            forward_step(x, r, lane(tile, EXTRA + u), lane(tile, PREV + u), lane(tile, NEW + u), saved)

    def prepare(tile: Any, width: int) -> None:
        for u in range(width):
            x, r, saved = lane(tile, X + u), lane(tile, R + u), lane(tile, SAVED + u)
            prepare_step(x, r, lane(tile, PREV + u), lane(tile, SCALED + u), saved)

    def backward(tile: Any, width: int) -> None:
        for u in range(width):
            saved, extra, prev = lane(tile, VALUES + u), lane(tile, VECTORS + u), lane(tile, BEFORE + u)
            dx, dr, dprev = lane(tile, DX + u), lane(tile, DR + u), lane(tile, DPREV + u)
            backward_step(saved, extra, prev, lane(tile, DNEW + u), dx, dr, dprev, lane(tile, DEXTRA + u))

    def prepare_backward(tile: Any, width: int) -> None:
        for u in range(width):
            dx, dr, dprev = lane(tile, DX + u), lane(tile, DR + u), lane(tile, DPREV + u)
            prepare_backward_step(
                lane(tile, VALUES + u), lane(tile, BEFORE + u), lane(tile, DSCALED + u), dx, dr, dprev
            )

    return forward, prepare, backward, prepare_backward


def _row(which: Any, t: Any, b: Any, B: Any) -> Any:
    return t * B + b if which == ALL else (b if which == EACH else 0)


def loop(target: Target) -> Function:
    """The loop, not compiled yet. Its arrays are of one type, and the first is a row of zeros."""
    units, assign, product, call, wait = target.units, target.assign, target.product, target.call, target.wait
    row_of = target.compiled(_row)

    def assign_rows(place: Any, t: Any, lengths: Any, cut: Any, phase: Any, arrays: Any) -> None:
        out, source, B, count = arrays[phase[OUT]], arrays[phase[IN]], len(lengths), phase[MORE]
        for b in range(place[0], place[1]):
            if t < lengths[b]:
                part = out[row_of(phase[OUT_ROW], t, b, B), phase[OUT_COLUMN] : phase[OUT_COLUMN] + count]
                given = source[row_of(phase[IN_ROW], t, b, B), phase[IN_COLUMN] : phase[IN_COLUMN] + count]
                if phase[KIND] == ASSIGN_UNLESS_CUT and cut[t * B + b]:
                    given = arrays[0][0, :count]
                assign(place, part, given, phase[KIND] == ADD)

    def call_on_units(
        place: Any, tile: Any, H: Any, t: Any, lengths: Any, program: Any, p: Any, arrays: Any, first: Any, second: Any
    ) -> None:  # fmt: skip
        call_at = p + 1 + program[p, MORE]  # after the loads
        for b in range(place[0], place[1]):
            for unit in range(place[2] * units, H if t < lengths[b] else 0, place[3] * units):
                width = H - unit if H - unit < units else units
                for q in range(p + 1, call_at + program[p, STORES]):
                    if q == call_at:
                        call(first, second, program[p, OUT], tile, width)
                    array, row = arrays[program[q, OUT]], row_of(program[q, OUT_ROW], t, b, len(lengths))
                    for i in range(program[q, IN_ROW]):
                        column, slot = program[q, OUT_COLUMN] + i * H + unit, (program[q, IN] + i) * units
                        vector, part = array[row, column : column + width], tile[slot : slot + width]
                        if q < call_at:
                            part, vector = vector, part
                        for u in range(width):  # from 0, so that no index can be negative
                            vector[u] = part[u]

    assign_rows, call_on_units = target.compiled(assign_rows), target.compiled(call_on_units)

    def run(
        place: Any, tile: Any, H: Any, steps: Any, lengths: Any, cut: Any, program: Any, arrays: Any, first: Any,
        second: Any,
    ) -> None:  # fmt: skip
        """steps (first, last, stride), lengths (B,), cut bool (T*B,); the last two are for `call` of the target."""
        for t in range(steps[0], steps[1], steps[2]):
            p = 0
            while p < len(program):
                phase, B = program[p], len(lengths)
                if phase[KIND] == CALL:
                    call_on_units(place, tile, H, t, lengths, program, p, arrays, first, second)
                    p += phase[MORE] + phase[STORES]
                elif phase[KIND] == PRODUCT:
                    out, row = arrays[phase[OUT]], row_of(phase[OUT_ROW], t, 0, B)
                    source, of = arrays[phase[IN]], row_of(phase[IN_ROW], t, 0, B)
                    weights = arrays[phase[MORE]]
                    product(place, t, lengths, out, row, phase[OUT_COLUMN], source, of, phase[IN_COLUMN], weights)
                else:
                    assign_rows(place, t, lengths, cut, phase, arrays)
                wait()
                p += 1

    return run
