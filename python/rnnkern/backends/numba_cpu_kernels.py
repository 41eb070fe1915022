"""What the loop of `numba_rows` is made of on a CPU, and where its code is kept.

The loop is compiled once a dtype, and gets the functions of a cell, each compiled by itself, as arguments. The cache of
Numba keys a function by the bytes of those it closes over. That key is the same in every process only while these are
plain functions, as `register_jitable` leaves them, and has their code only where they were made in a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
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
from .numba_rows import Function, Target, backward_slots, forward_slots, loop, tile_functions

__all__ = ["array", "host", "run"]

UNITS = 64  # of a tile, which then takes a fifth of the L1 cache

_OPTIONS = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True}
_compiled: Callable[[Function], Function] = register_jitable(_nrt=False, **_OPTIONS)  # nobody counts references
_inlined: Callable[[Function], Function] = register_jitable(_nrt=False, forceinline=True, **_OPTIONS)


def _cached(decorator: Callable[..., Any], function: Function, *arguments: Any) -> Any:
    chosen = numba.config.CACHE_DIR
    # Keep what is compiled where Numba keeps it for a user, not in the package, which pip could then not remove whole.
    numba.config.CACHE_DIR = chosen or AppDirs(appname="numba", appauthor=False).user_cache_dir
    try:
        return decorator(*arguments, cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no directory that may be written to: neither the user's nor the package's
        return decorator(*arguments, **_OPTIONS)(function)
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
def _lane(tile: Any, offset: Any) -> Any:
    return _view(tile, offset)


def _target() -> Target:
    """The functions of a CPU; made in a function, so that the key of the cache has their code and not their names."""

    def assign(place: Any, out: Any, source: Any, add: Any) -> None:
        for i in range(len(out)):
            out[i] = out[i] + source[i] if add else source[i]

    def product(
        place: Any, t: Any, lengths: Any, out: Any, out_row: Any, first: Any, source: Any, row: Any, column: Any,
        weights: Any,
    ) -> None:  # fmt: skip
        K, N = weights.shape
        unrolled = K // 4 * 4  # 4 steps of k for each load and store of `out`, for all rows while in the L1 cache
        for k in range(0, unrolled, 4):
            w0, w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
            for b in range(place[0], place[1]):
                if t < lengths[b]:
                    a, total = source[row + b, column + k : column + k + 4], out[out_row + b, first : first + N]
                    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
                    for n in range(N):
                        total[n] += a0 * w0[n] + a1 * w1[n] + a2 * w2[n] + a3 * w3[n]
        for k in range(unrolled, K):
            for b in range(place[0], place[1]):
                if t < lengths[b]:
                    a0, w0, total = source[row + b, column + k], weights[k], out[out_row + b, first : first + N]
                    for n in range(N):
                        total[n] += a0 * w0[n]

    def call(first: Any, second: Any, which: Any, tile: Any, width: Any) -> None:
        if which == 0:
            first(tile, width)
        else:
            second(tile, width)

    def wait() -> None:
        """Nothing: a row has one thread."""

    assign, product, call, wait = (_compiled(function) for function in (assign, product, call, wait))
    return Target(UNITS, _inlined, _lane, assign, product, call, wait, _activations)


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


_TARGET = _target()
_loop = _cached(numba.njit, loop(replace(_TARGET, compiled=_compiled)))  # whose functions are too large to be inlined


@lru_cache
def _functions(cell: Cell, dtype: np.dtype[Any], forward: bool) -> tuple[Any, Any]:
    """The compiled functions of a cell for a direction; the same twice where it has one."""
    functions = tile_functions(cell, dtype, _TARGET)
    first, second = functions[:2] if forward else functions[2:]
    of_tile = types.void(types.Array(numba.from_dtype(dtype), 1, "C"), types.intp)
    compiled = _cached(numba.cfunc, first, of_tile)
    return compiled, _cached(numba.cfunc, second, of_tile) if cell.late_gates else compiled


def array(array: NDArray[Any]) -> NDArray[Any]:
    """See `numba_layers`."""
    return np.require(array, requirements=["C", "W"])


host = array


def run(cell: Cell, dtype: np.dtype[Any], forward: bool, H: int, steps: Any, lengths: Any, *rest: Any) -> None:
    """See `numba_layers`."""
    tile = np.zeros((forward_slots if forward else backward_slots)(cell)[-1] * UNITS, dtype)
    _loop((0, len(lengths), 0, 1), tile, H, steps, lengths, *rest, *_functions(cell, dtype, forward))
