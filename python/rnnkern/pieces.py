"""What all pieces of a model have, and those beside recurrent layers and `Linear`: `Embedding`, `Dropout`, `Last`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .arguments import (
    as_array,
    as_parameter,
    as_real_floats,
    chosen_names,
    describe,
    flag,
    float_dtype,
    integer,
    probability,
    row_lengths,
    seed_or_none,
)
from .functional import Grads, Parameters, add_into, refuse_to_copy

__all__ = ["Dropout", "Embedding", "Last", "Piece", "check_room", "last", "last_gradient", "parameters_within"]

Array = NDArray[Any]


_most_bytes: ContextVar[int] = ContextVar("most_bytes", default=np.iinfo(np.intp).max)


@contextmanager
def parameters_within(size: int) -> Iterator[None]:
    """Let pieces that are made meanwhile have parameters of so many bytes at most: those of a file, before it is
    believed.
    """
    token = _most_bytes.set(size)
    try:
        yield
    finally:
        _most_bytes.reset(token)


def check_room(arguments: str, size: int) -> None:
    """Parameters of so many bytes fit into memory; asked before any is made, since drawing them takes time."""
    most = _most_bytes.get()
    if size > most:
        raise ValueError(f"{arguments}: expected parameters of at most {most} bytes, got sizes that make {size}")
    np.empty(size, np.uint8)  # MemoryError here and not after minutes of drawing values


class Piece:
    """What all pieces of a model have: parameters, the configuration that makes such a piece again, copies.

    Every argument of a subclass's `__init__` but the seed is an attribute of that name.
    """

    _parameters: Parameters = Parameters({})

    @property
    def parameters(self) -> Mapping[str, Array]:
        """A read-only mapping of names to writable C-contiguous arrays; the next call sees what is written there."""
        return self._parameters

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(array.size for array in self._parameters.values())

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Features of x (for symbols how many there are) and of y; None where y has as many as x, whatever they are."""
        return None

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters by name."""
        return self._parameters.copies()

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Copy values into the parameters: all of them, or none when a name, shape or dtype is wrong.

        Raises
        ------
        ValueError, TypeError
            A name is missing or unknown, or an array does not fit; the message names it.
        """
        self._parameters.load("mapping", mapping)

    def configuration(self) -> dict[str, Any]:
        """The arguments that make such a piece, of plain types; without a seed, and without options at their defaults.

        >>> import rnnkern as rk
        >>> rk.LSTM(3, 4, batch_first=True, seed=0).configuration()
        {'input_size': 3, 'hidden_size': 4, 'batch_first': True}
        """
        arguments = {}
        for name, parameter in inspect.signature(type(self)).parameters.items():
            if name == "seed":
                continue
            # The backend in use may be another than the one that was asked for.
            value = getattr(self, "_chosen_backend" if name == "backend" else name)
            value = value.name if isinstance(value, np.dtype) else value
            if parameter.default is parameter.empty or value != parameter.default:
                arguments[name] = value
        return arguments

    def __repr__(self) -> str:
        """The call that makes such a piece, without the options left at their defaults."""
        known = inspect.signature(type(self)).parameters
        arguments = [
            repr(value) if known[name].default is inspect.Parameter.empty else f"{name}={value!r}"
            for name, value in self.configuration().items()
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # a copy has arrays and generators of its own


@dataclass(frozen=True, eq=False)
class _EmbeddingTape:
    owner: Embedding
    indices: Array  # intp, a copy, in the caller's shape

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_copy()


class Embedding(Piece):
    """A learned vector for each symbol: y[t, b] = weight[x[t, b]], as `torch.nn.Embedding`.

    Parameters
    ----------
    num_embeddings
        Number of symbols V; they are the integers from 0 to V - 1.
    embedding_dim
        Elements E of each vector.
    dtype
        float32 or float64.
    seed
        Of the initial weights, standard normal, drawn in float64; None draws a fresh one.

    Raises
    ------
    TypeError, ValueError
        An option is not as above; the message names it.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.Embedding(5, 3, seed=0)
    >>> y, tape = layer.forward(np.array([[0, 4], [4, 1]]))  # (T, B)
    >>> y.shape, layer.backward(tape, np.ones_like(y)).parameters["weight"][:, 0].tolist()
    ((2, 2, 3), [1.0, 1.0, 0.0, 0.0, 2.0])
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, dtype: DTypeLike = "float32", seed: int | None = None
    ) -> None:
        self.num_embeddings = integer("num_embeddings", num_embeddings, 1)
        self.embedding_dim = integer("embedding_dim", embedding_dim, 1)
        self.dtype = float_dtype(dtype)
        check_room("num_embeddings, embedding_dim", self.num_embeddings * self.embedding_dim * self.dtype.itemsize)
        generator = np.random.default_rng(seed_or_none(seed))
        weight = generator.standard_normal((self.num_embeddings, self.embedding_dim))
        self._parameters = Parameters({"weight": weight.astype(self.dtype)})

    @property
    def sizes(self) -> tuple[int, int]:
        """V and E."""
        return self.num_embeddings, self.embedding_dim

    def __call__(self, x: Any) -> Array:
        """y (..., E) of integers x (...) from 0 to V - 1; keeps nothing."""
        return self.parameters["weight"][self._indices(x)]

    def forward(self, x: Any) -> tuple[Array, _EmbeddingTape]:
        """y, read-only, and the tape for `backward`, which has a copy of x."""
        indices = self._indices(x)
        y = self.parameters["weight"][indices]
        y.flags.writeable = False
        return y, _EmbeddingTape(self, indices)

    def backward(
        self,
        tape: _EmbeddingTape,
        dy: Any,
        *,
        parameters: bool | Iterable[str] = True,
        into: Grads | None = None,
    ) -> Grads:
        """Gradients of one `forward`.

        Parameters
        ----------
        tape
            What this layer's `forward` returned.
        dy
            Gradient of y, in its shape.
        parameters
            Which parameters get a gradient: True for all, False for none, or their names.
        into
            What an earlier `backward` returned: what is asked for is added to it.

        Returns
        -------
        Grads
            `x` None, since symbols have no gradient; an empty `state`; `parameters`, where each symbol's row of
            `weight` is the sum of dy over the places where it stood.

        Raises
        ------
        TypeError, ValueError
            An argument is not as above; the message names it.
        """
        _check_tape(tape, _EmbeddingTape, self)
        wanted = chosen_names("parameters", parameters, self.parameters)
        rows = as_parameter("dy", dy, (*tape.indices.shape, self.embedding_dim), self.dtype)
        gradients = {name: np.zeros_like(self.parameters[name]) for name in wanted}
        for sums in gradients.values():
            _add_by_index(sums, tape.indices.reshape(-1), rows.reshape(-1, self.embedding_dim))
        return add_into(into, Grads(None, (), Parameters(gradients)))

    def _indices(self, x: Any) -> Array:
        """x as intp, a copy."""
        array = as_array("x", x)
        if array.dtype.kind not in "iu":
            raise TypeError(f"x: expected integers, got {describe(array)}")
        if array.size and (array.min() < 0 or array.max() >= self.num_embeddings):
            worst = array.min() if array.min() < 0 else array.max()
            raise ValueError(f"x: expected values from 0 to {self.num_embeddings - 1}, got {worst}")
        return array.astype(np.intp)


@dataclass(frozen=True, eq=False)
class _DropoutTape:
    owner: Dropout
    mask: Array  # 0 or 1 / (1 - p)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_copy()


class Dropout(Piece):
    """Each element zero with probability p, else times 1 / (1 - p), in `forward` alone; a call changes nothing.

    Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting", scaled in training as
    `torch.nn.Dropout`. Masks come from `numpy.random.Philox`, as those between the layers of a recurrent stack.

    Parameters
    ----------
    p
        From 0 to 1.
    seed
        Of the masks of forwards without a seed of their own; None draws a fresh one.

    Raises
    ------
    TypeError, ValueError
        An option is not as above; the message names it.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.Dropout(0.5)
    >>> y, tape = layer.forward(np.ones(6), seed=5)
    >>> y.tolist(), layer.backward(tape, np.ones(6)).x.tolist()
    ([2.0, 2.0, 0.0, 2.0, 2.0, 0.0], [2.0, 2.0, 0.0, 2.0, 2.0, 0.0])
    >>> layer(np.ones(6)).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, p: float = 0.5, *, seed: int | None = None) -> None:
        self.p = probability("p", p)
        self._generator = np.random.default_rng(seed_or_none(seed))

    def __call__(self, x: Any) -> Array:
        """A copy of x, float32 or float64 of any shape."""
        return as_real_floats("x", x).copy()

    def forward(self, x: Any, *, seed: int | None = None) -> tuple[Array, _DropoutTape]:
        """y, read-only and of the dtype of x, and the tape for `backward`; the same seed gives the same mask."""
        array = as_real_floats("x", x)
        seed = seed_or_none(seed)
        if seed is None:
            seed = int(self._generator.integers(2**63))
        drawn = np.random.Generator(np.random.Philox(seed)).random(array.shape, np.float32)
        mask = np.asarray((drawn >= self.p) * array.dtype.type(0 if self.p == 1 else 1 / (1 - self.p)))
        y = np.asarray(array * mask)
        y.flags.writeable = False
        return y, _DropoutTape(self, mask)

    def backward(self, tape: _DropoutTape, dy: Any) -> Grads:
        """Gradients of one `forward`: `x`, which is dy times the mask of that forward; no `state`, no `parameters`.

        Raises
        ------
        TypeError, ValueError
            tape is not of this layer, or dy not of the shape of y; the message names it.
        """
        _check_tape(tape, _DropoutTape, self)
        rows = as_parameter("dy", dy, tape.mask.shape, tape.mask.dtype)
        return Grads(np.asarray(rows * tape.mask), (), Parameters({}))


@dataclass(frozen=True, eq=False)
class _LastTape:
    owner: Last
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    lengths: Array | None  # a copy

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_copy()


class Last(Piece):
    """`last` as a piece: one answer for a whole sequence.

    Parameters
    ----------
    batch_first
        Whether the batch comes before the time.
    bidirectional
        Whether x is that of a bidirectional layer: then its first half is taken at the row's last step and its second
        half, of the reverse direction, at step 0, which that reaches last.

    Raises
    ------
    TypeError
        An option is no bool; the message names it.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer, head = rk.LSTM(3, 4, bidirectional=True, seed=0), rk.Last(bidirectional=True)
    >>> y, (h, c) = layer(np.ones((5, 2, 3)), lengths=[5, 2])
    >>> bool((head(y, lengths=[5, 2]) == np.concatenate([h[0], h[1]], axis=1)).all())
    True
    """

    def __init__(self, batch_first: bool = False, bidirectional: bool = False) -> None:
        self.batch_first = flag("batch_first", batch_first)
        self.bidirectional = flag("bidirectional", bidirectional)

    def __call__(self, x: Any, *, lengths: Any = None) -> Array:
        """(B, F) of x (T, B, F), or (B, T, F) with `batch_first`; (F,) of (T, F). Errors as of `last`."""
        x = as_real_floats("x", x)
        y = last(x, lengths, batch_first=self.batch_first)
        if self.bidirectional:
            self._exchange_reverse(x, y, lengths)
        return y

    def forward(self, x: Any, *, lengths: Any = None) -> tuple[Array, _LastTape]:
        """y, read-only, and the tape for `backward`, which has a copy of the lengths."""
        x = as_real_floats("x", x)
        y = self(x, lengths=lengths)
        y.flags.writeable = False
        return y, _LastTape(self, x.shape, y.shape, x.dtype, None if lengths is None else np.array(lengths))

    def backward(self, tape: _LastTape, dy: Any) -> Grads:
        """Gradients of one `forward`: `x`, which is zero where nothing was taken; no `state`, no `parameters`.

        Raises
        ------
        TypeError, ValueError
            tape is not of this piece, or dy not of the shape of y; the message names it.
        """
        _check_tape(tape, _LastTape, self)
        dy = as_parameter("dy", dy, tape.y_shape, tape.dtype)
        dx = last_gradient(dy, tape.x_shape, tape.lengths, batch_first=self.batch_first)
        if self.bidirectional:
            dx[..., dx.shape[-1] // 2 :] = 0
            self._exchange_reverse(dx, dy, tape.lengths, back=True)
        return Grads(dx, (), Parameters({}))

    def _exchange_reverse(self, x: Array, y: Array, lengths: Any, *, back: bool = False) -> None:
        """Copy the second half of step 0 of x to y, or the other way; for a row of no steps zero."""
        steps = x.swapaxes(0, 1) if self.batch_first and x.ndim == 3 else x
        if len(steps):
            ours, theirs = (one[..., y.shape[-1] // 2 :] for one in ((steps[0], y) if back else (y, steps[0])))
            ours[...] = np.where(np.asarray(1 if lengths is None else lengths)[..., None] > 0, theirs, 0)


def last(y: ArrayLike, lengths: ArrayLike | None = None, *, batch_first: bool = False) -> Array:
    """The last step of each row, for one answer to a whole sequence.

    The final state that a layer returns has the same rows for its last layer and, of a bidirectional layer, those of
    the reverse direction at *its* last step, which is the first; here stands what it has seen of the last step alone.

    Parameters
    ----------
    y
        float32 or float64, (T, B, F), (B, T, F) with `batch_first`, or (T, F) unbatched, without lengths.
    lengths
        Integers (B,), 0 <= length <= T; None where all rows have T steps. Past a row's end nothing is read.
    batch_first
        Whether the batch comes before the time.

    Returns
    -------
    ndarray
        (B, F), or (F,) unbatched, of the dtype of y; zero for a row of no steps.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or range, naming the argument.

    Examples
    --------
    >>> import rnnkern as rk
    >>> y = np.arange(6.0).reshape(3, 2, 1)  # T, B, F
    >>> rk.last(y, [3, 2]).tolist()
    [[4.0], [3.0]]
    >>> rk.last_gradient(np.ones((2, 1)), y.shape, [3, 2])[..., 0].tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    array = as_real_floats("y", y)
    _check_dimensions("y", array.shape, lengths, batch_first)
    if array.ndim == 2:
        (row,) = last(array[:, None])
        return np.asarray(row)
    rows, at = _ends(array.shape, lengths, batch_first)
    result = np.zeros((array.shape[0 if batch_first else 1], array.shape[-1]), array.dtype)
    result[rows] = array[at]
    return result


def last_gradient(
    dlast: ArrayLike, shape: Sequence[int], lengths: ArrayLike | None = None, *, batch_first: bool = False
) -> Array:
    """The gradient of y, of the gradient of what `last` gave.

    Parameters
    ----------
    dlast
        float32 or float64, (B, F), or (F,) unbatched.
    shape
        Of y.
    lengths, batch_first
        As given to `last`.

    Returns
    -------
    ndarray
        dy, of that shape and the dtype of dlast: zero but for the last step of each row.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or range, naming the argument.

    Examples
    --------
    >>> last_gradient(np.array([5.0]), (3, 1)).tolist()
    [[0.0], [0.0], [5.0]]
    """
    gradient = as_real_floats("dlast", dlast)
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape: expected a sequence of integers, got {describe(shape)}")
    sizes = tuple(integer(f"shape[{index}]", size, 0) for index, size in enumerate(shape))
    _check_dimensions("shape", sizes, lengths, batch_first)
    expected = sizes[1:] if len(sizes) == 2 else (sizes[0 if batch_first else 1], sizes[-1])
    if gradient.shape != expected:
        raise ValueError(f"dlast: expected shape {expected}, got {gradient.shape}")
    if len(sizes) == 2:
        return last_gradient(gradient[None], (sizes[0], 1, sizes[1]))[:, 0]
    rows, at = _ends(sizes, lengths, batch_first)
    dy = np.zeros(sizes, gradient.dtype)
    dy[at] = gradient[rows]
    return dy


def _ends(shape: tuple[int, ...], lengths: ArrayLike | None, batch_first: bool) -> tuple[Array, tuple[Array, Array]]:
    """Which rows have a last step, and the indices of these in y, of three dimensions."""
    B, T = shape[:2] if batch_first else shape[1::-1]
    ends = np.full(B, T) if lengths is None else row_lengths(lengths, T, B)
    rows = np.flatnonzero(ends)
    steps = ends[rows] - 1
    return rows, (rows, steps) if batch_first else (steps, rows)


def _check_dimensions(name: str, shape: tuple[int, ...], lengths: ArrayLike | None, batch_first: bool) -> None:
    expected = f"({'B, T' if flag('batch_first', batch_first) else 'T, B'}, F) or (T, F)"
    if len(shape) not in (2, 3):
        raise ValueError(f"{name}: expected {expected}, got {shape}")
    if len(shape) == 2 and lengths is not None:
        raise ValueError(f"lengths: expected None with unbatched y, got {describe(lengths)}")


def _check_tape(tape: _EmbeddingTape | _DropoutTape | _LastTape, kind: type, owner: object) -> None:
    if not isinstance(tape, kind):
        raise TypeError(f"tape: expected the tape that forward returned, got {describe(tape)}")
    if tape.owner is not owner:
        raise ValueError(f"tape: expected a tape of {owner!r}, got one of another layer, {tape.owner!r}")


def _add_by_index(sums: Array, indices: Array, rows: Array) -> None:
    """Add each of the rows to the one of `sums` that its index names."""
    if not indices.size:
        return
    # Sort, which takes 0.3 to 0.6 of the time of np.add.at.
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sums[ordered[starts]] += np.add.reduceat(rows[order], starts, axis=0)
