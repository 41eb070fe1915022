"""The functions of a backend over a stack, for both Numba backends, and the time loops of a layer-direction.

A layer-direction is a product of all inputs with W_ih, a loop over time, and a product over all steps for each
gradient. Products over all steps are NumPy's, on the CPU. The loops are plain Python over what they are given:
`assign`, `product` and the functions of a cell. A CPU interprets them, with NumPy's products and compiled functions
that take all rows of a step; for a GPU they are compiled whole, with functions that take the one row of a block, whose
elements its threads share. A module of kernels has

    array(array) -> what a loop takes: C-contiguous, a copy where the kernels are on a device; NumPy reads it
    run(cell, dtype, forward, H, steps, arrays): the loop over (first, last, stride), with the arrays of its direction,
        of which active and cut are booleans (T, B)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..reference import gradients
from ..stack import Backward, Forward, LayerSizes, Stack, State, Wanted, Weights, backward_by_layer, forward_by_layer
from .numba_units import Function

__all__ = ["backward", "forward", "kept_columns", "linear_backward", "linear_forward", "loop", "pack_for", "quiet"]

Array = NDArray[Any]
Named = dict[str, Any]  # fields of `Arrays`


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what Numba warns of while it is imported, as on a NumPy newer than itself, from being an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    dextra: Any  # (T, B, E*H): its gradients, in backward
    zero: Any  # (1, S*H)
    active: Any  # (T,) rows before their end
    cut: Any  # (T,) rows before their end that start from zeros; none without resets


def loop(forward: bool, assign: Function, product: Function, cell: Sequence[Function]) -> Function:
    """A loop of functions that do nothing in rows but those given, as elements of `Arrays.active` and `cut`:

    assign(out, source, rows, add)              out = source, or out += source; source may have one row for all
    product(out, source, weights, add, rows)    out = source @ weights + add; add may have one row for all
    cell: `step` and, where the cell has it, `prepare` (H, rows, matrices); matrices are the arguments of the cell's
    """
    two_products, step, prepare = len(cell) > 1, cell[0], cell[-1]

    def forward_loop(H: Any, steps: Any, a: Any) -> None:
        """steps: first, last and stride."""
        P, E = a.early.shape
        h, early, late = a.state[:, :P], a.recurrent[:, :E], a.recurrent[:, E:]
        b_early, b_late, no_bias = a.b_hh[:, :E], a.b_hh[:, E:], a.zero[:, :P]
        for t in range(steps[0], steps[1], steps[2]):
            rows, gates, kept = a.active[t], a.gates[t], t if len(a.before) > 1 else 0
            before, values, scaled, hidden = a.before[kept], a.values[kept], a.scaled[kept], a.hidden[kept]
            if len(a.cut) > 0:
                assign(a.state, a.zero, a.cut[t], False)
            assign(before, a.state, rows, False)
            product(early, before[:, :P], a.early, b_early, rows)
            if two_products:
                prepare(H, rows, (gates, a.recurrent, before, scaled, values))
                product(late, scaled, a.late, b_late, rows)
            step(H, rows, (gates, a.recurrent, a.extra, before, a.state, values))
            if hidden.shape[1] > 0:
                assign(hidden, a.state[:, :H], rows, False)
                product(h, hidden, a.projection, no_bias, rows)
            assign(a.y[t], h, rows, False)

    def backward_loop(H: Any, steps: Any, a: Any) -> None:
        E, P = a.early.shape
        h, units, nothing = a.state[:, :P], a.state[:, :H], a.zero[:, :H]
        for t in range(steps[0], steps[1], steps[2]):
            rows, values, before, gates, recurrent = a.active[t], a.values[t], a.before[t], a.gates[t], a.recurrent[t]
            assign(h, a.y[t], rows, True)
            if len(a.projection) > 0:
                assign(a.y[t], h, rows, False)
                product(units, a.y[t], a.projection, nothing, rows)
            step(H, rows, (values, a.extra, before, a.state, gates, recurrent, a.state, a.dextra[t]))
            if two_products:
                product(a.scaled, recurrent[:, E:], a.late, nothing, rows)
                prepare(H, rows, (values, before, a.scaled, gates, recurrent, a.state))
            product(h, recurrent[:, :E], a.early, h, rows)
            if len(a.cut) > 0:
                assign(a.state, a.zero, a.cut[t], False)

    return forward_loop if forward else backward_loop


class _Packed(NamedTuple):
    kernels: Any
    weights: Weights
    forward: Named  # what the loop reads of them
    backward: Named


def pack_for(module: str, stack: Stack, weights: Sequence[Weights], training: bool) -> list[_Packed]:
    """`pack` of a backend, whose module of kernels is imported when it is called."""
    kernels = import_module(f"{__package__}.{module}")
    return [_pack_layer(kernels, sizes, one) for sizes, one in zip(stack.layers, weights, strict=True)]


def _pack_layer(kernels: Any, sizes: LayerSizes, weights: Weights) -> _Packed:
    own = {name: np.array(array) for name, array in weights.items()}
    w_hh, cell = own["w_hh"], sizes.cell
    late = len(w_hh) - cell.late_gates * sizes.hidden_size
    matrices = {"early": w_hh[:late], "late": w_hh[late:], "projection": own.get("w_hr", w_hh[:0])}
    b_hh = own.get("b_hh", np.zeros(len(w_hh), w_hh.dtype))
    rows = {"b_hh": b_hh, "extra": np.array([own[name] for name in cell.extras], w_hh.dtype)}
    common = {name: kernels.array(row.reshape(1, row.size)) for name, row in rows.items()}
    forward = {name: kernels.array(matrix.T) for name, matrix in matrices.items()}
    backward = {name: kernels.array(matrix) for name, matrix in matrices.items()}
    return _Packed(kernels, own, common | forward, common | backward)


def kept_columns(sizes: LayerSizes, projects: bool) -> dict[str, int]:
    """Columns of what forward keeps for backward."""
    cell, H = sizes.cell, sizes.hidden_size
    scaled, hidden = H if cell.late_gates else 0, H if projects else 0
    return {"before": len(cell.states) * H, "values": len(cell.saved) * H, "scaled": scaled, "hidden": hidden}


def _run(
    kernels: Any, sizes: LayerSizes, x: Array, state: State, lengths: Any, cut: Any, forward: bool, arrays: Named
) -> tuple[State, Named]:
    """A loop over all steps: the state after it, and all arrays."""
    (T, B), H = x.shape[:2], sizes.hidden_size
    rows = np.zeros((B, len(state) * H), x.dtype)
    for s, part in enumerate(state):
        rows[:, s * H : s * H + part.shape[1]] = part
    active = np.arange(T)[:, None] < np.full(B, T if lengths is None else lengths)
    arrays |= {"active": active, "cut": active[:0] if cut is None else cut & active}
    arrays |= {"state": rows, "zero": np.zeros((1, len(state) * H), x.dtype)}
    given = {name: kernels.array(array) for name, array in arrays.items()}
    steps = (0, T, 1) if sizes.reverse != forward else (T - 1, -1, -1)
    kernels.run(sizes.cell, x.dtype, forward, H, steps, Arrays(**given))
    h, *others = np.split(np.asarray(given["state"]), len(state), axis=1)
    return (h[:, : sizes.state_size].copy(), *(one.copy() for one in others)), given


def _forward_layer(
    sizes: LayerSizes, packed: _Packed, x: Array, state: State, lengths: Any, cut: Any, y: Array, training: bool
) -> tuple[State, Named]:
    kernels, weights, of_weights, _ = packed
    (T, B), dtype = x.shape[:2], x.dtype
    columns = kept_columns(sizes, "w_hr" in weights)
    arrays = {name: np.zeros((T if training else 1, B, count), dtype) for name, count in columns.items()}
    gates = np.tensordot(x, weights["w_ih"], (2, 1))
    gates += weights.get("b_ih", 0)
    y[...] = 0  # past the end of a row
    arrays |= {"gates": gates, "recurrent": np.zeros((B, gates.shape[2]), dtype), "y": y, "dextra": gates[:0]}
    final, given = _run(kernels, sizes, x, state, lengths, cut, True, of_weights | arrays)
    y[...] = np.asarray(given["y"])
    return final, {name: given[name] for name in columns}


def _backward_layer(
    sizes: LayerSizes, packed: _Packed, x: Array, kept: Named, lengths: Any, cut: Any, dy: Array | None,
    dstate: State, wanted: Wanted | None, need_x: bool,
) -> tuple[Array | None, State, dict[str, Array]]:  # fmt: skip
    kernels, weights, _, of_weights = packed
    P, extras, G = sizes.state_size, sizes.cell.extras, len(weights["w_ih"])
    columns = {"gates": G, "recurrent": G, "dextra": len(extras) * sizes.hidden_size, "y": P}
    arrays = {name: np.zeros((*x.shape[:2], count), x.dtype) for name, count in columns.items()}
    if dy is not None:
        arrays["y"][...] = dy
    if lengths is not None:  # x and dy past a row's end may be NaN, and a gradient of zero would not stop that
        past = np.arange(len(x))[:, None] >= lengths
        x, arrays["y"][past] = np.where(past[..., None], 0, x), 0
    arrays |= kept | {"scaled": np.zeros(kept["scaled"].shape[1:], x.dtype)}
    initial, given = _run(kernels, sizes, x, dstate, lengths, cut, False, of_weights | arrays)
    rows = {"dx": "gates", "dr": "recurrent", "dh": "y", "h": "before", "hidden": "hidden", "dextra": "dextra"}
    of_steps = {name: np.asarray(given[field]) for name, field in rows.items()}
    of_steps |= {"x": x, "h": of_steps["h"][..., :P], "scaled": np.asarray(kept["scaled"])}
    of_steps |= zip(extras, np.split(of_steps["dextra"], max(1, len(extras)), axis=2), strict=False)
    dx = np.tensordot(of_steps["dx"], weights["w_ih"], (2, 0)) if need_x else None
    return dx, initial, gradients(sizes.cell, weights if wanted is None else wanted, of_steps)


def forward(stack: Stack, packed: Sequence[Any], call: Forward) -> tuple[State, Any]:
    """See `backends`."""
    run = partial(_forward_layer, training=call.save is not None)
    with np.errstate(all="ignore"):
        final, saved = forward_by_layer(run, stack, packed, call)
    return final, saved if call.save else None


def backward(
    stack: Stack, packed: Sequence[Any], saved: Any, call: Forward, asked: Backward
) -> tuple[Array | None, State, list[dict[str, Array]]]:
    """See `backends`."""
    with np.errstate(all="ignore"):
        return backward_by_layer(_backward_layer, stack, packed, saved, call, asked)


def linear_forward(x: Array, weight: Array, bias: Array | None, y: Array) -> None:
    """See `backends`."""
    with np.errstate(all="ignore"):
        np.matmul(x, weight.T, out=y)
        if bias is not None:
            y += bias


def linear_backward(
    x: Array, weight: Array, dy: Array, need_x: bool, wanted: Wanted = ("weight", "bias")
) -> tuple[Array | None, Array | None, Array | None]:
    """See `backends`."""
    with np.errstate(all="ignore"):
        dbias = np.ones(len(dy), dy.dtype) @ dy if "bias" in wanted else None
        return dy @ weight if need_x else None, dy.T @ x if "weight" in wanted else None, dbias
