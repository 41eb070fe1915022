"""The loops of `numba_loop` on a GPU, a block for each row; exp and tanh are those of the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import cuda
from numpy.typing import NDArray

from ..cells import Cell
from .numba_loop import Function, Target, loop, row_functions, slots

__all__ = ["array", "host", "run"]

THREADS = 2 if numba.config.ENABLE_CUDASIM else 128  # of a block; the simulator starts a thread of the CPU for each

_device: Callable[[Function], Function] = cuda.jit(device=True)


@_device
def _lanes(tile: Any, u: Any, a: Any, b: Any, c: Any) -> Any:  # a tuple: Numba lets no function return one slice
    return tile[a:], tile[b:], tile[c:]


@_device
def _where(rows: Any) -> Any:
    return rows


@_device
def _assign(out: Any, source: Any, mask: Any, add: Any) -> None:
    b = cuda.blockIdx.x
    if mask[b]:
        given = source[b if len(source) > 1 else 0]
        for i in range(cuda.threadIdx.x, out.shape[1], cuda.blockDim.x):
            out[b, i] = out[b, i] + given[i] if add else given[i]
    cuda.syncthreads()


@_device
def _product(out: Any, source: Any, weights: Any, add: Any, mask: Any) -> None:
    b = cuda.blockIdx.x
    if mask[b]:
        for n in range(cuda.threadIdx.x, weights.shape[1], cuda.blockDim.x):
            total = add[b if len(add) > 1 else 0, n]
            for k in range(len(weights)):
                total += source[b, k] * weights[k, n]
            out[b, n] = total
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
def _kernel(cell: Cell, dtype: np.dtype[Any], forward: bool) -> Any:
    count, element = slots(cell), numba.from_dtype(dtype)

    def on_row(compiled: Function) -> Function:
        @_device
        def function(H: Any, rows: Any, inputs: Any, outputs: Any) -> None:
            tile, b = cuda.local.array(count, element), cuda.blockIdx.x
            compiled(tile, H, (b, b + 1, cuda.threadIdx.x, cuda.blockDim.x), rows, inputs, outputs)
            cuda.syncthreads()

        return function

    target = Target(1, _device, _device, _lanes, _activations)
    functions = [on_row(_device(one)) for one in row_functions(cell, dtype, forward, target)]
    all_steps = _device(loop(forward, _where, _assign, _product, functions))

    @cuda.jit
    def kernel(H: Any, steps: Any, arrays: Any) -> None:  # of this module, whose `cuda` the simulator puts its own for
        all_steps(H, steps, arrays)

    return kernel


def array(array: NDArray[Any]) -> Any:
    """See `numba_layers`; what is on the device stays as it is."""
    return cuda.to_device(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array


def host(array: Any) -> NDArray[Any]:
    """See `numba_layers`."""
    return np.asarray(array.copy_to_host())


def run(cell: Cell, dtype: np.dtype[Any], forward: bool, H: int, steps: Any, arrays: Any) -> None:
    """See `numba_layers`."""
    T, B = arrays.active.shape
    if T and B:
        with warnings.catch_warnings():  # of a launch that does not fill the device, as that of a small layer cannot
            warnings.filterwarnings("ignore", ".*Grid size")
            _kernel(cell, dtype, forward)[B, THREADS](H, steps, arrays)
