"""What the two Numba backends share: the functions of `cells.py` compiled for elements of one dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cells import Cell, CellMath

__all__ = ["compile_cell"]

Function = Callable[..., Any]


@dataclass
class _Elementwise:
    """A `cells.Math` of compiled functions; the constants have the dtype, so that float32 does not widen."""

    one: Any
    zero: Any
    sigmoid: Any
    tanh: Any
    relu: Any
    relu_gradient: Any


def compile_cell(
    cell: Cell, dtype: np.dtype[Any], compiled: Callable[[Function], Function], sigmoid: Function, tanh: Function
) -> CellMath:
    """The functions of a cell, each passed through `compiled`, in terms of a `sigmoid` and a `tanh` of the target."""
    one, zero = dtype.type(1), dtype.type(0)

    def relu(a: Any) -> Any:
        return zero if a <= zero else a  # NaN stays NaN

    def relu_gradient(h: Any) -> Any:
        if h > zero:
            return one
        return zero if h <= zero else h  # NaN stays NaN

    functions = (compiled(function) for function in (sigmoid, tanh, relu, relu_gradient))
    math = cell.math(_Elementwise(one, zero, *functions))
    return CellMath(
        forward=compiled(math.forward),
        backward=compiled(math.backward),
        prepare=None if math.prepare is None else compiled(math.prepare),
        prepare_backward=None if math.prepare_backward is None else compiled(math.prepare_backward),
    )
