"""From data to what layers take: padding, batches of like lengths, windows over a series, symbols as integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arguments import as_array, describe, flag, fraction, integer, number, seed_or_none

__all__ = ["Batch", "Vocabulary", "batches", "pad", "time_split", "windows"]

Array = NDArray[Any]

_POOL = 64  # batches whose sequences are sorted together: like lengths in each, and another company in every epoch


class Batch(NamedTuple):
    """Some sequences side by side."""

    x: Array  #: (T, B, ...), (B, T, ...) with batch_first
    lengths: Array  #: int64 (B,)
    indices: Array  #: int64 (B,), which of the sequences these are


def pad(sequences: Sequence[ArrayLike], *, batch_first: bool = False, value: float = 0) -> tuple[Array, Array]:
    """Sequences of different lengths as one array, and their lengths.

    Parameters
    ----------
    sequences
        Arrays (T_b, ...) that differ in the first dimension alone: (T_b, I) of features, or (T_b,) of symbols.
    batch_first
        Whether the batch comes before the time.
    value
        What stands past a row's end; layers and losses that are given the lengths do not read it.

    Returns
    -------
    x : ndarray
        (T, B, ...), or (B, T, ...) with `batch_first`, of the dtype that all sequences fit in; T is the longest.
    lengths : ndarray
        int64 (B,).

    Raises
    ------
    TypeError, ValueError
        There is no sequence, or they do not fit together; the message names the first that does not.

    Examples
    --------
    >>> x, lengths = pad([[1, 2, 3], [4]])
    >>> x.tolist(), lengths.tolist()
    ([[1, 4], [2, 0], [3, 0]], [3, 1])
    """
    arrays = _arrays(sequences)
    _check_value(value, arrays[0].dtype)
    return _side_by_side(arrays, flag("batch_first", batch_first), value)


def batches(
    sequences: Sequence[ArrayLike],
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int | None = None,
    batch_first: bool = False,
    value: float = 0,
) -> Iterator[Batch]:
    """One epoch of padded batches, each of sequences of like lengths, so that little of it is padding.

    Every sequence comes once. Shuffled sequences are sorted by length within pools of 64 batches, and the batches of
    all pools come in random order; without `shuffle` all are sorted together, the shortest first.

    Parameters
    ----------
    sequences
        As for `pad`.
    batch_size
        Sequences of each batch, at least 1; the last one that is cut from a pool may have fewer.
    shuffle
        Whether the order is random; for validation it need not be.
    seed
        Of the order, such as the number of the epoch; None draws a fresh one.
    batch_first, value
        As for `pad`.

    Yields
    ------
    Batch
        `x`, `lengths`, and `indices`, by which labels are found: `labels[batch.indices]`.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> sequences = [[7, 7, 7], [8], [9, 9, 9], [6, 6]]
    >>> for x, lengths, indices in batches(sequences, 2, shuffle=False):
    ...     print(x.tolist(), lengths.tolist(), indices.tolist())
    [[8, 6], [0, 6]] [1, 2] [1, 3]
    [[7, 9], [7, 9], [7, 9]] [3, 3] [0, 2]
    """
    arrays = _arrays(sequences)
    _check_value(value, arrays[0].dtype)
    size, generator = integer("batch_size", batch_size, 1), np.random.default_rng(seed_or_none(seed))
    flag("batch_first", batch_first)
    lengths = np.array([len(one) for one in arrays], np.int64)
    order = generator.permutation(len(arrays)) if flag("shuffle", shuffle) else np.arange(len(arrays))
    whole = size * _POOL if shuffle else len(arrays)
    chosen = []
    for start in range(0, len(order), whole):
        pool = order[start : start + whole]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        chosen += [pool[at : at + size] for at in range(0, len(pool), size)]
    if shuffle:
        generator.shuffle(chosen)
    # Return a generator, and do not be one, so that what is wrong is said at the call.
    return (Batch(*_side_by_side([arrays[index] for index in one], batch_first, value), one) for one in chosen)


def time_split(steps: int, *fractions: float) -> tuple[slice, ...]:
    """Parts of a series that follow one another in time: the first takes what the others leave.

    Parameters
    ----------
    steps
        Steps of the series.
    fractions
        Of the later parts, such as 0.1, 0.2 for validation and test, each in [0, 1), less than 1 in all; their steps
        are rounded.

    Returns
    -------
    tuple of slice
        One more than there are fractions, for `windows` and for the series itself: `series[train].mean(0)`, so that
        scaling does not see the future either.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> time_split(100, 0.1, 0.2)
    (slice(0, 70, None), slice(70, 80, None), slice(80, 100, None))
    """
    count = integer("steps", steps, 0)
    parts = [fraction(f"fractions[{index}]", one) for index, one in enumerate(fractions)]
    if sum(parts) >= 1:
        raise ValueError(f"fractions: expected less than 1 in all, got {sum(parts):g}")
    sizes = [round(count * one) for one in parts]
    ends = [int(end) for end in np.cumsum([count - sum(sizes), *sizes])]
    return tuple(slice(start, end) for start, end in zip([0, *ends], ends, strict=False))


def windows(
    series: ArrayLike,
    length: int,
    horizon: int = 1,
    *,
    stride: int = 1,
    part: slice | None = None,
    batch_first: bool = False,
) -> tuple[Array, Array]:
    """Pieces of a series and what follows each, without a leak: what follows lies in `part`, all of it.

    A window of a part that begins at step s may look back before s, where a forecast would know the series too; no
    window of an earlier part has anything of s or later, neither in x nor in y.

    Parameters
    ----------
    series
        Numbers (T, F), or (T,), which is (T, 1).
    length
        Steps of x, at least 1.
    horizon
        Steps of y, at least 1.
    stride
        Steps from one window to the next, at least 1.
    part
        Steps in which y lies, as `time_split` gives them; None for the whole series.
    batch_first
        Whether windows come before the time.

    Returns
    -------
    x : ndarray
        (length, N, F), or (N, length, F) with `batch_first`, a copy; N windows in the order of time, none where they
        do not fit.
    y : ndarray
        (horizon, N, F), or (N, horizon, F): the steps that follow those of x.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> series = np.arange(10)
    >>> train, test = time_split(10, 0.3)
    >>> x, y = windows(series, 3, 2, part=train)
    >>> x[..., 0].T.tolist(), y[..., 0].T.tolist()
    ([[0, 1, 2], [1, 2, 3], [2, 3, 4]], [[3, 4], [4, 5], [5, 6]])
    >>> x, y = windows(series, 3, 2, part=test)
    >>> x[..., 0].T.tolist(), y[..., 0].T.tolist()
    ([[4, 5, 6], [5, 6, 7]], [[7, 8], [8, 9]])
    """
    array = as_array("series", series)
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiub":
        raise ValueError(f"series: expected numbers of shape (T, F) or (T,), got {describe(array)}")
    sizes = [integer(name, one, 1) for name, one in (("length", length), ("horizon", horizon), ("stride", stride))]
    back, ahead, every = sizes
    if part is not None and (not isinstance(part, slice) or part.step not in (None, 1)):
        raise TypeError(f"part: expected a slice of steps that follow one another, or None, got {part!r}")
    start, stop, _ = (part or slice(None)).indices(len(array))
    first = np.arange(max(start, back), stop - ahead + 1, every)  # the first step of each y
    steps_first = not flag("batch_first", batch_first)
    rows = array if array.ndim == 2 else array[:, None]
    found = []
    for steps in (np.arange(-back, 0), np.arange(ahead)):
        found.append(rows[steps[:, None] + first if steps_first else steps + first[:, None]])
    return found[0], found[1]


class Vocabulary:
    """Symbols, such as characters, words or events, as integers from 0 on.

    Parameters
    ----------
    symbols
        In the order of their integers, none twice; what `symbols` of another vocabulary gives, also from a file.
    unknown
        One of the symbols, which stands for those that are not among them; None where these are an error.

    Raises
    ------
    TypeError, ValueError
        There is no symbol, one comes twice, or `unknown` is not among them.

    Examples
    --------
    >>> words = Vocabulary.count(["the cat".split(), "the dog".split()], unknown="?")
    >>> words.symbols, len(words)
    (('?', 'the', 'cat', 'dog'), 4)
    >>> words.encode(["the", "cow"]).tolist(), words.decode([1, 3])
    ([1, 0], ['the', 'dog'])
    """

    def __init__(self, symbols: Iterable[Hashable], *, unknown: Hashable | None = None) -> None:
        self.symbols = tuple(symbols)
        self.unknown = unknown
        self._indices = {symbol: index for index, symbol in enumerate(self.symbols)}
        if not self.symbols:
            raise ValueError("symbols: expected at least one, got none")
        if len(self._indices) < len(self.symbols):
            twice = next(symbol for index, symbol in enumerate(self.symbols) if self._indices[symbol] != index)
            raise ValueError(f"symbols: expected each once, got {twice!r} twice")
        if unknown is not None and unknown not in self._indices:
            raise ValueError(f"unknown: expected one of the symbols, got {unknown!r}")

    @classmethod
    def count(
        cls, sequences: Iterable[Iterable[Hashable]], *, least: int = 1, unknown: Hashable | None = None
    ) -> Vocabulary:
        """The symbols of sequences, the most frequent first and of equally frequent ones the first.

        Parameters
        ----------
        sequences
            Of what is trained on, so that a test meets unknown symbols as they will come.
        least
            How often a symbol must come, at least 1.
        unknown
            What stands for the others, at 0 where it does not come in the sequences; None for no such symbol.

        Raises
        ------
        TypeError, ValueError
            `least` is not as above, or no symbol comes so often.
        """
        fewest = integer("least", least, 1)
        counts = Counter(symbol for sequence in sequences for symbol in sequence)
        symbols = [symbol for symbol, times in counts.most_common() if times >= fewest]
        if unknown is not None and unknown not in symbols:
            symbols.insert(0, unknown)
        return cls(symbols, unknown=unknown)

    def __len__(self) -> int:
        return len(self.symbols)

    def __repr__(self) -> str:
        return f"Vocabulary of {len(self)} symbols"

    def encode(self, sequence: Iterable[Hashable]) -> NDArray[np.int64]:
        """The integers int64 (T,) of a sequence of symbols.

        Raises
        ------
        ValueError
            A symbol is not known, and there is no `unknown`.
        """
        default = None if self.unknown is None else self._indices[self.unknown]
        found = []
        for symbol in sequence:
            index = self._indices.get(symbol, default)
            if index is None:
                raise ValueError(f"sequence: expected known symbols, got {symbol!r}")
            found.append(index)
        return np.array(found, np.int64)

    def decode(self, indices: ArrayLike) -> list[Hashable]:
        """The symbols of integers (T,).

        Raises
        ------
        TypeError, ValueError
            indices are not integers of one dimension from 0 to the number of symbols - 1.
        """
        array = as_array("indices", indices)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(f"indices: expected integers of shape (T,), got {describe(array)}")
        if array.size and (array.min() < 0 or array.max() >= len(self)):
            raise ValueError(f"indices: expected values from 0 to {len(self) - 1}, got {array.min()} to {array.max()}")
        return [self.symbols[int(index)] for index in array]


def _arrays(sequences: Sequence[ArrayLike]) -> list[Array]:
    """The sequences as arrays of one dtype that differ in the first dimension alone."""
    if isinstance(sequences, str | np.ndarray) or not isinstance(sequences, Sequence):
        raise TypeError(f"sequences: expected a list of arrays (T_b, ...), got {describe(sequences)}")
    arrays = [as_array(f"sequences[{index}]", one) for index, one in enumerate(sequences)]
    if not arrays:
        raise ValueError("sequences: expected at least one, got none")
    for index, one in enumerate(arrays):
        if one.ndim < 1 or one.dtype.kind not in "fiub":
            raise TypeError(f"sequences[{index}]: expected numbers of shape (T_b, ...), got {describe(one)}")
        if one.shape[1:] != arrays[0].shape[1:]:
            expected = ", ".join(["T_b", *map(str, arrays[0].shape[1:])])
            raise ValueError(f"sequences[{index}]: expected shape ({expected}), got {one.shape}")
    # Leave out the dtype of what is empty: of an empty list it is float64, beside lists of symbols.
    dtype = np.result_type(*({one.dtype for one in arrays if one.size} or {arrays[0].dtype}))
    return [one.astype(dtype, copy=False) for one in arrays]


def _check_value(value: float, dtype: np.dtype[Any]) -> None:
    number("value", value)
    with np.errstate(all="ignore"):
        fits = dtype.kind == "f" or np.asarray(value).astype(dtype) == value
    if not fits:
        raise ValueError(f"value: expected one that {dtype} has, as the sequences, got {value}")


def _side_by_side(arrays: Sequence[Array], batch_first: bool, value: float) -> tuple[Array, Array]:
    """What `pad` returns."""
    lengths = np.array([len(one) for one in arrays], np.int64)
    x = np.full((len(arrays), int(lengths.max()), *arrays[0].shape[1:]), value, arrays[0].dtype)
    for row, one in zip(x, arrays, strict=True):
        row[: len(one)] = one
    return (x if batch_first else np.ascontiguousarray(x.swapaxes(0, 1))), lengths
