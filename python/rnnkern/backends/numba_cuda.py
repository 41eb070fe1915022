"""The backend `numba_cuda`: plain CUDA kernels compiled by Numba, a few launches for each step.

The arrays of a layer-direction stay on the device from its first step to its last. With NUMBA_ENABLE_CUDASIM=1 set
before Numba is imported, the kernels run in its simulator, without a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stack import Backward, Forward, LayerSizes, Stack, State, Wanted, Weights, backward_by_layer, forward_by_layer

__all__ = ["backward", "forward", "linear_backward", "linear_forward", "name", "pack", "unavailable"]

Array = NDArray[Any]

name = "numba_cuda"


def unavailable() -> str | None:
    """None, or why no kernel can run: no Numba for CUDA, or no device; with the command that mends it."""
    try:
        from numba import cuda

        found = cuda.is_available()
    except ImportError as error:
        return f"{error}; python -m pip install numba-cuda"
    return None if found else "Numba finds no CUDA GPU; where there is one: python -m pip install numba-cuda"


@dataclass(frozen=True)
class _Packed:
    """The weights of a layer-direction on the device, each as the kernel `product` multiplies with it: (K, N)."""

    forward_x: Any  # (I, G*H)
    forward_h: Any  # (P, (G-L)*H): of the gates whose product is with h
    forward_late: Any  # (H, L*H): of the last L gates
    forward_projection: Any | None  # (H, P)
    backward_x: Any  # (G*H, I)
    backward_h: Any  # ((G-L)*H, P)
    backward_late: Any  # (L*H, H)
    backward_projection: Any | None  # (P, H)
    b_ih: Any  # (G*H,), zeros without bias
    b_hh: Any
    extra: Any  # (E, H)
    names: tuple[str, ...]  # of the weights that get a gradient


@dataclass(frozen=True)
class _Saved:
    """What backward needs, on the device, a row for each step and batch row."""

    x: Any  # (T*B, I), zeros past a row's end
    before: Any  # (T*B, P)
    others_before: Any  # (T*B, (S-1)*H)
    scaled: Any  # (T*B, H), zeros past a row's end, as hidden
    hidden: Any  # (T*B, H)
    values: Any  # (T*B, V*H)


def _to_device(array: Any) -> Any:
    """A copy on the device that shares nothing with the array."""
    from numba import cuda

    return cuda.to_device(np.array(array, order="C"))


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    return _to_device(np.zeros(shape, dtype))


@contextmanager
def _small_launches() -> Iterator[None]:
    """Numba warns of every launch that does not fill the device, and a step of a small layer cannot."""
    from numba.core.errors import NumbaPerformanceWarning

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        yield


def _pack_layer(sizes: LayerSizes, weights: Weights) -> _Packed:
    cell, H = sizes.cell, sizes.hidden_size
    G, early = len(cell.gates), (len(cell.gates) - cell.late_gates) * H
    w_ih, w_hh, w_hr = weights["w_ih"], weights["w_hh"], weights.get("w_hr")
    no_bias = np.zeros(G * H, w_hh.dtype)
    return _Packed(
        forward_x=_to_device(w_ih.T),
        forward_h=_to_device(w_hh[:early].T),
        forward_late=_to_device(w_hh[early:].T),
        forward_projection=None if w_hr is None else _to_device(w_hr.T),
        backward_x=_to_device(w_ih),
        backward_h=_to_device(w_hh[:early]),
        backward_late=_to_device(w_hh[early:]),
        backward_projection=None if w_hr is None else _to_device(w_hr),
        b_ih=_to_device(weights.get("b_ih", no_bias)),
        b_hh=_to_device(weights.get("b_hh", no_bias)),
        extra=_to_device(np.array([weights[extra] for extra in cell.extras], w_hh.dtype).reshape(-1, H)),
        names=tuple(weights),
    )


def pack(stack: Stack, weights: Sequence[Weights], training: bool) -> list[_Packed]:
    """See `backends`."""
    return [_pack_layer(sizes, one) for sizes, one in zip(stack.layers, weights, strict=True)]


def _others(state: State) -> Array:
    """The states but h, (B, (S-1)*H)."""
    return np.concatenate([np.zeros((len(state[0]), 0), state[0].dtype), *state[1:]], axis=1)


def _state(sizes: LayerSizes, h: Any, others: Any) -> State:
    """A state from its arrays on the device."""
    H, columns = sizes.hidden_size, others.copy_to_host()
    return (h.copy_to_host(), *(columns[:, first : first + H].copy() for first in range(0, columns.shape[1], H)))


def _order(T: int, reverse: bool) -> range:
    return range(T - 1, -1, -1) if reverse else range(T)


def _rows_of(lengths: Array | None, cut: Array | None, T: int, B: int) -> tuple[Any, Any]:
    """Lengths (B,) and cuts (T*B,) on the device."""
    return (
        _to_device(np.full(B, T, np.int64) if lengths is None else lengths),
        _to_device(np.zeros(T * B, bool) if cut is None else cut.reshape(T * B)),
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
) -> tuple[State, _Saved | None]:
    from . import numba_cuda_kernels as device

    cell, H, P, dtype = sizes.cell, sizes.hidden_size, sizes.state_size, x.dtype
    (T, B, I), G, L = x.shape, len(cell.gates), cell.late_gates
    if T * B == 0:
        return tuple(part.copy() for part in state), None
    if lengths is not None:  # x past a row's end may be NaN
        x = np.where((np.arange(T)[:, None] < lengths)[:, :, None], x, 0)
    rows, kept_rows = T * B, T * B if training else B
    saved = _Saved(
        x=_to_device(x.reshape(rows, I)),
        before=_zeros((kept_rows, P), dtype),
        others_before=_zeros((kept_rows, (len(cell.states) - 1) * H), dtype),
        scaled=_zeros((kept_rows, H), dtype),
        hidden=_zeros((kept_rows, H), dtype),
        values=_zeros((kept_rows, len(cell.saved) * H), dtype),
    )
    row_lengths, row_cuts = _rows_of(lengths, cut, T, B)
    h, others = _to_device(state[0]), _to_device(_others(state))
    gates, recurrent = _zeros((rows, G * H), dtype), _zeros((B, G * H), dtype)
    projected, out = _zeros((B, P), dtype), _zeros((rows, P), dtype)
    kernels, launch, product = device.kernels(cell, dtype), device.launch, device.product
    bias = (packed.b_ih, packed.b_hh)
    launch(product, rows * G * H, saved.x, 0, 0, packed.forward_x, gates, 0, 0)
    for t in _order(T, sizes.reverse):
        row = t * B
        kept = row if training else 0
        launch(
            device.start, B * max(P, others.shape[1]), t, row, kept, row_lengths, row_cuts, h, others,
            saved.before, saved.others_before,
        )  # fmt: skip
        launch(product, B * (G - L) * H, saved.before, kept, 0, packed.forward_h, recurrent, 0, 0)
        if L:
            launch(
                kernels.prepare, B * H, t, row, kept, row_lengths, gates, recurrent, *bias, saved.before, saved.scaled,
                saved.values,
            )  # fmt: skip
            launch(product, B * L * H, saved.scaled, kept, 0, packed.forward_late, recurrent, 0, (G - L) * H)
        launch(
            kernels.forward, B * H, t, row, kept, row_lengths, gates, recurrent, *bias, packed.extra, saved.before,
            others, saved.hidden, saved.values,
        )  # fmt: skip
        new_h, new_row = saved.hidden, kept
        if packed.forward_projection is not None:
            launch(product, B * P, saved.hidden, kept, 0, packed.forward_projection, projected, 0, 0)
            new_h, new_row = projected, 0
        launch(device.finish, B * P, t, row, row_lengths, new_h, new_row, h, out)
    y[...] = out.copy_to_host().reshape(T, B, P)
    return _state(sizes, h, others), saved


def _backward_layer(
    sizes: LayerSizes,
    packed: _Packed,
    x: Array,
    saved: _Saved | None,
    lengths: Array | None,
    cut: Array | None,
    dy: Array | None,
    dstate: State,
    wanted: Wanted | None,
    need_x: bool,
) -> tuple[Array | None, State, dict[str, Array]]:
    from . import numba_cuda_kernels as device

    cell, H, P, dtype = sizes.cell, sizes.hidden_size, sizes.state_size, x.dtype
    (T, B, I), G, L, E = x.shape, len(cell.gates), cell.late_gates, len(cell.extras)
    shapes = sizes.weight_shapes("b_ih" in packed.names, packed.forward_projection is not None)
    wanted = packed.names if wanted is None else wanted
    if saved is None:  # no step, no row
        nothing = None if not need_x else np.zeros_like(x)
        zeros = {key: np.zeros(shape, dtype) for key, shape in shapes.items() if key in wanted}
        return nothing, tuple(part.copy() for part in dstate), zeros
    rows, early = T * B, (G - L) * H
    row_lengths, row_cuts = _rows_of(lengths, cut, T, B)
    dh, dothers = _to_device(dstate[0]), _to_device(_others(dstate))
    entering = _zeros((rows, P), dtype) if dy is None else _to_device(np.reshape(dy, (rows, P)))
    dx, dr, dh_rows = _zeros((rows, G * H), dtype), _zeros((rows, G * H), dtype), _zeros((rows, P), dtype)
    dextra = _zeros((rows, E * H), dtype)
    dhidden, dscaled, direct = (_zeros((B, H), dtype) for _ in range(3))
    recurrent, indirect = _zeros((B, P), dtype), _zeros((B, 0), dtype)
    kernels, launch, product = device.kernels(cell, dtype), device.launch, device.product
    projects = packed.backward_projection is not None
    for t in reversed(_order(T, sizes.reverse)):
        row = t * B
        launch(device.start_backward, B * P, t, row, row_lengths, entering, dh, dh_rows)
        if projects:
            launch(product, B * H, dh, 0, 0, packed.backward_projection, dhidden, 0, 0)
        launch(
            kernels.backward, B * H, t, row, row_lengths, packed.extra, saved.before, saved.others_before, saved.values,
            dhidden if projects else dh, dothers, dx, dr, direct, dextra,
        )  # fmt: skip
        if L:
            launch(product, B * H, dr, row, early, packed.backward_late, dscaled, 0, 0)
            launch(
                kernels.prepare_backward, B * H, t, row, row_lengths, saved.before, saved.values, dscaled, dx, dr,
                direct,
            )  # fmt: skip
        launch(product, B * P, dr, row, 0, packed.backward_h, recurrent, 0, 0)
        launch(
            device.finish_backward, B * max(P, dothers.shape[1]), t, row, row_lengths, row_cuts, recurrent,
            indirect if projects else direct, dh, dothers,
        )  # fmt: skip

    def sum_of_outer(left: Any, right: Any, first: int = 0) -> Array:
        out = _zeros((left.shape[1], right.shape[1]), dtype)
        launch(device.sum_of_outer, (out.shape[0] - first) * out.shape[1], left, right, first, out)
        return out.copy_to_host()  # type: ignore[no-any-return]

    ones = _to_device(np.ones((rows, 1), dtype))
    gradients: dict[str, Array] = {}
    if "w_ih" in wanted:
        gradients["w_ih"] = sum_of_outer(dx, saved.x)
    if "w_hh" in wanted:
        gradients["w_hh"] = sum_of_outer(dr, saved.before)
        if L:
            gradients["w_hh"][early:] = sum_of_outer(dr, saved.scaled, early)[early:]
    for name, gates in (("b_ih", dx), ("b_hh", dr)):
        if name in wanted:
            gradients[name] = sum_of_outer(gates, ones)[:, 0]
    if "w_hr" in wanted:
        gradients["w_hr"] = sum_of_outer(dh_rows, saved.hidden)
    if any(name in wanted for name in cell.extras):
        extras = zip(cell.extras, sum_of_outer(dextra, ones).reshape(E, H), strict=True)
        gradients |= {name: one for name, one in extras if name in wanted}
    dinput = None
    if need_x:
        on_device = _zeros((rows, I), dtype)
        launch(product, rows * I, dx, 0, 0, packed.backward_x, on_device, 0, 0)
        dinput = on_device.copy_to_host().reshape(T, B, I)
    return dinput, _state(sizes, dh, dothers), gradients


def forward(stack: Stack, packed: Sequence[Any], call: Forward) -> tuple[State, Any]:
    """See `backends`."""
    with _small_launches():
        run = partial(_forward_layer, training=call.save is not None)
        final, saved = forward_by_layer(run, stack, packed, call)
        return final, saved if call.save else None


def backward(
    stack: Stack, packed: Sequence[Any], saved: Any, call: Forward, asked: Backward
) -> tuple[Array | None, State, list[dict[str, Array]]]:
    """See `backends`."""
    with _small_launches():
        return backward_by_layer(_backward_layer, stack, packed, saved, call, asked)


def linear_forward(x: Array, weight: Array, bias: Array | None, y: Array) -> None:
    """y = x W^T + b; x (rows, inputs), weight (outputs, inputs), y (rows, outputs)."""
    from . import numba_cuda_kernels as device

    with _small_launches():
        out = _zeros(y.shape, y.dtype)
        device.launch(device.product, y.size, _to_device(x), 0, 0, _to_device(weight.T), out, 0, 0)
        y[...] = out.copy_to_host()
        if bias is not None:
            y += bias


def linear_backward(
    x: Array, weight: Array, dy: Array, need_x: bool, wanted: Wanted = ("weight", "bias")
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients of x, weight and bias, None where not wanted."""
    from . import numba_cuda_kernels as device

    with _small_launches():
        dy_rows, dx, dweight, dbias = _to_device(dy), None, None, None
        if need_x:
            on_device = _zeros(x.shape, dy.dtype)
            device.launch(device.product, x.size, dy_rows, 0, 0, _to_device(weight), on_device, 0, 0)
            dx = on_device.copy_to_host()
        if "weight" in wanted:
            on_device = _zeros(weight.shape, dy.dtype)
            device.launch(device.sum_of_outer, weight.size, dy_rows, _to_device(x), 0, on_device)
            dweight = on_device.copy_to_host()
        if "bias" in wanted:
            on_device, ones = _zeros((dy.shape[1], 1), dy.dtype), _to_device(np.ones((len(dy), 1), dy.dtype))
            device.launch(device.sum_of_outer, dy.shape[1], dy_rows, ones, 0, on_device)
            dbias = on_device.copy_to_host()[:, 0]
        return dx, dweight, dbias
