"""The functions of a cell on one unit of a row, as Python that Numba compiles for a CPU and for a GPU.

A function of a cell runs once, on numbers that write down what is done with them. What they have written is plain
code of scalars, from which LLVM makes vectors where a loop over units is around it.
"""

from __future__ import annotations

import inspect
import math as numbers
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..cells import Cell

__all__ = ["Function", "unit_functions"]

Function = Callable[..., Any]


class _Number:
    """A number of the code: what is done with it writes a line."""

    def __init__(self, code: list[str], expression: str) -> None:
        self.code, self.name = code, f"v{len(code)}"
        code.append(f"{self.name} = {expression}")

    def __add__(self, other: _Number) -> _Number:
        return _Number(self.code, f"{self.name} + {other.name}")

    def __sub__(self, other: _Number) -> _Number:
        return _Number(self.code, f"{self.name} - {other.name}")

    def __mul__(self, other: _Number) -> _Number:
        return _Number(self.code, f"{self.name} * {other.name}")


class _Matrix(dict[int, _Number]):
    """An argument of a function of a cell: has what was set, and reads anything else, which writes a line."""

    def __init__(self, code: list[str], name: str) -> None:
        super().__init__()
        row = 0 if name == "extra" else "b"  # all rows have the same extras
        self.code, self.element = code, f"{name}[{row}, {{}} * H + u]"

    def __missing__(self, i: int) -> _Number:
        return _Number(self.code, self.element.format(i))


def _source(cell: Cell, name: str) -> str:
    """The code of a function of a cell for unit u of row b; matrices are its arguments, (B, n*H) or (1, n*H)."""
    code: list[str] = []
    functions = ("sigmoid", "tanh", "relu", "relu_gradient")
    writing = {one: lambda a, one=one: _Number(code, f"{one}({a.name})") for one in functions}
    math: Any = SimpleNamespace(one=_Number(code, "one"), zero=_Number(code, "zero"), **writing)
    function = getattr(cell.math(math), name)
    arguments = list(inspect.signature(function).parameters)
    matrices = [_Matrix(code, one) for one in arguments]
    function(*matrices)
    # Set nothing before all is read: what is read and what is set may be one array.
    code += [f"{one.element.format(i)} = {number.name}" for one in matrices for i, number in one.items()]
    lines = [f"def {cell.name}_{name}(H, b, u, matrices):", f"{', '.join(arguments)} = matrices", *code]
    return "\n    ".join(lines)


def unit_functions(cell: Cell, dtype: np.dtype[Any], forward: bool, compiled: Callable[[Function], Function]) -> Any:
    """`step` and, where a cell has it, `prepare`, through what makes functions that compiled ones can call:

    function(H, b, u, matrices)
    """
    names = ("forward", "prepare") if forward else ("backward", "prepare_backward")
    namespace = {"__name__": __name__, **_elementwise(dtype, compiled)}
    for name in names[: 1 + (cell.late_gates > 0)]:
        exec(_source(cell, name), namespace)
        yield compiled(namespace[f"{cell.name}_{name}"])


def _elementwise(dtype: np.dtype[Any], compiled: Callable[[Function], Function]) -> dict[str, Any]:
    """What the code of cells calls; of the dtype, so that float32 does not widen.

    Sigmoid and tanh are such that LLVM vectorises them (at most 3 ulp where the result is normal): exp(a) = 2^n exp(r)
    with a = n ln 2 + r and |r| <= ln(2)/2, exp(r) - 1 as its Taylor series (Muller, Elementary Functions, 2016, chapter
    11); the series ends where its next term is below a tenth of an ulp of the result.
    """
    single = dtype == np.float32
    number, integer = dtype.type, np.int32 if single else np.int64
    one, zero, two = number(1), number(0), number(2)
    mantissa, bias = (23, 127) if single else (52, 1023)
    rounder = number(1.5 * 2**mantissa)  # a + rounder holds the integer nearest to a in its lowest bits
    log2_e = number(1 / numbers.log(2))
    # ln 2 in two parts; the upper one has so few bits that its product with n is exact
    ln2_upper = number(0.693359375) if single else number(float.fromhex("0x1.62e42fee00000p-1"))
    ln2_lower = number(-2.12194440054690583e-4) if single else number(float.fromhex("0x1.a39ef35793c76p-33"))
    c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14 = (number(1 / numbers.factorial(k)) for k in range(2, 15))
    # Beyond these exp(-|a|) is below the smallest normal number and tanh rounds to its limit.
    exp_end = number(-numbers.log(np.finfo(dtype).tiny))
    tanh_end = number(10 if single else 20)

    @compiled
    def exp_minus_1(a: Any) -> Any:
        """(exp(a) - 1) / 2^n and 2^n, for a whose exp is a normal number."""
        rounded = a * log2_e + rounder
        n = rounded - rounder
        r = (a - n * ln2_upper) - n * ln2_lower
        power = integer((number(rounded).view(integer) + bias) << mantissa)
        high = zero if single else c9 + r * (c10 + r * (c11 + r * (c12 + r * (c13 + r * c14))))
        series = c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * (c7 + r * (c8 + r * high))))))
        return r + r * r * series, integer(power).view(number)

    @compiled
    def sigmoid(a: Any) -> Any:
        magnitude = abs(a)
        p, power = exp_minus_1(-magnitude)
        small = zero if magnitude > exp_end else power * (one + p)  # exp(-|a|) in [0, 1]
        return (small if a < zero else one) / (one + small)

    @compiled
    def tanh(a: Any) -> Any:
        bounded = tanh_end if a > tanh_end else (-tanh_end if a < -tanh_end else a)
        p, power = exp_minus_1(two * bounded)
        e = power * p + (power - one)  # exp(2 a) - 1
        return e / (e + two)

    @compiled
    def relu(a: Any) -> Any:
        return zero if a <= zero else a  # NaN stays NaN

    @compiled
    def relu_gradient(h: Any) -> Any:
        return one if h > zero else (zero if h <= zero else h)  # NaN stays NaN

    return {"one": one, "zero": zero, "sigmoid": sigmoid, "tanh": tanh, "relu": relu, "relu_gradient": relu_gradient}
