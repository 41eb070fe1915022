"""The functions of a backend over a stack, for both Numba backends.

A layer-direction is a product of all inputs with W_ih, a loop of `numba_loop`, and a product over all steps for each
gradient. Products over all steps are NumPy's, on the CPU; a module of kernels has

    array(array) -> what the loop takes: C-contiguous, a copy where the kernels are on a device
    host(array) -> the NumPy array
    run(cell, dtype, forward, H, steps, arrays): the loop over (first, last, stride), with the arrays of its direction
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..reference import gradients
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
from .numba_loop import Arrays

__all__ = ["functions_of", "kept_columns"]

Array = NDArray[Any]
Named = dict[str, Any]  # fields of `Arrays`


class _Packed(NamedTuple):
    forward: Named  # what the loop reads of the weights
    backward: Named
    w_ih: Array
    b_ih: Array
    names: Wanted  # of the weights that get a gradient


def _pack_layer(kernels: Any, sizes: LayerSizes, weights: Weights) -> _Packed:
    w_hh, S, E = weights["w_hh"], len(sizes.cell.states), len(sizes.cell.extras)
    late = len(w_hh) - sizes.cell.late_gates * sizes.hidden_size
    b_ih, b_hh = (np.array(weights.get(name, np.zeros(len(w_hh), w_hh.dtype))) for name in BIASES)
    extra = np.array([weights[name] for name in sizes.cell.extras], w_hh.dtype).reshape(1, E * sizes.hidden_size)
    rows = {"b_hh": b_hh[None], "extra": extra, "zero": np.zeros((1, S * sizes.hidden_size), w_hh.dtype)}
    matrices = {"early": w_hh[:late], "late": w_hh[late:], "projection": weights.get("w_hr", w_hh[:0])}
    forward, backward = [
        {name: kernels.array(np.array(array, order="C")) for name, array in (rows | given).items()}
        for given in ({name: matrix.T for name, matrix in matrices.items()}, matrices)
    ]
    return _Packed(forward, backward, np.array(weights["w_ih"]), b_ih, tuple(weights))


def _pack(kernels: Any, stack: Stack, weights: Sequence[Weights], training: bool) -> list[_Packed]:
    return [_pack_layer(kernels, sizes, one) for sizes, one in zip(stack.layers, weights, strict=True)]


def kept_columns(sizes: LayerSizes, projects: bool) -> dict[str, int]:
    """Columns of what forward keeps for backward."""
    cell, H = sizes.cell, sizes.hidden_size
    scaled, hidden = H if cell.late_gates else 0, H if projects else 0
    return {"before": len(cell.states) * H, "values": len(cell.saved) * H, "scaled": scaled, "hidden": hidden}


def _run(
    kernels: Any, sizes: LayerSizes, x: Array, state: State, lengths: Any, cut: Any, forward: bool, arrays: Named
) -> tuple[State, Named]:
    """A loop over all steps: the state after it, and all arrays."""
    (T, B), H, P = x.shape[:2], sizes.hidden_size, sizes.state_size
    active = np.full((T, B), True) if lengths is None else np.arange(T)[:, None] < lengths
    rows = np.zeros((B, len(state) * H), x.dtype)
    for s, part in enumerate(state):
        rows[:, s * H : s * H + part.shape[1]] = part
    arrays |= {"state": rows, "active": active, "cut": active[:0] if cut is None else cut & active}
    given = {name: kernels.array(array) for name, array in arrays.items()}
    steps = (0, T, 1) if sizes.reverse != forward else (T - 1, -1, -1)
    kernels.run(sizes.cell, x.dtype, forward, H, steps, Arrays(**given))
    h, *others = np.split(kernels.host(given["state"]), len(state), axis=1)
    return (h[:, :P].copy(), *(one.copy() for one in others)), given


def _forward_layer(
    sizes: LayerSizes, packed: _Packed, x: Array, state: State, lengths: Any, cut: Any, y: Array, kernels: Any,
    training: bool,
) -> tuple[State, Named]:  # fmt: skip
    (T, B, I), G = x.shape, len(packed.w_ih)
    columns = kept_columns(sizes, "w_hr" in packed.names)
    arrays = {name: np.zeros((T if training else 1, B, count), x.dtype) for name, count in columns.items()}
    arrays["gates"] = (x.reshape(T * B, I) @ packed.w_ih.T).reshape(T, B, G)
    arrays["gates"] += packed.b_ih
    y[...] = 0  # past the end of a row
    arrays |= {"recurrent": np.zeros((B, G), x.dtype), "y": y, "dextra": np.zeros((0, B, 0), x.dtype)}
    final, given = _run(kernels, sizes, x, state, lengths, cut, True, packed.forward | arrays)
    y[...] = kernels.host(given["y"])
    return final, {name: given[name] for name in columns}


def _backward_layer(
    sizes: LayerSizes, packed: _Packed, x: Array, kept: Named, lengths: Any, cut: Any, dy: Array | None,
    dstate: State, wanted: Wanted | None, need_x: bool, kernels: Any,
) -> tuple[Array | None, State, dict[str, Array]]:  # fmt: skip
    T, B, G, P, extras = *x.shape[:2], len(packed.w_ih), sizes.state_size, sizes.cell.extras
    columns = {"gates": G, "recurrent": G, "dextra": len(extras) * sizes.hidden_size, "y": P}
    arrays = {name: np.zeros((T, B, count), x.dtype) for name, count in columns.items()}
    if dy is not None:
        arrays["y"][...] = dy
    if lengths is not None:  # x and dy past a row's end may be NaN, and a gradient of zero would not stop that
        past = np.arange(T)[:, None] >= lengths
        x, arrays["y"][past] = np.where(past[..., None], 0, x), 0
    arrays |= kept | {"scaled": np.zeros((B, kept["scaled"].shape[2]), x.dtype)}
    initial, given = _run(kernels, sizes, x, dstate, lengths, cut, False, packed.backward | arrays)
    rows = {"dx": "gates", "dr": "recurrent", "dh": "y", "h": "before", "hidden": "hidden"}
    of_steps = {name: kernels.host(given[field]) for name, field in rows.items()}
    of_steps |= {"x": x, "h": of_steps["h"][..., :P], "scaled": kernels.host(kept["scaled"])}
    of_steps |= zip(extras, np.split(kernels.host(given["dextra"]), max(1, len(extras)), axis=2), strict=False)
    dx = (of_steps["dx"].reshape(T * B, G) @ packed.w_ih).reshape(x.shape) if need_x else None
    return dx, initial, gradients(sizes.cell, packed.names if wanted is None else wanted, of_steps)


def _forward(kernels: Any, stack: Stack, packed: Any, call: Forward) -> tuple[State, Any]:
    run = partial(_forward_layer, kernels=kernels, training=call.save is not None)
    final, saved = forward_by_layer(run, stack, packed, call)
    return final, saved if call.save else None


def _saved_values(kernels: Any, stack: Stack, saved: Any, call: Forward) -> list[Array]:
    shape = (len(stack.cell.saved), stack.hidden_size)
    return [np.moveaxis(kernels.host(kept["values"]).reshape(*x.shape[:2], *shape), 2, 0) for x, kept in saved]


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

    functions: list[Callable[..., Any]] = [_pack, _forward, _saved_values, _backward, _linear_forward, _linear_backward]
    return [bind(one) for one in functions]
