"""The compiled time loops of the backend `numba`, one forward and one backward a cell and dtype.

A loop takes its steps, its panels of `UNITS` hidden units and its rows in this order. A panel of a row is worked on in
a tile that stays in the L1 cache: the recurrent product of all its gates, then the elementwise step of the cell. Every
element is a sum in the order of k whatever the batch, so a row of a batch gets the bits of that row alone.

A tile holds the arguments of the functions of `CellMath` as consecutive slots of `UNITS` elements each. One unit of it
has a type of its own, `_Lane`: LLVM does not vectorise a loop over NumPy views, which count references, nor one over
many arrays, which it would have to check for overlap pair by pair.

The cache of Numba keys a kernel by the bytes of the functions it closes over, those of the cell included. That key is
the same in every process only while these are plain functions: compiled ones are reached as globals of this module.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic, models, overload, register_jitable, register_model
from numba.misc.appdirs import AppDirs

from ..cells import Cell, CellMath
from .numba_math import Function, compile_cell

__all__ = ["UNITS", "backward_kernel", "backward_slots", "forward_kernel", "forward_slots"]

UNITS = 64  # hidden units in a panel; GRU, H = 128, B = 32: 133 us a step with 32, 99 with 64, 95 with 128 (Zen 3)

_OPTIONS = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True}
_inlined: Callable[[Function], Function] = register_jitable(forceinline=True, **_OPTIONS)


def _compiled(function: Function) -> Function:
    chosen = numba.config.CACHE_DIR
    # Keep what is compiled where Numba keeps it for a user, not in the package, which pip could then not remove whole.
    numba.config.CACHE_DIR = chosen or AppDirs(appname="numba", appauthor=False).user_cache_dir
    try:
        compiled: Function = numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no directory that may be written to: neither the user's nor the package's
        compiled = numba.njit(**_OPTIONS)(function)
    finally:
        numba.config.CACHE_DIR = chosen
    return compiled


class _Lane(types.Type):
    """One unit of a tile: a pointer whose elements are UNITS apart."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"rnnkern.Lane({dtype})")


register_model(_Lane)(models.PointerModel)
_typed_intrinsic: Callable[[Function], Function] = intrinsic


def _element(builder: Any, lane: Any, index: Any) -> Any:
    return builder.gep(lane, [builder.mul(index, index.type(UNITS))])


@_typed_intrinsic
def _lane(typing: Any, array: Any, offset: Any) -> Any:
    """The lane that starts at a flat offset into a C-contiguous array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset = arguments
        first = context.make_array(signature.args[0])(context, builder, array).data
        return builder.gep(first, [offset])

    return _Lane(array.dtype)(array, types.intp), generate


@_typed_intrinsic
def _load(typing: Any, lane: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_element(builder, *arguments))

    return lane.dtype(lane, types.intp), generate


@_typed_intrinsic
def _store(typing: Any, lane: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lane, index, value = arguments
        builder.store(value, _element(builder, lane, index))
        return context.get_dummy_value()

    return types.void(lane, types.intp, lane.dtype), generate


@overload(operator.getitem, strict=False)
def _getitem(lane: Any, index: Any) -> Any:
    return (lambda lane, index: _load(lane, index)) if isinstance(lane, _Lane) else None


@overload(operator.setitem, strict=False)
def _setitem(lane: Any, index: Any, value: Any) -> Any:
    return (lambda lane, index, value: _store(lane, index, value)) if isinstance(lane, _Lane) else None


@lru_cache
def _cell_math(cell: Cell, dtype: np.dtype[Any]) -> CellMath:
    """The functions of a cell with sigmoid and tanh that LLVM vectorises (at most 3 ulp where the result is normal).

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

    def series_single(r: Any) -> Any:
        return c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * (c7 + r * c8)))))

    def series_double(r: Any) -> Any:
        high = c9 + r * (c10 + r * (c11 + r * (c12 + r * (c13 + r * c14))))
        return c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * (c7 + r * (c8 + r * high))))))

    series = _inlined(series_single if single else series_double)

    def exp_minus_1(a: Any) -> Any:
        """(exp(a) - 1) / 2^n and 2^n, for a whose exp is a normal number."""
        rounded = a * log2_e + rounder
        n = rounded - rounder
        r = (a - n * ln2_upper) - n * ln2_lower
        power = integer((number(rounded).view(integer) + bias) << mantissa)
        return r + r * r * series(r), integer(power).view(number)

    exp_minus_1 = _inlined(exp_minus_1)

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

    return compile_cell(cell, dtype, _inlined, sigmoid, tanh)


@_inlined
def _at(array: Any, offset: int) -> Any:
    return _lane(array, offset)[0]


# In what follows an array and a flat offset into it stand for a vector: an index of NumPy's would be checked for being
# negative in every element.


@_compiled
def _copy(out: Any, start: int, source: Any, first: int, count: int) -> None:
    """out[start : start + count] = source[first : first + count]."""
    for u in range(count):
        _lane(out, start + u)[0] = _lane(source, first + u)[0]


@_compiled
def _add(out: Any, start: int, source: Any, first: int, count: int) -> None:
    """out[start : start + count] += source[first : first + count]."""
    for u in range(count):
        _lane(out, start + u)[0] += _lane(source, first + u)[0]


@_compiled
def _multiply_add(out: Any, start: int, rows: Any, first: int, weights: Any, block: int, width: int) -> None:
    """out[start : start + width] += rows[first : first + K] @ weights[block], weights (blocks, K, UNITS)."""
    K = weights.shape[1]
    unrolled = K // 8 * 8  # 8 steps of k for each load and store of `out`
    for k in range(0, unrolled, 8):
        i = first + k
        a0, a1, a2, a3 = _at(rows, i), _at(rows, i + 1), _at(rows, i + 2), _at(rows, i + 3)
        a4, a5, a6, a7 = _at(rows, i + 4), _at(rows, i + 5), _at(rows, i + 6), _at(rows, i + 7)
        for u in range(width):
            w = _lane(weights, (block * K + k) * UNITS + u)
            total = _lane(out, start + u)[0] + a0 * w[0] + a1 * w[1] + a2 * w[2] + a3 * w[3]
            _lane(out, start + u)[0] = total + a4 * w[4] + a5 * w[5] + a6 * w[6] + a7 * w[7]
    for k in range(unrolled, K):
        a0 = _lane(rows, first + k)[0]
        for u in range(width):
            _lane(out, start + u)[0] += a0 * _lane(weights, (block * K + k) * UNITS + u)[0]


def _nothing(*_: Any) -> None:
    """Stands for `prepare` and `prepare_backward` where a cell has none."""


def _starts(counts: list[int]) -> tuple[int, ...]:
    """The first slot of each argument, and the number of slots."""
    return (0, *accumulate(counts))


def forward_slots(cell: Cell) -> tuple[int, ...]:
    """Slots of x, r, extra, prev, new, saved and scaled in the tile of the forward kernel, and their number."""
    G, S = len(cell.gates), len(cell.states)
    return _starts([G, G, len(cell.extras), S, S, len(cell.saved), 1])


def backward_slots(cell: Cell) -> tuple[int, ...]:
    """Slots of saved, extra, prev, dnew, dx, dr, dprev, dextra and dscaled, and their number."""
    G, S, E = len(cell.gates), len(cell.states), len(cell.extras)
    return _starts([len(cell.saved), E, S, S, G, G, S, E, 1])


@lru_cache
def forward_kernel(cell: Cell, dtype: np.dtype[Any]) -> Function:
    """The time loop forward of a cell; see its arguments."""
    math = _cell_math(cell, dtype)
    forward = math.forward
    prepare = _inlined(_nothing) if math.prepare is None else math.prepare
    G, S, E, V, L = len(cell.gates), len(cell.states), len(cell.extras), len(cell.saved), cell.late_gates
    X, R, EXTRA, PREV, NEW, SAVED, SCALED, slots = forward_slots(cell)
    size = slots * UNITS
    phases = 2 if L else 1

    def run(
        order: Any,  # steps in the order of this direction
        lengths: Any,  # (B,)
        cut: Any,  # (T, B)
        gates: Any,  # (T, B, G*H): W_ih x + b_ih
        b_hh: Any,  # (G*H,)
        early: Any,  # (panels of H * (G-L), P, UNITS): W_hh of the gates whose product is with h
        late: Any,  # (panels of H * L, H, UNITS): of the last L gates
        projection: Any,  # (panels of P, H, UNITS): W_hr; no panel where there is none
        extra: Any,  # (E, H)
        states: Any,  # (S, B, H padded to panels), updated
        h: Any,  # (B, P padded to panels), updated; states[0] where there is no projection
        before: Any,  # (T or 1, B, P): h before each step, for backward
        others_before: Any,  # (T or 1, B, S-1, H): the other states
        scaled: Any,  # (T or 1, B, H) where L > 0: input of the late product
        values: Any,  # (T or 1, B, V, H)
        hidden: Any,  # (T or 1, B, H) with a projection: h before it
        y: Any,  # (T, B, P)
        tiles: Any,  # (B * panels of H where L > 0, else 1, slots, UNITS)
        width: int,  # units of a panel to compute, at most UNITS
    ) -> None:
        B, H, P = y.shape[1], extra.shape[1], y.shape[2]
        padded_H, padded_P = states.shape[2], h.shape[1]
        for t in order:
            first_row = min(t, before.shape[0] - 1) * B
            for b in range(B):
                if t >= lengths[b]:
                    before[min(t, before.shape[0] - 1), b] = 0
                    continue
                if cut[t, b]:
                    h[b] = 0
                    states[:, b] = 0
                _copy(before, (first_row + b) * P, h, b * padded_P, P)
                for s in range(1, S):
                    other = (first_row + b) * (S - 1) + s - 1
                    _copy(others_before, other * H, states, (s * B + b) * padded_H, H)
            for phase in range(phases):
                for panel in range(padded_H // UNITS):
                    unit = panel * UNITS
                    count = min(UNITS, H - unit)
                    for b in range(B):
                        if t >= lengths[b]:
                            continue
                        row = first_row + b
                        tile = (panel * B + b if phases == 2 else 0) * size
                        if phase == 0:
                            for g in range(G):
                                _copy(tiles, tile + (X + g) * UNITS, gates, ((t * B + b) * G + g) * H + unit, count)
                                _copy(tiles, tile + (R + g) * UNITS, b_hh, g * H + unit, count)
                            for e in range(E):
                                _copy(tiles, tile + (EXTRA + e) * UNITS, extra, e * H + unit, count)
                            for s in range(S):
                                _copy(tiles, tile + (PREV + s) * UNITS, states, (s * B + b) * padded_H + unit, count)
                            for g in range(G - L):
                                block = panel * (G - L) + g
                                _multiply_add(tiles, tile + (R + g) * UNITS, before, row * P, early, block, width)
                        if phase < phases - 1:
                            for u in range(tile, tile + width):
                                prepare(
                                    _lane(tiles, X * UNITS + u),
                                    _lane(tiles, R * UNITS + u),
                                    _lane(tiles, PREV * UNITS + u),
                                    _lane(tiles, SCALED * UNITS + u),
                                    _lane(tiles, SAVED * UNITS + u),
                                )
                            _copy(scaled, row * H + unit, tiles, tile + SCALED * UNITS, count)
                            continue
                        for g in range(L):
                            slot = R + G - L + g
                            _multiply_add(tiles, tile + slot * UNITS, scaled, row * H, late, panel * L + g, width)
                        for u in range(tile, tile + width):
                            forward(
                                _lane(tiles, X * UNITS + u),
                                _lane(tiles, R * UNITS + u),
                                _lane(tiles, EXTRA * UNITS + u),
                                _lane(tiles, PREV * UNITS + u),
                                _lane(tiles, NEW * UNITS + u),
                                _lane(tiles, SAVED * UNITS + u),
                            )
                        for s in range(S):
                            _copy(states, (s * B + b) * padded_H + unit, tiles, tile + (NEW + s) * UNITS, count)
                        for v in range(V):
                            _copy(values, (row * V + v) * H + unit, tiles, tile + (SAVED + v) * UNITS, count)
            for b in range(B):
                if t >= lengths[b]:
                    y[t, b] = 0
                    continue
                if projection.shape[0] > 0:
                    _copy(hidden, (first_row + b) * H, states, b * padded_H, H)
                    h[b] = 0
                    for panel in range(projection.shape[0]):
                        _multiply_add(
                            h, b * padded_P + panel * UNITS, hidden, (first_row + b) * H, projection, panel, width
                        )
                _copy(y, (t * B + b) * P, h, b * padded_P, P)

    return _compiled(run)


@lru_cache
def backward_kernel(cell: Cell, dtype: np.dtype[Any]) -> Function:
    """The time loop backward of a cell; see its arguments."""
    math = _cell_math(cell, dtype)
    backward = math.backward
    prepare_backward = _inlined(_nothing) if math.prepare_backward is None else math.prepare_backward
    G, S, E, V, L = len(cell.gates), len(cell.states), len(cell.extras), len(cell.saved), cell.late_gates
    SAVED, EXTRA, PREV, DNEW, DX, DR, DPREV, DEXTRA, DSCALED, slots = backward_slots(cell)
    size = slots * UNITS
    phases = 2 if L else 1

    def run(
        order: Any,  # steps in the opposite order of this direction
        lengths: Any,  # (B,)
        cut: Any,  # (T, B)
        dy: Any,  # (T, B, P)
        early: Any,  # (panels of P, (G-L)*H, UNITS): W_hh^T of the gates whose product is with h
        late: Any,  # (panels of H, L*H, UNITS): of the last L gates
        projection: Any,  # (panels of H, P, UNITS): W_hr^T; no panel where there is none
        extra: Any,  # (E, H)
        before: Any,  # (T, B, P); this and the next two as the forward kernel left them
        others_before: Any,  # (T, B, S-1, H)
        values: Any,  # (T, B, V, H)
        dstates: Any,  # (S, B, H padded to panels), updated
        dh: Any,  # (B, P padded to panels), updated; dstates[0] where there is no projection
        dx: Any,  # (T, B, G*H), zeros; receives the gradient of gates
        dr: Any,  # (T, B, G*H), zeros; that of their recurrent share
        dprojected: Any,  # (T, B, P) with a projection, zeros; that of h
        dextra: Any,  # (B, E, H), zeros
        tiles: Any,  # (B * panels of H where L > 0, else 1, slots, UNITS)
        width: int,  # units of a panel to compute, at most UNITS
    ) -> None:
        B, H, P = dx.shape[1], extra.shape[1], dy.shape[2]
        padded_H, padded_P = dstates.shape[2], dh.shape[1]
        projects = projection.shape[0] > 0
        for t in order:
            for b in range(B):
                if t >= lengths[b]:
                    continue
                row = t * B + b
                _add(dh, b * padded_P, dy, row * P, P)
                if projects:
                    _copy(dprojected, row * P, dh, b * padded_P, P)
                    dh[b] = 0
                    dstates[0, b] = 0
                    for panel in range(projection.shape[0]):
                        _multiply_add(
                            dstates, b * padded_H + panel * UNITS, dprojected, row * P, projection, panel, width
                        )
            for phase in range(phases):
                for panel in range(padded_H // UNITS):
                    unit = panel * UNITS
                    count = min(UNITS, H - unit)
                    for b in range(B):
                        if t >= lengths[b]:
                            continue
                        row = t * B + b
                        tile = (panel * B + b if phases == 2 else 0) * size
                        if phase == 0:
                            for v in range(V):
                                _copy(tiles, tile + (SAVED + v) * UNITS, values, (row * V + v) * H + unit, count)
                            for e in range(E):
                                _copy(tiles, tile + (EXTRA + e) * UNITS, extra, e * H + unit, count)
                            if not projects:
                                _copy(tiles, tile + PREV * UNITS, before, row * P + unit, count)
                            for s in range(1, S):
                                other = row * (S - 1) + s - 1
                                _copy(tiles, tile + (PREV + s) * UNITS, others_before, other * H + unit, count)
                            for s in range(S):
                                _copy(tiles, tile + (DNEW + s) * UNITS, dstates, (s * B + b) * padded_H + unit, count)
                            for u in range(tile, tile + width):
                                backward(
                                    _lane(tiles, SAVED * UNITS + u),
                                    _lane(tiles, EXTRA * UNITS + u),
                                    _lane(tiles, PREV * UNITS + u),
                                    _lane(tiles, DNEW * UNITS + u),
                                    _lane(tiles, DX * UNITS + u),
                                    _lane(tiles, DR * UNITS + u),
                                    _lane(tiles, DPREV * UNITS + u),
                                    _lane(tiles, DEXTRA * UNITS + u),
                                )
                            for e in range(E):
                                _add(dextra, (b * E + e) * H + unit, tiles, tile + (DEXTRA + e) * UNITS, count)
                        else:
                            tiles[panel * B + b, DSCALED] = 0
                            late_row = row * G * H + (G - L) * H
                            _multiply_add(tiles, tile + DSCALED * UNITS, dr, late_row, late, panel, width)
                            for u in range(tile, tile + width):
                                prepare_backward(
                                    _lane(tiles, SAVED * UNITS + u),
                                    _lane(tiles, PREV * UNITS + u),
                                    _lane(tiles, DSCALED * UNITS + u),
                                    _lane(tiles, DX * UNITS + u),
                                    _lane(tiles, DR * UNITS + u),
                                    _lane(tiles, DPREV * UNITS + u),
                                )
                        for g in range(G):
                            _copy(dx, (row * G + g) * H + unit, tiles, tile + (DX + g) * UNITS, count)
                            _copy(dr, (row * G + g) * H + unit, tiles, tile + (DR + g) * UNITS, count)
                        for s in range(S):
                            _copy(dstates, (s * B + b) * padded_H + unit, tiles, tile + (DPREV + s) * UNITS, count)
            for panel in range(early.shape[0]):
                for b in range(B):
                    if t < lengths[b]:
                        row = t * B + b
                        _multiply_add(dh, b * padded_P + panel * UNITS, dr, row * G * H, early, panel, width)
            for b in range(B):
                if t < lengths[b] and cut[t, b]:
                    dh[b] = 0
                    dstates[:, b] = 0

    return _compiled(run)
