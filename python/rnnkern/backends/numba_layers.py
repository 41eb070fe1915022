"""The functions of a backend over a stack, for both Numba backends.

A layer-direction is a product of all inputs with W_ih, the loop of `numba_rows`, and a product over all steps for each
gradient. Products over all steps are NumPy's, on the CPU; a module of kernels has

    array(array) -> what the loop takes: C-contiguous, writable, a copy where the kernels are on a device
    host(array) -> the NumPy array
    run(cell, dtype, forward, H, steps, lengths, cut, program, arrays): the loop, forward or backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..stack import (
    BIASES,
    Backward,
    Forward,
    LayerSizes,
    Stack,
    State,
    Wanted,
    Weights,
    backward_by_layer,
    forward_by_layer,
)
from .numba_rows import ALL, EACH, backward_phases, encode, forward_phases

__all__ = ["functions_of", "kept_columns"]

Array = NDArray[Any]
Arrays = dict[str, Any]  # by the names that phases have


class _Packed(NamedTuple):
    forward: Arrays  # what the loop reads, zeros first: vectors as rows, matrices transposed
    backward: Arrays
    w_ih: Array
    shapes: dict[str, tuple[int, ...]]  # of the weights that get a gradient


def _pack_layer(kernels: Any, sizes: LayerSizes, weights: Weights) -> _Packed:
    w_hh, early = weights["w_hh"], len(weights["w_hh"]) - sizes.cell.late_gates * sizes.hidden_size
    vectors = {"zero": np.zeros(len(w_hh) + sizes.state_size, w_hh.dtype)}
    vectors |= {name: weights.get(name, vectors["zero"][: len(w_hh)]) for name in BIASES}
    vectors["extra"] = np.array([weights[name] for name in sizes.cell.extras], w_hh.dtype)
    matrices = {"early": w_hh[:early], "late": w_hh[early:], "projection": weights.get("w_hr", w_hh[:0])}

    def copies(matrices: Weights) -> Arrays:
        return {name: kernels.array(np.array(matrix, order="C")) for name, matrix in matrices.items()}

    rows = copies({name: vector.reshape(1, -1) for name, vector in vectors.items()})
    forward = rows | copies({name: matrix.T for name, matrix in matrices.items()})
    shapes = {name: array.shape for name, array in weights.items()}
    return _Packed(forward, rows | copies(matrices), np.array(weights["w_ih"]), shapes)


def _pack(kernels: Any, stack: Stack, weights: Sequence[Weights], training: bool) -> list[_Packed]:
    return [_pack_layer(kernels, sizes, one) for sizes, one in zip(stack.layers, weights, strict=True)]


def kept_columns(sizes: LayerSizes, projects: bool) -> dict[str, int]:
    """Columns of what forward leaves for backward: states before a step, saved values, scaled h, h to project."""
    cell, H = sizes.cell, sizes.hidden_size
    before, scaled = sizes.state_size + (len(cell.states) - 1) * H, H if cell.late_gates else 0
    return {"before": before, "values": len(cell.saved) * H, "scaled": scaled, "hidden": H if projects else 0}


def _state(sizes: LayerSizes, rows: Array) -> State:
    """A state from its rows (B, P + (S-1)*H)."""
    H, P = sizes.hidden_size, sizes.state_size
    return (rows[:, :P].copy(), *(rows[:, first : first + H].copy() for first in range(P, rows.shape[1], H)))


def _blocks(sizes: LayerSizes, T: int, batch: int, reverse: bool) -> Iterator[tuple[int, int, int]]:
    """First, last and stride of blocks of steps of about 0.05 s, between which Python looks for signals as Ctrl-C."""
    operations = len(sizes.cell.gates) * sizes.hidden_size * (sizes.state_size + 50) * max(batch, 1)
    block = max(1, 10**9 // operations)
    for first in range(0, T, block):
        last = min(first + block, T)
        yield (T - 1 - first, T - 1 - last, -1) if reverse else (first, last, 1)


def _run(kernels: Any, sizes: LayerSizes, x: Array, rows: tuple[Any, Any], phases: Any, arrays: Arrays) -> Arrays:
    """The loop over all steps, backward where there is a gradient of x; rows are the lengths and cuts of a caller."""
    (T, B), (lengths, cut), forward = x.shape[:2], rows, "dx" not in arrays
    lengths = kernels.array(np.full(B, T, np.int64) if lengths is None else lengths)
    cut = kernels.array(np.zeros(T * B, bool) if cut is None else cut.reshape(T * B))
    program, given = kernels.array(encode(arrays, phases)), {name: kernels.array(one) for name, one in arrays.items()}
    for steps in _blocks(sizes, T, B, sizes.reverse == forward):
        kernels.run(
            sizes.cell, x.dtype, forward, sizes.hidden_size, steps, lengths, cut, program, tuple(given.values())
        )
    return given


def _forward_layer(
    sizes: LayerSizes, packed: _Packed, x: Array, state: State, lengths: Any, cut: Any, y: Array, kernels: Any,
    training: bool,
) -> tuple[State, Arrays | None]:  # fmt: skip
    (_, B, I), rows, projects = x.shape, x.shape[0] * x.shape[1], "w_hr" in packed.shapes
    if rows == 0:
        return tuple(part.copy() for part in state), None
    columns = kept_columns(sizes, projects)
    arrays = {name: np.zeros((rows if training else B, count), x.dtype) for name, count in columns.items()}
    arrays["gates"] = x.reshape(rows, I) @ packed.w_ih.T
    arrays["recurrent"] = np.zeros((B, len(packed.w_ih)), x.dtype)
    arrays["state"] = np.concatenate(state, axis=1)
    arrays["y"] = np.zeros((rows, sizes.state_size), x.dtype)
    phases = forward_phases(sizes, projects, ALL if training else EACH)
    given = _run(kernels, sizes, x, (lengths, cut), phases, packed.forward | arrays)
    y[...] = kernels.host(given["y"]).reshape(y.shape)
    return _state(sizes, kernels.host(given["state"])), {name: given[name] for name in columns}


def _backward_layer(
    sizes: LayerSizes, packed: _Packed, x: Array, kept: Arrays | None, lengths: Any, cut: Any, dy: Array | None,
    dstate: State, wanted: Wanted | None, need_x: bool, kernels: Any,
) -> tuple[Array | None, State, dict[str, Array]]:  # fmt: skip
    (T, B, I), rows, gates, dtype = x.shape, x.shape[0] * x.shape[1], len(packed.w_ih), x.dtype
    wanted = packed.shapes if wanted is None else wanted
    if kept is None:  # no step, no row
        zeros = {name: np.zeros(shape, dtype) for name, shape in packed.shapes.items() if name in wanted}
        return np.zeros_like(x) if need_x else None, tuple(part.copy() for part in dstate), zeros
    arrays = packed.backward | {name: kept[name] for name in ("before", "values")}
    arrays["y"] = np.zeros((rows, sizes.state_size), dtype) if dy is None else np.array(dy).reshape(rows, -1)
    arrays["state"] = np.concatenate(dstate, axis=1)
    for name, columns in {"dx": gates, "dr": gates, "dextra": len(sizes.cell.extras) * sizes.hidden_size}.items():
        arrays[name] = np.zeros((rows, columns), dtype)
    arrays["units"] = np.zeros((B, sizes.hidden_size), dtype)  # as many arrays as forward has: one loop does both
    given = _run(kernels, sizes, x, (lengths, cut), backward_phases(sizes, "w_hr" in packed.shapes), arrays)
    if lengths is not None:  # x past a row's end may be NaN, and a gradient of zero would not stop that
        x = np.where((np.arange(T)[:, None] < lengths)[:, :, None], x, 0)
    host = {name: kernels.host(array) for name, array in (kept | given).items()}
    dx = (host["dx"] @ packed.w_ih).reshape(T, B, I) if need_x else None
    return dx, _state(sizes, host["state"]), _gradients(sizes, x.reshape(rows, I), host, wanted)


def _gradients(sizes: LayerSizes, x: Array, arrays: Arrays, wanted: Wanted) -> dict[str, Array]:
    """The gradients of the wanted weights; x (T*B, I)."""
    dx, dr, ones = arrays["dx"], arrays["dr"], np.ones(len(x), x.dtype)
    gradients: dict[str, Array] = {}
    if "w_ih" in wanted:
        gradients["w_ih"] = dx.T @ x
    if "w_hh" in wanted:
        late = dr.shape[1] - sizes.cell.late_gates * sizes.hidden_size
        gradients["w_hh"] = dr.T @ arrays["before"][:, : sizes.state_size]
        if sizes.cell.late_gates:
            gradients["w_hh"][late:] = dr[:, late:].T @ arrays["scaled"]
    if "w_hr" in wanted:
        gradients["w_hr"] = arrays["y"].T @ arrays["hidden"]
    vectors = {"b_ih": dx, "b_hh": dr}
    vectors |= zip(sizes.cell.extras, np.split(arrays["dextra"], max(1, len(sizes.cell.extras)), axis=1), strict=False)
    return gradients | {name: ones @ rows for name, rows in vectors.items() if name in wanted}


def _forward(kernels: Any, stack: Stack, packed: Any, call: Forward) -> tuple[State, Any]:
    run = partial(_forward_layer, kernels=kernels, training=call.save is not None)
    final, saved = forward_by_layer(run, stack, packed, call)
    return final, saved if call.save else None


def _saved_values(kernels: Any, stack: Stack, saved: Any, call: Forward) -> list[Array]:
    shape = (*call.x.shape[:2], len(stack.cell.saved), stack.hidden_size)
    return [np.moveaxis(kernels.host(kept["values"]).reshape(shape), 2, 0) for _, kept in saved]


def _backward(
    kernels: Any, stack: Stack, packed: Any, saved: Any, call: Forward, asked: Backward
) -> tuple[Array | None, State, list[dict[str, Array]]]:
    return backward_by_layer(partial(_backward_layer, kernels=kernels), stack, packed, saved, call, asked)


def _linear_forward(_: Any, x: Array, weight: Array, bias: Array | None, y: Array) -> None:
    np.matmul(x, weight.T, out=y)
    if bias is not None:
        y += bias


def _linear_backward(
    _: Any, x: Array, weight: Array, dy: Array, need_x: bool, wanted: Wanted = ("weight", "bias")
) -> tuple[Array | None, Array | None, Array | None]:
    dbias = np.ones(len(dy), dy.dtype) @ dy if "bias" in wanted else None
    return dy @ weight if need_x else None, dy.T @ x if "weight" in wanted else None, dbias


def functions_of(module: str) -> list[Callable[..., Any]]:
    """pack, forward, saved_values, backward, linear_forward, linear_backward with a module of kernels, imported when
    called.
    """

    def bind(function: Callable[..., Any]) -> Callable[..., Any]:
        def bound(*arguments: Any, **options: Any) -> Any:
            with np.errstate(all="ignore"):
                return function(import_module(f"{__package__}.{module}"), *arguments, **options)

        return bound

    functions: tuple[Callable[..., Any], ...] = (
        _pack,
        _forward,
        _saved_values,
        _backward,
        _linear_forward,
        _linear_backward,
    )
    return [bind(function) for function in functions]
