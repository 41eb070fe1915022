"""What the loop of `numba_rows` is made of on a GPU; exp and tanh are those of the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import cuda
from numba.core.errors import NumbaPerformanceWarning
from numpy.typing import NDArray

from ..cells import Cell
from .numba_rows import Function, Target, backward_slots, forward_slots, loop, tile_functions

__all__ = ["array", "host", "run"]

# The simulator starts a thread of the CPU for each.
THREADS = 2 if numba.config.ENABLE_CUDASIM else 128
MAX_BLOCKS = 1 if numba.config.ENABLE_CUDASIM else 65535

_kernel: Callable[[Function], Function] = cuda.jit
_device: Callable[[Function], Function] = cuda.jit(device=True)


@_device
def _lane(tile: Any, offset: Any) -> Any:
    return tile[offset:]


@_device
def _assign(place: Any, out: Any, source: Any, add: Any) -> None:
    for i in range(place[2], len(out), place[3]):
        out[i] = out[i] + source[i] if add else source[i]


@_device
def _add_product(
    place: Any, t: Any, lengths: Any, out: Any, out_row: Any, first: Any, source: Any, row: Any, column: Any,
    weights: Any,
) -> None:  # fmt: skip
    K, N = weights.shape
    for b in range(place[0], place[1]):
        if t < lengths[b]:
            for n in range(place[2], N, place[3]):
                total = out[out_row + b, first + n]
                for k in range(K):
                    total += source[row + b, column + k] * weights[k, n]
                out[out_row + b, first + n] = total


@_device
def _wait() -> None:
    cuda.syncthreads()


def _activations(dtype: np.dtype[Any]) -> tuple[Function, Function]:
    one, zero = dtype.type(1), dtype.type(0)

    def sigmoid(a: Any) -> Any:
        small = math.exp(-abs(a))  # in [0, 1]: no overflow on either side
        return (small if a < zero else one) / (one + small)

    def tanh(a: Any) -> Any:
        return math.tanh(a)

    return _device(sigmoid), _device(tanh)


@lru_cache
def _loop(cell: Cell, dtype: np.dtype[Any], forward: bool) -> Any:
    """The loop as a kernel, a block for each row."""
    target = Target(1, _device, _lane, _assign, _add_product, _wait, _wait, _activations)
    functions = tile_functions(cell, dtype, target)
    first, second = functions[:2] if forward else functions[2:]
    first, second = _device(first), _device(second if cell.late_gates else first)

    @_device
    def call(unused: Any, unused_too: Any, which: Any, tile: Any, width: Any) -> None:
        if which == 0:
            first(tile, width)
        else:
            second(tile, width)

    rows = _device(loop(replace(target, call=call)))
    slots, element = (forward_slots if forward else backward_slots)(cell)[-1], numba.from_dtype(dtype)

    @_kernel
    def kernel(H: Any, steps: Any, lengths: Any, cut: Any, program: Any, arrays: Any) -> None:
        tile = cuda.local.array(slots, element)
        for b in range(cuda.blockIdx.x, len(lengths), cuda.gridDim.x):
            place = (np.int64(b), np.int64(b + 1), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x))
            rows(place, tile, H, steps, lengths, cut, program, arrays, 0, 0)

    return kernel


def array(array: NDArray[Any]) -> Any:
    """See `numba_layers`; what is on the device stays as it is."""
    return cuda.to_device(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array


def host(array: Any) -> NDArray[Any]:
    """See `numba_layers`."""
    return np.asarray(array.copy_to_host())


def run(cell: Cell, dtype: np.dtype[Any], forward: bool, H: int, steps: Any, lengths: Any, *rest: Any) -> None:
    """See `numba_layers`."""
    with warnings.catch_warnings():  # of a launch that does not fill the device, as that of a small layer cannot
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        _loop(cell, dtype, forward)[min(len(lengths), MAX_BLOCKS), THREADS](H, steps, lengths, *rest)
