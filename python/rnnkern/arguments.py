"""The friendly checks: what a caller may pass, and its conversion to the layout of the backends."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .stack import GivenState, Stack, State

__all__ = [
    "Form",
    "Signature",
    "as_array",
    "as_floats",
    "as_parameter",
    "as_real_floats",
    "check_names",
    "check_out",
    "chosen_names",
    "flag",
    "float_dtype",
    "fraction",
    "integer",
    "number",
    "positive",
    "probability",
    "resets_of_shape",
    "row_lengths",
    "row_offsets",
    "seed_or_none",
    "warn_the_caller",
]

Array = NDArray[Any]


def describe(value: object) -> str:
    """What came, for the end of an error message."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, bool | int | float | str) else type(value).__name__


def warn_the_caller(message: str) -> None:
    """A UserWarning at the line outside this package from which it comes."""
    package, level = __name__.partition(".")[0] + ".", 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer (not a bool) in [least, most]."""
    expected = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}") from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def flag(name: str, value: object) -> bool:
    """A bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")
    return bool(value)


def probability(name: str, value: object) -> float:
    """A real number in [0, 1]."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name}: expected a number from 0 to 1, got {describe(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    return float(value)


def number(name: str, value: float) -> float:
    """A number (not a bool) as a float."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def positive(name: str, value: float, *, zero: bool = False, finite: bool = True) -> float:
    """A number > 0, or >= 0; finite where that is asked for."""
    result = number(name, value)
    if not (result > 0 or (zero and result == 0)) or (finite and math.isinf(result)):
        bounds = f"a {'finite ' if finite else ''}number {'>=' if zero else '>'} 0"
        raise ValueError(f"{name}: expected {bounds}, got {value}")
    return result


def fraction(name: str, value: float) -> float:
    """A number in [0, 1)."""
    result = number(name, value)
    if not 0 <= result < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    return result


def seed_or_none(value: object) -> int | None:
    """None, or a non-negative integer of any size."""
    return None if value is None else integer("seed", value, 0)


def float_dtype(value: DTypeLike) -> np.dtype[Any]:
    """float32 or float64 in the byte order of the machine."""
    try:
        dtype = np.dtype(value)
    except TypeError:
        raise TypeError(f"dtype: expected float32 or float64, got {describe(value)}") from None
    if value is None or dtype not in (np.float32, np.float64):
        raise ValueError(f"dtype: expected float32 or float64, got {value!r}")
    return dtype


def as_array(name: str, value: object) -> Array:
    """The array of an array, an array-like or an object with `__dlpack__` on the CPU, not copied where possible."""
    if not isinstance(value, np.ndarray | np.generic) and hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            got = f"{type(value).__name__} of {getattr(value, 'dtype', 'an unknown dtype')}"
            raise TypeError(f"{name}: expected an array on the CPU, got {got}: {error}") from error
    if type(value) is not np.ndarray and isinstance(value, np.ndarray) and np.ma.is_masked(value):
        raise TypeError(
            f"{name}: expected an array without masked elements, got a masked array, whose mask nothing reads; fill "
            "them, or leave them out by lengths or row_weights"
        )
    if _is_result(value):
        raise TypeError(f"{name}: expected an array, got a tuple, as a layer returns it: (y, state); pass y alone")
    try:
        return np.asarray(value)
    except ValueError as error:
        ragged = "inhomogeneous" in str(error)  # nested lists of different lengths
        pad = " rnnkern.data.pad makes one array of sequences of different lengths." if ragged else ""
        raise ValueError(f"{name}: expected an array, got {type(value).__name__}: {error}{pad}") from None


def _is_result(value: object) -> bool:
    """Whether this is what a layer returns, (y, state) or (y, state, tape), and not an array-like."""
    if not isinstance(value, tuple) or len(value) not in (2, 3) or not isinstance(value[0], np.ndarray):
        return False
    y, state = value[:2]
    if len(value) == 3:
        return not isinstance(value[2], np.ndarray | Sequence)
    return isinstance(state, tuple) or (isinstance(state, np.ndarray) and (y.ndim == 3 or y.shape != state.shape))


def as_floats(name: str, value: object, dtype: np.dtype[Any]) -> Array:
    """A C-contiguous, aligned array of dtype: the value itself where it is one, else one copy."""
    if type(value) is np.ndarray and value.dtype == dtype:
        flags = value.flags  # a new object each time
        if flags.c_contiguous and flags.aligned:
            return value
    array = as_array(name, value)
    if array.dtype.names is not None or not np.can_cast(array.dtype, dtype, "same_kind"):
        got = describe(array if array.ndim or array.dtype != object else value)  # any object is an array of one
        raise TypeError(f"{name}: expected numbers that convert to {dtype}, got {got}")
    return np.require(array, dtype, ["C", "ALIGNED"])


def as_parameter(name: str, value: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """`as_floats` of one exact shape."""
    array = as_floats(name, value, dtype)
    if array.shape != shape:
        raise ValueError(f"{name}: expected {dtype} of shape {shape}, got {describe(array)}")
    return array


def as_real_floats(name: str, value: object) -> Array:
    """An array of float32 or float64, whichever it is, in the byte order of the machine."""
    array = as_array(name, value)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def row_lengths(lengths: object, steps: int, batch: int) -> Array:
    """Lengths int64 (B,) of rows of so many steps, a read-only copy."""
    array = as_array("lengths", lengths)
    if isinstance(lengths, list | tuple) and not len(lengths):
        array = array.astype(np.int64)
    expected = f"lengths: expected integers of shape ({batch},)"
    if array.dtype.kind not in "iu":
        raise TypeError(f"{expected}, got {describe(array)}")
    if array.shape != (batch,):
        raise ValueError(f"{expected}, got {describe(array)}")
    if batch and (array.min() < 0 or array.max() > steps):
        raise ValueError(f"lengths: expected values from 0 to {steps}, got {array.min()} to {array.max()}")
    copied = array.astype(np.int64)
    copied.setflags(write=False)
    return copied


def row_offsets(offsets: object, rows: int) -> Array:
    """Offsets int64 (B + 1,) of sequences that have so many rows in all, a read-only copy."""
    array = as_array("offsets", offsets)
    expected = "offsets: expected integers of shape (B + 1,)"
    if array.dtype.kind not in "iu":
        raise TypeError(f"{expected}, got {describe(array)}")
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{expected}, got {describe(array)}")
    copied = array.astype(np.int64)
    if copied[0] != 0 or copied[-1] != rows:
        raise ValueError(
            f"offsets: expected values from 0 to {rows}, the rows of x, got {copied[0]} first and {copied[-1]} last"
        )
    if (np.diff(copied) < 0).any():
        raise ValueError("offsets: expected values that do not fall, got some that do")
    copied.setflags(write=False)
    return copied


def check_names(argument: str, given: Mapping[str, Any], expected: Iterable[str]) -> None:
    """The keys of a mapping are exactly the expected names."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected a mapping of names to arrays, got {describe(given)}")
    names = list(expected)
    missing = [name for name in names if name not in given]
    unknown = [str(name) for name in given if name not in names]
    if missing or unknown:
        came = " and ".join(
            f"{kind} {', '.join(which)}" for kind, which in (("without", missing), ("with unknown", unknown)) if which
        )
        raise ValueError(f"{argument}: expected the names {', '.join(names)}; got a mapping {came}")


def chosen_names(argument: str, value: object, known: Iterable[str]) -> list[str]:
    """Those of the known names that are chosen: all for True, none for False, else the names that are given."""
    known = list(known)
    if isinstance(value, bool | np.bool_):
        return known if value else []
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{argument}: expected True, False or names of parameters, got {describe(value)}")
    given = list(value)
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise ValueError(f"{argument}: expected names from {', '.join(known)}, got {', '.join(unknown)}")
    return [name for name in known if name in given]


def check_out(out: object, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: Iterable[object]) -> Array:
    """An array that a result may be written into."""
    if type(out) is not np.ndarray or out.dtype != dtype:
        raise TypeError(f"{_out(shape, dtype)}, got {describe(out)}")
    if out.shape != shape:
        raise ValueError(f"{_out(shape, dtype)}, got {describe(out)}")
    flags = out.flags
    if not flags.carray:  # C-contiguous, aligned and writable in one
        came = "a read-only one" if not flags.writeable else f"strides {out.strides}, aligned: {flags.aligned}"
        raise ValueError(f"{_out(shape, dtype)}, got {came}")
    for other in inputs:
        if isinstance(other, np.ndarray) and np.may_share_memory(out, other):
            raise ValueError(f"{_out(shape, dtype)} that shares no memory with an input, got one that does")
    return out


def resets_of_shape(resets: object, shape: tuple[int, ...]) -> Array:
    """Resets of one exact shape."""
    array = as_array("resets", resets)
    expected = f"resets: expected bool of shape {shape}"
    if array.dtype != np.bool_:
        raise TypeError(f"{expected}, got {describe(array)}")
    if array.shape != shape:
        raise ValueError(f"{expected}, got {describe(array)}")
    return array


def _out(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    return f"out: expected writable, C-contiguous {dtype} of shape {shape}"


class Form(NamedTuple):
    """How a caller has the rows of x, y and their gradients: batched, or in one of these ways."""

    unbatched: bool = False
    offsets: Array | None = None  # one sequence behind the other
    listed: bool = False  # in a list, an array each

    def sequences(self, rows: Array) -> list[Array]:
        """A view of the rows of each sequence."""
        assert self.offsets is not None
        return [rows[first:last] for first, last in pairwise(self.offsets.tolist())]


BATCHED, UNBATCHED = Form(), Form(unbatched=True)


class Arguments(NamedTuple):
    """What a caller has given, as backends take it."""

    x: Array
    state: GivenState | None
    lengths: Array | None
    resets: Array | None
    form: Form


def _is_list_of_arrays(value: object, dimensions: int) -> bool:
    """Whether this is a list or tuple of such arrays alone, and of at least one; else it is an array-like."""
    if not isinstance(value, list | tuple) or not value:
        return False
    for one in value:
        if not isinstance(one, np.ndarray) and not hasattr(one, "__dlpack__"):
            return False
        if getattr(one, "ndim", 0) != dimensions:
            return False
    return True


def refuse_sequences(x: object) -> None:
    """x is no list of sequences, which layers take, and whose arrays would be stacked else."""
    if _is_list_of_arrays(x, 2) and not _is_result(x):
        raise ValueError("x: expected one array, with lengths for rows that end early, got a list of sequences")


class Signature:
    """The shapes of a stack's arguments and results, and the way between them and the layout of the backends.

    Backends take x (T, B, I) or without padding (N, I), states (L*D, B, .), lengths int64 (B,), and resets bool like x.
    """

    def __init__(self, stack: Stack, batch_first: bool = False) -> None:
        self.stack = stack
        self.batch_first = batch_first
        self.dtype = stack.dtype
        self.input_size = stack.input_size
        self.output_size = stack.output_size
        self.state_names = stack.cell.states
        self.state_count = stack.num_layers * len(stack.directions)
        self.state_sizes = tuple(shape[-1] for shape in stack.state_shapes(1))

    def arguments(self, x: object, state: object, lengths: object, resets: object, offsets: object = None) -> Arguments:
        """What the caller has given as backends take it, and how the rows came."""
        listed = _is_list_of_arrays(x, 2)
        if listed or offsets is not None:
            return self._packed(x, state, lengths, resets, offsets, listed)
        x = as_floats("x", x, self.dtype)
        unbatched = x.ndim == 2
        form = UNBATCHED if unbatched else BATCHED
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            dimensions = "B, T" if self.batch_first else "T, B"
            raise ValueError(
                f"x: expected shape ({dimensions}, {self.input_size}) or (T, {self.input_size}), got {x.shape}"
            )
        if unbatched or self.batch_first:
            x = self.from_caller(x, form)
        steps, batch, _ = x.shape
        return Arguments(
            x,
            self.state("state", state, batch, unbatched),
            None if lengths is None else self.lengths(lengths, steps, batch, unbatched),
            None if resets is None else self.resets(resets, steps, batch, unbatched),
            form,
        )

    def _packed(self, x: Any, state: object, lengths: object, resets: Any, offsets: object, listed: bool) -> Arguments:
        """The same of sequences without padding: with offsets, or in a list."""
        for name, value in (("lengths", lengths), ("offsets", offsets if listed else None)):
            if value is not None:
                came = "a list of sequences" if listed else "offsets"
                raise ValueError(f"{name}: expected None with {came}, got {describe(value)}")
        if listed:
            parts = [as_floats(f"x[{i}]", one, self.dtype) for i, one in enumerate(x)]
            for i, one in enumerate(parts):
                if one.shape[1] != self.input_size:
                    raise ValueError(f"x[{i}]: expected shape (T, {self.input_size}), got {one.shape}")
            x, form = np.concatenate(parts), Form(offsets=np.cumsum([0, *map(len, parts)]), listed=True)
        else:
            x = as_floats("x", x, self.dtype)
            if x.ndim != 2 or x.shape[1] != self.input_size:
                raise ValueError(f"x: expected shape (rows, {self.input_size}) with offsets, got {x.shape}")
            form = Form(offsets=row_offsets(offsets, len(x)))
        assert form.offsets is not None
        if resets is not None:
            resets = self._packed_resets(resets, form)
        return Arguments(x, self.state("state", state, len(form.offsets) - 1), None, resets, form)

    def _packed_resets(self, resets: Any, form: Form) -> Array:
        """Resets of sequences without padding, a copy."""
        assert form.offsets is not None
        if form.listed and _is_list_of_arrays(resets, 1):
            lengths = np.diff(form.offsets).tolist()
            if [len(one) for one in resets] != lengths:
                raise ValueError(f"resets: expected arrays of {lengths} steps, got {[len(one) for one in resets]}")
            resets = np.concatenate([as_array("resets", one) for one in resets])
        return np.array(resets_of_shape(resets, (int(form.offsets[-1]),)), order="C")

    def step(self, batch: int, x_t: object, out: object) -> tuple[Array, Array]:
        """x_t (B, I) of a stream as backends take it, and the array for y_t (B, P): `out`, or a new one for None."""
        x = as_floats("x_t", x_t, self.dtype)
        if x.shape != (batch, self.input_size):
            raise ValueError(f"x_t: expected shape {(batch, self.input_size)}, got {x.shape}")
        shape = (batch, self.output_size)
        return x, np.empty(shape, self.dtype) if out is None else check_out(out, shape, self.dtype, (x_t, x))

    def state(
        self, name: str, value: Any, batch: int, unbatched: bool = False, halves: bool = False
    ) -> GivenState | None:
        """A state as a tuple of arrays (L*D, B, .); None, and each of several where `halves`, is left as it is."""
        count = self.state_count
        if value is None:
            return None
        if len(self.state_sizes) == 1:
            if _is_result(value):
                raise TypeError(f"{name}: expected one array, {self.state_names[0]}, got a tuple of {len(value)}")
            values: Sequence[Any] = (value,)
            names: tuple[str, ...] = (name,)
        else:
            expected = f"{name}: expected a tuple ({', '.join(self.state_names)})"
            if not isinstance(value, tuple | list):
                raise TypeError(f"{expected}, got {describe(value)}")
            if len(value) != len(self.state_sizes):
                raise ValueError(f"{expected}, got {len(value)} elements")
            values = value
            names = tuple(f"{name}[{index}]" for index in range(len(value)))
        result: list[Array | None] = []
        for one, one_name, size in zip(values, names, self.state_sizes, strict=True):
            if one is None and halves:
                result.append(None)
                continue
            shape = (count, size) if unbatched else (count, batch, size)
            result.append(as_parameter(one_name, one, shape, self.dtype).reshape(count, batch, size))
        return tuple(result)

    def lengths(self, lengths: object, steps: int, batch: int, unbatched: bool) -> Array:
        """Lengths as backends take them, a copy that nobody writes to: kernels read memory by them."""
        if unbatched:
            raise ValueError(f"lengths: expected None with unbatched x, got {describe(lengths)}")
        return row_lengths(lengths, steps, batch)

    def resets(self, resets: object, steps: int, batch: int, unbatched: bool) -> Array:
        """Resets as backends take them, a copy."""
        shape = (steps,) if unbatched else (batch, steps) if self.batch_first else (steps, batch)
        array = resets_of_shape(resets, shape)
        return np.array(array[:, None] if unbatched else self.time_major(array), order="C")

    def time_major(self, array: Array) -> Array:
        """A batched array of the caller with time first; a view."""
        return array.swapaxes(0, 1) if self.batch_first else array

    def output_shape(self, x: Array, form: Form) -> tuple[int, ...]:
        """Shape of y for the caller, of x as backends take it."""
        if form.offsets is not None:
            return (len(x), self.output_size)
        steps, batch, _ = x.shape
        if form.unbatched:
            return (steps, self.output_size)
        return (batch, steps, self.output_size) if self.batch_first else (steps, batch, self.output_size)

    def output_gradient(self, dy: Any, x: Array, form: Form) -> Array:
        """dy of the caller as backends take it."""
        if form.listed and isinstance(dy, list | tuple):
            assert form.offsets is not None
            count = len(form.offsets) - 1
            if len(dy) != count:
                raise ValueError(f"dy: expected {count} arrays, one for each sequence, got {len(dy)}")
            shapes = [(length, self.output_size) for length in np.diff(form.offsets).tolist()]
            named = zip((f"dy[{i}]" for i in range(count)), dy, shapes, strict=True)
            return np.concatenate([as_parameter(*one, self.dtype) for one in named])
        return self.from_caller(as_parameter("dy", dy, self.output_shape(x, form), self.dtype), form)

    def from_caller(self, array: Array, form: Form) -> Array:
        """x, y or one of their gradients as backends take it: C-contiguous, copied where it must be."""
        if form.offsets is not None:
            return array
        return array[:, None] if form.unbatched else np.ascontiguousarray(self.time_major(array))

    def to_caller(self, array: Array, form: Form) -> Any:
        """The way back."""
        if form.offsets is not None:
            return form.sequences(array) if form.listed else array
        return array[:, 0] if form.unbatched else np.ascontiguousarray(self.time_major(array))

    def state_to_caller(self, state: State, unbatched: bool) -> Any:
        """The array of a cell with one state, else the tuple."""
        if unbatched:
            state = tuple(one[:, 0] for one in state)
        return state[0] if len(state) == 1 else state
