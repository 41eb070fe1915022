"""The loops of `numba_loop` on a CPU: products are NumPy's, the functions of a cell are compiled, each by itself.

The cache of Numba keys a function by the bytes of those it closes over. That key is the same in every process only
while these are plain functions, as `register_jitable` leaves them, and has their code only where they were made in a
function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, register_jitable
from numba.misc.appdirs import AppDirs
from numba.np.arrayobj import populate_array
from numpy.typing import NDArray

from ..cells import Cell
from .numba_loop import Function, Target, loop, row_functions, slots

__all__ = ["array", "host", "run"]

Array = NDArray[Any]

UNITS = 128  # of a slot; a tile then takes a fifth of the L1 cache

_OPTIONS = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True}
_compiled: Callable[[Function], Function] = register_jitable(**_OPTIONS)
_inlined: Callable[[Function], Function] = register_jitable(_nrt=False, forceinline=True, **_OPTIONS)


def _cached(function: Function) -> Any:
    chosen = numba.config.CACHE_DIR
    # Keep what is compiled where Numba keeps it for a user, not in the package, which pip could then not remove whole.
    numba.config.CACHE_DIR = chosen or AppDirs(appname="numba", appauthor=False).user_cache_dir
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no directory that may be written to: neither the user's nor the package's
        return numba.njit(**_OPTIONS)(function)
    finally:
        numba.config.CACHE_DIR = chosen


@intrinsic
def _view(typing: Any, tile: Any, offset: Any) -> Any:
    """Makes an array whose strides are constants, which LLVM needs to see that two do not overlap."""
    view = types.Array(tile.dtype, 1, "A")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.gep(context.make_array(tile)(context, builder, arguments[0]).data, [arguments[1]])
        size = context.get_constant(types.intp, tile.dtype.bitwidth // 8)
        stride = context.get_constant(types.intp, tile.dtype.bitwidth // 8 * UNITS)
        array = context.make_array(view)(context, builder)
        shape = [context.get_constant(types.intp, 2**31)]  # not looked at
        populate_array(array, data=first, shape=shape, strides=[stride], itemsize=size, meminfo=None)
        return array._getvalue()

    return view(tile, types.intp), generate


@register_jitable(inline="always")
def _lanes(tile: Any, u: Any, a: Any, b: Any, c: Any) -> Any:
    return _view(tile, a + u), _view(tile, b + u), _view(tile, c + u)


@lru_cache
def _activations(dtype: np.dtype[Any]) -> tuple[Function, Function]:
    """Sigmoid and tanh that LLVM vectorises (at most 3 ulp where the result is normal).

    exp(a) = 2^n exp(r) with a = n ln 2 + r and |r| <= ln(2)/2, exp(r) - 1 as its Taylor series (Muller, Elementary
    Functions, 2016, chapter 11); the series ends where its next term is below a tenth of an ulp of the result.
    """
    single = dtype == np.float32
    number, integer = dtype.type, np.int32 if single else np.int64
    one, zero, two = number(1), number(0), number(2)
    mantissa, bias = (23, 127) if single else (52, 1023)
    rounder = number(1.5 * 2**mantissa)  # a + rounder holds the integer nearest to a in its lowest bits
    log2_e = number(1 / math.log(2))
    # ln 2 in two parts; the upper one has so few bits that its product with n is exact
    ln2_upper = number(0.693359375) if single else number(float.fromhex("0x1.62e42fee00000p-1"))
    ln2_lower = number(-2.12194440054690583e-4) if single else number(float.fromhex("0x1.a39ef35793c76p-33"))
    c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14 = (number(1 / math.factorial(k)) for k in range(2, 15))
    # Beyond these exp(-|a|) is below the smallest normal number and tanh rounds to its limit.
    exp_end = number(-math.log(np.finfo(dtype).tiny))
    tanh_end = number(10 if single else 20)

    def series(r: Any) -> Any:
        high = zero if single else c9 + r * (c10 + r * (c11 + r * (c12 + r * (c13 + r * c14))))
        return c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * (c7 + r * (c8 + r * high))))))

    def exp_minus_1(a: Any) -> Any:
        """(exp(a) - 1) / 2^n and 2^n, for a whose exp is a normal number."""
        rounded = a * log2_e + rounder
        n = rounded - rounder
        r = (a - n * ln2_upper) - n * ln2_lower
        power = integer((number(rounded).view(integer) + bias) << mantissa)
        return r + r * r * series(r), integer(power).view(number)

    series, exp_minus_1 = _inlined(series), _inlined(exp_minus_1)

    def sigmoid(a: Any) -> Any:
        magnitude = abs(a)
        p, power = exp_minus_1(-magnitude)
        small = zero if magnitude > exp_end else power * (one + p)  # exp(-|a|) in [0, 1]
        return (small if a < zero else one) / (one + small)

    def tanh(a: Any) -> Any:
        bounded = tanh_end if a > tanh_end else (-tanh_end if a < -tanh_end else a)
        p, power = exp_minus_1(two * bounded)
        e = power * p + (power - one)  # exp(2 a) - 1
        return e / (e + two)

    return _inlined(sigmoid), _inlined(tanh)


_TARGET = Target(UNITS, _compiled, _inlined, _lanes, _activations)


@lru_cache
def _functions(cell: Cell, dtype: np.dtype[Any], forward: bool) -> list[Function]:
    """`step` and `prepare` of a cell, compiled when they are first called."""
    return [_cached(function) for function in row_functions(cell, dtype, forward, _TARGET)]


def _where(rows: Array) -> Any:
    return True if rows.all() else rows[:, None]  # NumPy takes several times longer with a mask


def _assign(out: Array, source: Array, mask: Any, add: bool) -> None:
    if add:
        np.add(out, source, out=out, where=mask)
    else:
        np.copyto(out, source, where=mask)


def _product(out: Array, source: Array, weights: Array, add: Array, mask: Any) -> None:
    np.add(source @ weights, add, out=out, where=mask)


def array(array: Array) -> Array:
    """See `numba_layers`."""
    return array


host = array


def run(cell: Cell, dtype: np.dtype[Any], forward: bool, H: int, steps: Any, arrays: Any) -> None:
    """See `numba_layers`."""
    tile, place = np.zeros(slots(cell) * UNITS, dtype), (0, arrays.active.shape[1], 0, UNITS)

    def on_all_rows(compiled: Function) -> Function:
        return lambda H, rows, inputs, outputs: compiled(tile, H, place, rows, inputs, outputs)

    functions = [on_all_rows(one) for one in _functions(cell, dtype, forward)]
    loop(forward, _where, _assign, _product, functions)(H, steps, arrays)
