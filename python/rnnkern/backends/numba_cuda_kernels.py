"""The loops of `numba_layers` on a GPU, a block for each row."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import cuda

from ..cells import Cell
from .numba_layers import loop
from .numba_units import Function, unit_functions

__all__ = ["array", "run"]

# Threads of a block, and blocks at least: Numba warns of fewer. The simulator starts a thread of the CPU for each.
THREADS, BLOCKS = (2, 1) if numba.config.ENABLE_CUDASIM else (128, 128)

_device = cuda.jit(device=True)


@_device
def _assign(out: Any, source: Any, rows: Any, add: Any) -> None:
    b = cuda.blockIdx.x
    if rows[b]:
        given = source[b if len(source) > 1 else 0]
        for i in range(cuda.threadIdx.x, out.shape[1], cuda.blockDim.x):
            out[b, i] = out[b, i] + given[i] if add else given[i]
    cuda.syncthreads()


@_device
def _product(out: Any, source: Any, weights: Any, add: Any, rows: Any) -> None:
    b = cuda.blockIdx.x
    if rows[b]:
        for n in range(cuda.threadIdx.x, weights.shape[1], cuda.blockDim.x):
            total = add[b if len(add) > 1 else 0, n]
            for k in range(len(weights)):
                total += source[b, k] * weights[k, n]
            out[b, n] = total
    cuda.syncthreads()


def _on_row(unit: Function) -> Any:
    @_device
    def function(H: Any, rows: Any, matrices: Any) -> None:
        b = cuda.blockIdx.x
        if rows[b]:
            for u in range(cuda.threadIdx.x, H, cuda.blockDim.x):
                unit(H, b, u, matrices)
        cuda.syncthreads()

    return function


@lru_cache
def _kernel(cell: Cell, dtype: np.dtype[Any], forward: bool) -> Any:
    functions = [_on_row(unit) for unit in unit_functions(cell, dtype, forward, _device)]
    all_steps = _device(loop(forward, _assign, _product, functions))

    @cuda.jit
    def kernel(H: Any, steps: Any, arrays: Any) -> None:  # of this module, whose `cuda` the simulator puts its own for
        if cuda.blockIdx.x < arrays.active.shape[1]:
            all_steps(H, steps, arrays)

    return kernel


def array(array: Any) -> Any:
    """See `numba_layers`; what is on the device stays as it is."""
    return cuda.to_device(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array


def run(cell: Cell, dtype: np.dtype[Any], forward: bool, H: int, steps: Any, arrays: Any) -> None:
    """See `numba_layers`."""
    T, B = arrays.active.shape
    if T and B:
        _kernel(cell, dtype, forward)[max(B, BLOCKS), THREADS](H, steps, arrays)
