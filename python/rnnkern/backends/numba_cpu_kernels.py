"""The loops of `numba_layers` on a CPU: products are NumPy's, the functions of a cell are compiled, each by itself.

The cache of Numba keys a function by the bytes of those it closes over. That key is the same in every process only
while these are plain functions, as `register_jitable` leaves them, and has their code only where they were made in a
function.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba.extending import register_jitable
from numba.misc.appdirs import AppDirs

from ..cells import Cell
from .numba_layers import loop
from .numba_units import Function, unit_functions

__all__ = ["array", "run"]

array = np.ascontiguousarray

_OPTIONS = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True}
_inlined = register_jitable(_nrt=False, forceinline=True, **_OPTIONS)


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


def _on_rows(unit: Function) -> Any:
    def function(H: Any, rows: Any, matrices: Any) -> None:
        # Take rows by their numbers: were they counted, LLVM would ask once, of all rows, whether what is read and
        # written overlaps, which it does then, and not of each row, and would make no vectors.
        for b in rows:
            for u in range(H):
                unit(H, b, u, matrices)

    # Keep the names of all cells apart: a symbol of Numba is the name and a number, which another process gives to
    # another function, and of two from the cache with one symbol the first would run for both.
    function.__qualname__ = f"{unit.__name__}_on_rows"
    return _cached(function)


@lru_cache
def _functions(cell: Cell, dtype: np.dtype[Any], forward: bool) -> list[Any]:
    """`step` and `prepare` of a cell, compiled when they are first called."""
    return [_on_rows(unit) for unit in unit_functions(cell, dtype, forward, _inlined)]


def _rows(of_steps: Any) -> list[tuple[Any, Any]]:
    """Of each step the rows that are True: as a mask, for NumPy takes several times longer with one, and as numbers."""
    if of_steps.all():
        return [(True, np.arange(of_steps.shape[1]))] * len(of_steps)
    return [(True if rows.all() else rows[:, None], np.flatnonzero(rows)) for rows in of_steps]


def _assign(out: Any, source: Any, rows: Any, add: bool) -> None:
    if add:
        np.add(out, source, out=out, where=rows[0])
    else:
        np.copyto(out, source, where=rows[0])


def _product(out: Any, source: Any, weights: Any, add: Any, rows: Any) -> None:
    np.add(source @ weights, add, out=out, where=rows[0])


def run(cell: Cell, dtype: np.dtype[Any], forward: bool, H: int, steps: Any, arrays: Any) -> None:
    """See `numba_layers`."""
    arrays = arrays._replace(active=_rows(arrays.active), cut=_rows(arrays.cut))
    compiled = _functions(cell, dtype, forward)
    functions = [lambda H, rows, matrices, one=one: one(H, rows[1], matrices) for one in compiled]
    loop(forward, _assign, _product, functions)(H, steps, arrays)
