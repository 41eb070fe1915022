"""The backend `numba`: time loops compiled by Numba, for machines without the compiled extension.

Products over all steps at once (the inputs' share, the weight gradients) are NumPy's; the rest of a layer-direction is
one loop of `numba_cpu_kernels`, without the GIL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stack import Backward, Forward, LayerSizes, Stack, State, Wanted, Weights, backward_by_layer, forward_by_layer

__all__ = ["backward", "forward", "linear_backward", "linear_forward", "name", "pack", "plan", "unavailable"]

Array = NDArray[Any]

name = "numba"


def unavailable() -> str | None:
    """None, or why Numba cannot be imported, with the command that mends it."""
    try:
        import numba  # noqa: F401
    except ImportError as error:  # not installed, or not made for this NumPy
        return f"{error}; python -m pip install numba"
    return None


@dataclass(frozen=True)
class _Packed:
    """The weights of a layer-direction as the kernels read them; no panels where there is nothing."""

    w_ih: Array  # (G*H, I)
    b_ih: Array  # (G*H,), zeros without bias
    b_hh: Array
    extra: Array  # (E, H)
    early: Array  # shapes of these as in the forward kernel
    late: Array
    projection: Array
    early_backward: Array  # and as in the backward kernel
    late_backward: Array
    projection_backward: Array
    names: tuple[str, ...]  # of the weights that get a gradient


@dataclass(frozen=True)
class _Saved:
    """What the forward kernel leaves for the backward kernel; shapes as there."""

    before: Array
    others_before: Array
    scaled: Array
    values: Array
    hidden: Array


def _saved_shapes(sizes: LayerSizes, projects: bool, steps: int, batch: int) -> dict[str, tuple[int, ...]]:
    """Shapes of `_Saved`."""
    cell, H = sizes.cell, sizes.hidden_size
    rows, none = (steps, batch), (0, 0, 0)
    return {
        "before": (*rows, sizes.state_size),
        "others_before": (*rows, len(cell.states) - 1, H),
        "scaled": (*rows, H) if cell.late_gates else none,
        "values": (*rows, len(cell.saved), H),
        "hidden": (*rows, H) if projects else none,
    }


def _panels(matrices: Array) -> Array:
    """G matrices (G, N, K) as the kernels multiply with them: (panels of N * G, K, UNITS), zeros beyond N."""
    from .numba_cpu_kernels import UNITS

    G, N, K = matrices.shape
    panels = -(-N // UNITS)
    padded = np.zeros((G, panels * UNITS, K), matrices.dtype)
    padded[:, :N] = matrices
    return np.ascontiguousarray(padded.reshape(G, panels, UNITS, K).transpose(1, 0, 3, 2)).reshape(-1, K, UNITS)


def _pack_layer(sizes: LayerSizes, weights: Weights, training: bool) -> _Packed:
    cell, H = sizes.cell, sizes.hidden_size
    G, early = len(cell.gates), (len(cell.gates) - cell.late_gates) * H
    w_hh = weights["w_hh"]
    dtype = w_hh.dtype
    none = np.zeros((0, 0, 0), dtype)
    no_bias = np.zeros(G * H, dtype)
    w_hr = weights.get("w_hr")
    return _Packed(
        w_ih=weights["w_ih"].copy(),
        b_ih=np.array(weights.get("b_ih", no_bias)),
        b_hh=np.array(weights.get("b_hh", no_bias)),
        extra=np.array([weights[extra] for extra in cell.extras], dtype).reshape(-1, H),
        early=_panels(w_hh[:early].reshape(-1, H, sizes.state_size)),
        late=_panels(w_hh[early:].reshape(-1, H, sizes.state_size)) if cell.late_gates else none,
        projection=none if w_hr is None else _panels(w_hr[None]),
        early_backward=_panels(w_hh[:early].T[None]) if training else none,
        late_backward=_panels(w_hh[early:].T[None]) if training and cell.late_gates else none,
        projection_backward=_panels(w_hr.T[None]) if training and w_hr is not None else none,
        names=tuple(weights),
    )


def pack(stack: Stack, weights: Sequence[Weights], training: bool) -> list[_Packed]:
    """See `backends`."""
    return [_pack_layer(sizes, one, training) for sizes, one in zip(stack.layers, weights, strict=True)]


def _working_state(sizes: LayerSizes, projects: bool, state: State) -> tuple[Array, Array]:
    """The arrays `states` (S, B, padded H) and `h` (B, padded P) of the kernels, in their initial state."""
    from .numba_cpu_kernels import UNITS

    batch = state[0].shape[0]
    H, P = (-(-size // UNITS) * UNITS for size in (sizes.hidden_size, sizes.state_size))
    states = np.zeros((len(state), batch, H), state[0].dtype)
    h = np.zeros((batch, P), state[0].dtype) if projects else states[0]
    h[:, : sizes.state_size] = state[0]
    for s in range(1, len(state)):
        states[s, :, : sizes.hidden_size] = state[s]
    return states, h


def _final_state(sizes: LayerSizes, states: Array, h: Array) -> State:
    return (h[:, : sizes.state_size].copy(), *states[1:, :, : sizes.hidden_size].copy())


def _tiles(sizes: LayerSizes, slots: int, batch: int, dtype: np.dtype[Any]) -> tuple[Array, int]:
    """Scratch of a kernel, and the units of a panel to compute: whole vectors of 8."""
    from .numba_cpu_kernels import UNITS

    panels = -(-sizes.hidden_size // UNITS)
    count = batch * panels if sizes.cell.late_gates else 1
    return np.zeros((count, slots, UNITS), dtype), min(UNITS, -(-sizes.hidden_size // 8) * 8)


def _blocks(sizes: LayerSizes, T: int, batch: int, reverse: bool) -> Iterator[Array]:
    """The steps in order, in blocks of about 0.05 s, between which Python looks for signals such as Ctrl-C."""
    order = np.arange(T, dtype=np.int64)
    order = order[::-1].copy() if reverse else order
    operations = len(sizes.cell.gates) * sizes.hidden_size * (sizes.state_size + 50) * max(batch, 1)
    block = max(1, 10**9 // operations)
    return (order[first : first + block] for first in range(0, T, block))


def _rows_of(lengths: Array | None, cut: Array | None, T: int, batch: int) -> tuple[Array, Array]:
    """Lengths and cuts as the kernels want them: always there."""
    return (
        np.full(batch, T, np.int64) if lengths is None else np.array(lengths, np.int64),
        np.zeros((T, batch), bool) if cut is None else np.array(cut, bool),
    )


def _forward_layer(
    sizes: LayerSizes,
    packed: _Packed,
    x: Array,
    state: State,
    lengths: Array | None,
    cut: Array | None,
    y: Array,
    training: bool,
) -> tuple[State, _Saved]:
    from .numba_cpu_kernels import forward_kernel, forward_slots

    cell, H, dtype = sizes.cell, sizes.hidden_size, x.dtype
    T, B, I = x.shape
    projects = len(packed.projection) > 0
    states, h = _working_state(sizes, projects, state)
    shapes = _saved_shapes(sizes, projects, T if training else 1, B)
    saved = _Saved(**{name: np.zeros(shape, dtype) for name, shape in shapes.items()})
    rows = _rows_of(lengths, cut, T, B)
    gates = (x.reshape(T * B, I) @ packed.w_ih.T).reshape(T, B, len(cell.gates) * H)
    gates += packed.b_ih
    tiles, width = _tiles(sizes, forward_slots(cell)[-1], B, dtype)
    out = np.empty(y.shape, dtype)
    kernel = forward_kernel(cell, dtype)
    for order in _blocks(sizes, T, B, sizes.reverse):
        kernel(
            order,
            *rows,
            gates,
            packed.b_hh,
            packed.early,
            packed.late,
            packed.projection,
            packed.extra,
            states,
            h,
            saved.before,
            saved.others_before,
            saved.scaled,
            saved.values,
            saved.hidden,
            out,
            tiles,
            width,
        )
    y[...] = out
    return _final_state(sizes, states, h), saved


def _backward_layer(
    sizes: LayerSizes,
    packed: _Packed,
    x: Array,
    saved: _Saved,
    lengths: Array | None,
    cut: Array | None,
    dy: Array | None,
    dstate: State,
    wanted: Wanted | None,
    need_x: bool,
) -> tuple[Array | None, State, dict[str, Array]]:
    from .numba_cpu_kernels import backward_kernel, backward_slots

    cell, H, P, dtype = sizes.cell, sizes.hidden_size, sizes.state_size, x.dtype
    T, B, I = x.shape
    G, early = len(cell.gates), (len(cell.gates) - cell.late_gates) * H
    projects = len(packed.projection) > 0
    dstates, dh = _working_state(sizes, projects, dstate)
    dx, dr = np.zeros((T, B, G * H), dtype), np.zeros((T, B, G * H), dtype)
    dprojected = np.zeros((T, B, P) if projects else (0, 0, 0), dtype)
    dextra = np.zeros((B, len(cell.extras), H), dtype)
    tiles, width = _tiles(sizes, backward_slots(cell)[-1], B, dtype)
    rows = _rows_of(lengths, cut, T, B)
    entering = np.zeros((T, B, P), dtype) if dy is None else np.require(dy, requirements=["C", "W"])
    kernel = backward_kernel(cell, dtype)
    for order in _blocks(sizes, T, B, not sizes.reverse):
        kernel(
            order,
            *rows,
            entering,
            packed.early_backward,
            packed.late_backward,
            packed.projection_backward,
            packed.extra,
            saved.before,
            saved.others_before,
            saved.values,
            dstates,
            dh,
            dx,
            dr,
            dprojected,
            dextra,
            tiles,
            width,
        )

    def sum_of_outer(left: Array, right: Array) -> Array:
        return left.reshape(T * B, left.shape[2]).T @ right.reshape(T * B, right.shape[2])

    wanted = packed.names if wanted is None else wanted
    gradients: dict[str, Array] = {}
    if "w_ih" in wanted:
        # x past a row's end may be NaN, and a gradient of zero would not stop that
        inputs = x if lengths is None else np.where((np.arange(T)[:, None] < lengths)[:, :, None], x, 0)
        gradients["w_ih"] = sum_of_outer(dx, inputs)
    if "w_hh" in wanted:
        gradients["w_hh"] = sum_of_outer(dr, saved.before)
        if cell.late_gates:
            gradients["w_hh"][early:] = sum_of_outer(dr[:, :, early:], saved.scaled)
    for name, gates in (("b_ih", dx), ("b_hh", dr)):
        if name in wanted:
            gradients[name] = np.ones(T * B, dtype) @ gates.reshape(T * B, G * H)
    if "w_hr" in wanted:
        gradients["w_hr"] = sum_of_outer(dprojected, saved.hidden)
    for e, name in enumerate(cell.extras):
        if name in wanted:
            gradients[name] = dextra[:, e].sum(0)
    dinput = None if not need_x else (dx.reshape(T * B, G * H) @ packed.w_ih).reshape(T, B, I)
    return dinput, _final_state(sizes, dstates, dh), gradients


def forward(stack: Stack, packed: Sequence[Any], call: Forward) -> tuple[State, Any]:
    """See `backends`."""
    with np.errstate(all="ignore"):
        run = partial(_forward_layer, training=call.save is not None)
        final, saved = forward_by_layer(run, stack, packed, call)
        return final, saved if call.save else None


def backward(
    stack: Stack, packed: Sequence[Any], saved: Any, call: Forward, asked: Backward
) -> tuple[Array | None, State, list[dict[str, Array]]]:
    """See `backends`."""
    with np.errstate(all="ignore"):
        return backward_by_layer(_backward_layer, stack, packed, saved, call, asked)


def plan(
    stack: Stack, weights: Sequence[Weights], steps: int, batch: int
) -> tuple[int, Mapping[str, Any], Mapping[str, Any]]:
    """See `backends`. Scratch counts the arrays that grow with the steps."""
    packed = sum(
        array.nbytes
        for one in pack(stack, weights, True)
        for array in vars(one).values()
        if isinstance(array, np.ndarray)
    )
    elements = steps * batch * stack.dtype.itemsize  # bytes of one number for each step and row
    kept = elements * stack.output_size * (stack.num_layers - 1)  # the inputs of all layers but the first
    for sizes in stack.layers:
        shapes = _saved_shapes(sizes, stack.proj_size > 0, steps, batch)
        kept += sum(map(math.prod, shapes.values())) * stack.dtype.itemsize
    gates, P = len(stack.cell.gates) * stack.hidden_size, stack.state_size
    in_forward = elements * (gates + P)
    in_backward = elements * (2 * gates + P * (2 if stack.proj_size else 1))
    common = {"threads": 1, "split": "rows", "block_steps": steps, "estimated": True}
    return packed, common | {"kept": kept, "scratch": in_forward}, common | {"kept": 0, "scratch": in_backward}


def linear_forward(x: Array, weight: Array, bias: Array | None, y: Array) -> None:
    """y = x W^T + b; x (rows, inputs), weight (outputs, inputs), y (rows, outputs)."""
    with np.errstate(all="ignore"):
        np.matmul(x, weight.T, out=y)
        if bias is not None:
            y += bias


def linear_backward(
    x: Array, weight: Array, dy: Array, need_x: bool, wanted: Wanted = ("weight", "bias")
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients of x, weight and bias, None where not wanted."""
    with np.errstate(all="ignore"):
        return (
            dy @ weight if need_x else None,
            dy.T @ x if "weight" in wanted else None,
            np.ones(len(dy), dy.dtype) @ dy if "bias" in wanted else None,
        )
