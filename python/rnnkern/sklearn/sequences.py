"""Sequences of unequal length: what X may be, and batches of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_array

from ..arguments import as_array, describe

Array = NDArray[Any]

FLOATS = [np.float64, np.float32]  # what X and y may be without a conversion
BATCHES_SORTED_TOGETHER = 16  # by length: enough that batches have little padding, few enough that they still vary
CHANNELS_AT_MOST, STEPS_PER_CHANNEL = 12, 10  # of arrays that look like (channels, T), see warn_of_channels_first


@dataclass(frozen=True, eq=False)
class Sequences:
    """N sequences, one after the other."""

    steps: Array  # (S, I), S steps in all
    lengths: Array  # (N,), positive

    @cached_property
    def starts(self) -> Array:
        """Where in `steps` each sequence begins."""
        return np.cumsum(self.lengths) - self.lengths

    def batch(self, rows: Array) -> tuple[Array, Array | None]:
        """x (T, B, I) of the sequences `rows`, and their lengths; None where all have T steps."""
        lengths = self.lengths[rows]
        t = np.arange(lengths.max())[:, None]
        x = self.steps[self.starts[rows] + np.minimum(t, lengths - 1)]
        return x, None if lengths.min() == len(t) else lengths


@dataclass(frozen=True, eq=False)
class Windows(Sequences):
    """N windows of one series, which may overlap."""

    firsts: Array  # (N,), the step of the series at which each begins

    @cached_property
    def starts(self) -> Array:
        return self.firsts


def batches(lengths: Array, rows: Array, size: int, generator: np.random.Generator) -> Iterator[Array]:
    """`rows` in random batches of nearly equal numbers, at most `size`, of similar length."""
    rows = generator.permutation(rows)
    batches: list[Array] = []
    for start in range(0, len(rows), BATCHES_SORTED_TOGETHER * size):
        some = rows[start : start + BATCHES_SORTED_TOGETHER * size]
        some = some[np.argsort(lengths[some], kind="stable")]
        count = math.ceil(len(some) / size)
        shortest, longer = divmod(len(some), count)  # the first `longer` have one more
        ends = [index * shortest + min(index, longer) for index in range(count + 1)]
        batches += [some[slice(*pair)] for pair in pairwise(ends)]
    for index in generator.permutation(len(batches)):
        yield batches[index]


def as_sequences(X: Any) -> tuple[Array, Array, list[Any] | None] | None:
    """Steps (S, I) and lengths (N,) of a list of sequences or an array (N, T, I); None for a table.

    A list of arrays is a list of sequences, a list of lists the array it makes, or sequences where it makes none. Of
    data frames the columns come third.
    """
    _assert_single_levels(X)
    if isinstance(X, Iterator):
        raise TypeError(f"X: expected a list of sequences or an array, got {describe(X)}; pass list(X)")
    if isinstance(X, list | tuple) and len(X) and not getattr(X[0], "shape", ()):
        try:
            X = np.asarray(X)
        except ValueError:  # lists of different lengths
            X = list(X)
    if isinstance(X, np.ndarray) and X.ndim == 1 and X.dtype.kind in "SU":
        ways = "RNNTagger, or rnnkern.data.Vocabulary and rnnkern.Sequential with an Embedding, take symbols"
        raise ValueError(f"X: expected sequences of numbers, got {len(X)} strings; {ways}")
    shape = getattr(X, "shape", None)
    if shape is not None and len(shape) == 2 and getattr(X, "dtype", np.dtype(object)) == np.dtype(object):
        _assert_not_nested(X)
    if shape is not None and len(shape) == 3:
        array = check_array(as_array("X", X), dtype=FLOATS, allow_nd=True, ensure_all_finite=False, input_name="X")
        if array.shape[1] == 0:
            raise ValueError(f"X: expected sequences of at least one step, got an array of shape {array.shape}")
        return array.reshape(-1, array.shape[2]), np.full(len(array), array.shape[1]), None
    if not isinstance(X, list | tuple) and not (shape is not None and len(shape) == 1 and X.dtype == object):
        return None
    if len(X) == 0:
        return None
    X = list(X)  # a series would look for an index that is 0
    arrays: list[Array] = []
    columns = columns_of(X[0])
    for index, one in enumerate(X):
        if columns is not None and columns_of(one) not in (None, columns):
            raise ValueError(f"X[{index}]: expected the columns {columns}, as X[0] has, got {columns_of(one)}")
        array = _numbers(f"X[{index}]", one)
        array = array[:, None] if array.ndim == 1 else array
        features = arrays[0].shape[1] if arrays else "I"
        if array.ndim != 2 or (arrays and array.shape[1] != features):
            transposed = arrays and array.ndim == 2 and len(array) == len(arrays[0])
            raise ValueError(
                f"X[{index}]: expected shape (T, {features}), got {array.shape}"
                + ("; steps come first: of arrays (channels, T) pass [x.T for x in X]" if transposed else "")
            )
        if len(array) == 0:
            raise ValueError(f"X[{index}]: expected at least one step, got an empty sequence")
        arrays.append(array)
    return np.concatenate(arrays), np.array([len(array) for array in arrays]), columns


def columns_of(sequence: Any) -> list[Any] | None:
    """What the features of a data frame are called; None of what has no names for them."""
    names = getattr(sequence, "columns", None)
    return None if names is None else list(names)


def _numbers(name: str, sequence: Any) -> Array:
    """The array of a sequence, whose objects and strings are numbers, or an error that names it."""
    array = as_array(name, sequence)
    if array.dtype.kind not in "OSU":
        return array
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected numbers, got {describe(array)}: {error}") from None


def _assert_single_levels(table: Any) -> None:
    """A data frame has one name for each row and column: of more, rows are steps and columns features of steps."""
    ways_out = {
        "index": "of an index of (sequence, step) pass [x.to_numpy() for _, x in X.groupby(level=0, sort=False)], and "
        "a target for each",
        "columns": "of columns of (feature, step) pass X.to_numpy().reshape(len(X), I, T).transpose(0, 2, 1)",
    }
    for axis, way_out in ways_out.items():
        levels = getattr(getattr(table, axis, None), "nlevels", 1)
        if levels > 1:
            raise ValueError(
                f"X: expected a table with one sequence in each row, got a MultiIndex of {levels} levels as its "
                f"{axis}; {way_out}; of rows that are sequences all the same, of one feature, X.to_numpy()"
            )


def _assert_not_nested(table: Any) -> None:
    """The cells of a table are numbers: not series or arrays, as nested data frames have."""
    cells = table.iloc[:1] if hasattr(table, "iloc") else table[:1]
    if any(np.ndim(cell) for cell in np.asarray(cells, dtype=object).flat):
        raise ValueError(
            "X: expected numbers in a table, got sequences in its cells; pass a list of arrays (T, I), such as "
            "[np.column_stack(list(row)) for row in X.to_numpy()]"
        )


def assert_finite(steps: Array, lengths: Array) -> None:
    """NaN and infinity are refused, with the sequence and the step."""
    finite = np.isfinite(steps).all(axis=1)
    if finite.all():
        return
    first = int(finite.argmin())
    index = int(np.searchsorted(np.cumsum(lengths), first, side="right"))
    where = f"X[{index}]: expected finite numbers, got"
    step = first - int(lengths[:index].sum())
    if not np.isnan(steps[first]).any():
        raise ValueError(f"{where} infinity at step {step}")
    raise ValueError(
        f"{where} NaN at step {step}; where it pads a shorter sequence, pass a list of sequences (T_i, I) without "
        "their padding; fill other gaps"
    )


def warn_of_channels_first(lengths: Array, features: int) -> None:
    """Few steps with very many features each are more often a series of few channels, with its axes the other way."""
    T = int(lengths[0])
    if (lengths == T).all() and T <= CHANNELS_AT_MOST and features >= STEPS_PER_CHANNEL * T:
        warnings.warn(
            f"X is read as (N, T, I): {T} steps of {features} features. If it is (N, channels, T), pass "
            "np.transpose(X, (0, 2, 1))",
            stacklevel=5,
        )
