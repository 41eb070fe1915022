"""The kernels of the backend `numba_cuda`: elements shared among threads, one launch for each part of a step.

Arrays are matrices in which the row of step t and batch row b is t*B + b; `row` is the first row of a step. Cells are
bound to a dtype and to the libm of the device. A row past its end (t >= lengths[b]) is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import cuda

from ..cells import Cell
from .numba_math import Function, compile_cell

__all__ = [
    "Kernels",
    "finish",
    "finish_backward",
    "kernels",
    "launch",
    "product",
    "start",
    "start_backward",
    "sum_of_outer",
]

# A step has far fewer elements than a GPU has threads, so the size of a block matters little. The simulator starts a
# thread of the CPU for each.
THREADS = 2 if numba.config.ENABLE_CUDASIM else 128
MAX_BLOCKS = 65535

_kernel: Callable[[Function], Function] = cuda.jit
_device: Callable[[Function], Function] = cuda.jit(device=True)


def launch(kernel: Any, count: int, *arguments: Any) -> None:
    """Run a kernel over `count` elements, which it takes as its first argument; none is no launch."""
    if count > 0:
        blocks = 1 if numba.config.ENABLE_CUDASIM else min(-(-count // THREADS), MAX_BLOCKS)
        kernel[blocks, THREADS](count, *arguments)


# The elements of a thread are _thread(), _thread() + _threads(), ...: in 64 bits, so that their number has no bound.


@_device
def _thread() -> Any:
    return np.int64(cuda.blockIdx.x) * np.int64(cuda.blockDim.x) + np.int64(cuda.threadIdx.x)


@_device
def _threads() -> Any:
    return np.int64(cuda.gridDim.x) * np.int64(cuda.blockDim.x)


@_kernel
def product(count: Any, rows: Any, row: Any, first: Any, weights: Any, out: Any, out_row: Any, column: Any) -> None:
    """out[out_row + m, column + n] = rows[row + m, first : first + K] @ weights[:, n], for count = M*N elements."""
    for i in range(_thread(), count, _threads()):
        K, N = weights.shape
        m, n = i // N, i % N
        total = out.dtype.type(0)
        for k in range(K):
            total += rows[row + m, first + k] * weights[k, n]
        out[out_row + m, column + n] = total


@_kernel
def sum_of_outer(count: Any, left: Any, right: Any, first: Any, out: Any) -> None:
    """out[first + m, n] = left[:, first + m] @ right[:, n], for count = M*N elements."""
    for i in range(_thread(), count, _threads()):
        N = right.shape[1]
        m, n = first + i // N, i % N
        total = out.dtype.type(0)
        for k in range(left.shape[0]):
            total += left[k, m] * right[k, n]
        out[m, n] = total


@_kernel
def start(
    count: Any,
    t: Any,
    row: Any,
    kept: Any,
    lengths: Any,
    cut: Any,
    h: Any,
    others: Any,
    before: Any,
    others_before: Any,
) -> None:
    """Cut the states and keep them for backward; count = B * columns, columns = max(P, (S-1)*H).

    h (B, P), others (B, (S-1)*H); before and others_before the same, T times, from row `kept` on.
    """
    for i in range(_thread(), count, _threads()):
        columns = max(h.shape[1], others.shape[1])
        b, u = i // columns, i % columns
        zero = h.dtype.type(0)
        active = t < lengths[b]
        if active and cut[row + b]:
            if u < h.shape[1]:
                h[b, u] = zero
            if u < others.shape[1]:
                others[b, u] = zero
        if u < h.shape[1]:
            before[kept + b, u] = h[b, u] if active else zero
        if u < others.shape[1]:
            others_before[kept + b, u] = others[b, u]


@_kernel
def finish(count: Any, t: Any, row: Any, lengths: Any, new_h: Any, new_row: Any, h: Any, y: Any) -> None:
    """h and y after the step, from rows `new_row` of new_h; count = B*P."""
    for i in range(_thread(), count, _threads()):
        P = h.shape[1]
        b, u = i // P, i % P
        if t < lengths[b]:
            h[b, u] = new_h[new_row + b, u]
            y[row + b, u] = h[b, u]
        else:
            y[row + b, u] = y.dtype.type(0)


@_kernel
def start_backward(count: Any, t: Any, row: Any, lengths: Any, dy: Any, dh: Any, dh_rows: Any) -> None:
    """Add the gradient that enters through y; count = B*P. dh_rows (T*B, P) keeps that of h."""
    for i in range(_thread(), count, _threads()):
        P = dh.shape[1]
        b, u = i // P, i % P
        if t < lengths[b]:
            dh[b, u] += dy[row + b, u]
            dh_rows[row + b, u] = dh[b, u]


@_kernel
def finish_backward(
    count: Any, t: Any, row: Any, lengths: Any, cut: Any, recurrent: Any, direct: Any, dh: Any, dothers: Any
) -> None:
    """The gradient of the states before the step, zero across a cut; count = B * columns as in `start`.

    recurrent (B, P) is its part through W_hh; direct (B, P) what else reaches h, no columns with a projection.
    """
    for i in range(_thread(), count, _threads()):
        columns = max(dh.shape[1], dothers.shape[1])
        b, u = i // columns, i % columns
        if t >= lengths[b]:
            continue
        zero = dh.dtype.type(0)
        if u < dh.shape[1]:
            total = recurrent[b, u]
            if u < direct.shape[1]:
                total += direct[b, u]
            dh[b, u] = zero if cut[row + b] else total
        if u < dothers.shape[1] and cut[row + b]:
            dothers[b, u] = zero


@dataclass(frozen=True)
class Kernels:
    """The kernels of a cell; all take count = B*H."""

    prepare: Any
    forward: Any
    backward: Any
    prepare_backward: Any


@lru_cache
def kernels(cell: Cell, dtype: np.dtype[Any]) -> Kernels:
    """The kernels of a cell for elements of a dtype.

    Gates and saved values of a row are G*H and V*H columns, those of gate g or value v from column g*H or v*H on.
    """
    one, zero = dtype.type(1), dtype.type(0)

    def sigmoid(a: Any) -> Any:
        small = math.exp(-abs(a))  # in [0, 1]: no overflow on either side
        return (small if a < zero else one) / (one + small)

    def tanh(a: Any) -> Any:
        return math.tanh(a)

    functions = compile_cell(cell, dtype, _device, sigmoid, tanh)
    forward_step, backward_step = functions.forward, functions.backward
    prepare_step: Any = functions.prepare  # None where a cell has none; then its kernel is never launched
    prepare_backward_step: Any = functions.prepare_backward
    G, S, V, E = len(cell.gates), len(cell.states), len(cell.saved), len(cell.extras)
    extras = max(E, 1)  # a local array has at least one element
    element = numba.from_dtype(dtype)

    @_device
    def load_gates(gates: Any, row: Any, recurrent: Any, b_ih: Any, b_hh: Any, b: Any, u: Any, x: Any, r: Any) -> None:
        H = recurrent.shape[1] // G
        for g in range(G):
            x[g] = gates[row + b, g * H + u] + b_ih[g * H + u]
            r[g] = recurrent[b, g * H + u] + b_hh[g * H + u]

    @_kernel
    def prepare(
        count: Any,
        t: Any,
        row: Any,
        kept: Any,
        lengths: Any,
        gates: Any,  # (T*B, G*H): x W_ih^T
        recurrent: Any,  # (B, G*H): the products of this step
        b_ih: Any,
        b_hh: Any,  # (G*H,)
        before: Any,  # (T*B, P)
        scaled: Any,  # (T*B, H), written
        values: Any,  # (T*B, V*H), written
    ) -> None:
        for i in range(_thread(), count, _threads()):
            H = scaled.shape[1]
            b, u = i // H, i % H
            if t >= lengths[b]:
                continue
            x = cuda.local.array(G, element)
            r = cuda.local.array(G, element)
            prev = cuda.local.array(S, element)
            result = cuda.local.array(1, element)
            saved = cuda.local.array(V, element)
            load_gates(gates, row, recurrent, b_ih, b_hh, b, u, x, r)
            prev[0] = before[kept + b, u]
            prepare_step(x, r, prev, result, saved)
            scaled[kept + b, u] = result[0]
            for v in range(V):
                values[kept + b, v * H + u] = saved[v]

    @_kernel
    def forward(
        count: Any,
        t: Any,
        row: Any,
        kept: Any,
        lengths: Any,
        gates: Any,  # as in `prepare`
        recurrent: Any,
        b_ih: Any,
        b_hh: Any,
        extra: Any,  # (E, H)
        before: Any,  # (T*B, P)
        others: Any,  # (B, (S-1)*H), updated
        hidden: Any,  # (T*B, H), written: h, before a projection
        values: Any,  # (T*B, V*H), written
    ) -> None:
        for i in range(_thread(), count, _threads()):
            H = hidden.shape[1]
            b, u = i // H, i % H
            if t >= lengths[b]:
                continue
            x = cuda.local.array(G, element)
            r = cuda.local.array(G, element)
            vectors = cuda.local.array(extras, element)
            prev = cuda.local.array(S, element)
            new = cuda.local.array(S, element)
            saved = cuda.local.array(V, element)
            load_gates(gates, row, recurrent, b_ih, b_hh, b, u, x, r)
            for e in range(E):
                vectors[e] = extra[e, u]
            prev[0] = before[kept + b, u] if u < before.shape[1] else zero  # not read with a projection
            for s in range(1, S):
                prev[s] = others[b, (s - 1) * H + u]
            for v in range(V):
                saved[v] = values[kept + b, v * H + u]  # what `prepare` left, if it ran
            forward_step(x, r, vectors, prev, new, saved)
            hidden[kept + b, u] = new[0]
            for s in range(1, S):
                others[b, (s - 1) * H + u] = new[s]
            for v in range(V):
                values[kept + b, v * H + u] = saved[v]

    @_kernel
    def backward(
        count: Any,
        t: Any,
        row: Any,
        lengths: Any,
        extra: Any,  # (E, H)
        before: Any,  # (T*B, P)
        others_before: Any,  # (T*B, (S-1)*H)
        values: Any,  # (T*B, V*H)
        dhidden: Any,  # (B, H): gradient of h, before a projection
        dothers: Any,  # (B, (S-1)*H), updated
        dx: Any,  # (T*B, G*H), written
        dr: Any,  # (T*B, G*H), written
        direct: Any,  # (B, H), written: gradient of the h before the step, but for the part through W_hh
        dextra: Any,  # (T*B, E*H), written
    ) -> None:
        for i in range(_thread(), count, _threads()):
            H = dhidden.shape[1]
            b, u = i // H, i % H
            if t >= lengths[b]:
                continue
            saved = cuda.local.array(V, element)
            vectors = cuda.local.array(extras, element)
            prev = cuda.local.array(S, element)
            dnew = cuda.local.array(S, element)
            dx_gates = cuda.local.array(G, element)
            dr_gates = cuda.local.array(G, element)
            dprev = cuda.local.array(S, element)
            dvectors = cuda.local.array(extras, element)
            for v in range(V):
                saved[v] = values[row + b, v * H + u]
            for e in range(E):
                vectors[e] = extra[e, u]
            prev[0] = before[row + b, u] if u < before.shape[1] else zero
            dnew[0] = dhidden[b, u]
            for s in range(1, S):
                prev[s] = others_before[row + b, (s - 1) * H + u]
                dnew[s] = dothers[b, (s - 1) * H + u]
            backward_step(saved, vectors, prev, dnew, dx_gates, dr_gates, dprev, dvectors)
            for g in range(G):
                dx[row + b, g * H + u] = dx_gates[g]
                dr[row + b, g * H + u] = dr_gates[g]
            direct[b, u] = dprev[0]
            for s in range(1, S):
                dothers[b, (s - 1) * H + u] = dprev[s]
            for e in range(E):
                dextra[row + b, e * H + u] = dvectors[e]

    @_kernel
    def prepare_backward(
        count: Any,
        t: Any,
        row: Any,
        lengths: Any,
        before: Any,  # as in `backward`
        values: Any,
        dscaled: Any,  # (B, H)
        dx: Any,  # (T*B, G*H), updated
        dr: Any,
        direct: Any,  # (B, H), updated
    ) -> None:
        for i in range(_thread(), count, _threads()):
            H = dscaled.shape[1]
            b, u = i // H, i % H
            if t >= lengths[b]:
                continue
            saved = cuda.local.array(V, element)
            prev = cuda.local.array(S, element)
            result = cuda.local.array(1, element)
            dx_gates = cuda.local.array(G, element)
            dr_gates = cuda.local.array(G, element)
            dprev = cuda.local.array(S, element)
            for v in range(V):
                saved[v] = values[row + b, v * H + u]
            prev[0] = before[row + b, u]
            result[0] = dscaled[b, u]
            for g in range(G):
                dx_gates[g] = dx[row + b, g * H + u]
                dr_gates[g] = dr[row + b, g * H + u]
            dprev[0] = direct[b, u]
            prepare_backward_step(saved, prev, result, dx_gates, dr_gates, dprev)
            for g in range(G):
                dx[row + b, g * H + u] = dx_gates[g]
                dr[row + b, g * H + u] = dr_gates[g]
            direct[b, u] = dprev[0]

    return Kernels(prepare, forward, backward, prepare_backward)
